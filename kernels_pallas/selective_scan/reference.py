"""The recurrence as a loop over tokens: the definition."""

from functools import partial

import jax
import jax.numpy as jnp


def run(x_bld, dt_bld, A_dn, B_bln, C_bln, reset, h_bdn):
    """(C h, h after the last token), all in one dtype; reset may be None. The gradient keeps one state a token.

    The channels are the last axis here: it is the long one, and a CPU's vectors.
    """
    A_nd = A_dn.T

    @partial(jax.checkpoint, prevent_cse=False)
    def advance(h_bnd, token):
        x_bd, dt_bd, B_bn, C_bn, forget_b = token
        if forget_b is not None:
            h_bnd = jnp.where(forget_b[:, None, None], 0, h_bnd)
        drive_bnd = B_bn[..., None] * (dt_bd * x_bd)[:, None]
        h_bnd = jnp.exp(dt_bd[:, None] * A_nd[None]) * h_bnd + drive_bnd
        return h_bnd, jnp.sum(C_bn[..., None] * h_bnd, 1)

    in_time = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x_bld, dt_bld, B_bln, C_bln, reset))
    last, y_lbd = jax.lax.scan(advance, h_bdn.mT, in_time)
    return jnp.moveaxis(y_lbd, 0, 1), last.mT
