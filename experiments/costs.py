"""What the kernels cost: a table and a figure, of the records in experiments/results/kernels alone.

python -m experiments.costs             prints the table of one layer's cost as Markdown
python -m experiments.costs --peers     prints other projects' kernels beside ours
python -m experiments.costs --training  prints that of whole training steps
python -m experiments.costs --all       prints every measurement
python -m experiments.costs --figure    draws the times against the length, beside the records
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from experiments import commandline, plots
from experiments.report_cells import RESULTS
from experiments.report_tables import rows
from kernels_pallas.dispatch import FUSED

KERNELS = RESULTS / "kernels"
LAYER_COLUMNS = ("operation", "shape", "CPU, 2 cores", "1 x NVIDIA H200", "TPU v5e, estimated")
DEVICE = "NVIDIA H200"
PASSES = ("forward", "forward+backward")
ESTIMATED = "v5e"  # the generation that the table shows
COLUMNS = ("operation", "shape", "hardware", "implementation", "forward", "forward + backward", "compared with")
PEER_COLUMNS = ("operation", "shape", "implementation", "forward", "forward + backward", "notes")
STEP_COLUMNS = ("training step", "hardware", "implementation", "time", "tokens/s", "of the published peak")
SERIES = "associative_scan"  # whose shapes include one amount of tokens in sequences of many lengths


def read(folder: pathlib.Path) -> list[dict]:
    """Every line of the folder's records; of a measurement that was made again, the last."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return list(
        {
            tuple(line.get(k) for k in ("op", "shape", "device", "implementation", "pass")): line for line in lines
        }.values()
    )


def table(records: Sequence[dict]) -> str:
    """The fastest implementation of each operation, shape and device, beside the baseline of the same run."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        if ours(record):
            groups.setdefault((record["op"], record["shape"], record["device"]), []).append(record)
    return rows(COLUMNS, [_cells(*key, group) for key, group in sorted(groups.items())])


def ours(record: dict) -> bool:
    """Whether it is a time of an implementation of ours: other projects' have no baseline."""
    return "milliseconds" in record and "baseline" in record


def peers(records: Sequence[dict]) -> str:
    """The kernels of other projects, and ours of the same operation, shape and device; forward, and with gradients."""
    timed = [r for r in records if "milliseconds" in r]
    shared = {(r["op"], r["shape"], r["device"]) for r in timed if not ours(r)}
    groups: dict[tuple, dict[str, dict]] = {}
    for r in timed:
        key = r["op"], r["shape"], r["device"]
        if key in shared and (not ours(r) or r["implementation"] in FUSED):
            groups.setdefault((*key[:2], not ours(r), r["implementation"]), {})[r["pass"]] = r
    lines = []
    for (op, shape, theirs, name), passes in sorted(groups.items()):
        times = [f"{_short(passes[p]['milliseconds'])} ms" if p in passes else "" for p in PASSES]
        note = next(iter(passes.values())).get("note", "")
        lines.append((op, shape, name if theirs else "**ours**", *times, note))
    return rows(PEER_COLUMNS, lines)


def _cells(op: str, shape: str, device: str, group: list[dict]) -> tuple[str, ...]:
    mine = _fastest(group)
    first = next(iter(mine.values()))
    times = [_time(mine.get(name)) for name in PASSES]
    return op, shape, device, first["implementation"], *times, first["baseline"]


def _fastest(group: list[dict]) -> dict[str, dict]:
    """By pass, the records of the fastest implementation: with its gradients, where they were timed."""
    passes = [name for name in PASSES if any(r["pass"] == name for r in group)]
    best = min((r for r in group if r["pass"] == passes[-1]), key=lambda r: r["milliseconds"])
    return {r["pass"]: r for r in group if r["implementation"] == best["implementation"]}


def _time(record: dict | None) -> str:
    if record is None:
        return ""
    milliseconds = record["milliseconds"]
    return f"{_short(milliseconds)} ms ({record['baseline_milliseconds'] / milliseconds:.1f} x)"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def layers(records: Sequence[dict]) -> str:
    """Of the shapes that every backend has: forward / forward + backward of the fastest implementation on each."""
    everywhere = [r for r in records if "--shapes layer" in r["command"]]
    shapes = sorted({(r["op"], r["shape"]) for r in everywhere})
    lines = []
    for op, shape in shapes:
        mine = [r for r in records if r["op"] == op and r["shape"].split(",")[0] == shape.split(",")[0]]
        measured = [[r for r in mine if ours(r) and d in r["device"]] for d in ("cpu", DEVICE)]
        lines.append(
            (op, shape, *map(_both, measured), _estimated(shape, [r for r in mine if r["device"] == ESTIMATED]))
        )
    return rows(LAYER_COLUMNS, lines)


def _both(group: list[dict]) -> str:
    if not group:
        return ""
    mine = _fastest(group)
    times = " / ".join(_short(mine[name]["milliseconds"]) if name in mine else "-" for name in PASSES)
    return f"{times} ms ({next(iter(mine.values()))['implementation']})"


def _estimated(shape: str, group: list[dict]) -> str:
    """All iterations of the kernels' inner loops, each as long as what bounds it."""
    if not group:
        return ""
    batch, length, channels = (int(word[1:]) for word in shape.split()[:3])
    first = group[0]["shape"]  # of several precisions, the first
    times = {
        r["pass"]: 1e-6 * batch * length * channels / r["tokens_per_iteration"]
        * max(r["nanoseconds_compute"], r["nanoseconds_memory"])
        for r in group if r["shape"] == first
    }  # fmt: skip
    return f"{times['forward']:.3g} / {sum(times.values()):.3g} ms"


def training(records: Sequence[dict]) -> str:
    """Every variant of every training step, beside the baseline of the same run."""
    steps = [r for r in records if r["op"] == "training_step"]
    lines = []
    for r in sorted(steps, key=lambda r: (r["device"], r["shape"], r["milliseconds"])):
        share = f"{100 * r['share_of_peak']:.0f} %" if "share_of_peak" in r else ""
        time = f"{_time(r)[:-1]} {r['baseline']})"
        lines.append((r["shape"], r["device"], r["implementation"], time, f"{r['tokens_per_second']:,}", share))
    return rows(STEP_COLUMNS, lines)


def by_length(records: Sequence[dict]) -> dict[str, list[tuple[int, float]]]:
    """Implementation and pass -> (length, milliseconds), of the shapes with one product of batch and length."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        batch, length = (int(word[1:]) for word in record["shape"].split()[:2])
        if record["op"] == SERIES and "milliseconds" in record and batch * length == 2**20:
            found.setdefault(f"{record['implementation']}, {record['pass']}", {})[length] = record["milliseconds"]
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def draw(path: pathlib.Path, records: Sequence[dict]) -> None:
    """The figure of the times against the length."""
    plots.cost(path, by_length(records), "complex scan of 128 channels, 1,048,576 tokens in all")


def sources(records: Sequence[dict]) -> str:
    """Where the measurements come from: of each device the commands, dates and versions."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["device"], []).append(record)
    lines = []
    for device, group in sorted(groups.items()):
        versions = (" ".join(pair) for r in group for pair in r["versions"].items())
        dates = sorted(r["date"] for r in group)
        dates = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        commands = (f"`{r['command']}`" for r in group)
        lines.append((device, dates, *(", ".join(dict.fromkeys(found)) for found in (versions, commands))))
    return rows(("hardware", "date", "versions", "command"), lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m experiments.costs", description=__doc__)
    for flag in ("--peers", "--training", "--all", "--figure"):
        parser.add_argument(flag, action="store_true")
    arguments = parser.parse_args(argv[1:])
    records = read(KERNELS)
    if arguments.figure:
        draw(KERNELS / "length.svg", records)
        print(f"drawn {KERNELS / 'length.svg'}")
    else:
        chosen = [
            f for f, name in ((peers, "peers"), (training, "training"), (table, "all")) if getattr(arguments, name)
        ]
        print(next(iter(chosen), layers)(records))
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main))
