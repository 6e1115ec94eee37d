r"""One token of state space duality on NVIDIA Hopper GPUs: every state goes through registers once.

A warpgroup takes some channels of one head, a row each; see `kernels_pallas.stepping_gpu`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import stepping_gpu
from kernels_pallas.selective_scan.fused import LOG_2_E
from kernels_pallas.selective_scan.gpu_tiles import sigmoid
from kernels_pallas.stepping_gpu import Rows

PER_LANE = 32  # states, at most


def refusal(x, B, C, z, h) -> str:
    """Why x (b, r, h, p), B and C (b, r, g, n), z and the state (b, h, p, n) cannot be run here; "" where they can."""
    return stepping_gpu.refusal(h, dict(x=x, B=B, C=C, z=z))


@jax.jit  # lowered once for all layers
def step(x, a, B, C, h, dt=None, D=None, z=None) -> tuple[jax.Array, jax.Array]:
    """(y, the new state), of what `refusal` takes; the rest float32, D (h,) or (h, p)."""
    (batch, heads, p, n), groups = h.shape, B.shape[2]
    tile = Rows.of(p, n, PER_LANE)
    arrays = dict(x=x, a=a, B=B, C=C, dt=dt, D=D, z=z)
    arrays = {name: v for name, v in arrays.items() if v is not None}

    def kernel(refs, h_ref, y_ref):
        b, head, block = (jax.lax.axis_index(name) for name in ("batch", "head", "block"))
        mine, group = pl.ds(block * tile.rows, tile.rows), jax.lax.div(head, heads // groups)

        def write(r, h):
            x = tile.of_rows(refs["x"].at[b, r, head, mine])
            x = x * refs["dt"][b, head] if "dt" in refs else x
            return h + tile.down(x) * tile.across(tile.of_states(refs["B"].at[b, r, group]))

        def read(s, h):
            y = jnp.sum(h * tile.across(tile.of_states(refs["C"].at[b, s, group])), 1)
            if "D" in refs:
                skip = refs["D"][head] if D.ndim == 1 else tile.of_rows(refs["D"].at[head, mine])
                y += skip * tile.of_rows(refs["x"].at[b, s, head, mine])
            if "z" in refs:
                gate = tile.of_rows(refs["z"].at[b, s, head, mine])
                y *= gate * sigmoid(gate)
            y_ref[b, s, head, mine] = y.astype(y_ref.dtype)
            return h

        h = tile.load(h_ref.at[b, head, mine]) * jnp.exp2(refs["a"][b, head] * LOG_2_E)
        h_ref[b, head, mine] = _over_lanes(C.shape[1], read, _over_lanes(B.shape[1], write, h))

    y = jax.ShapeDtypeStruct((batch, C.shape[1], heads, p), x.dtype)
    return stepping_gpu.launch(kernel, arrays, h, y, dict(block=p // tile.rows, head=heads, batch=batch))


def _over_lanes(count: int, body, carry):
    """carry = body(lane, carry) for all lanes. Many are a loop over two of them: all their numbers at once would take
    the registers of other warpgroups."""
    if count <= 2 or count % 2:
        for lane in range(count):
            carry = body(lane, carry)
        return carry
    return jax.lax.fori_loop(0, count // 2, lambda i, carry: body(2 * i + 1, body(2 * i, carry)), carry)
