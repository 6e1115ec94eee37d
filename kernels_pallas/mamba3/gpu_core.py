"""The walk and its gradient as one function of lanes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.mamba3.gpu_cotangents import cotangents
from kernels_pallas.mamba3.gpu_forward import forward
from kernels_pallas.mamba3.gpu_walk import Chunks
from kernels_pallas.partition import over_batch


@partial(jax.custom_vjp, nondiff_argnums=(11,))
def fused(x, gates, BC, biases, theta, angle, starts, resets, D, h, z, rank):
    """(y, the last state) of x (b, l, h, p) and z, states (b, h, n, p), and D (h,).

    gates: (b, l, h) each, log decays, by what later lanes and those of its token read a lane, and how much of theta
    it turns. BC: (b, l, g, n) each, their biases (h, 1 or q, n). theta (b, l, s), in radians; angle (b, h, s) before
    the first lane, and starts (b, c, h, s) before every chunk, in the integers of `gpu_angles`, which follow from the
    others and have no gradient. resets (b, l) or None: where the angle's gradient is cut.
    """
    return _forward(x, gates, BC, biases, theta, angle, starts, resets, D, h, z, rank)[0]


def _forward(x, gates, BC, biases, theta, angle, starts, resets, D, h, z, rank):
    """((y, the last state), the state that enters every segment)."""
    chunks = Chunks.of(x, gates, BC, biases, theta, starts, resets, rank)
    enters = chunks.entering(x, h, reverse=False)
    D = jnp.broadcast_to(D[:, None], (len(D), x.shape[-1]))
    arrays = [*chunks.arrays(x), enters, D] + ([] if z is None else [chunks.segments.cut(z)])
    axes = f"{chunks.AXES}, b h n p, h p" + ", b l h p" * (z is not None)
    y, last = over_batch(lambda *arrays: forward(*arrays, rank=rank), axes, "b l h p, b h n p")(*arrays)
    return (y.reshape(x.shape), chunks.segments.last(last)), enters


def _forward_and_residuals(x, gates, BC, biases, theta, angle, starts, resets, D, h, z, rank):
    (y, last), enters = _forward(x, gates, BC, biases, theta, angle, starts, resets, D, h, None, rank)
    out = y if z is None else (y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(y.dtype)
    saved = x, gates, BC, biases, theta, angle, starts, resets, D, enters, z, None if z is None else y
    return (out, last), saved


def _backward(rank, saved, bars):
    (x, gates, BC, biases, theta, _, starts, resets, D, enters, z, y), (dy, d_last) = saved, bars
    dz = None
    if z is not None:
        gated = lambda y, z: y * jax.nn.silu(z)  # noqa: E731
        _, pull = jax.vjp(gated, y.astype(jnp.float32), z.astype(jnp.float32))
        dy, dz = (v.astype(z.dtype) for v in pull(dy.astype(jnp.float32)))
    chunks = Chunks.of(x, gates, BC, biases, theta, starts, resets, rank)
    out = cotangents(chunks, x, gates, D, enters, dy, d_last, rank)
    no, none = (None if v is None else np.zeros(v.shape, jax.dtypes.float0) for v in (starts, resets))
    return out.x, out.gates, out.BC, out.biases, out.theta, out.angle, no, none, out.D, out.h, dz


fused.defvjp(_forward_and_residuals, _backward)
