"""Learning rates x seeds of one model, trained together: every array of the train state has a replica axis first.

`config.replicas = {"learning_rates": (1e-4, 1e-3), "seeds": 3}` makes a replica of each rate and each of the seeds
config.seed, config.seed + 1, ...: the rates in order, and of each all seeds. A replica is the run that
--config.optimizer.learning_rate=RATE --config.seed=SEED would be: parameter groups with a factor follow the rate, those
with a learning rate of their own keep it. Examples that are made on the device are each seed's own; a task whose
examples lie in memory is read in the order of config.seed by all. An empty `config.replicas` is an ordinary run.

The replicas are cut over `config.devices`, and never meet: one whose numbers are not finite is written down as null
from then on, and the others go on. In an evaluation one replica is read after another, which takes the memory of one.
In each line of metrics.jsonl `replica` is the best one by the line's first split, that is by validation where there is
one: by the metric, and of equal ones the one of least loss. Its numbers have an ordinary run's names, and
`replicas/<split>/<name>` lists those of all. Numbers have seven digits.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import memory, steps
from experiments.metrics import METRICS
from experiments.program import Program, Recipe, TrainStep, place
from experiments.steps import Health
from experiments.tasks.base import Batch
from experiments.tasks.synthetic import SyntheticTask
from ssm import naming


class Members(NamedTuple):
    """The learning rate and the seed of every replica."""

    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        rates, seeds = dict.fromkeys(f"{rate:g}" for rate in self.rates), dict.fromkeys(map(str, self.seeds))
        return f"{len(self.rates)}: learning rates {', '.join(rates)}, each with seeds {', '.join(seeds)}"


@dataclasses.dataclass(frozen=True)
class Options:
    """The fields of `config.replicas`."""

    learning_rates: Sequence[float] = ()
    seeds: int = 1

    def members(self, first_seed: int) -> Members:
        """Raises ValueError naming the field that is wrong."""
        rates = self.learning_rates
        if not isinstance(rates, (tuple, list)) or not all(
            isinstance(x, (int, float)) and 0 < x < math.inf for x in rates
        ):
            raise ValueError(f"replicas: learning_rates={rates!r} must be positive numbers, as in (1e-3, 1e-2)")
        if not rates:
            raise ValueError("replicas: learning_rates is empty; --config.replicas={} is an ordinary run")
        if twice := sorted(rate for rate in set(rates) if rates.count(rate) > 1):
            raise ValueError(f"replicas: learning_rates has {twice[0]:g} twice")
        if self.seeds < 1:
            raise ValueError(f"replicas: seeds={self.seeds} must be at least 1")
        pairs = [(float(rate), first_seed + i) for rate in rates for i in range(self.seeds)]
        return Members(*zip(*pairs, strict=True))


def members(config: ConfigDict) -> Members | None:
    """Those of `config.replicas`; None where it is absent or empty."""
    fields = config.get("replicas")
    return naming.build("replicas", Options, fields.to_dict()).members(config.seed) if fields else None


def alone(config: ConfigDict, rate: float, seed: int) -> ConfigDict:
    """The config of one replica as an ordinary run on one device."""
    config = config.copy_and_resolve_references().unlock()
    config.replicas, config.devices = {}, 1
    config.optimizer.learning_rate, config.seed = rate, seed
    return config


def take(tree: Any, replica: int) -> Any:
    return jax.tree.map(lambda x: x[replica], tree)


# The program ---------------------------------------------------------------------------------------


def program(recipe: Recipe, members: Members, devices: Sequence[jax.Device]) -> Program:
    """All replicas at once, cut over the devices. Raises ValueError where these do not divide them."""
    count, made = len(members.rates), isinstance(recipe.task, SyntheticTask)
    if count % len(devices):
        raise ValueError(f"{count} replicas are not a multiple of devices={len(devices)}")
    each, same = PartitionSpec("replicas"), PartitionSpec()
    mesh = jax.make_mesh((len(devices),), ("replicas",), (AxisType.Auto,), devices=devices)
    cut, whole = NamedSharding(mesh, each), NamedSharding(mesh, same)
    over = functools.partial(jax.shard_map, mesh=mesh, out_specs=each, check_vma=False)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=cut), recipe.like)
    rates = jax.device_put(np.array(members.rates, np.float32), cut)
    seeds = jax.device_put(np.array(members.seeds).astype(np.uint32), cut)
    new_state = jax.jit(over(jax.vmap(recipe.new_state), in_specs=(each, each)), out_shardings=cut)
    train = jax.vmap(recipe.train_step, (0, 0 if made else None, 0, 0))
    train = over(train, in_specs=(each, each if made else same, each, each))
    batches = functools.partial(_batches, recipe, members.seeds, made, cut if made else whole)

    def make_train_step() -> TrainStep:
        batch = next(batches(0))

        def arguments(count):
            few = lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=x.sharding)  # noqa: E731
            state, *pairs = jax.tree.map(few, (like, rates, seeds))
            return state, jax.tree.map(few, batch) if made else batch, *pairs

        step = jax.jit(train, donate_argnums=0, out_shardings=cut)
        compiled = memory.fitting(step, arguments, count, len(devices), memory.limit(len(devices)))
        return lambda state, batch: compiled(state, batch, rates, seeds)

    def read(params, batch_stats, batch, key):
        return jax.lax.map(lambda variables: recipe.eval_step(*variables, batch, key), (params, batch_stats))

    names = steps.watched_names(like)
    return Program(
        new_state=functools.partial(new_state, rates, seeds),
        like=like,
        make_train_step=make_train_step,
        eval_step=jax.jit(over(read, in_specs=(each, each, same, same))),
        batches=batches,
        place=functools.partial(place, whole),
        check=functools.partial(check, names=names),
        line=functools.partial(line, metric=recipe.task.metric, names=names),
        best=lambda state, line: take(state, line["replica"]),
        tokens=count * recipe.batch_size * recipe.task.length,
    )


def _batches(recipe: Recipe, seeds: Sequence[int], made: bool, sharding: NamedSharding, start: int) -> Iterator[Batch]:
    """One batch for all, or with the replica axis where examples are made: each seed's own."""
    several = [recipe.task.train_batches(recipe.batch_size, seed, start) for seed in dict.fromkeys(seeds)]
    repeat = lambda *x: np.stack(x * (len(seeds) // len(x)))  # noqa: E731
    for batch, *others in zip(*several[: None if made else 1], strict=True):
        yield place(sharding, jax.tree.map(repeat, batch, *others) if made else batch)


# Figures -------------------------------------------------------------------------------------------


def check(health: Health, names: Sequence[str]) -> None:
    """Raises FloatingPointError, as `steps.check` does for the last one, where no replica is left."""
    since = jax.device_get(health.step)
    if (since >= 0).all():
        steps.check(take(health, int(since.argmax())), names)


def line(step: int, figures: Mapping[str, dict[str, Any]], health: Health, metric: str, names: Sequence[str]) -> dict:
    """As `steps.line`, from {prefix: {name: one number a replica}}. Raises where no replica is left."""
    check(health, names)
    numbers = {prefix: {name: np.asarray(x) for name, x in each.items()} for prefix, each in figures.items()}
    sound = jax.device_get(health.step) < 0
    for each in numbers.values():
        sound = sound & np.isfinite([*each.values()]).all(0)
    if not sound.any():
        raise FloatingPointError(f"step {step}: no replica is left whose numbers are all finite")
    judged, sign = next(iter(numbers.values())), 1 if METRICS[metric].higher_is_better else -1
    best = min(np.flatnonzero(sound).tolist(), key=lambda r: (-sign * judged[metric][r], judged["loss"][r]))
    found: dict[str, Any] = {"step": step, "replica": best}
    for prefix, each in numbers.items():
        found |= {f"{prefix}{name}": _digits(x[best]) for name, x in each.items()}
    for prefix, each in numbers.items():
        for name, x in each.items():
            found[f"replicas/{prefix or 'train/'}{name}"] = [
                _digits(v) if s else None for v, s in zip(x, sound, strict=True)
            ]
    return found


def _digits(number: Any) -> float:
    return float(f"{number:.7g}")


def record(figure: Mapping[str, Any], members: Members, metric: str, further: Sequence[str]) -> dict[str, Any]:
    """What result.json says of the replicas, from the line of its figure; null: not finite.

    median: of a learning rate's seeds, on test, at the rate where that of the split that decides is best.
    """
    columns = {split: figure.get(f"replicas/{split}/{metric}") for split in ("test", "validation", *further)}
    none = [None] * len(members.rates)
    replicas = []
    for r, (rate, seed) in enumerate(zip(*members, strict=True)):
        one = {split: (column or none)[r] for split, column in columns.items()}
        entry = {"learning_rate": rate, "seed": seed, "value": one["test"]}
        entry |= {"validation": one["validation"]} if columns["validation"] else {}
        replicas.append(entry | ({"further": {split: one[split] for split in further}} if further else {}))
    return {
        "seeds": list(dict.fromkeys(members.seeds)),
        "median": median(replicas, METRICS[metric].higher_is_better),
        "replicas": replicas,
    }


def sentence(result: Mapping[str, Any], members: Members, best: int) -> str:
    """Which replica a record's figure is, and what the others came to."""
    show = METRICS[result["metric"]].show
    middle = "not finite" if result["median"] is None else show(result["median"])
    which = f"learning rate {members.rates[best]:g}, seed {members.seeds[best]}"
    return f"best of {len(members.rates)}: {which}; median of a rate's {len(result['seeds'])} seeds {middle}"


def median(replicas: Sequence[Mapping[str, Any]], higher_is_better: bool) -> float | None:
    """See `record`. What is not finite counts as worst."""
    worst = -math.inf if higher_is_better else math.inf

    def of(rate: float, name: str) -> float:
        values = [r[name] for r in replicas if r["learning_rate"] == rate]
        return statistics.median(worst if value is None else value for value in values)

    decides = "validation" if "validation" in replicas[0] else "value"
    best = max if higher_is_better else min
    found = of(best({r["learning_rate"]: None for r in replicas}, key=lambda rate: of(rate, decides)), "value")
    return found if math.isfinite(found) else None
