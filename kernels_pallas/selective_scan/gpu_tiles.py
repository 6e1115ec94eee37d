"""How a warpgroup divides a tile, and the functions of single numbers that its lanes compute."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.selective_scan.fused import LOG_2_E

TILE = 64  # tokens
ROWS = 32  # tokens whose planes are computed together
LANES = 128  # of a warpgroup
PER_LANE = 8  # states
BUSY = 100  # warpgroups that are worth no cut, which reads the sequence twice
SLOTS = 528  # warpgroups that a cut makes, at most
SHORTEST_SEGMENT = 512  # tokens
AXES = ("block", "segment", "batch")
OPTIONS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)


class Plan(NamedTuple):
    """batch x segments x blocks warpgroups, each with `channels` channels over `steps` tiles of TILE tokens."""

    batch: int
    segments: int
    blocks: int
    steps: int
    channels: int
    states: int

    @classmethod
    def of(cls, batch: int, length: int, channels: int, states: int) -> "Plan":
        """For a length and channels that are multiples of what `multiples` says."""
        width, segments = _division(batch, length, channels, states)
        return cls(batch, segments, channels // width, length // TILE // segments, width, states)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.blocks, self.segments, self.batch

    @property
    def layout(self):
        """Of (channels, states): LANES // channels lanes share a channel."""
        return rows_of_quads(self.channels)

    @property
    def plane(self):
        """Of (tokens, channels): every number in one lane."""
        return rows_of_quads(4 * LANES // self.channels)

    @property
    def short(self):
        """Of (8 tokens, channels): every number in one lane."""
        tiling = plgpu.Tiling(((8, self.channels), (self.channels // 4,), (self.channels // 16,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1)

    @property
    def mine(self):
        """This warpgroup's channels."""
        return pl.ds(jax.lax.axis_index("block") * self.channels, self.channels)

    def down(self, x):
        """(channels,) to (channels, states)."""
        return broadcast(x, (self.channels, self.states), 0, self.layout)

    def across(self, x):
        """(states,) to (channels, states)."""
        return broadcast(x, (self.channels, self.states), 1, self.layout)

    def row(self, ref, t):
        """Token t of (tokens, channels), in float32, in every lane of its channel."""
        return load(ref.at[t], self.layout.reduce(1)).astype(jnp.float32)

    def states_of(self, ref, t):
        """Token t of (tokens, states): each lane has those of its own states."""
        return load(ref.at[t], self.layout.reduce(0))


def multiples(batch: int, length: int, channels: int, states: int) -> tuple[int, int]:
    """Of tokens and of channels, which whole warpgroups take."""
    width, segments = _division(batch, length, channels, states)
    return TILE * segments, width


def _division(batch: int, length: int, channels: int, states: int) -> tuple[int, int]:
    """The channels of a warpgroup, and how many segments of the sequence run at once."""
    width, segments = LANES * PER_LANE // states, 1
    rows = batch * -(-channels // width)
    while rows < BUSY and 2 * rows * segments <= SLOTS and length >= 2 * segments * SHORTEST_SEGMENT:
        segments *= 2
    return width, segments


def rows_of_quads(rows: int):
    """Each lane has four neighbours in a row; LANES // rows lanes are side by side."""
    columns = 4 * LANES // rows
    tiling = plgpu.Tiling(((rows, columns), (rows // 4, columns), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def blocks() -> list:
    """Rows of a tile whose numbers are computed together."""
    return [pl.ds(start, ROWS) for start in range(0, TILE, ROWS)]


def broadcast(x, shape: tuple, axis: int, layout):
    """x as the given axis of an array."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, (axis,)), layout)


def load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def sigmoid(x):
    """1 / (1 + e^-x); division would take many more instructions."""
    root = jax.lax.rsqrt(1.0 + jnp.exp2(-LOG_2_E * x))
    return root * root
