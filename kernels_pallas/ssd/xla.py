r"""State space duality as matrix products over chunks of q tokens: the four steps of SSD's Listing 1.

Every exponent is a sum of log decays, never a difference of two such sums: none exceeds 0, -inf is no special
case. The heads are (g, j), j of them reading one group. A token has r lanes, so that a chunk has k = q r, and
lane k reads lane m, of its own token or one before. Products run over one axis of lanes, not over (q, r): jaxlib
0.10.2 crashes on a CPU in such a product's gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

einsum = partial(jnp.einsum, precision="highest")


def segsum(log_decay: Float[Array, "*c q"]) -> Float[Array, "*c q q"]:
    """Row i, column j: the sum of log_decay over j+1..i, 0 on the diagonal and -inf above (SSD, Listing 1)."""
    q = log_decay.shape[-1]
    rows = np.arange(q)[:, None]
    later = rows > rows.T
    terms = jnp.where(_like(later, log_decay), log_decay[..., None], 0)
    return jnp.where(_like(rows >= rows.T, log_decay), jnp.cumsum(terms, -2), -jnp.inf)


def _like(mask, log_decay):
    return mask.reshape((1,) * (log_decay.ndim - 1) + mask.shape)


def run(x_blrhp, a_blh, B_blrgn, C_blrgn, h_bhpn, chunk_size):
    """(y_blrhp, last state); arguments as in `reference.run`, which has no chunks."""
    batch, length, r, heads, p = x_blrhp.shape
    groups, n = B_blrgn.shape[-2:]
    q = min(chunk_size, length)
    chunks = lambda v, *shape: _padded(v, q).reshape(batch, -1, *shape)  # noqa: E731
    x = chunks(x_blrhp, q * r, groups, heads // groups, p)
    a = jnp.moveaxis(chunks(a_blh, q, groups, heads // groups), 2, -1)
    B, C = chunks(B_blrgn, q * r, groups, n), chunks(C_blrgn, q * r, groups, n)

    y, summary = _inside(x, a, B, C)
    states, last = _across(jnp.exp(a.sum(-1)), summary, h_bhpn.reshape(batch, groups, -1, p, n))
    y = (y + _read(a, C, states)).reshape(batch, -1, r, heads, p)
    return y[:, :length], last.reshape(h_bhpn.shape)


def _padded(v, q):
    """Up to whole chunks: what is added has no input and no decay."""
    return jnp.pad(v, ((0, 0), (0, -v.shape[1] % q)) + ((0, 0),) * (v.ndim - 2))


@jax.checkpoint
def _inside(x_bckgjp, a_bcgjq, B_bckgn, C_bckgn):
    """Steps 1 and 2: what tokens of a chunk say to each other, and to the state at its end.

    Made anew by the backward pass, so that no (q, q) matrix is kept.
    """
    r = x_bckgjp.shape[2] // a_bcgjq.shape[-1]
    decay_bcgjqs = jnp.exp(segsum(a_bcgjq))
    lanes = lambda decay, axis: jnp.repeat(decay, r, axis)  # noqa: E731
    scores = einsum("bckgn,bcmgn->bcgkm", C_bckgn, B_bckgn)
    y = einsum("bcgjkm,bcmgjp->bckgjp", scores[:, :, :, None] * lanes(lanes(decay_bcgjqs, -1), -2), x_bckgjp)
    to_end = jnp.moveaxis(lanes(decay_bcgjqs[..., -1, :], -1), -1, 2)
    return y, einsum("bckgjp,bckgn->bcgjpn", to_end[..., None] * x_bckgjp, B_bckgn)


def _across(decay_bcgj, summary_bcgjpn, h_bgjpn):
    """Step 3: the state that enters every chunk, and the one that leaves the last."""

    def advance(h, chunk):
        decay, added = chunk
        return decay[..., None, None] * h + added, h

    chunks = jnp.moveaxis(decay_bcgj, 1, 0), jnp.moveaxis(summary_bcgjpn, 1, 0)
    last, states = jax.lax.scan(advance, h_bgjpn, chunks)
    return jnp.moveaxis(states, 0, 1), last


@jax.checkpoint
def _read(a_bcgjq, C_bckgn, h_bcgjpn):
    """Step 4: what the state that enters a chunk says to its tokens."""
    decay = jnp.repeat(jnp.exp(jnp.cumsum(a_bcgjq, -1)), C_bckgn.shape[2] // a_bcgjq.shape[-1], -1)
    return jnp.moveaxis(decay, -1, 2)[..., None] * einsum("bckgn,bcgjpn->bckgjp", C_bckgn, h_bcgjpn)
