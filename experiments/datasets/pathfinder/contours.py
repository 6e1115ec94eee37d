"""Contours of paddles that keep off each other, grown paddle by paddle, in integers alone.

Linsley et al. 2018 (arXiv:1805.08315), with the rules of drewlinsley/pathfinder's snakes.py and snakes2.py, which made
the released images:

- A paddle's mask is the paddle widened by the margin. A new one fits where its mask and those that are there do not
  add up to 1.8 anywhere. A first paddle, of random orientation, takes a random place whose mask is free.
- The next paddle: the pivot goes on by the paddle's length and twice the margin; heads are pixels on the circle of
  length and margin around it, drawn with probability ~ (1 - widened mask) * cos^2(continuity * turn). Three draws may
  fail, then the contour does.
- Two targets grow in turn; if one fails both start again. Distractors follow, each with five attempts, and one that
  finds no place is left out.
- The mask learns of a paddle when the next one of its contour is placed. So the newest paddles of the two targets may
  cross each other, and the original never learns of the last paddle of the first target: a distractor may cross it.
"""

import numba
import numpy as np

from experiments.datasets.pathfinder.sprites import DEGREES, FREE, WEIGHT, Tables

jit = numba.njit(cache=True, nogil=True)
CROWDED = 459  # 1.8 of 255
DEAD_END = int(1e-4 * 255 * WEIGHT)
PADDLE_TRIALS = 3
DISTRACTOR_TRIALS = 5
GOLDEN, MIX1, MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31, S32 = (np.uint64(bits) for bits in (27, 30, 31, 32))


@jit
def mix(z):
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of uint64."""
    z = (z ^ (z >> S30)) * MIX1
    z = (z ^ (z >> S27)) * MIX2
    return z ^ (z >> S31)


@jit
def below(random, n):
    """The next number of the stream, uniform in 0 to n - 1 < 2^32. random: uint64 (1,), the stream's counter."""
    random[0] += GOLDEN
    return np.int64(((mix(random[0]) >> S32) * np.uint64(n)) >> S32)


@jit
def inside(y, x, n):
    return 0 <= y < n and 0 <= x < n


@jit
def fits(mask, sprite, y, x):
    """Whether a mask centred at (y, x), cut at the image's edges, stays below 1.8 together with `mask`."""
    n, half = len(mask), len(sprite) // 2
    for row in range(max(0, y - half), min(n, y + half + 1)):
        most = 0
        for column in range(max(0, x - half), min(n, x + half + 1)):
            most = max(most, np.int64(mask[row, column]) + sprite[row - y + half, column - x + half])
        if most >= CROWDED:
            return False
    return True


@jit
def stamp(mask, sprite, y, x):
    n, half = len(mask), len(sprite) // 2
    for row in range(max(0, y - half), min(n, y + half + 1)):
        for column in range(max(0, x - half), min(n, x + half + 1)):
            mask[row, column] = max(mask[row, column], sprite[row - y + half, column - x + half])


@jit
def free_place(random, mask, t, degree, border, occupied, taken):
    """A random pixel from which a first paddle finds its footprint free, as y * n + x; -1 where there is none.

    occupied: uint8 (n + 2 pad, n + 2 pad) whose edges are 0; taken: uint8 (n, n); both are overwritten.
    """
    n = len(mask)
    pad = (len(occupied) - n) // 2
    for y in range(n):
        for x in range(n):
            edge = y < border or y >= n - border or x < border or x >= n - border
            occupied[y + pad, x + pad] = edge or mask[y, x] > FREE
    taken[:] = 0
    for f in range(t.footprint_of[degree], t.footprint_of[degree + 1]):
        dy, dx = t.footprints[f, 0] + pad, t.footprints[f, 1] + pad
        for y in range(n):
            for x in range(n):
                taken[y, x] |= occupied[y + dy, x + dx]
    places = n * n
    for y in range(n):
        for x in range(n):
            places -= taken[y, x]
    if places == 0:
        return -1
    left = below(random, places)
    y = 0
    while True:
        in_row = n
        for x in range(n):
            in_row -= taken[y, x]
        if left < in_row:
            break
        left -= in_row
        y += 1
    x = 0
    while taken[y, x] or left > 0:
        left -= 1 - taken[y, x]
        x += 1
    return y * n + x


@jit
def first_paddle(random, mask, t, border, occupied, taken):
    """(found, tail y, tail x, degree) of a contour's first paddle, whose head and pivot lie in the image."""
    n = len(mask)
    for _ in range(PADDLE_TRIALS):
        degree = below(random, DEGREES)
        place = free_place(random, mask, t, degree, border, occupied, taken)
        if place < 0:
            break
        y, x = place // n, place % n
        if both_inside(t, y, x, degree, n):
            return True, y, x, degree
    return False, 0, 0, 0


@jit
def both_inside(t, y, x, degree, n):
    return inside(y + t.head[degree, 0], x + t.head[degree, 1], n) and inside(
        y + t.pivot[degree, 0], x + t.pivot[degree, 1], n
    )


@jit
def second_target(random, t, y, x):
    """The same for the second target, seed_distance from (y, x) at a random angle; nothing else is asked of it."""
    for _ in range(PADDLE_TRIALS):
        degree, angle = below(random, DEGREES), below(random, DEGREES)
        tail_y, tail_x = y + t.partner[angle, 0], x + t.partner[angle, 1]
        if both_inside(t, tail_y, tail_x, degree, t.size):
            return True, tail_y, tail_x, degree
    return False, 0, 0, 0


@jit
def widened(mask, near, y, x):
    """The largest value of `mask` within the margin of (y, x)."""
    n, most = len(mask), 0
    for k in range(len(near)):
        row, column = y + near[k, 0], x + near[k, 1]
        if inside(row, column, n):
            most = max(most, mask[row, column])
    return most


@jit
def extend(random, mask, t, tip, cumulative):
    """Places the next paddle of a contour, stamps the one before into `mask`, and moves `tip`; False: none fits.

    tip: (pivot y, x, orientation, y, x): where the contour goes on, and from where its newest paddle is drawn.
    """
    n, before = len(mask), tip[2]
    y, x = tip[0] + t.ahead[before, 0], tip[1] + t.ahead[before, 1]
    total = 0
    for c in range(len(t.candidates)):
        head_y, head_x = y + t.candidates[c, 0], x + t.candidates[c, 1]
        if t.weights[before, c] > 0 and inside(head_y, head_x, n):
            total += t.weights[before, c] * (255 - widened(mask, t.near, head_y, head_x))
        cumulative[c] = total
    if total < DEAD_END:
        return False
    for _ in range(PADDLE_TRIALS):
        chosen, drawn = 0, below(random, total)
        while cumulative[chosen] <= drawn:
            chosen += 1
        head_y, head_x = y + t.candidates[chosen, 0], x + t.candidates[chosen, 1]
        if fits(mask, t.masks[DEGREES + chosen], head_y, head_x):
            stamp(mask, t.masks[before], tip[3], tip[4])
            tip[0], tip[1], tip[2], tip[3], tip[4] = y, x, DEGREES + chosen, head_y, head_x
            return True
    return False


@jit
def start(t, y, x, degree, tip):
    tip[0], tip[1], tip[2], tip[3], tip[4] = y + t.pivot[degree, 0], x + t.pivot[degree, 1], degree, y, x


@jit
def note(paddles, count, contour, tip):
    paddles[count, 0], paddles[count, 1], paddles[count, 2], paddles[count, 3] = contour, tip[3], tip[4], tip[2]
    return count + 1
