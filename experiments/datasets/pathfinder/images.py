"""Pathfinder images: are the two discs at the ends of one contour of paddles, or of two?

Each image is a function of (resolution, seed, split, index): its random numbers are a stream of its own. All is done
in integers, so that every machine and every number of threads makes the same bytes.
"""

from typing import NamedTuple

import numpy as np

from experiments.datasets.pathfinder.contours import (
    DISTRACTOR_TRIALS,
    below,
    extend,
    first_paddle,
    jit,
    mix,
    note,
    second_target,
    stamp,
    start,
)
from experiments.datasets.pathfinder.sprites import CONTRAST, FREE, tables

SPLITS = ("train", "validation", "test")


class Geometry(NamedTuple):
    """How an image came about.

    paddles: int32 (n, 4): contour (0 and 1 the targets), y and x that it is drawn from, and orientation, an index
    into the `sprites.Tables`; markers: int32 (2, 2): (y, x) of the discs; margin: which of the two tables.
    """

    paddles: np.ndarray
    markers: np.ndarray
    margin: int


@jit
def two_targets(random, mask, t, paddles, tips, work):
    """Both targets, paddle by paddle in turn; returns how many paddles there are, 0 for a failure."""
    occupied, taken, cumulative = work
    mask[:] = 255
    mask[t.padding : -t.padding, t.padding : -t.padding] = 0
    found, y, x, degree = first_paddle(random, mask, t, t.border, occupied, taken)
    if not found:
        return 0
    start(t, y, x, degree, tips[0])
    found, y, x, degree = second_target(random, t, y, x)
    if not found:
        return 0
    start(t, y, x, degree, tips[1])
    count = note(paddles, note(paddles, 0, 0, tips[0]), 1, tips[1])
    for _ in range(t.contour_length - 1):
        for contour in range(2):
            if not extend(random, mask, t, tips[contour], cumulative):
                return 0
            count = note(paddles, count, contour, tips[contour])
    stamp(mask, t.masks[tips[1, 2]], tips[1, 3], tips[1, 4])
    return count


@jit
def distractor(random, mask, t, paddles, count, contour, tip, work):
    """One more contour; returns how many paddles there are then, and `mask` is spoilt if it failed."""
    occupied, taken, cumulative = work
    free = 0
    for row in range(t.size):
        for column in range(t.size):
            free += mask[row, column] <= FREE
    if 100 * free < t.size * t.size:
        return count
    found, y, x, degree = first_paddle(random, mask, t, 1, occupied, taken)
    if not found:
        return count
    start(t, y, x, degree, tip)
    grown = note(paddles, count, contour, tip)
    for _ in range(t.distractor_length - 1):
        if not extend(random, mask, t, tip, cumulative):
            return count
        grown = note(paddles, grown, contour, tip)
    stamp(mask, t.masks[tip[2]], tip[3], tip[4])
    return grown


@jit
def paint(canvas, sprite, y, x, half, contrast):
    n = len(canvas)
    for row in range(max(0, y - half), min(n, y - half + len(sprite))):
        for column in range(max(0, x - half), min(n, x - half + len(sprite))):
            value = contrast * sprite[row - y + half, column - x + half]
            canvas[row, column] = max(canvas[row, column], value)


@jit
def render(canvas, t, paddles, count, markers, image):
    """Draws what was placed; the brightest pixel becomes 255, as where the originals were saved."""
    canvas[:] = 0
    half = t.lines.shape[1] // 2
    for i in range(count):
        contrast = t.target_contrast if paddles[i, 0] < 2 else t.distractor_contrast
        paint(canvas, t.lines[paddles[i, 3]], paddles[i, 1], paddles[i, 2], half, contrast)
    for i in range(2):
        paint(canvas, t.marker, markers[i, 0], markers[i, 1], len(t.marker) // 2, CONTRAST)
    brightest = 0
    for row in range(t.size):
        for column in range(t.size):
            brightest = max(brightest, canvas[row, column])
    for row in range(t.size):
        for column in range(t.size):
            image[row, column] = (2 * 255 * canvas[row, column] + brightest) // (2 * brightest)


@jit
def compose(random, t, label, scratch, image, paddles, markers):
    """One image; returns how many paddles it has."""
    mask, kept, canvas, tips, work = scratch
    count = 0
    while count == 0:
        count = two_targets(random, mask, t, paddles, tips, work)
    origin = below(random, 2)
    end = count - 2 + (origin if label else 1 - origin)
    markers[0], markers[1] = paddles[origin, 1:3], paddles[end, 1:3]
    for contour in range(2, 2 + t.distractors):
        kept[:] = mask
        for _ in range(DISTRACTOR_TRIALS):
            before = count
            count = distractor(random, mask, t, paddles, count, contour, tips[0], work)
            if count > before:
                break
            mask[:] = kept
    render(canvas, t, paddles, count, markers, image)
    return count


@jit
def make(both, seed, split, first, images, labels, paddles, markers, facts):
    """Images first, first + 1, ... of a split, from the tables of either margin.

    Written to: images uint8 (b, n, n), labels uint8 (b,); of the last image paddles int32 (p, 4), markers
    int32 (2, 2) and facts int64 (2,), the number of paddles and which margin.
    """
    n, spare = images.shape[1], both[1].masks.shape[1]
    occupied, taken = np.zeros((n + 2 * spare, n + 2 * spare), np.uint8), np.zeros((n, n), np.uint8)
    work = occupied, taken, np.zeros(len(both[1].candidates), np.int64)
    masks, tips = np.zeros((2, n, n), np.uint8), np.zeros((2, 5), np.int64)
    scratch = masks[0], masks[1], np.zeros((n, n), np.int32), tips, work
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
    paddles, markers, facts = np.empty((most, 4), np.int32), np.empty((2, 2), np.int32), np.zeros(2, np.int64)
    make(both, seed, SPLITS.index(split), first, images, labels, paddles, markers, facts)
    return images, labels, Geometry(paddles[: facts[0]], markers, int(facts[1]))
