"""Examples that lie on the devices: a batch is the numbers of its rows, and the jitted step gathers them.

The host then sends some hundred bytes a step, and the devices never wait for it. The batches, their order and every
bit in them are those of the task in the host's memory.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from experiments.tasks.base import ArrayTask, Batch, Task, prefetched, windows
from ssm import naming

CHOICES = ("auto", "always", "never")
SHARE = 0.2  # of a device's memory, that "auto" may fill with examples


@partial(jax.tree_util.register_dataclass, data_fields=["examples", "own"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
    """What takes the place of a batch. examples: whole arrays, on the devices; own: the batch's "index", "weights"."""

    examples: dict[str, jax.Array]
    own: dict[str, np.ndarray]

    def gathered(self) -> Batch:
        index, rest = self.own["index"], {name: x for name, x in self.own.items() if name != "index"}
        return {name: x.at[index].get(mode="promise_in_bounds") for name, x in self.examples.items()} | rest


class ResidentTask:
    """An `ArrayTask` with its examples on every device of a sharding; all that is not here is the task's own."""

    def __init__(self, task: ArrayTask, sharding: NamedSharding):
        self._task = task
        self._examples = {split: jax.device_put(e.arrays(), sharding) for split, e in task.data.items()}
        self.source = f"{task.source}, {size(task) / 1e6:,.0f} MB on the device"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def train_batches(self, batch_size: int, seed: int, start_step: int) -> Iterator[Rows]:
        return prefetched(partial(self._rows, "train"), self.examples("train"), batch_size, seed, start_step)

    def eval_batches(self, split: str, batch_size: int) -> Iterator[Rows]:
        for index, weights in windows(self.examples(split), batch_size):
            yield self._rows(split, index, weights=weights)

    def preprocess(self, batch: Rows, key: jax.Array, train: bool) -> Batch:
        return self._task.preprocess(batch.gathered(), key, train)

    def _rows(self, split: str, index: np.ndarray, **weights: np.ndarray) -> Rows:
        return Rows(self._examples[split], {"index": np.asarray(index, np.int32), **weights})


def placed(task: Task, choice: str, sharding: NamedSharding) -> Task:
    """The task, its examples on the devices of a sharding that is the same on each, as `config.task.resident` says.

    choice: "always", "never", or "auto": where they fill at most SHARE of a device's memory, if that is known.
    Raises ValueError for another choice, or "always" for a task whose examples do not lie in memory.
    """
    if choice not in CHOICES:
        raise naming.unknown("task resident", choice, CHOICES)
    held = isinstance(task, ArrayTask)
    if choice == "always" and not held:
        raise ValueError("task resident='always' is for examples held in memory; this task makes them: use 'auto'")
    if choice == "always" or (choice == "auto" and held and _fits(task, sharding)):
        return ResidentTask(task, sharding)
    return task


def size(task: ArrayTask) -> int:
    """Bytes of all splits."""
    return sum(array.nbytes for examples in task.data.values() for array in examples.arrays().values())


def _fits(task: ArrayTask, sharding: NamedSharding) -> bool:
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in sharding.device_set]
    return size(task) <= SHARE * min(limits)
