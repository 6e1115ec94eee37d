"""What the kernels for GPUs and for TPUs share: float32 factors as sums of bfloat16 parts, and what they refuse."""

import jax
import jax.numpy as jnp

from kernels_pallas.long_convolution.xla import Tables

PARTS = {"default": 1, "high": 2, "highest": 3}  # bfloat16 parts of a float32, by precision


def parts(table: jax.Array, count: int) -> jax.Array:
    """(d, count, rows, columns): bfloat16 arrays whose sum is the table, as near as so many come."""
    parts = []
    for _ in range(count):
        parts.append(jax.lax.reduce_precision(table, 8, 7))
        table = table - parts[-1]
    return jnp.stack(parts, 1).astype(jnp.bfloat16)


def planes(tables: Tables) -> tuple[int, int]:
    """How many planes of how many states."""
    return len(tables.decay), tables.decay[0].shape[1]


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def refusal(u, a: jax.Array, precision: str, *, group: int, shortest: int, most_states: int) -> str:
    """Why a kernel that takes groups of sequences cannot run u, like (b, l, d), and a (d, n); "" where it can."""
    batch, length, _ = u.shape
    if precision not in PARTS:
        return f"the precision is {precision!r}, not one of {', '.join(PARTS)}"
    if u.dtype not in (jnp.float32, jnp.bfloat16) or a.real.dtype != jnp.float32:
        return f"u is {u.dtype} and a {a.dtype}; it takes float32 or bfloat16, and float32 or complex64"
    if batch % group:
        return f"the batch is {batch}, no multiple of {group}"
    if length < shortest:
        return f"the length is {length}, less than {shortest}"
    if a.shape[1] > most_states:
        return f"there are {a.shape[1]} states a channel, more than {most_states}"
    return ""
