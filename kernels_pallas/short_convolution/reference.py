"""A short causal convolution one token after another: the definition."""

import jax
import jax.numpy as jnp


def run(x_bld, weight_dk, state_bkd, reset_bl):
    """(sum over the taps, last k - 1 inputs); floats of one dtype; reset_bl may be None."""
    forget = jnp.zeros(x_bld.shape[:2], bool) if reset_bl is None else reset_bl

    def advance(recent_bkd, xs):
        x_bd, reset_b = xs
        recent_bkd = jnp.where(reset_b[:, None, None], 0, recent_bkd)
        window_bkd = jnp.concatenate([recent_bkd, x_bd[:, None]], 1)
        return window_bkd[:, 1:], (window_bkd * weight_dk.T[None]).sum(1)

    last, y_lbd = jax.lax.scan(advance, state_bkd, (jnp.moveaxis(x_bld, 1, 0), forget.T))
    return jnp.moveaxis(y_lbd, 0, 1), last
