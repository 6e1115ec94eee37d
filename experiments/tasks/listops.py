"""ListOps: the value of a nested expression of 500 to 2,000 tokens (Long Range Arena, arXiv:2011.04006, section 2.2).

Sources (`config.task.source`):
    generated    drawn from `seed` as the benchmark's were, by `experiments.datasets.listops`, and kept in a
                 folder of data_dir; a generation that was stopped goes on where it was. Not the benchmark's own
                 examples: their seed is not known.
    lra_release  the benchmark's files, listops-1000/basic_{train,val,test}.tsv in data_dir, which is the inner of the
                 two folders named lra_release
A token is 0 for padding, 1 to 10 for the digits, then [MIN, [MAX, [MED, [SM and ]; the brackets around pairs that the
files have say nothing more and are left out, as the S4 line does. It also ends each expression by a token of its own.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np

from experiments.datasets.listops import files
from experiments.datasets.listops.expressions import CLOSE, DIGIT, OPERATORS, SIZES, VOCABULARY, Expressions, Limits
from experiments.tasks.base import ArrayTask, Examples
from ssm import naming

FILES = dict(zip(SIZES, ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"), strict=True))


@dataclasses.dataclass(frozen=True)
class Options:
    """examples: of train, validation and test, and the next five what is generated; length: tokens after padding."""

    name: str
    source: str = "generated"
    data_dir: str = "data"
    length: int = 2048
    examples: tuple[int, int, int] = tuple(SIZES.values())
    seed: int = 0
    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def load(self) -> ArrayTask:
        sources = {"generated": self._generated, "lra_release": self._released}
        if self.source not in sources:
            raise naming.unknown("task source", self.source, sources)
        origin, data = sources[self.source]()
        sizes = ", ".join(f"{len(part.lengths):,} {split}" for split, part in data.items())
        padded = {split: padded_examples(part, self.length) for split, part in data.items()}
        return ArrayTask("token", len(VOCABULARY), 10, f"ListOps, {origin} ({sizes})", padded)

    def _generated(self) -> tuple[str, dict[str, Expressions]]:
        limits = self._limits()
        folder = pathlib.Path(self.data_dir).expanduser() / files.folder_name(self.seed, limits)
        pool = files.generate(folder, self.seed, limits, sum(self.examples))
        return f"seed {self.seed} in {folder}", dict(zip(SIZES, files.split(pool, self.examples), strict=True))

    def _limits(self) -> Limits:
        limits = Limits(self.min_length, self.max_length, self.max_depth, self.max_args)
        if len(self.examples) != 3 or min(self.examples) < 1:
            raise ValueError(f"task listops: examples={self.examples} must be three numbers of at least 1")
        if not 0 <= limits.min_length < limits.max_length - 1 <= self.length:
            raise ValueError(
                f"task listops: min_length={limits.min_length}, max_length={limits.max_length} and length={self.length}"
                " must be in this order: expressions are between the first two, and padded to the third"
            )
        if limits.max_depth < 1 or limits.max_args < 2 or not 0 <= self.seed < 2**63:
            raise ValueError(
                f"task listops: seed={self.seed}, {limits}: seed 0, a depth of 1 and 2 arguments are least"
            )
        return limits

    def _released(self) -> tuple[str, dict[str, Expressions]]:
        folder = pathlib.Path(self.data_dir).expanduser() / "listops-1000"
        if not folder.is_dir():
            inner = folder.parent / "lra_release"
            hint = f"; use data_dir={str(inner)!r}" if (inner / folder.name).is_dir() else ""
            raise ValueError(f"task listops: {folder} is not a folder; data_dir is the inner lra_release{hint}")
        return str(folder), {split: read_tsv(folder / file, SIZES[split]) for split, file in FILES.items()}


def padded_examples(part: Expressions, length: int) -> Examples:
    """Inputs uint8 (n, length), zeros behind. Raises ValueError where an expression is longer."""
    if part.lengths.max() > length:
        raise ValueError(f"task listops: length={length} is too short for an expression of {part.lengths.max()} tokens")
    inputs = np.zeros((len(part.lengths), length), np.uint8)
    inputs[np.arange(length) < part.lengths[:, None]] = part.tokens
    return Examples(inputs, part.values.astype(np.int32), part.lengths)


# The benchmark's files -----------------------------------------------------------------------------

STAND_INS = {operator.encode(): bytes([i + 1]) for i, operator in enumerate(OPERATORS)}
CODES = {
    **{ord(str(digit)): DIGIT + digit for digit in range(10)},
    **{stand_in[0]: VOCABULARY.index(operator.decode()) for operator, stand_in in STAND_INS.items()},
    ord("]"): CLOSE,
}
TABLE = bytes(CODES.get(byte, 255) for byte in range(256))


def read_tsv(path: pathlib.Path, count: int) -> Expressions:
    """Rows of an expression, with or without brackets around pairs, and its value, under the head "Source, Target".

    Raises ValueError naming the file and the line that is not such a row, or the number of rows where it is another.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not lines or lines[0].split(b"\t") != [b"Source", b"Target"]:
        raise ValueError(f"{path}: the first line is not 'Source' and 'Target'")
    rows = list(_rows(path, lines))
    if len(rows) != count:
        raise ValueError(f"{path}: {len(rows):,} expressions, the release has {count:,}; download it again")
    tokens, values = zip(*rows, strict=True)
    lengths = np.asarray([len(row) for row in tokens], np.int32)
    return Expressions(np.frombuffer(b"".join(tokens), np.uint8), lengths, np.asarray(values, np.uint8))


def _rows(path: pathlib.Path, lines: list[bytes]) -> Iterator[tuple[bytes, int]]:
    for number, line in enumerate(lines[1:], 2):
        source, _, target = line.partition(b"\t")
        if len(target) != 1 or not target.isdigit():
            raise ValueError(f"{path}, line {number}: no expression with its value; the file may be cut short")
        for operator, stand_in in STAND_INS.items():
            source = source.replace(operator, stand_in)
        tokens = source.translate(TABLE, b"() ")
        if not tokens or 255 in tokens:
            raise ValueError(f"{path}, line {number}: {line[:40]!r}... is not an expression of ListOps")
        yield tokens, int(target)
