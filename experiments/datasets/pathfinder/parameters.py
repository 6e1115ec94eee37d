"""What the Long Range Arena gave the Pathfinder generator for images of 32, 64, 128 (Path-X) and 256 pixels.

Sources: the docstrings of the release's builders (google-research/long-range-arena, lra_benchmarks/data/pathfinder.py)
and, where these are silent, the defaults of drewlinsley/pathfinder's wrapper. All are of the "hard" set,
curv_contour_length_14, and draw no single paddles.

The number of distractors: the wrapper divides 20, 22, 35 or 30 by the distractors' length once, when contours still
have 6 paddles and distractors 2, and keeps it for contours of 14 and distractors of 4: 10, 11, 17 and 15, and not the
5, 5, 8 and 7 that the docstrings read as. That the released 128 x 128 set has 35 * 2 / 4 of them was also reported of
its images (a question to its authors, number 38); of the 32 x 32 set, whose docstring alone writes //, nothing is
known.
"""

import dataclasses
from fractions import Fraction

from ssm import naming


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Lengths are in pixels of the image, unless they count paddles, the dashes of a contour."""

    resolution: int
    seed_distance: int  # from the first paddle of one target contour to that of the other
    marker_radius: Fraction
    paddle_length: int
    paddle_thickness: Fraction  # times antialias: an integer
    margins: tuple[int, ...]  # half the gap between paddles; one of them is drawn per image
    continuity: Fraction  # a paddle turns by an angle with probability ~ cos^2(continuity * angle)
    target_contrast: Fraction  # of paddles, where the marker discs have 1
    distractor_contrast: Fraction
    distractors: int
    padding: int = 1
    contour_length: int = 14  # paddles
    distractor_length: int = 4  # paddles
    antialias: int = 2

    @property
    def thickness(self) -> int:
        """In pixels of the finer grid on which paddles are drawn."""
        return int(self.paddle_thickness * self.antialias)


PARAMETERS = {
    32: Parameters(32, 7, Fraction("1.5"), 2, Fraction("0.5"), (1,), Fraction(1), Fraction("1.5"), Fraction(2), 10),
    64: Parameters(64, 12, Fraction("2.5"), 5, Fraction(1), (1,), Fraction("1.8"), *[Fraction("0.8")] * 2, 11),
    128: Parameters(128, 20, Fraction(3), 5, Fraction("1.5"), (2, 3), Fraction("1.8"), *[Fraction("0.9")] * 2, 17),
    256: Parameters(256, 27, Fraction(5), 5, Fraction(2), (3,), Fraction("1.8"), *[Fraction(1)] * 2, 15, padding=22),
}


def parameters(resolution: int) -> Parameters:
    """Raises ValueError naming the resolutions that there are."""
    if resolution not in PARAMETERS:
        raise naming.unknown("Pathfinder resolution", str(resolution), [str(r) for r in PARAMETERS])
    return PARAMETERS[resolution]
