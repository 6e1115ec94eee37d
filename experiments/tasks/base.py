"""What a task is, and the task whose examples lie in memory as arrays.

A batch is a dict of arrays:
    inputs   image: uint8 (b, height, width, channels); continuous: float32 (b, l, channels); token: int32 (b, l),
             uint8 until `preprocess` where that holds them; (b, 2, l) for "retrieval", two documents
    targets  int32: (b,), for "language_model" (b, l): a token for every position
    lengths  int32 (b,), (b, 2) for "retrieval", optional: the positions of each example that count
    weights  float32, shaped as targets, optional: 0 leaves an entry out of loss and metric, 1 scores it
    segments int32 (b, l), optional, for "language_model": which document each token belongs to
Before `preprocess` inputs may be as they are stored, and a task may send what the device makes a batch of.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Protocol

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

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {"inputs": self.inputs, "targets": self.targets}
        return arrays if self.lengths is None else arrays | {"lengths": self.lengths}

    def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays().items()}


@dataclasses.dataclass(frozen=True)
class ArrayTask:
    """A task held in memory. Raises ValueError for examples that are not what they say."""

    STORED: ClassVar = {"image": ("uf", (4,)), "continuous": ("f", (3,)), "token": ("iu", (2,))}  # kinds and ranks

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
        return prefetched(self.data["train"].take, self.examples("train"), batch_size, seed, start_step)

    def eval_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        for index, weights in windows(self.examples(split), batch_size):
            yield self.data[split].take(index) | {"weights": weights}

    def preprocess(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        return batch | {"inputs": batch["inputs"].astype(jnp.int32)} if self.encoder == "token" else batch


@dataclasses.dataclass(frozen=True)
class StandardisedTask(ArrayTask):
    """Examples stored as small integers, (b, l, c) or (b, height, width, c), which a model reads as float32 (b, l, c).

    The model's inputs are (x - mean) / std in each channel, made on the device; mean and std in the stored unit.
    """

    STORED: ClassVar = {"continuous": ("iu", (3, 4))}

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def preprocess(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        x = jnp.asarray(batch["inputs"])
        x = x.reshape(len(x), -1, self.input_size).astype(jnp.float32)
        mean, std = (jnp.asarray(values, jnp.float32) for values in (self.mean, self.std))
        return {**batch, "inputs": (x - mean) / std}


def held_back(data: Mapping[str, Examples], count: int, seed: int) -> dict[str, Examples]:
    """The training split less the last `count` of a permutation of it, these as validation, and the other splits.

    Raises ValueError where count leaves nothing to train on.
    """
    n = len(data["train"].targets)
    if not 0 <= count < n:
        raise ValueError(f"validation={count} must be at least 0 and below the {n:,} training examples")
    if not count:
        return dict(data)
    order = np.random.RandomState(seed).permutation(n)
    rows = {"train": np.sort(order[:-count]), "validation": np.sort(order[-count:])}
    return {split: Examples(**data["train"].take(index)) for split, index in rows.items()} | {
        split: examples for split, examples in data.items() if split != "train"
    }


def shuffled(n: int, batch_size: int, seed: int) -> grain.MapDataset:
    """Batch number -> indices: all n in a new order each epoch; a batch may span two epochs."""
    if batch_size > n:
        raise ValueError(f"batch_size={batch_size} is larger than the training split ({n} examples)")
    return grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size)


def prefetched(
    take: Callable[[np.ndarray], Batch], n: int, batch_size: int, seed: int, start_step: int
) -> Iterator[Batch]:
    """take(indices) of the batches start_step, start_step + 1, ... of `shuffled`, made ahead by a thread."""
    batches = shuffled(n, batch_size, seed)[start_step:].map(take)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def windows(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices and weights, batch_size each, of every example once; what fills the last batch up weighs 0."""
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)
        yield np.where(index < n, index, 0), (index < n).astype(np.float32)


def _check(task: ArrayTask, split: str, examples: Examples) -> None:
    inputs, targets, lengths = examples.inputs, examples.targets, examples.lengths
    where = f"{task.source}, split {split}"
    if not len(inputs) == len(targets) == len(targets if lengths is None else lengths) > 0:
        sizes = [len(x) for x in (inputs, targets, lengths) if x is not None]
        raise ValueError(f"{where}: inputs, targets and lengths have {sizes} examples")
    kinds, ranks = task.STORED[task.encoder]
    if inputs.ndim not in ranks or inputs.dtype.kind not in kinds:
        raise ValueError(f"{where}: inputs of {inputs.dtype}{list(inputs.shape)} are no {task.encoder} inputs")
    if task.encoder != "token" and inputs.shape[-1] != task.input_size:
        raise ValueError(f"{where}: inputs have {inputs.shape[-1]} channels, the task {task.input_size}")
    longest = inputs.shape[-1 if task.encoder == "token" else 1]
    ranges = {"targets": (targets, 0, task.classes - 1), "lengths": (lengths, 1, longest)}
    if task.encoder == "token":
        ranges["inputs"] = (inputs, 0, task.input_size - 1)
    for name, (values, low, high) in ranges.items():
        if values is not None and (values.min() < low or values.max() > high):
            _first(f"{where}: {name} must be in {low}..{high}", values, (values < low) | (values > high))
    if inputs.dtype.kind == "f":
        _first(f"{where}: inputs must be finite", inputs, ~np.isfinite(inputs))


def _first(message: str, values: np.ndarray, wrong: np.ndarray) -> None:
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{message}; example {index[0]} has {values[index]}")
