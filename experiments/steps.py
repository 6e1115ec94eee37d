"""The train state, and the two jitted functions that a run consists of."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import metrics
from experiments.metrics import Sums
from experiments.tasks.base import Batch, Task

Tree = Any


class Health(NamedTuple):
    """The first step at which a number was not finite (-1: none yet), and which leaves were bad then."""

    step: jax.Array  # int32
    bad: jax.Array  # bool, one entry for each of `watched_names`


class TrainState(NamedTuple):
    """All that a run needs to go on. Random numbers and data follow from (seed, step)."""

    step: jax.Array  # int32, updates done
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    sums: Sums  # since the last logged step
    health: Health


class Summary(NamedTuple):
    """What one step tells the host."""

    sums: Sums
    gradient_norm: jax.Array
    health: Health


def init_variables(model: nn.Module, task: Task, batch: Batch, seed: int) -> tuple[Tree, Tree]:
    """Parameters and batch statistics before the first step; `batch` is any batch of the task."""
    key, data_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 3)
    batch = task.preprocess(jax.tree.map(jnp.asarray, batch), data_key, True)
    rngs = {"params": key, "dropout": dropout_key}
    variables = model.init(rngs, **model_inputs(task, batch), train=False)
    return variables["params"], variables.get("batch_stats", {})


def model_inputs(task: Task, batch: Batch) -> dict[str, Any]:
    """The arguments of the task's kind of model."""
    if task.kind == "language_model":
        return {"tokens": batch["inputs"], "segment_ids": batch.get("segments")}
    return {"inputs": batch["inputs"], "lengths": batch.get("lengths")}


def forward(model: nn.Module, task: Task, variables: Tree, batch: Batch, **options: Any) -> tuple[Sums, Tree]:
    """The sums of a batch, and the batch statistics after it; options: of the model, and of its `apply`."""
    inputs, targets, weights = model_inputs(task, batch), batch["targets"], batch.get("weights")
    if task.kind == "language_model":
        inputs |= {"targets": targets, "weights": weights, "method": "cross_entropy"}
    out, updated = model.apply(variables, **inputs, **options)
    if task.kind == "language_model":
        weights = jnp.ones(targets.shape) if weights is None else weights.astype(jnp.float32)
        parts = Sums(*out, weights.sum(1))
    else:
        parts = metrics.rows(out, targets, weights)
    return metrics.total(parts, task.metric), updated.get("batch_stats", {})


def new_state(optimizer: optax.GradientTransformation, params: Tree, batch_stats: Tree) -> TrainState:
    """The state before the first step."""
    opt_state = optimizer.init(params)
    count = len(jax.tree.leaves(watch(params, params, batch_stats, opt_state, 0.0)))
    health = Health(jnp.full((), -1, jnp.int32), jnp.zeros((count,), bool))
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, Sums.zero(), health)


def train_step(
    model: nn.Module, task: Task, optimizer: optax.GradientTransformation, seed: int, log_every: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Summary]]:
    """state, batch -> next state, summary. The sums start anew after every multiple of `log_every`."""
    root = jax.random.fold_in(jax.random.key(seed), 1)

    def loss(params, batch_stats, batch, key):
        variables = {"params": params, "batch_stats": batch_stats}
        options = dict(train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        sums, batch_stats = forward(model, task, variables, batch, **options)
        return sums.loss / jnp.maximum(sums.weight, 1e-9), (sums, batch_stats)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Summary]:
        data_key, dropout_key = jax.random.split(jax.random.fold_in(root, state.step))
        batch = task.preprocess(batch, data_key, True)
        (value, (sums, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.batch_stats, batch, dropout_key
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        health = examine(state, watch(gradient, params, batch_stats, opt_state, value))
        old = jax.tree.map(lambda x: jnp.where(state.step % log_every == 0, 0.0, x), state.sums)
        state = TrainState(state.step + 1, params, batch_stats, opt_state, old + sums, health)
        return state, Summary(state.sums, optax.tree.norm(gradient), health)

    return step


def eval_step(model: nn.Module, task: Task, piece: int = 0) -> Callable[[Tree, Tree, Batch, jax.Array], Sums]:
    """params, batch_stats, batch, key -> sums of loss, correct answers and weight.

    piece: a language model reads sequences of more tokens than this piece by piece, the state carried; 0: whole.
    """

    def step(params: Tree, batch_stats: Tree, batch: Batch, key: jax.Array) -> Sums:
        batch = task.preprocess(batch, key, False)
        variables = {"params": params, "batch_stats": batch_stats}
        if task.kind == "language_model" and 0 < piece < batch["inputs"].shape[1]:
            return _in_pieces(model, variables, task, batch, piece)
        return forward(model, task, variables, batch, train=False, mutable=[])[0]

    return step


def _in_pieces(model: nn.Module, variables: Tree, task: Task, batch: Batch, piece: int) -> Sums:
    """The sums of a batch of long sequences, each piece read from the state that the one before left."""
    size, length = batch["inputs"].shape
    count = -(-length // piece)
    batch = {"weights": jnp.ones((size, length)), **batch}
    filled = {name: jnp.pad(x, ((0, 0), (0, count * piece - length))) for name, x in batch.items()}
    pieces = {name: jnp.swapaxes(x.reshape(size, count, piece), 0, 1) for name, x in filled.items()}

    def read(carry, part):
        rows, state = carry
        logits, after = model.apply(variables, **model_inputs(task, part), state=state, train=False)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
        return (rows + metrics.rows(logits, part["targets"], part["weights"]), after), None

    (rows, _), _ = jax.lax.scan(read, (Sums.zero(size), model.initial_state(size)), pieces)
    return metrics.total(rows, task.metric)


def evaluate_split(
    step: Callable, state: TrainState, split: str, *, task: Task, batch_size: int, place: Callable
) -> dict[str, Any]:
    """{"loss", metric} of a split, every example counted once; place: a batch, to the devices."""
    root = jax.random.key(0)
    sums = [
        step(state.params, state.batch_stats, place(batch), jax.random.fold_in(root, i))
        for i, batch in enumerate(task.eval_batches(split, batch_size))
    ]
    return metrics.means(sums, task.metric, task.classes)


def evaluate(
    read: Callable[[str], dict[str, Any]],
    line: Callable[[Mapping[str, dict]], dict],
    task: Task,
    best: Mapping[str, float],
    last: bool = False,
) -> dict[str, Any]:
    """Figures of the test split; with a validation split, of that one and of test only at a new best.

    read: `evaluate_split` of a split. line: figures by prefix, as those of `line`, to one dict.
    last: training is over, and the splits beside these three are evaluated too.
    """
    figures = {}
    if "validation" in task.splits:
        figures["validation/"] = read("validation")
        if not metrics.improves(task.metric, "validation", line(figures), best):
            return line(figures)
    for split in ("test", *(further_splits(task) if last else ())):
        figures[f"{split}/"] = read(split)
    return line(figures)


def line(step: int, figures: Mapping[str, dict[str, Any]], health: Health, names: Sequence[str]) -> dict[str, Any]:
    """A line of metrics.jsonl from {prefix: {name: number}}; the prefix is "" in training, and "<split>/".

    names: see `check`. Raises FloatingPointError where a loss is not finite, and as `check` does.
    """
    check(health, names)
    found: dict[str, Any] = {"step": step}
    for prefix, values in figures.items():
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"step {step}: the loss on split {prefix[:-1] or 'train'} is not finite")
        found |= {f"{prefix}{name}": float(value) for name, value in values.items()}
    return found


def further_splits(task: Task) -> list[str]:
    """The splits that are evaluated once, at the end of training."""
    return [split for split in task.splits if split not in ("train", "validation", "test")]


# Numbers that are not finite -----------------------------------------------------------------------


def watch(gradient: Tree, params: Tree, batch_stats: Tree, opt_state: Tree, loss: Any) -> tuple:
    """What must stay finite, in the order in which it is named."""
    return gradient, params, batch_stats, opt_state, loss


def examine(state: TrainState, watched: tuple) -> Health:
    """The health after a step from `state`: unchanged once something was bad."""
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(watched)])
    first = (state.health.step < 0) & jnp.any(bad)
    step = jnp.where(first, state.step + 1, state.health.step)
    return Health(step, jnp.where(first, bad, state.health.bad))


def watched_names(state: TrainState) -> list[str]:
    """What each entry of `Health.bad` stands for."""
    kinds = ("gradient of", "value of", "batch statistics", "optimizer state", "loss")
    watched = watch(state.params, state.params, state.batch_stats, state.opt_state, 0.0)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(watched)[0]]
    key = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [f"{kinds[path[0].idx]} {key(path[1:])}".strip() for path in paths]


def check(health: Health, names: Sequence[str]) -> None:
    """Raises FloatingPointError with the first bad step and what was not finite in it."""
    step, bad = jax.device_get(health)
    if step >= 0:
        found = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
        more = f", nor are {len(found) - 1} others" if len(found) > 1 else ""
        raise FloatingPointError(
            f"step {step}: {found[0]} is not finite{more}; checkpoints before it are kept. A smaller"
            " config.optimizer.learning_rate or a config.optimizer.clip_norm may help"
        )
