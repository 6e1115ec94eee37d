"""What warpgroups do with the chunks of Mamba-3: turn keys, weigh what tokens read of each other.

A chunk has Q lanes; states come as two halves, so that a plane is one state of each at the same place, and are worked
on in blocks of BLOCK planes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.long_convolution.gpu_tiles import value
from kernels_pallas.ssd import gpu_tiles as tile
from kernels_pallas.ssd.gpu_tiles import COLUMNS, ROWS, WGMMA, Q

BLOCK = 32  # planes
SUMS, STRICT, OWN, RATE = range(4)  # the gates of a chunk
GATES = 4
BITS = np.float32(128).view(np.uint32)  # of a float whose last 16 bits count 2^-16: no conversion, which is slow
matrix = partial(tile.matrix, BLOCK)


def exact(*count: int, width: int = BLOCK):
    """float32 tiles of whole blocks of planes in shared memory."""
    transforms = plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(4 * BLOCK)
    return plgpu.SMEM((*count, Q, width), jnp.float32, transforms=transforms)


def turns(*count: int, width: int):
    """Angles in shared memory, as `gpu_angles` writes them."""
    transforms = plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(2 * BLOCK)
    return plgpu.SMEM((*count, Q, width), jnp.uint16, transforms=transforms)


def blocks(n: int) -> Iterator[tuple]:
    """(its number, its states in the first half, in the second) of every block of planes of n states."""
    for k in range(0, n // 2, BLOCK):
        yield k // BLOCK, pl.ds(k, BLOCK), pl.ds(n // 2 + k, BLOCK)


def turn(angles) -> tuple:
    """(cos, sin) of the angle of every lane and plane of a block; see `turns`."""
    bits = plgpu.load(angles, layout=WGMMA).astype(jnp.uint32) | np.uint32(BITS)
    radians = (jax.lax.bitcast_convert_type(bits, jnp.float32) - (128.0 + 0.5)) * np.float32(2 * np.pi)
    return jnp.cos(radians), jnp.sin(radians)


def split(x, parts: tuple) -> None:
    """x as the sum of two bfloat16."""
    high = jax.lax.optimization_barrier(x.astype(jnp.bfloat16))  # rounded beyond any simplification
    parts[0][...] = high
    parts[1][...] = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    plgpu.commit_smem()


def key(raw, bias_ref, places: tuple, targets: tuple, turned: tuple | None) -> None:
    """One block of B or C with its bias, turned, from its two places to two of shared memory."""
    a, b = (tile.load(raw.at[:, at]) + bias(bias_ref, at) for at in places)
    if turned is not None:
        cos, sin = turned
        a, b = a * cos - b * sin, a * sin + b * cos
    for target, half in zip(targets, (a, b), strict=True):
        target[...] = half.astype(jnp.bfloat16)


def bias(ref, at):
    """(q, planes) of the bias: a row for all lanes in shared memory, or one for every lane in the device's."""
    if ref.shape[0] == 1:
        return tile.over_rows(tile.load(ref.at[0, at], COLUMNS), Q)
    return tile.load(ref.at[:, at], shared=False)


def anew(index):
    """The index, of which the compiler does not see that it is the same in every chunk: addresses take registers."""
    return jax.lax.optimization_barrier(jnp.int32(index))


def chains(*chains: list) -> tuple:
    """The sum of left right over the pairs of every chain; of matrices in shared memory, in float32."""

    def run(*totals):
        for total, chain in zip(totals, chains, strict=True):
            for pair in chain:
                plgpu.wgmma(total, *pair)
        return tuple(map(value, totals))

    shapes = [(chain[0][0].shape[0], chain[0][1].shape[1]) for chain in chains]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def pairs(gates, rank: int, block, transposed: bool = False) -> tuple:
    """What is left at one lane of what entered at another, 0 where that is later; and where they are of one token.

    Rows read a block of the columns, or are read by it where transposed.
    """
    sums, width = gates.at[SUMS], block.size
    at_rows = tile.over_columns(tile.load(sums, ROWS), width)
    at_columns = tile.over_rows(tile.load(sums.at[block], COLUMNS), Q)
    # the barrier keeps the mask from being made once and for all: it would take a register a number
    rows = jax.lax.optimization_barrier(plgpu.broadcasted_iota(jnp.int32, (Q,), 0, layout=ROWS))
    rows = tile.over_columns(rows - block.start, width)  # from the block's start: all blocks have the same columns
    columns = plgpu.broadcasted_iota(jnp.int32, (Q, width), 1, layout=WGMMA)
    i, j, exponent = (columns, rows, at_columns - at_rows) if transposed else (rows, columns, at_rows - at_columns)
    left = jnp.exp2(jnp.where((i | (rank - 1)) >= j, exponent, -jnp.inf))
    return left, (rows | (rank - 1)) == (columns | (rank - 1))


def later(gates, block=None):
    """What later tokens read of a lane: of a block of columns, or of rows."""
    if block is None:
        return tile.over_columns(tile.load(gates.at[STRICT], ROWS), BLOCK)
    return tile.over_rows(tile.load(gates.at[STRICT, block], COLUMNS), Q)


def own(gates, width: int = BLOCK):
    """What lanes read of their own token, which all of them share."""
    return tile.over_columns(tile.load(gates.at[OWN], ROWS), width)


def column_numbers(width: int):
    """(q, width) of them; made anew where they are used, as in `pairs`."""
    numbers = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=COLUMNS)
    return tile.over_rows(jax.lax.optimization_barrier(numbers), Q)


def columns(width: int) -> list:
    """Blocks of columns: registers hold one at a time."""
    return [pl.ds(at, BLOCK) for at in range(0, width, BLOCK)]


def launch(
    kernel: Callable, rings: dict, once: tuple, inputs: tuple, out_type, scratch: dict, grid: dict, computing: int,
    steps: int,
):  # fmt: skip
    """Runs kernel(refs, s, thread) on `computing` warpgroups, and one more that fetches.

    rings: by name, (stages, number of copies, copies(refs, s, step, slot)). once: (their number, copies(refs, s)) of
    those that are made first.
    The kernel waits for "NAME arrived" of a stage and arrives at "NAME used", and waits for "ready" of the first ones.
    """
    scratch = dict(scratch)
    for name, (stages, count, _) in rings.items():
        scratch[f"{name} arrived"] = plgpu.Barrier(num_arrivals=count, num_barriers=stages)
        scratch[f"{name} used"] = plgpu.Barrier(num_arrivals=computing, num_barriers=stages)
    first, copies = once
    scratch |= {"ready": plgpu.Barrier(num_arrivals=first)} if first else {}

    def fetch(refs, s):
        for source, target in copies(refs, s):
            plgpu.copy_gmem_to_smem(source, target, s["ready"])
        _fetch(refs, s, rings, steps)

    return tile.side_by_side(kernel, fetch, inputs, out_type, scratch, grid, computing)


def _fetch(refs, s, rings: dict, steps: int) -> None:
    def fetch(step, _):
        for name, (stages, _, copies) in rings.items():
            slot = jax.lax.rem(step, stages)

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(s[f"{name} used"].at[slot])  # noqa: B023

            for source, target in copies(refs, s, step, slot):
                plgpu.copy_gmem_to_smem(source, target, s[f"{name} arrived"].at[slot])

    jax.lax.fori_loop(0, steps, fetch, None)
    for name, (stages, *_) in rings.items():
        for step in range(max(0, steps - stages), steps):
            plgpu.barrier_wait(s[f"{name} used"].at[step % stages])
