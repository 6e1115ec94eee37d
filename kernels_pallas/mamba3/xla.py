r"""Mamba-3 by matrix products: state space duality with the input one token late.

All that is older than the token is $g_t = a_t g_{t-1} + a_t (\gamma_{t-1} + \beta_t) v_{t-1} k_{t-1}^\top$ with
$a = e^{\mathrm{log\_decay}}$, and $h_t = g_t + \gamma_t v_t k_t^\top$. No token looks ahead, and nothing is
subtracted again.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.mamba3.reference import outer
from kernels_pallas.mamba3.tokens import State, Tokens
from kernels_pallas.ssd import ssd


def run(tokens: Tokens, state: State, reset: jax.Array | None, layout: str, dtype: jnp.dtype, core: dict) -> tuple:
    """(y (b, l, r, h, p) before D and z, the last state); dtype: of the products; core: options of `ssd`."""
    k, q, angle = tokens.turned(state.angle_bhs, reset, layout)
    v, a, current = tokens.v, tokens.log_decay, tokens.current
    weight = jnp.exp(a) * (_late(current, jnp.zeros_like(current[:, 0])) + tokens.previous)
    weight = weight if reset is None else jnp.where(reset[..., None], 0, weight)
    x = weight[:, :, None, :, None] * _late(v, state.v_brhp)
    siso = v.shape[2] == 1
    as_given = lambda x: (x[:, :, 0] if siso else x).astype(dtype)  # noqa: E731
    y, g = ssd(as_given(x), a, as_given(_late(k, state.k_brhn)), as_given(q), state.h_bhpn, reset=reset, **core)
    score = jnp.einsum("blrhn,blihn->blrih", q, k, precision="highest") * current[:, :, None, None]
    now = jnp.einsum("blrih,blihp->blrhp", score, v, precision="highest")
    h = g + current[:, -1, :, None, None] * outer(v[:, -1], k[:, -1])
    return y.reshape(v.shape).astype(now.dtype) + now, State(angle, h, k[:, -1], v[:, -1])


def _late(x: jax.Array, entering: jax.Array) -> jax.Array:
    """x one token later, `entering` at the first."""
    return jnp.concatenate([entering[:, None], x[:, :-1]], 1)
