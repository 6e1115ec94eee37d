"""The reports' figures, of the cells that were run: accuracy against the length of a test, or against the width."""

import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from experiments import plots
from experiments.report_cells import Cell

AGAINST_WIDTH = ("mqar",)  # tasks whose models are compared in several widths


class Figure(NamedTuple):
    name: str  # "FOLDER/NAME", of the file
    caption: str
    draw: Callable[[pathlib.Path], None]

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Draws the SVG below `folder`."""
        path = folder / f"{self.name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.draw(path)
        return path


def figures(cells: Sequence[Cell]) -> list[Figure]:
    """What `panels` has of the cells."""
    return [
        Figure(name, caption, partial(plots.compare, panels=found, title=caption))
        for name, (caption, found) in panels(cells).items()
    ]


def panels(cells: Sequence[Cell]) -> dict[str, tuple[str, list[plots.Panel]]]:
    """Name -> caption and panels: of each task and size the lengths it was tested at, of some tasks the widths."""
    lengths: dict[tuple[str, str], list[Cell]] = {}
    widths: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.result and cell.task in AGAINST_WIDTH:
            widths.setdefault(cell.task, []).append(cell)
        elif cell.result and cell.result.get("further"):
            lengths.setdefault((cell.task, cell.size), []).append(cell)
    drawn = {f"{task}/lengths-{size}": _lengths(task, size, group) for (task, size), group in lengths.items()}
    return drawn | {f"{task}/widths": (task, _widths(group)) for task, group in widths.items()}


def _lengths(task: str, size: str, cells: Sequence[Cell]) -> tuple[str, list[plots.Panel]]:
    first = cells[0]
    trained = max(first.config["task"].get("lengths") or [first.config["task"]["length"]])
    panel = plots.Panel(
        "length of a test sequence (tokens)",
        first.measure,
        {cell.model: _points(cell) for cell in cells},
        levels=_chance(first),
        marks={"longest in training": trained},
    )
    return f"{task}, trained at up to {trained} tokens ({size})", [panel]


def _points(cell: Cell) -> list[tuple[int, float]]:
    """(length, figure) of the test and of the further ones."""
    task = cell.config["task"]
    further = cell.result.get("further") or {}
    points = {int(split.removeprefix("test_")): value for split, value in further.items() if value is not None}
    if length := task.get("test_length") or task.get("length"):
        points[length] = cell.result["value"]
    return sorted(points.items())


def _chance(cell: Cell) -> dict[str, float]:
    """Where guessing is, in the cell's metric; a whole sequence is hardly ever guessed."""
    if cell.metric == "sequence_accuracy":
        return {}
    return {"chance": 100 / cell.classes if cell.metric == "accuracy" else 0.0}


def _widths(cells: Sequence[Cell]) -> list[plots.Panel]:
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for cell in cells:
        series = found.setdefault(cell.config["task"]["length"], {})
        series.setdefault(cell.model, []).append((cell.config["model"]["width"], cell.result["value"]))
    return [
        plots.Panel(
            "width of the model (channels)",
            cells[0].measure,
            {name: sorted(points) for name, points in series.items()},
            f"{length:,} tokens",
        )
        for length, series in sorted(found.items())
    ]
