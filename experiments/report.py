"""The table of results, made from records alone.

python -m experiments.report                      prints the table as Markdown
python -m experiments.report smnist               of one task
python -m experiments.report --add runs/smnist    takes finished runs into experiments/results/
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from experiments import commandline, workdir
from experiments.metrics import METRICS
from experiments.progress import clock_face

RESULTS = pathlib.Path(__file__).parent / "results"
TRAIN_LINES = 200  # of metrics.jsonl, that a record keeps
COLUMNS = ("task", "model", "ours", "paper", "parameters", "tokens/s", "command", "hardware", "time")


def add(run: workdir.Workdir, results: pathlib.Path) -> pathlib.Path:
    """Copies result.json, config.json and a thinned metrics.jsonl; returns the record's folder."""
    result = finished(run)
    folder = results / result["task"] / f"{result['model'].replace(' ', '+')}-{result['preset']}"
    folder.mkdir(parents=True, exist_ok=True)
    workdir.write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in thin(run.lines())))
    for name, value in (("config", run.config), ("result", result)):
        workdir.write(folder / f"{name}.json", json.dumps(value, indent=2) + "\n")
    return folder


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


def table(results: pathlib.Path, task: str | None = None) -> str:
    """Markdown of all records, by task and model."""
    files = sorted(results.glob(f"{task or '*'}/*/result.json"))
    return markdown([json.loads(file.read_text()) for file in files])


def markdown(results: Sequence[dict]) -> str:
    """One row for each result.json."""
    return rows(COLUMNS, [_cells(result) for result in results])


def rows(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ("---",) * len(columns), *cells))


def _cells(result: dict) -> tuple[str, ...]:
    published, show = result["published"], METRICS[result["metric"]].show
    return (
        result["task"],
        f"{result['model']} ({result['preset']})",
        show(result["value"]),
        show(published["value"]) if published else "",
        f"{result['parameters']:,}",
        f"{result['tokens_per_second']:,}",
        f"`{result['command']}`",
        result["hardware"],
        clock_face(result["wall_seconds"]),
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m experiments.report", description=__doc__)
    parser.add_argument("task", nargs="?")
    parser.add_argument("--add", type=pathlib.Path, nargs="+", metavar="WORKDIR", default=[])
    arguments = parser.parse_args(argv[1:])
    for path in arguments.add:
        print(f"added {add(workdir.Workdir.opened(path), RESULTS)}")
    if not arguments.add:
        print(table(RESULTS, arguments.task))
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main))
