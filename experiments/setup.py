"""From a config to everything that a run needs, with every check that can be made before it starts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import checkpoint, optimizer, replicas, steps, tasks
from experiments.program import Program, Recipe, single
from experiments.tasks import resident
from experiments.tasks.base import Task
from experiments.workdir import Workdir
from ssm import naming

FIELDS = (
    *("preset", "seed", "task", "model", "published", "optimizer", "devices", "time_limit_minutes"),
    *("batch_size", "eval_batch_size", "log_every_steps", "keep_checkpoints"),
)


class Setup(NamedTuple):
    """A config made concrete."""

    task: Task
    model: nn.Module
    rows: list[optimizer.Row]  # the parameter table
    train_steps: int
    eval_every: int  # steps
    checkpoint_every: int  # steps
    epochs: float
    program: Program
    members: replicas.Members | None  # of a run with `config.replicas`


def prepare(config: ConfigDict) -> Setup:
    """Raises ValueError with one line for a config that cannot be run."""
    check_fields(config)
    members = replicas.members(config)
    devices = local_devices(config.devices)
    whole, split = shardings(devices)
    if not members:
        check_batches(config)
    options = config.task.to_dict()
    residence = options.pop("resident", "auto")
    task = tasks.load(options)
    model = build_model(config.model.to_dict(), task)
    per_epoch = task.examples("train") / config.batch_size
    total = optimizer.duration(config, "train", per_epoch)
    if not total:
        raise ValueError("train_steps and train_epochs are both 0: set one of them")
    options = optimizer.options(config.optimizer.to_dict())
    placed = resident.placed(task, residence, whole)
    recipe = _recipe(config, task, placed, model, options, optimizer.schedule(options, total, per_epoch))
    if members:
        program = replicas.program(recipe, members, devices)
    else:
        program = single(recipe, *_rate_and_seed(config), whole, split)
    return Setup(
        task=placed,
        model=model,
        rows=optimizer.table(options, recipe.like.params),
        train_steps=total,
        eval_every=optimizer.duration(config, "eval_every", per_epoch, total) or total,
        checkpoint_every=optimizer.duration(config, "checkpoint_every", per_epoch, total) or total,
        epochs=total / per_epoch,
        program=program,
        members=members,
    )


def _rate_and_seed(config: ConfigDict) -> tuple[float, int]:
    return config.optimizer.learning_rate, config.seed


def _recipe(
    config: ConfigDict,
    task: Task,
    placed: Task,
    model: nn.Module,
    options: optimizer.Options,
    factor: optimizer.Schedule,
) -> Recipe:
    """placed: the task as it is read in training; the first parameters need one example from the host alone."""
    example = next(task.train_batches(config.batch_size, config.seed, 0))

    def updates(rate, params):
        chosen = dataclasses.replace(options, learning_rate=rate)
        return optimizer.build(chosen, optimizer.table(chosen, params), factor)

    def new_state(rate, seed):
        params, batch_stats = steps.init_variables(model, task, example, seed)
        return steps.new_state(updates(rate, params), params, batch_stats)

    def train_step(state, batch, rate, seed):
        tx = updates(rate, state.params)
        return steps.train_step(model, placed, tx, seed, config.log_every_steps)(state, batch)

    eval_step = steps.eval_step(model, placed, config.get("eval_piece_tokens", 0))
    like = jax.eval_shape(new_state, *_rate_and_seed(config))
    return Recipe(placed, config.batch_size, new_state, train_step, eval_step, like)


def restore(run: Workdir) -> tuple[Setup, int, steps.TrainState]:
    """A run made ready, and the checkpoint behind its figure, or the newest of a run that is not finished.

    Of replicas it is the best one as an ordinary run, by the last line that its checkpoint has seen.
    Raises ValueError where there is no checkpoint, or the config cannot be run here.
    """
    config = ConfigDict(run.config)
    ready = prepare(config)
    if result := run.read("result.json"):
        step, (state, _) = result["step"], checkpoint.restore(run.checkpoints, result["step"], ready.program.like)
    elif restored := checkpoint.restore_latest(run.checkpoints, ready.program.like):
        step, state = restored.step, restored.state
    else:
        raise ValueError(f"{run.path} has no checkpoint yet")
    if not ready.members:
        return ready, step, state
    best = next((line["replica"] for line in reversed(run.lines()) if line["step"] <= step and "replica" in line), 0)
    alone = prepare(replicas.alone(config, ready.members.rates[best], ready.members.seeds[best]))
    places = jax.tree.map(lambda like: like.sharding, alone.program.like)
    return alone, step, jax.device_put(replicas.take(state, best), places)


def build_model(options: Mapping[str, Any], task: Task) -> nn.Module:
    """The model of `config.model`, with the ends that the task needs."""
    from ssm import language_model, models, two_towers

    ends = {"encoder": task.encoder, "input_size": task.input_size, "classes": task.classes}
    kinds = {
        "classification": (models.SequenceClassifier, ends),
        "retrieval": (two_towers.PairClassifier, ends),
        "language_model": (language_model.LanguageModel, {"vocabulary": task.input_size}),
    }
    if task.kind not in kinds:
        raise naming.unknown("task kind", task.kind, kinds)
    model, ends = kinds[task.kind]
    return naming.build("model", model, options, **ends)


def check_fields(config: ConfigDict) -> None:
    for name in FIELDS:
        if name not in config:
            raise ValueError(f"the config has no field {name!r}")
    for name in ("batch_size", "eval_batch_size", "log_every_steps", "keep_checkpoints", "devices"):
        if config[name] < 1:
            raise ValueError(f"{name}={config[name]}: must be at least 1")


def local_devices(count: int) -> list[jax.Device]:
    devices = jax.local_devices()
    if count > len(devices):
        raise ValueError(f"devices={count}: this machine has {len(devices)}")
    return devices[:count]


def check_batches(config: ConfigDict) -> None:
    for name in ("batch_size", "eval_batch_size"):
        if config[name] % config.devices:
            raise ValueError(f"{name}={config[name]} is not a multiple of devices={config.devices}")


def shardings(devices: Sequence[jax.Device]) -> tuple[NamedSharding, NamedSharding]:
    """Over the devices: the same on each, and cut along the first axis."""
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
