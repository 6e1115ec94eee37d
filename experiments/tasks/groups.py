"""Word problems of finite groups: the product of the elements read so far.

Merrill, Petty and Sabharwal 2024 (arXiv:2404.08819, section 5): word_problem_A5, _A4xZ5 and _Z60 have groups of order
60, nonsolvable, solvable and abelian; word_problem_S3, _A4 and _S5 are DeltaProduct's and Grazzi et al.'s
(arXiv:2502.10297, arXiv:2411.12537). Token 0 is PAD and token 1 + i the group's element i, uniform; the target of
position i is g_1 g_2 ... g_i, scored at every position, and a sequence counts as right where all its positions are
(metric sequence_accuracy).

Elements are permutations in lexicographic order, those of A x B with A's order first; g h means g after h,
(g h)(x) = g(h(x)), an order that the papers do not state. Their data sets are fixed (up to 10^6 strings of one length,
and all of length 2); here strings are drawn without end, and prefixes of length 2 are scored in each. The word problem
repository's token before each string is left out.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.synthetic import Example, Strings, SyntheticTask, check_scored, string


def symmetric(points: int) -> np.ndarray:
    """All permutations, (n!, n): row g holds g(0), ..., g(n - 1)."""
    return np.array(list(itertools.permutations(range(points))), np.int32)


def alternating(points: int) -> np.ndarray:
    """The even ones."""
    everything = symmetric(points)
    first, second = np.triu_indices(points, 1)
    inversions = (everything[:, first] > everything[:, second]).sum(1)
    return everything[inversions % 2 == 0]


def cyclic(order: int) -> np.ndarray:
    """The rotations of `order` points; element i turns by i."""
    return ((np.arange(order)[:, None] + np.arange(order)) % order).astype(np.int32)


def product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The direct product, on the points of both."""
    shifted = second + first.shape[1]
    return np.array([np.concatenate(pair) for pair in itertools.product(first, shifted)], np.int32)


def table(elements: np.ndarray) -> np.ndarray:
    """int32 (n, n): row g, column h holds the number of g h."""
    numbers = {tuple(g): i for i, g in enumerate(elements)}
    return np.array([[numbers[tuple(g[h])] for h in elements] for g in elements], np.int32)


GROUPS = {
    "S3": lambda: symmetric(3),
    "A4": lambda: alternating(4),
    "A5": lambda: alternating(5),
    "S5": lambda: symmetric(5),
    "Z60": lambda: cyclic(60),
    "A4xZ5": lambda: product(alternating(4), cyclic(5)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Strings):
    """scored, test_scored: "last" or "every" position."""

    metric: str = "sequence_accuracy"
    min_length: int = 0
    lengths: tuple[int, ...] = (20,)
    test_length: int = 20
    scored: str = "every"
    test_scored: str = "every"

    def load(self) -> SyntheticTask:
        check_scored(self.scored)
        check_scored(self.test_scored, "test_scored")
        group = self.name.removeprefix("word_problem_")
        products = table(GROUPS[group]())

        def make(key: jax.Array, size: jax.Array, length: int, train: bool) -> Example:
            elements = jax.random.randint(key, (length,), 0, len(products))
            prefixes = jax.lax.associative_scan(lambda g, h: jnp.asarray(products)[g, h], elements)
            return string(1 + elements, 1 + prefixes, size, "every" in (self.scored if train else self.test_scored))

        source = f"words of {group}, of order {len(products)}"
        return self.strings(1, source, make=make, input_size=1 + len(products), classes=len(products))
