"""Figures: a run's loss and metric against the step, an operation's time against the length, and generation."""

import os
import pathlib
from collections.abc import Mapping, Sequence

from experiments.metrics import METRICS

Series = Mapping[str, Sequence[tuple[int, float]]]
STYLE = {"train": ("#9aa5b1", 1.2, ""), "validation": ("#d9822b", 1.8, "o"), "test": ("#1f5fa8", 1.8, "o")}


def curves(path: pathlib.Path, lines: Sequence[dict], title: str, metric: str, published: Mapping) -> None:
    """Draws the lines of metrics.jsonl; `published` (of the config) becomes a dashed level."""
    figure = _figure(title, 9)
    loss, right = figure.subplots(1, 2)
    for axes, name in ((loss, "loss"), (right, metric)):
        for split, (color, width, marker) in STYLE.items():
            key = name if split == "train" else f"{split}/{name}"
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, lw=width, marker=marker, ms=3, label=split)
        axes.set_xlabel("step")
        _plain(axes)
    loss.set_ylabel("cross entropy (nats)")
    loss.set_yscale("log")
    right.set_ylabel(f"{metric.replace('_', ' ')} ({METRICS[metric].unit})")
    if published["source"]:
        right.axhline(published["value"], color="#444444", ls="--", lw=1, label="published")
    if right.has_data():
        right.legend(frameon=False)
    _save(figure, path)


def cost(path: pathlib.Path, series: Series, title: str) -> None:
    """Milliseconds against the length, a line for each "IMPLEMENTATION, PASS"; in gray what is the baseline."""
    figure = _figure(title, 6)
    axes = figure.subplots()
    for name, points in series.items():
        implementation, what = name.split(", ")
        color = "#9aa5b1" if implementation == "xla" else "#1f5fa8"
        axes.plot(*zip(*points, strict=True), color=color, ls="-" if what == "forward" else "--", marker="o", ms=4)
        axes.annotate(name, points[-1], (6, 0), textcoords="offset points", va="center", fontsize=8, color=color)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("length of a sequence (tokens)")
    axes.set_ylabel("time (ms)")
    _plain(axes)
    _save(figure, path)


def generation(path: pathlib.Path, panels: Sequence[tuple[str, str, Series]]) -> None:
    """Panels of (label of x, label of y, name -> points), both axes by powers; in gray what is called transformer."""
    figure = _figure("", 9)
    for axes, (x, y, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, points) in enumerate(series.items()):
            color = "#9aa5b1" if name == "transformer" else ("#1f5fa8", "#d9822b", "#3f8f5b")[i % 3]
            axes.plot(*zip(*points, strict=True), color=color, marker="o", ms=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(frameon=False, fontsize=8)
        _plain(axes)
    _save(figure, path)


def _figure(title: str, width: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _plain(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure, path: pathlib.Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(
        temporary, dpi=130, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
    )
    os.replace(temporary, path)
