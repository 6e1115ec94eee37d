"""A classifier of sequences: an encoder, a stack of blocks described by a pattern of mixers, and a head."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int, Num

from ssm.blocks import Block, Mask, Norm, masked
from ssm.mixers import MIXERS
from ssm.naming import unknown

ENCODERS = ("continuous", "token", "image")
POOLINGS = ("mean", "max", "first", "last")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def layers(pattern: str, depth: int) -> list[str]:
    """The mixer of every layer: the pattern's names, separated by spaces, over and over.

    >>> layers("s4d s4d s5", 5)
    ['s4d', 's4d', 's5', 's4d', 's4d']
    """
    names = pattern.split()
    for name in names:
        if name not in MIXERS:
            raise unknown("mixer in pattern", name, MIXERS)
    if not names or depth < 1:
        raise ValueError(f"pattern is {pattern!r} and depth {depth}; they must name at least one layer")
    return [names[i % len(names)] for i in range(depth)]


def checked_layers(model: nn.Module) -> list[str]:
    """The mixer of every layer of a model, whose shared fields are checked: ValueError names the one that is wrong."""
    names = layers(model.pattern, model.depth)
    for name in model.mixers:
        if name not in names:
            raise unknown("mixer with options", name, names)
    if model.dtype not in DTYPES:
        raise unknown("dtype", model.dtype, DTYPES)
    if model.width < 1:
        raise ValueError(f"width is {model.width}; it must be at least 1")
    if not 0 <= model.dropout < 1:
        raise ValueError(f"dropout is {model.dropout}; it must be at least 0 and below 1")
    return names


class Encoder(nn.Module):
    """Inputs to (b, l, width): "continuous" (b, l, c), "token" ids (b, l), or "image" (b, height, width, c)."""

    kind: str
    input_size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, inputs):
        if self.kind not in ENCODERS:
            raise unknown("encoder", self.kind, ENCODERS)
        x = self._check(inputs)
        if self.kind == "token":
            return nn.Embed(self.input_size, self.width, dtype=self.dtype, name="embedding")(x)
        if self.kind == "image":
            x = x.reshape(x.shape[0], -1, x.shape[-1]).astype(self.dtype) / 255
        return nn.Dense(self.width, dtype=self.dtype, name="projection")(x.astype(self.dtype))

    def _check(self, x):
        rank = {"continuous": 3, "token": 2, "image": 4}[self.kind]
        integers = jnp.issubdtype(x.dtype, jnp.integer)
        if x.ndim != rank:
            raise ValueError(f"inputs have shape {x.shape}; the {self.kind} encoder takes {rank} axes")
        if self.kind != "image" and integers != (self.kind == "token"):
            wanted = "integers" if self.kind == "token" else "floats"
            raise ValueError(f"inputs are {x.dtype}; the {self.kind} encoder takes {wanted}")
        if self.kind != "token" and x.shape[-1] != self.input_size:
            raise ValueError(f"inputs have {x.shape[-1]} channels; input_size is {self.input_size}")
        return x


class SequenceClassifier(nn.Module):
    """One label for a sequence: encoder, blocks, pooling over the length, linear head.

    classes, encoder, input_size: what the task is: see `Encoder`; input_size counts channels, or tokens.
    pattern, depth: see `layers`; mixers: options by the mixer's name. norm: "batch", "layer" or "rms", before
    the mixer or (prenorm off) after the residual; momentum: of batch statistics; glu, dropout: see `GatedUnit`.
    bidirectional: every mixer reads both ways, see `Block`. pooling: "mean" or "max" over the tokens, "first" or
    "last". dtype: of activations; parameters, states and logits are float32.
    """

    classes: int
    input_size: int
    encoder: str = "continuous"
    width: int = 128
    depth: int = 4
    pattern: str = "s4d"
    mixers: Mapping[str, Mapping[str, Any]] = FrozenDict()
    norm: str = "layer"
    prenorm: bool = True
    glu: str = "full"
    dropout: float = 0.0
    momentum: float = 0.95
    bidirectional: bool = False
    pooling: str = "mean"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, inputs: Num[Array, "b ..."], lengths: Int[Array, " b"] | None = None, *, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits. lengths: how many tokens of each row are real; padding changes nothing.

        Raises ValueError naming the field or the input that does not fit.
        """
        return nn.Dense(self.classes, name="head")(self._features(inputs, lengths, train))

    def _features(self, inputs, lengths, train):
        """One vector a sequence, float32 (b, width)."""
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS)
        names = checked_layers(self)
        x = Encoder(self.encoder, self.input_size, self.width, DTYPES[self.dtype], name="encoder")(inputs)
        mask = None if lengths is None else jnp.arange(x.shape[1])[None] < self._check_lengths(lengths, x)[:, None]
        for i, name in enumerate(names):
            x = Block(
                mixer=name,
                options=self.mixers.get(name, {}),
                norm=self.norm,
                prenorm=self.prenorm,
                glu=self.glu,
                dropout=self.dropout,
                momentum=self.momentum,
                bidirectional=self.bidirectional,
                name=f"block_{i}",
            )(x, mask, train=train)
        if self.prenorm:
            x = Norm(self.norm, self.momentum, name="norm")(x, mask, train=train)
        return pool(self.pooling, x.astype(jnp.float32), mask)

    def _check_lengths(self, lengths, x):
        if lengths.shape != x.shape[:1]:
            raise ValueError(f"lengths has shape {lengths.shape}; {x.shape[0]} sequences need ({x.shape[0]},)")
        return lengths


def pool(kind: str, x_bld: Float[Array, "b l d"], mask: Mask) -> Float[Array, "b d"]:
    """One vector for a sequence, from its real tokens."""
    mask = jnp.ones(x_bld.shape[:2], bool) if mask is None else mask
    if kind == "mean":
        return masked(x_bld, mask).sum(1) / jnp.maximum(mask.sum(1), 1).astype(x_bld.dtype)[:, None]
    if kind == "max":
        return jnp.where(mask[..., None], x_bld, -jnp.inf).max(1)
    index = jnp.zeros(x_bld.shape[0], int) if kind == "first" else jnp.maximum(mask.sum(1) - 1, 0)
    return jnp.take_along_axis(x_bld, index[:, None, None], 1)[:, 0]
