r"""State space duality on NVIDIA Hopper GPUs: one walk over the chunks of a head, its state in registers.

A warpgroup takes one head, and shares B and C with the next head of the group; a further warpgroup fetches what they
read. All that a chunk of 64 lanes needs stays in shared memory and registers: x is read once, y is written once. The
lanes of a token follow one another, the first with its decay, the others with none. Products are of bfloat16, summed
in float32; a state is rounded to bfloat16 only where it is read. Decays are powers of 2 of differences of sums inside
one chunk; a log2 decay below LEAST is 0 in float32 and is kept there, so that every sum is finite.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.partition import over_batch
from kernels_pallas.ssd import gpu_backward
from kernels_pallas.ssd import gpu_tiles as tile
from kernels_pallas.ssd.gpu_tiles import COLUMNS, ROWS, Q
from kernels_pallas.ssd.gpu_walk import Segments

STAGES = 2
CHANNELS = (32, 64, 128)
STATES, MOST_STATES = 128, 256  # of a walk; of several, whose outputs are summed


def refusal(x, B, C, z) -> str:
    """Why x (b, l, [r,] h, p), B and C (b, l, [r,] g, n) cannot be run here; "" where they can."""
    for name, v in dict(x=x, B=B, C=C, z=z).items():
        if v is not None and v.dtype != jnp.bfloat16:
            return f"{name} is {v.dtype}, and its products are of bfloat16"
    if x.shape[-1] not in CHANNELS:
        return f"a head has {x.shape[-1]} channels, not one of {', '.join(map(str, CHANNELS))}"
    if B.shape[-1] > MOST_STATES:
        return f"there are {B.shape[-1]} states, more than {MOST_STATES}"
    if x.ndim == 5 and Q % x.shape[2]:
        return f"the rank is {x.shape[2]}, which does not divide {Q}"
    return ""


def run(x, a, B, C, h, dt, D, z):
    """(y, last state), of what `refusal` takes; a and dt (b, l, h), h (b, h, p, n), D (h,) or (h, p), z like x.

    No state meets another one before the sum over states: more than `STATES` walk in blocks.
    """
    if (n := B.shape[-1]) <= STATES:
        return _walk(x, a, B, C, h, dt, D, z)
    blocks = [slice(i, i + STATES) for i in range(0, n, STATES)]
    skips = [D] + [jnp.zeros_like(D)] * (len(blocks) - 1)
    parts = [
        _walk(x, a, B[..., block], C[..., block], h[..., block], dt, skip, None)
        for block, skip in zip(blocks, skips, strict=True)
    ]
    y = sum(part.astype(jnp.float32) for part, _ in parts)
    y = y if z is None else y * jax.nn.silu(z.astype(jnp.float32))
    return y.astype(x.dtype), jnp.concatenate([last for _, last in parts], -1)


def _walk(x, a, B, C, h, dt, D, z):
    """As `run`, of at most `STATES` states."""
    batch, length, *ranks, heads, p = x.shape
    rank, n, blocks = math.prod(ranks), B.shape[-1], max(1, p // Q)

    def lanes(v, *shape):
        v = v.reshape(batch, length * rank, *v.shape[-2:])
        return jnp.pad(v, ((0, 0), (0, -length * rank % Q), (0, 0), (0, 0))).reshape(batch, -1, *shape)

    def gate(v, fill):
        rest = jnp.broadcast_to(fill, (batch, length, rank - 1, heads)).astype(v.dtype)
        every = jnp.concatenate([v[:, :, None], rest], 2)
        return jnp.repeat(lanes(every[..., None], heads), blocks, 2)

    states = ((0, 0),) * 3 + ((0, -n % Q),)
    x, z = (None if v is None else lanes(v, heads * blocks, p // blocks) for v in (x, z))
    B, C = (jnp.pad(lanes(v, v.shape[-2], n), states) for v in (B, C))
    h = jnp.swapaxes(jnp.pad(h.reshape(batch, heads * blocks, -1, n), states), 2, 3)
    D = jnp.repeat(D, blocks) if D.ndim == 1 else D.reshape(heads * blocks, -1)
    y, h = _fused(x, gate(a, jnp.zeros(())), gate(dt, dt[:, :, None]), B, C, D, h, z, rank)
    y = y[:, : length * rank].reshape(batch, length, *ranks, heads, p)
    return y, jnp.swapaxes(h[:, :, :n], 2, 3).reshape(batch, heads, p, n)


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _fused(x, a, dt, B, C, D, h, z, rank):
    """(y, the last state) with a, dt (b, l, h), D (h,) or (h, p) and states (b, h, n, p)."""
    return _forward(x, a, dt, B, C, D, h, z, rank)[0]


def _forward(x, a, dt, B, C, D, h, z, rank):
    """((y, the last state), the state that enters every segment)."""
    segments = Segments.of(x)
    gates, (x_cut, B_cut, C_cut, z_cut) = segments.gates(a, dt), map(segments.cut, (x, B, C, z))
    entering = segments.entering(x_cut, gates, B_cut, h, reverse=False)
    D = jnp.broadcast_to(D.reshape(D.shape[0], -1), (D.shape[0], x.shape[-1]))
    arrays = [x_cut, gates, B_cut, C_cut, entering, D] + [z_cut] * (z is not None)
    axes = "b l h p, b h c i q, b l g n, b l g n, b h n p, h p" + ", b l h p" * (z is not None)
    y, last = over_batch(lambda *arrays: forward(*arrays, rank=rank), axes, "b l h p, b h n p")(*arrays)
    return (y.reshape(x.shape), segments.last(last)), entering


def _forward_and_residuals(x, a, dt, B, C, D, h, z, rank):
    (y, last), entering = _forward(x, a, dt, B, C, D, h, None, rank)
    out = y if z is None else (y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(y.dtype)
    return (out, last), (x, a, dt, B, C, D, entering, z, None if z is None else y)


def _backward(rank, saved, cotangents):
    (*arrays, z, y), (dy, d_last) = saved, cotangents
    dz = None
    if z is not None:
        gated = lambda y, z: y * jax.nn.silu(z)  # noqa: E731
        _, pull = jax.vjp(gated, y.astype(jnp.float32), z.astype(jnp.float32))
        dy, dz = (v.astype(z.dtype) for v in pull(dy.astype(jnp.float32)))
    return *gpu_backward.cotangents(*arrays, dy, d_last, rank), dz


_fused.defvjp(_forward_and_residuals, _backward)


@partial(jax.jit, static_argnames="rank")  # lowered once for all layers
def forward(x, gates, B, C, h, D, z=None, *, rank: int):
    """(y, the last state) of x (b, l, h, p), B and C (b, l, g, n), states (b, h, n, p) and D (h, p).

    gates: (b, h, c, 2, q), the log2 decay from the start of its chunk to every lane, and dt.
    """
    (_, length, _, p), n = x.shape, B.shape[3]
    heads = tile.Heads.of(x, B)

    def copies(refs, s, step, slot):
        (x_ref, gates_ref, B_ref, C_ref), (b, head, group) = refs[:4], heads.place()
        rows = pl.ds(step * Q, Q)
        yield B_ref.at[b, rows, group], s["B"].at[slot]
        yield C_ref.at[b, rows, group], s["C"].at[slot]
        for k in range(heads.together):
            yield gates_ref.at[b, head + k, step], s["gates"].at[slot, k]
            yield x_ref.at[b, rows, head + k], s["x"].at[slot, k]
            if z is not None:
                yield refs[6].at[b, rows, head + k], s["z"].at[slot, k]

    def kernel(refs, s, thread):
        (h_ref, D_ref), (y_ref, last_ref), (b, head, _) = refs[4:6], refs[-2:], heads.place()
        head += thread
        start = tile.load(h_ref.at[b, head], shared=False)
        s["state"].at[thread][...] = start.astype(jnp.bfloat16)
        plgpu.commit_smem()

        def visit(i, h):
            slot, out = jax.lax.rem(i, STAGES), s["weighted"].at[thread]
            plgpu.barrier_wait(s["arrived"].at[slot])
            y, h = _chunk(s, thread, slot, rank, h)
            s["state"].at[thread][...] = h.astype(jnp.bfloat16)
            skip = tile.over_rows(tile.load(D_ref.at[head], COLUMNS, shared=False), Q)
            y += skip * tile.load(s["x"].at[slot, thread])
            if z is not None:
                y *= tile.silu(tile.load(s["z"].at[slot, thread]))
            plgpu.barrier_arrive(s["used"].at[slot])
            plgpu.commit_smem()
            out[...] = y.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, y_ref.at[b, pl.ds(i * Q, Q), head])
            return h

        last_ref[b, head] = jax.lax.fori_loop(0, length // Q, visit, start)
        plgpu.wait_smem_to_gmem(0)

    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(h.shape, jnp.float32)
    inputs = (x, gates, B, C, h, D) + (() if z is None else (z,))
    scratch = _scratch(p, n, heads.together, gated=z is not None)
    return tile.launch(kernel, copies, inputs, out_type, scratch, heads.grid, heads.together, length // Q)


def _scratch(p: int, n: int, together: int, gated: bool) -> dict:
    made = partial(tile.matrix, p)
    return {
        "stages": STAGES,
        "copies": 2 + (2 + gated) * together,
        **{name: made(Q, n, STAGES) for name in ("B", "C")},
        **{name: made(Q, p, STAGES, together) for name in ("x", "z")[: 1 + gated]},
        "gates": tile.vectors(STAGES, together, 2),
        "scores": made(Q, Q, together),
        "weighted": made(Q, p, together),
        "state": made(n, p, together),
    }


def _chunk(s, thread, slot, rank: int, h) -> tuple:
    """What the tokens of a chunk read, and the state after it, from the one before, which s has too."""
    B, C, x_tile = s["B"].at[slot], s["C"].at[slot], s["x"].at[slot, thread]
    sums, dt = s["gates"].at[slot, thread, 0], s["gates"].at[slot, thread, 1]
    within, weighted = s["scores"].at[thread], s["weighted"].at[thread]
    scores, y = tile.products((C, B.T), (C, s["state"].at[thread]))
    scores *= tile.decay(sums, rank) * tile.over_rows(tile.load(dt, COLUMNS), Q)
    within[...] = scores.astype(jnp.bfloat16)
    x = tile.load(x_tile) * tile.over_columns(tile.to_end(sums) * tile.load(dt, ROWS), x_tile.shape[1])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    weighted[...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()
    y *= tile.over_columns(tile.to_here(sums), y.shape[1])
    h *= tile.through(sums, *h.shape)
    return tile.accumulate((y, within, x_tile), (h, B.T, weighted))
