"""The walk and its gradient as one function of lanes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.mamba3.gpu_cotangents import cotangents
from kernels_pallas.mamba3.gpu_forward import forward
from kernels_pallas.mamba3.gpu_walk import Chunks
from kernels_pallas.partition import over_batch
from kernels_pallas.ssd.gpu_tiles import LEAST, Q
from kernels_pallas.ssd.gpu_walk import Segments, clipped


@partial(jax.custom_vjp, nondiff_argnums=(11,))
def fused(x, gates, BC, biases, theta, angle, starts, resets, D, h, z, rank):
    """(y, the last state) of x (b, l, h, p) and z, states (b, h, n, p), and D (h,).

    gates: (b, l, h) each, log decays, by what later lanes and those of its token read a lane, and how much of theta
    it turns. BC: (b, l, g, n) each, their biases (h, 1 or q, n). theta (b, l, s), in radians; angle (b, h, s) before
    the first lane, and starts (b, c, h, s) before every chunk, in the integers of `gpu_angles`, which follow from the
    others and have no gradient. resets (b, l) or None: where the angle's gradient is cut.
    """
    return _forward(x, gates, BC, biases, theta, starts, resets, D, h, z, rank)[0]


def _forward(x, gates, BC, biases, theta, starts, resets, D, h, z, rank, keep=False):
    """((y, the last state), [y before its gate] if kept, the state that enters every segment, the chunks)."""
    chunks = Chunks.of(x, gates, BC, biases, theta, starts, resets).turned(rank)
    enters = chunks.entering(x, h, reverse=False)
    D = jnp.broadcast_to(D[:, None], (len(D), x.shape[-1]))
    arrays = [*chunks.arrays(x), enters, D] + ([] if z is None else [chunks.segments.cut(z)])
    axes, results = f"{chunks.AXES}, b h n p, h p" + ", b l h p" * (z is not None), "b l h p, b h n p"
    run = lambda *arrays: forward(*arrays, rank=rank, keep=keep)  # noqa: E731
    y, last, *kept = over_batch(run, axes, results + ", b l h p" * keep)(*arrays)
    return (y.reshape(x.shape), chunks.segments.last(last)), [v.reshape(x.shape) for v in kept], enters, chunks


def _forward_and_residuals(x, gates, BC, biases, theta, angle, starts, resets, D, h, z, rank):
    keep = z is not None
    out, y, enters, chunks = _forward(x, gates, BC, biases, theta, starts, resets, D, h, z, rank, keep)
    alive = clipped(gates[0]) > LEAST
    return out, (x, alive, chunks._replace(segments=None, angles=None), D, enters, z, y)


def _backward(rank, saved, bars):
    (x, alive, chunks, D, enters, z, y), (dy, d_last) = saved, bars
    dz = None
    if z is not None:
        gated = lambda y, z: y * jax.nn.silu(z)  # noqa: E731
        _, pull = jax.vjp(gated, *(v.astype(jnp.float32) for v in (*y, z)))
        dy, dz = (v.astype(z.dtype) for v in pull(dy.astype(jnp.float32)))
    chunks = chunks._replace(segments=Segments.of(x)).turned(rank)
    out = cotangents(chunks, x, alive, D, enters, dy, d_last, rank)
    no = lambda *shape: np.zeros(shape, jax.dtypes.float0)  # noqa: E731
    starts = no(len(x), x.shape[1] // Q, *chunks.starts.shape[2:])
    resets = None if chunks.seen is None else no(*x.shape[:2])
    return out.x, out.gates, out.BC, out.biases, out.theta, out.angle, starts, resets, out.D, out.h, dz


fused.defvjp(_forward_and_residuals, _backward)
