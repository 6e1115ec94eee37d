"""The figure of the lineage is its script's, names files that exist, and fits."""

import itertools
import re
import textwrap
from xml.etree import ElementTree

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from experiments import commandline, lineage
from experiments.records import ROOT
from ssm.mixers import MIXERS

SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_figure_is_the_scripts(tmp_path, monkeypatch, capsys):
    assert lineage.FIGURE.read_text() == lineage.svg()
    monkeypatch.setattr(lineage, "FIGURE", tmp_path / "notebooks" / "lineage.svg")
    assert commandline.run(lineage.main, ["lineage"]) == 0
    assert lineage.FIGURE.read_text() == lineage.svg() and "drawn" in capsys.readouterr().out
    assert commandline.run(lineage.main, ["lineage", "here"]) == 2
    assert len(lineage.svg()) < 60_000


def test_every_mixer_is_in_it_and_every_file_exists():
    assert set(MIXERS) <= set(lineage.BOXES)
    words = "".join(ElementTree.fromstring(lineage.svg()).itertext())
    files = re.findall(r"[\w/]+\.py", words)
    assert len(files) == len(lineage.BOXES) + 1
    for file in files:
        assert (ROOT / file).is_file(), file


def test_nothing_overlaps_or_is_cut():
    """Boxes lie apart and inside; every text, in as wide a font as DejaVu, ends inside of its box and the next year."""
    boxes = list(lineage.BOXES.values())
    for one, other in itertools.combinations(boxes, 2):
        assert (one.column, one.row) != (other.column, other.row)
    page = ElementTree.fromstring(lineage.svg())
    assert all(box.left + lineage.WIDTH < int(page.get("width")) for box in boxes)
    assert all(box.top + lineage.HEIGHT < int(page.get("height")) for box in boxes)
    for box in boxes:
        assert len(textwrap.wrap(box.change, lineage.CHARACTERS)) <= 2, box.name
        year = width(str(box.year), 13)
        assert width(box.name, 16, weight="bold") + year + 30 < lineage.WIDTH, box.name
    for text in page.iter(f"{SVG}text"):
        if text.get("text-anchor") != "end":
            family = "DejaVu Sans Mono" if text.get("font-family") else "DejaVu Sans"
            size = float(text.get("font-size", 13))
            assert width(text.text, size, family=family) < lineage.WIDTH - 18, text.text


def width(words: str, size: float, **font) -> float:
    """In pixels."""
    return TextPath((0, 0), words, size=size, prop=FontProperties(**font)).get_extents().width
