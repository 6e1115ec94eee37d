"""Retrieval: whether one paper of the ACL Anthology cites another, read byte by byte (arXiv:2011.04006, section 2.2).

The benchmark's files, new_aan_pairs.{train,eval,test}.tsv, lie in data_dir or in its tsv_data: 147,086 pairs to train
on, 18,090 to validate and 17,437 to test. A row is a label, 0.0 or 1.0, two names and two texts, between tabs, and
quotes are part of a text. A token is a byte; 0 is in no text and pads. What is beyond `length` bytes is cut off.
"""

import dataclasses
import itertools
import pathlib
from typing import ClassVar

import numpy as np

from experiments.tasks.base import ArrayTask, Examples

FILES = {split: f"new_aan_pairs.{name}.tsv" for split, name in (("train",) * 2, ("validation", "eval"), ("test",) * 2)}
LABELS = {b"0.0": 0, b"1.0": 1, b"0": 0, b"1": 1}


@dataclasses.dataclass(frozen=True)
class Options:
    name: str
    data_dir: str = "data/lra_release/lra_release"
    length: int = 4000

    def load(self) -> ArrayTask:
        folder = pathlib.Path(self.data_dir).expanduser()
        folder = folder / "tsv_data" if (folder / "tsv_data").is_dir() else folder
        if not (folder / FILES["train"]).is_file():
            found = itertools.chain(*(folder.glob("*/" * depth + FILES["train"]) for depth in (1, 2, 3)))
            hint = next((f"; use data_dir={str(path.parent)!r}" for path in found), "")
            raise ValueError(f"task retrieval: {folder} has no {FILES['train']}{hint}")
        if self.length < 1:
            raise ValueError(f"task retrieval: length={self.length} must be at least 1")
        data = {split: read_tsv(folder / file, self.length) for split, file in FILES.items()}
        sizes = ", ".join(f"{len(part.targets):,} {split}" for split, part in data.items())
        source = f"pairs of papers of the ACL Anthology as bytes, {folder} ({sizes})"
        return PairTask("token", 256, 2, source, data)


@dataclasses.dataclass(frozen=True)
class PairTask(ArrayTask):
    """Inputs (b, 2, l) and lengths (b, 2)."""

    STORED: ClassVar = {"token": ("iu", (3,))}

    kind: str = "retrieval"


def read_tsv(path: pathlib.Path, length: int) -> Examples:
    """Inputs uint8 (n, 2, length), zeros behind.

    Raises ValueError naming the file and the line that is not a whole row.
    """
    try:
        with path.open("rb") as file:
            rows = [_row(path, number, line, length) for number, line in enumerate(file, 1)]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise ValueError(f"{path} is empty; download it again")
    inputs = np.zeros((len(rows), 2, length), np.uint8)
    for pair, (_, *texts) in zip(inputs, rows, strict=True):
        for row, text in zip(pair, texts, strict=True):
            row[: len(text)] = np.frombuffer(text, np.uint8)
    lengths = np.asarray([[len(text) for text in texts] for _, *texts in rows], np.int32)
    return Examples(inputs, np.asarray([label for label, *_ in rows], np.int32), lengths)


def _row(path: pathlib.Path, number: int, line: bytes, length: int) -> tuple[int, bytes, bytes]:
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != 5 or not line.endswith(b"\n"):
        raise ValueError(f"{path}, line {number}: {len(fields)} of 5 fields, or no end; download the file again")
    label, _, _, *texts = fields
    if label not in LABELS or not all(texts):
        raise ValueError(f"{path}, line {number}: the label is {label[:20]!r}, or a text is empty")
    return LABELS[label], *(text[:length] for text in texts)
