"""The generator against the published rules, which plain NumPy, SciPy and Pillow follow here picture by picture."""

import hashlib
import time
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from experiments.datasets.pathfinder import sprites
from experiments.datasets.pathfinder.contours import DEGREES, WEIGHT
from experiments.datasets.pathfinder.images import generate, geometry
from experiments.datasets.pathfinder.parameters import PARAMETERS

RESOLUTIONS = tuple(PARAMETERS)
IMAGES = {32: 40, 64: 4, 128: 12, 256: 12}
HASHES = {32: "5ad12acc294971c6", 64: "7547200b4ea5d060", 128: "e376711fcc4f901e", 256: "d11b0ecdc3115742"}


@cache
def examples(resolution):
    n = IMAGES[resolution]
    return *generate(resolution, 0, "train", 0, n), geometry(resolution, 0, "train", 0, n)


def paddles_of(how, contour):
    return how.paddles[how.paddles[:, 0] == contour]


def angle(resolution, margin, orientation):
    """In radians, of a table's orientation."""
    if orientation < DEGREES:
        return np.deg2rad(orientation)
    side = PARAMETERS[resolution].resolution + 2 * sprites.PAD
    place = sprites.tables(resolution)[0][margin].candidates[orientation - DEGREES]
    y = np.round(place / side)
    return np.arctan2(y, place - y * side)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_the_images_of_a_seed_are_the_same_everywhere(resolution):
    images, labels, _ = examples(resolution)
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16] == HASHES[resolution]


def test_an_image_depends_on_its_seed_split_and_index_alone():
    images, labels, _ = examples(32)
    some, their_labels = generate(32, 0, "train", 7, 5)
    np.testing.assert_array_equal(some, images[7:12])
    np.testing.assert_array_equal(their_labels, labels[7:12])
    others = [generate(32, seed, split, 0, 3)[0] for seed, split in ((1, "train"), (0, "validation"), (0, "test"))]
    assert len({x.tobytes() for x in [*others, images[:3]]}) == 4
    assert len({x.tobytes() for x in images}) == len(images)


def test_labels_are_balanced():
    """And so are the ends that carry the discs: four standard deviations."""
    _, labels = generate(32, 3, "train", 0, 3000)
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / 3000**0.5


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_contours_have_the_published_lengths_and_discs_at_their_ends(resolution):
    p = PARAMETERS[resolution]
    _, labels, how = examples(resolution)
    placed = []
    for label, image in zip(labels, how, strict=True):
        counts = np.bincount(image.paddles[:, 0], minlength=2 + p.distractors)
        assert counts[:2].tolist() == [14, 14] and set(counts[2:]) <= {0, 4} and len(counts) == 2 + p.distractors
        placed.append((counts[2:] > 0).sum())
        firsts, lasts = ([paddles_of(image, c)[i, 1:3].tolist() for c in (0, 1)] for i in (0, -1))
        origin = firsts.index(image.markers[0].tolist())
        assert image.markers[1].tolist() == lasts[origin if label else 1 - origin]
    assert np.mean(placed) > 0.75 * p.distractors, "few of the distractors find a place"
    assert len({image.margin for image in how}) == 2, "both margins are drawn"


def turned(before, now):
    return np.abs((now - before + np.pi) % (2 * np.pi) - np.pi)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_paddles_follow_each_other_at_twice_the_margin(resolution):
    """The pivot goes on by length and twice the margin, heads are length and margin from it; each is rounded."""
    p = PARAMETERS[resolution]
    for image in examples(resolution)[2]:
        margin = (p.margins[0], p.margins[-1])[image.margin]
        for contour in range(2 + p.distractors):
            paddles = paddles_of(image, contour)
            angles = np.array([angle(resolution, image.margin, o) for o in paddles[:, 3]])
            ways = np.stack([np.sin(angles), np.cos(angles)], -1)
            pivots = paddles[:, 1:3] - (p.paddle_length + margin) * ways
            pivots[:1] += p.paddle_length * ways[:1]  # a first paddle is drawn from its tail
            steps = np.linalg.norm(pivots[1:] - pivots[:-1] - (p.paddle_length + 2 * margin) * ways[:-1], axis=1)
            assert steps[:1].max(initial=0) < 3 * 2**0.5 and steps[1:].max(initial=0) < 2 * 2**0.5
            assert turned(angles[:-1], angles[1:]).max(initial=0) < np.pi / 2 / float(p.continuity)


def test_paddles_turn_by_the_published_law():
    """cos^2(continuity * turn), where little is in the way: the second paddle of a contour at 256 pixels."""
    limit = np.pi / 2 / 1.8
    expected = limit * (0.5 - 2 / np.pi**2)
    seconds = [paddles_of(image, 0)[:2, 3] for image in geometry(256, 0, "train", 0, 400)]
    turns = [turned(angle(256, 0, first), angle(256, 0, second)) for first, second in seconds]
    assert abs(np.mean(turns) / expected - 1) < 0.1


def placed(image, sprite, y, x):
    """The picture with a sprite centred at (y, x), cut at the edges, and zeros elsewhere."""
    n, half = len(image), len(sprite) // 2
    padded = np.zeros((n + 64, n + 64))
    padded[y + 32 - half : y + 32 - half + len(sprite), x + 32 - half : x + 32 - half + sprite.shape[1]] = sprite
    return padded[32:-32, 32:-32]


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_paddles_overlap_no_more_than_is_allowed(resolution):
    """The original's rule on whole images in floating point, in the order in which the paddles came."""
    p = PARAMETERS[resolution]
    for image in examples(resolution)[2][:4]:
        masks = sprites.tables(resolution)[0][image.margin].masks / 255
        half = masks.shape[1] // 2
        taken = np.zeros((resolution, resolution))
        for edge in (np.s_[: p.padding], np.s_[-p.padding :]):
            taken[edge] = taken[:, edge] = 1
        newest = {}
        for contour, y, x, orientation in image.paddles:
            mask = placed(taken, masks[orientation, :, : 2 * half + 1], y, x)
            if contour in newest:
                assert (taken + mask).max() < 1.8
                taken = np.maximum(taken, newest[contour])
            elif contour >= 2:  # the contour before is complete; the first target's last paddle is forgotten
                taken = np.maximum(taken, newest[max(newest)])
                shifted = placed(taken, masks[orientation, :, : 2 * half + 1], y + 1, x + 1)
                assert taken[shifted == 1].max(initial=0) <= 0.3
            newest[contour] = mask


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_pictures_are_painted_as_their_geometry_says(resolution):
    """In floating point, and scaled as scipy.misc.imsave did: paddles by their contrast, discs by 1."""
    p = PARAMETERS[resolution]
    images, _, how = examples(resolution)
    for picture, image in zip(images[:4], how, strict=False):
        pictures = sprites.tables(resolution)[1][image.margin]
        canvas = np.zeros((resolution, resolution))
        for contour, y, x, orientation in image.paddles:
            contrast = float(p.target_contrast if contour < 2 else p.distractor_contrast)
            canvas = np.maximum(canvas, contrast * placed(canvas, pictures.lines[orientation], y, x) / 255)
        paddles = canvas.max()
        for y, x in image.markers:
            canvas = np.maximum(canvas, placed(canvas, pictures.marker, y, x) / 255)
        np.testing.assert_allclose(picture, 255 * canvas / canvas.max(), atol=0.51)
        assert picture.max() == 255 and (paddles > 1) == (resolution == 32)


def test_the_brightness_is_that_of_the_original_generator():
    """Its mean over six samples of Path-X was 11.6 of 255."""
    images, _ = generate(128, 0, "test", 0, 60)
    assert abs(images.mean() - 11.6) < 0.6


# Sprites -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(17, 9), (41, 21), (24, 12)])
def test_shrinking_is_pillows(n, size):
    image = np.where(np.random.default_rng(n).random((n, n)) < 0.3, 255, 0).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(sprites.shrink(image, size), expected)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_paddles_and_their_masks_are_pillows_and_scipys(resolution):
    """A bar of `thickness` at twice the resolution, widened by a disc of the margin, both shrunk by Lanczos's filter.

    Pillow's bars differ by the pixels on their edges.
    """
    p = PARAMETERS[resolution]
    table, pictures = (pair[-1] for pair in sprites.tables(resolution))
    half = pictures.lines.shape[1] // 2
    disc = np.hypot(*np.mgrid[-2 * p.margins[-1] : 2 * p.margins[-1] + 1, -2 * p.margins[-1] : 2 * p.margins[-1] + 1])
    ink = []
    for degree in range(0, DEGREES, 15):
        fine = Image.new("L", (4 * half + 1, 4 * half + 1))
        y, x = np.ceil(np.round(2 * p.paddle_length * np.array([f(np.deg2rad(degree)) for f in (np.sin, np.cos)]), 9))
        ends = [(2 * half, 2 * half), (2 * half + int(x), 2 * half + int(y))]
        ImageDraw.Draw(fine).line(ends, fill=255, width=p.thickness)
        wide = ndimage.grey_dilation(np.asarray(fine), footprint=disc <= 2 * p.margins[-1])
        for ours, theirs in ((pictures.lines, np.asarray(fine)), (table.masks, wide)):
            shrunk = np.asarray(Image.fromarray(theirs).resize((2 * half + 1,) * 2, Image.Resampling.LANCZOS))
            own = ours[degree, :, : 2 * half + 1]
            ink.append((own.sum() / shrunk.sum(dtype=int), np.corrcoef(own.ravel(), shrunk.ravel())[0, 1]))
    lines, masks = np.array(ink[::2]), np.array(ink[1::2])
    for ratio, correlation, least in ((*lines.T, 0.9), (*masks.T, 0.95)):
        assert abs(ratio.mean() - 1) < 0.06 and correlation.mean() > least


def test_no_table_hangs_on_the_last_bit_of_a_sine():
    """What is rounded to an integer is nowhere near a half."""
    for n, size in ((17, 9), (29, 15), (41, 21), (10, 5), (12, 6), (16, 8)):
        scale = n / size
        x = (np.arange(n) + 0.5) / scale - np.arange(size)[:, None] - 0.5
        values = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        assert_far_from_half(2**sprites.FILTER_BITS * values / values.sum(1, keepdims=True))
    for resolution, p in PARAMETERS.items():
        for margin, table in enumerate(sprites.tables(resolution)[0]):
            angles = [angle(resolution, margin, o) for o in range(len(table.masks))]
            turn = turned(np.array(angles)[:, None], np.array(angles[DEGREES:]))
            assert_far_from_half(WEIGHT * np.cos(np.minimum(float(p.continuity) * turn, np.pi / 2)) ** 2)


def assert_far_from_half(values):
    assert np.abs(values - np.floor(values) - 0.5).min() > 1e-7


def test_speed():
    """A loose floor in time of one core; the measured figure comes from the command `generate`."""
    generate(128, 0, "train", 0, 1)
    start = time.process_time()
    generate(128, 0, "train", 0, 60)
    assert 60 / (time.process_time() - start) > 60
