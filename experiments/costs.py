"""What the kernels cost: a table and a figure, of the records in experiments/results/kernels alone.

python -m experiments.costs           prints the table as Markdown
python -m experiments.costs --figure  draws the times against the length, beside the records
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from experiments import commandline, plots
from experiments.report import RESULTS, rows

KERNELS = RESULTS / "kernels"
COLUMNS = ("operation", "shape", "hardware", "implementation", "forward", "forward + backward", "compared with")
SERIES = "associative_scan"  # whose shapes include one amount of tokens in sequences of many lengths


def read(folder: pathlib.Path) -> list[dict]:
    """Every line of the folder's records; of a measurement that was made again, the last."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return list(
        {tuple(line[k] for k in ("op", "shape", "device", "implementation", "pass")): line for line in lines}.values()
    )


def table(records: Sequence[dict]) -> str:
    """The fastest implementation of each operation, shape and device, beside the baseline of the same run."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        if "milliseconds" in record:
            groups.setdefault((record["op"], record["shape"], record["device"]), []).append(record)
    return rows(COLUMNS, [_cells(*key, group) for key, group in sorted(groups.items())])


def _cells(op: str, shape: str, device: str, group: list[dict]) -> tuple[str, ...]:
    best = min((r for r in group if r["pass"] == "forward+backward"), key=lambda r: r["milliseconds"])
    mine = {r["pass"]: r for r in group if r["implementation"] == best["implementation"]}
    times = [_time(mine.get(name)) for name in ("forward", "forward+backward")]
    return op, shape, device, best["implementation"], *times, best["baseline"]


def _time(record: dict | None) -> str:
    if record is None:
        return ""
    return f"{record['milliseconds']:.3g} ms ({record['baseline_milliseconds'] / record['milliseconds']:.1f} x)"


def by_length(records: Sequence[dict]) -> dict[str, list[tuple[int, float]]]:
    """Implementation and pass -> (length, milliseconds), of the shapes with one product of batch and length."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        batch, length = (int(word[1:]) for word in record["shape"].split()[:2])
        if record["op"] == SERIES and "milliseconds" in record and batch * length == 2**20:
            found.setdefault(f"{record['implementation']}, {record['pass']}", {})[length] = record["milliseconds"]
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m experiments.costs", description=__doc__)
    parser.add_argument("--figure", action="store_true")
    arguments = parser.parse_args(argv[1:])
    records = read(KERNELS)
    if arguments.figure:
        plots.cost(KERNELS / "length.svg", by_length(records), "complex scan of 128 channels, 1,048,576 tokens in all")
        print(f"drawn {KERNELS / 'length.svg'}")
    else:
        print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main))
