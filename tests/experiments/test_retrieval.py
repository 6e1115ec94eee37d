"""Pairs of papers: the benchmark's TSV, and training on it from the command's own entry."""

import pathlib

import pytest

from configs.lra import retrieval as config_file
from experiments import commandline, tasks, train
from experiments.tasks import retrieval
from experiments.workdir import Workdir

ROWS = ['1.0\tA\tB\tfirst text\tanother, "quoted"', "0.0\tB\tC\tanother\tthe third, which is longer than 20 bytes"] * 4


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    folder = tmp_path / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for split, count in (("train", 8), ("validation", 6), ("test", 5)):
        (folder / retrieval.FILES[split]).write_text("".join(f"{row}\n" for row in ROWS[:count]))
    return folder


def load(data_dir, **options):
    return tasks.load({"name": "retrieval", "data_dir": str(data_dir), "length": 20, **options})


def test_pairs(folder):
    """The folder of the files, or the one above it."""
    for data_dir in (folder, folder.parent):
        task = load(data_dir)
        assert {s: task.examples(s) for s in task.splits} == {"train": 8, "validation": 6, "test": 5}
        assert (task.kind, task.length, task.input_size, task.classes) == ("retrieval", 40, 256, 2)
        part = task.data["train"]
        assert part.targets.tolist() == [1, 0] * 4 and part.lengths[:2].tolist() == [[10, 17], [7, 20]]
        assert part.inputs[1].tobytes() == b"another".ljust(20, b"\0") + b"the third, which is "
    batch = task.preprocess(next(task.train_batches(4, 0, 0)), None, True)
    assert batch["inputs"].shape == (4, 2, 20) and batch["lengths"].shape == (4, 2)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("1.0\tA\tB\tcut", "line 9: 4 of 5 fields, or no end; download the file again"),
        ("1.0\tA\tB\tfirst\tcut", "line 9: 5 of 5 fields, or no end"),
        ("1.5\tA\tB\tfirst\tsecond\n", "line 9: the label is b'1.5', or a text is empty"),
        ("1.0\tA\tB\t\tsecond\n", "line 9: the label is b'1.0', or a text is empty"),
    ],
)
def test_damaged_files_are_named(folder, end, message):
    path = folder / retrieval.FILES["train"]
    path.write_text(path.read_text() + end)
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        load(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=f"has no new_aan_pairs.train.tsv; use data_dir='{folder}'"):
        load(tmp_path)
    (folder / retrieval.FILES["test"]).write_text("")
    with pytest.raises(ValueError, match="new_aan_pairs.test.tsv is empty"):
        load(folder)
    (folder / retrieval.FILES["test"]).unlink()
    with pytest.raises(ValueError, match="new_aan_pairs.test.tsv cannot be read: No such file"):
        load(folder)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        load(folder, length=0)


def test_two_steps_of_training(folder, tmp_path, capsys):
    fields = {"task.data_dir": folder, "task.length": 20, "train_steps": 2}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    arguments = [f"--config={config_file.__file__}:lru,smoke", f"--workdir={tmp_path / 'run'}", *overrides]
    assert commandline.run(train.main, ["train", *arguments]) == 0, capsys.readouterr().err
    lines = Workdir.opened(tmp_path / "run").lines()
    evaluated = next(line for line in lines if "test/accuracy" in line)
    assert evaluated["step"] == 2 and evaluated["test/accuracy"] in [20.0 * k for k in range(6)]
    assert "pairs of papers" in capsys.readouterr().out
