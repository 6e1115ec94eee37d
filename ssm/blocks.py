"""What stands around a mixer: norms that know padding, gated units and MLPs, residual wiring."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ssm.initializers import uniform_fan_in
from ssm.mixers import MIXERS, mixer
from ssm.naming import unknown
from ssm.norms import rms_norm

NORMS = ("batch", "layer", "rms")
GLUS = ("full", "half1", "half2", "none")
Mask = Bool[Array, "b l"] | None


def masked(x_bld: Float[Array, "b l d"], mask: Mask) -> Float[Array, "b l d"]:
    """x with padded tokens at 0, where a linear mixer started from 0 stays at 0."""
    return x_bld if mask is None else jnp.where(mask[..., None], x_bld, 0)


def backwards(x_bld: Float[Array, "b l d"], mask: Mask) -> Float[Array, "b l d"]:
    """x with its real tokens in reverse; padding stays behind them."""
    if mask is None:
        return jnp.flip(x_bld, 1)
    places, count = jnp.arange(x_bld.shape[1])[None], mask.sum(1, keepdims=True)
    return jnp.take_along_axis(x_bld, jnp.where(mask, count - 1 - places, places)[..., None], 1)


class Norm(nn.Module):
    """Batch, layer or root-mean-square norm over the width, in float32; batch statistics skip padded tokens."""

    kind: str = "layer"
    momentum: float = 0.95

    @nn.compact
    def __call__(self, x_bld, mask: Mask = None, *, train: bool = False):
        x = x_bld.astype(jnp.float32)
        if self.kind == "batch":
            norm = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="batch")
            y = norm(x, mask=None if mask is None else mask[..., None])
        elif self.kind == "layer":
            y = nn.LayerNorm(name="layer")(x)
        elif self.kind == "rms":
            y = nn.RMSNorm(name="rms")(x)
        else:
            raise unknown("norm", self.kind, NORMS)
        return y.astype(x_bld.dtype)


class GLU(nn.Module):
    """(W_1 x + b_1) sigmoid(W_2 x + b_2) (Dauphin et al. 2017, arXiv:1612.08083, eq. 1), W and b each kept as one.

    Two products and not one: the cotangents of the halves of one would be put together in memory.
    """

    @nn.compact
    def __call__(self, x_bld):
        width = x_bld.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, 2 * width))
        bias = self.param("bias", nn.initializers.zeros, (2 * width,))
        halves = zip(jnp.split(kernel.astype(x_bld.dtype), 2, 1), jnp.split(bias.astype(x_bld.dtype), 2), strict=True)
        value, gate = (x_bld @ W + b[None, None] for W, b in halves)
        return value * jax.nn.sigmoid(gate)


class GatedUnit(nn.Module):
    """The position-wise map after a mixer, g(y) with dropout; one of

    full: GLU(W gelu(y)), S4's; half1: v sigmoid(W v) with v = gelu(y), and half2: y sigmoid(W gelu(y)), S5's;
    none: gelu(y). Dropout is tied along the length, as S4's and S5's is.
    """

    kind: str = "full"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, y_bld, *, train: bool = False):
        width, dtype = y_bld.shape[-1], y_bld.dtype
        drop = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not train)
        v = drop(nn.gelu(y_bld))
        if self.kind == "none":
            return v
        if self.kind == "full":
            return GLU(name="gate")(v)
        gate = nn.Dense(width, dtype=dtype, name="gate")(v)
        if self.kind == "half1":
            return drop(v * jax.nn.sigmoid(gate))
        if self.kind == "half2":
            return drop(y_bld * jax.nn.sigmoid(gate))
        raise unknown("glu", self.kind, GLUS)


class Block(nn.Module):
    """x + unit(mixer(norm(x))), or norm(x + unit(mixer(x))) where `prenorm` is off.

    bidirectional: by the mixer's own second direction; a causal mixer's y is added to a second one's of reversed x.
    """

    mixer: str
    options: Mapping[str, Any]
    norm: str = "layer"
    prenorm: bool = True
    glu: str = "full"
    dropout: float = 0.0
    momentum: float = 0.95
    bidirectional: bool = False

    @nn.compact
    def __call__(self, x_bld, mask: Mask = None, *, train: bool = False):
        norm = Norm(self.norm, self.momentum, name="norm")
        y = norm(x_bld, mask, train=train) if self.prenorm else x_bld
        y = self._mix(masked(y, mask), mask)
        x = x_bld + GatedUnit(self.glu, self.dropout, name="unit")(y, train=train)
        return x if self.prenorm else norm(x, mask, train=train)

    def _mix(self, x_bld, mask):
        make = partial(mixer, self.mixer, x_bld.shape[-1], self.options)
        if self.bidirectional and hasattr(MIXERS[self.mixer], "bidirectional"):
            return make(bidirectional=True, name="mixer")(x_bld)[0]
        y = make(name="mixer")(x_bld)[0]
        if self.bidirectional:
            y += backwards(make(name="mixer_reverse")(backwards(x_bld, mask))[0], mask)
        return y


class RMSNorm(nn.Module):
    """`ssm.norms.rms_norm` with a learned scale."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        return rms_norm(x, self.param("scale", nn.initializers.ones, x.shape[-1:]), eps=self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x) (SwiGLU; Shazeer 2020, arXiv:2002.05202, eq. 6).

    size: of the hidden layer; None: 8/3 of the width, rounded up to a multiple of 128.
    """

    size: int | None = None

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        size = -(-(8 * width // 3) // 128) * 128 if self.size is None else self.size
        dense = partial(nn.Dense, use_bias=False, dtype=x.dtype, kernel_init=uniform_fan_in)
        hidden = jax.nn.silu(dense(size, name="gate")(x)) * dense(size, name="up")(x)
        return dense(width, name="down")(hidden)


class ResidualBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm_mlp(x)), the sum in x's dtype and the branches in `dtype`.

    x is (b, l, d), or (b, d) for one token. mlp_size: see `GatedMLP`; 0: no MLP. dropout: of each branch.
    writes: what is added to x in the whole model; out_proj and down start 1/sqrt(writes) as large (GPT-2, section 2.3).
    """

    mixer: str
    options: Mapping[str, Any]
    mlp_size: int | None = 0
    norm_eps: float = 1e-5
    dropout: float = 0.0
    writes: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, segment_ids=None, train: bool = False):
        drop = nn.Dropout(self.dropout, deterministic=not train)
        mix = mixer(self.mixer, x.shape[-1], self.options, name="mixer")
        y = RMSNorm(self.norm_eps, name="norm")(x).astype(self.dtype)
        y, state = mix.step(y, state) if x.ndim == 2 else mix(y, state, segment_ids=segment_ids)
        x = x + drop(y).astype(x.dtype)
        if self.mlp_size != 0:
            y = RMSNorm(self.norm_eps, name="norm_mlp")(x).astype(self.dtype)
            x = x + drop(GatedMLP(self.mlp_size, name="mlp")(y)).astype(x.dtype)
        if self.is_initializing():
            for name, params in self.variables["params"].items():
                self.put_variable("params", name, _shrunk(params, self.writes**-0.5))
        return x, state


def _shrunk(params, factor):
    """The parameters with the layers that write to the residual made smaller."""
    writers = {"out_proj", "down"}
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p * factor if writers & {key.key for key in path} else p, params
    )
