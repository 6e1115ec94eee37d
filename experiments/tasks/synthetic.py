"""Tasks whose examples are made on the device: tokens in, tokens out, some positions scored.

An example is a pure function of (split, seed, step, row), whatever the batch it is drawn in; nothing of it lies on
the host. To a model it is language modelling: every position has a target, and `weights` is 1 where it is scored.
Training examples are drawn without end, in stages of growing size; those of the splits "test" and "test_<length>"
are always the same.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Batch
from ssm import naming

PAD = 0  # the token after the end of a string, and the target where nothing is scored
SCORED = ("last", "every")  # positions of a string
METRICS = ("accuracy", "scaled_accuracy", "sequence_accuracy")


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "sizes", "counted"], meta_fields=["length"])
@dataclasses.dataclass(frozen=True)
class Origin:
    """What the host sends in place of a batch of b examples.

    rows: uint32 (b, 4), each example's split, seed, step and row. sizes: int32 (b, 2), the least and the largest
    size that may be drawn. counted: float32 (b,), 0 where a row only fills the batch up. length: positions.
    """

    rows: np.ndarray
    sizes: np.ndarray
    counted: np.ndarray
    length: int


class Example(NamedTuple):
    """One example: int32 (l,), int32 (l,) and float32 (l,)."""

    inputs: jax.Array
    targets: jax.Array
    weights: jax.Array


class Draw(NamedTuple):
    """How examples of a split, or of a stage of training, are drawn."""

    length: int  # positions
    least: int
    largest: int  # size: see `SyntheticTask.make`


@dataclasses.dataclass(frozen=True)
class SyntheticTask:
    """A `Task` by the function that makes one example.

    make(key, size, length, train) -> Example of `length` positions. size: a uniform integer between least and largest
    of the `Draw`; what it counts is the task's: tokens of a string, or pairs to be remembered.
    stages: of training, each of stage_steps steps, the last one without end; all are padded to one length.
    classes: how many answers there are, of which chance hits one. epoch_examples: what durations in epochs count.
    """

    make: Callable[[jax.Array, jax.Array, int, bool], Example]
    input_size: int
    classes: int
    source: str
    stages: tuple[Draw, ...]
    stage_steps: int
    tests: Mapping[str, tuple[Draw, int]]  # and how many examples
    metric: str
    epoch_examples: int
    kind: str = "language_model"
    encoder: str = "token"

    @property
    def length(self) -> int:
        return self.stages[0].length

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", *self.tests)

    def examples(self, split: str) -> int:
        return self.epoch_examples if split == "train" else self.tests[split][1]

    def train_batches(self, batch_size: int, seed: int, start_step: int) -> Iterator[Batch]:
        for step in itertools.count(start_step):
            stage = min(step // self.stage_steps, len(self.stages) - 1) if self.stage_steps else 0
            rows = np.arange(batch_size)
            yield {"origin": _origin(self.stages[stage], 0, seed, step, rows, np.ones(batch_size))}

    def eval_batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        draw, examples = self.tests[split]
        for start in range(0, examples, batch_size):
            rows = start + np.arange(batch_size)
            yield {"origin": _origin(draw, draw.length, 0, 0, rows, rows < examples)}

    def preprocess(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        origin = batch["origin"]
        make = partial(self._example, length=origin.length, train=train)
        inputs, targets, weights = jax.vmap(make)(origin.rows, origin.sizes)
        return {"inputs": inputs, "targets": targets, "weights": weights * origin.counted[:, None]}

    def _example(self, row: jax.Array, sizes: jax.Array, *, length: int, train: bool) -> Example:
        key = jax.random.key(0)
        for number in row:
            key = jax.random.fold_in(key, number)
        size_key, key = jax.random.split(key)
        size = jax.random.randint(size_key, (), sizes[0], sizes[1] + 1)
        return self.make(key, size, length, train)


def _origin(draw: Draw, split: int, seed: int, step: int, rows: np.ndarray, counted: np.ndarray) -> Origin:
    """split: 0 for training, otherwise a number of the test split's own."""
    numbers = [np.full_like(rows, number % 2**32) for number in (split, seed, step)]
    return Origin(
        rows=np.stack([*numbers, rows], 1).astype(np.uint32),
        sizes=np.tile(np.int32([draw.least, draw.largest]), (len(rows), 1)),
        counted=counted.astype(np.float32),
        length=draw.length,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """The fields of `config.task` that all synthetic tasks share.

    metric: "accuracy" over scored positions; "scaled_accuracy", 0 at chance; "sequence_accuracy", of sequences whose
    scored positions are all right. eval_lengths: more lengths to test at, once training is over.
    """

    name: str
    metric: str = "accuracy"
    test_examples: int = 8192
    eval_lengths: tuple[int, ...] = ()
    eval_examples: int = 1024  # at each of them
    epoch_examples: int = 65536

    def task(self, stages: list[Draw], stage_steps: int, test: Draw, source: str, **ends) -> SyntheticTask:
        """The task, once the shared fields are checked; the further tests have as few and as many as the first."""
        if self.metric not in METRICS:
            raise naming.unknown(f"metric of task {self.name}", self.metric, METRICS)
        self.at_least(1, "test_examples", "eval_examples", "epoch_examples", "eval_lengths")
        tests = {"test": (test, self.test_examples)}
        for length in self.eval_lengths:
            tests[f"test_{length}"] = (self.test_draw(length), self.eval_examples)
        return SyntheticTask(
            stages=tuple(stages),
            stage_steps=stage_steps,
            tests=tests,
            source=f"{source}, made on the device",
            metric=self.metric,
            epoch_examples=self.epoch_examples,
            **ends,
        )

    def test_draw(self, length: int) -> Draw:
        """How a test at a length draws its examples: all of that size."""
        return Draw(length, length, length)

    def at_least(self, least: int, *fields: str) -> None:
        """Raises ValueError naming the first of the fields that is, or holds, a number below `least`."""
        for field in fields:
            value = getattr(self, field)
            numbers = value if isinstance(value, (tuple, list)) else [value]
            if any(number < least for number in numbers):
                raise ValueError(f"task {self.name}: {field}={value} must be at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strings(Drawn):
    """The fields of tasks on strings: lengths count a string's tokens.

    Training draws lengths uniformly from min_length to the stage's in `lengths`; each stage takes stage_steps steps,
    and the last one the rest. min_length 0: all have the stage's. The same in the test from test_min_length to
    test_length.
    """

    metric: str = "scaled_accuracy"
    min_length: int = 3
    lengths: tuple[int, ...] = (40,)
    stage_steps: int = 0
    test_min_length: int = 0
    test_length: int = 256

    def strings(self, least: int, source: str, **ends) -> SyntheticTask:
        """The task; least: the shortest string that there is."""
        self.at_least(least, "lengths", "test_length", "eval_lengths")
        self.at_least(0, "min_length", "test_min_length", "stage_steps")
        if not self.lengths:
            raise ValueError(f"task {self.name}: lengths is empty; it must name at least one stage's")
        if len(self.lengths) > 1 and not self.stage_steps:
            raise ValueError(f"task {self.name}: stage_steps=0 with {len(self.lengths)} stages in lengths")
        longest = max(self.lengths)
        stages = [self._draw("min_length", least, longest, largest) for largest in self.lengths]
        test = self._draw("test_min_length", least, self.test_length, self.test_length)
        return self.task(stages, self.stage_steps, test, source, **ends)

    def _draw(self, field: str, least: int, length: int, largest: int) -> Draw:
        smallest = getattr(self, field)
        if smallest and not least <= smallest <= largest:
            raise ValueError(f"task {self.name}: {field}={smallest} must be 0, or between {least} and {largest}")
        return Draw(length, smallest or largest, largest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneLength(Drawn):
    """The fields of tasks whose sequences are all of one length; test_length: 0 for that of training."""

    length: int = 256
    test_length: int = 0

    def check_lengths(self, least: int, why: str) -> None:
        """Raises ValueError naming a length that cannot hold an example."""
        self.at_least(0, "test_length")
        for field in ("length", "test_length", "eval_lengths"):
            lengths = getattr(self, field)
            for length in lengths if isinstance(lengths, (tuple, list)) else [lengths]:
                if length < least and not (field == "test_length" and length == 0):
                    raise ValueError(f"task {self.name}: {field}={lengths} must be at least {least}: {why}")

    def one_length(self, source: str, **ends) -> SyntheticTask:
        """The task of one stage."""
        test = self.test_draw(self.test_length or self.length)
        return self.task([self.test_draw(self.length)], 0, test, source, **ends)


def check_modulus(name: str, modulus: int) -> None:
    """Raises ValueError for a modulus with which int32 sums over 2^20 tokens, or products, could overflow."""
    if not 2 <= modulus <= 1024:
        raise ValueError(f"task {name}: modulus={modulus} must be between 2 and 1024")


def check_scored(value: str, field: str = "scored") -> None:
    if value not in SCORED:
        raise naming.unknown(field, value, SCORED)


def string(inputs: jax.Array, targets: jax.Array, size: jax.Array, every: bool | jax.Array) -> Example:
    """The first `size` tokens, scored at the last of them, and at every one, or at those that a mask (l,) names."""
    position = jnp.arange(len(inputs))
    real = position < size
    scored = (position == size - 1) | (real & every)
    tokens = jnp.where(real, inputs, PAD), jnp.where(scored, targets, PAD)
    return Example(*(x.astype(jnp.int32) for x in tokens), scored.astype(jnp.float32))
