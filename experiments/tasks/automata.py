"""Finite automata of one counter: parity, even pairs, cycle navigation and modular addition.

Definitions: Delétang et al. 2023 (arXiv:2207.02098, appendix A); tokens and tests: Grazzi et al. 2025
(arXiv:2411.12537, section 5.1, appendix E), whose generators are the xLSTM repository's. Token 0 is PAD; the target of
a position is the answer for the string that ends there, and the published score is that of a string's last position.

    task              a string's tokens                               answer
    parity            1, 2: the bits 0, 1                             1 + (number of bits 1) mod 2
    even_pairs        1, 2: the letters a, b                          1 where the pairs ab and ba are even in number,
                                                                      that is, the last letter is the first; else 2
    cycle             1 stay, 2 one forward, 3 one back               4 + the place on a cycle of `modulus`, from 0
    modular_addition  1 + d: the digit d < modulus, uniform           1 + (sum of the digits) mod modulus

Lengths count a string's tokens. The published generators count the answer too, as the token after the string, and so
have one more. That training draws lengths from 3 to 40 uniformly and a test from 40 to 256 is Grazzi et al.'s; Mamba-3
(arXiv:2603.15569, appendix D) tests at 256 and lets the largest length grow from 40 to 160. modular_addition is in
neither table: its digits are uniform here.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.tasks.synthetic import Example, Strings, SyntheticTask, check_modulus, check_scored, string


class Automaton(NamedTuple):
    """letters, answers: how many there are, from the modulus; first: the token of answer 0.

    track(letters, modulus): the answer of each prefix, from 0, for letters that count from 0, (l,) int32.
    """

    letters: Callable[[int], int]
    answers: Callable[[int], int]
    first: int
    track: Callable[[jax.Array, int], jax.Array]


def _sums(letters: jax.Array, modulus: int) -> jax.Array:
    return jnp.cumsum(letters) % modulus


AUTOMATA = {
    "parity": Automaton(lambda m: 2, lambda m: 2, 1, lambda bits, m: _sums(bits, 2)),
    "even_pairs": Automaton(lambda m: 2, lambda m: 2, 1, lambda letters, m: (letters != letters[0]).astype(jnp.int32)),
    "cycle": Automaton(lambda m: 3, lambda m: m, 4, lambda moves, m: _sums(jnp.array([0, 1, -1])[moves], m)),
    "modular_addition": Automaton(lambda m: m, lambda m: m, 1, _sums),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Strings):
    """modulus: of cycle and modular_addition. scored, test_scored: "last" or "every" position."""

    modulus: int = 5
    scored: str = "last"
    test_scored: str = "last"

    def load(self) -> SyntheticTask:
        check_modulus(self.name, self.modulus)
        check_scored(self.scored)
        check_scored(self.test_scored, "test_scored")
        automaton = AUTOMATA[self.name]
        letters, answers = automaton.letters(self.modulus), automaton.answers(self.modulus)
        return self.strings(
            1,
            f"strings of {letters} letters",
            make=partial(self._make, automaton),
            input_size=max(1 + letters, automaton.first + answers),
            classes=answers,
        )

    def _make(self, automaton: Automaton, key: jax.Array, size: jax.Array, length: int, train: bool) -> Example:
        letters = jax.random.randint(key, (length,), 0, automaton.letters(self.modulus))
        targets = automaton.first + automaton.track(letters, self.modulus)
        return string(1 + letters, targets, size, "every" in (self.scored if train else self.test_scored))
