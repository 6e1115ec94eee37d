r"""A diagonal state space model as a walk over chunks of q tokens, by matrix products batched over the channels.

Inside a chunk the kernel $K_j = \mathrm{Re} \sum_n c_n a_n^j b_n$ is a q x q Toeplitz matrix $\Theta$, which holds D
and the kernel of the other direction too. With $E_s = a^{q-1-s} b$ entering the tokens into the state,
$R_t = c a^{t+1}$ reading it and $w = a^q$ across a chunk,

    y = \Theta u + \mathrm{Re}\, R S, \qquad S' = w S + E u

of the state S before the chunk and S' after it. In planes (real and imaginary parts) of S the adjoint is the same walk
the other way, with $\Theta^T$, $R^T$ for E, $E^T$ for R and $w^*$: of the cotangent of y it makes that of u as its y,
and those of all S' as its states G. Those of the tables are sums over chunks: $\bar\Theta = \bar y u^T$,
$\bar E = G u^T$, $\bar R = \bar y S^T$, $\bar w = G S^*$.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.associative_scan import associative_scan
from kernels_pallas.associative_scan.reference import conjugate, times
from kernels_pallas.dispatch import rounded_product


class Tables(NamedTuple):
    """What a walk multiplies by, in p planes of n states: p = 2 for complex ones, m = p n."""

    theta_dqq: jax.Array | None  # None in the second direction: the first does both
    enter_dmq: jax.Array
    leave_dqm: jax.Array
    decay: tuple[jax.Array, ...]  # planes (d, n)

    def adjoint(self) -> "Tables":
        transpose = lambda x: None if x is None else jnp.swapaxes(x, 1, 2)  # noqa: E731
        theta, enter, leave = map(transpose, self[:3])
        return Tables(theta, leave, enter, conjugate(self.decay))


def tables(a, b, c, c_reverse, D, q: int) -> tuple[Tables, Tables | None]:
    """Of the walk to the right, and with c_reverse of the one to the left; of a, b, c (d, n) and D (d,)."""
    a_dnq = powers(a, q + 1)
    entering, decay = a_dnq[..., :q] * b[..., None], planes(a_dnq[..., q])

    def table(theta, enter_dnq, leave_dnq):
        leave = jnp.concatenate(conjugate(planes(leave_dnq)), 1)
        return Tables(theta, jnp.concatenate(planes(enter_dnq), 1), jnp.swapaxes(leave, 1, 2), decay)

    right = table(_toeplitz(a_dnq, b, c, c_reverse, D), jnp.flip(entering, -1), c[..., None] * a_dnq[..., 1:])
    if c_reverse is None:
        return right, None
    return right, table(None, entering, c_reverse[..., None] * jnp.flip(a_dnq[..., :q], -1))


def powers(a, count: int):
    """a^0 ... a^(count-1) along a new last axis, by doubling: no logarithm, so that a = 0 is no special case."""
    table, step = jnp.ones_like(a)[..., None], a
    while table.shape[-1] < count:
        table = jnp.concatenate([table, table * step[..., None]], -1)
        step = step * step
    return table[..., :count]


def planes(x) -> tuple[jax.Array, ...]:
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def _toeplitz(a_dnq, b, c, c_reverse, D):
    """(d, q, q): row t, column s holds K at lag t - s, with D at lag 0, and the reverse kernel at s - t - 1.

    One vector holds the lags 0, -1 ... 1 - q, an unused one, and q - 1 ... 1. Repeated as rows of which each
    is one entry shorter than the vector, it is one entry later in every row.
    """
    d, q = a_dnq.shape[0], a_dnq.shape[2] - 1
    kernel = lambda c: jnp.einsum("dnq,dn->dq", a_dnq[..., :q], c * b, precision="highest").real  # noqa: E731
    now = kernel(c)
    later = jnp.zeros_like(now) if c_reverse is None else kernel(c_reverse)
    by_lag = jnp.concatenate([now[:, :1] + D[:, None], later[:, : q - 1], jnp.zeros_like(D)[:, None]], 1)
    by_lag = jnp.concatenate([by_lag, jnp.flip(now[:, 1:], 1)], 1)
    rows = jnp.broadcast_to(by_lag[:, None], (d, q, 2 * q)).reshape(d, -1)[:, : q * (2 * q - 1)]
    return rows.reshape(d, q, 2 * q - 1)[:, :, :q]


def sweep(x_dbl, tables: Tables, h_dbm, reverse: bool, precision: str):
    """(y, the state after the last chunk, the states before every chunk (b, c, d, m)); l is a multiple of q."""
    d, batch, length = x_dbl.shape
    theta, enter, leave, decay = tables
    x = x_dbl.reshape(d, batch, -1, enter.shape[2])
    product = partial(rounded_product, dtype=x.dtype, precision=precision)
    states, last = _across_chunks(decay, product("dms,dbcs->bcdm", enter, x), h_dbm, reverse)
    y = product("dtm,bcdm->dbct", leave, states)
    y = y if theta is None else y + product("dts,dbcs->dbct", theta, x)
    return y.astype(x.dtype).reshape(x_dbl.shape), last, states


def gradients(x_dbl, dy_dbl, tables: Tables, states, costates, reverse: bool, precision: str) -> Tables:
    """The cotangents of the tables; states and costates are those of the two sweeps."""
    d, batch, length = x_dbl.shape
    _, enter, _, decay = tables
    x, dy = (z.reshape(d, batch, -1, enter.shape[2]) for z in (x_dbl, dy_dbl))
    product = partial(rounded_product, dtype=x.dtype, precision=precision)
    theta = None if tables.theta_dqq is None else product("dbct,dbcs->dts", dy, x)
    d_enter, d_leave = product("bcdm,dbcs->dms", costates, x), product("dbct,bcdm->dtm", dy, states)
    return Tables(theta, d_enter, d_leave, _decay_gradient(costates, states, len(decay)))


def _across_chunks(decay, summary_bcdm, h_dbm, reverse: bool):
    """The states before every chunk of the walk (b, c, d, m), and the one after its last (d, b, m)."""
    d, p = summary_bcdm.shape[2], len(decay)
    split = lambda x: tuple(x.reshape(*x.shape[:-2], -1) for x in jnp.split(x, p, -1))  # noqa: E731
    join = lambda x: jnp.concatenate([y.reshape(*y.shape[:-1], d, -1) for y in x], -1)  # noqa: E731
    number = lambda x: x if p == 2 else x[0]  # noqa: E731
    h = split(jnp.swapaxes(h_dbm, 0, 1))
    arguments = tuple(w.reshape(-1) for w in decay), split(summary_bcdm), h
    after, last = associative_scan(*map(number, arguments), reverse=reverse)
    after, last = (after, last) if p == 2 else ((after,), (last,))
    before = [(x[:, 1:], y[:, None]) if reverse else (y[:, None], x[:, :-1]) for x, y in zip(after, h, strict=True)]
    return join([jnp.concatenate(parts, 1) for parts in before]), jnp.swapaxes(join(last), 0, 1)


def _decay_gradient(costates, states, p: int) -> tuple:
    """The cotangents of the planes of w, of the states S before and the cotangents G of those after: G S^*."""
    g, s = (tuple(jnp.split(x, p, -1)) for x in (costates, states))
    return tuple(x.sum((0, 1)) for x in times(g, conjugate(s)))


def apply_table(equation, table, x, **matrix):
    """An einsum of a table (d, n, ...), real or complex, with a real array, as one real product."""
    if not jnp.iscomplexobj(table):
        return jnp.einsum(equation, table, x, **matrix)
    n = table.shape[1]
    both = jnp.einsum(equation, jnp.concatenate([table.real, table.imag], 1), x, **matrix)
    return jax.lax.complex(both[..., :n], both[..., n:])
