"""curves.png: loss and metric against the step."""

import os
import pathlib
from collections.abc import Mapping, Sequence

from experiments.metrics import METRICS

STYLE = {"train": ("#9aa5b1", 1.2, ""), "validation": ("#d9822b", 1.8, "o"), "test": ("#1f5fa8", 1.8, "o")}


def curves(path: pathlib.Path, lines: Sequence[dict], title: str, metric: str, published: Mapping) -> None:
    """Draws the lines of metrics.jsonl; `published` (of the config) becomes a dashed level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    loss, right = figure.subplots(1, 2)
    for axes, name in ((loss, "loss"), (right, metric)):
        for split, (color, width, marker) in STYLE.items():
            key = name if split == "train" else f"{split}/{name}"
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, lw=width, marker=marker, ms=3, label=split)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss.set_ylabel("cross entropy (nats)")
    loss.set_yscale("log")
    right.set_ylabel(f"{metric.replace('_', ' ')} ({METRICS[metric].unit})")
    if published["source"]:
        right.axhline(published["value"], color="#444444", ls="--", lw=1, label="published")
    if right.has_data():
        right.legend(frameon=False)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)
