r"""One token of the selective recurrence on TPUs: blocks of channels stream through VMEM, each state once.

Channels lie in lanes, the states of one in sublanes: as XLA lays out an array whose last axis is short. What is scaled
before or gated after is small and left to XLA. Under shard_map it needs check_vma=False.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128
BLOCK_BYTES = 2**19  # of states; two blocks are read and two written at a time, in 16 MiB of VMEM or more


def refusal(x, dt, A, B, C, h, D, z, dt_bias) -> str:
    """Why these arrays cannot be run here; "" where they can."""
    batch, d, n = h.shape
    if A.dtype != jnp.float32:
        return f"A is {A.dtype}; it takes float32"
    if n % SUBLANES:
        return f"there are {n} states, no multiple of {SUBLANES}"
    if d % LANES:
        return f"there are {d} channels, no multiple of {LANES}"
    return f"the batch is {batch}, no multiple of {SUBLANES}" if batch % SUBLANES else ""


def core(x, dt, A, B, C, h) -> tuple[jax.Array, jax.Array]:
    """(y before skip and gate, the new state), all in float32; see `step.advance`."""
    batch, d, n = h.shape
    state_bytes = 4 * SUBLANES * n * LANES
    fitting = [k for k in range(1, d // LANES + 1) if d // LANES % k == 0 and k * state_bytes <= BLOCK_BYTES]
    width = LANES * max(fitting, default=1)

    def kernel(x_ref, dt_ref, A_ref, B_ref, C_ref, h_ref, y_ref, new_ref):
        dt = dt_ref[...]
        h = jnp.exp(dt[:, None] * A_ref[...][None]) * h_ref[...] + (dt * x_ref[...])[:, None] * B_ref[...]
        new_ref[...] = h
        y_ref[...] = jnp.sum(h * C_ref[...], 1)

    rows = pl.BlockSpec((SUBLANES, width), lambda i, b: (b, i))
    column = pl.BlockSpec((SUBLANES, n, 1), lambda i, b: (b, 0, 0))
    states = pl.BlockSpec((SUBLANES, n, width), lambda i, b: (b, 0, i))
    y, h_bnd = pl.pallas_call(
        kernel,
        grid=(d // width, batch // SUBLANES),
        in_specs=[rows, rows, pl.BlockSpec((n, width), lambda i, b: (0, i)), column, column, states],
        out_specs=[rows, states],
        out_shape=[jax.ShapeDtypeStruct((batch, d), jnp.float32), jax.ShapeDtypeStruct((batch, n, d), jnp.float32)],
        input_output_aliases={5: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(x, dt, A.T, B[..., None], C[..., None], jnp.swapaxes(h, 1, 2))
    return y, jnp.swapaxes(h_bnd, 1, 2)
