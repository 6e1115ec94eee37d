"""curves.png: loss and accuracy against the step."""

import os
import pathlib
from collections.abc import Mapping, Sequence

STYLE = {"train": ("#9aa5b1", 1.2, ""), "validation": ("#d9822b", 1.8, "o"), "test": ("#1f5fa8", 1.8, "o")}


def curves(path: pathlib.Path, lines: Sequence[dict], title: str, published: Mapping) -> None:
    """Draws the lines of metrics.jsonl; `published` (of the config) becomes a dashed level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    loss, accuracy = figure.subplots(1, 2)
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        for split, (color, width, marker) in STYLE.items():
            key = metric if split == "train" else f"{split}/{metric}"
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, lw=width, marker=marker, ms=3, label=split)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss.set_ylabel("cross entropy (nats)")
    loss.set_yscale("log")
    accuracy.set_ylabel("accuracy (%)")
    if published["source"]:
        accuracy.axhline(published["value"], color="#444444", ls="--", lw=1, label="published")
    if accuracy.has_data():
        accuracy.legend(frameon=False)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)
