import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import commandline, tasks
from experiments.datasets.pathfinder import __main__ as command
from experiments.datasets.pathfinder import files, images
from experiments.tasks import pathfinder

SIZES = {"train": 50, "validation": 10, "test": 10}
EXAMPLES = tuple(SIZES.values())


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(files, "PART", 20)


def load(data_dir: pathlib.Path, **options) -> tasks.Task:
    return tasks.load({"name": "pathfinder", "data_dir": str(data_dir), "examples": EXAMPLES, **options})


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.npy")}


def test_the_task_reads_what_is_generated(tmp_path):
    task = load(tmp_path)
    assert (task.length, task.encoder, task.classes) == (1024, "continuous", 2)
    assert task.splits == ("train", "validation", "test")
    for split, n in SIZES.items():
        expected, labels = images.generate(32, 0, split, 0, n)
        np.testing.assert_array_equal(task.data[split].inputs[..., 0], expected)
        np.testing.assert_array_equal(task.data[split].targets, labels)
    assert isinstance(task.data["train"].inputs, np.memmap) and task.data["train"].inputs.dtype == np.uint8
    batch = next(task.train_batches(8, seed=0, start_step=3))
    assert batch["inputs"].shape == (8, 32, 32, 1) and "Pathfinder 32 x 32, seed 0 in" in task.source
    read = np.asarray(task.preprocess(batch, jax.random.key(0), True)["inputs"])
    np.testing.assert_allclose(read, batch["inputs"].reshape(8, 1024, 1) / 127.5 - 1.0, atol=1e-6)
    assert read.min() == -1 and read.max() == 1, "what no stroke covers, and a marker"


def test_sizes_of_the_two_tasks():
    assert pathfinder.RESOLUTIONS == {"pathfinder": 32, "pathx": 128}
    assert pathfinder.Options("pathx").examples == (160_000, 20_000, 20_000)


def test_one_and_two_threads_make_the_same_bytes(tmp_path):
    for threads in (1, 2):
        made = files.generate(tmp_path / str(threads), 32, 5, SIZES, threads)
        assert made.drawn == 70
    assert content(tmp_path / "1") == content(tmp_path / "2")


@pytest.mark.parametrize("torn", [False, True])
def test_a_generation_that_was_stopped_goes_on(tmp_path, monkeypatch, torn):
    """Here it stops within a part, as one that is killed does, once with half a line in the journal."""
    files.generate(tmp_path / "whole", 32, 5, SIZES)
    generate, calls = images.generate, []

    def stopped(*part):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*part)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(images, "generate", stopped)
        files.generate(tmp_path / "stopped", 32, 5, SIZES, 1)
    done = (tmp_path / "stopped" / "done").read_text()
    assert done.split("\n") == ["", "train 0 20", "train 20 20", ""]
    if torn:
        (tmp_path / "stopped" / "done").write_text(done[:-4])
    again = files.generate(tmp_path / "stopped", 32, 5, SIZES)
    assert again.drawn == (50 if torn else 30)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert files.generate(tmp_path / "stopped", 32, 5, SIZES).drawn == 0


def damage(folder: pathlib.Path, kind: str) -> None:
    images_file = folder / "train-images.npy"
    match kind:
        case "truncated":
            images_file.write_bytes(images_file.read_bytes()[:-1])
        case "missing":
            images_file.unlink()
        case "size":
            np.save(images_file, np.zeros((50, 16, 16, 1), np.uint8))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "train-images.npy is missing or damaged"),
        ("missing", "train-images.npy is missing or damaged"),
        ("size", r"uint8\[50, 16, 16, 1\], expected uint8\[50, 32, 32, 1\]"),
    ],
)
def test_damaged_files_are_named(tmp_path, kind, message):
    files.generate(tmp_path, 32, 0, SIZES)
    damage(tmp_path, kind)
    with pytest.raises(ValueError, match=message + f".*delete {tmp_path}"):
        files.generate(tmp_path, 32, 0, SIZES)


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(ValueError, match=r"needs 3,277 MB more, and its disk has 1 MB left"):
        files.generate(tmp_path, 128, 0, files.SIZES)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/.* cannot be written"):
        load(tmp_path / "file")


def test_numba_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ValueError, match="run: pip install numba"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "lra_relase"}, "unknown task source 'lra_relase'; did you mean 'lra_release'"),
        ({"resolution": 100}, "unknown Pathfinder resolution '100'"),
        ({"examples": (5, 5)}, r"examples=\(5, 5\) must be three numbers"),
        ({"seed": -1}, "seed=-1"),
        ({"image": 3}, "option of task pathfinder 'image'"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **options)


def test_the_tfds_builder(tmp_path):
    from experiments.datasets.pathfinder.builder import Config, Pathfinder

    config = Config(name="small", resolution=32, seed=4, sizes=(7, 2, 2))
    builder = Pathfinder(config=config, data_dir=tmp_path)
    builder.download_and_prepare()
    expected, labels = images.generate(32, 4, "train", 0, 7)
    read = {x["image"].tobytes(): x["label"] for x in builder.as_data_source("train")}
    assert read == {x.tobytes(): label for x, label in zip(expected, labels, strict=True)}
    assert len(builder.as_data_source("test")) == 2 and "tensorflow" not in sys.modules
    assert {"pathfinder32-seed0", "pathfinder128-seed0"} <= set(Pathfinder.builder_configs)


# The benchmark's files -----------------------------------------------------------------------------


def write_release(folder: pathlib.Path, n: int = 24, resolution: int = 32) -> pathlib.Path:
    """Folders of images and their metadata; the first pixel numbers an image."""
    root = folder / "pathfinder32" / "curv_contour_length_14"
    for batch in range(0, 12, 6):
        (root / "imgs" / str(batch)).mkdir(parents=True)
        (root / "metadata").mkdir(exist_ok=True)
        rows = []
        for i in range(n // 2):
            picture = np.full((resolution, resolution), batch * 10 + i, np.uint8)
            Image.fromarray(picture).save(root / "imgs" / str(batch) / f"sample_{i}.png")
            rows.append(f"imgs/{batch} sample_{i}.png {i} {i % 2} 1.8 14 4 5 1.5 2 1")
        (root / "metadata" / f"{batch}.npy").write_text("\n".join(rows) + "\n")
    return folder


def test_the_release_is_read_in_order(tmp_path):
    task = load(write_release(tmp_path / "lra_release"), source="lra_release", examples=(16, 4, 4))
    firsts = [int(x) for split in SIZES for x in task.data[split].inputs[:, 0, 0, 0]]
    assert firsts == [*range(12), *range(60, 72)]
    assert task.data["test"].targets.tolist() == [0, 1, 0, 1] and task.length == 1024


def harm(folder: pathlib.Path, kind: str) -> pathlib.Path:
    root = folder / "pathfinder32" / "curv_contour_length_14"
    picture, rows = root / "imgs" / "6" / "sample_3.png", root / "metadata" / "0.npy"
    match kind:
        case "outer":
            (folder / "lra_release").mkdir()
        case "elsewhere":
            return folder / "pathfinder32"
        case "size":
            Image.fromarray(np.zeros((33, 32), np.uint8)).save(picture)
        case "empty":
            picture.write_bytes(b"")
        case "missing":
            picture.unlink()
        case "row":
            rows.write_text(rows.read_text()[:-32])
        case "array":
            np.save(rows, np.zeros(300))
        case "none":
            shutil.rmtree(root / "metadata")
            (root / "metadata").mkdir()
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("outer", "outer of two folders, whose pathfinder128 is a wrong early version.*use data_dir=.*lra_release'"),
        ("elsewhere", "pathfinder32/pathfinder32/.*metadata is not a folder; data_dir is the inner lra_release"),
        ("size", "sample_3.png: 32 x 33 pixels, expected 32 x 32"),
        ("empty", "sample_3.png cannot be read"),
        ("missing", "sample_3.png cannot be read"),
        ("row", "0.npy, row 12: 'imgs/0 sample' is not folder, file, number and label"),
        ("array", "0.npy cannot be read as text"),
        ("none", "metadata names no images"),
    ],
)
def test_a_wrong_release_is_named(tmp_path, kind, message):
    folder = harm(write_release(tmp_path / "release"), kind)
    with pytest.raises(ValueError, match=message):
        load(folder, source="lra_release", examples=(16, 4, 4))


def test_more_examples_than_the_release_has(tmp_path):
    with pytest.raises(ValueError, match="24 images, fewer than"):
        load(write_release(tmp_path), source="lra_release")


# The command ---------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return commandline.run(command.main, ["pathfinder", *map(str, arguments)])


def test_the_command_generates_and_draws(tmp_path, capsys):
    generate = "generate", "--resolution=32", f"--data-dir={tmp_path}", "--images=70", "--threads=1"
    assert run(*generate) == 0 and "70 images, of which 70 were drawn now" in capsys.readouterr().out
    assert run(*generate) == 0 and "of which 0 were drawn now" in capsys.readouterr().out
    assert load(tmp_path, examples=(56, 7, 7)).examples("train") == 56
    assert run("sheet", "--resolution=32", f"--output={tmp_path / 'sheet.png'}") == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    shown, labels = images.generate(32, 0, "train", 0, 32)
    np.testing.assert_array_equal(sheet[1:33, 1:33], shown[labels == 1][0])
    np.testing.assert_array_equal(sheet[1:33, -33:-1], shown[labels == 0][3])
    assert run("generate", "--resolution=32", f"--data-dir={tmp_path}", "--images=5") == 2
    assert capsys.readouterr().err.startswith("error: --images=5 must be at least 10")
