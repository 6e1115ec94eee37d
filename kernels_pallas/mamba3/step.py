"""One token of Mamba-3: its keys are turned, and the rest is `ssd_step`, which writes twice the lanes that it reads.

The lanes written are those of the token before, where the rule weighs it, and the token's own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.dispatch import at_least_float32
from kernels_pallas.mamba3.tokens import State, Tokens
from kernels_pallas.ssd.step import ssd_step


def mamba3_step(
    v: Float[Array, "b *r h p"],
    B: Float[Array, "b *r g n"],
    C: Float[Array, "b *r g n"],
    log_decay_bh: Float[Array, "b h"],
    previous_bh: Float[Array, "b h"] | None,
    current_bh: Float[Array, "b h"],
    theta_bhs: Float[Array, "b _ s"] | None = None,
    state: State | None = None,
    *,
    rate_bh: Float[Array, "b h"] | None = None,
    B_bias_hrn: Float[Array, "h r n"] | None = None,
    C_bias_hrn: Float[Array, "h r n"] | None = None,
    D_h: Float[Array, " h"] | None = None,
    z: Float[Array, "b *r h p"] | None = None,
    layout: str = "pairs",
    implementation: str = "auto",
) -> tuple[Float[Array, "b *r h p"], State]:
    """y, and the state after the token; arguments as in `mamba3`, without the axis of length.

    previous_bh: None where the rule does not weigh the token before. implementation: of `ssd_step`.
    Raises ValueError as `ssd_step` does.
    """
    precise = at_least_float32(v.dtype)
    lanes = lambda x: None if x is None else x.reshape(len(x), 1, -1, *x.shape[-2:]).astype(precise)  # noqa: E731
    gate = lambda x: None if x is None else x[:, None].astype(precise)  # noqa: E731
    gates = (gate(x) for x in (log_decay_bh, previous_bh, current_bh, rate_bh))
    tokens = Tokens(*map(lanes, (v, B, C)), *gates, gate(theta_bhs), B_bias_hrn, C_bias_hrn)
    state = tokens.zero_state() if state is None else state
    k, q, angle_bhs = tokens.turned(state.angle_bhs, None, layout)
    now, k_brhn = tokens.v[:, 0], k[:, 0]
    x, keys = current_bh[:, None, :, None].astype(precise) * now, k_brhn
    if previous_bh is not None:
        before = (jnp.exp(log_decay_bh) * previous_bh)[:, None, :, None] * state.v_brhp
        x, keys = jnp.concatenate([before, x], 1), jnp.concatenate([state.k_brhn, keys], 1)
    y, h = ssd_step(x, log_decay_bh, keys, q[:, 0], state.h_bhpn, implementation=implementation)
    y = y if D_h is None else y + D_h.astype(precise)[None, None, :, None] * now
    y = y if z is None else y * jax.nn.silu(lanes(z)[:, 0])
    return y.reshape(v.shape).astype(v.dtype), State(angle_bhs, h, k_brhn, now)
