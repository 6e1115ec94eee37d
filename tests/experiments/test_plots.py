"""The project's style of figures, and a colour for each model."""

import itertools

import matplotlib
import numpy as np
import pytest

from experiments import plots
from ssm.mixers import MIXERS


def test_the_style_ends_with_its_context():
    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["figure.facecolor"] == "white" and matplotlib.rcParams["font.size"] >= 12
    assert dict(matplotlib.rcParams) == before


def test_every_mixer_has_a_colour_of_its_own():
    colours = {name: matplotlib.colors.to_rgb(plots.colour(name)) for name in MIXERS}
    for one, other in itertools.combinations(colours, 2):
        assert np.abs(np.subtract(colours[one], colours[other])).max() > 0.15, (one, other)
    assert max(map(sum, colours.values())) < 2  # shows on white, whose is 3


def test_variants_are_told_apart_by_their_dashes():
    assert plots.colour("mamba3_none") == plots.colour("mamba3") == plots.colour("mamba3 mamba3 attention")
    looks = [plots.line(name)["linestyle"] for name in ("mamba3", "mamba3_fixed", "mamba3_none", "mamba3_negative")]
    assert len(set(looks)) == 4
    assert plots.colour("gated_deltanet_negative") == plots.colour("gated_deltanet") != plots.colour("deltanet")
    with pytest.raises(ValueError, match="unknown model 'mamba4'; did you mean 'mamba"):
        plots.colour("mamba4")
