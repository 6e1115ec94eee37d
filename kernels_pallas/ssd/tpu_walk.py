"""How a TPU walks state space duality: blocks of heads, span after span of chunks."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.ssd.tpu_tiles import LANES, Gates, Q, Tile

SUBLANES = 8
WIDTH = 1024  # lanes of a block of heads, at most
SPAN = 4  # chunks that are fetched at once, at most; between them the forward pass keeps states
VMEM_BYTES = 14 * 2**20  # that the backward pass may take; a TensorCore has 16 MiB or more
SPILLED = {2: 7, 4: 20}  # by bytes of a number, what registers do not hold of a tile: float32 arrays of its size
LEAST = -192.0  # of a log2 decay: its power of 2 is 0 in float32, and sums of it are finite
LOG2_E = np.float32(np.log2(np.e))
Shaped = jax.Array | jax.ShapeDtypeStruct


class Walk(NamedTuple):
    """The grid: sequences and blocks of heads in any order, and for each span after span of chunks."""

    tile: Tile
    tiles: int  # of a block
    shares: int  # blocks that read the same groups
    chunks: int  # of a span
    grid: tuple[int, int, int]
    reverse: bool = False

    @classmethod
    def of(cls, x: Shaped, B: Shaped, z: Shaped | None, rank: int) -> "Walk":
        """The walk over x (b, l, h, p), l whole chunks, and B (b, l, g, n): the largest blocks that fit."""
        (batch, length, heads, p), (groups, n) = x.shape, B.shape[2:]
        tile, chunks = Tile(p, n, rank, max(1, groups * LANES // p // heads)), length // Q
        of_group = max(1, heads // groups // tile.together)  # tiles

        def size(tiles: int, span: int) -> int:
            width, read, bytes_ = tiles * LANES, n * tile.groups, x.dtype.itemsize
            row = (3 + 2 * (z is not None)) * width * bytes_ + 2 * read * (bytes_ + 4) + 4 * 6 * tiles * tile.together
            state = 2 * (bytes_ + 4 + 4) + 4 + bytes_ + span * bytes_
            return 2 * span * Q * row + width * (n * state + Q * (2 * bytes_ + 4 * SPILLED[bytes_]))

        possible = itertools.product(range(1, WIDTH // LANES + 1), range(1, SPAN + 1))
        whole = [(i, j) for i, j in possible if of_group % i == 0 and chunks % j == 0]
        fit = [found for found in whole if size(*found) <= VMEM_BYTES] or [(1, 1)]
        tiles, span = max(fit, key=lambda found: (found[0] * found[1], found[0]))
        return cls(tile, tiles, of_group // tiles, span, (batch, heads // tile.together // tiles, chunks // span))

    @property
    def heads(self) -> int:
        """Of a block."""
        return self.tiles * self.tile.together

    def launch(self, body: Callable, inputs: dict, outputs: dict, scratch: dict) -> dict:
        """body(references by name), each array or shape given as the kind of its blocks and it."""
        step = lambda t: self.grid[2] - 1 - t if self.reverse else t  # noqa: E731
        share = lambda j: jax.lax.rem(j, self.shares)  # noqa: E731
        group = lambda j: jax.lax.div(j, self.shares)  # noqa: E731
        rows, width, states = self.chunks * Q, self.tiles * LANES, self.tile.groups * self.tile.n
        kinds = {  # block, which block
            "rows": ((None, rows, width), lambda i, j, t: (i, step(t), j)),
            "group": ((None, rows, states), lambda i, j, t: (i, step(t), group(j))),
            "share": ((None, None, rows, states), lambda i, j, t: (i, share(j), step(t), group(j))),
            "state": ((None, self.tile.n, width), lambda i, j, t: (i, 0, j)),
            "states": ((None, None, self.tile.n, width), lambda i, j, t: (i, step(t), 0, j)),
            "sum": ((None, SUBLANES, width), lambda i, j, t: (i, 0, j)),
            "head": ((1, width), lambda i, j, t: (0, j)),
        }

        def spec(kind: str, like) -> pl.BlockSpec:
            if kind == "gates":
                block = (None, None, self.chunks, *like.shape[3:])
                return pl.BlockSpec(block, lambda i, j, t: (i, j, step(t), 0, 0))
            return pl.BlockSpec(*kinds[kind])

        names = (*inputs, *outputs, *scratch)
        found = pl.pallas_call(
            lambda *refs: body(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
            grid=self.grid,
            in_specs=[spec(*x) for x in inputs.values()],
            out_specs=[spec(*x) for x in outputs.values()],
            out_shape=[like for _, like in outputs.values()],
            scratch_shapes=list(scratch.values()),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        )(*(x for _, x in inputs.values()))
        return dict(zip(outputs, found, strict=True))

    def gates(self, a: jax.Array, dt: jax.Array) -> jax.Array:
        """(b, blocks, c, 3 heads, q): log2 decays from the start of the chunk to every row, dt, the first as packed."""
        a, dt = (v.reshape(v.shape[0], -1, Q, self.grid[1], self.heads) for v in (clipped(a), dt))
        sums = jnp.einsum("bcqkh,iq->bkchi", a, np.tril(np.ones((Q, Q), np.float32)), precision="highest")
        packed = sums.reshape(*sums.shape[:3], self.tiles, self.tile.together, self.tile.together, self.tile.p)
        packed = jnp.swapaxes(packed, 4, 5).reshape(sums.shape)
        return jnp.concatenate([sums, jnp.transpose(dt, (0, 3, 1, 4, 2)), packed], 3)

    def visit(self, tile: Callable, at_once: int) -> None:
        """What tile(t) yields for all tiles of a block, so many at once at most: (reference, where, value[, added])."""
        at_once = max(k for k in range(1, at_once + 1) if self.tiles % k == 0)

        def write(found):
            for ref, where, value, *added in found:
                ref[where] = (ref[where] + value if added else value).astype(ref.dtype)

        def step(i, _):
            write([x for k in range(at_once) for x in tile(i * at_once + k)])

        if at_once == self.tiles:
            for k in range(at_once):  # at places that the compiler knows
                write(list(tile(k)))
        else:
            jax.lax.fori_loop(0, self.tiles // at_once, step, None)

    def scratch(self, dtype: jnp.dtype) -> dict:
        """Of a span its gates and B's rows as columns, of a chunk what B and C say to each other, as packed."""
        return dict(
            columns=pltpu.VMEM((self.chunks, Q, LANES), jnp.float32),
            keys=pltpu.VMEM((self.chunks, self.tile.groups * self.tile.n, Q), dtype),
            scores=pltpu.VMEM((self.tile.together, Q, LANES), jnp.float32),
        )

    def enter(self, r: SimpleNamespace) -> None:
        """A span's scratch."""
        for c in range(self.chunks):
            sums, dt = r.gates[c, : self.heads], r.gates[c, self.heads : 2 * self.heads]
            r.columns[c] = columns(jnp.concatenate([sums, dt, dt * jnp.exp2(sums[:, Q - 1 :] - sums)]))
            r.keys[c] = r.B[chunk(c)].T

    def load(self, r: SimpleNamespace, c: jax.Array, t: jax.Array | int) -> Gates:
        """The gates of tile t of chunk c."""
        first = t * self.tile.together
        at = [self.tile.head(Q) + i * self.heads + first for i in range(3)]
        found = [jnp.take_along_axis(r.columns[c], i, 1, mode="promise_in_bounds") for i in at]
        return Gates(*found, [r.gates[c, pl.ds(2 * self.heads + first + j, 1)] for j in range(self.tile.together)])


def clipped(a: jax.Array) -> jax.Array:
    """The log2 decay."""
    return jnp.maximum(a.astype(jnp.float32) * LOG2_E, LEAST)


def chunk(c: jax.Array | int) -> pl.Slice:
    """The rows of chunk c of a span; as well the lanes of tile c of a block."""
    return pl.ds(c * Q, Q) if isinstance(c, int) else pl.ds(pl.multiple_of(c * Q, Q), Q)


def columns(rows: jax.Array) -> jax.Array:
    """Rows (at most 128, q) as columns (q, 128)."""
    return jnp.concatenate([rows, jnp.zeros((LANES - len(rows), Q), rows.dtype)]).T


def flat(v: jax.Array) -> jax.Array:
    """Heads and their numbers side by side."""
    return v.reshape(*v.shape[:-2], -1)


def like(v: jax.Array, *count: int, dtype: jnp.dtype | None = None) -> jax.ShapeDtypeStruct:
    """An array such as v, or `count` of them for every sequence."""
    return jax.ShapeDtypeStruct((len(v), *count, *v.shape[1:]), dtype or v.dtype)
