"""Panels draw what they are given, and a knob is drawn once where it cannot be turned."""

import sys
import types

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from experiments import figures


@pytest.fixture
def pyplot(monkeypatch):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: None)
    yield pyplot
    pyplot.close("all")


def test_panels_stand_side_by_side(pyplot):
    t, A = np.arange(3), np.array([[1.0, -2.0], [0.0, 1.0]])
    series = {"u": (t, 2 * t), "_v": (t, t, "--", {"color": "black"})}
    figures.show(figures.lines(series, xlabel="t"), figures.matrix(A), figures.plane({"z": 1j * t}, legend=None))
    left, middle, right = pyplot.gcf().axes
    assert [list(line.get_ydata()) for line in left.lines] == [[0, 2, 4], [0, 1, 2]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["u"] and left.get_xlabel() == "t"
    assert left.lines[1].get_linestyle() == "--" and left.lines[1].get_color() == "black"
    assert middle.images[0].get_clim() == (-2, 2)
    circle, points = right.lines
    assert np.allclose(np.hypot(*circle.get_data()), 1) and list(points.get_ydata()) == [0, 1, 2]
    assert right.get_legend() is None and right.get_aspect() == 1


def test_times_are_of_the_form_at_each_length():
    traced = []

    def form(x):
        traced.append(x.shape)
        return jax.lax.fori_loop(0, x.size, lambda i, total: total + jnp.sin(i), 0.0)

    few, many = figures.timed(form, lambda length: [jnp.ones(length)], [100, 100_000])
    assert traced == [(100,), (100_000,)] and 10 * few < many < 1000


def test_a_tree_has_its_labels_at_their_places_and_edges_between_them(pyplot):
    figures.show(figures.tree({(0, 0): "1", (1, 0): "2", (1, 2): "1-2"}, [((0, 0), (1, 2))], dark=[(1, 2)], yticks=[]))
    (axes,) = pyplot.gcf().axes
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "1", (1, 0): "2", (1, 2): "1-2"}
    assert [np.transpose(line.get_data()).tolist() for line in axes.lines] == [[[0, 0], [1, 2]]]
    assert [text.get_color() == "white" for text in axes.texts] == [False, False, True]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < 0 and right > 1 and low < 0 and high > 2 and not len(axes.get_yticks())


@pytest.mark.parametrize("why", ["CI", "no ipywidgets"])
def test_a_knob_that_cannot_be_turned_is_drawn_once(monkeypatch, why):
    drawn = []
    monkeypatch.delenv("CI", raising=False)
    if why == "CI":
        monkeypatch.setenv("CI", "1")
    else:
        monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    figures.knob(lambda **values: drawn.append(values), n=[1, 2, 3], dt=[0.1])
    assert drawn == [{"n": 2, "dt": 0.1}]


def test_a_knob_is_a_slider_over_its_values(monkeypatch):
    drawn, widgets = [], types.ModuleType("ipywidgets")
    widgets.SelectionSlider = lambda **options: options
    widgets.interact = lambda draw, **sliders: drawn.append(sliders)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: widgets)
    figures.knob(print, dt=np.array([0.001, 0.01, 0.1]))
    slider = drawn[0]["dt"]
    assert slider["options"] == [("0.001", 0.001), ("0.01", 0.01), ("0.1", 0.1)] and slider["value"] == 0.01
