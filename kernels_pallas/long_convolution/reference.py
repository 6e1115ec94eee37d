"""A diagonal state space model one token after another: the definition, and the form that can forget."""

import jax
import jax.numpy as jnp


def run(u, a, b, c, c_reverse, h, reset):
    """(y, last state) of complex or real a, b, c (d, n), u (b, l, d), h (b, d, n), reset (b, l) or None."""
    keep = jnp.ones(u.shape[:2], bool) if reset is None else ~reset
    u_lbd, keep_lb11 = jnp.moveaxis(u, 1, 0), keep.T[:, :, None, None]

    def advance(h, xs):
        u_bd, keep_b11 = xs
        h = jnp.where(keep_b11, a[None] * h, 0) + _outer(u_bd, b)
        return h, _read(c, h)

    last, y_lbd = jax.lax.scan(advance, h, (u_lbd, keep_lb11))
    if c_reverse is not None:

        def retreat(g, xs):
            u_bd, keep_b11 = xs
            return jnp.where(keep_b11, a[None] * g + _outer(u_bd, b), 0), _read(c_reverse, g)

        y_lbd += jax.lax.scan(retreat, jnp.zeros_like(h), (u_lbd, keep_lb11), reverse=True)[1]
    return jnp.moveaxis(y_lbd, 0, 1), last


def _outer(u_bd, b_dn):
    return u_bd[:, :, None].astype(b_dn.dtype) * b_dn[None]


def _read(c_dn, h_bdn):
    return jnp.einsum("dn,bdn->bd", c_dn, h_bdn, precision="highest").real
