"""What a task is, and the task whose examples lie in memory as arrays.

A batch is a dict of arrays:
    inputs   image: uint8 (b, height, width, channels); continuous: float32 (b, l, channels); token: int32 (b, l),
             uint8 until `preprocess` where that holds them; (b, 2, l) for "retrieval", two documents
    targets  int32: (b,), for "language_model" (b, l): a token for every position
    lengths  int32 (b,), (b, 2) for "retrieval", optional: the positions of each example that count
    weights  float32, shaped as targets, optional: 0 leaves an entry out of loss and metric, 1 scores it
    segments int32 (b, l), optional, for "language_model": which document each token belongs to
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, np.ndarray]


class Task(Protocol):
    """A data set and how batches come from it. All of it is a pure function of (seed, step)."""

    kind: str  # "classification" | "retrieval" | "language_model"
    metric: str  # a name in `experiments.metrics.METRICS`
    encoder: str  # "image" | "continuous" | "token"
    input_size: int  # channels, or size of the vocabulary
    classes: int  # possible answers
    length: int  # positions per training example
    source: str  # what was read from where
    splits: tuple[str, ...]  # "train", "test", perhaps "validation", perhaps others that are read at the end alone

    def examples(self, split: str) -> int: ...

    def train_batches(self, batch_size: int, seed: int, start_step: int) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, ... without end."""
        ...

    def eval_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Every example once, all batches of one shape: the last is filled up with weights of 0."""
        ...

    def preprocess(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        """Runs inside the jitted step: augmentation, or the whole batch of a synthetic task."""
        ...


@dataclasses.dataclass(frozen=True)
class Examples:
    """One split: inputs, targets and perhaps lengths, as in a batch."""

    inputs: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray | None = None

    def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
        batch = {"inputs": self.inputs[index], "targets": self.targets[index]}
        return batch if self.lengths is None else batch | {"lengths": self.lengths[index]}


@dataclasses.dataclass(frozen=True)
class ArrayTask:
    """A task held in memory. Raises ValueError for examples that are not what they say."""

    encoder: str
    input_size: int
    classes: int
    source: str
    data: Mapping[str, Examples]
    kind: str = "classification"
    metric: str = "accuracy"

    def __post_init__(self):
        shapes = {}
        for split, examples in self.data.items():
            _check(self, split, examples)
            shapes[split] = examples.inputs.shape[1:]
        if len(set(shapes.values())) > 1:
            raise ValueError(f"{self.source}: the splits' examples differ in shape: {shapes}")

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.data)

    @property
    def length(self) -> int:
        shape = self.data["train"].inputs.shape[1:]
        return math.prod(shape if self.encoder == "token" else shape[:-1])

    def examples(self, split: str) -> int:
        return len(self.data[split].targets)

    def train_batches(self, batch_size: int, seed: int, start_step: int) -> Iterator[Batch]:
        take = self.data["train"].take
        batches = shuffled(self.examples("train"), batch_size, seed)[start_step:].map(take)
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))

    def eval_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        n = self.examples(split)
        for start in range(0, n, batch_size):
            index = np.arange(start, start + batch_size)
            weights = (index < n).astype(np.float32)
            yield self.data[split].take(np.where(index < n, index, 0)) | {"weights": weights}

    def preprocess(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        return batch | {"inputs": batch["inputs"].astype(jnp.int32)} if self.encoder == "token" else batch


def shuffled(n: int, batch_size: int, seed: int) -> grain.MapDataset:
    """Batch number -> indices: all n in a new order each epoch; a batch may span two epochs."""
    if batch_size > n:
        raise ValueError(f"batch_size={batch_size} is larger than the training split ({n} examples)")
    return grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size)


def _check(task: ArrayTask, split: str, examples: Examples) -> None:
    inputs, targets, lengths = examples.inputs, examples.targets, examples.lengths
    where = f"{task.source}, split {split}"
    if not len(inputs) == len(targets) == len(targets if lengths is None else lengths) > 0:
        sizes = [len(x) for x in (inputs, targets, lengths) if x is not None]
        raise ValueError(f"{where}: inputs, targets and lengths have {sizes} examples")
    rank = {"image": 4, "continuous": 3, "token": 2 + (task.kind == "retrieval")}[task.encoder]
    kind = {"image": "uf", "continuous": "f", "token": "iu"}[task.encoder]
    if inputs.ndim != rank or inputs.dtype.kind not in kind:
        raise ValueError(f"{where}: inputs of {inputs.dtype}{list(inputs.shape)} are no {task.encoder} inputs")
    if task.encoder != "token" and inputs.shape[-1] != task.input_size:
        raise ValueError(f"{where}: inputs have {inputs.shape[-1]} channels, the task {task.input_size}")
    longest = inputs.shape[-1 if task.encoder == "token" else 1]
    ranges = {"targets": (targets, 0, task.classes - 1), "lengths": (lengths, 1, longest)}
    if task.encoder == "token":
        ranges["inputs"] = (inputs, 0, task.input_size - 1)
    for name, (values, low, high) in ranges.items():
        if values is not None:
            _first(f"{where}: {name} must be in {low}..{high}", values, (values < low) | (values > high))
    if inputs.dtype.kind == "f":
        _first(f"{where}: inputs must be finite", inputs, ~np.isfinite(inputs))


def _first(message: str, values: np.ndarray, wrong: np.ndarray) -> None:
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{message}; example {index[0]} has {values[index]}")
