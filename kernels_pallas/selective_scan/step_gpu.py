r"""One token of the selective recurrence on NVIDIA Hopper GPUs: every state goes through registers once.

A warpgroup takes some channels, a row each, of a few batch rows, which share A; see `kernels_pallas.stepping_gpu`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import stepping_gpu
from kernels_pallas.selective_scan.fused import LOG_2_E
from kernels_pallas.selective_scan.fused import softplus as log_one_plus_exp
from kernels_pallas.selective_scan.gpu_tiles import sigmoid
from kernels_pallas.stepping_gpu import Rows

PER_LANE = 16  # states of a batch row, at most
TOGETHER = 2  # batch rows of a warpgroup
BUSY = 528  # warpgroups: with fewer, each takes one batch row


def refusal(x, dt, A, B, C, h, D, z, dt_bias) -> str:
    """Why these arrays cannot be run here; "" where they can."""
    if A.dtype != jnp.float32:
        return f"A is {A.dtype}; it takes float32"
    return stepping_gpu.refusal(h, dict(x=x, dt=dt, B=B, C=C, z=z))


@partial(jax.jit, static_argnames="softplus")  # lowered once for all layers
def step(x, dt, A, B, C, h, D=None, z=None, dt_bias=None, *, softplus: bool) -> tuple[jax.Array, jax.Array]:
    """(y, the new state), of what `refusal` takes; A, D and dt_bias float32."""
    batch, d, n = h.shape
    tile = Rows.of(d, n, PER_LANE)
    together = TOGETHER if batch % TOGETHER == 0 and batch // TOGETHER * d // tile.rows >= BUSY else 1
    arrays = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    arrays = {name: v for name, v in arrays.items() if v is not None}

    def kernel(refs, h_ref, y_ref):
        mine = pl.ds(jax.lax.axis_index("block") * tile.rows, tile.rows)
        batch_rows = [jax.lax.axis_index("batch") * together + k for k in range(together)]
        # all reads before the first write, which the compiler must take for one of what is read
        states = [tile.load(h_ref.at[b, mine]) for b in batch_rows]
        A = tile.load(refs["A"].at[mine]) * LOG_2_E
        D, bias = (tile.of_rows(refs[name].at[mine]) if name in refs else None for name in ("D", "dt_bias"))
        given = {
            name: [get(refs[name].at[b, *at]) for b in batch_rows]
            for get, at, names in [(tile.of_rows, [mine], ("x", "dt", "z")), (tile.of_states, [], ("B", "C"))]
            for name in names
            if name in refs
        }
        for k, b in enumerate(batch_rows):
            x, dt = given["x"][k], given["dt"][k]
            dt = dt if bias is None else dt + bias
            dt = log_one_plus_exp(dt) if softplus else dt
            h = states[k] * jnp.exp2(tile.down(dt) * A) + tile.down(dt * x) * tile.across(given["B"][k])
            y = jnp.sum(h * tile.across(given["C"][k]), 1)
            y = y if D is None else y + D * x
            y = y * given["z"][k] * sigmoid(given["z"][k]) if "z" in given else y
            h_ref[b, mine] = h
            y_ref[b, mine] = y.astype(y_ref.dtype)

    y = jax.ShapeDtypeStruct((batch, d), x.dtype)
    return stepping_gpu.launch(kernel, arrays, h, y, dict(block=d // tile.rows, batch=batch // together))
