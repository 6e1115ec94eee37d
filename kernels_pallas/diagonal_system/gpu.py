r"""The whole operation on NVIDIA Hopper GPUs: no state of a single token goes through device memory.

A warpgroup takes GROUP rows, each a segment of a sequence, and walks over tiles of ROWS tokens of each, so that a tile
is one 64-row operand of the tensor cores. It takes the states a slab of STATES at once: the tokens by their part of B,
the states across the tile's tokens in shared memory, a lane for each state of each row, and the states by their part
of C, which adds to outputs that stay in registers. B and C pass through a ring in shared memory that all warpgroups of
a multiprocessor read; where it holds all of them, they stay. Sequences are cut into segments, for as many rows as
keep all multiprocessors busy: a first walk finds what each segment does to a state of zero, a short recurrence the
states that enter each, and the second walk runs all segments at once.

Products are of bfloat16 parts, summed in float32: one part of each factor for bfloat16 tokens, of float32 ones one
("default") or two ("high").
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.associative_scan.reference import conjugate, plus, times
from kernels_pallas.associative_scan.xla import scan
from kernels_pallas.diagonal_system.gpu_tiles import Plan, Ring, Tokens, across, at_once, matrix, multiply
from kernels_pallas.long_convolution import gpu_tiles as tile
from kernels_pallas.long_convolution.fused import float32
from kernels_pallas.long_convolution.fused import parts as parts_of
from kernels_pallas.long_convolution.gpu_tiles import ALL, AT_ONCE, CHUNK, GROUP, PADDED, ROWS, STATES

PARTS = {"bfloat16": {"default": 1}, "float32": {"default": 1, "high": 2}}  # of a factor, by tokens and precision
MULTIPROCESSORS = 132
SHORTEST_SEGMENT = 64  # tokens
WIDEST = 256  # channels, and states


def refusal(u: jax.Array, a: jax.Array, precision: str) -> str:
    """Why u (b, l, d) and a (n,) cannot be run here; "" where they can."""
    batch, length, d = u.shape
    if u.dtype.name not in PARTS or a.dtype != jnp.complex64:
        return f"u is {u.dtype} and a {a.dtype}; it takes float32 or bfloat16, and complex64"
    if precision not in PARTS[u.dtype.name]:
        return f"the precision of {u.dtype} is {precision!r}, not one of {', '.join(PARTS[u.dtype.name])}"
    if d % CHUNK or d > WIDEST:
        return f"there are {d} channels, no multiple of {CHUNK} up to {WIDEST}"
    if a.shape[0] > WIDEST:
        return f"there are {a.shape[0]} states, more than {WIDEST}"
    if length % ROWS:
        return f"the length is {length}, no multiple of {ROWS}"
    if batch * _segments(batch, length) % (2 * GROUP):
        return f"a batch of {batch} sequences of length {length} has no cut into a multiple of {2 * GROUP} rows"
    return ""


def _segments(batch: int, length: int) -> int:
    """How many a sequence is cut into: as many as give rows to two warpgroups of every multiprocessor."""
    segments = 1
    while length % (2 * segments * ROWS) == 0:
        whole, busy = batch * segments % (2 * GROUP) == 0, batch * segments > GROUP * MULTIPROCESSORS
        if whole and (busy or length < 2 * segments * SHORTEST_SEGMENT):
            break
        segments *= 2
    return segments


@partial(jax.jit, static_argnums=(6, 7, 8))  # lowered once for all layers
def sweep(u, into_md, decay: tuple, out_md, D_d, h_bm, reverse: bool, precision: str, adjoint: bool = False) -> tuple:
    """(y, the last state (b, m), the states before every tile (rows, tiles, slabs, 2 STATES)).

    adjoint: of cotangents, h_bm that of the last state; what is carried is then a^* times that of the next token's.
    """
    (batch, length, d), n, parts = u.shape, len(decay[0]), PARTS[u.dtype.name][precision]
    slabs, segments = pl.cdiv(n, STATES), _segments(batch, length)
    plan = Plan(u.dtype, d, slabs, parts, length // segments // ROWS, reverse, adjoint, True)
    x, wide = _tiles(u, batch * segments), _slabs(jnp.concatenate(decay)[:, None], slabs)[..., 0]
    into, out = (parts_of(_slabs(w, slabs), parts) for w in (into_md, out_md))
    both = jnp.stack([into, out], 1).reshape(-1, CHUNK, d)
    h = jnp.moveaxis(_slabs(h_bm.T, slabs), 2, 0)[:, None]
    if segments > 1:
        zero = jnp.zeros((batch * segments, *wide.shape))
        (ends,) = _walk(plan._replace(reads=False), x, into.reshape(-1, CHUNK, d), wide, zero, D_d)
        h = _entering(ends.reshape(batch, segments, *wide.shape), wide, h, length // segments, reverse)
    last, y, states = _walk(plan, x, both, wide, h.reshape(-1, *wide.shape), D_d)
    last = last.reshape(batch, segments, *wide.shape)[:, 0 if reverse else -1]
    return y.reshape(u.shape), _unslabs(jnp.moveaxis(last, 0, 2), n).T, states


def _walk(plan: Plan, x, matrices, decay, h, D) -> list[jax.Array]:
    """Of x (rows, tiles, ROWS, d) and states h (rows, slabs, 2 STATES): the last states, and if the plan reads them
    the outputs and the states before every tile."""
    out_type = [float32(*h.shape)]
    if plan.reads:
        out_type += [jax.ShapeDtypeStruct(x.shape, x.dtype), float32(len(h), plan.tiles, *h.shape[1:])]
    decay = jnp.broadcast_to(decay[None], (GROUP, *decay.shape))
    grid = {"block": len(h) // GROUP // plan.warpgroups}
    kernel = partial(_all_tiles, plan)
    return _launch(kernel, out_type, grid, plan.warpgroups, plan.scratch(), x, matrices, decay, h, D)


def _all_tiles(plan: Plan, x_ref, matrices_ref, decay_ref, h_ref, D_ref, last_ref, *refs) -> None:
    """The walk of one warpgroup; the states of its rows between tiles are kept in last_ref."""
    *outs, s = refs
    block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
    row = (block * plan.warpgroups + warpgroup) * GROUP
    rows, summaries = pl.ds(row, GROUP), s["summaries"].at[warpgroup]
    ring = Ring(s, matrices_ref, plan, jax.lax.rem(block, plan.slabs))
    tokens = Tokens(s, x_ref, plan, row)
    ring.start()
    tokens.start(0)
    each_slab = partial(jax.lax.fori_loop, 0, plan.slabs, init_val=None)
    each_slab(lambda j, _: tile.store(last_ref, (rows, j), tile.load(h_ref, (rows, j))))

    def slab(i, total, k, _):
        j = jax.lax.rem(k + ring.first, plan.slabs)
        h, decay = tile.load(last_ref, (rows, j)), tile.load(decay_ref, (ALL, j))
        if plan.reads:
            tile.store(outs[1], (rows, tokens.at(i), j), h)

        def enter(entered):
            x = tokens.operand.at.__getitem__
            use = lambda part: multiply(plan.parts, entered, x, lambda q: part(q).T)  # noqa: E731
            ring.use(i, k * (1 + plan.reads), PADDED, use)
            return tile.value(entered)

        tile.write(summaries, pl.run_scoped(enter, plgpu.ACC((CHUNK, PADDED), jnp.float32)))
        plgpu.commit_smem()
        tile.store(last_ref, (rows, j), across(summaries, decay, h, plan.reverse, plan.adjoint))
        plgpu.commit_smem()
        if plan.reads:
            parts = s["h"].at[warpgroup]
            tile.split(parts, tile.read(summaries))
            ring.use(i, 2 * k + 1, CHUNK, partial(multiply, plan.parts, total, parts.at.__getitem__))

    def visit(i, total):
        tokens.take(i)
        each_slab(partial(slab, i, total))
        if plan.reads:
            tokens.put(i, tile.value(total), D_ref, outs[0])
        pl.when(i + 1 < plan.tiles)(lambda: tokens.start(i + 1))

    def tile_at(i, _):
        if plan.reads:
            pl.run_scoped(partial(visit, i), plgpu.ACC((CHUNK, plan.d), jnp.float32))
        else:
            visit(i, None)

    jax.lax.fori_loop(0, plan.tiles, tile_at, None)
    plgpu.wait_smem_to_gmem(0)


@partial(jax.jit, static_argnums=7)
def gradients(u, dy, into_md, decay: tuple, out_md, states, costates, reverse: bool) -> tuple:
    """The cotangents of B and C (m, d) and of the decay, of bfloat16 tokens and of what two sweeps found.

    A multiprocessor takes one slab and some rows. One of two warpgroups has the tokens, the other their cotangents;
    they meet where both have found a tile's states, and where both have used them.
    """
    (rows, tiles, slabs), d, n = states.shape[:3], u.shape[2], len(decay[0])
    plan, groups = Plan(u.dtype, d, slabs, 1, tiles, False, False, True), rows // GROUP
    blocks = math.gcd(groups, 2 ** int(math.log2(MULTIPROCESSORS // slabs)))
    scratch = plan.own(2) | {"table": matrix(2, PADDED, d), "loaded": plgpu.Barrier(num_arrivals=1, num_barriers=2)}
    scratch |= {name: plgpu.Barrier(num_arrivals=2) for name in ("found", "used")}
    tables = jnp.stack([_slabs(w, slabs) for w in (into_md, out_md)], 1).astype(jnp.bfloat16)
    wide = _slabs(jnp.concatenate(decay)[:, None], slabs)[..., 0]
    wide = jnp.broadcast_to(wide[None], (GROUP, *wide.shape))
    out_type = float32(slabs, blocks, 2, CHUNK, d), float32(slabs, blocks, GROUP, 2 * STATES)
    grid, arrays = {"slab": slabs, "block": blocks}, (_tiles(u, rows), _tiles(dy, rows), tables, wide, states, costates)
    sums, products = _launch(partial(_pair, plan, groups // blocks, reverse), out_type, grid, 2, scratch, *arrays)
    d_into, d_out = (_unslabs(x, n) for x in jnp.moveaxis(sums.sum(1), 1, 0))
    d_decay = _unslabs(products.sum((1, 2))[:, :, None], n)[:, 0]
    return d_into, (d_decay[:n], d_decay[n:]), d_out


def _pair(plan: Plan, groups: int, reverse: bool, *refs) -> None:
    """Two warpgroups over the tiles of so many groups of rows: warpgroup 0 the tokens, 1 their cotangents."""
    u_ref, dy_ref, tables_ref, decay_ref, states_ref, costates_ref, *_, s = refs
    slab, warpgroup = map(jax.lax.axis_index, ("slab", "warpgroup"))
    table, loaded = s["table"].at[warpgroup], s["loaded"].at[warpgroup]
    plgpu.copy_gmem_to_smem(tables_ref.at[slab, warpgroup], table.at[pl.ds(0, CHUNK)], loaded)
    plgpu.barrier_wait(loaded)
    decay = tile.load(decay_ref, (ALL, slab))

    @pl.when(warpgroup == 0)
    def _():
        _side(plan, groups, reverse, 0, u_ref, states_ref, decay, *refs)

    @pl.when(warpgroup == 1)
    def _():
        _side(plan, groups, reverse, 1, dy_ref, costates_ref, conjugate(decay), *refs)


def _side(plan: Plan, groups: int, reverse: bool, w: int, x_ref, entering_ref, decay: tuple, *refs) -> None:
    """The walk of warpgroup w over x, from the states that enter every tile; its sums as it ends."""
    *_, states_ref, _, sums_ref, products_ref, s = refs
    slab, block, tiles = jax.lax.axis_index("slab"), jax.lax.axis_index("block"), plan.tiles
    summaries, table, x = s["summaries"].at[w], s["table"].at[w], s["x"].at[w, 0]
    own, other = s["h"].at[w], s["h"].at[1 - w, 0]

    def tokens(k):
        return Tokens(s, x_ref, plan, (block * groups + k // tiles) * GROUP)

    def enter(entered):
        plgpu.wgmma(entered, x, table.T)
        return tile.value(entered)

    def visit(total, k, products):
        i, mine = jax.lax.rem(k, tiles), tokens(k)
        before = pl.ds(mine.row, GROUP), i, slab
        mine.take(i)
        tile.write(summaries, pl.run_scoped(enter, plgpu.ACC((CHUNK, PADDED), jnp.float32)))
        plgpu.commit_smem()
        across(summaries, decay, tile.load(entering_ref, before), reverse if w == 0 else not reverse, w == 1)
        plgpu.commit_smem()
        tile.split(own, tile.read(summaries))
        tile.meet(s["found"])
        plgpu.wgmma(total, other.T, x)
        if w == 1:
            products = _decay_products(s["summaries"], tile.load(states_ref, before), products, reverse)
        plgpu.wgmma_wait(0)
        pl.when(k + 1 < groups * tiles)(lambda: tokens(k + 1).start(jax.lax.rem(k + 1, tiles)))
        tile.meet(s["used"])
        return products

    def all_tiles(total):
        tokens(0).start(0)
        start = tuple(map(jnp.zeros_like, decay)) if w == 1 else None
        products = jax.lax.fori_loop(0, groups * tiles, partial(visit, total), start)
        sums_ref[slab, block, w] = tile.value(total)
        if w == 1:
            tile.store(products_ref, (slab, block, ALL), products)

    pl.run_scoped(all_tiles, plgpu.ACC((CHUNK, plan.d), jnp.float32))


def _decay_products(summaries, h: tuple, products: tuple, reverse: bool) -> tuple:
    """products + the sum of g_t h_{t-1}^* over a tile, of its states and costates and the states before it."""

    def advance(i, carry):
        h, products = carry
        rows = at_once(i, reverse)
        states, costates = ([tile.load(summaries.at[w], row) for row in rows] for w in range(2))
        for after, g in zip(states, costates, strict=True):
            products = plus(products, times(g, conjugate(h)))
            h = after
        return h, products

    return jax.lax.fori_loop(0, ROWS // AT_ONCE, advance, (h, products))[1]


def _launch(kernel, out_type, grid: dict, warpgroups: int, scratch: dict, *arrays: jax.Array):
    launch = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=[scratch],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    return launch(*arrays)


def _entering(ends, decay, h, length: int, reverse: bool):
    """What enters each segment (b, segments, slabs, 2 STATES), of what each makes of a state of zero."""
    planes = lambda x: tuple(y.reshape(*x.shape[:-2], -1) for y in jnp.split(x, 2, -1))  # noqa: E731
    start = tuple(x[:, 0] for x in planes(h))
    after, _ = scan(_power(planes(decay), length), planes(ends), start, reverse)
    shift = lambda x, y: [x[:, 1:], y[:, None]] if reverse else [y[:, None], x[:, :-1]]  # noqa: E731
    before = [jnp.concatenate(shift(x, y), 1) for x, y in zip(after, start, strict=True)]
    return jnp.concatenate([x.reshape(*ends.shape[:3], STATES) for x in before], -1)


def _power(square: tuple, exponent: int) -> tuple:
    result = None
    while exponent:
        if exponent % 2:
            result = square if result is None else times(result, square)
        square, exponent = times(square, square), exponent // 2
    return result


def _tiles(x, rows: int):
    return x.reshape(rows, -1, ROWS, x.shape[2])


def _slabs(x, slabs: int):
    """(2 n, k) as (slabs, 2 STATES, k): planes of STATES states, the missing ones 0."""
    n, k = x.shape[0] // 2, x.shape[1]
    x = jnp.pad(x.reshape(2, n, k), ((0, 0), (0, slabs * STATES - n), (0, 0)))
    return jnp.moveaxis(x.reshape(2, slabs, STATES, k), 1, 0).reshape(slabs, 2 * STATES, k)


def _unslabs(x, n: int):
    """What `_slabs` made it of."""
    x = jnp.moveaxis(x.reshape(-1, 2, STATES, x.shape[2]), 0, 1)
    return x.reshape(2, -1, x.shape[3])[:, :n].reshape(2 * n, -1)
