"""Figures of the notebooks: panels side by side, of lines or of a matrix, and a knob to turn beside them.

show(lines({"sine": (t, np.sin(t)), "samples": (t[::9], y[::9], "o")}, xlabel="time"), matrix(A, title="$A$"))
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import plots
from kernels_pallas.benchmark import milliseconds

Panel = Callable[[Any], None]
WIDTH = 10.0  # inches


def lines(series: Mapping[str, tuple], *, legend: str | None = "best", columns: int = 1, **properties) -> Panel:
    """A panel of lines, name -> (x, y), (x, y, format) or (x, y, keywords), the last two Matplotlib's.

    A name that starts with "_" is not in the legend, which is at the place `legend`, in so many columns, or right of
    the panel for "outside", or left out for None. properties: what `Axes.set` takes, such as title, yscale, xlim.
    """

    def draw(axes) -> None:
        for name, (x, y, *looks) in series.items():
            keywords = looks.pop() if looks and isinstance(looks[-1], Mapping) else {}
            axes.plot(np.asarray(x), np.asarray(y), *looks, label=name, **keywords)
        axes.set(**properties)
        if legend == "outside":
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        elif legend:
            axes.legend(loc=legend, ncols=columns)

    return draw


def timed(form: Callable, arguments: Callable[[int], Sequence], lengths: Sequence[int]) -> np.ndarray:
    """Milliseconds of the jitted form(*arguments(length)) at every length, once compiled: the median of several."""
    return np.array([milliseconds(jax.jit(form), *arguments(int(length))) for length in lengths])


def plane(points: Mapping[str, Any], looks: str = "o", *, circle: bool = True, **properties) -> Panel:
    """A panel of complex numbers, name -> array, in the complex plane, with the unit circle behind; else as `lines`."""
    angle = np.linspace(0, 2 * np.pi, 200)
    unit = {"_circle": (np.cos(angle), np.sin(angle), {"color": plots.GREY, "lw": 1})} if circle else {}
    series = {name: (np.real(each), np.imag(each), looks) for name, each in points.items()}
    return lines(unit | series, **{"xlabel": "real part", "ylabel": "imaginary part", "aspect": "equal"} | properties)


def matrix(values, *, limit: float | None = None, **properties) -> Panel:
    """A panel of a real matrix, from blue for -limit over white for 0 to red; limit: its largest entry if not given."""

    def draw(axes) -> None:
        most = limit or np.abs(values).max()
        axes.imshow(np.asarray(values), cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        axes.set(**properties)
        axes.grid(False)

    return draw


def tree(nodes: Mapping[tuple[float, float], str], edges: Sequence[tuple], dark: Sequence = (), **properties) -> Panel:
    """A panel of labelled nodes, (x, y) -> label, and edges, pairs of such places; dark: the nodes that stand out."""

    def draw(axes) -> None:
        for start, end in edges:
            axes.plot(*zip(start, end, strict=True), color=plots.GREY, lw=1, zorder=1)
        for place, label in nodes.items():
            face, ink = (plots.COLOURS["mamba2"], "white") if place in dark else ("#dbe9f6", plots.INK)
            box = {"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": "none"}
            axes.text(*place, label, color=ink, ha="center", va="center", bbox=box, zorder=2)
        axes.update_datalim(list(nodes))
        axes.margins(0.08)
        axes.autoscale_view()
        axes.set(**properties)
        axes.grid(False)

    return draw


def show(*panels: Panel, height: float = 4.0, width: float = WIDTH) -> None:
    """Draws the panels side by side, in the project's style; sizes of the whole in inches."""
    import matplotlib.pyplot as plt

    with plots.style():
        _, axes = plt.subplots(1, len(panels), figsize=(width, height), squeeze=False)
        for panel, each in zip(panels, axes[0], strict=True):
            panel(each)
        plt.show()


def knob(draw: Callable[..., None], **values: Sequence[float]) -> None:
    """draw(name=value, ...) with a slider for every name, over its values.

    Where ipywidgets is missing, or CI is in the environment, it is drawn once, with the middle one of each.
    """
    middle = {name: each[len(each) // 2] for name, each in values.items()}
    if "CI" in os.environ or importlib.util.find_spec("ipywidgets") is None:
        draw(**middle)
        return
    import ipywidgets

    options = {name: [(f"{value:.3g}", value) for value in each] for name, each in values.items()}
    slider = lambda name: ipywidgets.SelectionSlider(  # noqa: E731
        options=options[name], value=middle[name], description=name, continuous_update=False
    )
    ipywidgets.interact(draw, **{name: slider(name) for name in values})
