"""Evaluates the checkpoint behind the figure of a run or a record, or the newest one of a run that is not finished.

    python -m experiments.evaluate runs/smnist --split test
    python -m experiments.evaluate experiments/results/parity/mamba3-demo

Of a run with replicas it is the best one's. --config.FIELD=VALUE sets a field of the run's config anew: with
--config.task.rate=8000 and --config.model.mixers.s4d.step_scale=2 a model of waveforms at 16 kHz is tried on every
second sample.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments import commandline, records, steps, trained
from experiments.workdir import Workdir
from ssm import naming


def evaluate(run: Workdir, split: str) -> dict:
    """{"step", "<split>/loss", "<split>/<metric>"} of the run's or record's checkpoint."""
    ready, step, variables = trained.restore(run)
    if split not in ready.task.splits:
        raise naming.unknown("split", split, ready.task.splits)
    program, size = ready.program, run.config["eval_batch_size"]
    figures = steps.evaluate_split(
        program.eval_step, **variables, split=split, task=ready.task, batch_size=size, place=program.place
    )
    return program.line(step, {f"{split}/": figures}, steps.Health.sound())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m experiments.evaluate", description=__doc__)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--split", default="test")
    arguments, overrides = parser.parse_known_args(argv[1:])
    run = Workdir.opened(arguments.workdir)
    run.config = commandline.override(ConfigDict(run.config), overrides).to_dict()
    figures = evaluate(run, arguments.split)
    print("  ".join(f"{name} {value:.6g}" for name, value in figures.items()))
    if result := run.read("result.json"):
        print(f"recorded: {records.sentence(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main))
