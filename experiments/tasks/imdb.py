"""Text: whether a film review of IMDB is positive, read byte by byte (Long Range Arena, arXiv:2011.04006, section 2.2).

Sources (`config.task.source`):
    aclImdb  the data set's folder aclImdb, the folder that holds it, or the packed file, at data_dir
    tfds     the packed file, downloaded and checked by TensorFlow Datasets, which needs no TensorFlow for that
             (data_dir: its folder, or "" for the usual one)
The 25,000 + 25,000 labelled reviews are the training and the test split. The S4 line has no validation split here and
quotes the best test accuracy of a run; with `validation` so many training reviews, the last of a fixed permutation, are
held back to choose by. A token is a byte; 0 is in no review and pads. What is beyond `length` is cut off.
"""

import dataclasses
import itertools
import pathlib
import tarfile
import zlib
from collections.abc import Iterator

import numpy as np

from experiments.tasks.base import ArrayTask, Examples
from ssm import naming

LABELS = ("neg", "pos")
REVIEWS = 12_500  # of a label, in train and in test
SPLIT_SEED = 0
REMEDY = "the data set is aclImdb_v1.tar.gz, unpacked or not"


@dataclasses.dataclass(frozen=True)
class Options:
    name: str
    source: str = "aclImdb"
    data_dir: str = ""
    length: int = 4096
    validation: int = 0

    def load(self) -> ArrayTask:
        sources = {"aclImdb": lambda: pathlib.Path(self.data_dir).expanduser(), "tfds": self._download}
        if self.source not in sources:
            raise naming.unknown("task source", self.source, sources)
        if self.length < 1 or not 0 <= self.validation < 2 * REVIEWS:
            raise ValueError(
                f"task text: length={self.length} must be at least 1 and validation={self.validation}"
                f" below {2 * REVIEWS:,}, the training reviews"
            )
        path = sources[self.source]()
        data = {split: padded(reviews, self.length) for split, reviews in read(path).items()}
        if self.validation:
            data = held_back(data, self.validation)
        sizes = ", ".join(f"{len(part.targets):,} {split}" for split, part in data.items())
        return ArrayTask("token", 256, len(LABELS), f"IMDB reviews as bytes, {path} ({sizes})", data)

    def _download(self) -> pathlib.Path:
        folder = pathlib.Path(self.data_dir or "~/tensorflow_datasets").expanduser()
        try:
            import tensorflow_datasets as tfds

            builder = tfds.builder_cls("imdb_reviews")
            manager = tfds.download.DownloadManager(
                download_dir=folder / "downloads", url_infos=builder.url_infos, dataset_name=builder.name
            )
            return pathlib.Path(manager.download(next(iter(builder.url_infos))))
        except Exception as error:
            raise ValueError(
                f"task source tfds: imdb_reviews cannot be downloaded ({type(error).__name__}: {str(error)[:120]});"
                f" use source 'aclImdb' with data_dir: {REMEDY}"
            ) from error


def padded(reviews: list[tuple[int, bytes]], length: int) -> Examples:
    """Bytes to uint8 (n, length), zeros behind."""
    labels, texts = zip(*reviews, strict=True)
    inputs = np.zeros((len(texts), length), np.uint8)
    for row, text in zip(inputs, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8, min(len(text), length))
    lengths = np.asarray([min(len(text), length) for text in texts], np.int32)
    return Examples(inputs, np.asarray(labels, np.int32), lengths)


def held_back(data: dict[str, Examples], count: int) -> dict[str, Examples]:
    """The training split less `count` of its examples, these as validation, and the test split."""
    order = np.random.RandomState(SPLIT_SEED).permutation(len(data["train"].targets))
    parts = {"train": np.sort(order[:-count]), "validation": np.sort(order[-count:])}
    fields = (data["train"].inputs, data["train"].targets, data["train"].lengths)
    cut = {split: Examples(*(field[rows] for field in fields)) for split, rows in parts.items()}
    return cut | {"test": data["test"]}


def read(path: pathlib.Path) -> dict[str, list[tuple[int, bytes]]]:
    """Label and text of every review by split, in the order of the files' names.

    Raises ValueError naming what is missing or cannot be read, or a split with another number of reviews.
    """
    try:
        files = dict(_folder(path) if path.is_dir() else _packed(path))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {REMEDY}") from error
    reviews = {}
    for split, (label, name) in itertools.product(("train", "test"), enumerate(LABELS)):
        found = sorted(file for file in files if file[:2] == (split, name))
        if len(found) != REVIEWS:
            raise ValueError(f"{path}: {len(found):,} reviews in {split}/{name}, expected {REVIEWS:,}; {REMEDY}")
        reviews.setdefault(split, []).extend((label, files[file]) for file in found)
    return reviews


File = tuple[tuple[str, str, str], bytes]  # split, label, name; content


def _folder(path: pathlib.Path) -> Iterator[File]:
    root = path / "aclImdb" if (path / "aclImdb").is_dir() else path
    for split, label in itertools.product(("train", "test"), LABELS):
        for file in (root / split / label).glob("*.txt"):
            yield (split, label, file.name), file.read_bytes()


def _packed(path: pathlib.Path) -> Iterator[File]:
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            parts = pathlib.PurePosixPath(member.name).parts[-4:]
            if member.isfile() and len(parts) == 4 and parts[0] == "aclImdb" and member.name.endswith(".txt"):
                yield parts[1:], archive.extractfile(member).read()
