r"""A diagonal state space model as matrix products over chunks of q tokens.

Inside a chunk the kernel $K_j = \mathrm{Re} \sum_n c_n a_n^j b_n$ is a q x q Toeplitz matrix; a chunk's tokens are
summarised in its state by $a^{q-1-s} b$, states cross chunks by a scan with $a^q$, and the state that enters
a chunk is read out by $c a^{s+1}$. Both directions of a bidirectional layer share the Toeplitz matrix.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.associative_scan import associative_scan


def powers(a, count: int):
    """a^0 ... a^(count-1) along a new last axis, by doubling: no logarithm, so that a = 0 is no special case."""
    table, step = jnp.ones_like(a)[..., None], a
    while table.shape[-1] < count:
        table = jnp.concatenate([table, table * step[..., None]], -1)
        step = step * step
    return table[..., :count]


def run(u, a, b, c, c_reverse, h, chunk_size, precision):
    """(y, last state); arguments as in `reference.run`, which has no chunks."""
    length = u.shape[1]
    q = min(chunk_size, length)
    padded = jnp.pad(u, ((0, 0), (0, -length % q), (0, 0)))
    u_bcqd = padded.reshape(u.shape[0], -1, q, u.shape[2])
    a_dnq = powers(a, q + 1)
    matrix = dict(precision=precision)

    y = jnp.einsum("dqs,bcsd->bcqd", _toeplitz(a_dnq, b, c, c_reverse, q), u_bcqd, **matrix)
    enter = jnp.flip(a_dnq[..., :q], -1) * b[..., None]
    summary = apply_table("dns,bcsd->bcdn", enter, u_bcqd, **matrix)
    states = _across_chunks(a_dnq[..., q], summary, h)
    y += _read("dnq,bcdn->bcqd", c[..., None] * a_dnq[..., 1:], states[:, :-1], **matrix)
    if c_reverse is not None:
        enter = a_dnq[..., :q] * b[..., None]
        summary = apply_table("dns,bcsd->bcdn", enter, u_bcqd, **matrix)
        later = jnp.flip(_across_chunks(a_dnq[..., q], jnp.flip(summary, 1), jnp.zeros_like(h))[:, :-1], 1)
        leave = c_reverse[..., None] * jnp.flip(a_dnq[..., :q], -1)
        y += _read("dnq,bcdn->bcqd", leave, later, **matrix)
    return y.reshape(padded.shape)[:, :length], _last(a_dnq, b, u_bcqd, states, length % q, **matrix)


def _toeplitz(a_dnq, b, c, c_reverse, q):
    """(d, q, q): row t, column s holds K at lag t - s, and the reverse kernel at s - t - 1."""
    kernel = lambda c: jnp.einsum("dnq,dn->dq", a_dnq[..., :q], c * b, precision="highest").real  # noqa: E731
    later = jnp.zeros_like(b, b.real.dtype, shape=(b.shape[0], q)) if c_reverse is None else kernel(c_reverse)
    by_lag = jnp.concatenate([jnp.flip(later[:, : q - 1], 1), kernel(c)], 1)
    lag = np.arange(q)[:, None] - np.arange(q)[None]
    return by_lag[:, lag + q - 1]


def _across_chunks(decay_dn, summary_bcdn, h_bdn):
    """The state that enters every chunk, and the one that leaves the last: (b, c + 1, d, n)."""
    batch, chunks, d, n = summary_bcdn.shape
    planes = lambda x: (x.real, x.imag) if jnp.iscomplexobj(x) else x  # noqa: E731
    states, _ = associative_scan(
        planes(decay_dn.reshape(-1)),
        planes(summary_bcdn.reshape(batch, chunks, -1)),
        planes(h_bdn.reshape(batch, -1)),
    )
    states = jax.lax.complex(*states) if isinstance(states, tuple) else states
    return jnp.concatenate([h_bdn[:, None], states.reshape(batch, chunks, d, n)], 1)


def _last(a_dnq, b, u_bcqd, states, remainder, **matrix):
    if not remainder:
        return states[:, -1]
    enter = jnp.flip(a_dnq[..., :remainder], -1) * b[..., None]
    added = apply_table("dns,bsd->bdn", enter, u_bcqd[:, -1, :remainder], **matrix)
    return a_dnq[None, ..., remainder] * states[:, -2] + added


def apply_table(equation, table, x, **matrix):
    """An einsum of a table (d, n, ...), real or complex, with a real array, as one real product."""
    if not jnp.iscomplexobj(table):
        return jnp.einsum(equation, table, x, **matrix)
    n = table.shape[1]
    both = jnp.einsum(equation, jnp.concatenate([table.real, table.imag], 1), x, **matrix)
    return jax.lax.complex(both[..., :n], both[..., n:])


def _read(equation, table, h, **matrix):
    """The real part of an einsum of a complex table with complex states, as one real product."""
    if not jnp.iscomplexobj(table):
        return jnp.einsum(equation, table, h, **matrix)
    planes = jnp.concatenate([table.real, -table.imag], 1), jnp.concatenate([h.real, h.imag], -1)
    return jnp.einsum(equation, *planes, **matrix)
