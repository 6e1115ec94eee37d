"""One label for a pair of sequences: both through the same stack, and a head that compares what it made of them."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from ssm.models import SequenceClassifier


class PairClassifier(SequenceClassifier):
    """`SequenceClassifier` for pairs: of their pooled vectors u and v, an MLP of (u, v, u - v, u v).

    As the S4 line has it for Long Range Arena's retrieval: one hidden layer of the model's width.
    """

    @nn.compact
    def __call__(
        self, inputs: Num[Array, "b 2 ..."], lengths: Int[Array, "b 2"] | None = None, *, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. inputs: the pair along the second axis, otherwise as `SequenceClassifier` takes one of them.

        Raises ValueError for inputs that are no pairs, and what `SequenceClassifier` raises.
        """
        if inputs.ndim < 3 or inputs.shape[1] != 2:
            raise ValueError(f"inputs have shape {inputs.shape}; their second axis must hold a pair")
        if lengths is not None and lengths.shape != inputs.shape[:2]:
            raise ValueError(f"lengths has shape {lengths.shape}; {len(inputs)} pairs need ({len(inputs)}, 2)")
        lengths = None if lengths is None else lengths.reshape(-1)
        features = self._features(inputs.reshape(-1, *inputs.shape[2:]), lengths, train)
        u, v = jnp.unstack(features.reshape(-1, 2, self.width), axis=1)
        hidden = nn.Dense(self.width, name="head_hidden")(jnp.concatenate([u, v, u - v, u * v], -1))
        return nn.Dense(self.classes, name="head")(nn.gelu(hidden))
