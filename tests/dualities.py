"""Calls of state space duality for the tests of its kernels, and what the loop over tokens makes of them in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas.ssd as op


def problem(rng, batch, length, rank, heads, p, groups, n, also) -> dict:
    """Moderate decays, but the first head's go from 1 to e^-300; `also` has the initials of what else is given."""
    lanes = (batch, length) if rank is None else (batch, length, rank)
    a = -np.exp(rng.uniform(np.log(1e-12), np.log(300), size=(batch, length, heads)))
    a = np.where(rng.random(a.shape) < 0.2, 0, np.where(rng.random(a.shape) < 0.1, -300, a))
    a[..., 1:] = -rng.uniform(0, 0.5, size=a[..., 1:].shape)
    rounded = lambda *shape: rng.normal(size=shape).astype(jnp.bfloat16)  # noqa: E731
    arrays = dict(x=rounded(*lanes, heads, p), B=rounded(*lanes, groups, n), C=rounded(*lanes, groups, n))
    arrays |= dict(log_decay_blh=a.astype(np.float32))
    arrays |= dict(initial_state=rng.normal(size=(batch, heads, p, n)).astype(np.float32))
    more = dict(dt_blh=rng.uniform(0.1, 1, size=a.shape).astype(np.float32), z=rounded(*lanes, heads, p))
    more |= dict(D_h=rng.normal(size=(heads,) if "D" in also else (heads, p)).astype(np.float32))
    return arrays | {k: v for k, v in more.items() if k[0] in also or k == "D_h" and "each" in also}


def outputs_and_gradients(p: dict, bars: tuple, reset, implementation: str) -> tuple:
    def run(p):
        return op.ssd(**p, reset=reset, implementation=implementation)

    @jax.jit
    def both(p, bars):
        outputs, pull = jax.vjp(run, p)
        return outputs, pull(bars)[0]

    return both(p, bars)


def wide(v) -> np.ndarray:
    return np.asarray(v).astype(np.float64)


def expected(p: dict, bars: tuple, reset) -> tuple:
    """As `outputs_and_gradients`, by the loop in float64."""
    with jax.enable_x64(True):
        return outputs_and_gradients(*jax.tree.map(wide, (p, bars)), reset, "reference")
