"""Batches of synthetic tasks, as arrays."""

from collections.abc import Iterator

import jax
import numpy as np

from experiments import tasks
from experiments.tasks.synthetic import SyntheticTask


def load(name: str, **fields) -> SyntheticTask:
    return tasks.load({"name": name, **fields})


def batch(task: SyntheticTask, size: int, split: str = "train", seed: int = 0, step: int = 0) -> dict[str, jax.Array]:
    """Of training the batch of (seed, step), of a test the first one."""
    train = split == "train"
    batches = task.train_batches(size, seed, step) if train else task.eval_batches(split, size)
    made = jax.jit(lambda origin: task.preprocess(origin, jax.random.key(99), train))(next(batches))
    assert set(made) == {"inputs", "targets", "weights"}
    return made


def rows(task: SyntheticTask, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs, targets and weights of single training examples."""
    made = batch(task, count)
    return zip(*(np.asarray(made[name]) for name in ("inputs", "targets", "weights")), strict=True)
