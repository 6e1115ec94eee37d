"""How the kernels of one token divide states on Hopper GPUs: some rows a warpgroup, four neighbours in a row a lane.

The lanes read and write whole lines of memory, and few of them add up what is read of a row. Nothing is shared and
nothing waits: a multiprocessor has so many warpgroups that some always have their reads under way. Under shard_map the
kernels need check_vma=False.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.selective_scan.gpu_tiles import LANES, OPTIONS, broadcast, load, rows_of_quads

COLUMNS = (32, 16)  # states of a row that are side by side


class Rows(NamedTuple):
    """The rows that a warpgroup takes, their states, and the least that it can take."""

    rows: int
    states: int
    least: int

    @classmethod
    def of(cls, rows: int, states: int, per_lane: int) -> "Rows":
        """Of so many rows and states, where `refusal` has no objection: with at most per_lane states a lane."""
        least = 4 * LANES // next(columns for columns in COLUMNS if states % columns == 0)
        fitting = [r for r in range(least, rows + 1, least) if rows % r == 0 and r * states <= LANES * per_lane]
        return cls(max(fitting, default=least), states, least)

    @property
    def layout(self):
        return rows_of_quads(self.least)

    def load(self, ref):
        return load(ref, self.layout)

    def of_rows(self, ref):
        """One number a row, in float32."""
        return load(ref, self.layout.reduce(1)).astype(jnp.float32)

    def of_states(self, ref):
        """One number a state, in float32."""
        return load(ref, self.layout.reduce(0)).astype(jnp.float32)

    def down(self, x):
        """One number a row to all its states."""
        return broadcast(x, (self.rows, self.states), 0, self.layout)

    def across(self, x):
        """One number a state to all rows."""
        return broadcast(x, (self.rows, self.states), 1, self.layout)


def refusal(h, arrays: Mapping) -> str:
    """Why the states h (batch, ..., rows, states), and arrays by name, cannot be taken; "" where they can."""
    batch, *_, rows, states = h.shape
    for name, v in arrays.items():
        if v is not None and v.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {v.dtype}; it takes float32 and bfloat16"
    if states % COLUMNS[-1]:
        return f"there are {states} states, no multiple of {COLUMNS[-1]}"
    if h.size >= 2**31 or batch >= 2**16:
        return f"there are {h.size} numbers in {batch} states, more than are counted here"
    least = Rows.of(rows, states, 0).least
    return f"there are {rows} channels, no multiple of {least}" if rows % least else ""


def launch(kernel: Callable, arrays: Mapping, h: jax.Array, y: jax.ShapeDtypeStruct, grid: Mapping) -> tuple:
    """(y, the new state) of kernel(references by name, the state's, y's), which writes the new state over the old."""

    def body(*refs):
        *refs, h_ref, y_ref = refs
        kernel(dict(zip(arrays, refs, strict=True)), h_ref, y_ref)

    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid))
    run = pl.kernel(body, out_type=y, mesh=mesh, compiler_params=OPTIONS)

    @pl.run_state
    def in_place(refs):
        y_ref, h_ref = refs
        y_ref[...] = run(*arrays.values(), h_ref)

    return in_place((jax.lax.empty(y.shape, y.dtype), h))
