r"""The walk from the first token to the last on Hopper GPUs, and what whole segments of it do to a state."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.selective_scan import fused
from kernels_pallas.selective_scan import gpu_tiles as tiles
from kernels_pallas.selective_scan.gpu_tiles import TILE, Plan

STAGES = 2  # tiles in flight
AT_ONCE = 8  # tokens whose numbers are loaded together


class Inputs(NamedTuple):
    """Arrays as the kernels take them: lengths and channels padded, A times log2 e, all but x, dt and z in float32."""

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array
    dt_bias: jax.Array
    z: jax.Array | None = None
    forget: jax.Array | None = None  # (b, l): 0, or -inf at tokens that forget

    def present(self) -> dict:
        return {name: value for name, value in self._asdict().items() if value is not None}

    def plan(self) -> Plan:
        return Plan.of(*self.x.shape, self.A.shape[1])


def stream(plan: Plan, refs: dict, body, carry, stages: int = STAGES, backwards: bool = False):
    """carry = body(tile, its refs in shared memory, carry) for the tiles of this segment."""
    first, batch, block = (jax.lax.axis_index(name) for name in ("segment", "batch", "block"))
    at = lambda i: first * plan.steps + (plan.steps - 1 - i if backwards else i)  # noqa: E731

    def spec(name):
        if name == "forget":
            return plgpu.BlockSpec((TILE,), lambda i: (at(i),))
        if name in "BC":
            return plgpu.BlockSpec((TILE, plan.states), lambda i: (at(i), 0))
        return plgpu.BlockSpec((TILE, plan.channels), lambda i: (at(i), block))

    def tile(indices, *refs_and_carry):
        *slots, carry = refs_and_carry
        return body(at(indices[0]), dict(zip(refs, slots, strict=True)), carry)

    run = plgpu.emit_pipeline(
        tile, grid=(plan.steps,), in_specs=list(map(spec, refs)), max_concurrent_steps=stages, init_carry=carry
    )
    return run(*(ref.at[batch] for ref in refs.values()))


def decay_of(plan: Plan, A, dt, forget=None):
    """e^{dt A}, or 0."""
    exponent = plan.down(dt) * A
    return jnp.exp2(exponent if forget is None else exponent + forget)


def advance(plan: Plan, h, A, dt, u, B, forget=None):
    """(decay, h) after one token, of rows dt and u = dt x, and of B across the states."""
    decay = decay_of(plan, A, dt, forget)
    return decay, decay * h + plan.down(u) * B


@partial(jax.jit, static_argnums=(2, 3))
def forward(inputs: Inputs, h: jax.Array, softplus: bool, save: bool) -> list[jax.Array]:
    """y, the state after every segment, and the states before every tile where they are to be saved.

    h: (b, segments, d, n), the state before every segment.
    """
    plan, names = inputs.plan(), list(inputs.present())
    batch, length, d = inputs.x.shape

    def kernel(*refs):
        *refs, s = refs
        refs, (h_ref, y_ref, last_ref, *saved) = dict(zip(names, refs, strict=False)), refs[len(names) :]
        mine = jax.lax.axis_index("batch"), jax.lax.axis_index("segment"), plan.mine
        A = tiles.load(refs.pop("A").at[plan.mine], plan.layout)
        D, bias = (tiles.load(refs.pop(name).at[plan.mine], plan.plane.reduce(0)) for name in ("D", "dt_bias"))

        def tile(i, slots, h):
            for ref in saved:
                ref[mine[0], i, plan.mine] = h
            drive(slots, bias, s["dt"], s["u"], plan, softplus)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            h = walk(plan, slots, A, s["dt"], s["u"], h)
            plgpu.commit_smem()
            for rows in tiles.blocks():
                part = lambda ref: tiles.load(ref.at[rows], plan.plane).astype(jnp.float32)  # noqa: B023,E731
                x = part(slots["x"])
                y = part(s["u"]) + tiles.broadcast(D, x.shape, 1, plan.plane) * x
                if "z" in slots:
                    z = part(slots["z"])
                    y *= z * tiles.sigmoid(z)
                s["y"][rows] = y.astype(s["y"].dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s["y"], y_ref.at[mine[0], pl.ds(i * TILE, TILE), plan.mine])
            return h

        last_ref[mine] = stream(plan, refs, tile, tiles.load(h_ref.at[mine], plan.layout))
        plgpu.wait_smem_to_gmem(0)

    plane = lambda dtype: plgpu.SMEM((TILE, plan.channels), dtype)  # noqa: E731
    out_type = [jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype), jax.ShapeDtypeStruct(h.shape, jnp.float32)]
    if save:
        out_type.append(jax.ShapeDtypeStruct((batch, length // TILE, *h.shape[2:]), jnp.float32))
    launch = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=plan.grid,
        grid_names=tiles.AXES,
        scratch_types=[dict(dt=plane(jnp.float32), u=plane(jnp.float32), y=plane(inputs.x.dtype))],
        compiler_params=tiles.OPTIONS,
    )
    return launch(*inputs.present().values(), h)


def drive(slots: dict, bias, dt_ref, u_ref, plan: Plan, softplus: bool) -> None:
    """dt of a tile in float32, and u = dt x where there is a place for it."""
    for rows in tiles.blocks():
        part = lambda name: tiles.load(slots[name].at[rows], plan.plane).astype(jnp.float32)  # noqa: B023,E731
        dt = part("dt")
        dt += tiles.broadcast(bias, dt.shape, 1, plan.plane)
        dt_ref[rows] = dt = fused.softplus(dt) if softplus else dt
        if u_ref is not None:
            u_ref[rows] = dt * part("x")


def walk(plan: Plan, slots: dict, A, dt_ref, u_ref, h):
    """The state after a tile; what its tokens read of the states takes the place of u."""

    def some(i, h):
        tokens = [i * AT_ONCE + k for k in range(AT_ONCE)]
        loaded = [
            (plan.row(dt_ref, t), plan.row(u_ref, t), plan.across(plan.states_of(slots["B"], t)),
             slots["forget"][t] if "forget" in slots else None, plan.states_of(slots["C"], t))
            for t in tokens
        ]  # fmt: skip
        read = []
        for *token, C in loaded:
            _, h = advance(plan, h, A, *token)
            read.append(jnp.sum(h * plan.across(C), 1))
        for t, y in zip(tokens, read, strict=True):
            u_ref[t] = y
        return h

    return jax.lax.fori_loop(0, TILE // AT_ONCE, some, h)


@partial(jax.jit, static_argnums=(2,))
def summaries(inputs: Inputs, dy: jax.Array | None, softplus: bool) -> jax.Array:
    """What every segment leaves of no state, (b, segments, d, n): the state after it.

    With dy, the cotangents of y: what its tokens send to those before it.
    """
    plan, backwards = inputs.plan(), dy is not None
    unread = ("C", "D", "z") if dy is None else ("x", "B", "D")
    present = {name: value for name, value in inputs.present().items() if name not in unread}
    present |= {} if dy is None else {"dy": dy}
    batch, _, d = inputs.dt.shape

    def kernel(*refs):
        *refs, end_ref, s = refs
        refs = dict(zip(present, refs, strict=True))
        A = tiles.load(refs.pop("A").at[plan.mine], plan.layout)
        bias = tiles.load(refs.pop("dt_bias").at[plan.mine], plan.plane.reduce(0))

        def tile(i, slots, h):
            drive(slots, bias, s["dt"], None if backwards else s["u"], plan, softplus)
            if backwards:
                gate(plan, slots, s["u"])
            plgpu.commit_smem()
            h = leave(plan, slots, A, s["dt"], s["u"], h, backwards)
            plgpu.commit_smem()
            return h

        zero = plgpu.layout_cast(jnp.zeros((plan.channels, plan.states), jnp.float32), plan.layout)
        end = stream(plan, refs, tile, zero, backwards=backwards)
        end_ref[jax.lax.axis_index("batch"), jax.lax.axis_index("segment"), plan.mine] = end

    plane = plgpu.SMEM((TILE, plan.channels), jnp.float32)
    launch = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, plan.segments, d, plan.states), jnp.float32),
        grid=plan.grid,
        grid_names=tiles.AXES,
        scratch_types=[dict(dt=plane, u=plane)],
        compiler_params=tiles.OPTIONS,
    )
    return launch(*present.values())


def gate(plan: Plan, slots: dict, target) -> None:
    """The cotangents of y before its gate."""
    for rows in tiles.blocks():
        dy = tiles.load(slots["dy"].at[rows], plan.plane).astype(jnp.float32)
        if "z" in slots:
            z = tiles.load(slots["z"].at[rows], plan.plane).astype(jnp.float32)
            dy *= z * tiles.sigmoid(z)
        target[rows] = dy


def leave(plan: Plan, slots: dict, A, dt_ref, u_ref, h, backwards: bool):
    """The state after a tile, or what its tokens send back."""

    def some(i, h):
        first = (TILE // AT_ONCE - 1 - i if backwards else i) * AT_ONCE
        for j in range(AT_ONCE)[:: -1 if backwards else 1]:
            t = first + j
            dt, u, enter = plan.row(dt_ref, t), plan.row(u_ref, t), plan.states_of(slots["C" if backwards else "B"], t)
            decay = decay_of(plan, A, dt, slots["forget"][t] if "forget" in slots else None)
            new = plan.down(u) * plan.across(enter)
            h = decay * (h + new) if backwards else decay * h + new
        return h

    return jax.lax.fori_loop(0, TILE // AT_ONCE, some, h)
