"""From a config to everything that a run needs, with every check that can be made before it starts."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import checkpoint, optimizer, steps, tasks
from experiments.tasks import resident
from experiments.tasks.base import Batch, Task
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
    optimizer: optax.GradientTransformation
    rows: list[optimizer.Row]  # the parameter table
    train_steps: int
    eval_every: int  # steps
    checkpoint_every: int  # steps
    epochs: float
    whole: NamedSharding  # the same on every device
    place: Callable[[Batch], Batch]  # to the devices, cut along the first axis
    new_state: Callable[[], steps.TrainState]
    like: steps.TrainState  # its shapes, dtypes and shardings


def prepare(config: ConfigDict) -> Setup:
    """Raises ValueError with one line for a config that cannot be run."""
    check_fields(config)
    whole, split = shardings(config)
    options = config.task.to_dict()
    residence = options.pop("resident", "auto")
    task = tasks.load(options)
    model = build_model(config.model.to_dict(), task)
    per_epoch = task.examples("train") / config.batch_size
    total = optimizer.duration(config, "train", per_epoch)
    if not total:
        raise ValueError("train_steps and train_epochs are both 0: set one of them")
    options = optimizer.options(config.optimizer.to_dict())
    factor = optimizer.schedule(options, total, per_epoch)
    example = next(task.train_batches(config.batch_size, config.seed, 0))
    init = functools.partial(steps.init_variables, model, task, example, config.seed)
    variables = jax.eval_shape(init)
    rows = optimizer.table(options, variables[0])
    tx = optimizer.build(options, rows, factor)
    shapes = jax.eval_shape(functools.partial(steps.new_state, tx), *variables)
    return Setup(
        task=resident.placed(task, residence, whole),
        model=model,
        optimizer=tx,
        rows=rows,
        train_steps=total,
        eval_every=optimizer.duration(config, "eval_every", per_epoch, total) or total,
        checkpoint_every=optimizer.duration(config, "checkpoint_every", per_epoch, total) or total,
        epochs=total / per_epoch,
        whole=whole,
        place=functools.partial(place, split),
        new_state=jax.jit(lambda: steps.new_state(tx, *init()), out_shardings=whole),
        like=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes),
    )


def place(split: NamedSharding, batch: Batch) -> Batch:
    """The batch on the devices, cut along the first axis; what lies there already stays where it is."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, split), batch)


def restore(run: Workdir) -> tuple[Setup, int, steps.TrainState]:
    """A run made ready, and the checkpoint behind its figure, or the newest of a run that is not finished.

    Raises ValueError where there is none, or its config cannot be run here.
    """
    ready = prepare(ConfigDict(run.config))
    if result := run.read("result.json"):
        state, _ = checkpoint.restore(run.checkpoints, result["step"], ready.like)
        return ready, result["step"], state
    if restored := checkpoint.restore_latest(run.checkpoints, ready.like):
        return ready, restored.step, restored.state
    raise ValueError(f"{run.path} has no checkpoint yet")


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


def shardings(config: ConfigDict) -> tuple[NamedSharding, NamedSharding]:
    """Over `config.devices` devices: the same on each, and cut along the first axis."""
    devices = jax.local_devices()
    if config.devices > len(devices):
        raise ValueError(f"devices={config.devices}: this machine has {len(devices)}")
    for name in ("batch_size", "eval_batch_size"):
        if config[name] % config.devices:
            raise ValueError(f"{name}={config[name]} is not a multiple of devices={config.devices}")
    mesh = jax.make_mesh((config.devices,), ("data",), (AxisType.Auto,), devices=devices[: config.devices])
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
