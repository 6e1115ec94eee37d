r"""State space duality on TPUs: one walk over the chunks of a block of heads, their states in VMEM.

`tpu_tiles` says how heads share the lanes. All that a chunk of 128 rows needs stays in VMEM: x is read once, y is
written once, what B and C say to each other is found once for all heads of a block. Products are of bfloat16, summed in
float32; a state is rounded to bfloat16 only where it is read. Of float32 inputs all is in float32. Decays are powers
of 2 of differences of sums inside one chunk; a log2 decay below LEAST is 0 in float32 and is kept there, so that every
sum is finite. Under shard_map both kernels need check_vma=False.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.partition import over_batch
from kernels_pallas.ssd import tpu_backward
from kernels_pallas.ssd.tpu_tiles import LANES, Gates, Q, Walk, columns, dot

CHANNELS, STATES = (32, 64, 128), 256


def refusal(x, B, C, z) -> str:
    """Why x (b, l, [r,] h, p), B and C (b, l, [r,] g, n) cannot be run here; "" where they can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}; it takes float32 and bfloat16"
    for name, v in dict(B=B, C=C, z=z).items():
        if v is not None and v.dtype != x.dtype:
            return f"{name} is {v.dtype} and x is {x.dtype}"
    (*_, heads, p), n = x.shape, B.shape[-1]
    if p not in CHANNELS:
        return f"a head has {p} channels, not one of {', '.join(map(str, CHANNELS))}"
    if heads % (LANES // p):
        return f"there are {heads} heads, no multiple of {LANES // p}, whose channels fill {LANES} lanes"
    if n > STATES:
        return f"there are {n} states, more than {STATES}"
    if x.ndim == 5 and p % x.shape[2]:
        return f"the rank is {x.shape[2]}, which does not divide a head's {p} channels"
    return ""


def run(x, a, B, C, h, dt, D, z):
    """(y, last state), of what `refusal` takes; a and dt (b, l, h), h (b, h, p, n), D (h,) or (h, p), z like x."""
    batch, length, *ranks, heads, p = x.shape
    rank, n, groups, together = math.prod(ranks), B.shape[-1], B.shape[-2], LANES // p
    if (heads // groups) % together and together % (heads // groups):  # a tile would have parts of groups
        B, C = (jnp.repeat(v, heads // groups, -2) for v in (B, C))

    def rows(v, *shape):
        v = v.reshape(batch, length * rank, *v.shape[-2:])
        return jnp.pad(v, ((0, 0), (0, -length * rank % Q), (0, 0), (0, 0))).reshape(batch, -1, *shape)

    def gate(v, fill):
        rest = jnp.broadcast_to(fill, (batch, length, rank - 1, heads)).astype(v.dtype)
        return rows(jnp.concatenate([v[:, :, None], rest], 2)[..., None], heads)

    states = ((0, 0),) * 3 + ((0, -n % (16 if B.shape[-2] == 1 else LANES)),)
    x, z = (None if v is None else rows(v, heads, p) for v in (x, z))
    B, C = (jnp.pad(rows(v, v.shape[-2], n), states) for v in (B, C))
    h = jnp.moveaxis(jnp.pad(h, states), 3, 1)
    y, h = _fused(x, gate(a, jnp.zeros(())), gate(dt, dt[:, :, None]), B, C, D, h, z, rank)
    return y[:, : length * rank].reshape(batch, length, *ranks, heads, p), jnp.moveaxis(h[:, :n], 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _fused(x, a, dt, B, C, D, h, z, rank):
    """(y, the last state) with a, dt (b, l, h), D (h,) or (h, p) and states (b, n, h, p)."""
    return _forward(x, a, dt, B, C, D, h, z, rank, keep=False)


def _forward(x, a, dt, B, C, D, h, z, rank, keep):
    walk = Walk.of(x, B, z, rank)
    skip = jnp.broadcast_to(D.reshape(D.shape[0], -1), x.shape[2:])
    arrays = [x, walk.gates(a, dt), B, C, skip, h] + [z] * (z is not None)
    axes = "b l h p, b k c i q, b l g n, b l g n, h p, b n h p" + ", b l h p" * (z is not None)
    results = "b l h p, b n h p" + ", b s n d" * keep
    return over_batch(lambda *arrays: forward(*arrays, rank=rank, keep=keep), axes, results)(*arrays)


def _forward_and_residuals(x, a, dt, B, C, D, h, z, rank):
    y, last, states = _forward(x, a, dt, B, C, D, h, z, rank, keep=True)
    return (y, last), (x, a, dt, B, C, D, z, states)


def _backward(rank, saved, cotangents):
    return tpu_backward.cotangents(*saved, *cotangents, rank)


_fused.defvjp(_forward_and_residuals, _backward)


@partial(jax.jit, static_argnames=("rank", "keep"))  # lowered once for all layers
def forward(x, gates, B, C, D, h, z=None, *, rank: int, keep: bool) -> tuple:
    """(y, the last state[, the state (b, spans, n, h p) before every span]).

    x (b, l, h, p), B and C (b, l, g, n), D (h, p), states (b, n, h, p); gates as `Walk.gates` has them.
    """
    walk = Walk.of(x, B, z, rank)

    def kernel(x_ref, gates_ref, B_ref, C_ref, D_ref, h_ref, *refs):
        *z_ref, y_ref, last_ref = refs[: (z is not None) + 2]
        *states_ref, columns_ref, scores_ref, keys_ref = refs[(z is not None) + 2 :]

        @pl.when(pl.program_id(2) == 0)
        def _():
            last_ref[...] = h_ref[...]

        for ref in states_ref:
            ref[...] = last_ref[...]

        def chunk(c, _):
            rows = pl.ds(pl.multiple_of(c * Q, Q), Q)
            columns_ref[...] = columns(gates_ref[c, : 2 * walk.heads])
            walk.scores(scores_ref, B_ref[rows], C_ref[rows])
            keys_ref[...] = B_ref[rows].T

            def tile(t, _):
                lanes = pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
                gate, x = Gates.of(walk, gates_ref.at[c], columns_ref, t), x_ref[rows, lanes].astype(jnp.float32)
                state, scaled = last_ref[:, lanes], x * gate.dt
                y = walk.inside(scores_ref, gate, scaled.astype(x_ref.dtype))
                y += walk.read(C_ref[rows], state.astype(x_ref.dtype)) * gate.to_here + D_ref[:, lanes] * x
                if z is not None:
                    half = z_ref[0][rows, lanes].astype(jnp.float32) * 0.5
                    y *= half + half * jnp.tanh(half)  # silu
                y_ref[rows, lanes] = y.astype(y_ref.dtype)
                last_ref[:, lanes] = walk.write(keys_ref, gate, state, (scaled * gate.to_end).astype(x_ref.dtype))

            jax.lax.fori_loop(0, walk.tiles, tile, None)

        jax.lax.fori_loop(0, walk.chunks, chunk, None)

    flat = lambda v: v.reshape(*v.shape[:-2], -1)  # noqa: E731
    inputs = [("rows", flat(x)), ("gates", gates), ("group", flat(B)), ("group", flat(C)), ("head", flat(D)[None])]
    inputs += [("state", flat(h))] + ([] if z is None else [("rows", flat(z))])
    outputs = [("rows", _like(flat(x))), ("state", _like(flat(h)))]
    outputs += [("states", jax.ShapeDtypeStruct((len(x), walk.grid[2], *flat(h).shape[1:]), jnp.float32))] * keep
    y, last, *states = walk.launch(kernel, inputs, outputs, walk.scratch(x.dtype))
    return y.reshape(x.shape), last.reshape(h.shape), *states


def _like(v):
    return jax.ShapeDtypeStruct(v.shape, v.dtype)
