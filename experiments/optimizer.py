"""AdamW with one learning rate and weight decay per group of parameters, and the schedules.

The SSM papers train A, B and dt with a smaller learning rate and no weight decay. A group names its
parameters by a regular expression that is searched in the path ("layers_0/mixer/log_dt"); what no group
takes is in group "default".
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssm import naming

Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose path `match` finds. Its learning rate is absolute or a factor, not both."""

    match: str
    learning_rate: float | None = None
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None  # None: as the other parameters


@dataclasses.dataclass(frozen=True)
class Options:
    """The fields of `config.optimizer`."""

    learning_rate: float
    name: str = "adamw"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    schedule: str = "cosine"
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    warmup_percent: float = 0.0
    clip_norm: float = 0.0  # 0: no clipping
    groups: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def options(fields: Mapping[str, Any]) -> Options:
    """`config.optimizer` as `Options`. Raises ValueError for a field that does not exist."""
    fields = dict(fields)
    return naming.build("optimizer", Options, fields, name=fields.pop("name", "adamw"))


class Row(NamedTuple):
    """One line of the parameter table."""

    path: str
    shape: tuple[int, ...]
    count: int
    group: str
    learning_rate: float
    weight_decay: float


def duration(fields: Mapping[str, Any], name: str, per_epoch: float, total: int = 0) -> int:
    """Steps given by whichever of `<name>_steps`, `<name>_epochs`, `<name>_percent` is not 0 (all 0: 0).

    per_epoch: steps per epoch; total: steps that a percentage refers to.
    Steps and epochs come to at least one step. Raises ValueError when two are given, or a negative one.
    """
    unit = {"steps": 1.0, "epochs": per_epoch, "percent": total / 100}
    given = {k: v for u in unit if (v := fields.get(k := f"{name}_{u}"))}
    if len(given) > 1:
        both = " and ".join(f"{k}={v}" for k, v in given.items())
        raise ValueError(f"{both} are both given: set one of them to 0")
    for field, value in given.items():
        if value < 0:
            raise ValueError(f"{field}={value}: must not be negative")
        kind = field.rsplit("_", 1)[1]
        return max(int(kind != "percent"), round(value * unit[kind]))
    return 0


def schedule(options: Options, train_steps: int, per_epoch: float) -> Schedule:
    """Factor in [0, 1] of the learning rate by step: linear warm-up from 0, then constant, or linear or cosine to 0."""
    warmup = duration(dataclasses.asdict(options), "warmup", per_epoch, train_steps)
    if warmup >= train_steps:
        raise ValueError(f"optimizer: a warm-up of {warmup} steps is not shorter than the run ({train_steps})")
    shapes = {
        "constant": optax.schedules.constant_schedule(1.0),
        "linear": optax.schedules.linear_schedule(1.0, 0.0, train_steps - warmup),
        "cosine": optax.schedules.cosine_decay_schedule(1.0, train_steps - warmup),
    }
    if options.schedule not in shapes:
        raise naming.unknown("schedule", options.schedule, shapes)
    if not warmup:
        return shapes[options.schedule]
    rise = optax.schedules.linear_schedule(0.0, 1.0, warmup)
    return optax.schedules.join_schedules([rise, shapes[options.schedule]], [warmup])


def table(options: Options, params: Any) -> list[Row]:
    """Group, learning rate and weight decay of every parameter.

    Raises ValueError when a group matches nothing, or a parameter is matched by two.
    """
    groups = {name: naming.build(f"optimizer group {name}", Group, g) for name, g in options.groups.items()}
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    rows = [_row(options, groups, path, leaf) for path, leaf in flat]
    for name, group in groups.items():
        if not any(row.group == name for row in rows):
            paths = sorted({row.path for row in rows if row.group == "default"}) or ["none is left"]
            raise ValueError(
                f"optimizer group {name}: match={group.match!r} matches no parameter (one path: {paths[0]})"
            )
    return rows


def show(rows: Sequence[Row]) -> str:
    """The parameter table as text."""
    cells = [
        (r.path, str(r.shape), f"{r.count:,}", r.group, f"{r.learning_rate:g}", f"{r.weight_decay:g}") for r in rows
    ]
    head = ("parameter", "shape", "count", "group", "learning rate", "weight decay")
    foot = ("total", "", f"{sum(r.count for r in rows):,}", "", "", "")
    lines = [head, *cells, foot]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    align = ("<", "<", ">", "<", ">", ">")
    return "\n".join(
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True)).rstrip() for line in lines
    )


def _row(options: Options, groups: Mapping[str, Group], path: Any, leaf: Any) -> Row:
    path = jax.tree_util.keystr(path, simple=True, separator="/")
    found = [name for name, group in groups.items() if _search(name, group.match, path)]
    if len(found) > 1:
        raise ValueError(f"optimizer groups {found[0]} and {found[1]} both match parameter {path}")
    name = found[0] if found else "default"
    rate, decay = _rate_and_decay(options, name, groups.get(name, Group(match="")))
    return Row(path, leaf.shape, math.prod(leaf.shape), name, rate, decay)


def _search(name: str, match: str, path: str) -> bool:
    try:
        return re.search(match, path) is not None
    except re.error as error:
        raise ValueError(f"optimizer group {name}: match={match!r} is no regular expression: {error}") from error


def _rate_and_decay(options: Options, name: str, group: Group) -> tuple[float, float]:
    if group.learning_rate is not None and group.learning_rate_factor != 1.0:
        raise ValueError(f"optimizer group {name}: give learning_rate or learning_rate_factor, not both")
    factor_rate = options.learning_rate * group.learning_rate_factor
    rate = factor_rate if group.learning_rate is None else group.learning_rate
    return rate, options.weight_decay if group.weight_decay is None else group.weight_decay


def build(options: Options, rows: Sequence[Row], factor: Schedule) -> optax.GradientTransformation:
    """update = -factor(step) * rate * (direction + decay * parameter), rate and decay by parameter.

    With name "adamw": AdamW [Loshchilov and Hutter 2019, Algorithm 2], where the decay is scaled by the
    learning rate, as in PyTorch and Optax.
    """
    directions = {
        "adamw": lambda: optax.scale_by_adam(options.b1, options.b2),
        "sgd": lambda: optax.trace(options.b1),
    }
    if options.name not in directions:
        raise naming.unknown("optimizer", options.name, directions)
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    chain = optax.chain(clip, directions[options.name](), _scale(rows, factor))

    def update(gradient, state, params):
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to int32 powers
            return chain.update(gradient, state, params)

    return optax.GradientTransformation(chain.init, update)


def _scale(rows: Sequence[Row], factor: Schedule) -> optax.GradientTransformation:
    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(directions, state, params):
        flat, tree = jax.tree.flatten(directions)
        scale = -factor(state.count)
        scaled = [
            scale * row.learning_rate * (u + row.weight_decay * p)
            for row, u, p in zip(rows, flat, jax.tree.leaves(params), strict=True)
        ]
        return tree.unflatten(scaled), optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)
