"""Text: whether a film review of IMDB is positive, read byte by byte (Long Range Arena, arXiv:2011.04006, section 2.2).

data_dir is the data set's folder aclImdb, one that holds it, or the packed file or a folder with that; or "" for the
packed file, downloaded and checked by TensorFlow Datasets. The 25,000 + 25,000 labelled reviews are the training and
the test split. The S4 line has no validation split here and quotes the best test accuracy of a run; of the training
reviews the last `validation` of a fixed permutation are held back to choose by. A token is a byte; 0 is in no review
and pads. What is beyond `length` is cut off.
"""

import dataclasses
import itertools
import pathlib

import numpy as np

from experiments.tasks import archives
from experiments.tasks.base import ArrayTask, Examples, held_back

LABELS = ("neg", "pos")
REVIEWS = 12_500  # of a label, in train and in test
VALIDATION_SEED = 0
ARCHIVES = ("aclImdb_v1.tar.gz", "aclImdb_labelled_patched.tgz")
REMEDY = "the data set is aclImdb_v1.tar.gz, unpacked or not"


@dataclasses.dataclass(frozen=True)
class Options:
    """validation: reviews held back."""

    name: str
    data_dir: str = ""
    length: int = 4096
    validation: int = 0

    def load(self) -> ArrayTask:
        if self.length < 1:
            raise ValueError(f"task text: length={self.length} must be at least 1")
        if self.data_dir:
            path = archives.locate(self.data_dir, ARCHIVES, REMEDY)
        else:
            (path,) = archives.download("imdb_reviews", f"name data_dir: {REMEDY}").values()
        data = {split: padded(*reviews, self.length) for split, reviews in read(path).items()}
        data = held_back(data, self.validation, VALIDATION_SEED)
        sizes = ", ".join(f"{len(part.targets):,} {split}" for split, part in data.items())
        return ArrayTask("token", 256, len(LABELS), f"IMDB reviews as bytes from {path} ({sizes})", data)


def padded(labels: list[int], texts: list[bytes], length: int) -> Examples:
    """Inputs uint8 (n, length), zeros behind a text."""
    inputs = np.zeros((len(texts), length), np.uint8)
    for row, text in zip(inputs, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8, min(len(text), length))
    lengths = np.asarray([min(len(text), length) for text in texts], np.int32)
    return Examples(inputs, np.asarray(labels, np.int32), lengths)


def read(path: pathlib.Path) -> dict[str, tuple[list[int], list[bytes]]]:
    """Labels and texts by split, in the order of the files' names.

    Raises ValueError naming what cannot be read, or a folder with another number of reviews.
    """
    files = {}
    for name, content in archives.tracked(archives.contents(path, _wanted, REMEDY), "reading IMDB", 4 * REVIEWS):
        files.setdefault(name.parts[-3:-1], {})[name.name] = content
    reviews = {"train": ([], []), "test": ([], [])}
    for (split, (labels, texts)), (label, name) in itertools.product(reviews.items(), enumerate(LABELS)):
        found = files.get((split, name), {})
        if len(found) != REVIEWS:
            raise ValueError(f"{path}: {len(found):,} reviews in {split}/{name}, expected {REVIEWS:,}; {REMEDY}")
        labels += [label] * REVIEWS
        texts += [found[file] for file in sorted(found)]
    return reviews


def _wanted(name: pathlib.PurePosixPath) -> bool:
    split, label = name.parts[-3:-1] if len(name.parts) >= 3 else ("", "")
    return split in ("train", "test") and label in LABELS and name.suffix == ".txt"
