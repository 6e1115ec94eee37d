"""Where the kernel for TPUs keeps the states: those of several channels side by side in the lanes of a register.

The real planes of all of them come first, then the imaginary ones, each channel's in a slot of equal width, of which
the last lanes may be unused; so a roll by half the lanes exchanges the planes.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.long_convolution.xla import Tables

LANES = 128
STATES = LANES // 2  # complex, of one channel


def _wider(x: jax.Array, p: int, group: int) -> jax.Array:
    """Columns (d, r, p planes of n states) as (d, r, 2, STATES / group), the missing ones 0."""
    x = x.reshape(*x.shape[:2], p, -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 2 - p), (0, STATES // group - x.shape[-1])))


def spread(x: jax.Array, p: int, group: int) -> jax.Array:
    """Columns (d, r, p n) in the lanes of their channel, 0 in those of the others: (d, r, LANES)."""
    d, r = x.shape[:2]
    x = _wider(x, p, group).reshape(d // group, group, r, 2, 1, -1)
    mine = jnp.eye(group, dtype=x.dtype)[None, :, None, None, :, None]
    return (x * mine).reshape(d, r, LANES)


def own(x: jax.Array, p: int, n: int, group: int) -> jax.Array:
    """Of (d, r, LANES) what is in a channel's own lanes: (d, r, p n)."""
    d, r = x.shape[:2]
    x = x.reshape(d // group, group, r, 2, group, STATES // group)
    return jnp.einsum("agrpgn->agrpn", x)[..., :p, :n].reshape(d, r, p * n)


def enter(tables: Tables, group: int) -> jax.Array:
    """(d, CHUNK, LANES)."""
    return spread(jnp.swapaxes(tables.enter_dmq, 1, 2), len(tables.decay), group)


def leave(tables: Tables, group: int) -> jax.Array:
    """(d, LANES, CHUNK)."""
    return jnp.swapaxes(spread(tables.leave_dqm, len(tables.decay), group), 1, 2)


def to_lanes(h: jax.Array, p: int, group: int) -> jax.Array:
    """(d, b, p n) as (d / group, b, LANES)."""
    d, batch, _ = h.shape
    h = _wider(h, p, group).reshape(d // group, group, batch, 2, -1)
    return jnp.moveaxis(h, 1, 3).reshape(d // group, batch, LANES)


def from_lanes(h: jax.Array, p: int, n: int, group: int) -> jax.Array:
    """What `to_lanes` made of."""
    groups, batch, _ = h.shape
    h = jnp.moveaxis(h.reshape(groups, batch, 2, group, -1), 3, 1)
    return h[..., :p, :n].reshape(groups * group, batch, p * n)


def decay(tables: Tables, group: int) -> jax.Array:
    """(d / group, 2, LANES): what multiplies a state's own plane, and its other one."""
    real, *imaginary = tables.decay
    imaginary = imaginary[0] if imaginary else jnp.zeros_like(real)
    rows = jnp.stack([jnp.concatenate(x, 1) for x in ((real, real), (-imaginary, imaginary))], 1)
    return to_lanes(rows, 2, group)
