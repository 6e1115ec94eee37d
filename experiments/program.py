"""What a run consists of, as functions: of one model here, of several in `experiments.replicas`."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from experiments import steps
from experiments.metrics import Sums
from experiments.steps import Health, Summary, TrainState
from experiments.tasks.base import Batch, Task

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Summary]]
EvalStep = Callable[[Any, Any, Batch, jax.Array], Sums]  # params, batch_stats, batch, key


class Recipe(NamedTuple):
    """A model's training on a task; the learning rate and the seed are arguments, and may be traced."""

    task: Task
    batch_size: int
    new_state: Callable[[Any, Any], TrainState]  # learning rate, seed
    train_step: Callable[[TrainState, Batch, Any, Any], tuple[TrainState, Summary]]  # ..., learning rate, seed
    eval_step: EvalStep
    like: TrainState  # shapes and dtypes of one model's


class Program(NamedTuple):
    """A run. All that is one number of a single model is an array of one entry a replica where there are several."""

    new_state: Callable[[], TrainState]
    like: TrainState  # its shapes, dtypes and shardings
    make_train_step: Callable[[], TrainStep]  # raises ValueError where it is known not to fit in memory
    eval_step: EvalStep
    batches: Callable[[int], Iterator[Batch]]  # of training, from a step on, on the devices
    place: Callable[[Batch], Batch]  # a batch of an evaluation, to the devices
    check: Callable[[Health], None]  # raises FloatingPointError where training cannot go on
    line: Callable[[int, Mapping[str, dict], Health], dict[str, Any]]  # see `steps.line`
    best: Callable[[TrainState, Mapping], TrainState]  # the one model's state that a line's figures are of
    tokens: int  # that a step reads


def place(sharding: NamedSharding, batch: Batch) -> Batch:
    """The batch on the devices, cut as the sharding says; what lies there already stays as it is."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, sharding), batch)


def single(recipe: Recipe, rate: float, seed: int, whole: NamedSharding, split: NamedSharding) -> Program:
    """One model of a learning rate and seed. whole: the same on every device; split: cut along the first axis."""
    task, size = recipe.task, recipe.batch_size
    new_state = jax.jit(lambda: recipe.new_state(rate, seed), out_shardings=whole)
    step = functools.partial(recipe.train_step, rate=rate, seed=seed)
    to_devices = functools.partial(place, split)
    names = steps.watched_names(recipe.like)
    return Program(
        new_state=new_state,
        like=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), recipe.like),
        make_train_step=lambda: jax.jit(step, donate_argnums=0, out_shardings=whole),
        eval_step=jax.jit(recipe.eval_step),
        batches=lambda start: map(to_devices, task.train_batches(size, seed, start)),
        place=to_devices,
        check=functools.partial(steps.check, names=names),
        line=functools.partial(steps.line, names=names),
        best=lambda state, line: state,
        tokens=size * task.length,
    )
