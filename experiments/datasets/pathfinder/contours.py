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

A mask is uint8 (side^2,): the image with some pixels around it that stay 0. A place is an index into it, and directions
are differences of places. A tip is (pivot, orientation, place that the newest paddle is drawn from). `t` is one of the
`sprites.Tables`.

All that is compiled together is in this file, since numba's cache of a function notices no change of another file.
"""

import numba
import numpy as np

DEGREES = 360  # orientations of a first paddle
WEIGHT = 2**16  # of a head straight on
DEAD_END = int(1e-4 * 255 * WEIGHT)  # less weight than this is none
CROWDED = 459  # two masks may not add up to 1.8 (of 255)
FREE = 76  # a pixel with more of a mask than 0.3 (of 255) is taken
PADDLE_TRIALS, DISTRACTOR_TRIALS = 3, 5
WIDTH = 32  # columns of a mask's picture: one vector instruction's

U = np.uint64  # as an index it needs no test for a negative one, and so loops become vector instructions
GOLDEN, MIX1, MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31, S32 = (np.uint64(bits) for bits in (27, 30, 31, 32))

jit = numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # for calls from this file alone


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
def fits(mask, core, place):
    """Whether a paddle's mask stays below 1.8 together with `mask`. core: its pixels and values that could reach it."""
    for k in range(len(core)):
        if mask[U(place + core[k, 0])] + core[k, 1] >= CROWDED:
            return False
    return True


@jit
def stamp(mask, within, sprite, side, place):
    """Adds a paddle's mask, cut at the image's edges."""
    corner = place - (len(sprite) // 2) * (side + 1)
    for row in range(len(sprite)):
        for column in range(WIDTH):
            p = U(corner + row * side + column)
            mask[p] = max(mask[p], sprite[row, column] & within[p])


@jit
def copy(source, target):
    for p in range(len(target)):
        target[p] = source[p]


@jit
def free(mask, footprint, place):
    for offset in footprint:
        if mask[U(place + offset)] > FREE:
            return False
    return True


@jit
def free_place(random, mask, footprint, size, side, corner):
    """A uniformly drawn pixel whose footprint is free: by luck, or else one of all that there are; -1: none."""
    for _ in range(4 * size):
        place = corner + below(random, size) * side + below(random, size)
        if free(mask, footprint, place):
            return place
    count, chosen = 0, -1
    for y in range(size):
        for x in range(size):
            place = corner + y * side + x
            if free(mask, footprint, place):
                count += 1
                if below(random, count) == 0:
                    chosen = place
    return chosen


@jit
def first_distractor(random, mask, t, tip):
    """Starts `tip` at a place whose footprint is free and whose head and pivot lie in the image; False: none found."""
    for _ in range(PADDLE_TRIALS):
        degree = below(random, DEGREES)
        footprint = t.footprints[t.footprint_of[degree] : t.footprint_of[degree + 1]]
        place = free_place(random, mask, footprint, t.size, t.side, t.corner)
        if place < 0:
            return False
        if start(t, place, degree, tip):
            return True
    return False


@jit
def first_target(random, t, tip):
    """The same in an empty image, the footprint 2 * seed_distance away from every edge."""
    degree = below(random, DEGREES)
    rows, columns = t.rooms[degree, 0], t.rooms[degree, 1]
    if rows <= 0 or columns <= 0:
        return False
    place = t.rooms[degree, 2] + below(random, rows) * t.side + below(random, columns)
    return start(t, place, degree, tip)


@jit
def second_target(random, t, tail, tip):
    """The same at seed_distance from the first target's tail, at a random angle; it need not be free."""
    for _ in range(PADDLE_TRIALS):
        degree = below(random, DEGREES)
        if start(t, tail + t.partner[below(random, DEGREES)], degree, tip):
            return True
    return False


@jit
def start(t, place, degree, tip):
    tip[0], tip[1], tip[2] = place + t.pivot[degree], degree, place
    return t.within[place + t.head[degree]] and t.within[tip[0]]


@jit
def extend(random, mask, t, tip, cumulative):
    """Places the next paddle of a contour, adds the one before to `mask`, and moves `tip`; False: none fits."""
    before = tip[1]
    pivot = tip[0] + t.ahead[before]
    choices = t.choices[t.choice_of[before] : t.choice_of[before + 1]]
    total = 0
    for k in range(len(choices)):
        head = pivot + t.candidates[choices[k, 0]]
        if t.within[head]:
            widened = 0
            for offset in t.near:
                widened = max(widened, mask[U(head + offset)])
            total += choices[k, 1] * (255 - widened)
        cumulative[k] = total
    if total < DEAD_END:
        return False
    for _ in range(PADDLE_TRIALS):
        k, drawn = 0, below(random, total)
        while cumulative[k] <= drawn:
            k += 1
        now, head = DEGREES + choices[k, 0], pivot + t.candidates[choices[k, 0]]
        if fits(mask, t.cores[t.core_of[now] : t.core_of[now + 1]], head):
            stamp(mask, t.within, t.masks[before], t.side, tip[2])
            tip[0], tip[1], tip[2] = pivot, now, head
            return True
    return False


@jit
def note(paddles, count, contour, tip):
    paddles[count, 0], paddles[count, 1], paddles[count, 2] = contour, tip[2], tip[1]
    return count + 1


@jit
def two_targets(random, mask, t, paddles, tips, cumulative):
    """Both targets, paddle by paddle in turn; returns how many paddles there are, 0 for a failure."""
    if not first_target(random, t, tips[0]) or not second_target(random, t, tips[0, 2], tips[1]):
        return 0
    copy(t.blank, mask)
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
def arrange(random, t, paddles, tips, mask, kept, cumulative):
    """One image's contours; returns how many paddles the targets have, and all."""
    targets = 0
    while targets == 0:
        targets = two_targets(random, mask, t, paddles, tips, cumulative)
    count = targets
    for contour in range(2, 2 + t.distractors):
        copy(mask, kept)
        for _ in range(DISTRACTOR_TRIALS):
            before = count
            count = distractor(random, mask, t, paddles, count, contour, tips[0], cumulative)
            if count > before:
                break
            copy(kept, mask)
    return targets, count


@numba.njit(cache=True, nogil=True, no_cfunc_wrapper=True)
def place(both, seed, split, first, paddles, facts):
    """Contours of images first, first + 1, ... of a split; `both`: the tables of either margin.

    Written to: paddles int32 (b, p, 3): contour (0 and 1 the targets), place that it is drawn from, orientation;
    facts int32 (b, 5): label, margin (0 or 1), number of paddles, places of the two markers.
    """
    masks = np.zeros((2, both[0].side ** 2), np.uint8)
    tips, cumulative = np.zeros((2, 3), np.int64), np.zeros(len(both[1].candidates), np.int64)
    random = np.zeros(1, np.uint64)
    for i in range(len(facts)):
        random[0] = mix(mix(mix(U(seed)) + U(split)) + U(first + i))
        label, margin, origin = below(random, 2), below(random, 2), below(random, 2)
        targets, count = arrange(random, both[margin], paddles[i], tips, masks[0], masks[1], cumulative)
        end = targets - 2 + (origin if label else 1 - origin)
        facts[i, 0], facts[i, 1], facts[i, 2] = label, margin, count
        facts[i, 3], facts[i, 4] = paddles[i, origin, 1], paddles[i, end, 1]
