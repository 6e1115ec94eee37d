"""What a call is given, with an axis of lanes, and the state between calls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.rotation import rotate, summed_angle


class State(NamedTuple):
    """The summed angle within [-pi, pi], h of k that are turned by it, and the last token's turned k and its v."""

    angle_bhs: Float[Array, "b h s"]
    h_bhpn: Float[Array, "b h p n"]
    k_brhn: Float[Array, "b r h n"]
    v_brhp: Float[Array, "b r h p"]


class Tokens(NamedTuple):
    """v (b, l, r, h, p), B and C (b, l, r, g, n), gates (b, l, h), theta (b, l, 1 or h, s), biases (h, r, n).

    rate, theta and the biases may be None.
    """

    v: jax.Array
    B: jax.Array
    C: jax.Array
    log_decay: jax.Array
    previous: jax.Array
    current: jax.Array
    rate: jax.Array | None
    theta: jax.Array | None
    B_bias: jax.Array | None
    C_bias: jax.Array | None

    def angle(self) -> Float[Array, "b l h s"]:
        """By how much each plane of every head turns at a token."""
        theta = self.theta if self.rate is None else self.rate[..., None] * self.theta
        return jnp.broadcast_to(theta, (*self.log_decay.shape, theta.shape[-1]))

    def of_heads(self, name: str) -> Float[Array, "b l r h n"]:
        """B or C of every head, with its bias."""
        each, bias = getattr(self, name), getattr(self, f"{name}_bias")
        each = jnp.repeat(each, self.v.shape[3] // each.shape[3], 3)
        return each if bias is None else each + jnp.swapaxes(bias, 0, 1)[None, None]

    def turned(self, angle_bhs: jax.Array, reset: Bool[Array, "b l"] | None, layout: str) -> tuple:
        """k and q of every head (b, l, r, h, n), and the last angle, of the angle before the first token."""
        k, q = self.of_heads("B"), self.of_heads("C")
        if self.theta is None:
            return k, q, angle_bhs
        total = summed_angle(self.angle(), angle_bhs, reset)
        turn = jnp.cos(total)[:, :, None], jnp.sin(total)[:, :, None]
        return rotate(k, turn, layout), rotate(q, turn, layout), total[:, -1]

    def zero_state(self) -> State:
        """The state before any token."""
        (b, _, r, h, p), n = self.v.shape, self.B.shape[-1]
        planes = 0 if self.theta is None else self.theta.shape[-1]
        return State(*(jnp.zeros((b, *shape)) for shape in ((h, planes), (h, p, n), (r, h, n), (r, h, p))))
