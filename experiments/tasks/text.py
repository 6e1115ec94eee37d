"""Language modelling of the bytes of a text file: predict each byte from those before it.

The file (`config.task.path`; "" downloads TinyShakespeare by TensorFlow Datasets) is cut into its first 90 %
to train on, the next 5 % to validate and the last 5 % to test on, as TFDS cuts TinyShakespeare. A training batch
is windows that begin anywhere; an evaluation is windows side by side, each read from an empty state, in which
every byte but the split's first is predicted once.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks import archives
from experiments.tasks.base import Batch

SHARES = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}


@dataclasses.dataclass(frozen=True)
class Options:
    name: str
    path: str = ""
    length: int = 256  # bytes that are predicted in a window

    def load(self) -> "TextTask":
        if self.length < 1:
            raise ValueError(f"task {self.name}: length={self.length} must be at least 1")
        path = pathlib.Path(self.path) if self.path else _download()
        try:
            content = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError as error:
            raise ValueError(f"task {self.name}: path={self.path!r} cannot be read: {error.strerror}") from error
        data = {split: content[int(a * len(content)) : int(b * len(content))] for split, (a, b) in SHARES.items()}
        for split, text in data.items():
            if len(text) < 2 or (split == "train" and len(text) <= self.length):
                raise ValueError(
                    f"{path}: {len(content)} bytes leave {len(text)} to {split}, too few for length={self.length}"
                )
        sizes = ", ".join(f"{len(text):,} {split}" for split, text in data.items())
        return TextTask(self.length, f"the bytes of {path.name} ({sizes})", data)


def _download() -> pathlib.Path:
    (path,) = archives.download("tiny_shakespeare", "name a text file by --config.task.path=FILE").values()
    return path


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A `Task` over bytes in memory."""

    length: int
    source: str
    data: Mapping[str, np.ndarray]  # uint8 by split
    kind: str = "language_model"
    metric: str = "bits_per_byte"
    encoder: str = "token"
    input_size: int = 256
    classes: int = 256

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.data)

    def examples(self, split: str) -> int:
        """Windows side by side; the last one may be shorter."""
        return -(-(len(self.data[split]) - 1) // self.length)

    def train_batches(self, batch_size: int, seed: int, start_step: int) -> Iterator[Batch]:
        text = self.data["train"]
        for step in itertools.count(start_step):
            starts = np.random.default_rng((seed, step)).integers(0, len(text) - self.length, batch_size)
            yield self._windows(text, starts)

    def eval_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        text = self.data[split]
        padded = np.pad(text, (0, self.length))
        starts = np.arange(0, len(text) - 1, self.length)
        for i in range(0, len(starts), batch_size):
            some = starts[i : i + batch_size]
            some = np.pad(some, (0, batch_size - len(some)), constant_values=len(text) - 1)
            predicted = some[:, None] + 1 + np.arange(self.length)
            yield {**self._windows(padded, some), "weights": (predicted < len(text)).astype(np.float32)}

    def preprocess(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        return batch | {name: batch[name].astype(jnp.int32) for name in ("inputs", "targets")}

    def _windows(self, text: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
        window = text[starts[:, None] + np.arange(self.length + 1)]
        return {"inputs": window[:, :-1], "targets": window[:, 1:]}
