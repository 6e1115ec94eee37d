"""Pathfinder images: are the two discs at the ends of one contour of paddles, or of two?

Each image is a function of (resolution, seed, split, index): its random numbers are a stream of its own. All is done
in integers, so that every machine and every number of threads makes the same bytes.
"""

from typing import NamedTuple

import numpy as np

from experiments.datasets.pathfinder.contours import place
from experiments.datasets.pathfinder.drawing import draw
from experiments.datasets.pathfinder.sprites import PAD, tables

SPLITS = ("train", "validation", "test")


class Geometry(NamedTuple):
    """How an image came about.

    paddles: int (n, 4): contour (0 and 1 the targets), y and x that it is drawn from, and orientation, an index into
    the `sprites.Tables`; markers: int (2, 2): (y, x) of the discs; margin: which of the two tables.
    """

    paddles: np.ndarray
    markers: np.ndarray
    margin: int


def generate(resolution: int, seed: int, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images first to first + count - 1 of a split: uint8 (count, n, n), and labels, uint8 (count,).

    Label 1: both discs are on one contour. Raises ValueError for a resolution that there is not.
    """
    paddles, facts = _placed(resolution, seed, split, first, count)
    images = np.empty((count, resolution, resolution), np.uint8)
    draw(tables(resolution)[1], paddles, facts, images)
    return images, facts[:, 0].astype(np.uint8)


def geometry(resolution: int, seed: int, split: str, first: int, count: int) -> list[Geometry]:
    """How each of these images comes about."""
    placed = zip(*_placed(resolution, seed, split, first, count), strict=True)
    return [_geometry(tables(resolution)[0][0].side, *of_image) for of_image in placed]


def _placed(resolution, seed, split, first, count):
    both, _ = tables(resolution)
    most = 2 * both[0].contour_length + both[0].distractors * both[0].distractor_length
    paddles, facts = np.empty((count, most, 3), np.int32), np.empty((count, 5), np.int32)
    place(both, seed, SPLITS.index(split), first, paddles, facts)
    return paddles, facts


def _geometry(side, paddles, facts):
    contour, places, orientation = paddles[: facts[2]].T
    paddle_yx, marker_yx = (np.stack(np.divmod(p, side), -1) - PAD for p in (places, facts[3:]))
    return Geometry(np.column_stack([contour, paddle_yx, orientation]), marker_yx, int(facts[1]))
