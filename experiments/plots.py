"""The project's figures: one style, one colour for each model, and the drawings that programs share.

    with plots.style():
        figure, axes = plt.subplots()
        axes.plot(steps, errors, **plots.line("s4d"), label="s4d")

Colours are Okabe and Ito's and Tol's, which the colour-blind tell apart.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.metrics import METRICS
from ssm import naming

Series = Mapping[str, Sequence[tuple[int, float]]]
INK, GREY = "#333333", "#8a949e"  # text and levels; what another thing is measured against
COLOURS = {
    "hippo": "#882255",
    "lssl": "#aa4499",
    "s4": "#332288",
    "dss": "#999933",
    "s4d": "#cc79a7",
    "liquid_s4": "#44aa99",
    "s5": "#e69f00",
    "lru": "#117733",
    "mamba": "#56b4e9",
    "mamba2": "#0072b2",
    "mamba3": "#d55e00",
    "deltanet": "#cc6677",
    "gated_deltanet": "#009e73",
    "attention": "#555555",
    "transformer": "#555555",
}
VARIANTS = {
    "none": (":", "v"),
    "fixed": ("-.", "s"),
    "negative": ("--", "^"),
    "n16": (":", "v"),
    "n256": ("--", "^"),
}  # the last word of a variant's name -> dashes and marker
SPLITS = {
    "train": {"color": GREY, "lw": 1.2, "marker": ""},
    "validation": {"color": "#e69f00", "marker": "o"},
    "test": {"color": "#0072b2", "marker": "o"},
}
RC = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.figsize": (7.0, 4.0),  # inches
    "figure.dpi": 130,
    "savefig.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 12,
    "axes.titlesize": 12,
    "figure.titlesize": 13,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "ssm",  # the same drawing is the same file
}


class Panel(NamedTuple):
    """One pair of axes: labels with units, model -> points; log: y by powers; lines across, by name, at y and at x."""

    x: str
    y: str
    series: Series
    title: str = ""
    log: bool = False
    levels: Mapping[str, float] = {}
    marks: Mapping[str, float] = {}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib draws in the project's style inside; also a decorator. Legible at half size, on white."""
    import matplotlib
    from cycler import cycler

    cycle = cycler(color=[COLOURS[name] for name in ("mamba2", "mamba3", "gated_deltanet", "s5", "s4d", "mamba", "s4")])
    with matplotlib.rc_context(RC | {"axes.prop_cycle": cycle}):
        yield


def colour(model: str) -> str:
    """The model's colour, "#rrggbb"; a variant such as "mamba3_none" has its model's, a hybrid its first layer's.

    Raises ValueError for a model that has none.
    """
    words = model.split()[0].rsplit("_", 1)
    name = words[0] if words[-1] in VARIANTS else "_".join(words)
    if name not in COLOURS:
        raise naming.unknown("model", model, COLOURS)
    return COLOURS[name]


def line(model: str) -> dict[str, str]:
    """Keywords of a plot of the model: its colour, and a variant's own dashes and marker."""
    dashes, marker = VARIANTS.get(model.split()[0].rsplit("_", 1)[-1], ("-", "o"))
    return {"color": colour(model), "linestyle": dashes, "marker": marker}


@style()
def curves(path: pathlib.Path, lines: Sequence[dict], title: str, metric: str, published: Mapping) -> None:
    """Draws the lines of metrics.jsonl; `published` (of the config) becomes a dashed level.

    Of replicas all are drawn, thin, and the one that the last figure is of as a run is.
    """
    best = next((line.get("replica") for line in reversed(lines) if f"test/{metric}" in line), None)
    figure = _figure(title, 10)
    loss, right = figure.subplots(1, 2)
    for axes, name in ((loss, "loss"), (right, metric)):
        for split, keywords in SPLITS.items():
            key, every = name if split == "train" else f"{split}/{name}", f"replicas/{split}/{name}"
            points = [(line["step"], line[key]) for line in lines if key in line]
            if several := [(line["step"], np.array(line[every], float)) for line in lines if every in line]:
                axes.plot(*zip(*several, strict=True), color=keywords["color"], lw=0.5, alpha=0.5)
                points = points if best is None else [(step, values[best]) for step, values in several]
            if points:
                axes.plot(*zip(*points, strict=True), **keywords, label=split)
        axes.set_xlabel("step")
    loss.set_ylabel("cross entropy (nats)")
    loss.set_yscale("log")
    right.set_ylabel(f"{metric.replace('_', ' ')} ({METRICS[metric].unit})")
    if published["source"]:
        right.axhline(published["value"], color=INK, ls="--", lw=1, label="published")
    if right.has_data():
        right.legend()
    _save(figure, path)


@style()
def cost(path: pathlib.Path, series: Series, title: str) -> None:
    """Milliseconds against the length, a line for each "IMPLEMENTATION, PASS"; in grey what is the baseline."""
    figure = _figure(title, 7)
    axes = figure.subplots()
    for name, points in series.items():
        implementation, what = name.split(", ")
        color = GREY if implementation == "xla" else COLOURS["mamba2"]
        axes.plot(*zip(*points, strict=True), color=color, ls="-" if what == "forward" else "--", marker="o")
        axes.annotate(name, points[-1], (6, 0), textcoords="offset points", va="center", color=color)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("length of a sequence (tokens)")
    axes.set_ylabel("time (ms)")
    _save(figure, path)


@style()
def compare(path: pathlib.Path, panels: Sequence[Panel], title: str = "") -> None:
    """Models beside each other, a curve for each, in panels that share their legend."""
    figure = _figure(title, 5 * len(panels) + 2)
    shown = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.series.items():
            (shown[name],) = axes.plot(*zip(*points, strict=True), **line(name), label=name)
        for name, value in panel.levels.items():
            shown[name] = axes.axhline(value, color=INK, ls="--", lw=1, label=name)
        for name, value in panel.marks.items():
            shown[name] = axes.axvline(value, color=INK, ls=":", lw=1, label=name)
        axes.set(xlabel=panel.x, ylabel=panel.y, yscale="log" if panel.log else "linear", title=panel.title)
        axes.set_xscale("log", base=2)
        if "%" in panel.y:
            axes.set_ylim(min(-2, axes.get_ylim()[0]), 102)
    figure.legend(handles=list(shown.values()), loc="outside right center")
    _save(figure, path)


def _figure(title: str, width: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4))
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _save(figure, path: pathlib.Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    os.replace(temporary, path)
