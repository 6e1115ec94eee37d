"""The gradients of all arguments from the kernels: what they sum by chunks, summed up."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.associative_scan import associative_scan
from kernels_pallas.mamba3.gpu_backward import SUMMED, gradients
from kernels_pallas.mamba3.gpu_tiles import BLOCK, STRICT
from kernels_pallas.partition import over_batch
from kernels_pallas.ssd.gpu_tiles import LEAST, Q
from kernels_pallas.ssd.gpu_walk import clipped

BUSY = 264  # pairs of warpgroups: with fewer, several share a chunk


class Bars(NamedTuple):
    """The cotangents of the arguments of `gpu_core.fused` of the same names."""

    x: jax.Array
    gates: tuple
    BC: tuple
    biases: tuple
    theta: jax.Array
    angle: jax.Array
    D: jax.Array
    h: jax.Array


def cotangents(chunks, x, gates, D, enters, dy, d_last, rank: int) -> Bars:
    """From the state that enters every segment, and the cotangents of y and of the last state."""
    segments, groups, heads = chunks.segments, chunks.B.shape[2], len(D)
    states, _ = chunks.walk(x, enters, reverse=False)
    costates, dh = chunks.walk(dy, chunks.entering(dy, d_last, reverse=True), reverse=True)
    splits, pairs = 1, x.shape[0] * x.shape[1] // Q * groups
    while pairs * splits < BUSY and heads // groups % (2 * splits) == 0:
        splits *= 2
    wide = jnp.broadcast_to(D[:, None], (heads, x.shape[-1]))
    since, lanes = _masks(chunks, rank)
    arrays = *chunks.arrays(x), chunks.theta, wide, segments.cut(dy), states, costates, since, lanes
    axes = f"{chunks.AXES}, b l s, h p, b l h p, b h c n p, b h c n p, b c q j, b c k q"
    results = "b l h p" + 2 * ", b e l g n" + ", b f l s, b h c o q" + 2 * ", b h c r m t" + ", b h c v t"
    run = lambda *arrays: gradients(*arrays, rank=rank, splits=splits)  # noqa: E731
    dx, dB, dC, dtheta, sums, B_bias, C_bias, ends = over_batch(run, axes, results)(*arrays)

    da, dlater, down, drate, dD = _of_gates(sums, chunks.gates[:, :, :, STRICT], since.astype(jnp.float32))
    a, _, _, rate = gates
    of_lanes = lambda v: jnp.moveaxis(v, 1, -1).reshape(a.shape)  # noqa: E731
    da, dlater, down, drate = map(of_lanes, (da, dlater, down, drate))
    da = jnp.where(clipped(a) > LEAST, da, 0)
    whole = lambda v: v.reshape(*x.shape[:2], *v.shape[2:])  # noqa: E731
    theta_bar, rate_bar, angle = _of_angles(chunks, whole(chunks.theta), rate, _ends(ends))
    dtheta = whole(dtheta.sum(1)) + theta_bar
    BC = tuple(whole(v.sum(1)).astype(chunks.B.dtype) for v in (dB, dC))
    biases = tuple(_of_bias(v, bias) for v, bias in ((B_bias, chunks.B_bias), (C_bias, chunks.C_bias)))
    dh = segments.last(dh, reverse=True)
    return Bars(whole(dx), (da, dlater, down, drate + rate_bar), BC, biases, dtheta, angle, dD, dh)


def _masks(chunks, rank: int) -> tuple:
    """By chunk: which lanes' angles one lane is part of; and by rows the lanes of each rank, last those before any
    reset, whose angles go on from before the chunk."""
    batch, length = chunks.gates.shape[0], chunks.theta.shape[1]
    seen = jnp.zeros((batch, length)) if chunks.seen is None else chunks.seen
    seen = seen.reshape(batch, -1, Q)
    since = np.triu(np.ones((Q, Q), bool))[None, None] & (seen[..., None] == seen[..., None, :])
    ranks = np.zeros((rank + 1 + -(rank + 1) % 8, Q), np.float32)
    ranks[np.arange(Q) % rank, np.arange(Q)] = 1
    lanes = jnp.broadcast_to(ranks, (*seen.shape[:2], *ranks.shape)).at[:, :, -1].set((seen == 0).astype(jnp.float32))
    return since.astype(jnp.bfloat16), lanes.astype(jnp.bfloat16)


def _of_gates(sums, later, since):
    """The cotangents (b, h, c, q) of log decays, of what later lanes and its own read, of the rate, and of D (h,).

    A log decay scales all that crosses it: what a later token of its chunk reads of one before, or of the state at the
    start, what the end keeps of a token before it, and what goes all the way through. since: as in `_masks`.
    """
    read, owned, turned, through, inside, beyond, skipped = (sums[:, :, :, i] for i in range(SUMMED))
    da = jnp.einsum("bctq,bhcq->bhct", since, read - later * inside, precision="highest")
    da += jnp.einsum("tq,bhcq->bhct", np.tril(np.ones((Q, Q), np.float32), -1), later * beyond, precision="highest")
    da += through.sum(-1, keepdims=True)
    flat = lambda v: v.reshape(*v.shape[:2], -1)  # noqa: E731
    rate = turned * np.float32(2 * np.pi)
    return *map(flat, (da, inside + beyond, owned, rate)), skipped.sum((0, 2, 3))


def _of_angles(chunks, theta, rate, ends) -> tuple:
    """What the angles of later chunks say to theta, to its rate, and to the angle before the first lane.

    theta (b, l, s) in turns, rate (b, l, h); ends (b', h, c', s): what a chunk says to the angle before it.
    """
    batch, heads = len(rate), rate.shape[2]
    ends = jnp.moveaxis(ends.reshape(batch, -1, *ends.shape[1:]), 2, 3).reshape(batch, -1, heads * ends.shape[-1])
    count = ends.shape[1]
    mine, cut = jnp.ones((batch, count, Q)), None
    if chunks.seen is not None:
        seen = chunks.seen.reshape(batch, count, Q)
        mine, cut = (seen == seen[..., -1:]).astype(jnp.float32), seen[..., -1] > 0
    total, _ = associative_scan(jnp.ones_like(ends[0, 0]), ends, reverse=True, reset=cut)
    beyond = jnp.pad(total[:, 1:], ((0, 0), (0, 1), (0, 0))).reshape(batch, count, heads, -1)
    chunked = lambda v: v.reshape(batch, count, Q, -1)  # noqa: E731
    product = partial(jnp.einsum, precision="highest")
    theta_bar = product("bcqh,bchs->bcqs", chunked(rate) * mine[..., None], beyond).reshape(theta.shape)
    rate_bar = product("bcqs,bchs->bcqh", chunked(theta) * mine[..., None], beyond).reshape(rate.shape)
    return theta_bar, rate_bar * np.float32(2 * np.pi), total[:, 0].reshape(batch, heads, -1)


def _ends(sums):
    """(b, h, c, s) of blocks of the high and of the low parts of planes."""
    parts = sums.reshape(*sums.shape[:4], 2, BLOCK).sum(4)
    return parts.reshape(*sums.shape[:3], -1)


def _of_bias(sums, bias):
    """Of rows for all lanes or for every lane, the first of each rank."""
    total = jnp.swapaxes(sums.sum((0, 2)).reshape(*sums.shape[1:2], *sums.shape[3:5], 2, BLOCK), 2, 3)
    total = total.reshape(len(bias), -1, bias.shape[2])
    return jnp.pad(total, ((0, 0), (0, bias.shape[1] - total.shape[1]), (0, 0)))
