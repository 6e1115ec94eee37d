"""ListOps: the grammar, against a recursive definition in plain integers; files that resume; the benchmark's TSV."""

import hashlib
import os
import shutil

import numpy as np
import pytest

from experiments import tasks
from experiments.datasets.listops import expressions as grammar
from experiments.datasets.listops import files
from experiments.datasets.listops.expressions import OPERATORS, VOCABULARY, Expressions, Limits, expressions
from experiments.tasks import listops

SMALL = Limits(min_length=4, max_length=40, max_depth=4, max_args=4)
TASK = {"name": "listops", "length": 40, "examples": (60, 7, 5), **SMALL._asdict()}
VALUES = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(np.median(x)), "[SM": lambda x: sum(x) % 10}
MASK = 2**64 - 1


def mixed(x: int) -> int:
    """SplitMix64's finaliser in integers without end."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def child(bits: int, i: int) -> int:
    return mixed(bits + (i + 1) * 0x9E3779B97F4A7C15 & MASK)


def drawn(bits: int, depth: int, limits: Limits) -> tuple[list[str], int]:
    """Tokens and value of one node, by recursion."""
    part = bits >> 28 & 0xFFFFFFFF
    if depth == limits.max_depth or bits >> 62:
        return [str(part * 10 >> 32)], part * 10 >> 32
    operator = OPERATORS[bits >> 60 & 3]
    children = [drawn(child(bits, i), depth + 1, limits) for i in range(2 + (part * (limits.max_args - 1) >> 32))]
    tokens = [token for tokens, _ in children for token in tokens]
    return [operator, *tokens, "]"], VALUES[operator]([value for _, value in children])


def split(part: Expressions) -> list[list[str]]:
    return [[VOCABULARY[t] for t in row] for row in np.split(part.tokens, np.cumsum(part.lengths)[:-1])]


@pytest.mark.parametrize("limits", [SMALL, Limits(2, 14, 10, 3)], ids=["all depths", "not all depths"])
def test_expressions_are_those_of_the_recursion(limits):
    expected = [drawn(child(mixed(7), k), 1, limits) for k in range(100, 700)]
    expected = [(t, value) for t, value in expected if limits.min_length < len(t) < limits.max_length]
    part = expressions(7, 100, 600, limits)
    assert len(expected) > 60 and list(zip(split(part), part.values.tolist(), strict=True)) == expected


def test_the_benchmarks_lengths():
    limits = Limits()
    part = expressions(0, 0, 400, limits)
    assert part.lengths.min() > 500 and part.lengths.max() < 2000 and len(part.lengths) > 20
    tokens, value = next(e for k in range(400) if 500 < len((e := drawn(child(mixed(0), k), 1, limits))[0]) < 2000)
    assert split(part)[0] == tokens and part.values[0] == value


def test_every_choice_has_its_probability():
    """Before any expression is turned down; bounds of five standard deviations."""
    roots = grammar._hash(np.arange(20_000, dtype=np.uint64) * grammar.GOLDEN)
    levels = grammar._grown(roots, Limits())
    assert len(levels) == 10 and not levels[-1].arguments.any()
    nodes = levels[:-1]
    is_operator = np.concatenate([level.arguments > 0 for level in nodes])
    near(np.bincount(is_operator), [0.75, 0.25])
    near(np.bincount(np.concatenate([level.arguments for level in nodes])[is_operator], minlength=11)[2:], [1 / 9] * 9)
    near(np.bincount(np.concatenate([level.operator for level in nodes])[is_operator]), [1 / 4] * 4)
    digits = [level.digit[level.arguments == 0] for level in levels]
    near(np.bincount(np.concatenate(digits)), [1 / 10] * 10)


def near(counts, shares):
    n, shares = counts.sum(), np.asarray(shares)
    assert (np.abs(counts - n * shares) < 5 * np.sqrt(n * shares * (1 - shares))).all(), (counts / n, shares)


def test_a_seed_gives_the_same_data_everywhere(tmp_path, monkeypatch):
    """Whatever the number of workers; and on this machine as on the first, by a hash made there."""
    monkeypatch.setattr(files, "ATTEMPTS", 128)
    digests = set()
    for workers in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
        part = files.generate(tmp_path / str(workers), 0, SMALL, 200)
        digests.add(hashlib.sha256(b"".join(array.astype("<i4").tobytes() for array in part)).hexdigest())
    assert digests == {"8c6649a6848e46213e3759d5461d63d5b118983829029e43d4d4e7c48a411b3e"}
    assert not np.array_equal(files.generate(tmp_path / "other", 1, SMALL, 200).values, part.values)


def test_splits_follow_one_another_and_padding_is_behind(tmp_path):
    task = tasks.load(TASK | {"data_dir": str(tmp_path)})
    assert (task.splits, task.length, task.input_size, task.classes) == (("train", "validation", "test"), 40, 16, 10)
    rows = np.concatenate([task.data[name].inputs for name in task.splits])
    assert [task.examples(name) for name in task.splits] == [60, 7, 5] and len({row.tobytes() for row in rows}) == 72
    pool = expressions(0, 0, 2**12, SMALL)
    np.testing.assert_array_equal(rows[rows > 0], files.taken(pool, 0, 72).tokens)
    lengths = np.concatenate([task.data[name].lengths for name in task.splits])
    np.testing.assert_array_equal(rows > 0, np.arange(40) < lengths[:, None])
    np.testing.assert_array_equal(task.data["test"].targets, pool.values[67:72])
    batch = task.preprocess(next(task.train_batches(4, 0, 0)), None, True)
    assert batch["inputs"].dtype == np.int32 and batch["lengths"].shape == (4,)


def test_a_stopped_generation_goes_on(tmp_path, monkeypatch):
    """Files that are there are kept; one that is missing and one that is cut short are made again, the same."""
    monkeypatch.setattr(files, "ATTEMPTS", 128)
    whole = files.generate(tmp_path, 0, SMALL, 50)
    made = sorted(tmp_path.iterdir())
    before = [file.read_bytes() for file in made]
    made[0].unlink()
    made[1].write_bytes(before[1][:-100])
    again = []
    monkeypatch.setattr(files, "expressions", lambda *a: again.append(a[1] // 128) or expressions(*a))
    same = files.generate(tmp_path, 0, SMALL, 50)
    assert sorted(again) == [0, 1] and [file.read_bytes() for file in made] == before
    assert sorted(tmp_path.iterdir()) == made
    for name, array in same._asdict().items():
        np.testing.assert_array_equal(array, getattr(whole, name))


def test_the_same_through_tfds(tmp_path):
    """Made and read without TensorFlow."""
    from experiments.datasets.listops.builder import Config, ListOps

    config = Config(name="small", seed=3, sizes=TASK["examples"], limits=SMALL)
    builder = ListOps(config=config, data_dir=tmp_path)
    builder.download_and_prepare()
    task = tasks.load(TASK | {"data_dir": str(tmp_path / "downloads"), "seed": 3})
    for name in task.splits:
        read = [builder.as_data_source(name)[i] for i in range(task.examples(name))]
        rows = {(row["tokens"].tobytes(), int(row["value"])) for row in read}
        part = task.data[name]
        expected = zip(part.inputs, part.lengths, part.targets, strict=True)
        assert rows == {(x[:n].tobytes(), int(y)) for x, n, y in expected}


def test_a_disk_that_is_too_full(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"listops-v1-seed0 needs 125 MB more, its disk has 50"):
        tasks.load({"name": "listops", "data_dir": str(tmp_path)})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/listops-v1-seed0 cannot be made: Not a directory"):
        tasks.load({"name": "listops", "data_dir": str(tmp_path / "file")})


# The benchmark's files -----------------------------------------------------------------------------

ROW = "( ( ( ( [MAX 4 ) 3 ) ( ( ( [SM 7 ) 8 ) ] ) ) ] )\t5"
TOKENS = ["[MAX", "4", "3", "[SM", "7", "8", "]", "]"]


@pytest.fixture
def release(tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "SIZES", {"train": 3, "validation": 2, "test": 1})
    folder = tmp_path / "lra_release" / "lra_release" / "listops-1000"
    folder.mkdir(parents=True)
    for split, count in listops.SIZES.items():
        (folder / listops.FILES[split]).write_text("\r\n".join(["Source\tTarget", *[ROW] * count, ""]))
    return folder


def test_the_benchmarks_files(release):
    task = tasks.load({"name": "listops", "source": "lra_release", "data_dir": str(release.parent), "length": 10})
    assert [task.examples(split) for split in task.splits] == [3, 2, 1]
    assert [VOCABULARY[token] for token in task.data["train"].inputs[0]] == TOKENS + ["<pad>"] * 2
    assert task.data["test"].targets.tolist() == [5] and task.data["test"].lengths.tolist() == [8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"Source\tTarget\n{ROW}\n{ROW}\n{ROW[:20]}", "line 4: no expression with its value; the file may be cut"),
        (f"Source\tTarget\n{ROW}\n{ROW}\n{ROW[:-1]}", "line 4: no expression with its value"),
        (f"Source\tTarget\n{ROW}\n{ROW}\n", "2 expressions, the release has 3; download it again"),
        (f"{ROW}\n{ROW}\n{ROW}\n", "the first line is not 'Source' and 'Target'"),
        (
            f"Source\tTarget\n{ROW}\n{ROW.replace('MAX', 'FIRST')}\n{ROW}\n",
            "line 3: .* is not an expression of ListOps",
        ),
        (None, "cannot be read: No such file"),
    ],
)
def test_damaged_files_are_named(release, text, message):
    path = release / "basic_train.tsv"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{message}|{path} {message}"):
        tasks.load({"name": "listops", "source": "lra_release", "data_dir": str(release.parent)})


def test_an_expression_longer_than_the_length(release):
    with pytest.raises(ValueError, match="length=7 is too short for an expression of 8 tokens"):
        tasks.load({"name": "listops", "source": "lra_release", "data_dir": str(release.parent), "length": 7})


def test_the_outer_folder_of_the_release(release):
    outer = release.parent.parent
    with pytest.raises(ValueError, match=f"data_dir is the inner lra_release; use data_dir='{outer}/lra_release'"):
        tasks.load({"name": "listops", "source": "lra_release", "data_dir": str(outer)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "generate"}, "unknown task source 'generate'; did you mean 'generated'"),
        ({"length": 38}, "max_length=40 and length=38 must be in this order"),
        ({"max_length": 5}, "min_length=4, max_length=5 and length=40"),
        ({"examples": (1, 0, 1)}, r"examples=\(1, 0, 1\) must be three numbers of at least 1"),
        ({"max_args": 1}, "max_args=1"),
        ({"seed": -1}, "seed=-1"),
        ({"max_depth": 1}, "attempts gave no expression within Limits"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(TASK | {"data_dir": str(tmp_path)} | options)
