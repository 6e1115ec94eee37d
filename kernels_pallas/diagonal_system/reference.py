"""A diagonal state space model one token after another: the definition."""

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import at_least_float32, varying_like


def run(u_bld, a_n, B_nd, C_dn, D_d, h_bn, reset_bl, reverse: bool):
    """(y, last state) of complex a, B, C, h; a reset forgets h before its token."""
    keep = jnp.ones(u_bld.shape[:2], bool) if reset_bl is None else ~reset_bl
    product = lambda equation, *x: jnp.einsum(equation, *x, precision="highest")  # noqa: E731

    def advance(h, xs):
        u_bd, keep_b = xs
        u_bd = u_bd.astype(at_least_float32(u_bld.dtype))
        h = jnp.where(keep_b[:, None], a_n[None] * h, 0) + product("nd,bd->bn", B_nd, u_bd.astype(B_nd.dtype))
        return h, (product("dn,bn->bd", C_dn, h).real + D_d[None] * u_bd).astype(u_bld.dtype)

    h_bn = varying_like(h_bn, u_bld, a_n, B_nd)
    last, y_lbd = jax.lax.scan(advance, h_bn, (jnp.moveaxis(u_bld, 1, 0), keep.T), reverse=reverse)
    return jnp.moveaxis(y_lbd, 0, 1), last
