"""Copying and selective copying: write down, in order, the tokens that were read before.

Selective copying (Mamba, arXiv:2312.00752, section 4.1.1 and appendix E.1; Jing et al. 2019): `memorize` tokens to be
remembered lie anywhere among noise; copying (Arjovsky et al. 2016) has them at the start, one beside the other. Tokens:

    0 noise    1 to vocabulary - 2 what is to be remembered, uniform    vocabulary - 1 the marker

The last `memorize` positions of a sequence are markers; the i-th of them is scored, and its target is the i-th token to
be remembered. `length` counts all positions, the markers too. The paper states a length of 4096, 16 tokens to remember
and a vocabulary of 16 with the noise token in it; that the markers count in both, and that accuracy is that of single
tokens, is assumed here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from experiments.tasks.synthetic import Example, OneLength, SyntheticTask

NOISE = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(OneLength):
    length: int = 4096
    vocabulary: int = 16
    memorize: int = 16

    def load(self) -> SyntheticTask:
        self.at_least(4, "vocabulary")
        self.at_least(1, "memorize")
        self.check_lengths(2 * self.memorize, f"memorize={self.memorize} tokens, and as many markers")
        ends = dict(make=self._make, input_size=self.vocabulary, classes=self.vocabulary - 2)
        return self.one_length(f"sequences with {self.memorize} tokens to copy", **ends)

    def _make(self, key: jax.Array, size: jax.Array, length: int, train: bool) -> Example:
        place_key, token_key = jax.random.split(key)
        start = length - self.memorize  # of the markers
        tokens = jax.random.randint(token_key, (self.memorize,), 1, self.vocabulary - 1)
        if self.name == "copying":
            places = jnp.arange(self.memorize)
        else:
            places = jnp.sort(jax.random.choice(place_key, start, (self.memorize,), replace=False))
        inputs = jnp.full(length, NOISE).at[places].set(tokens).at[start:].set(self.vocabulary - 1)
        targets = jnp.full(length, NOISE).at[start:].set(tokens)
        scored = (jnp.arange(length) >= start).astype(jnp.float32)
        return Example(inputs.astype(jnp.int32), targets.astype(jnp.int32), scored)
