"""Modular arithmetic: the value of an expression modulo 5, with operator precedence or with brackets.

Definitions: Delétang et al. 2023 (arXiv:2207.02098, appendix A) and the xLSTM repository's generators, on which Grazzi
et al. 2025 (arXiv:2411.12537, appendix E) and Mamba-3 (arXiv:2603.15569, appendix D) train. Tokens:

    0 PAD   1 +   2 -   3 *   4 =     then, without brackets,  5 + d: the digit d < modulus
                                      or, with brackets,       5 (   6 )   7 + d: the digit d < modulus

The target, at "=", is the digit that the expression is equal to. A string is the expression and "=", and its length
counts both; the published generators count the answer too, and so have one more. With scored="every", in training
alone, the value of what has been read is asked for too: without brackets at an operator, of what is before it; with
brackets at a digit and at ")", as if all that are open closed there, and at "(" and an operator by what the digit that
may follow would count in it: d(value) / d(digit).

modular_arithmetic: digits and operators +, -, * in turn, all uniform, * before + and -. A string has an even number
of tokens: the length drawn, or one less.
modular_arithmetic_brackets: an expression of n tokens is, by n, one of d, -d, (d), (-d), or from 5 on (L o R) with L's
length uniform in 1 to n - 4 and o uniform in + and -; with `multiply` in +, - and *. That Grazzi et al. have no * is
their repository's default.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments.tasks.synthetic import Example, Strings, SyntheticTask, check_modulus, check_scored, string

PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE = 1, 2, 3, 4, 5, 6
UNROLL = 8  # turns of a loop that a GPU starts as few kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Strings):
    modulus: int = 5
    multiply: bool = False  # with brackets: * too
    scored: str = "last"

    def load(self) -> SyntheticTask:
        check_modulus(self.name, self.modulus)
        check_scored(self.scored)
        brackets = self.name == "modular_arithmetic_brackets"
        if self.multiply and not brackets:
            raise ValueError(f"task {self.name}: multiply is for modular_arithmetic_brackets; here * is always there")
        return self.strings(
            2,
            f"expressions modulo {self.modulus}",
            make=self._with_brackets if brackets else self._with_precedence,
            input_size=self.modulus + (7 if brackets else 5),
            classes=self.modulus,
        )

    def _with_precedence(self, key: jax.Array, size: jax.Array, length: int, train: bool) -> Example:
        digit_key, operator_key = jax.random.split(key)
        digits = jax.random.randint(digit_key, (length,), 0, self.modulus)
        operators = jax.random.randint(operator_key, (length,), PLUS, TIMES + 1)
        even = jnp.arange(length) % 2 == 0
        values = values_of_prefixes(digits, jnp.where(even, 0, operators), self.modulus)
        size = size - size % 2
        inputs = jnp.where(even, 5 + digits, operators).at[size - 1].set(EQUALS)
        return string(inputs, 5 + jnp.roll(values, 1), size, self._parts(~even, train))

    def _with_brackets(self, key: jax.Array, size: jax.Array, length: int, train: bool) -> Example:
        tokens, totals = bracketed(key, size - 1, length, self.modulus, TIMES if self.multiply else MINUS)
        inputs = tokens.at[size - 1].set(EQUALS)
        targets = 7 + totals.at[size - 1].set(totals[size - 2])
        return string(inputs, targets, size, self._parts(tokens > 0, train))

    def _parts(self, places: jax.Array, train: bool) -> jax.Array:
        """Those of the places that are scored beside the end."""
        return places & (train and self.scored == "every")


def values_of_prefixes(digits: jax.Array, operators: jax.Array, modulus: int) -> jax.Array:
    """What the expression is worth after each of its digits. operators: (l,), 0 where the token is the digit.

    A token maps (total, product), the terms that are over and the present one with its sign, to
    (total + a product + b, c product + d): maps are chained by a parallel scan.
    """
    digit, ends = operators == 0, (operators == PLUS) | (operators == MINUS)
    sign = jnp.where(operators == MINUS, -1, 1)
    maps = jnp.where(ends, 1, 0), jnp.zeros_like(digits), jnp.select([digit, ends], [digits, 0], 1), sign * ends

    def chain(first, then):
        (a, b, c, d), (e, f, g, h) = first, then
        return tuple(x % modulus for x in (a + e * c, b + e * d + f, g * c, g * d + h))

    a, b, c, d = jax.lax.associative_scan(chain, maps)
    return (a + b + c + d) % modulus  # from a total of 0 and a product of 1


def bracketed(
    key: jax.Array, size: jax.Array, length: int, modulus: int, last_operator: int
) -> tuple[jax.Array, jax.Array]:
    """A random expression of size < length tokens in (length,), and at each what is asked for, modulo `modulus`.

    What is random about a position is drawn for that position, and how long L is for the "(". All positions look for
    their parts at once, and all brackets for their values: a level of nesting, not a token, is a turn of a loop.
    """
    digits, operators, splits = jax.random.randint(key, (length, 3), 0, 2**30).T
    levels = functools.partial(jax.lax.fori_loop, 0, length // 4, unroll=UNROLL)
    whole = jnp.zeros_like(splits), jnp.full_like(splits, size)
    start, count = levels(lambda _, part: _inwards(splits, *part)[0], whole)
    place, middle, split = jnp.arange(length) - start, start + _left(splits, start, count) + 1, count >= 5
    minus = ((count == 2) & (place == 0)) | ((count == 4) & (place == 1))
    kinds = [(count >= 3) & (place == 0), (count >= 3) & (place == count - 1), minus, split]
    tokens = jnp.select(kinds, [OPEN, CLOSE, MINUS, PLUS + operators % last_operator], 7 + digits % modulus)

    def outwards(_, values):
        right = jnp.roll(values, 1)
        both = _apply(tokens[middle], values[middle - 1], right) % modulus
        return jnp.where(tokens == CLOSE, jnp.where(split, both, right), values)

    values = levels(outwards, jnp.where((count == 2) | (count == 4), -digits, digits) % modulus)
    by = jnp.select([tokens == MINUS, tokens == TIMES], [-1, jnp.roll(values, 1)], 1)

    def along(_, carry):  # all is worth base + factor x the part
        part, base, factor = carry
        inner, right, middle = _inwards(splits, *part)
        added = _apply(tokens[middle], values[middle - 1], 0)
        base, factor = jnp.where(right, base + factor * added, base), jnp.where(right, factor * by[middle], factor)
        return inner, base % modulus, factor % modulus

    _, base, factor = levels(along, (whole, jnp.zeros_like(splits), jnp.ones_like(splits)))
    return tokens, jnp.where(tokens >= CLOSE, base + factor * values, factor * by) % modulus


def _inwards(splits: jax.Array, start: jax.Array, count: jax.Array) -> tuple[tuple, jax.Array, jax.Array]:
    """Of each position the part, L or R, of the (L o R) that begins at `start` in which it lies; if in R; where o is.

    A part is where it begins and how many tokens it has. Brackets and o lie in no part but in (L o R) itself, and so
    does what an expression of less than five tokens has.
    """
    left, place = _left(splits, start, count), jnp.arange(len(splits)) - start
    inner = (count >= 5) & (place > 0) & (place < count - 1)
    kinds = [inner & (place <= left), inner & (place > left + 1)]
    part = start + jnp.select(kinds, [1, left + 2], 0), jnp.select(kinds, [left, count - 3 - left], count)
    return part, kinds[1], start + left + 1


def _left(splits: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """How many tokens L has in the (L o R) of `count` tokens that begins at `start`."""
    return 1 + splits[start] % jnp.maximum(count - 4, 1)


def _apply(operator, left, right):
    return jnp.select([operator == PLUS, operator == MINUS], [left + right, left - right], left * right)
