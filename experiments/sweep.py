"""Trains every member of a config's sweep, one after another, and prints their table.

    python -m experiments.sweep --config=configs/language_model.py:shakespeare --workdir=runs/shakespeare

Each run has its own folder in --workdir and continues as `experiments.train` does; --config.FIELD=VALUE is
for all of them.
"""

import pathlib
import sys
from collections.abc import Sequence

from experiments import commandline, report_tables, train
from experiments.report import finished
from experiments.report_cells import record
from experiments.workdir import Workdir


def main(argv: Sequence[str]) -> int:
    arguments = commandline.parse_sweep(argv, __doc__)
    workdirs = []
    for preset in arguments.presets:
        workdir = pathlib.Path(arguments.workdir) / preset.replace(",", "-")
        status = train.main(["train", f"--config={arguments.file}:{preset}", f"--workdir={workdir}", *arguments.rest])
        if status:
            return status
        workdirs.append(workdir)
    runs = [Workdir.opened(workdir) for workdir in workdirs]
    print(report_tables.runs([record(finished(run), run.config) for run in runs]))
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main))
