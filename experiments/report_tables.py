"""The reports' tables, in Markdown: runs one a row, and models beside tasks."""

import math
from collections.abc import Callable, Mapping, Sequence

from experiments.metrics import METRICS
from experiments.progress import clock_face
from experiments.report_cells import Cell


def rows(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ("---",) * len(columns), *cells))


def runs(cells: Sequence[Cell]) -> str:
    """A row for each cell, empty where it was not run; columns that no row fills are left out."""
    lines = [[column(cell) for column in COLUMNS.values()] for cell in cells]
    kept = [i for i in range(len(COLUMNS)) if not lines or any(line[i] for line in lines)]
    return rows([list(COLUMNS)[i] for i in kept], [[line[i] for i in kept] for line in lines])


def summary(cells: Sequence[Cell]) -> str:
    """A row for each model and size, a column for each task: best (median of seeds) [published]."""
    metrics = {cell.task: f"{cell.task}, {cell.measure}" for cell in cells}
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for cell in cells:
        lines.setdefault((cell.model, cell.size), {})[cell.task] = _figures(cell)
    body = [(_label(*name), *(line.get(task, "") for task in metrics)) for name, line in lines.items()]
    return rows(("model", *metrics.values()), body)


def accounts(cells: Sequence[Cell]) -> str:
    """How many of the cells were run, and what they took, in one sentence."""
    done = [cell.result for cell in cells if cell.result]
    minutes = math.fsum(result["gpu_seconds"] for result in done) / 60
    return f"{len(done)} of {len(cells)} cells were run" + (f", in {minutes:,.1f} GPU minutes." if minutes else ".")


def _label(model: str, size: str) -> str:
    return f"{model} ({size})"


def _figures(cell: Cell) -> str:
    show = f"{{:.{METRICS[cell.metric].digits}f}}".format
    result = cell.result or {}
    words = [show(result["value"])] if result else []
    words += [f"({show(result['median'])})"] if result.get("median") is not None else []
    words += [f"[{show(cell.published['value'])}]"] if cell.published else []
    return " ".join(words)


def _figure(cell: Cell, value: float | None) -> str:
    """With its unit; and of a scaled accuracy the accuracy that it scales."""
    if value is None:
        return ""
    shown = METRICS[cell.metric].show(value)
    if cell.metric == "scaled_accuracy":
        raw = (value * (cell.classes - 1) + 100) / cell.classes
        shown += f" (raw {METRICS['accuracy'].show(raw)})"
    return shown


def _published(cell: Cell) -> str:
    return f"{_figure(cell, cell.published['value'])}, {cell.published['source']}" if cell.published else ""


def _seeds(result: Mapping) -> str:
    rates = {replica["learning_rate"] for replica in result.get("replicas", ())}
    return ", ".join(map(str, result["seeds"])) + (f" x {len(rates)} learning rates" if len(rates) > 1 else "")


def _of_a_run(show: Callable[[Mapping], str]) -> Callable[[Cell], str]:
    return lambda cell: show(cell.result) if cell.result else ""


COLUMNS: dict[str, Callable[[Cell], str]] = {
    "task": lambda cell: cell.task,
    "model": lambda cell: _label(cell.model, cell.size),
    "ours": lambda cell: _figure(cell, (cell.result or {}).get("value")),
    "median": lambda cell: _figure(cell, (cell.result or {}).get("median")),
    "paper": _published,
    "parameters": _of_a_run(lambda result: f"{result['parameters']:,}"),
    "seeds": _of_a_run(_seeds),
    "tokens/s": _of_a_run(lambda result: f"{result['tokens_per_second']:,}"),
    "time": _of_a_run(lambda result: clock_face(result["wall_seconds"])),
    "GPU minutes": _of_a_run(lambda result: f"{s / 60:.1f}" if (s := result["gpu_seconds"]) else ""),
    "hardware": _of_a_run(lambda result: result["hardware"]),
    "date": _of_a_run(lambda result: result["date"]),
    "command": _of_a_run(lambda result: f"`{result['command']}`"),
}
