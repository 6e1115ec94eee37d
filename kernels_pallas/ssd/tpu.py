r"""State space duality on TPUs: one walk over the chunks of a block of heads, their states in VMEM.

`tpu_tiles` says how heads share the lanes. All that a chunk of 128 rows needs stays in VMEM: x is read once, y is
written once, and what B and C say to each other is found once for all heads of a block. Products are of bfloat16,
summed in float32; a state is rounded to bfloat16 only where it is read, and where it is kept for the gradients, once a
span. Of float32 inputs all is in float32. Decays are powers of 2 of differences of sums inside one chunk; a log2 decay
below LEAST is 0 in float32 and is kept there, so that every sum is finite. Under shard_map both kernels need
check_vma=False.
"""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.partition import over_batch
from kernels_pallas.ssd import tpu_backward
from kernels_pallas.ssd.tpu_tiles import LANES, Q
from kernels_pallas.ssd.tpu_walk import Walk, chunk, flat, like

CHANNELS, STATES = (32, 64, 128), 256
AT_ONCE = 8  # tiles whose latencies overlap, at most


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

    def kernel(r):
        @pl.when(pl.program_id(2) == 0)
        def _():
            r.last[...] = r.h[...]

        if keep:
            r.states[...] = r.last[...].astype(x.dtype)

        walk.enter(r)

        def visit(c, _):
            walk.tile.score(r.scores, r.B[chunk(c)], r.C[chunk(c)])
            walk.visit(partial(_tile, walk, r, c), AT_ONCE)

        jax.lax.fori_loop(0, walk.chunks, visit, None)

    inputs = dict(x=("rows", flat(x)), gates=("gates", gates), B=("group", flat(B)), C=("group", flat(C)))
    inputs |= dict(D=("head", flat(D)[None]), h=("state", flat(h)))
    inputs |= {} if z is None else dict(z=("rows", flat(z)))
    outputs = dict(y=("rows", like(flat(x))), last=("state", like(flat(h))))
    if keep:
        outputs |= dict(states=("states", like(flat(h), walk.grid[2], dtype=x.dtype)))
    y, last, *states = walk.launch(kernel, inputs, outputs, walk.scratch(x.dtype)).values()
    return y.reshape(x.shape), last.reshape(h.shape), *states


def _tile(walk: Walk, r: SimpleNamespace, c, t):
    """What rows of a tile read, and the state after them."""
    rows, lanes = chunk(c), chunk(t)
    gate, x, state = walk.load(r, c, t), r.x[rows, lanes].astype(jnp.float32), r.last[:, lanes]
    scaled = x * gate.dt
    y = walk.tile.inside(r.scores, gate, scaled.astype(r.x.dtype)) + r.D[:, lanes] * x
    y += walk.tile.read(r.C[rows], state.astype(r.x.dtype)) * gate.to_here
    if hasattr(r, "z"):
        half = r.z[rows, lanes].astype(jnp.float32) * 0.5
        y *= half + half * jnp.tanh(half)  # silu
    yield r.y, (rows, lanes), y
    yield (
        r.last,
        (slice(None), lanes),
        walk.tile.write(r.keys.at[c], gate, state, (scaled * gate.to_end).astype(r.x.dtype)),
    )
