"""The angle of every lane, head and plane: summed once, as `rotation` sums, for the kernels that turn by it.

Numbers of 2^-32 turns add up without rounding, as their overflow is the full turn. What they come to is kept to 2^-16
of a turn: half of that is a hundredth of what a bfloat16 key is rounded by.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mamba3.gpu_tiles import BLOCK
from kernels_pallas.ssd import gpu_tiles as tile
from kernels_pallas.ssd.gpu_tiles import COLUMNS, ROWS, WGMMA, Q

HEADS = 64  # rows of a tile, and so the most that a warpgroup sums at once
TOGETHER = 4  # tokens between two waits: a chunk has at least so many
PER_RADIAN = np.float32(0.5 / np.pi)
REST = np.float32((0.5 / np.pi - float(PER_RADIAN)) * 2.0**32)
HALF = np.float32(2.0**16)
NEAREST = np.float32(1.5 * 2.0**23)  # added to a number, this leaves the nearest integer in the bits of the sum


def units(radians):
    """As `rotation.units`, up to 10^5 radians, without conversions, of which a GPU makes one in eight cycles."""
    turns = radians * PER_RADIAN
    turns = (turns - (_nearest(turns) - NEAREST)) * HALF
    high = _nearest(turns)
    low = _nearest((turns - (high - NEAREST)) * HALF)
    rest = _nearest(jnp.maximum(jnp.minimum(radians * REST, 2.0**22), -(2.0**22)))
    high, low, rest = (jax.lax.bitcast_convert_type(x, jnp.int32) for x in (high, low, rest))
    return high * 2**16 + ((low - NEAREST.view(np.int32)) + (rest - NEAREST.view(np.int32)))


def _nearest(x):
    return jax.lax.optimization_barrier(x + NEAREST)  # beyond any simplification


@partial(jax.jit, static_argnames="rank")  # lowered once for all layers
def sums(rate, theta, *, rank: int):
    """By how much every head and plane turns in a chunk (b, c, h, s), in units of 2^-32 turns.

    rate (b, l, h) and theta (b, l, s), in radians, of lanes, of which those of a token turn together, by its first.
    """
    batch, length, heads = rate.shape
    start = jnp.zeros((batch, length // Q, heads, theta.shape[2]), jnp.int32)
    return _run(rate, theta, start, rank, keep=False)


@partial(jax.jit, static_argnames="rank")
def angles(rate, theta, starts, *, rank: int):
    """Of every lane (b, l, h, s) the angle, in units of 2^-16 turns from minus half a turn, of the starts of chunks.

    starts (b, c, h, s) in units of 2^-32 turns, the rest as in `sums`.
    """
    return _run(rate, theta, starts, rank, keep=True)


def _run(rate, theta, starts, rank: int, keep: bool):
    (batch, length, heads), planes, chunks = rate.shape, theta.shape[2], starts.shape[1]
    rows = max(n for n in range(1, HEADS + 1) if heads % n == 0)
    blocks, padding = heads // rows, ((0, 0), (0, 0), (0, 0), (0, HEADS - rows))
    rate = jnp.pad(rate.reshape(batch, length, blocks, rows), padding)
    starts = jnp.pad(starts.reshape(batch, chunks, blocks, rows, planes), (*padding, (0, 0)))
    out = (batch, length // rank, rank, heads, planes), jnp.uint16
    run = plgpu.kernel(
        partial(_chunk, rank, rows, keep),
        out_type=jax.ShapeDtypeStruct(*out) if keep else jax.ShapeDtypeStruct(starts.shape, jnp.int32),
        grid=(blocks, chunks, batch),
        grid_names=("block", "chunk", "batch"),
        scratch_types=dict(
            rate=plgpu.SMEM((Q, HEADS), jnp.float32),
            theta=plgpu.SMEM((Q, planes), jnp.float32),
            arrived=plgpu.Barrier(num_arrivals=2),
            **(dict(out=plgpu.SMEM((2, TOGETHER, HEADS, planes), jnp.uint16)) if keep else {}),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    found = run(rate, theta, starts)
    return (
        found.reshape(batch, length, heads, planes) if keep else found[..., :rows, :].reshape(batch, chunks, heads, -1)
    )


def _chunk(
    rank: int, rows: int, keep: bool, rate_ref, theta_ref, starts_ref, out_ref, *, rate, theta, arrived, out=None
):
    """All lanes of a chunk, of one block of heads."""
    block, chunk, b = (jax.lax.axis_index(name) for name in ("block", "chunk", "batch"))
    lanes, heads = pl.ds(chunk * Q, Q), pl.ds(block * rows, rows)
    plgpu.copy_gmem_to_smem(rate_ref.at[b, lanes, block], rate, arrived)
    plgpu.copy_gmem_to_smem(theta_ref.at[b, lanes], theta, arrived)
    places = [pl.ds(at, BLOCK) for at in range(0, theta.shape[1], BLOCK)]
    start = [plgpu.load(starts_ref.at[b, chunk, block, :, at], layout=WGMMA, optimized=False) for at in places]
    plgpu.barrier_wait(arrived)

    def advance(i, totals):
        slot, totals = jax.lax.rem(i, 2), list(totals)
        if keep:
            plgpu.wait_smem_to_gmem(TOGETHER * rank, wait_read_only=True)
        for j in range(TOGETHER):
            lane = (i * TOGETHER + j) * rank
            turned = tile.over_columns(tile.load(rate.at[lane], ROWS), BLOCK)
            for k, at in enumerate(places):
                totals[k] += units(turned * tile.over_rows(tile.load(theta.at[lane, at], COLUMNS), HEADS))
                if keep:
                    rounded = jax.lax.shift_right_logical(totals[k] + np.int32(2**15 - 2**31), np.int32(16))
                    out[slot, j, :, at] = rounded.astype(jnp.uint16)
        if keep:
            plgpu.commit_smem()
            for j in range(TOGETHER):
                token = chunk * (Q // rank) + i * TOGETHER + j
                for k in range(rank):
                    plgpu.copy_smem_to_gmem(out.at[slot, j, pl.ds(0, rows)], out_ref.at[b, token, k, heads])
        return totals

    totals = jax.lax.fori_loop(0, Q // rank // TOGETHER, advance, start)
    if keep:
        plgpu.wait_smem_to_gmem(0)
    else:
        for at, total in zip(places, totals, strict=True):
            out_ref[b, chunk, block, :, at] = total
