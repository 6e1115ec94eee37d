r"""The walk over chunks of `xla` on NVIDIA Hopper GPUs: all of it in one kernel, and the tables' gradients in another.

A warpgroup takes one channel of GROUP sequences and walks over tiles of ROWS chunks of each, so that a tile is one
64 x 64 operand of the tensor cores, a chunk a row. All products of a tile are then 64 x 64 x 64: the tokens by the
Toeplitz matrix, the tokens by the table that enters them into states, the states by the table that reads them.
Between the last two the states cross the chunks in shared memory, a lane for each state of each sequence; they
cross the tiles in registers. The tokens are read once, the outputs are written once.

Products are of bfloat16 parts, summed in float32. A float32 is the sum of three such parts; the precision says how
many are taken: "default" 1, "high" 2, "highest" 3. Tokens in bfloat16 have one.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.associative_scan.reference import conjugate
from kernels_pallas.long_convolution import fused
from kernels_pallas.long_convolution import gpu_tiles as tile
from kernels_pallas.long_convolution.fused import PARTS, float32, parts, planes
from kernels_pallas.long_convolution.gpu_tiles import ALL, CHUNK, GROUP, PADDED, ROWS, STATES, TILE
from kernels_pallas.long_convolution.xla import Tables
from kernels_pallas.partition import over_batch

ACCUMULATOR = plgpu.ACC((CHUNK, CHUNK), jnp.float32)


def refusal(u: jax.Array | jax.ShapeDtypeStruct, a: jax.Array, precision: str) -> str:
    """Why u (b, l, d) and a (d, n) cannot be run here; "" where they can."""
    return fused.refusal(u, a, precision, group=GROUP, shortest=TILE, most_states=STATES)


@partial(jax.jit, static_argnums=(3, 4))  # lowered once for all layers
def sweep(x: jax.Array, tables: Tables, h: jax.Array, reverse: bool, precision: str) -> tuple:
    """As `xla.sweep`, but the states are those before every tile, of 2 STATES planes."""
    (d, batch, length), count = x.shape, PARTS[precision]
    tiles, (p, n) = length // TILE, planes(tables)
    theta = [] if tables.theta_dqq is None else [tables.theta_dqq]
    matrices = jnp.concatenate([_enter(tables), *theta], 1), _wider(tables.leave_dqm, p, 2)
    matrices = [parts(x, count) for x in matrices]

    def kernel(x_ref, h_ref, decay_ref, first_ref, second_ref, y_ref, states_ref, last_ref, s):
        tokens = tile.Tokens(s, "x", x_ref, tiles, reverse)
        first, second = tokens.start(first_ref, second_ref)
        mine, decay = tile.mine(), tile.load(decay_ref, (jax.lax.axis_index("channel"), ALL))
        summaries, out = s["summaries"]

        def visit(i, h):
            tile.store(states_ref, (*mine, ALL, tokens.at(i)), h)
            within = tile.product(tokens.take(i), first)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            h = tile.cross(summaries, within[:, :PADDED], decay, h, reverse)
            tile.split(s["x parts"], tile.read(summaries))
            y = tile.product(tile.each(s["x parts"]), second)
            out[...] = (y + within[:, PADDED:] if theta else y).astype(out.dtype)
            plgpu.commit_smem()
            for g in range(GROUP):
                plgpu.copy_smem_to_gmem(out.at[pl.ds(g * ROWS, ROWS)], y_ref.at[(*mine, g, tokens.at(i))])
            return h

        tile.store(last_ref, (*mine, ALL), jax.lax.fori_loop(0, tiles, visit, tile.load(h_ref, (*mine, ALL))))
        plgpu.wait_smem_to_gmem(0)

    scratch = tile.scratch("x", x.dtype, count, *matrices)
    scratch |= {
        "summaries": plgpu.RefUnion(tile.SUMMARIES, tile.matrix(x.dtype)),
        "x parts": tile.matrix(jnp.bfloat16, count),
    }
    x_tiles, h = _tiles(x), _grouped(_wider(h, p, 2))
    states = float32(*h.shape[:3], tiles, 2 * STATES)
    out_type = jax.ShapeDtypeStruct(x_tiles.shape, x.dtype), states, float32(*h.shape)
    y, states, last = _launch(kernel, out_type, scratch, (x_tiles, h), _decay(tables), *matrices)
    return y.reshape(x.shape), _narrower(last.reshape(d, batch, -1), p, n, 2), states


@partial(jax.jit, static_argnums=(5, 6))
def gradients(
    x: jax.Array, dy: jax.Array, tables: Tables, states: jax.Array, costates: jax.Array, reverse: bool, precision: str
) -> Tables:
    """The cotangents of the tables, from the states before every tile that the two sweeps found.

    One of two warpgroups has the tokens, the other their cotangents; they meet where both have found a tile's
    states, and where both have used them. They take two parts at most.
    """
    (d, batch, length), count = x.shape, min(PARTS[precision], 2)
    tiles, (p, n) = length // TILE, planes(tables)
    matrices = [parts(_enter(table), count) for table in (tables, tables.adjoint())]
    products = 3 if tables.theta_dqq is None else 4

    def kernel(x_ref, dy_ref, states_ref, costates_ref, decay_ref, enter_ref, leave_ref, sums_ref, s):
        mine, decay = tile.mine(), tile.load(decay_ref, (jax.lax.axis_index("channel"), ALL))
        u, v = tile.Tokens(s, "x", x_ref, tiles), tile.Tokens(s, "dy", dy_ref, tiles)
        before, after = tile.each(s["x states"]), tile.each(s["dy states"])

        def side(tokens, table_ref, entering_ref, decay, backwards: bool, blocks: range, factors: Callable) -> None:
            (table,) = tokens.start(table_ref)
            summaries = s["summaries"].at[jax.lax.axis_index("side")]

            def all_tiles(*sums):
                def visit(i, _):
                    h = tile.load(entering_ref, (*mine, ALL, i))
                    tile.cross(summaries, tile.product(tokens.take(i), table), decay, h, backwards)
                    tile.split(s[f"{tokens.name} states"], tile.read(summaries))
                    tile.meet(s["found"])
                    for total, (left, right) in zip(sums, factors(i), strict=True):
                        tile.multiply(total, left, right, over_rows=True)
                    plgpu.wgmma_wait(0)
                    tile.meet(s["used"])

                jax.lax.fori_loop(0, tiles, visit, None)
                for block, total in zip(blocks, sums, strict=True):
                    sums_ref[(*mine, block)] = tile.value(total)

            pl.run_scoped(all_tiles, *[ACCUMULATOR] * len(blocks))

        @pl.when(jax.lax.axis_index("side") == 0)
        def _():
            factors = lambda i: [(after, u.parts(i)), (after, before)]  # noqa: E731
            side(u, enter_ref, states_ref, decay, reverse, range(2), factors)

        @pl.when(jax.lax.axis_index("side") == 1)
        def _():
            factors = lambda i: [(v.parts(i), before), (v.parts(i), u.parts(i))][: products - 2]  # noqa: E731
            side(v, leave_ref, costates_ref, conjugate(decay), not reverse, range(2, products), factors)

    scratch = {name: plgpu.Barrier(num_arrivals=2) for name in ("found", "used")}
    scratch["summaries"] = plgpu.SMEM((2, *tile.SUMMARIES.shape), jnp.float32)
    for name, matrix in zip(("x", "dy"), matrices, strict=True):
        scratch |= tile.scratch(name, x.dtype, count, matrix)
        scratch |= {f"{name} states": tile.matrix(jnp.bfloat16, count)}
    arrays = _tiles(x), _tiles(dy), states, costates
    out_type = (float32(d, batch // GROUP, products, CHUNK, CHUNK),)
    (sums,) = _launch(kernel, out_type, scratch, arrays, _decay(tables), *matrices, num_threads=2, thread_name="side")
    return _cotangents(sums.sum(1), p, n)


def _cotangents(sums: jax.Array, p: int, n: int) -> Tables:
    """Of products over all chunks: of G with u, with S, of dy with S, with u."""
    d_enter, by_planes, d_leave, *d_theta = (sums[:, i] for i in range(sums.shape[1]))
    of_state = jnp.einsum("dinjn->ijdn", by_planes.reshape(-1, 2, STATES, 2, STATES))[..., :n]
    d_decay = of_state[0, 0] + of_state[1, 1], of_state[1, 0] - of_state[0, 1]
    d_theta = d_theta[0] if d_theta else None
    return Tables(d_theta, _narrower(d_enter, p, n, 1), _narrower(d_leave, p, n, 2), d_decay[:p])


def _launch(kernel: Callable, out_type: tuple, scratch: dict, by_group: tuple, *tables: jax.Array, **threads) -> tuple:
    """The kernel for every channel and group. Devices share it by groups, the second axis of all but the tables."""

    def run(*arrays):
        groups = arrays[0].shape[1]
        launch = plgpu.kernel(
            kernel,
            out_type=tuple(jax.ShapeDtypeStruct((x.shape[0], groups, *x.shape[2:]), x.dtype) for x in out_type),
            grid=(arrays[0].shape[0], groups),
            grid_names=tile.AXES,
            scratch_types=[scratch],
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
            **threads,
        )
        return launch(*arrays)

    axes = lambda name, x, second: " ".join(["d", second or f"{name}1", *(f"{name}{i}" for i in range(2, x.ndim))])  # noqa: E731
    operands = [axes(f"x{i}_", x, "b") for i, x in enumerate(by_group)]
    operands += [axes(f"t{i}_", x, "") for i, x in enumerate(tables)]
    results = [axes(f"y{i}_", x, "b") for i, x in enumerate(out_type)]
    return over_batch(run, ", ".join(operands), ", ".join(results))(*by_group, *tables)


def _grouped(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, GROUP, *x.shape[2:])


def _tiles(x: jax.Array) -> jax.Array:
    x = _grouped(x)
    return x.reshape(*x.shape[:3], -1, ROWS, CHUNK)


def _enter(tables: Tables) -> jax.Array:
    """(d, PADDED, CHUNK)."""
    wide = _wider(tables.enter_dmq, len(tables.decay), 1)
    return jnp.pad(wide, ((0, 0), (0, PADDED - 2 * STATES), (0, 0)))


def _decay(tables: Tables) -> jax.Array:
    """(d, GROUP, 2 STATES)."""
    wide = _wider(jnp.concatenate(tables.decay, 1), len(tables.decay), 1)
    return jnp.broadcast_to(wide[:, None], (wide.shape[0], GROUP, 2 * STATES))


def _wider(x: jax.Array, p: int, axis: int) -> jax.Array:
    """p planes of n states along an axis as 2 planes of STATES, the missing ones 0."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    n = x.shape[axis] // p
    pad = [(0, 0)] * axis + [(0, 2 - p), (0, STATES - n)] + [(0, 0)] * len(after)
    return jnp.pad(x.reshape(*before, p, n, *after), pad).reshape(*before, 2 * STATES, *after)


def _narrower(x: jax.Array, p: int, n: int, axis: int) -> jax.Array:
    """What `_wider` made of."""
    planes = jnp.moveaxis(x, axis, 0).reshape(2, STATES, -1)[:p, :n]
    rest = x.shape[:axis] + x.shape[axis + 1 :]
    return jnp.moveaxis(planes.reshape(p * n, *rest), 0, axis)
