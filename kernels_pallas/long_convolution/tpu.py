r"""The walk over chunks of `xla` on TPUs: all of it in one kernel, and the tables' gradients in another.

A block is some channels of some sequences, tile after tile of tokens. Of one channel the chunks of a tile, of all its
sequences, are the rows that stream through the matrix units, against tables of 128 x 128: the Toeplitz matrix, the
table that enters tokens into states, the table that reads them. Sequences are in sublanes, so that the states cross
the chunks without a permutation of rows; `tpu_lanes` says how channels share the lanes. A table of 128 columns is 0 at
the states of the other channels. The tokens are read once, the outputs are written once.

Products are of bfloat16 parts, summed in float32. A float32 is the sum of three such parts; the precision says how
many are taken: "default" 1, "high" 2, "highest" 3, so that a product takes 1, 3 or 6 passes, and with tokens in
bfloat16 1, 2 or 3. Under shard_map both kernels need check_vma=False.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.long_convolution import fused
from kernels_pallas.long_convolution import tpu_lanes as lanes
from kernels_pallas.long_convolution.fused import PARTS, float32, parts, planes
from kernels_pallas.long_convolution.tpu_lanes import LANES, STATES
from kernels_pallas.long_convolution.xla import Tables

CHUNK = TILE = 128  # tokens; of those that are walked over, any multiple
ROWS = 256  # chunks of a tile, of all sequences, that stream through the matrix units
CHANNELS = 8  # in a block


def refusal(u: jax.Array | jax.ShapeDtypeStruct, a: jax.Array, precision: str) -> str:
    """Why u (b, l, d) and a (d, n) cannot be run here; "" where they can."""
    return fused.refusal(u, a, precision, group=_packed(u), shortest=TILE, most_states=STATES)


def _packed(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Rows in a register."""
    return 32 // x.dtype.itemsize


class Walk(NamedTuple):
    """The grid: blocks of channels and of sequences in any order, and for each tile after tile of tokens."""

    channels: int  # in a block
    group: int  # channels that share lanes
    rows: int  # sequences in a block
    chunks: int  # in a tile
    grid: tuple[int, int, int]
    reverse: bool

    @classmethod
    def of(cls, x: jax.Array | jax.ShapeDtypeStruct, n: int, reverse: bool) -> "Walk":
        """The walk over tokens (d, b, l) with n states a channel."""
        (d, batch, length), packed = x.shape, _packed(x)
        group = max(g for g in (1, 2, 4) if d % g == 0 and (g == 1 or g * n <= STATES))
        channels = max(k for k in range(group, max(CHANNELS, group) + 1, group) if d % k == 0)
        rows = max(r for r in range(packed, max(ROWS // 8, packed) + 1, packed) if batch % r == 0)
        chunks = max(c for c in range(1, ROWS // rows + 1) if (length // CHUNK) % c == 0)
        grid = d // channels, batch // rows, length // (chunks * CHUNK)
        return cls(channels, group, rows, chunks, grid, reverse)

    def launch(self, body: Callable, inputs: list[tuple], outputs: list[tuple]) -> tuple:
        """body(refs), each array or shape given as the kind of its blocks and it; sums go over all but channels."""
        step = lambda t: self.grid[2] - 1 - t if self.reverse else t  # noqa: E731
        groups = self.channels // self.group

        def spec(kind: str, like) -> pl.BlockSpec:
            if kind == "tokens":
                return pl.BlockSpec((self.channels, self.rows, self.chunks * CHUNK), lambda i, j, t: (i, j, step(t)))
            if kind == "states":  # one for every tile
                return pl.BlockSpec((groups, None, self.rows, LANES), lambda i, j, t: (i, step(t), j, 0))
            if kind == "state":
                return pl.BlockSpec((groups, self.rows, LANES), lambda i, j, t: (i, j, 0))
            block = (groups if kind == "by group" else self.channels, *like.shape[1:])
            return pl.BlockSpec(block, lambda i, j, t: (i,) + (0,) * (len(block) - 1))

        return pl.pallas_call(
            body,
            grid=self.grid,
            in_specs=[spec(*x) for x in inputs],
            out_specs=[spec(*x) for x in outputs],
            out_shape=tuple(like for _, like in outputs),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        )(*(x for _, x in inputs))

    @property
    def at_once(self) -> int:
        """Groups whose latencies overlap."""
        return 2 if self.channels % (2 * self.group) == 0 else 1

    @property
    def visits(self) -> int:
        return self.channels // self.group // self.at_once

    def visit(self, i) -> list[tuple]:
        """(group, its channels) of those that are worked on at once."""
        groups = [i * self.at_once + k for k in range(self.at_once)]
        return [(g, [g * self.group + k for k in range(self.group)]) for g in groups]

    def across(self, visited: list, ref, table_ref, entering_ref, decay_ref, count: int, back: bool = False) -> tuple:
        """For each group the parts of its channels' tokens, and what `cross` makes of their summaries."""
        tokens = [[self.take(ref, k, count) for k in channels] for _, channels in visited]
        summaries = [
            product(count, *[(x, _load(table_ref, k)) for k, x in zip(channels, xs, strict=True)])
            for (_, channels), xs in zip(visited, tokens, strict=True)
        ]
        entering = [(decay_ref[g], entering_ref[g]) for g, _ in visited]
        return tokens, [self.cross(x, *y, back) for x, y in zip(summaries, entering, strict=True)]

    def cuts(self) -> list[tuple]:
        """(rows, tokens) of every chunk of a tile: rows in the order of the walk."""
        cut = lambda i, size: slice(i * size, (i + 1) * size)  # noqa: E731
        order = range(self.chunks)[:: -1 if self.reverse else 1]
        return [(cut(i, self.rows), cut(k, CHUNK)) for i, k in enumerate(order)]

    def take(self, ref, channel, count: int) -> list:
        """The parts of a channel's tile, chunk after chunk of all sequences."""
        x = ref[channel]
        return split(jnp.concatenate([x[:, tokens] for _, tokens in self.cuts()], 0), count)

    def put(self, ref, channel, y) -> None:
        """Writes such a tile, of one part."""
        for rows, tokens in self.cuts():
            ref[channel, :, tokens] = y[rows].astype(ref.dtype)

    def cross(self, summary, decay, h, back: bool) -> tuple:
        """The states before every chunk (rows, lanes), and the one after the last; back: from the last row."""
        swap = lambda x: pltpu.roll(x, STATES, 1)  # noqa: E731
        real, imaginary = (jnp.broadcast_to(decay[i : i + 1], h.shape) for i in range(2))
        before, other, swapped = [None] * self.chunks, swap(h), swap(imaginary)
        for i, (rows, _) in list(enumerate(self.cuts()))[:: -1 if back else 1]:
            before[i], x = h, summary[rows]
            h, other = real * h + imaginary * other + x, real * other + swapped * h + swap(x)
        return jnp.concatenate(before, 0), h


def split(x: jax.Array, count: int) -> list:
    """bfloat16 arrays whose sum is x, as near as so many come; x alone where it is one."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts


def beside(*arrays: list) -> list:
    """The parts of arrays, column by column beside each other; 0 where one has fewer."""
    part = lambda x, i: x[i] if i < len(x) else jnp.zeros_like(x[0])  # noqa: E731
    return [jnp.concatenate([part(x, i) for x in arrays], 1) for i in range(max(map(len, arrays)))]


def product(count: int, *factors: tuple[list, list], over_rows: bool = False) -> jax.Array:
    """The sum over factors of products of sums of parts, without what is less than `count` parts hold."""
    pairs = [
        (left[i], right[k - i])
        for k in range(count)
        for left, right in factors
        for i in range(len(left))
        if 0 <= k - i < len(right)
    ]
    axis = 0 if over_rows else 1
    left, right = (jnp.concatenate(x, y) for x, y in zip(zip(*pairs, strict=True), (axis, 0), strict=True))
    return jax.lax.dot_general(left, right, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnums=(3, 4))
def sweep(x: jax.Array, tables: Tables, h: jax.Array, reverse: bool, precision: str) -> tuple:
    """As `xla.sweep`, but the states are those before every tile: (groups of channels, tiles, b, LANES)."""
    (d, batch, _), count, (p, n) = x.shape, PARTS[precision], planes(tables)
    walk = Walk.of(x, n, reverse)
    matrices = [lanes.enter(tables, walk.group), lanes.leave(tables, walk.group)]
    matrices += [] if tables.theta_dqq is None else [jnp.swapaxes(tables.theta_dqq, 1, 2)]
    matrices = [("by channel", parts(table, count)) for table in matrices]

    def kernel(x_ref, h_ref, decay_ref, enter_ref, leave_ref, *refs):
        *theta_ref, y_ref, states_ref, last_ref = refs

        @pl.when(pl.program_id(2) == 0)
        def _():
            last_ref[...] = h_ref[...]

        def visit(i, _):
            visited = walk.visit(i)
            tokens, crossed = walk.across(visited, x_ref, enter_ref, last_ref, decay_ref, count)
            outputs = []
            for (_, channels), xs, (states, _) in zip(visited, tokens, crossed, strict=True):
                states = split(states, count)
                for k, x in zip(channels, xs, strict=True):
                    within = [(x, _load(ref, k)) for ref in theta_ref]
                    outputs.append((k, product(count, *within, (states, _load(leave_ref, k)))))
            for k, y in outputs:
                walk.put(y_ref, k, y)
            for (g, _), (_, last) in zip(visited, crossed, strict=True):
                states_ref[g], last_ref[g] = last_ref[g], last

        jax.lax.fori_loop(0, walk.visits, visit, None)

    inputs = [("tokens", x), ("state", lanes.to_lanes(h, p, walk.group)), ("by group", lanes.decay(tables, walk.group))]
    groups = d // walk.group
    outputs = [("tokens", x), ("states", float32(groups, walk.grid[2], batch, LANES))]
    outputs += [("state", float32(groups, batch, LANES))]
    y, states, last = walk.launch(kernel, inputs + matrices, outputs)
    return y, lanes.from_lanes(last, p, n, walk.group), states


@partial(jax.jit, static_argnums=(5, 6))
def gradients(
    x: jax.Array, dy: jax.Array, tables: Tables, states: jax.Array, costates: jax.Array, reverse: bool, precision: str
) -> Tables:
    """The cotangents of the tables, from the states before every tile that the two sweeps found.

    Of tokens and states it takes two parts at most.
    """
    d, count, (p, n) = x.shape[0], min(PARTS[precision], 2), planes(tables)
    walk = Walk.of(x, n, reverse)
    adjoint = tables.adjoint()
    first = tables.theta_dqq is not None
    matrices = [("by channel", parts(lanes.enter(table, walk.group), count)) for table in (tables, adjoint)]
    decays = [("by group", lanes.decay(table, walk.group)) for table in (tables, adjoint)]

    def kernel(x_ref, dy_ref, states_ref, costates_ref, decay_ref, back_ref, enter_ref, leave_ref, *sums):
        d_read_ref, d_enter_ref, d_decay_ref = sums

        @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
        def _():
            for ref in sums:
                ref[...] = jnp.zeros_like(ref)

        def visit(i, _):
            visited, total = walk.visit(i), partial(product, count, over_rows=True)
            xs, before = walk.across(visited, x_ref, enter_ref, states_ref, decay_ref, count)
            dys, after = walk.across(visited, dy_ref, leave_ref, costates_ref, back_ref, count, back=True)
            found = []
            for (g, channels), xs_g, dys_g, (s, _), (c, _) in zip(visited, xs, dys, before, after, strict=True):
                for row, other in enumerate((s, pltpu.roll(s, STATES, 1))):
                    found.append((d_decay_ref, (g, row), (c * other).reshape(-1, 8, LANES).sum(0)))
                s, c = split(s, count), split(c, count)
                found.append((d_enter_ref, g, total((c, beside(*xs_g)))))
                for k, x, dy in zip(channels, xs_g, dys_g, strict=True):
                    found.append((d_read_ref, k, total((dy, beside(s, x) if first else s))))
            for ref, at, value in found:
                ref[at] += value

        jax.lax.fori_loop(0, walk.visits, visit, None)

    inputs = [("tokens", x), ("tokens", dy), ("states", states), ("states", costates), *decays, *matrices]
    groups = d // walk.group
    outputs = [
        ("by channel", float32(d, CHUNK, LANES + CHUNK * first)),  # what reads states, and tokens
        ("by group", float32(groups, LANES, walk.group * CHUNK)),
        ("by group", float32(groups, 2, 8, LANES)),
    ]
    d_read, d_enter, d_decay = walk.launch(kernel, inputs, outputs)
    d_enter = lanes.own(jnp.swapaxes(d_enter, 1, 2).reshape(d, CHUNK, LANES), p, n, walk.group)
    d_leave = lanes.own(d_read[..., :LANES], p, n, walk.group)
    same, other = jnp.moveaxis(d_decay.sum(2).reshape(-1, 2, 2, walk.group, STATES // walk.group)[..., :n], 1, 0)
    d_decay = tuple(z.reshape(d, n) for z in (same[:, 0] + same[:, 1], other[:, 1] - other[:, 0])[:p])
    return Tables(d_read[..., LANES:] if first else None, jnp.swapaxes(d_enter, 1, 2), d_leave, d_decay)


def _load(table_ref, channel) -> list:
    return [table_ref[channel, i] for i in range(table_ref.shape[1])]
