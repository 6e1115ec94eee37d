r"""How a TPU walks state space duality: heads in lanes, rows of a sequence in sublanes, chunk after chunk of 128 rows.

A row is a token, or one of the r that a token has. A tile is the 128 lanes of as many heads as fill them with their
channels, `together`. What its rows say to each other is packed alike: in block j of rows, of which a chunk has
`together` too, lane i is row j p + i mod p of head i div p, so that the same lanes belong to the same head everywhere.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Q = LANES = 128  # rows of a chunk, and lanes of a tile
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

    p: int
    n: int
    rank: int
    together: int  # heads of a tile
    groups: int  # that a tile reads
    tiles: int  # of a block
    shares: int  # blocks that read the same groups
    chunks: int  # of a span
    grid: tuple[int, int, int]
    reverse: bool = False

    @classmethod
    def of(cls, x: Shaped, B: Shaped, z: Shaped | None, rank: int) -> "Walk":
        """The walk over x (b, l, h, p), l whole chunks, and B (b, l, g, n): the largest blocks that fit."""
        (batch, length, heads, p), (groups, n) = x.shape, B.shape[2:]
        together, chunks = LANES // p, length // Q
        of_group = max(1, heads // groups // together)  # tiles

        def size(tiles: int, span: int) -> int:
            width, read, bytes_ = tiles * LANES, n * max(1, groups * together // heads), x.dtype.itemsize
            row = (3 + 2 * (z is not None)) * width * bytes_ + 2 * read * (bytes_ + 4) + 4 * 6 * tiles * together
            state = 2 * (bytes_ + 4 + 4) + 4 + bytes_ + span * bytes_
            return 2 * span * Q * row + width * (n * state + Q * (2 * bytes_ + 4 * SPILLED[bytes_]))

        possible = itertools.product(range(1, WIDTH // LANES + 1), range(1, SPAN + 1))
        whole = [(i, j) for i, j in possible if of_group % i == 0 and chunks % j == 0]
        fit = [found for found in whole if size(*found) <= VMEM_BYTES] or [(1, 1)]
        tiles, span = max(fit, key=lambda found: (found[0] * found[1], found[0]))
        grid = batch, heads // together // tiles, chunks // span
        shares = of_group // tiles
        return cls(p, n, rank, together, max(1, groups * together // heads), tiles, shares, span, grid)

    @property
    def heads(self) -> int:
        """Of a block."""
        return self.tiles * self.together

    def launch(self, body: Callable, inputs: dict, outputs: dict, scratch: dict) -> dict:
        """body(references by name), each array or shape given as the kind of its blocks and it."""
        step = lambda t: self.grid[2] - 1 - t if self.reverse else t  # noqa: E731
        share = lambda j: jax.lax.rem(j, self.shares)  # noqa: E731
        group = lambda j: jax.lax.div(j, self.shares)  # noqa: E731
        rows, width, states = self.chunks * Q, self.tiles * LANES, self.groups * self.n
        kinds = {  # block, which block
            "rows": ((None, rows, width), lambda i, j, t: (i, step(t), j)),
            "group": ((None, rows, states), lambda i, j, t: (i, step(t), group(j))),
            "share": ((None, None, rows, states), lambda i, j, t: (i, share(j), step(t), group(j))),
            "state": ((None, self.n, width), lambda i, j, t: (i, 0, j)),
            "states": ((None, None, self.n, width), lambda i, j, t: (i, step(t), 0, j)),
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
        packed = sums.reshape(*sums.shape[:3], self.tiles, self.together, self.together, self.p)
        packed = jnp.swapaxes(packed, 4, 5).reshape(sums.shape)
        return jnp.concatenate([sums, jnp.transpose(dt, (0, 3, 1, 4, 2)), packed], 3)

    def blocks(self) -> list[tuple[int, slice, slice]]:
        """(j, its rows, all rows that see them) of the blocks of rows that are packed into the lanes."""
        return [(j, slice(j * self.p, (j + 1) * self.p), slice(j * self.p, Q)) for j in range(self.together)]

    def head(self, rows: int) -> jax.Array:
        """Of every lane of a tile."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
        return jax.lax.shift_right_logical(lane, self.p.bit_length() - 1)

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
            keys=pltpu.VMEM((self.chunks, self.groups * self.n, Q), dtype),
            scores=pltpu.VMEM((self.together, Q, LANES), jnp.float32),
        )

    def enter(self, r: SimpleNamespace) -> None:
        """A span's scratch."""
        for c in range(self.chunks):
            sums, dt = r.gates[c, : self.heads], r.gates[c, self.heads : 2 * self.heads]
            r.columns[c] = columns(jnp.concatenate([sums, dt, dt * jnp.exp2(sums[:, Q - 1 :] - sums)]))
            r.keys[c] = r.B[chunk(c)].T

    def score(self, ref, B: jax.Array, C: jax.Array) -> None:
        """C B^T, of what rows see, as packed; B and C (q, groups n)."""
        for j, block, below in self.blocks():
            of_group = lambda n, i=block, j=below: dot(C[j, n], self.copies(B[i, n]), (1, 1))  # noqa: E731
            ref[j, below] = self.seen(self.by_group(of_group))

    def inside(self, scores_ref, gate: "Gates", x: jax.Array) -> jax.Array:
        """What the rows of a tile read of each other, x (q, lanes) scaled by dt."""
        blocks = [0.0] * self.together
        for j, block, below in self.blocks():
            weight = (scores_ref[j, below] * gate.decay(j)).astype(x.dtype)
            found = dot(weight, self.apart(x[block]))
            for i in range(j, self.together):
                blocks[i] += found[(i - j) * self.p : (i - j + 1) * self.p]
        return jnp.concatenate(blocks)

    def read(self, C: jax.Array, state: jax.Array) -> jax.Array:
        """C's rows (q, groups n) times a tile's state (n, lanes)."""
        return self.by_group(lambda n: dot(C[:, n], state))

    def write(self, keys_ref, gate: "Gates", state: jax.Array, x: jax.Array) -> jax.Array:
        """The state after the chunk, of keys (groups n, q) and weighted x (q, lanes)."""
        return state * gate.through + self.by_group(lambda n: dot(keys_ref[n], x))

    def by_group(self, function: Callable) -> jax.Array:
        """function(the states of a group, in a block's lanes), in the lanes of the heads that read it."""
        total = function(slice(0, self.n))
        for g in range(1, self.groups):
            here = self.head(len(total)) >= g * (self.together // self.groups)
            total = jnp.where(here, function(slice(g * self.n, (g + 1) * self.n)), total)
        return total

    def own(self, g: int, v: jax.Array) -> jax.Array:
        """v, and 0 in the lanes of heads that do not read group g."""
        if self.groups == 1:
            return v
        each = self.together // self.groups
        return jnp.where((self.head(len(v)) >= g * each) & (self.head(len(v)) < (g + 1) * each), v, 0)

    def seen(self, v: jax.Array) -> jax.Array:
        """v (rows that see block j, rows of the block as packed), and 0 where a row's token is before."""
        row = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) | (self.rank - 1)
        lane = jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) & (self.p - 1)
        return jnp.where(row >= lane, v, 0)

    def copies(self, v: jax.Array) -> jax.Array:
        """A block's rows once for every head."""
        return jnp.concatenate([v] * self.together)

    def apart(self, v: jax.Array) -> jax.Array:
        """A block's rows (p, lanes) once for every head, each in the lanes of its own: (heads p, lanes)."""
        if self.together == 1:
            return v
        whole = pltpu.bitcast(v, jnp.int32)  # registers of pairs of rows, where rows are of 16 bits
        head = self.head(len(whole))
        kept = [jnp.where(head == i, whole, 0) for i in range(self.together)]
        return jnp.concatenate([pltpu.bitcast(rows, v.dtype) for rows in kept])

    def joined(self, v: jax.Array) -> jax.Array:
        """Of rows (heads p, lanes), each head's in the lanes of its own: (p, lanes)."""
        head, total = self.head(self.p), v[: self.p]
        for i in range(1, self.together):
            total = jnp.where(head == i, v[i * self.p : (i + 1) * self.p], total)
        return total

    def of_heads(self, v: jax.Array) -> jax.Array:
        """Sums over the lanes of every head (q, lanes): (heads, q)."""
        return v.T.reshape(self.together, self.p, Q).sum(1)


class Gates(NamedTuple):
    """Of a tile's rows, (q, lanes) in the lanes of every head."""

    sums: jax.Array  # log2 decays from the start of the chunk
    dt: jax.Array
    weight: jax.Array  # of what rows write into the state at the end of the chunk: decay, and dt
    packed: list[jax.Array]  # the sums of the rows of every block, (1, lanes)

    @classmethod
    def of(cls, walk: Walk, r: SimpleNamespace, c: jax.Array, t: jax.Array | int) -> "Gates":
        """Of tile t of chunk c."""
        first = t * walk.together
        at = [walk.head(Q) + i * walk.heads + first for i in range(3)]
        found = [jnp.take_along_axis(r.columns[c], i, 1, mode="promise_in_bounds") for i in at]
        return cls(*found, [r.gates[c, pl.ds(2 * walk.heads + first + j, 1)] for j in range(walk.together)])

    def decay(self, j: int) -> jax.Array:
        """What is left at every row, from block j on, of what entered at the rows of block j, as packed."""
        p = Q // len(self.packed)
        same, later = (self.sums[rows] - self.packed[j] for rows in (slice(j * p, (j + 1) * p), slice((j + 1) * p, Q)))
        same = jnp.minimum(same, 0)  # rows that do not see each other have finite numbers too
        return jnp.exp2(same if j + 1 == len(self.packed) else jnp.concatenate([same, later]))

    @property
    def to_here(self) -> jax.Array:
        return jnp.exp2(self.sums)

    @property
    def to_end(self) -> jax.Array:
        return jnp.exp2(self.sums[Q - 1 :] - self.sums)

    @property
    def through(self) -> jax.Array:
        return jnp.exp2(self.sums[Q - 1 :])


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


def dot(left: jax.Array, right: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """Their product over an axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
