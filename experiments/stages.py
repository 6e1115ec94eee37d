"""Training in stages: a run may start from the parameters of another.

`config.start_from` is the folder of a finished run of the same model, relative to this run's own; what is started with
are the parameters and batch statistics behind its figure. Steps, optimizer, schedule and data begin anew. The clock
goes on: a record counts the time of all stages, and names the commands of those before.
"""

import pathlib
from typing import NamedTuple

from experiments import checkpoint
from experiments.program import Program
from experiments.steps import TrainState
from experiments.workdir import Workdir


class Start(NamedTuple):
    """clock: that of `progress.Chrono`; commands: of the runs before, the first one first."""

    state: TrainState
    clock: dict[str, float] | None
    commands: list[str]


def begin(run: Workdir, program: Program) -> Start:
    """Raises ValueError where the other run is not finished, or its model is another."""
    state = program.new_state()
    if not (place := run.config.get("start_from")):
        return Start(state, None, [])
    folder = (run.path / pathlib.Path(place).expanduser()).resolve()
    if not (folder / "result.json").is_file():
        raise ValueError(f"start_from={place!r}: {folder} has no result.json; that run is to be finished first")
    other = Workdir.opened(folder)
    result = other.read("result.json")
    before, _ = checkpoint.restore(other.checkpoints, result["step"], program.like)
    state = state._replace(params=before.params, batch_stats=before.batch_stats)
    clock = {"seconds": result["wall_seconds"], "device_seconds": result["gpu_seconds"]}
    return Start(state, clock | {"step_seconds": 0.0, "timed_steps": 0}, [*result.get("stages", ()), result["command"]])
