"""Recall from what was read: induction heads, multi-query associative recall, and a needle in a haystack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.synthetic import Draw, Example, OneLength, SyntheticTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(OneLength):
    """Induction heads (Mamba, arXiv:2312.00752, section 4.1.2 and appendix E.1; Olsson et al. 2022).

    Token 0 is special, 1 to vocabulary - 1 are ordinary and uniform. The special token stands once at a uniform place
    and again at the last position, the only one scored: its target is the token that followed the first. Mamba trains
    at length 256 and tests from 2^6 to 2^20. That the vocabulary of 16 has the special token in it, that the length
    counts the last token, and that the first place is uniform, is assumed.
    """

    vocabulary: int = 16

    def load(self) -> SyntheticTask:
        self.at_least(3, "vocabulary")
        self.check_lengths(3, "the special token, its successor, and the special token again")
        ends = dict(make=self._make, input_size=self.vocabulary, classes=self.vocabulary - 1)
        return self.one_length(f"sequences of {self.vocabulary - 1} tokens and a special one", **ends)

    def _make(self, key: jax.Array, size: jax.Array, length: int, train: bool) -> Example:
        place_key, token_key = jax.random.split(key)
        tokens = jax.random.randint(token_key, (length,), 1, self.vocabulary)
        place = jax.random.randint(place_key, (), 0, length - 2)
        inputs = tokens.at[place].set(0).at[-1].set(0)
        last = jnp.arange(length) == length - 1
        return Example(inputs, jnp.where(last, tokens[place + 1], 0), last.astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(OneLength):
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927; Mamba-2, arXiv:2405.21060, appendix D.1).

    Tokens 1 to V/2 - 1 are keys, V/2 to V - 1 values. A sequence begins with `pairs` keys, all different, each followed
    by its value, all different; what follows them is cut into places of two tokens, and each key stands once more at
    the first token of a place, where it is scored: its target is its value. Place i (from 1) is taken with a
    probability as power^i's derivative, i^(power - 1), without replacement. All other tokens after the pairs are
    uniform over the vocabulary, or 0 where random_tokens is off.
    pairs: of each stage of training, stage_steps steps long; the test has test_pairs (0: the last stage's). Mamba-2
    has lengths 256, 512 and 1024, and length/32, /16, /8 and /4 pairs as stages; 2^18 examples a stage, eight times
    over. Here no example comes twice.
    """

    vocabulary: int = 8192
    pairs: tuple[int, ...] = (64,)
    test_pairs: int = 0
    stage_steps: int = 0
    power: float = 0.01
    random_tokens: bool = True

    def load(self) -> SyntheticTask:
        self.at_least(4, "vocabulary")
        self.at_least(1, "pairs")
        self.at_least(0, "test_pairs", "stage_steps")
        if not self.pairs or (len(self.pairs) > 1 and not self.stage_steps):
            raise ValueError(f"task {self.name}: pairs={self.pairs} with stage_steps={self.stage_steps}")
        keys = self.vocabulary // 2 - 1
        for field in ("pairs", "test_pairs"):
            most = max(np.atleast_1d(getattr(self, field)))
            if most > keys:
                raise ValueError(
                    f"task {self.name}: {field}={getattr(self, field)} are more than the {keys} keys"
                    f" of vocabulary={self.vocabulary}"
                )
        most = max(*self.pairs, self.test_pairs)
        self.check_lengths(4 * most, f"{most} pairs take two tokens each, and their queries two more")
        if self.power <= 0:
            raise ValueError(f"task {self.name}: power={self.power} must be above 0")
        return self.task(
            [Draw(self.length, pairs, pairs) for pairs in self.pairs],
            self.stage_steps,
            self.test_draw(self.test_length or self.length),
            f"sequences with up to {most} pairs of a key and a value",
            make=self._make,
            input_size=self.vocabulary,
            classes=self.vocabulary - self.vocabulary // 2,
        )

    def test_draw(self, length: int) -> Draw:
        pairs = self.test_pairs or self.pairs[-1]
        return Draw(length, pairs, pairs)

    def _make(self, key: jax.Array, size: jax.Array, length: int, train: bool) -> Example:
        key_key, value_key, place_key, token_key = jax.random.split(key, 4)
        half, most = self.vocabulary // 2, max(*self.pairs, self.test_pairs)
        keys = 1 + jax.random.choice(key_key, half - 1, (most,), replace=False)
        values = half + jax.random.choice(value_key, self.vocabulary - half, (most,), replace=False)

        position = jnp.arange(length)
        pair, is_value = position // 2, position % 2 == 1
        in_pairs = position < 2 * size
        asked = self._asked(place_key, size, length)[pair - size]  # of positions after the pairs
        asks = ~in_pairs & ~is_value & (asked < size)
        other = jax.random.randint(token_key, (length,), 0, self.vocabulary if self.random_tokens else 1)
        number = jnp.clip(jnp.where(in_pairs, pair, asked), 0, most - 1)
        inputs = jnp.where(in_pairs & is_value, values[number], jnp.where(in_pairs | asks, keys[number], other))
        return Example(inputs, jnp.where(asks, values[number], 0), asks.astype(jnp.float32))

    def _asked(self, key: jax.Array, size: jax.Array, length: int) -> jax.Array:
        """Which pair each place asks for, (length // 2,): the first `size` of a draw without replacement do.

        Gumbel noise added to log-probabilities sorts them as draws one after another (Vieira 2014).
        """
        place = jnp.arange(1, length // 2 + 1)
        score = (self.power - 1) * jnp.log(place) + jax.random.gumbel(key, place.shape)
        score = jnp.where(place <= length // 2 - size, score, -jnp.inf)
        return jnp.argsort(jnp.argsort(-score))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(OneLength):
    """A needle in a haystack, as RULER has it (Hsieh et al. 2024, arXiv:2404.06654), in tokens of its own.

    Tokens: 0 the mark of a needle, 1 to `keys` keys, the next `values` values, and the other tokens up to vocabulary
    hay, uniform. A needle is the mark, a key and value_size values; a sequence holds `needles` of them, of different
    keys, in blocks of the hay that are drawn without replacement, and ends with the mark, the key of one of them, and
    its values but the last. Scored are the last value_size positions, whose targets are its values.
    depth: where the needle that is asked for lies, 0 at the start and 1 at the end of the hay; -1: anywhere.
    Haystacks of text, as Mamba-3's (arXiv:2603.15569, table 4), need a language model; this task can be trained on.
    """

    vocabulary: int = 64
    keys: int = 8
    values: int = 16
    needles: int = 1
    value_size: int = 4
    depth: float = -1.0

    def load(self) -> SyntheticTask:
        self.at_least(1, "keys", "values", "needles", "value_size")
        if self.needles > self.keys:
            raise ValueError(f"task {self.name}: needles={self.needles} need different keys, of which keys={self.keys}")
        if self.vocabulary < 2 + self.keys + self.values:
            raise ValueError(
                f"task {self.name}: vocabulary={self.vocabulary} must be at least {2 + self.keys + self.values}:"
                f" the mark, keys={self.keys}, values={self.values} and a token of hay"
            )
        if self.depth != -1 and not 0 <= self.depth <= 1:
            raise ValueError(f"task {self.name}: depth={self.depth} must be between 0 and 1, or -1 for anywhere")
        least = (self.needles + 1) * (2 + self.value_size) - 1
        self.check_lengths(least, f"needles={self.needles} of {2 + self.value_size} tokens and the question")
        ends = dict(make=self._make, input_size=self.vocabulary, classes=self.values)
        return self.one_length(f"hay with {self.needles} needles", **ends)

    def _make(self, key: jax.Array, size: jax.Array, length: int, train: bool) -> Example:
        hay_key, key_key, value_key, place_key = jax.random.split(key, 4)
        block = 2 + self.value_size
        start = length - block + 1  # of the question
        keys = 1 + jax.random.choice(key_key, self.keys, (self.needles,), replace=False)
        values = jax.random.randint(value_key, (self.needles, self.value_size), 0, self.values) + 1 + self.keys
        marks = jnp.zeros((self.needles, 1), jnp.int32)
        needles = jnp.concatenate([marks, keys[:, None], values], 1)  # the first is asked for

        hay = jax.random.randint(hay_key, (length,), 1 + self.keys + self.values, self.vocabulary)
        places = self._places(place_key, start // block)[:, None] * block + start % block + jnp.arange(block)
        inputs = hay.at[places].set(needles).at[start:].set(needles[0, :-1])
        targets = jnp.zeros(length, jnp.int32).at[start + 1 :].set(values[0])
        return Example(inputs, targets, (jnp.arange(length) > start).astype(jnp.float32))

    def _places(self, key: jax.Array, blocks: int) -> jax.Array:
        """A block of the hay for each needle."""
        if self.depth == -1:
            return jax.random.permutation(key, blocks)[: self.needles]
        first = round(self.depth * (blocks - 1))
        others = jax.random.permutation(key, blocks - 1)[: self.needles - 1]
        return jnp.concatenate([jnp.array([first]), others + (others >= first)])
