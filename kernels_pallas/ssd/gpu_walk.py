"""The walk that finds what enters every chunk: states, or on the way back what they mean for the tokens behind."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.partition import over_batch
from kernels_pallas.ssd import gpu_tiles as tile
from kernels_pallas.ssd.gpu_tiles import LEAST, ROWS, Q

STAGES = 2
LOG2_E = np.float32(np.log2(np.e))
BUSY = 132  # warpgroups that are worth no cut, which reads everything twice
SHORTEST_SEGMENT = 512  # lanes


class Segments(NamedTuple):
    """A batch whose sequences are cut into segments, each a sequence of its own, where few heads walk."""

    batch: int
    count: int

    @classmethod
    def of(cls, x: jax.Array) -> "Segments":
        batch, length, heads, _ = x.shape
        count = 1
        while batch * heads * count < BUSY and length % (2 * count * Q) == 0:
            if length < 2 * count * SHORTEST_SEGMENT:
                break
            count *= 2
        return cls(batch, count)

    def cut(self, v: jax.Array | None) -> jax.Array | None:
        return None if v is None else v.reshape(self.batch * self.count, -1, *v.shape[2:])

    def gates(self, a: jax.Array, dt: jax.Array) -> jax.Array:
        """(b, h, c, 2, q): the log2 decay from the start of the chunk to every lane, and dt."""
        a, dt = (v.reshape(self.batch * self.count, -1, Q, v.shape[-1]) for v in (clipped(a), dt))
        sums = jnp.einsum("bcqh,iq->bhci", a, np.tril(np.ones((Q, Q), np.float32)), precision="highest")
        return jnp.stack([sums, jnp.moveaxis(dt, 3, 1)], 3)

    def entering(self, x: jax.Array, gates: jax.Array, B: jax.Array, h: jax.Array, reverse: bool) -> jax.Array:
        """The state that enters every segment, of h at the first walked; arguments as in `walk`."""
        if self.count == 1:
            return h
        (ends,) = walk(x, gates, B, jnp.zeros((x.shape[0], *h.shape[1:])), reverse=reverse, keep=False)
        return self.across(ends, gates, h, reverse)

    def across(self, ends: jax.Array, gates: jax.Array, h: jax.Array, reverse: bool) -> jax.Array:
        """The state that enters every segment, of h at the first walked and of what each leaves of no state."""
        each = lambda v: v.reshape(self.batch, self.count, *v.shape[1:])  # noqa: E731
        decays, ends = each(jnp.exp2(gates[:, :, :, 0, -1].sum(-1)))[..., None, None], each(ends)
        entering = {}
        for s in range(self.count)[:: -1 if reverse else 1]:
            entering[s] = h
            h = decays[:, s] * h + ends[:, s]
        return jnp.stack([entering[s] for s in range(self.count)], 1).reshape(-1, *h.shape[1:])

    def last(self, h: jax.Array, reverse: bool = False) -> jax.Array:
        """The state that leaves the last segment walked."""
        return h.reshape(self.batch, self.count, *h.shape[1:])[:, 0 if reverse else -1]


def clipped(a: jax.Array) -> jax.Array:
    """The log2 decay."""
    return jnp.maximum(a.astype(jnp.float32) * LOG2_E, LEAST)


def walk(x, gates, B, h, *, reverse: bool, keep: bool = True) -> tuple:
    """([the state (b, h, c, n, p) before every chunk,] the last one); arguments as in `gpu.forward`.

    reverse: the cotangents of states instead, those after every chunk, of x = dy and B = C.
    """
    results = "b h c n p, " * keep + "b h n p"
    run = lambda *arrays: _walk(*arrays, reverse=reverse, keep=keep)  # noqa: E731
    return over_batch(run, "b l h p, b h c i q, b l g n, b h n p", results)(x, gates, B, h)


@partial(jax.jit, static_argnames=("reverse", "keep"))  # lowered once for all layers
def _walk(x, gates, B, h, *, reverse: bool, keep: bool):
    (batch, length, count, p), n = x.shape, B.shape[3]
    heads, chunks = tile.Heads.of(x, B), length // Q
    together = heads.together

    def at(step):
        return chunks - 1 - step if reverse else step

    def copies(refs, s, step, slot):
        (x_ref, gates_ref, B_ref), (b, head, group) = refs[:3], heads.place()
        rows = pl.ds(at(step) * Q, Q)
        yield B_ref.at[b, rows, group], s["B"].at[slot]
        for k in range(together):
            yield gates_ref.at[b, head + k, at(step)], s["gates"].at[slot, k]
            yield x_ref.at[b, rows, head + k], s["x"].at[slot, k]

    def kernel(refs, s, thread):
        (h_ref, *out_refs), (b, head, _) = refs[3:], heads.place()
        head += thread
        weighted, state = s["weighted"].at[thread], s["state"].at[thread]

        def visit(i, h):
            slot = jax.lax.rem(i, STAGES)
            plgpu.barrier_wait(s["arrived"].at[slot])
            sums, dt = s["gates"].at[slot, thread, 0], s["gates"].at[slot, thread, 1]
            weight = tile.to_here(sums) if reverse else tile.to_end(sums) * tile.load(dt, ROWS)
            x = tile.load(s["x"].at[slot, thread]) * tile.over_columns(weight, p)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            weighted[...] = x.astype(jnp.bfloat16)
            if keep:
                state[...] = h.astype(jnp.bfloat16)
            plgpu.commit_smem()
            if keep:
                plgpu.copy_smem_to_gmem(state, out_refs[0].at[b, head, at(i)])
            (h,) = tile.accumulate((h * tile.through(sums, *h.shape), s["B"].at[slot].T, weighted))
            plgpu.barrier_arrive(s["used"].at[slot])
            return h

        start = tile.load(h_ref.at[b, head], shared=False)
        out_refs[-1][b, head] = jax.lax.fori_loop(0, chunks, visit, start)
        plgpu.wait_smem_to_gmem(0)

    made = partial(tile.matrix, p)
    scratch = {
        "stages": STAGES,
        "copies": 1 + 2 * together,
        "B": made(Q, n, STAGES),
        "x": made(Q, p, STAGES, together),
        "gates": tile.vectors(STAGES, together, 2),
        "weighted": made(Q, p, together),
        "state": made(n, p, together),
    }
    states = (jax.ShapeDtypeStruct((batch, count, chunks, n, p), jnp.bfloat16),) * keep
    out_type = *states, jax.ShapeDtypeStruct((batch, count, n, p), jnp.float32)
    return tile.launch(kernel, copies, (x, gates, B, h), out_type, scratch, heads.grid, together, chunks)
