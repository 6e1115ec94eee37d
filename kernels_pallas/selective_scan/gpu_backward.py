r"""The gradients of the recurrence on Hopper GPUs: one walk from the last token to the first.

With $\bar y_t$ the cotangent of what is read of the states, $g_t = C_t \bar y_t + e^{dt_{t+1} A} g_{t+1}$ is that of
$h_t$. Of each tile the states are made again from the one before it: first with one kept every few tokens, then these
few in registers, where the walk back needs them. The sums over channels, of $\bar C_t = \sum_d h_t \bar y_t$ and
$\bar B_t = \sum_d g_t dt_t x_t$, are products of matrices: of GROUP tokens' states, a row for each, by the numbers of
COLUMNS tokens, of which each row needs one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.selective_scan import gpu_tiles as tiles
from kernels_pallas.selective_scan.gpu_forward import Inputs, advance, drive, stream
from kernels_pallas.selective_scan.gpu_tiles import TILE, Plan

GROUP = 4  # tokens whose states are in one product
COLUMNS = 8  # tokens whose numbers are
WGMMA = plgpu.Layout.WGMMA
MATRIX = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))


@partial(jax.jit, static_argnums=(4,))
def backward(inputs: Inputs, saved: jax.Array, dy: jax.Array, g: jax.Array, softplus: bool) -> dict:
    """The cotangents of all inputs, by name, and "h", that of the state before every segment.

    saved: (b, tiles, d, n), states before every tile. g: (b, segments, d, n), cotangents of those after every segment.
    Those of B and C are parts, one for every block of channels; those of A, D and dt_bias one for every segment.
    """
    plan, present = inputs.plan(), inputs.present() | {"dy": dy}
    names, out_type = list(present), _outputs(plan, inputs, g)
    short, parts = (8, 1) if dy.dtype == jnp.bfloat16 else (4, 2)  # tokens in registers, parts of a number

    def kernel(*refs):
        *refs, s = refs
        refs, (saved_ref, g_ref, *outs) = dict(zip(names, refs, strict=False)), refs[len(names) :]
        outs, y_ref, s = dict(zip(out_type, outs, strict=True)), s["y or operands"][0], s | s["y or operands"][1]
        row, _, _ = mine = jax.lax.axis_index("batch"), jax.lax.axis_index("segment"), plan.mine
        A = tiles.load(refs.pop("A").at[plan.mine], plan.layout)
        D, bias = refs.pop("D").at[plan.mine], refs.pop("dt_bias").at[plan.mine]
        D_plane, bias = tiles.load(D, plan.plane.reduce(0)), tiles.load(bias, plan.plane.reduce(0))
        D = tiles.load(D, plan.layout.reduce(1))

        def tile(i, slots, sums):
            drive(slots, bias, s["dt"], None, plan, softplus)
            plgpu.commit_smem()
            h = tiles.load(saved_ref.at[row, i, plan.mine], plan.layout)
            again(plan, slots, A, s["dt"], h, s["short"], y_ref if "z" in slots else None)
            plgpu.commit_smem()
            if "z" in slots:
                ungate(plan, slots, D_plane, y_ref)
                plgpu.commit_smem()

            def some(k, sums):
                k = TILE // short - 1 - k
                return back(plan, slots, A, D, s, i, k, sums, outs, softplus)

            sums = jax.lax.fori_loop(0, TILE // short, some, sums)
            plgpu.commit_smem()
            for name in ("x", "dt", "z")[: 2 + ("z" in slots)]:
                plgpu.copy_smem_to_gmem(slots[name], outs[name].at[row, pl.ds(i * TILE, TILE), plan.mine])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return sums

        g = tiles.load(g_ref.at[mine], plan.layout)
        zero = lambda layout, *shape: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)  # noqa: E731
        of_channels = [zero(plan.layout.reduce(1), plan.channels) for _ in range(2)]
        sums = g, zero(plan.layout, *g.shape), *of_channels
        sums = stream(plan, refs, tile, sums, stages=1, backwards=True)
        for name, total in zip(("h", "A", "D", "dt_bias"), sums, strict=True):
            outs[name][mine] = total
        plgpu.wait_smem_to_gmem(0)

    launch = plgpu.kernel(
        kernel,
        out_type=list(out_type.values()),
        grid=plan.grid,
        grid_names=tiles.AXES,
        scratch_types=[_scratch(plan, short, parts)],
        compiler_params=tiles.OPTIONS,
    )
    return dict(zip(out_type, launch(*present.values(), saved, g), strict=True))


def _outputs(plan: Plan, inputs: Inputs, g: jax.Array) -> dict:
    batch, length, _ = inputs.x.shape
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    by_token = {name: getattr(inputs, name) for name in ("x", "dt", "z")}
    by_token = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in by_token.items() if v is not None}
    by_block = dict.fromkeys("BC", float32((batch, plan.blocks, length * plan.states)))
    by_segment = dict.fromkeys("hA", float32(g.shape)) | dict.fromkeys(("D", "dt_bias"), float32(g.shape[:3]))
    return by_token | by_block | by_segment


def _scratch(plan: Plan, short: int, parts: int) -> dict:
    operand = lambda rows, columns: plgpu.SMEM((parts, rows, columns), jnp.bfloat16, transforms=MATRIX)  # noqa: E731
    plane = plgpu.SMEM((TILE, plan.channels), jnp.float32)
    states = operand(plan.channels, GROUP * plan.states)
    return {
        "dt": plane,
        "short": plgpu.SMEM((TILE // short, plan.channels, plan.states), jnp.float32),
        "y or operands": plgpu.RefUnion(plane, {"h": states, "g": states}),
        "u": operand(COLUMNS, plan.channels),
        "dy": operand(COLUMNS, plan.channels),
    }


def again(plan: Plan, slots: dict, A, dt_ref, h, short_ref, y_ref) -> None:
    """Walks over a tile for the states that are kept, and for what the tokens read where that is asked."""
    short = TILE // short_ref.shape[0]

    def some(k, h):
        short_ref[k] = h
        read = []
        for j in range(short):
            t, token = k * short + j, token_at(plan, slots, dt_ref, k * short + j)
            _, h = advance(plan, h, A, *token)
            if y_ref is not None:
                read.append((t, jnp.sum(h * plan.across(plan.states_of(slots["C"], t)), 1)))
        for t, y in read:
            y_ref[t] = y
        return h

    jax.lax.fori_loop(0, TILE // short, some, h)


def token_at(plan: Plan, slots: dict, dt_ref, t) -> tuple:
    """What `advance` asks for of a token."""
    dt, x = plan.row(dt_ref, t), plan.row(slots["x"], t)
    forget = slots["forget"][t] if "forget" in slots else None
    return dt, dt * x, plan.across(plan.states_of(slots["B"], t)), forget


def ungate(plan: Plan, slots: dict, D, y_ref) -> None:
    """The cotangents of z, and of y before its gate, in the places of z and of y's."""
    for rows in tiles.blocks():
        refs = slots["x"], y_ref, slots["z"], slots["dy"]
        x, y, z, dy = (tiles.load(ref.at[rows], plan.plane).astype(jnp.float32) for ref in refs)
        y += tiles.broadcast(D, x.shape, 1, plan.plane) * x
        open_ = tiles.sigmoid(z)
        slots["z"][rows] = (dy * y * open_ * (1.0 + z * (1.0 - open_))).astype(slots["z"].dtype)
        slots["dy"][rows] = (dy * z * open_).astype(slots["dy"].dtype)


def back(plan: Plan, slots: dict, A, D, s: dict, i, k, sums: tuple, outs: dict, softplus: bool) -> tuple:
    """The k-th few tokens of tile i: their cotangents, in the places of x and dt, and the sums before them."""
    g, dA, dD, d_bias = sums
    short = TILE // s["short"].shape[0]
    start, first = k * short, k * short // COLUMNS * COLUMNS
    rows = pl.ds(first, COLUMNS)
    x, dt, dy = (tiles.load(ref.at[rows], plan.short).astype(jnp.float32) for ref in (slots["x"], s["dt"], slots["dy"]))
    _split(s["u"], (slice(None), slice(None)), dt * x)
    _split(s["dy"], (slice(None), slice(None)), dy)
    plgpu.commit_smem()  # from here on x and dt are written over
    decays, states = [], [tiles.load(s["short"].at[k], plan.layout)]
    for j in range(short):
        decay, h = advance(plan, states[-1], A, *token_at(plan, slots, s["dt"], start + j))
        decays.append(decay)
        states.append(h)

    ahead = short == 8 and plan.states == 16  # elsewhere there are no registers for it

    def at(t):
        dt, x, dy = (plan.row(ref, t) for ref in (s["dt"], slots["x"], slots["dy"]))
        return dt, x, dy, plan.states_of(slots["B"], t), plan.states_of(slots["C"], t)

    token = at(start + short - 1)
    for j in reversed(range(short)):
        (dt, x, dy, B, C), t = token or at(start + j), start + j
        token = at(t - 1) if j and ahead else None
        g += plan.down(dy) * plan.across(C)
        read = jnp.sum(g * plan.across(B), 1)
        columns = slice(None), pl.ds(j % GROUP * plan.states, plan.states)
        _split(s["h"], columns, states[j + 1])
        _split(s["g"], columns, g)
        g *= decays[j]
        decaying = g * states[j]
        dA += plan.down(dt) * decaying
        d_dt = jnp.sum(decaying * A, 1) * (1 / tiles.LOG_2_E) + read * x
        d_dt = d_dt * (1.0 - jnp.exp2(-tiles.LOG_2_E * dt)) if softplus else d_dt
        dD += dy * x
        d_bias += d_dt
        slots["x"][t] = (read * dt + D * dy).astype(slots["x"].dtype)
        slots["dt"][t] = d_dt.astype(slots["dt"].dtype)
        if j % GROUP == 0:
            over_channels(plan, s, (i * TILE + t) * plan.states, t - first, outs)
    return g, dA, dD, d_bias


def _split(ref, index: tuple, value) -> None:
    """value as a sum of bfloat16 parts."""
    for part in range(ref.shape[0]):
        narrow = value.astype(jnp.bfloat16)
        ref[(part, *index)] = narrow
        value = value - narrow.astype(jnp.float32)


def over_channels(plan: Plan, s: dict, start, first, outs: dict) -> None:
    """The sums over this block's channels for GROUP tokens, from column `first` of COLUMNS on."""
    plgpu.commit_smem()
    shape = GROUP * plan.states, COLUMNS

    def products(dB, dC):
        for total, left, right in ((dB, s["g"], s["u"]), (dC, s["h"], s["dy"])):
            for i in range(left.shape[0]):
                for j in range(left.shape[0] - i):
                    plgpu.wgmma(total, left.at[i].T, right.at[j].T)
        plgpu.wgmma_wait(0)
        return [jax.lax.optimization_barrier(total[...]) for total in (dB, dC)]

    accumulator = plgpu.ACC(shape, jnp.float32)
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA) for axis in range(2))
    wanted = column == row // plan.states + first
    for name, total in zip("BC", pl.run_scoped(products, accumulator, accumulator), strict=True):
        picked = jnp.sum(jnp.where(wanted, total, 0.0), 1)
        outs[name][jax.lax.axis_index("batch"), jax.lax.axis_index("block"), pl.ds(start, shape[0])] = picked
    plgpu.commit_smem()
