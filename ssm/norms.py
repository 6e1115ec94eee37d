"""Root-mean-square norms, plain and gated, and lengths of 1, in float32 whatever comes in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.dispatch import at_least_float32


def rms_norm(
    x: Float[Array, "... n"], scale: Float[Array, " n"] | None = None, *, eps: float = 1e-5
) -> Float[Array, "... n"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, times `scale`; in x's dtype (Zhang and Sennrich 2019)."""
    wide = x.astype(at_least_float32(x.dtype))
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(y.dtype).reshape((1,) * (y.ndim - 1) + scale.shape)
    return y.astype(x.dtype)


def l2_norm(x: Float[Array, "... n"], *, eps: float = 1e-6) -> Float[Array, "... n"]:
    """x / sqrt(sum(x^2) + eps) over the last axis: of length 1 where x is not small; in x's dtype."""
    return rms_norm(x, eps=eps / x.shape[-1]) * x.shape[-1] ** -0.5


def gated_rms_norm(
    y: Float[Array, "... d"],
    z: Float[Array, "... d"],
    scale: Float[Array, " d"],
    *,
    groups: int = 1,
    norm_first: bool = False,
    eps: float = 1e-5,
) -> Float[Array, "... d"]:
    """norm(y silu(z)), or norm(y) silu(z) where `norm_first`; the mean over each of `groups` equal parts of d.

    Mamba-2 (arXiv:2405.21060, section 7) gates first. In y's dtype. Raises ValueError where groups does not divide d.
    """
    if y.shape[-1] % groups:
        raise ValueError(f"groups is {groups}; it must divide the {y.shape[-1]} channels of the gated norm")
    gate = jax.nn.silu(z.astype(at_least_float32(z.dtype)))
    wide = y.astype(gate.dtype)
    parts = (wide if norm_first else wide * gate).reshape(*y.shape[:-1], groups, -1)
    normed = rms_norm(parts, eps=eps).reshape(y.shape) * scale.astype(gate.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return (normed * gate if norm_first else normed).astype(y.dtype)
