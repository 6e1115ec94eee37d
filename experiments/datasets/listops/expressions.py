"""Expressions of ListOps, drawn from a seed: `[MAX 2 9 [MIN 4 7 ] 0 ]`, whose value is 9.

The grammar is Long Range Arena's (arXiv:2011.04006, section 2.2; its generator, lra_benchmarks/data/listops.py): at a
depth below max_depth an expression is an operator with probability 1/4 and a digit otherwise, below that a digit;
an operator has 2 to max_args arguments. MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10) are
equally likely, as are the digits. Kept are expressions of more than min_length and fewer than max_length tokens, where
a digit is one token and an operator two, the opening one and `]`.

All of an expression follows from 64 bits at its root: the bits of a node's children are a hash of its own. So the
numbers are the same on every machine, whatever is drawn beside them, and whoever draws them.
"""

from typing import NamedTuple

import numpy as np

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
VOCABULARY = ("<pad>", *"0123456789", *OPERATORS, "]")
DIGIT, OPERATOR, CLOSE = (VOCABULARY.index(token) for token in ("0", "[MIN", "]"))
SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}  # of the benchmark
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Limits(NamedTuple):
    """Of one expression; max_depth counts the root."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10


class Expressions(NamedTuple):
    """Expressions one after another."""

    tokens: np.ndarray  # uint8, of all of them
    lengths: np.ndarray  # int32
    values: np.ndarray  # uint8, 0 to 9


class Level(NamedTuple):
    """The nodes of one depth, siblings side by side, each with its bits and how many arguments it has."""

    bits: np.ndarray  # uint64
    arguments: np.ndarray  # int64, 0 of a digit

    @property
    def operator(self) -> np.ndarray:
        return ((self.bits >> 60) & 3).astype(np.int64)

    @property
    def digit(self) -> np.ndarray:
        return _uniform(self.bits, 10)


def expressions(seed: int, first: int, count: int, limits: Limits) -> Expressions:
    """Those among attempts first, ..., first + count - 1 of the seed whose length is within the limits."""
    attempts = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    roots = _hash(_hash(np.full(1, seed, np.uint64)) + attempts * GOLDEN)
    return _written(_grown(_within(roots, limits), limits))


def _within(roots: np.ndarray, limits: Limits) -> np.ndarray:
    """The roots of expressions that are neither too short nor too long; none is grown beyond that."""
    length, tree, level = np.ones(len(roots), np.int64), np.arange(len(roots)), _level(roots, 1, limits)
    for depth in range(2, limits.max_depth + 1):
        node = level.arguments > 0
        np.add.at(length, tree[node], 1 + level.arguments[node])
        node &= length[tree] < limits.max_length
        tree = np.repeat(tree[node], level.arguments[node])
        level = _level(_children(level.bits[node], level.arguments[node]), depth, limits)
    return roots[(limits.min_length < length) & (length < limits.max_length)]


def _grown(roots: np.ndarray, limits: Limits) -> list[Level]:
    """Whole expressions, depth by depth."""
    levels = [_level(roots, 1, limits)]
    for depth in range(2, limits.max_depth + 1):
        levels.append(_level(_children(*levels[-1]), depth, limits))
    return levels


def _written(levels: list[Level]) -> Expressions:
    """Sizes and values from the leaves up, then places from the roots down."""
    sizes, values = [], []
    for level in reversed(levels):
        size, value, node = np.ones(len(level.bits), np.int64), level.digit, level.arguments > 0
        if node.any():
            starts = _starts(level.arguments[node])
            size[node] = 2 + np.add.reduceat(sizes[0], starts)
            value[node] = _apply(level.operator[node], values[0], starts, level.arguments[node])
        sizes, values = [size, *sizes], [value, *values]

    tokens, place = np.empty(sizes[0].sum(), np.uint8), _starts(sizes[0])
    for depth, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        node = level.arguments > 0
        tokens[place] = np.where(node, OPERATOR + level.operator, DIGIT + level.digit)
        tokens[place[node] + size[node] - 1] = CLOSE
        if not node.any():
            break
        before, arguments = _starts(sizes[depth + 1]), level.arguments[node]
        place = np.repeat(place[node] + 1 - before[_starts(arguments)], arguments) + before
    return Expressions(tokens, sizes[0].astype(np.int32), values[0].astype(np.uint8))


def _apply(operator: np.ndarray, values: np.ndarray, starts: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """The value of every operator; its arguments are values[start : start + arguments]."""
    ordered = np.sort(np.repeat(np.arange(len(arguments)) * 10, arguments) + values) % 10
    median = (ordered[starts + (arguments - 1) // 2] + ordered[starts + arguments // 2]) // 2
    last = ordered[starts + arguments - 1]
    return np.choose(operator, (ordered[starts], last, median, np.add.reduceat(values, starts) % 10))


def _level(bits: np.ndarray, depth: int, limits: Limits) -> Level:
    node = (bits >> 62 == 0) & (depth < limits.max_depth)
    return Level(bits, np.where(node, 2 + _uniform(bits, limits.max_args - 1), 0))


def _children(bits: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    which = np.arange(1, arguments.sum() + 1) - np.repeat(_starts(arguments), arguments)
    return _hash(np.repeat(bits, arguments) + which.astype(np.uint64) * GOLDEN)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def _uniform(bits: np.ndarray, n: int) -> np.ndarray:
    """0 to n - 1, from bits 28 to 59."""
    return ((bits >> 28 & 0xFFFFFFFF) * np.uint64(n) >> 32).astype(np.int64)


def _hash(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64 bits."""
    x = (x ^ x >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> 27) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> 31
