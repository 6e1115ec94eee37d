r"""One token of state space duality on TPUs: blocks of heads stream through VMEM, each state once.

States lie in lanes, the channels of a head in sublanes. What is scaled before or gated after is small and left to XLA.
Under shard_map it needs check_vma=False.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128
BLOCK_BYTES = 2**19  # of states; two blocks are read and two written at a time, in 16 MiB of VMEM or more


def refusal(x, B, C, z, h) -> str:
    """Why the state h (b, h, p, n) cannot be run here; "" where it can."""
    heads, p, n = h.shape[1:]
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}; it takes float32 and bfloat16"
    if n % LANES:
        return f"there are {n} states, no multiple of {LANES}"
    if p % SUBLANES:
        return f"there are {p} channels, no multiple of {SUBLANES}"
    return f"there are {heads} heads, no multiple of {SUBLANES}" if heads % SUBLANES else ""


def core(x, a, B, C, h) -> tuple[jax.Array, jax.Array]:
    """(y before skip and gate, the new state), all in float32; see `step.advance`."""
    (batch, heads, p, n), per_group = h.shape, h.shape[1] // B.shape[2]
    if per_group % SUBLANES:
        B, C, per_group = jnp.repeat(B, per_group, 2), jnp.repeat(C, per_group, 2), heads
    else:
        B, C = B[:, :, :, None], C[:, :, :, None]
    fitting = [k for k in range(SUBLANES, per_group + 1, SUBLANES) if per_group % k == 0]
    together = max((k for k in fitting if 4 * k * p * n <= BLOCK_BYTES), default=SUBLANES)

    def kernel(x_ref, decay_ref, B_ref, C_ref, h_ref, y_ref, new_ref):
        columns, read = [x_ref[0, r].T for r in range(x.shape[1])], [[] for _ in range(C.shape[1])]
        for i in range(together):
            states = lambda ref, lane: ref[0, lane, i : i + 1] if B.ndim == 4 else ref[0, lane]  # noqa: B023,E731
            h = decay_ref[0, i : i + 1] * h_ref[0, i]
            for r, x_ph in enumerate(columns):
                h += x_ph[:, i : i + 1] * states(B_ref, r)
            new_ref[0, i] = h
            for s, y in enumerate(read):
                y.append(jnp.sum(h * states(C_ref, s), -1, keepdims=True))
        for s, y in enumerate(read):
            y_ref[0, s] = jnp.concatenate(y, 1).T

    def lanes(v):
        if v.ndim == 5:
            group = lambda i: jax.lax.div(i * together, per_group)  # noqa: E731
            return pl.BlockSpec((1, v.shape[1], None, 1, n), lambda b, i: (b, 0, group(i), 0, 0))
        return pl.BlockSpec((1, v.shape[1], together, v.shape[3]), lambda b, i: (b, 0, i, 0))

    states = pl.BlockSpec((1, together, p, n), lambda b, i: (b, i, 0, 0))
    decays = pl.BlockSpec((1, together, 1), lambda b, i: (b, i, 0))
    y = jax.ShapeDtypeStruct((batch, C.shape[1], heads, p), jnp.float32)
    arrays = x, jnp.exp(a)[..., None], B, C, h
    return pl.pallas_call(
        kernel,
        grid=(batch, heads // together),
        in_specs=[lanes(x), decays, lanes(B), lanes(C), states],
        out_specs=[lanes(y), states],
        out_shape=[y, jax.ShapeDtypeStruct(h.shape, h.dtype)],
        input_output_aliases={4: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(*arrays)
