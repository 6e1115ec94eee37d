"""Pathfinder images: are the two discs at the ends of one contour of paddles, or of two?

Each image is a function of (resolution, seed, split, index): its random numbers are a stream of its own. All is done
in integers, so that every machine and every number of threads makes the same bytes.
"""

from typing import NamedTuple

import numpy as np

from experiments.datasets.pathfinder.contours import (
    below,
    extend,
    first_distractor,
    first_target,
    jit,
    mix,
    second_target,
    stamp,
)
from experiments.datasets.pathfinder.sprites import CONTRAST, FREE, PAD, tables

SPLITS = ("train", "validation", "test")
DISTRACTOR_TRIALS = 5


class Geometry(NamedTuple):
    """How an image came about.

    paddles: int (n, 4): contour (0 and 1 the targets), y and x that it is drawn from, and orientation, an index into
    the `sprites.Tables`; markers: int (2, 2): (y, x) of the discs; margin: which of the two tables.
    """

    paddles: np.ndarray
    markers: np.ndarray
    margin: int


@jit
def note(paddles, count, contour, tip):
    paddles[count, 0], paddles[count, 1], paddles[count, 2] = contour, tip[2], tip[1]
    return count + 1


@jit
def two_targets(random, mask, t, paddles, tips, cumulative):
    """Both targets, paddle by paddle in turn; returns how many paddles there are, 0 for a failure."""
    if not first_target(random, t, tips[0]) or not second_target(random, t, tips[0, 2], tips[1]):
        return 0
    mask[:] = t.blank
    count = note(paddles, note(paddles, 0, 0, tips[0]), 1, tips[1])
    for _ in range(t.contour_length - 1):
        for contour in range(2):
            if not extend(random, mask, t, tips[contour], cumulative):
                return 0
            count = note(paddles, count, contour, tips[contour])
    stamp(mask, t.within, t.masks[tips[1, 1]], t.side, tips[1, 2])
    return count


@jit
def distractor(random, mask, t, paddles, count, contour, tip, cumulative):
    """One more contour; returns how many paddles there are then, and `mask` is spoilt if it failed."""
    unoccupied = t.size**2 - len(mask)
    for value in mask:
        unoccupied += value <= FREE
    if 100 * unoccupied < t.size**2 or not first_distractor(random, mask, t, tip):
        return count
    grown = note(paddles, count, contour, tip)
    for _ in range(t.distractor_length - 1):
        if not extend(random, mask, t, tip, cumulative):
            return count
        grown = note(paddles, grown, contour, tip)
    stamp(mask, t.within, t.masks[tip[1]], t.side, tip[2])
    return grown


@jit
def paint(canvas, sprite, side, place, contrast):
    n = len(sprite)
    corner = place - (n // 2) * (side + 1)
    for row in range(n):
        for column in range(n):
            p = corner + row * side + column
            canvas[p] = max(canvas[p], contrast * sprite[row, column])


@jit
def render(canvas, t, paddles, count, markers, image):
    """Draws what was placed; the brightest pixel becomes 255, as where the originals were saved."""
    canvas[:] = 0
    for i in range(count):
        contrast = t.target_contrast if paddles[i, 0] < 2 else t.distractor_contrast
        paint(canvas, t.lines[paddles[i, 2]], t.side, paddles[i, 1], contrast)
    for i in range(2):
        paint(canvas, t.marker, t.side, markers[i], CONTRAST)
    brightest = 0
    for row in range(t.size):
        for column in range(t.size):
            brightest = max(brightest, canvas[t.corner + row * t.side + column])
    for row in range(t.size):
        for column in range(t.size):
            value = canvas[t.corner + row * t.side + column]
            image[row, column] = (2 * 255 * value + brightest) // (2 * brightest)


@jit
def compose(random, t, label, scratch, image, paddles, markers):
    """One image; returns how many paddles it has."""
    mask, kept, canvas, tips, cumulative = scratch
    count = 0
    while count == 0:
        count = two_targets(random, mask, t, paddles, tips, cumulative)
    origin = below(random, 2)
    end = count - 2 + (origin if label else 1 - origin)
    markers[0], markers[1] = paddles[origin, 1], paddles[end, 1]
    for contour in range(2, 2 + t.distractors):
        kept[:] = mask
        for _ in range(DISTRACTOR_TRIALS):
            before = count
            count = distractor(random, mask, t, paddles, count, contour, tips[0], cumulative)
            if count > before:
                break
            mask[:] = kept
    render(canvas, t, paddles, count, markers, image)
    return count


@jit
def make(both, seed, split, first, images, labels, paddles, markers, facts):
    """Images first, first + 1, ... of a split, from the tables of either margin.

    Written to: images uint8 (b, n, n), labels uint8 (b,); of the last image paddles int32 (p, 3), markers
    int32 (2,) and facts int64 (2,), the number of paddles and which margin.
    """
    masks, canvas = np.zeros((2, both[0].side ** 2), np.uint8), np.zeros(both[0].side ** 2, np.int32)
    tips, cumulative = np.zeros((2, 3), np.int64), np.zeros(len(both[1].candidates), np.int64)
    scratch = masks[0], masks[1], canvas, tips, cumulative
    random = np.zeros(1, np.uint64)
    for i in range(len(images)):
        random[0] = mix(mix(mix(np.uint64(seed)) + np.uint64(split)) + np.uint64(first + i))
        labels[i], facts[1] = below(random, 2), below(random, 2)
        facts[0] = compose(random, both[facts[1]], labels[i], scratch, images[i], paddles, markers)


def generate(resolution: int, seed: int, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images first to first + count - 1 of a split: uint8 (count, n, n), and labels, uint8 (count,).

    Label 1: both discs are on one contour. Raises ValueError for a resolution that there is not.
    """
    images, labels, _ = _generate(resolution, seed, split, first, count)
    return images, labels


def trace(resolution: int, seed: int, split: str, index: int) -> tuple[np.ndarray, int, Geometry]:
    """One image, its label, and how it came about."""
    images, labels, geometry = _generate(resolution, seed, split, index, 1)
    return images[0], int(labels[0]), geometry


def _generate(resolution, seed, split, first, count):
    both = tables(resolution)
    images, labels = np.empty((count, resolution, resolution), np.uint8), np.empty(count, np.uint8)
    most = 2 * both[0].contour_length + both[0].distractors * both[0].distractor_length
    paddles, markers, facts = np.empty((most, 3), np.int32), np.empty(2, np.int32), np.zeros(2, np.int64)
    make(both, seed, SPLITS.index(split), first, images, labels, paddles, markers, facts)
    contour, place, orientation = paddles[: facts[0]].T
    pixels = [np.stack(np.divmod(p, both[0].side), -1) - PAD for p in (place, markers)]
    return images, labels, Geometry(np.column_stack([contour, pixels[0], orientation]), pixels[1], int(facts[1]))
