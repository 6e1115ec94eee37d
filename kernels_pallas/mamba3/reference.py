"""Mamba-3 one token after another: the definition."""

import jax
import jax.numpy as jnp

from kernels_pallas.mamba3.tokens import State, Tokens


def run(tokens: Tokens, state: State, reset: jax.Array | None, layout: str) -> tuple:
    """(y (b, l, r, h, p) before D and z, the last state)."""
    k, q, angle = tokens.turned(state.angle_bhs, reset, layout)
    keep = jnp.ones(k.shape[:2], bool) if reset is None else ~reset

    def advance(carry, token):
        keep_b, a, previous, current, v_brhp, k_brhn, q_brhn = token
        h, v_before, k_before = jax.tree.map(lambda x: jnp.where(keep_b[:, None, None, None], x, 0), carry)
        h = jnp.exp(a) * (h + previous * outer(v_before, k_before)) + current * outer(v_brhp, k_brhn)
        return (h, v_brhp, k_brhn), jnp.einsum("bhpn,brhn->brhp", h, q_brhn, precision="highest")

    gates = (x[..., None, None] for x in (tokens.log_decay, tokens.previous, tokens.current))
    in_time = tuple(jnp.moveaxis(x, 1, 0) for x in (keep, *gates, tokens.v, k, q))
    (h, v, k), y = jax.lax.scan(advance, (state.h_bhpn, state.v_brhp, state.k_brhn), in_time)
    return jnp.moveaxis(y, 0, 1), State(angle, h, k, v)


def outer(v_brhp: jax.Array, k_brhn: jax.Array) -> jax.Array:
    return jnp.einsum("brhp,brhn->bhpn", v_brhp, k_brhn, precision="highest")
