"""A diagonal state space model as two projections and the recurrence between them, whose states are all made."""

import jax.numpy as jnp

from kernels_pallas.associative_scan import associative_scan
from kernels_pallas.dispatch import at_least_float32, rounded_product


def run(u_bld, into_md, decay: tuple, out_md, D_d, h_bm, *, reset, reverse: bool, precision: str, scan: str):
    """(y, last state) of planes: m = 2 n is the real parts of n states, then the imaginary ones. scan: implementation
    of the recurrence."""
    rounded = u_bld.dtype if precision == "default" else at_least_float32(u_bld.dtype)
    v = rounded_product("bld,md->blm", u_bld, into_md, rounded, precision)
    pair = lambda x: tuple(jnp.split(x, 2, -1))  # noqa: E731
    states, last = associative_scan(decay, pair(v), pair(h_bm), reverse=reverse, reset=reset, implementation=scan)
    y = rounded_product("blm,md->bld", jnp.concatenate(states, -1), out_md, rounded, precision)
    return (y + D_d[None, None] * u_bld.astype(y.dtype)).astype(u_bld.dtype), jnp.concatenate(last, -1)
