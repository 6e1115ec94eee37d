"""Modular arithmetic: the value of an expression modulo 5, with operator precedence or with brackets.

Definitions: Delétang et al. 2023 (arXiv:2207.02098, appendix A) and the xLSTM repository's generators, on which Grazzi
et al. 2025 (arXiv:2411.12537, appendix E) and Mamba-3 (arXiv:2603.15569, appendix D) train. Tokens:

    0 PAD   1 +   2 -   3 *   4 =     then, without brackets,  5 + d: the digit d < modulus
                                      or, with brackets,       5 (   6 )   7 + d: the digit d < modulus

The target, at "=", is the digit that the expression is equal to. A string is the expression and "=", and its length
counts both; the published generators count the answer too, and so have one more. With scored="every", in training
alone, the values of parts are asked for too: at an operator that of what is before it, at ")" that of its bracket.

modular_arithmetic: digits and operators +, -, * in turn, all uniform, * before + and -. A string has an even number
of tokens: the length drawn, or one less.
modular_arithmetic_brackets: an expression of n tokens is, by n, one of d, -d, (d), (-d), or from 5 on (L o R) with L's
length uniform in 1 to n - 4 and o uniform in + and -; with `multiply` in +, - and *. That Grazzi et al. have no * is
their repository's default.
"""

import dataclasses

import jax
import jax.numpy as jnp

from experiments.tasks.synthetic import Example, Strings, SyntheticTask, check_modulus, check_scored, string

PLUS, MINUS, TIMES, EQUALS, OPEN, CLOSE = 1, 2, 3, 4, 5, 6
DIGIT, OPERATOR = 0, -1  # on the stack of what is to be written: 0 a digit, -1 an operator, -2 - t the token t


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
        tokens, values, value = bracketed(key, size - 1, length, self.modulus, TIMES if self.multiply else MINUS)
        ends = jnp.arange(length) == size - 1
        inputs, targets = jnp.where(ends, EQUALS, tokens), 7 + jnp.where(ends, value, values)
        return string(inputs, targets, size, self._parts(tokens == CLOSE, train))

    def _parts(self, places: jax.Array, train: bool) -> jax.Array:
        """Those of the places that are scored beside the end."""
        return places & (train and self.scored == "every")


def values_of_prefixes(digits: jax.Array, operators: jax.Array, modulus: int) -> jax.Array:
    """What the expression is worth after each of its digits. operators: (l,), 0 where the token is the digit."""

    def read(carry, token):
        total, product = carry  # of the terms that are over, and of the present one, with its sign
        digit, operator = token
        starts = jnp.select([operator == PLUS, operator == MINUS], [1, -1], product)
        total = jnp.where((operator == PLUS) | (operator == MINUS), total + product, total) % modulus
        product = jnp.where(operator == 0, product * digit, starts) % modulus
        return (total, product), (total + product) % modulus

    _, values = jax.lax.scan(read, (jnp.int32(0), jnp.int32(1)), (digits, operators), unroll=16)
    return values


def bracketed(
    key: jax.Array, size: jax.Array, length: int, modulus: int, last_operator: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A random expression of `size` tokens in (length,), at each ")" the value of its bracket, and that of the whole.

    One stack holds what is still to be written; each turn takes one off it, writes one token, and puts on what must
    follow. Two others hold, for each bracket that is open, its value so far and the operator that waits; a minus of
    "-d" waits for its digit alone.
    """

    def write(carry, random):
        todo, height, values, waiting, depth, negate = carry
        item = todo[height - 1]
        digit, operator, left = random % jnp.stack([jnp.int32(modulus), last_operator, jnp.maximum(item - 4, 1)])
        token = _token(item, digit, PLUS + operator)
        todo, later = _put(todo, height - 1, item, 1 + left)

        depth = depth + (token == OPEN)
        values = jnp.where(token == OPEN, _set(values, depth, 0), values)
        waits = jnp.where(token == OPEN, PLUS, jnp.where(item == OPERATOR, token, waiting[depth]))
        waiting = _set(waiting, depth, waits)
        inner = jnp.where(token == CLOSE, values[depth], jnp.where(negate, -digit, digit))
        depth = depth - (token == CLOSE)
        value = _apply(waiting[depth], values[depth], inner) % modulus
        values = jnp.where(token >= CLOSE, _set(values, depth, value), values)
        negate = (token == MINUS) & (item != OPERATOR)
        after = todo, later, values, waiting, depth, negate
        return jax.tree.map(lambda old, new: jnp.where(height == 0, old, new), carry, after), (token, inner % modulus)

    start = jnp.zeros(length + 4, jnp.int32)
    carry = start.at[0].set(size), jnp.int32(1), start, start.at[0].set(PLUS), jnp.int32(0), jnp.bool(False)
    random = jax.random.randint(key, (length, 3), 0, 2**30)
    (_, _, values, *_), (tokens, inner) = jax.lax.scan(write, carry, random)
    return tokens, inner, values[0]


def _token(item, digit, operator):
    """The token that a turn writes: an expression of `item` tokens begins with it."""
    first = jnp.select([item == 1, item == 2], [7 + digit, MINUS], OPEN)
    return jnp.select([item == DIGIT, item == OPERATOR, item < OPERATOR], [7 + digit, operator, -2 - item], first)


def _put(todo, height, item, left):
    """The stack with the rest of an expression of `item` tokens on it, the next one on top."""
    close, minus = -2 - CLOSE, -2 - MINUS
    split = jnp.stack([jnp.int32(close), item - 3 - left, jnp.int32(OPERATOR), left])
    rests = jnp.array([[DIGIT, 0, 0, 0], [close, DIGIT, 0, 0], [close, DIGIT, minus, 0]], jnp.int32)
    rest = jnp.where(item >= 5, split, rests[jnp.clip(item - 2, 0, 2)])
    count = jnp.where(item >= 5, 4, jnp.clip(item - 1, 0, 3))
    for i in range(4):
        todo = jnp.where(i < count, _set(todo, height + i, rest[i]), todo)
    return todo, height + count


def _set(stack, place, value):
    """A select, which fuses with its neighbours; a scatter is a kernel of its own on GPUs."""
    return jnp.where(jnp.arange(len(stack)) == place, value, stack)


def _apply(operator, left, right):
    return jnp.select([operator == PLUS, operator == MINUS], [left + right, left - right], left * right)
