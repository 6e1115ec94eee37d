"""Contours and discs painted, and scaled to bytes, in integers alone."""

import numba
import numpy as np

jit = numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # for calls from this file alone
U = np.uint64


@jit
def paint(canvas, picture, side, place, contrast):
    corner = place - (len(picture) // 2) * (side + 1)
    for row in range(len(picture)):
        for column in range(len(picture)):
            p = U(corner + row * side + column)
            canvas[p] = max(canvas[p], contrast * picture[row, column])


@jit
def to_bytes(canvas, size, side, corner, image):
    """The brightest pixel becomes 255, as where the originals were saved, and others are rounded."""
    brightest = 0
    for row in range(size):
        for column in range(size):
            brightest = max(brightest, canvas[U(corner + row * side + column)])
    for row in range(size):
        for column in range(size):
            value = canvas[U(corner + row * side + column)]
            image[row, column] = (2 * 255 * value + brightest) // (2 * brightest)


@numba.njit(cache=True, nogil=True, no_cfunc_wrapper=True)
def draw(both, paddles, facts, images):
    """Draws what `contours.place` placed into images, uint8 (b, n, n)."""
    canvas = np.zeros(both[0].side ** 2, np.int32)
    for i in range(len(images)):
        canvas[:] = 0
        t = both[facts[i, 1]]
        for k in range(facts[i, 2]):
            contour, place, orientation = paddles[i, k]
            contrast = t.target_contrast if contour < 2 else t.distractor_contrast
            paint(canvas, t.lines[orientation], t.side, place, contrast)
        for k in range(2):
            paint(canvas, t.marker, t.side, facts[i, 3 + k], t.marker_contrast)
        to_bytes(canvas, t.size, t.side, t.corner, images[i])
