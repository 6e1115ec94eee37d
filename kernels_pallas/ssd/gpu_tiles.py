"""What warpgroups do with the chunks of state space duality: fetch them, weigh them by decays, multiply them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.long_convolution.gpu_tiles import WGMMA, meet, value

Q = 64  # lanes of a chunk
LEAST = -192.0  # of a log2 decay: its power of 2 is 0 in float32, and sums of it are finite
COMPUTING, FETCHING = {2: 240, 4: 112}, 24  # registers of a thread, of so many warpgroups and of one that fetches
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)  # one number a row of a tile, one a column


class Heads(NamedTuple):
    """Which heads the warpgroups of a block walk: two that read the same B and C, where a group has an even number."""

    grid: dict
    together: int
    per_group: int

    @classmethod
    def of(cls, x: jax.Array, B: jax.Array) -> "Heads":
        per_group = x.shape[2] // B.shape[2]
        together = 1 + (per_group % 2 == 0)
        return cls(dict(heads=x.shape[2] // together, batch=x.shape[0]), together, per_group)

    def place(self) -> tuple:
        """The sequence, the first of the heads, and their group."""
        head = jax.lax.axis_index("heads") * self.together
        return jax.lax.axis_index("batch"), head, jax.lax.div(head, self.per_group)


def matrix(width: int, rows: int, columns: int, *count: int):
    """bfloat16 matrices in shared memory, as the tensor cores and the copy engine want them.

    Swizzled by `width` columns: all factors of products alike, by the narrowest.
    """
    transforms = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)
    return plgpu.SMEM((*count, rows, columns), jnp.bfloat16, transforms=transforms)


def vectors(*shape: int):
    return plgpu.SMEM((*shape, Q), jnp.float32)


def products(*pairs: tuple) -> tuple:
    """left right of every pair of matrices in shared memory, in float32."""

    def run(*totals):
        for total, pair in zip(totals, pairs, strict=True):
            plgpu.wgmma(total, *pair)
        return tuple(map(value, totals))

    shapes = [(left.shape[0], right.shape[1]) for left, right in pairs]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def accumulate(*terms: tuple) -> tuple:
    """total + left right of every term; the totals are in registers."""

    def run(totals):
        for total, (_, *pair) in zip(totals, terms, strict=True):
            plgpu.wgmma(total, *pair)

    totals = pl.run_state(run)(tuple(plgpu.ACC.init(total) for total, *_ in terms))
    return jax.lax.optimization_barrier(totals)


def load(ref, layout=WGMMA, shared: bool = True):
    """In float32, from shared memory or the device's.

    Loads of the same numbers in two layouts must differ in more than the layout: the compiler would make them one.
    """
    return plgpu.load(ref, layout=layout, optimized=shared and layout is not ROWS).astype(jnp.float32)


def over_columns(row_numbers, columns: int):
    wide = jax.lax.broadcast_in_dim(row_numbers, (row_numbers.shape[0], columns), [0])
    return plgpu.layout_cast(wide, WGMMA)


def over_rows(column_numbers, rows: int):
    wide = jax.lax.broadcast_in_dim(column_numbers, (rows, column_numbers.shape[0]), [1])
    return plgpu.layout_cast(wide, WGMMA)


def decay(sums, rank: int, transposed: bool = False):
    """What is left at lane i of what entered at lane j, 0 where the token of j is later; `sums` of log2 decays."""
    at_rows, at_columns = over_columns(load(sums, ROWS), Q), over_rows(load(sums, COLUMNS), Q)
    # the barrier keeps the mask from being made once and for all: it would take a register a number
    rows = over_columns(jax.lax.optimization_barrier(plgpu.broadcasted_iota(jnp.int32, (Q,), 0, layout=ROWS)), Q)
    columns = plgpu.broadcasted_iota(jnp.int32, (Q, Q), 1, layout=WGMMA)
    i, j, exponent = (columns, rows, at_columns - at_rows) if transposed else (rows, columns, at_rows - at_columns)
    return jnp.exp2(jnp.where((i | (rank - 1)) >= j, exponent, -jnp.inf))


def to_end(sums):
    """What is left at the end of the chunk of what entered at every lane."""
    return jnp.exp2(jnp.broadcast_to(sums[Q - 1], (Q,)) - load(sums, ROWS))


def to_here(sums):
    """What is left at every lane of what entered before the chunk."""
    return jnp.exp2(load(sums, ROWS))


def through(sums, *shape: int):
    """What is left at the end of the chunk of what entered before it."""
    return jnp.broadcast_to(jnp.exp2(sums[Q - 1]), shape)


def silu(z):
    half = z * 0.5
    return half + half * jnp.tanh(half)


def launch(
    kernel: Callable, copies: Callable, inputs: tuple, out_type, scratch: dict, grid: dict, computing: int, steps: int
):
    """Runs kernel(refs, s, thread) on `computing` warpgroups, and one more that fetches copies(refs, s, step, slot).

    scratch: what s holds; "stages" of the ring that is fetched into, and "copies" into each. The kernel waits for
    "arrived" of a stage and arrives at "used".
    """
    stages = scratch.pop("stages")
    scratch |= {
        "arrived": plgpu.Barrier(num_arrivals=scratch.pop("copies"), num_barriers=stages),
        "used": plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
    }
    fetch = lambda refs, s: _fetch(s, stages, steps, lambda *at: copies(refs, s, *at))  # noqa: E731
    return side_by_side(kernel, fetch, inputs, out_type, scratch, grid, computing)


def side_by_side(kernel: Callable, fetch: Callable, inputs: tuple, out_type, scratch: dict, grid: dict, computing: int):
    """Runs kernel(refs, s, thread) on `computing` warpgroups, and fetch(refs, s) on one more; they leave together."""
    scratch = scratch | {"done": plgpu.Barrier(num_arrivals=computing + 1)}

    def body(*refs):
        *refs, s = refs
        thread = jax.lax.axis_index("thread")

        @pl.when(thread < computing)
        def _():
            if computing in COMPUTING:
                plgpu.set_max_registers(COMPUTING[computing], action="increase")
            kernel(refs, s, thread)

        @pl.when(thread == computing)
        def _():
            if computing in COMPUTING:
                plgpu.set_max_registers(FETCHING, action="decrease")
            fetch(refs, s)

        meet(s["done"])

    run = plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=computing + 1,
        thread_name="thread",
        scratch_types=[scratch],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0, approx_math=True),
    )
    return run(*inputs)


def _fetch(s, stages: int, steps: int, copies: Callable) -> None:
    def fetch(step, _):
        slot = jax.lax.rem(step, stages)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(s["used"].at[slot])

        for source, target in copies(step, slot):
            plgpu.copy_gmem_to_smem(source, target, s["arrived"].at[slot])

    jax.lax.fori_loop(0, steps, fetch, None)
    for step in range(max(0, steps - stages), steps):
        plgpu.barrier_wait(s["used"].at[step % stages])
