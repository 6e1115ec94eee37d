"""Every paddle that a generator can place, drawn once: tables of integers, the same on every machine.

A contour's first paddle has an orientation of whole degrees and is drawn from its tail; a later one runs back from its
head, which is one of some fifty pixels on a circle around the contour's pivot. So a few hundred small pictures serve
all images, and the generator itself needs no sine and no fraction. Sines and cosines are rounded before they decide
anything, and the filter's weights are integers, so that the last bit of a mathematical library has no say.

Orientation o of the tables: 0 to 359 are degrees, 360 + c is that of candidate c. Coordinates are (y, x), the y axis
points down, and angles run from x to y.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from experiments.datasets.pathfinder.contours import CROWDED, DEGREES, WEIGHT, WIDTH
from experiments.datasets.pathfinder.parameters import Parameters, parameters

FILTER_BITS = 22  # of Pillow's integer weights
PAD = 16  # pixels around the image in a mask: no paddle that is tried reaches beyond
CONTRAST = 100  # contrast 1 as an integer


class Pictures(NamedTuple):
    """What is painted, for one resolution and margin; o orientations, s the side of a paddle's picture."""

    size: int
    side: int  # size + 2 PAD
    corner: int  # the place of the image's first pixel
    lines: np.ndarray  # uint8 (o, s, s): the paddle, the place that it is drawn from at the centre
    marker: np.ndarray  # uint8 (m, m): a disc
    target_contrast: int
    distractor_contrast: int
    marker_contrast: int


class Tables(NamedTuple):
    """What places contours, for one resolution and margin; o orientations, d candidates, s a picture's side."""

    size: int
    side: int  # size + 2 PAD
    corner: int  # the place of the image's first pixel
    contour_length: int
    distractor_length: int
    distractors: int
    masks: np.ndarray  # uint8 (o, s, WIDTH): what it keeps free around it, and zeros
    within: np.ndarray  # uint8 (side^2,): 255 in the image
    blank: np.ndarray  # uint8 (side^2,): the mask of an empty image, whose edge is taken
    head: np.ndarray  # int32 (360,): from a first paddle's tail
    pivot: np.ndarray  # int32 (360,): from a first paddle's tail
    partner: np.ndarray  # int32 (360,): from the first target's tail to the second's
    rooms: np.ndarray  # int32 (360, 3): rows and columns open to the first target's tail, and the first such place
    ahead: np.ndarray  # int32 (o,): from one pivot to the next
    candidates: np.ndarray  # int32 (d,): heads, from the pivot
    choices: np.ndarray  # int32 (e, 2): candidates and their weights after a paddle of orientation 0, then 1, ...
    choice_of: np.ndarray  # int32 (o + 1,): where an orientation's begin in `choices`
    near: np.ndarray  # int32 (k,): a disc of the margin's radius
    footprints: np.ndarray  # int32 (f,): what a first paddle needs free, from its tail; one degree after the other
    footprint_of: np.ndarray  # int32 (361,): where a degree's begin in `footprints`
    cores: np.ndarray  # int32 (e, 2): pixels and values of the masks that can be too much beside another
    core_of: np.ndarray  # int32 (o + 1,): where an orientation's begin in `cores`


@cache
def tables(resolution: int) -> tuple[tuple[Tables, Tables], tuple[Pictures, Pictures]]:
    """Those of the smallest and of the largest margin; raises ValueError for a resolution that there is not."""
    p = parameters(resolution)
    of_margin = [_of_margin(p, margin) for margin in (p.margins[0], p.margins[-1])]
    return tuple(zip(*of_margin, strict=True))


def _of_margin(p: Parameters, margin: int) -> tuple[Tables, Pictures]:
    reach = p.paddle_length + margin
    candidates = _circle(reach)
    angles = np.arctan2(*candidates.T)
    forward = np.concatenate([np.arange(DEGREES) * np.pi / 180, angles])
    drawn = np.concatenate([forward[:DEGREES], angles + np.pi])  # a later paddle runs back from its head
    half = reach + -(-p.thickness // p.antialias)
    fine = [_line(half * p.antialias, a, p.paddle_length * p.antialias, p.thickness) for a in drawn]
    masks = shrink(np.stack([_dilate(line, disc(margin * p.antialias)) for line in fine]), 2 * half + 1)
    return _tables(p, margin, candidates, angles, forward, masks), _pictures(p, shrink(np.stack(fine), 2 * half + 1))


def _pictures(p: Parameters, lines: np.ndarray) -> Pictures:
    side = p.resolution + 2 * PAD
    return Pictures(
        size=p.resolution,
        side=side,
        corner=PAD * (side + 1),
        lines=lines,
        marker=_marker(float(p.marker_radius), p.antialias),
        target_contrast=int(p.target_contrast * CONTRAST),
        distractor_contrast=int(p.distractor_contrast * CONTRAST),
        marker_contrast=CONTRAST,
    )


def _tables(
    p: Parameters, margin: int, candidates: np.ndarray, angles: np.ndarray, forward: np.ndarray, masks: np.ndarray
) -> Tables:
    resolution, half, reach = p.resolution, len(masks[0]) // 2, p.paddle_length + margin
    head, pivot = (_ceil(forward[:DEGREES] + turn, length) for turn, length in ((0, p.paddle_length), (np.pi, reach)))
    footprints = [_footprint(mask, reach) for mask in masks[:DEGREES]]
    rooms = [_room(resolution, 2 * p.seed_distance, offsets) for offsets in footprints]
    cores = [np.argwhere(mask >= CROWDED - 255) for mask in masks]
    values = [mask[tuple(core.T)] for mask, core in zip(masks, cores, strict=True)]
    weights = _weights(forward, angles, float(p.continuity))
    side = resolution + 2 * PAD
    flat = np.array([side, 1])
    return Tables(
        size=resolution,
        side=side,
        corner=PAD * (side + 1),
        contour_length=p.contour_length,
        distractor_length=p.distractor_length,
        distractors=p.distractors,
        masks=np.pad(masks, ((0, 0), (0, 0), (0, WIDTH - masks.shape[2]))),
        within=np.pad(np.full((resolution, resolution), 255, np.uint8), PAD).ravel(),
        blank=np.pad(_frame(resolution, p.padding), PAD).ravel(),
        head=_integers(head @ flat),
        pivot=_integers((head + pivot) @ flat),
        partner=_integers(np.floor(_offsets(forward[:DEGREES], p.seed_distance) + 0.5) @ flat),
        rooms=_integers([[*room[:2], (room[2:] + PAD) @ flat] for room in rooms]),
        ahead=_integers(_ceil(forward, reach + margin) @ flat),
        candidates=_integers(candidates @ flat),
        choices=_integers(np.column_stack([np.nonzero(weights)[1], weights[weights > 0]])),
        choice_of=_starts([np.flatnonzero(row) for row in weights]),
        near=_integers(disc(margin) @ flat),
        footprints=_integers(np.concatenate(footprints) @ flat),
        footprint_of=_starts(footprints),
        cores=_integers(np.column_stack([(np.concatenate(cores) - half) @ flat, np.concatenate(values)])),
        core_of=_starts(cores),
    )


def _integers(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.int32)


def _offsets(angles: np.ndarray, length: float) -> np.ndarray:
    return np.round(length * np.stack([np.sin(angles), np.cos(angles)], -1), 9)


def _ceil(angles: np.ndarray, length: float) -> np.ndarray:
    return _integers(np.ceil(_offsets(angles, length)))


def _circle(radius: int) -> np.ndarray:
    """The pixels on a circle, one per pixel of arc, without repetition, in order."""
    return np.unique(_integers(np.floor(_offsets(np.arange(0, 2 * np.pi, 1 / radius), radius))), axis=0)


def _weights(before: np.ndarray, after: np.ndarray, continuity: float) -> np.ndarray:
    turn = np.abs((after - before[:, None] + np.pi) % (2 * np.pi) - np.pi)
    return _integers(np.round(WEIGHT * np.cos(np.minimum(continuity * turn, np.pi / 2)) ** 2))


def disc(radius: int) -> np.ndarray:
    """Offsets of the pixels within `radius`, int32 (k, 2)."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return _integers(np.stack([y, x], -1)[y**2 + x**2 <= radius**2])


def _line(half: int, angle: float, length: int, width: int) -> np.ndarray:
    """A bar of flat ends from the centre, uint8 0 or 255, (2 half + 1, 2 half + 1).

    As Pillow draws one: up to a width of two it is measured along an axis, so that a line of width one has one pixel
    per row or column; beyond, at right angles to the line.
    """
    dy, dx = _ceil(np.array(angle), length)
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    along, across, square = y * dy + x * dx, y * dx - x * dy, dy * dy + dx * dx
    reach = width**2 * (max(abs(dy), abs(dx)) ** 2 if width <= 2 else square)
    within = (4 * across**2 < reach) | ((4 * across**2 == reach) & (across > 0))
    return np.where((along >= 0) & (along <= square) & within, np.uint8(255), np.uint8(0))


def _dilate(image: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    pad = int(offsets.max())
    n = len(image)
    padded = np.pad(image, pad)
    return np.max([padded[pad + y : pad + y + n, pad + x : pad + x + n] for y, x in offsets], axis=0)


def _marker(radius: float, antialias: int) -> np.ndarray:
    half = int(np.ceil(radius)) + 3  # three more pixels for the filter
    grid = np.arange(2 * half * antialias) - half * antialias
    inside = grid[:, None] ** 2 + grid**2 <= (radius * antialias) ** 2
    return shrink(np.where(inside, np.uint8(255), np.uint8(0)), 2 * half)


def _footprint(mask: np.ndarray, reach: int) -> np.ndarray:
    """Where a first paddle's mask is full, from one pixel before its tail: the original's kernel is off by one."""
    offsets = np.argwhere(mask == 255) - len(mask) // 2 + 1
    return _integers(offsets[(np.abs(offsets) <= reach).all(1)])


def _starts(lists: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, lists)], dtype=np.int32)


def _frame(size: int, width: int) -> np.ndarray:
    inner = np.zeros((size - 2 * width, size - 2 * width), np.uint8)
    return np.pad(inner, width, constant_values=255)


def _room(size: int, border: int, footprint: np.ndarray) -> np.ndarray:
    low, high = footprint.min(0), footprint.max(0)
    return _integers([*(size - 2 * border - (high - low)), *(border - low)])


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Lanczos down-sampling of uint8 (..., n, n) to (..., size, size), in the integers of Pillow's `resize`."""
    weights = lanczos(images.shape[-1], size)
    rows = _rescale(images.astype(np.int64) @ weights.T)
    return _rescale(weights @ rows).astype(np.uint8)


def _rescale(sums: np.ndarray) -> np.ndarray:
    return np.clip((sums + 2 ** (FILTER_BITS - 1)) >> FILTER_BITS, 0, 255)


def lanczos(n: int, size: int) -> np.ndarray:
    """Weights of Lanczos-3 interpolation, int64 (size, n); a row's add up to 2^22 but for rounding."""
    scale = n / size
    centres = (np.arange(size)[:, None] + 0.5) * scale
    inside = (np.arange(n) >= (centres - 3 * scale + 0.5).astype(int)) & (
        np.arange(n) < (centres + 3 * scale + 0.5).astype(int)
    )
    x = (np.arange(n) + 0.5 - centres) / scale
    values = np.where(inside & (np.abs(x) < 3), np.sinc(x) * np.sinc(x / 3), 0)
    return np.round(2**FILTER_BITS * values / values.sum(1, keepdims=True)).astype(np.int64)
