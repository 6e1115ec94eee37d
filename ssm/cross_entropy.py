"""Cross entropy of a head over a large vocabulary: pieces of the logits at a time, never all of them.

The logits of 32,768 tokens over 50,288 others are 6.6 GB in float32. Where the gradient is asked for, each piece gives
it at once: its weight in the sum is known beforehand, so that nothing is kept, and nothing computed twice.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import at_least_float32

LOGITS = 2**28  # at most so many at a time: 1 GiB in float32


def cross_entropy(
    x_bld: Float[Array, "b l d"],
    kernel_vd: Float[Array, "v d"],
    targets_bl: Int[Array, "b l"],
    weights_bl: Float[Array, "b l"] | None = None,
    *,
    logits_at_once: int = LOGITS,
) -> tuple[Float[Array, ""], Float[Array, " b"]]:
    r"""$\sum_t w_t (\log \sum_v e^{z_{tv}} - z_{t, y_t})$ in nats over the tokens of all rows, where $z = x W^\top$;
    and each row's sum of $w_t$ over the tokens whose target has no likelier rival.

    Logits and sums are float32 or better; products take x's dtype, which the gradient of a logit is rounded to, as
    every other gradient of an activation is. weights: None for ones. Only the first sum has a gradient.
    """
    wide = at_least_float32(x_bld.dtype)
    weights_bl = jnp.ones(targets_bl.shape, wide) if weights_bl is None else weights_bl.astype(wide)
    batch, length = targets_bl.shape
    pieces = min(length, 2 ** max(0, int(np.ceil(np.log2(batch * length * len(kernel_vd) / logits_at_once)))))
    size = -(-length // pieces)

    def cut(v):
        v = jnp.pad(v, ((0, 0), (0, pieces * size - length)) + ((0, 0),) * (v.ndim - 2))
        return jnp.moveaxis(v.reshape(batch, pieces, size, *v.shape[2:]), 1, 0)

    return _sums(kernel_vd, *map(cut, (x_bld, targets_bl, weights_bl)))


@jax.custom_vjp
def _sums(kernel_vd, x_cbld, targets_cbl, weights_cbl):
    kernel = kernel_vd.astype(x_cbld.dtype)
    (loss, correct), _ = jax.lax.scan(
        lambda sums, piece: (_added(sums, _piece(kernel, *piece)[0]), None),
        _nothing(weights_cbl),
        (x_cbld, targets_cbl, weights_cbl),
    )
    return loss, correct


def _nothing(weights_cbl):
    return jnp.zeros((), weights_cbl.dtype), jnp.zeros_like(weights_cbl[0, :, 0])


def _added(sums, more):
    return jax.tree.map(jnp.add, sums, more)


def _piece(kernel_vd, x_bld, targets_bl, weights_bl):
    """(the two sums, what the gradient is made of: the logits less their log of summed exponentials, the losses)."""
    logits = jnp.einsum("bld,vd->blv", x_bld, kernel_vd, preferred_element_type=weights_bl.dtype)
    largest = jnp.max(logits, -1)
    total = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), -1))
    own = jnp.take_along_axis(logits, targets_bl[..., None], -1)[..., 0]
    losses = total - own
    sums = jnp.sum(weights_bl * losses), jnp.sum(jnp.where(own >= largest, weights_bl, 0), 1)
    return sums, (logits - total[..., None], losses)


def _with_gradients(kernel_vd, x_cbld, targets_cbl, weights_cbl):
    kernel = kernel_vd.astype(x_cbld.dtype)

    def advance(carry, piece):
        x_bld, targets_bl, weights_bl = piece
        sums, (log_p, losses) = _piece(kernel, *piece)
        own = jax.lax.broadcasted_iota(targets_bl.dtype, log_p.shape, 2) == targets_bl[..., None]
        logits_bar = (weights_bl[..., None] * (jnp.exp(log_p) - own.astype(log_p.dtype))).astype(x_bld.dtype)
        x_bar = jnp.einsum("blv,vd->bld", logits_bar, kernel)
        kernel_bar = jnp.einsum("blv,bld->vd", logits_bar, x_bld, preferred_element_type=weights_bl.dtype)
        return _added(carry, (sums, kernel_bar)), (x_bar, losses)

    start = _nothing(weights_cbl), jnp.zeros(kernel_vd.shape, weights_cbl.dtype)
    (sums, kernel_bar), (x_bar, losses) = jax.lax.scan(advance, start, (x_cbld, targets_cbl, weights_cbl))
    return sums, (kernel_bar.astype(kernel_vd.dtype), x_bar, losses)


def _scaled(gradients, bars):
    bar, _ = bars
    kernel_bar, x_bar, losses = ((bar * v.astype(bar.dtype)).astype(v.dtype) for v in gradients)
    return kernel_bar, x_bar, None, losses


_sums.defvjp(_with_gradients, _scaled)
