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
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import steps
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
        rates, seeds = ({f"{x:.4g}": None for x in each} for each in self)
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
    count, task = len(members.rates), recipe.task
    if count % len(devices):
        raise ValueError(f"{count} replicas are not a multiple of devices={len(devices)}")
    own, one = PartitionSpec("replicas"), PartitionSpec()
    mesh = jax.make_mesh((len(devices),), ("replicas",), (AxisType.Auto,), devices=devices)
    cut, whole = NamedSharding(mesh, own), NamedSharding(mesh, one)
    over = functools.partial(jax.shard_map, mesh=mesh, out_specs=own, check_vma=False)
    rates = jax.device_put(np.array(members.rates, np.float32), cut)
    seeds = jax.device_put(np.array(members.seeds).astype(np.uint32), cut)
    made = isinstance(task, SyntheticTask)

    initialise = jax.jit(over(jax.vmap(recipe.new_state), in_specs=(own, own)), out_shardings=cut)
    train = jax.vmap(recipe.train_step, (0, 0 if made else None, 0, 0))
    train = over(train, in_specs=(own, own if made else one, own, own))
    train = jax.jit(train, donate_argnums=0, out_shardings=cut)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=cut), recipe.like)
    names = steps.watched_names(like)

    def read(params, batch_stats, batch, key):
        return jax.lax.map(lambda variables: recipe.eval_step(*variables, batch, key), (params, batch_stats))

    def batches(start: int) -> Iterator[Batch]:
        several = [task.train_batches(recipe.batch_size, seed, start) for seed in dict.fromkeys(members.seeds)]
        if not made:
            return map(functools.partial(place, whole), several[0])
        return (jax.device_put(_by_replica(each, count), cut) for each in zip(*several, strict=True))

    def make_train_step() -> TrainStep:
        arguments = like, next(batches(0)), rates, seeds
        compiled = fitting(train, arguments, count, len(devices), memory(len(devices)))
        return lambda state, batch: compiled(state, batch, rates, seeds)

    return Program(
        new_state=functools.partial(initialise, rates, seeds),
        like=like,
        make_train_step=make_train_step,
        eval_step=jax.jit(over(read, in_specs=(own, own, one, one))),
        batches=batches,
        place=functools.partial(place, whole),
        check=functools.partial(check, names=names),
        line=functools.partial(line, metric=task.metric, names=names),
        best=lambda state, line: take(state, line["replica"]),
        tokens=count * recipe.batch_size * task.length,
    )


def _by_replica(batches: Sequence[Batch], count: int) -> Batch:
    """The seeds' batches, one for every replica."""
    return jax.tree.map(lambda *x: np.stack(x * (count // len(x))), *batches)


# Memory --------------------------------------------------------------------------------------------


def memory(devices: int) -> int:
    """Bytes that a program may take on one of the devices; a CPU's, which are simulated, share the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // devices


def fitting(step: Callable, arguments: tuple, count: int, devices: int, limit: int) -> jax.stages.Compiled:
    """The step, compiled. Raises ValueError where a device of `limit` bytes cannot hold its part of the replicas."""
    compiled = step.lower(*arguments).compile()
    needed = bytes_needed(compiled)
    if needed > limit:
        fit = int(count * limit / needed) // devices * devices
        raise ValueError(
            f"{count} replicas need {needed / 2**30:.3g} GiB of a device's {limit / 2**30:.3g}: {fit} would fit. Take"
            " fewer config.replicas.learning_rates or seeds, more devices, or a smaller batch_size"
        )
    return compiled


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """Of one device while the program runs: what goes in, what comes out in other places, and between."""
    use = compiled.memory_analysis()
    arrays = use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes
    return arrays + use.temp_size_in_bytes + use.generated_code_size_in_bytes


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
