"""The lineage of the models as a figure: what each one changed, when, and the file that holds it.

python -m experiments.lineage    draws notebooks/lineage.svg
"""

import html
import string
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from experiments import commandline, workdir
from experiments.plots import INK, colour
from experiments.records import ROOT

FIGURE = ROOT / "notebooks" / "lineage.svg"
WIDTH, HEIGHT = 234, 100  # of a box, in pixels
ACROSS, DOWN, MARGIN = 22, 30, 6  # between boxes, and around them
CHARACTERS = 30  # of a line in a box
PALE = "#667078"


class Box(NamedTuple):
    column: int
    row: int
    name: str
    year: int
    change: str
    file: str

    @property
    def left(self) -> int:
        return MARGIN + self.column * (WIDTH + ACROSS)

    @property
    def top(self) -> int:
        return MARGIN + self.row * (HEIGHT + DOWN)


BOXES = {
    "hippo": Box(0, 0, "HiPPO", 2020, "memory as projection: the signal's coefficients are kept", "ssm/hippo.py"),
    "lssl": Box(1, 0, "LSSL", 2021, "a layer of it: recurrence, convolution and ODE are one", "ssm/discretize.py"),
    "s4": Box(2, 0, "S4", 2021, "A = diagonal - low rank; the kernel from Cauchy products", "ssm/mixers/s4.py"),
    "liquid_s4": Box(3, 0, "Liquid-S4", 2022, "the transition hears the input", "ssm/mixers/liquid_s4.py"),
    "dss": Box(0, 1, "DSS", 2022, "the low rank dropped: a diagonal A is enough", "ssm/mixers/dss.py"),
    "s4d": Box(1, 1, "S4D", 2022, "its kernel is a Vandermonde product", "ssm/mixers/s4d.py"),
    "s5": Box(2, 1, "S5", 2022, "one state for all channels, made by a parallel scan", "ssm/mixers/s5.py"),
    "lru": Box(3, 1, "LRU", 2023, "no continuous time left: eigenvalues on a ring", "ssm/mixers/lru.py"),
    "mamba": Box(1, 2, "Mamba", 2023, "B, C and dt read from the input: the state chooses", "ssm/mixers/mamba.py"),
    "mamba2": Box(2, 2, "Mamba-2", 2024, "one decay a head: it is the map of masked attention", "ssm/mixers/mamba2.py"),
    "mamba3": Box(
        3, 2, "Mamba-3", 2026, "trapezoidal rule, turning states, several inputs at once", "ssm/mixers/mamba3.py"
    ),
    "attention": Box(0, 3, "Attention", 2017, "keeps every token, reads all of them again", "ssm/mixers/attention.py"),
    "deltanet": Box(
        1, 3, "DeltaNet", 2021, "keeps a matrix, corrected and not only added to", "ssm/mixers/gated_deltanet.py"
    ),
    "gated_deltanet": Box(2, 3, "Gated DeltaNet", 2024, "the correction, with a decay", "ssm/mixers/gated_deltanet.py"),
}
ARROWS = (
    *(("hippo", "lssl"), ("lssl", "s4"), ("s4", "liquid_s4"), ("s4", "dss"), ("dss", "s4d"), ("s4d", "s5")),
    *(("s5", "lru"), ("s4d", "mamba"), ("mamba", "mamba2"), ("mamba2", "mamba3"), ("attention", "deltanet")),
    *(("deltanet", "gated_deltanet"), ("mamba2", "gated_deltanet")),
)
NOTE = (
    "All but attention are",
    "state <- decay * state",
    "+ previous * (last B x)",
    "+ current * (B x)",
    "by a rule of ssm/discretize.py",
)  # at the left of the third row

PAGE = string.Template("""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" width="$width" \
height="$height" role="img" font-family="Helvetica, Arial, sans-serif" font-size="13">
<title>The lineage of state space models</title>
<rect width="$width" height="$height" fill="#ffffff"/>
$body
</svg>
""")


def svg() -> str:
    """The figure, in text that is text."""
    lines = [line for arrow in ARROWS for line in _arrow(*(BOXES[name] for name in arrow))]
    lines += [line for model, box in BOXES.items() for line in _box(box, colour(model))]
    lines += _note(Box(0, 2, "", 0, "", ""))
    last = Box(3, 3, "", 0, "", "")
    size = {"width": last.left + WIDTH + MARGIN, "height": last.top + HEIGHT + MARGIN}
    return PAGE.substitute(size, body="\n".join(lines))


def _box(box: Box, colour: str) -> list[str]:
    x, right = box.left + 15, box.left + WIDTH - 9
    frame = f'x="{box.left}" y="{box.top}" height="{HEIGHT}"'
    return [
        f'<rect {frame} width="{WIDTH}" rx="4" fill="#f7f8f9" stroke="#c9ced3"/>',
        f'<rect {frame} width="6" rx="3" fill="{colour}"/>',
        _text(x, box.top + 24, box.name, f'font-size="16" font-weight="bold" fill="{INK}"'),
        _text(right, box.top + 24, str(box.year), f'text-anchor="end" fill="{PALE}"'),
        *(_text(x, box.top + 46 + 17 * i, line) for i, line in enumerate(textwrap.wrap(box.change, CHARACTERS))),
        _text(x, box.top + HEIGHT - 12, box.file, f'font-family="monospace" font-size="11.5" fill="{PALE}"'),
    ]


def _note(place: Box) -> list[str]:
    return [_text(place.left + 15, place.top + 14 + 19 * i, line, f'fill="{PALE}"') for i, line in enumerate(NOTE)]


def _text(x: int, y: int, words: str, more: str = f'fill="{INK}"') -> str:
    return f'<text x="{x}" y="{y}" {more}>{html.escape(words)}</text>'


def _arrow(start: Box, end: Box) -> list[str]:
    """To the right within a row; otherwise from the lower edge to the upper one, through the gap below the start."""
    if start.row == end.row:
        x, y = end.left, start.top + HEIGHT // 2
        return [_line((start.left + WIDTH, y), (x - 6, y)), _head((x, y), (x - 8, y - 5), (x - 8, y + 5))]
    middles = [box.left + WIDTH // 2 for box in (start, end)]
    bottom, y = start.top + HEIGHT, end.top
    between = bottom + DOWN // 2
    path = _line((middles[0], bottom), (middles[0], between), (middles[1], between), (middles[1], y - 6))
    return [path, _head((middles[1], y), (middles[1] - 5, y - 8), (middles[1] + 5, y - 8))]


def _line(*points: tuple[int, int]) -> str:
    return f'<polyline points="{_points(points)}" fill="none" stroke="{PALE}" stroke-width="1.5"/>'


def _head(*points: tuple[int, int]) -> str:
    return f'<polygon points="{_points(points)}" fill="{PALE}"/>'


def _points(points: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}")
    FIGURE.parent.mkdir(exist_ok=True)
    workdir.write(FIGURE, svg())
    print(f"drawn {FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(commandline.run(main))
