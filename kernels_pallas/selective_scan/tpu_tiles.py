"""How the kernels for TPUs cut their arrays, and what passes between the two forms of a token's numbers.

A row is one number of each of CHANNELS channels of a token: a register, 8 by 128, in which the recurrence works. In
the arrays 16 tokens of 128 channels are next to each other; so what is a function of single numbers is computed there,
and written to one sublane of as many rows.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
CHANNELS = SUBLANES * LANES
PITCH = 9  # sublanes from row to row: 8 would be in one bank of VMEM
STATES = 16  # of a channel, at a time
TILE = 64  # tokens; the states before every tile are kept
CHUNK = 16  # tokens, of a packed register: what is spread, and computed of single numbers, at a time
AT_ONCE = 4  # tokens that states are walked across without a branch: with more, registers spill


class Walk(NamedTuple):
    """The grid: batch rows and blocks of channels in any order; of each, tile after tile, of each slice after slice."""

    batch: int
    tiles: int
    groups: int  # of CHANNELS
    slices: int
    states: int  # in a slice
    block_groups: int
    block_tiles: int
    backwards: bool

    @classmethod
    def of(cls, x: jax.Array, A: jax.Array, most_groups: int, most_tiles: int, backwards: bool) -> "Walk":
        """The walk over x (b, l, d), with A (groups, slices, states, 8, 128)."""
        (batch, length, _), (groups, slices, states) = x.shape, A.shape[:3]
        tiles = length // TILE
        most = lambda count, at_most: max(k for k in range(1, at_most + 1) if count % k == 0)  # noqa: E731
        return cls(batch, tiles, groups, slices, states, most(groups, most_groups), most(tiles, most_tiles), backwards)

    @property
    def steps(self) -> int:
        return self.tiles // self.block_tiles

    def add(self, part, ref, value: jax.Array) -> None:
        """Adds to what the slices before this one, the `part`-th, left there."""
        if self.slices > 1:
            value += jnp.where(part == 0, 0.0, ref[...])
        ref[...] = value

    def launch(self, body: Callable, inputs: dict, outputs: dict, scratch: dict) -> tuple:
        """body(step, slice, all refs by name); inputs and outputs are given as the kind of their blocks and arrays."""
        names = (*inputs, *outputs, *scratch)
        at = lambda t: self.steps - 1 - t if self.backwards else t  # noqa: E731
        registers, g, k = (self.states, SUBLANES, LANES), self.block_groups, self.block_tiles

        def spec(kind: str, like) -> pl.BlockSpec:
            if kind == "tokens":
                return pl.BlockSpec((None, k * TILE, g * CHANNELS), lambda i, j, t, s: (i, at(t), j))
            if kind == "by states":
                return pl.BlockSpec((None, None, k * TILE, like.shape[3]), lambda i, j, t, s: (s, i, at(t), 0))
            if kind == "channels":
                return pl.BlockSpec((1, g * CHANNELS), lambda i, j, t, s: (0, j))
            if kind == "A":
                return pl.BlockSpec((g, None, *registers), lambda i, j, t, s: (j, s, 0, 0, 0))
            if kind == "state":
                block = (None, g, self.slices, *registers)
                return pl.BlockSpec(block, lambda i, j, t, s: (i, j, 0, 0, 0, 0))
            if kind == "states":
                block = (None, k, g, None, *registers)
                return pl.BlockSpec(block, lambda i, j, t, s: (i, at(t), j, s, 0, 0, 0))
            if kind == "of tokens":  # sums over channels
                return pl.BlockSpec((None,) * 4 + like.shape[4:], lambda i, j, t, s: (i, j, at(t), s, 0, 0, 0))
            return pl.BlockSpec((None, g, *like.shape[2:]), lambda i, j, t, s: (i, j, 0, 0))

        return pl.pallas_call(
            lambda *refs: body(pl.program_id(2), pl.program_id(3), dict(zip(names, refs, strict=True))),
            grid=(self.batch, self.groups // g, self.steps, self.slices),
            in_specs=[spec(*given) for given in inputs.values()],
            out_specs=[spec(*given) for given in outputs.values()],
            out_shape=[like for _, like in outputs.values()],
            scratch_shapes=list(scratch.values()),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
            ),
        )(*(array for _, array in inputs.values()))


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def rows(tokens: int, *more: int):
    """Room for the rows of so many tokens."""
    return pltpu.VMEM((*more, tokens * PITCH, LANES), jnp.float32)


def columns(tokens: int, states: int):
    """Room for the numbers of so many tokens and states, each in all lanes."""
    return pltpu.VMEM((states, tokens, LANES), jnp.float32)


def row(first, t) -> pl.Slice:
    """Where the row of the t-th token from `first` on is."""
    return pl.ds((first + t) * PITCH, SUBLANES)


def sublanes(group: int) -> Iterator[tuple[int, slice]]:
    """Each sublane of a group's rows, and which channels it has."""
    for s in range(SUBLANES):
        start = group * CHANNELS + s * LANES
        yield s, slice(start, start + LANES)


def spaced(first, sublane: int) -> pl.Slice:
    """That sublane of the rows of CHUNK tokens."""
    return pl.ds(first * PITCH + sublane, CHUNK, stride=PITCH)


def spread(refs: dict, first, at) -> None:
    """Writes every number of B and C of the chunk that begins with the block's token `first` to all lanes of a row."""
    for name in "BC":
        numbers = refs[name][pl.ds(first, CHUNK)]
        for n in range(numbers.shape[1]):
            refs[f"{name} columns"][n, pl.ds(at, CHUNK)] = jnp.broadcast_to(numbers[:, n : n + 1], (CHUNK, LANES))


def everywhere(ref, n: int, t) -> jax.Array:
    """One of these numbers in a whole register."""
    return jnp.broadcast_to(ref[n, pl.ds(t, 1)], (SUBLANES, LANES))


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x) to 6e-8, not of itself but of 1: enough for a gate, in few instructions."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5
