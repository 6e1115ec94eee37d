"""How fast models write: tables and figures, of the records in experiments/results/generation alone.

python -m experiments.generation_costs           prints the table of generation as Markdown
python -m experiments.generation_costs --steps   prints that of one decode step, the kernels beside XLA
python -m experiments.generation_costs --figure  draws rates against the batch, and states, beside the records
"""

import argparse
import sys
from collections.abc import Sequence

from experiments import commandline, plots
from experiments.costs import read
from experiments.report_cells import RESULTS
from experiments.report_tables import rows

GENERATION = RESULTS / "generation"
COLUMNS = (
    *("model", "batch", "state", "reading, tok/s", "writing, tok/s", "of a copy's bandwidth", "together, tok/s"),
    *("beside the baseline's best", "beside it at this batch"),
)
STEP_COLUMNS = ("step", "kernels, ms", "XLA, ms", "faster", "of a copy's bandwidth")
RATES = {"written_per_second": "writing", "together_per_second": "reading and writing"}


def table(records: Sequence[dict]) -> str:
    """Every model and batch; the last columns are the rates of writing / of both beside the baseline's."""
    mine = sorted((r for r in records if r["op"] == "generation"), key=lambda r: (_order(r), r["batch"]))
    return rows(COLUMNS, [_cells(r, _baselines(r, mine)) for r in mine])


def _order(record: dict) -> tuple:
    name = record["implementation"]
    return record["device"], record["comparison"], name != record["baseline"], name


def _baselines(record: dict, records: Sequence[dict]) -> list[dict]:
    if record["implementation"] == record["baseline"]:
        return []
    return [r for r in records if r["implementation"] == record["baseline"] and _order(r)[:2] == _order(record)[:2]]


def _cells(record: dict, baselines: Sequence[dict]) -> tuple[str, ...]:
    same = [b for b in baselines if b["batch"] == record["batch"]]
    return (
        f"{record['implementation']}, {1e-9 * record['parameters']:.2f} B",
        f"{record['batch']:,}",
        _bytes(record["state_bytes"]),
        *(f"{record[name]:,}" for name in ("read_per_second", "written_per_second")),
        f"{100 * record['share_of_copy_bandwidth']:.0f} %",
        f"{record['together_per_second']:,}",
        *(_ratios(record, some) for some in (baselines, same)),
    )


def _ratios(record: dict, baselines: Sequence[dict]) -> str:
    """Each rate beside the best of the baselines."""
    if not baselines:
        return ""
    return " / ".join(f"{record[rate] / max(b[rate] for b in baselines):.1f} x" for rate in RATES)


def _bytes(count: float) -> str:
    return f"{1e-9 * count:.1f} GB" if count >= 1e9 else f"{1e-6 * count:.1f} MB"


def steps(records: Sequence[dict]) -> str:
    """One decode step: the kernels, XLA in the same run, their ratio, and the share of the bandwidth of both."""
    mine = {(r["device"], r["shape"], r["implementation"]): r for r in records if r["op"] == "decode_step"}
    lines = []
    for device, shape, name in sorted(mine):
        auto, xla = mine[device, shape, name], mine.get((device, shape, "chunked"))
        if name == "auto" and xla:
            times = [r["milliseconds"] for r in (auto, xla)]
            shares = " / ".join(f"{100 * r['share_of_copy_bandwidth']:.0f} %" for r in (auto, xla))
            lines.append((shape, *(f"{ms:.3g}" for ms in times), f"{times[1] / times[0]:.1f} x", shares))
    return rows(STEP_COLUMNS, lines)


def panels(records: Sequence[dict]) -> list[plots.Panel]:
    """Of the figure: both rates against the batch, and the bytes of one row's state against its tokens."""
    measured = sorted((r for r in records if r["op"] == "generation"), key=lambda r: (_order(r), r["batch"]))
    found = []
    for rate, name in RATES.items():
        series: dict[str, list] = {}
        for r in measured:
            series.setdefault(r["implementation"], []).append((r["batch"], r[rate]))
        found.append(plots.Panel("batch", f"{name} (tokens/s)", series, log=True))
    states = sorted((r for r in records if r["op"] == "state_memory"), key=_order)
    sizes = {r["implementation"]: [(t, 1e-6 * b) for t, b in zip(r["tokens"], r["bytes"], strict=True)] for r in states}
    return [*found, plots.Panel("tokens read", "state of one row (MB)", sizes, log=True)]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m experiments.generation_costs", description=__doc__)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--figure", action="store_true")
    arguments = parser.parse_args(argv[1:])
    records = read(GENERATION)
    if arguments.figure:
        plots.compare(GENERATION / "generation.svg", panels(records))
        print(f"drawn {GENERATION / 'generation.svg'}")
    else:
        print(steps(records) if arguments.steps else table(records))
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main))
