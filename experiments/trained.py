"""The model of a run or of a record, and the variables behind its figure.

    model, variables = trained.load("experiments/results/parity/mamba3-demo")

A run has them in its checkpoints. A record of at most PARAMETERS has them in one file, which any reader of safetensors
opens: every variable in its own dtype, named params/... or batch_stats/..., without the optimizer's state, and of
replicas the best one's alone. Its metadata are what the task tells the model, `setup.Ends`: with them and the record's
config.json the model is built without the task's data.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from experiments import checkpoint, replicas, setup, steps
from experiments.workdir import Workdir

FILE = "model.safetensors"
PARAMETERS = 2**20  # 4 MiB in float32

Variables = dict[str, Any]  # "params", and "batch_stats", which may be empty


class Restored(NamedTuple):
    """One model ready to be evaluated. step: the updates that made the variables."""

    setup: setup.Setup
    step: int
    variables: Variables


def load(path: str | os.PathLike) -> tuple[nn.Module, Variables]:
    """The model of the run or record in a folder, and its variables; a record's needs none of the task's data.

    Raises ValueError as `restore`.
    """
    run = Workdir.opened(pathlib.Path(path))
    if run.checkpoints.is_dir():
        ready, _, variables = restore(run)
        return ready.model, variables
    ends, variables = read(run.path / FILE)
    return setup.build_model(run.config["model"], ends), jax.tree.map(jnp.asarray, variables)


def restore(run: Workdir) -> Restored:
    """A run or record made ready, with the variables behind its figure, or the newest of a run that is not finished.

    Of replicas it is the best one as an ordinary run, by the last line that its checkpoint has seen.
    Raises ValueError where there is no whole checkpoint that fits the config, or the config cannot be run here.
    """
    config = ConfigDict(run.config)
    if run.checkpoints.is_dir():
        ready = setup.prepare(config)
        step, state = _state(run, ready.program.like)
        if ready.members:
            best = _best(run, step)
            state, ready = replicas.take(state, best), setup.prepare(_alone(config, ready.members, best))
        variables, like = _variables(state), _variables(ready.program.like)
    else:
        _, variables = read(run.path / FILE)
        if not (result := run.read("result.json")):
            raise ValueError(f"{run.path} has a {FILE} and no result.json, which says of which step it is")
        step, members = result["step"], replicas.members(config)
        ready = setup.prepare(_alone(config, members, _best(run, step)) if members else config)
        like = _variables(ready.program.like)
        checkpoint.check_fit(run.path / FILE, checkpoint.leaves(variables), checkpoint.leaves(like))
    return Restored(ready, step, jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), variables, like))


def _state(run: Workdir, like: steps.TrainState) -> tuple[int, steps.TrainState]:
    if result := run.read("result.json"):
        return result["step"], checkpoint.restore(run.checkpoints, result["step"], like)[0]
    if restored := checkpoint.restore_latest(run.checkpoints, like):
        return restored.step, restored.state
    raise ValueError(f"{run.path} has no checkpoint yet")


def _variables(state: steps.TrainState) -> Variables:
    return {"params": state.params, "batch_stats": state.batch_stats}


def _best(run: Workdir, step: int) -> int:
    return next((line["replica"] for line in reversed(run.lines()) if line["step"] <= step and "replica" in line), 0)


def _alone(config: ConfigDict, members: replicas.Members, replica: int) -> ConfigDict:
    return replicas.alone(config, members.rates[replica], members.seeds[replica])


# A record's file -----------------------------------------------------------------------------------


def write(path: pathlib.Path, restored: Restored) -> None:
    """Replaces the file in one move."""
    tensors = traverse_util.flatten_dict(jax.tree.map(np.asarray, restored.variables), sep="/")
    ends = {name: str(getattr(restored.setup.task, name)) for name in setup.Ends._fields}
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(safetensors.numpy.save(tensors, ends))
    os.replace(temporary, path)


def read(path: pathlib.Path) -> tuple[setup.Ends, Mapping[str, Any]]:
    """What `write` wrote. Raises ValueError where the file is absent, damaged or of another kind."""
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no checkpoint: neither a run's checkpoints/ nor a record's {FILE}, which"
            f" `experiments.report --add` keeps of models of at most {PARAMETERS:,} parameters"
        )
    try:
        with safe_open(path, "numpy") as file:
            told, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing := [name for name in setup.Ends._fields if name not in told]:
        raise ValueError(f"{path} is not of a record: its metadata have no {missing[0]!r}")
    numbers = {name: int(told[name]) for name in ("input_size", "classes")}
    ends = setup.Ends(kind=told["kind"], encoder=told["encoder"], **numbers)
    return ends, {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(tensors, sep="/")
