"""A short causal convolution as k shifted products of all tokens, which XLA fuses into one pass."""

import jax
import jax.numpy as jnp

ACTIVATIONS = {"silu": jax.nn.silu, "none": lambda y: y}


def run(x_bld, weight_dk, state_bkd, reset_bl):
    """(sum over the taps, last k - 1 inputs); arguments as in `reference.run`."""
    reach_bl = None if reset_bl is None else reach(reset_bl, weight_dk.shape[1])
    return taps(x_bld, weight_dk.T, state_bkd, reach_bl), last_inputs(x_bld, state_bkd, reach_bl)


def reach(reset_bl, k):
    """How many of the k - 1 inputs before it every token sees; those of the state are inputs."""
    count, sees = jnp.zeros(reset_bl.shape, jnp.int32), jnp.ones(reset_bl.shape, bool)
    for lag in range(k - 1):
        sees &= ~jnp.pad(reset_bl, ((0, 0), (lag, 0)))[:, : reset_bl.shape[1]]
        count += sees.astype(jnp.int32)
    return count


def taps(x_bld, weight_kd, state_bkd, reach_bl):
    """The sum over the taps; where reach_bl is None, every token sees all k - 1 inputs before it."""
    length, k = x_bld.shape[1], len(weight_kd)

    def seen(lag):
        later = jnp.pad(x_bld, ((0, 0), (lag, 0), (0, 0)))[:, :length]
        shifted = later + jnp.pad(state_bkd[:, k - 1 - lag :], ((0, 0), (0, length), (0, 0)))[:, :length]
        return shifted if reach_bl is None else jnp.where((reach_bl >= lag)[..., None], shifted, 0)

    return sum(seen(k - 1 - j) * weight_kd[j][None, None] for j in range(k))


def last_inputs(x_bld, state_bkd, reach_bl):
    """The state after the last token, in the state's dtype."""
    slots = state_bkd.shape[1]
    recent = x_bld[:, max(0, x_bld.shape[1] - slots) :].astype(state_bkd.dtype)
    inputs = jnp.concatenate([state_bkd, recent], 1)[:, recent.shape[1] :]
    if reach_bl is None:
        return inputs
    return jnp.where((reach_bl[:, -1:] >= jnp.arange(slots, dtype=jnp.int32)[None, ::-1])[..., None], inputs, 0)
