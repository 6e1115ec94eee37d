"""Trains every member of a config's sweep, and prints their table.

    python -m experiments.sweep --config=configs/language_model.py:shakespeare --workdir=runs/shakespeare
    python -m experiments.sweep --config=configs/state_tracking:fast --workdir=runs/state_tracking --jobs=4

A folder's configs are swept one after another, with the preset for all of them. Each run has its own folder in
--workdir and continues as `experiments.train` does, so the same command goes on where it was stopped, and trains
nothing that is finished; --config.FIELD=VALUE is for all of them.

--jobs=N trains N at once, each in a process of its own whose output is in log.txt of its folder: small models leave
most of a GPU idle, and one compiles while others step. A run that fails stops no other. GPUs are dealt out in turn, and
runs on one share its memory equally, unless XLA's variables say otherwise; a record's GPU minutes are those for which
the run had its GPU, alone or not.
Exit status: 0 finished or time limit; with one job that of the first run that fails, with several 1; 2 wrong input,
143 SIGTERM, 130 Ctrl-C.
"""

import pathlib
import sys
from collections.abc import Sequence

from experiments import commandline, jobs, report_tables, train
from experiments.jobs import Member
from experiments.report_cells import record
from experiments.workdir import Workdir


def main(argv: Sequence[str]) -> int:
    arguments = commandline.parse_sweep(argv, __doc__)
    members = []
    for name, config in arguments.configs.items():
        folder = pathlib.Path(arguments.workdir) / name
        members.append(Member(name, folder, [f"--config={config}", f"--workdir={folder}", *arguments.rest]))
    status, failed = jobs.at_once(members, arguments.jobs) if arguments.jobs > 1 else (in_turn(members), [])
    if status and arguments.jobs == 1 or status > 128:
        return status
    done = [member for member in members if member not in failed and member.result()]
    runs = [Workdir.opened(member.folder) for member in done]
    if done:
        print(report_tables.runs([record(run.read("result.json"), run.config) for run in runs]))
    if missing := [member.name for member in members if member not in done]:
        print(f"\nnot finished: {', '.join(missing)}; the same command goes on")
    if done:
        print(f"\nnext     python -m experiments.report --add {' '.join(str(member.folder) for member in done)}")
    return status


def in_turn(members: Sequence[Member]) -> int:
    """In this process, until one fails; returns its exit status."""
    return next(filter(None, (train.main(["train", *member.arguments]) for member in members)), 0)


if __name__ == "__main__":
    sys.exit(commandline.run(main))
