r"""One token of state space duality on NVIDIA Hopper GPUs: every state goes through registers once.

A warpgroup takes some rows (channels) of one head, four neighbouring states of a row a lane, so that its lanes read and
write whole lines, and few of them add up what is read of a row. Nothing is shared and nothing waits: a multiprocessor
has so many warpgroups that some always have their reads under way. The new state is written over the old one. Under
shard_map it needs check_vma=False.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import stepping
from kernels_pallas.selective_scan.gpu_tiles import LANES, LOG_2_E, OPTIONS, broadcast, load, rows_of_quads, sigmoid

PER_LANE = 32  # states, at most
COLUMNS = (32, 16)  # states of a row that are side by side


def refusal(x, B, C, z, h) -> str:
    """Why x (b, r, h, p), B and C (b, r, g, n), z and the state (b, h, p, n) cannot be run here; "" where they can."""
    for name, v in dict(x=x, B=B, C=C, z=z).items():
        if v is not None and v.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {v.dtype}; it takes float32 and bfloat16"
    *_, p, n = h.shape
    if n % COLUMNS[-1]:
        return f"there are {n} states, no multiple of {COLUMNS[-1]}"
    rows, _ = _tile(p, n)
    return f"a head has {p} channels, no multiple of {rows}" if p % rows else ""


def _tile(p: int, n: int) -> tuple[int, int]:
    """The least rows of a warpgroup, and how many it takes."""
    columns = next(columns for columns in COLUMNS if n % columns == 0)
    least = 4 * LANES // columns
    fitting = [rows for rows in range(least, p + 1, least) if p % rows == 0 and rows * n <= LANES * PER_LANE]
    return least, max(fitting, default=least)


@jax.jit  # lowered once for all layers
def step(x, a, B, C, h, dt=None, D=None, z=None) -> tuple[jax.Array, jax.Array]:
    """(y, the new state), of what `refusal` takes; the rest float32, D (h,) or (h, p)."""
    (batch, heads, p, n), groups = h.shape, B.shape[2]
    least, rows = _tile(p, n)
    layout = rows_of_quads(least)
    over_rows, over_states = layout.reduce(1), layout.reduce(0)
    arrays = dict(x=x, a=a, B=B, C=C, dt=dt, D=D, z=z)
    arrays = {name: v for name, v in arrays.items() if v is not None}

    def kernel(*refs):
        *refs, h_ref, y_ref = refs
        refs = dict(zip(arrays, refs, strict=True))
        b, head, block = (jax.lax.axis_index(name) for name in ("batch", "head", "block"))
        mine, group = pl.ds(block * rows, rows), jax.lax.div(head, heads // groups)
        of_rows = lambda ref: load(ref.at[mine], over_rows).astype(jnp.float32)  # noqa: E731
        of_states = lambda ref: load(ref.at[group], over_states).astype(jnp.float32)  # noqa: E731
        down = lambda v: broadcast(v, (rows, n), 0, layout)  # noqa: E731
        across = lambda v: broadcast(v, (rows, n), 1, layout)  # noqa: E731

        def write(r, h):
            value = of_rows(refs["x"].at[b, r, head])
            value = value * refs["dt"][b, head] if "dt" in refs else value
            return h + down(value) * across(of_states(refs["B"].at[b, r]))

        def read(s, h):
            y = jnp.sum(h * across(of_states(refs["C"].at[b, s])), 1)
            if "D" in refs:
                skip = refs["D"][head] if D.ndim == 1 else of_rows(refs["D"].at[head])
                y += skip * of_rows(refs["x"].at[b, s, head])
            if "z" in refs:
                gate = of_rows(refs["z"].at[b, s, head])
                y *= gate * sigmoid(gate)
            y_ref[b, s, head, mine] = y.astype(y_ref.dtype)
            return h

        h = load(h_ref.at[b, head, mine], layout) * jnp.exp2(refs["a"][b, head] * LOG_2_E)
        h_ref[b, head, mine] = _over_lanes(C.shape[1], read, _over_lanes(B.shape[1], write, h))

    grid = dict(block=p // rows, head=heads, batch=batch)
    run = pl.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, C.shape[1], heads, p), x.dtype),
        mesh=plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid)),
        compiler_params=OPTIONS,
    )
    return stepping.in_place(run, tuple(arrays.values()), h)


def _over_lanes(count: int, body, carry):
    """carry = body(lane, carry) for all lanes. Many are a loop over two of them: all their numbers at once would take
    the registers of other warpgroups."""
    if count <= 2 or count % 2:
        for lane in range(count):
            carry = body(lane, carry)
        return carry
    return jax.lax.fori_loop(0, count // 2, lambda i, carry: body(2 * i + 1, body(2 * i, carry)), carry)
