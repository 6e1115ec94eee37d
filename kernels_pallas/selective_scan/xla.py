"""Chunk after chunk: the gradient keeps one state a chunk and makes the others again."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.associative_scan import associative_scan
from kernels_pallas.selective_scan import reference


def run(x_bld, dt_bld, A_dn, B_bln, C_bln, reset, h_bdn, chunk_size: int):
    """As `reference.run`."""

    def inside(h_bdn, x, dt, B, C, reset):
        if jax.default_backend() == "cpu":
            return reference.run(x, dt, A_dn, B, C, reset, h_bdn)
        return tree(jnp.exp(dt[..., None] * A_dn[None, None]), (dt * x)[..., None] * B[:, :, None], C, reset, h_bdn)

    return by_chunks(inside, chunk_size, h_bdn, (x_bld, dt_bld, B_bln, C_bln, reset))


def tree(decay_bldn, drive_bldn, C_bln, reset, h_bdn):
    """(C h, h after the last token) of all states at once, by an associative scan."""
    flat = lambda v: v.reshape(*v.shape[:-2], -1)  # noqa: E731
    h, last = associative_scan(flat(decay_bldn), flat(drive_bldn), flat(h_bdn), reset=reset, implementation="xla")
    return jnp.sum(C_bln[:, :, None] * h.reshape(drive_bldn.shape), -1), last.reshape(h_bdn.shape)


def by_chunks(inside: Callable, q: int, h, arrays: tuple) -> tuple:
    """(y_bld, h) of (y_bqd, h) = inside(h, *chunks of the arrays), chunk after chunk of q tokens.

    The last is padded with zeros, and where time and input are 0 the state stays as it is. In the backward pass every
    chunk is computed again.
    """
    length = arrays[0].shape[1]
    q = min(q, length)

    def split(v):
        v = jnp.pad(v, ((0, 0), (0, -length % q)) + ((0, 0),) * (v.ndim - 2))
        return jnp.moveaxis(v.reshape(len(v), -1, q, *v.shape[2:]), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def advance(h, chunk):
        y, h = inside(h, *chunk)
        return h, y

    last, y_cbqd = jax.lax.scan(advance, h, jax.tree.map(split, arrays))
    return jnp.moveaxis(y_cbqd, 0, 1).reshape(*arrays[0].shape[:1], -1, *y_cbqd.shape[3:])[:, :length], last
