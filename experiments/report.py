"""Reports of what was measured, made from records alone.

python -m experiments.report                      prints all there is, as Markdown
python -m experiments.report state_tracking       of a group of tasks; or a config, a task, kernels, generation
    --write [FOLDER]                              writes it, with its figures, to FOLDER or experiments/results
    --html FILE                                   writes it as one page, figures and all
python -m experiments.report --readme             makes the README's tables again
python -m experiments.report --add runs/smnist    takes finished runs into experiments/results, small models too
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from functools import partial

from experiments import commandline, report_cells, report_page, report_sections, trained, workdir
from experiments.records import ROOT
from experiments.report_cells import CONFIGS, RESULTS, Cell

README = ROOT / "README.md"
TRAIN_LINES = 200  # of metrics.jsonl, that a record keeps


def add(run: workdir.Workdir, results: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Copies result.json, config.json, a thinned metrics.jsonl and what `trained` restores the model from.

    Returns the record's folder, and why it has no model, or "". Raises ValueError where the folder holds the record of
    another config.
    """
    result = finished(run)
    folder = results / result["task"] / f"{result['model'].replace(' ', '+')}-{result['preset']}"
    if changes := workdir.Workdir(folder, run.config).changes():
        raise ValueError(
            f"{folder} is of another config: {workdir.first(changes)}. Remove it, or train with --config.preset=NAME"
        )
    model, lack = small_model(run, result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / trained.FILE).unlink(missing_ok=True)
    workdir.write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in thin(run.lines())))
    for name, value in (("config", run.config), ("result", result)):
        workdir.write(folder / f"{name}.json", json.dumps(value, indent=2) + "\n")
    if model:
        trained.write(folder / trained.FILE, model)
    return folder, lack


def small_model(run: workdir.Workdir, result: dict) -> tuple[trained.Restored | None, str]:
    """The model behind the figure, or None and why there is none to keep."""
    if (count := result["parameters"]) > trained.PARAMETERS:
        return None, f"its {count:,} parameters are more than {trained.PARAMETERS:,}"
    try:
        return trained.restore(run), ""
    except ValueError as error:
        if not commandline.raised_here(error):
            raise
        return None, str(error)


def finished(run: workdir.Workdir) -> dict:
    """The run's result.json. Raises ValueError where there is none yet."""
    if (result := run.read("result.json")) is None:
        raise ValueError(f"{run.path} is not finished: it has no result.json")
    return result


def thin(lines: Sequence[dict]) -> list[dict]:
    """Every line of an evaluation, the last line, and evenly spaced ones of the others."""
    train = [line for line in lines if "loss" in line]
    kept = train[:: -(-len(train) // TRAIN_LINES) or 1] + train[-1:]
    return [line for line in lines if "loss" not in line or line in kept]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="of a group of tasks, a config or a task; left out: all there is")
    parser.add_argument("--write", type=pathlib.Path, nargs="?", const=RESULTS, metavar="FOLDER")
    parser.add_argument("--html", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--add", type=pathlib.Path, nargs="+", metavar="WORKDIR", default=[])
    arguments = parser.parse_args(argv[1:])
    for path in arguments.add:
        folder, lack = add(workdir.Workdir.opened(path), RESULTS)
        print(f"added {folder}" + (f"; its checkpoint is not kept: {lack}" if lack else ""))
    cells = report_cells.cells(CONFIGS, RESULTS)
    if arguments.readme:
        table = partial(report_sections.table, cells)
        workdir.write(README, report_page.marked(README.read_text(), table))
    if not (arguments.add or arguments.readme):
        show(cells, arguments.name, arguments.write, arguments.html)
    return 0


def show(cells: Sequence[Cell], name: str | None, folder: pathlib.Path | None, html: pathlib.Path | None) -> None:
    """Prints the report of that name, or of everything, or writes it as Markdown with figures, or as a page."""
    sections = [report_sections.named(cells, name)] if name else report_sections.everything(cells)
    title = name or "Everything measured"
    if html:
        workdir.write(html, report_page.page(sections, title))
        print(f"written {html}")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write(folder / f"{name or 'report'}.md", report_page.markdown(sections, title))
        for path in (folder / f"{name or 'report'}.md", *report_page.draw(sections, folder)):
            print(f"written {path}")
    if not (html or folder):
        print(report_page.markdown(sections, drawn=False), end="")


if __name__ == "__main__":
    sys.exit(commandline.run(main))
