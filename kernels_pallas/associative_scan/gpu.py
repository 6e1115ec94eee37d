r"""The recurrence on NVIDIA GPUs: states in registers, tokens streamed through shared memory.

A warpgroup owns 128 channels, one a lane, of one batch row and one segment of the sequence. Where batch and channels
alone leave multiprocessors idle, the sequence is cut into segments: a first pass finds what each segment does to a
state, a short recurrence the states that enter each, and the second pass runs all segments at once, exactly. The
backward pass is one kernel of the same shape that walks the other way: with c what the tokens behind it send back,
$\bar b_t = \bar h_t + c$, $\bar a_t = \bar b_t h_{t-1}^*$ and then $c = a_t^* \bar b_t$.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.associative_scan.reference import conjugate, plus, times

LANES = 128
STAGES = 4  # tiles in flight
TILE_BYTES = 8192  # of one plane, in shared memory, at most
SHARED_BYTES = 220 * 1024  # of a multiprocessor, for all tiles in flight
MULTIPROCESSORS = 132
BUSY = 100  # warpgroups that are worth no cut, which reads everything twice
SHORTEST_SEGMENT = 128  # tokens
AXES = ("block", "segment", "batch")
Planes = tuple[jax.Array, ...]


def refusal(a: Planes, b: Planes) -> str:
    """Why these planes cannot be run here; "" where they can."""
    _, length, channels = b[0].shape
    if length % 8:
        return f"the length is {length}, no multiple of 8"
    if channels % LANES:
        return f"there are {channels} channels, no multiple of {LANES}"
    if any(x.dtype.itemsize > 4 for x in (*a, *b)):
        return "it computes in float32"
    return ""


class Grid(NamedTuple):
    """Who walks where: batch x segments x blocks warpgroups, each over `steps` tiles of tokens."""

    batch: int
    segments: int
    blocks: int  # of LANES channels
    steps: int
    tile: int  # tokens
    backwards: bool

    @classmethod
    def of(cls, b: jax.Array, backwards: bool, planes: int) -> "Grid":
        """The grid for `planes` like b that stream; cut, it has up to two warpgroups on each multiprocessor."""
        batch, length, channels = b.shape
        blocks, segments = channels // LANES, 1
        rows = batch * blocks
        while rows < BUSY and rows * segments <= MULTIPROCESSORS and length % (16 * segments) == 0:
            if length < 2 * segments * SHORTEST_SEGMENT:
                break
            segments *= 2
        row_bytes = LANES * b.dtype.itemsize
        shared = SHARED_BYTES // min(2, pl.cdiv(rows * segments, MULTIPROCESSORS))
        tile = TILE_BYTES // row_bytes
        while STAGES * planes * tile * row_bytes > shared or (length // segments) % tile:
            tile //= 2
        return cls(batch, segments, blocks, length // segments // tile, tile, backwards)

    @property
    def state(self) -> jax.ShapeDtypeStruct:
        """One float32 plane of a state for each segment."""
        return jax.ShapeDtypeStruct((self.batch, self.segments, self.blocks * LANES), jnp.float32)

    @property
    def rows(self) -> range:
        """The tokens of a tile in the order of the walk."""
        return range(self.tile)[:: -1 if self.backwards else 1]

    def tile_at(self, step: jax.Array) -> jax.Array:
        """The tile that this warpgroup visits at a step."""
        return jax.lax.axis_index("segment") * self.steps + (self.steps - 1 - step if self.backwards else step)

    def launch(self, body: Callable, out_type: list, *inputs: jax.Array) -> list[jax.Array]:
        kernel = plgpu.kernel(body, out_type=out_type, grid=(self.blocks, self.segments, self.batch), grid_names=AXES)
        return kernel(*inputs)

    def stream(self, body: Callable, inputs: tuple, outputs: tuple, carry: Planes) -> Planes:
        """carry = body(step, tiles of inputs, tiles of outputs, carry), tile after tile; the carry at the end."""
        block, batch = jax.lax.axis_index("block"), jax.lax.axis_index("batch")
        spec = plgpu.BlockSpec((self.tile, LANES), lambda step: (self.tile_at(step), block))
        rings = [plgpu.SMEM((STAGES, self.tile, LANES), ref.dtype) for ref in outputs]

        def run(*rings):
            def tile(indices, *refs):
                step, (*ins, carry) = indices[0], refs
                plgpu.wait_smem_to_gmem(len(outputs) * (STAGES - 1), wait_read_only=True)
                outs = tuple(ring.at[jax.lax.rem(step, STAGES)] for ring in rings)
                carry = body(step, tuple(ins), outs, carry)
                plgpu.commit_smem()
                rows = pl.ds(self.tile_at(step) * self.tile, self.tile)
                for out, ref in zip(outs, outputs, strict=True):
                    plgpu.copy_smem_to_gmem(out, ref.at[batch, rows, pl.ds(block * LANES, LANES)])
                return carry

            pipeline = plgpu.emit_pipeline(
                tile, grid=(self.steps,), in_specs=[spec] * len(inputs), max_concurrent_steps=STAGES, init_carry=carry
            )
            end = pipeline(*(ref.at[batch] for ref in inputs))
            plgpu.wait_smem_to_gmem(0)
            return end

        return pl.run_scoped(run, *rings)


def _mine() -> tuple:
    """Where this warpgroup's state lies in an array like `Grid.state`."""
    block, segment, batch = map(jax.lax.axis_index, AXES)
    return batch, segment, pl.ds(block * LANES, LANES)


def _load(refs: tuple, index) -> Planes:
    return tuple(ref[index].astype(jnp.float32) for ref in refs)


def _ahead(rows: range, load: Callable) -> Iterator[tuple]:
    """(t, what `load` loads for t) of every row, the next one loaded before t's states are stored.

    The compiler, which cannot know that they lie apart, moves no load before a store.
    """
    following = load(rows[0])
    for t, t_next in zip(rows, [*rows[1:], None], strict=True):
        now, following = following, None if t_next is None else load(t_next)
        yield t, now


def _store(refs: tuple, index, values: Planes) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[index] = value.astype(ref.dtype)


def _parts(refs: tuple, *counts: int) -> list[tuple]:
    """refs cut into runs of these lengths."""
    cut, start = [], 0
    for count in counts:
        cut.append(refs[start : start + count])
        start += count
    return cut


def scan(a: Planes, b: Planes, h: Planes, reverse: bool) -> tuple[Planes, Planes]:
    """All states, in b's dtype, and the last one in float32; arguments as in `reference.scan`."""
    p, per_token = len(b), a[0].ndim == 3
    grid = Grid.of(b[0], reverse, p * (2 + per_token))

    def kernel(*refs):
        a_refs, b_refs, h_refs, out_refs, end_refs = _parts(refs, p, p, p, p, p)
        fixed = None if per_token else _load(a_refs, _mine()[2])

        def tile(step, ins, outs, h):
            *a_tile, b_tile = _parts(ins, *[p] * (1 + per_token))
            for t, (a_t, b_t) in _ahead(grid.rows, lambda t: (fixed or _load(a_tile[0], t), _load(b_tile, t))):
                h = plus(times(a_t, h), b_t)
                _store(outs, t, h)
            return h

        inputs = (a_refs if per_token else ()) + b_refs
        _store(end_refs, _mine(), grid.stream(tile, inputs, out_refs, _load(h_refs, _mine())))

    entering = _entering(grid, a, b, h, adjoint=False)
    out_type = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in b), *[grid.state] * p]
    states, ends = _parts(tuple(grid.launch(kernel, out_type, *a, *b, *entering)), p, p)
    return states, tuple(x[:, 0 if reverse else -1] for x in ends)


def adjoint(a: Planes, h: Planes, states: Planes, d_states: Planes, d_last: Planes, reverse: bool) -> tuple:
    """As `reference.adjoint`."""
    p, per_token, length = len(h), a[0].ndim == 3, states[0].shape[1]
    grid = Grid.of(d_states[0], not reverse, p * (3 + 2 * per_token))

    def kernel(*refs):
        a_refs, h_refs, state_refs, d_refs, c_refs, db_refs, da_refs, dh_refs = _parts(refs, *[p] * 8)
        batch, _, channels = _mine()
        fixed = None if per_token else _load(a_refs, channels)

        def tile(step, ins, outs, carry):
            *a_tile, state_tile, d_tile = _parts(ins, *[p] * (2 + per_token))
            c, total = carry[:p], carry[p:]
            before = (grid.tile_at(step) * grid.tile - 1) if grid.backwards else (grid.tile_at(step) + 1) * grid.tile
            outside = _load(state_refs, (batch, jnp.clip(before, 0, length - 1), channels))
            first = jnp.broadcast_to((before < 0) | (before >= length), (LANES,))
            h_0 = _load(h_refs, (batch, channels))
            outside = tuple(jnp.where(first, x, y) for x, y in zip(h_0, outside, strict=True))
            t_before = dict(zip(grid.rows, grid.rows[1:], strict=False))

            def load(t):
                state = _load(state_tile, t_before[t]) if t in t_before else outside
                return fixed or _load(a_tile[0], t), state, _load(d_tile, t)

            for t, (a_t, h_before, d_t) in _ahead(grid.rows, load):
                g = plus(d_t, c)
                da = times(g, conjugate(h_before))
                _store(outs[:p], t, g)
                if per_token:
                    _store(outs[p:], t, da)
                else:
                    total = plus(total, da)
                c = times(conjugate(a_t), g)
            return (*c, *total)

        inputs = (a_refs if per_token else ()) + state_refs + d_refs
        outputs = db_refs + (da_refs if per_token else ())
        zeros = () if per_token else tuple(jnp.zeros((LANES,), jnp.float32) for _ in h)
        carry = grid.stream(tile, inputs, outputs, (*_load(c_refs, _mine()), *zeros))
        _store(dh_refs, _mine(), carry[:p])
        if not per_token:
            _store(da_refs, _mine(), carry[p:])

    entering = _entering(grid, a, d_states, d_last, adjoint=True)
    like = lambda planes: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in planes]  # noqa: E731
    out_type = [*like(d_states), *(like(a) if per_token else [grid.state] * p), *[grid.state] * p]
    db, da, dh = _parts(tuple(grid.launch(kernel, out_type, *a, *h, *states, *d_states, *entering)), p, p, p)
    da = da if per_token else tuple(x.sum(1) for x in da)
    return da, db, tuple(x[:, -1 if reverse else 0] for x in dh)


def _entering(grid: Grid, a: Planes, b: Planes, h: Planes, adjoint: bool) -> Planes:
    """What enters each segment, (batch, segments, channels): states, or what the tokens behind send back."""
    if grid.segments == 1:
        return tuple(x[:, None] for x in h)
    p, per_token = len(b), a[0].ndim == 3

    def kernel(*refs):
        a_refs, b_refs, product_refs, end_refs = _parts(refs, p, p, p, p)
        fixed = None if per_token else _load(a_refs, _mine()[2])
        zero = jnp.zeros((LANES,), jnp.float32)

        def tile(step, ins, outs, carry):
            product, h = carry[:p], carry[p:]
            *a_tile, b_tile = _parts(ins, *[p] * (1 + per_token))
            for t in grid.rows:
                a_t = fixed or _load(a_tile[0], t)
                a_t = conjugate(a_t) if adjoint else a_t
                b_t, product = _load(b_tile, t), times(a_t, product)
                h = times(a_t, plus(b_t, h)) if adjoint else plus(times(a_t, h), b_t)
            return (*product, *h)

        inputs = (a_refs if per_token else ()) + b_refs
        one = (zero + 1, *[zero] * (p - 1))
        carry = grid.stream(tile, inputs, (), (*one, *[zero] * p))
        _store(product_refs, _mine(), carry[:p])
        _store(end_refs, _mine(), carry[p:])

    products, ends = _parts(tuple(grid.launch(kernel, [grid.state] * (2 * p), *a, *b)), p, p)
    order = range(grid.segments)[:: -1 if grid.backwards else 1]
    entering = {}
    for s in order:
        entering[s] = h
        h = plus(times(tuple(x[:, s] for x in products), h), tuple(x[:, s] for x in ends))
    return tuple(jnp.stack([entering[s][i] for s in range(grid.segments)], 1) for i in range(p))
