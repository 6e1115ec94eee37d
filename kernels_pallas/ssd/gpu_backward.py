r"""The gradients of state space duality on NVIDIA Hopper GPUs.

A walk finds the state that enters every chunk, the same walk the other way what every chunk's state means for the
tokens behind it. With both known all chunks are independent: a pair of warpgroups takes one chunk and goes over
the heads of a group, so that the cotangents of B and C are summed in registers.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.partition import over_batch
from kernels_pallas.ssd import gpu_tiles as tile
from kernels_pallas.ssd.gpu_tiles import COLUMNS, LEAST, ROWS, Q
from kernels_pallas.ssd.gpu_walk import Segments, clipped, walk

STAGES = 3
BUSY = 264  # pairs of warpgroups: with fewer, several share a chunk


def cotangents(x, a, dt, B, C, D, entering, dy, d_last, rank: int) -> tuple:
    """The cotangents of x, a, dt, B, C, D and the first state; arguments as in `gpu._fused`."""
    segments, per_group = Segments.of(x), x.shape[2] // B.shape[2]
    gates, (x_cut, B_cut, C_cut, dy_cut) = segments.gates(a, dt), map(segments.cut, (x, B, C, dy))
    states, _ = walk(x_cut, gates, B_cut, entering, reverse=False)
    leaving = segments.entering(dy_cut, gates, C_cut, d_last, reverse=True)
    costates, dh = walk(dy_cut, gates, C_cut, leaving, reverse=True)
    splits, pairs = 1, x.shape[0] * x.shape[1] // Q * B.shape[2]
    while pairs * splits < BUSY and per_group % (2 * splits) == 0:
        splits *= 2
    wide = jnp.broadcast_to(D.reshape(D.shape[0], -1), (D.shape[0], x.shape[-1]))
    arrays = x_cut, gates, B_cut, C_cut, wide, dy_cut, states, costates
    axes = "b l h p, b h c i q, b l g n, b l g n, h p, b l h p, b h c n p, b h c n p"
    run = lambda *arrays: gradients(*arrays, rank=rank, splits=splits)  # noqa: E731
    dx, dB, dC, sums = over_batch(run, axes, "b l h p, b s l g n, b s l g n, b h c j q")(*arrays)
    da, ddt, dD = _of_gates(sums, gates[:, :, :, 1])
    da = jnp.where(clipped(a) > LEAST, da.reshape(a.shape), 0)
    dD = dD if D.ndim == 1 else jnp.einsum("blhp,blhp->hp", x, dy, preferred_element_type=jnp.float32)
    dB, dC = (v.sum(1).reshape(B.shape).astype(B.dtype) for v in (dB, dC))
    return dx.reshape(x.shape), da, ddt.reshape(dt.shape), dB, dC, dD, segments.last(dh, reverse=True)


def _of_gates(sums, dt):
    """The cotangents of log decays and of dt (b, l, h), and of D (h,), from the sums of `gradients`; dt (b, h, c, q).

    A log decay scales all that crosses it: what a later lane of its chunk reads of a lane before it, or of the state
    at the start, what the end keeps of a lane before it, and what goes all the way through.
    """
    read, through, inside, beyond, skipped = (sums[:, :, :, i] for i in range(5))
    since = np.triu(np.ones((Q, Q), np.float32))
    da = jnp.einsum("tq,bhcq->bhct", since, read - dt * (inside + beyond), precision="highest")
    da += (through + dt * beyond).sum(-1, keepdims=True)
    return jnp.moveaxis(da, 1, -1), jnp.moveaxis(inside + beyond, 1, -1), skipped.sum((0, 2, 3))


@partial(jax.jit, static_argnames=("rank", "splits"))  # lowered once for all layers
def gradients(x, gates, B, C, D, dy, states, costates, *, rank: int, splits: int):
    """(dx, dB and dC (b, splits, l, g, n), and sums (b, h, c, 5, q)); arguments as in `gpu.forward`, and from `walk`.

    The sums have, for every lane, what dy says to all it reads, parts of what dy's state says to x's state all the
    way through the chunk, what x says to all that reads it in the chunk and beyond, and what x says to dy.
    """
    (batch, length, heads, p), (groups, n) = x.shape, B.shape[2:]
    steps = heads // groups // splits

    def place(step):
        block, chunk = jax.lax.axis_index("block"), jax.lax.axis_index("chunk")
        return jax.lax.axis_index("batch"), block * steps + step, chunk, pl.ds(chunk * Q, Q), jax.lax.div(block, splits)

    def copies(refs, s, step, slot):
        b, head, chunk, rows, _ = place(step)
        x_ref, gates_ref, _, _, _, dy_ref, states_ref, costates_ref, *_ = refs
        yield gates_ref.at[b, head, chunk], s["gates"].at[slot]
        yield x_ref.at[b, rows, head], s["x"].at[slot]
        yield dy_ref.at[b, rows, head], s["dy"].at[slot]
        yield states_ref.at[b, head, chunk], s["states"].at[slot]
        yield costates_ref.at[b, head, chunk], s["costates"].at[slot]

    of_group = jax.ShapeDtypeStruct((batch, splits, length, groups, n), jnp.float32)
    sums = jax.ShapeDtypeStruct((batch, heads, length // Q, 5, Q), jnp.float32)
    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype), of_group, of_group, sums
    grid = dict(block=groups * splits, chunk=length // Q, batch=batch)
    kernel = partial(_chunk, place, steps, splits, rank)
    arrays = x, gates, B, C, D, dy, states, costates
    return tile.launch(kernel, copies, arrays, out_type, _scratch(p, n), grid, 2, steps)


def _scratch(p: int, n: int) -> dict:
    made = partial(tile.matrix, p)
    return {
        "stages": STAGES,
        "copies": 5,
        **{name: made(Q, n) for name in ("B", "C")},
        **{name: made(Q, p, STAGES) for name in ("x", "dy")},
        **{name: made(n, p, STAGES) for name in ("states", "costates")},
        **{name: made(Q, Q) for name in ("scores", "dscores")},
        "gates": tile.vectors(STAGES, 2),
        "out": made(Q, p),
        **{name: plgpu.Barrier(num_arrivals=2) for name in ("loaded", "found")},
    }


def _chunk(place: Callable, steps: int, splits: int, rank: int, refs: list, s: dict, thread) -> None:
    """One chunk of all heads of a block: a warpgroup for dC, and one for dB and dx."""
    _, _, B_ref, C_ref, D_ref, _, _, _, dx_ref, dB_ref, dC_ref, sums_ref = refs
    b, _, _, rows, group = place(0)
    split = jax.lax.rem(jax.lax.axis_index("block"), splits)

    def all_heads(visit, left, right, *start):
        (scores,) = tile.products((left, right.T))

        def step(i, carry):
            slot, (_, head, chunk, _, _) = jax.lax.rem(i, STAGES), place(i)
            plgpu.barrier_wait(s["arrived"].at[slot])
            refs = D_ref.at[head], dx_ref.at[b, rows, head], sums_ref.at[b, head, chunk]
            carry = visit(s, slot, rank, refs, scores, carry)
            plgpu.barrier_arrive(s["used"].at[slot])
            return carry

        return jax.lax.fori_loop(0, steps, step, start)

    def finish(ref, sums, left, right):
        for block, total in zip(_blocks(s["B"].shape[1]), sums, strict=True):
            ref[b, split, rows, group, block] = tile.accumulate((total, left, right.at[:, block]))[0]

    @pl.when(thread == 0)
    def _():
        for source, target in ((B_ref, s["B"]), (C_ref, s["C"])):
            plgpu.copy_gmem_to_smem(source.at[b, rows, group], target, s["loaded"])

    plgpu.barrier_wait(s["loaded"])
    zero = plgpu.layout_cast(jnp.zeros((Q, Q), jnp.float32), tile.WGMMA)
    zeros = [zero for _ in _blocks(s["B"].shape[1])]

    @pl.when(thread == 0)
    def _():
        dC, total = all_heads(_queries, s["C"], s["B"], zeros, zero)
        s["dscores"][...] = total.astype(jnp.bfloat16)
        plgpu.commit_smem()
        tile.meet(s["found"])
        finish(dC_ref, dC, s["dscores"], s["B"])

    @pl.when(thread == 1)
    def _():
        (dB,) = all_heads(_keys, s["B"], s["C"], zeros)
        tile.meet(s["found"])
        finish(dB_ref, dB, s["dscores"].T, s["C"])
        plgpu.wait_smem_to_gmem(0)


def _blocks(n: int) -> list:
    """Of states: registers hold what is read of one at a time."""
    return [pl.ds(k, Q) for k in range(0, n, Q)]


def _queries(s, slot, rank: int, refs: tuple, scores, carry: tuple) -> tuple:
    """A head's part in dC, by blocks, and in the cotangent of the scores C B^T."""
    (dC, total), (*_, sums_ref) = carry, refs
    x, dy, state, costate = (s[name].at[slot] for name in ("x", "dy", "states", "costates"))
    sums, dt = s["gates"].at[slot, 0], s["gates"].at[slot, 1]
    (cotangent,) = tile.products((dy, x.T))
    left = tile.decay(sums, rank)
    cotangent *= tile.over_rows(tile.load(dt, COLUMNS), Q)
    # rounded as `_keys` does, beyond any simplification: of what the two find, almost all is to cancel in a log decay
    within = jax.lax.optimization_barrier((scores * left).astype(jnp.bfloat16))
    read = (within.astype(jnp.float32) * cotangent).sum(1)
    total += cotangent * left
    since, through = tile.over_columns(tile.to_here(sums), Q), 0
    for k, block in enumerate(_blocks(state.shape[0])):
        (before,) = tile.products((dy, state.at[block].T))
        before *= since
        dC[k] += before
        read += (before * tile.load(s["C"].at[:, block])).sum(1)
        through += (tile.load(state.at[block]) * tile.load(costate.at[block])).sum(1)
    sums_ref[0] = read
    sums_ref[1] = through * tile.through(sums, Q)
    return dC, total


def _keys(s, slot, rank: int, refs: tuple, scores, carry: tuple) -> tuple:
    """A head's part in dB, by blocks; and its dx. The scores are B C^T here."""
    ((dB,), (D_ref, dx_ref, sums_ref)), within, out = (carry, refs), s["scores"], s["out"]
    x_tile, dy_tile, costate = (s[name].at[slot] for name in ("x", "dy", "costates"))
    sums, dt = s["gates"].at[slot, 0], tile.load(s["gates"].at[slot, 1], ROWS)
    within[...] = (scores * tile.decay(sums, rank, transposed=True)).astype(jnp.bfloat16)
    sums_ref[4] = (tile.load(x_tile) * tile.load(dy_tile)).sum(1)
    plgpu.commit_smem()
    inside, beyond = tile.products((within, dy_tile), (s["B"], costate))
    x, to_end = tile.load(x_tile), tile.to_end(sums)
    beyond *= tile.over_columns(to_end, x.shape[1])
    sums_ref[2] = (x * inside).sum(1)
    sums_ref[3] = (x * beyond).sum(1)
    skip = tile.over_rows(tile.load(D_ref, COLUMNS, shared=False), Q)
    dx = tile.over_columns(dt, x.shape[1]) * (inside + beyond) + skip * tile.load(dy_tile)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out[...] = dx.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, dx_ref)
    weight = tile.over_columns(to_end * dt, Q)
    for k, block in enumerate(_blocks(costate.shape[0])):
        (written,) = tile.products((x_tile, costate.at[block].T))
        dB[k] += weight * written
    return (dB,)
