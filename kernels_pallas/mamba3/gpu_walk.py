"""The walk that finds what enters every chunk: states, or on the way back what they mean for the tokens behind."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mamba3 import gpu_angles
from kernels_pallas.mamba3 import gpu_tiles as keys
from kernels_pallas.mamba3.gpu_tiles import BLOCK, GATES, STRICT, SUMS, matrix
from kernels_pallas.partition import over_batch
from kernels_pallas.ssd import gpu_tiles as tile
from kernels_pallas.ssd.gpu_tiles import ROWS, Q
from kernels_pallas.ssd.gpu_walk import Segments

STAGES = 2


class Chunks(NamedTuple):
    """A call as the kernels take it, its sequences cut into segments where few heads walk; theta in turns."""

    segments: Segments
    gates: jax.Array
    B: jax.Array
    C: jax.Array
    angles: jax.Array  # of `gpu_angles`
    B_bias: jax.Array
    C_bias: jax.Array
    theta: jax.Array
    seen: jax.Array | None  # resets from the start of its chunk up to every lane

    AXES = "b l h p, b h c i q, b l g n, b l g n, b l h s, h r n, h r n"  # of `arrays`

    @classmethod
    def of(cls, x, gates, BC, biases, theta, starts, resets, rank: int) -> "Chunks":
        """Arguments as in `gpu_core.fused`."""
        segments = Segments.of(x)
        cut, (a, later, own, rate) = segments.cut, gates
        seen = None if resets is None else jnp.cumsum(resets.astype(jnp.int32).reshape(len(x), -1, Q), 2)
        of_chunks = lambda v: jnp.moveaxis(cut(v).reshape(len(x) * segments.count, -1, Q, v.shape[2]), 3, 1)  # noqa: E731
        gates = jnp.concatenate([segments.gates(a, later), jnp.stack(list(map(of_chunks, (own, rate))), 3)], 3)
        turned = over_batch(lambda *v: (gpu_angles.angles(*v, rank=rank),), "b l h, b l s, b c h s", "b l h s")
        B, C, theta, *given = map(cut, (*BC, theta, rate, theta, starts))
        turns, seen = theta * np.float32(0.5 / np.pi), None if seen is None else cut(seen.reshape(x.shape[:2]))
        return cls(segments, gates, B, C, *turned(*given), *biases, turns, seen)

    def arrays(self, x) -> tuple:
        return self.segments.cut(x), *self[1:7]

    def walk(self, x, h, *, reverse: bool, keep: bool = True) -> tuple:
        """As `walk`, from x = dy where reverse."""
        key, bias = (self.C, self.C_bias) if reverse else (self.B, self.B_bias)
        run = lambda *arrays: walk(*arrays, reverse=reverse, keep=keep)  # noqa: E731
        axes, results = "b l h p, b h c i q, b l g n, b l h s, h r n, b h n p", "b h c n p, " * keep + "b h n p"
        return over_batch(run, axes, results)(self.segments.cut(x), self.gates, key, self.angles, bias, h)

    def entering(self, x, h, *, reverse: bool):
        """The state that enters every segment, of h at the first walked."""
        if self.segments.count == 1:
            return h
        (ends,) = self.walk(x, jnp.zeros((self.gates.shape[0], *h.shape[1:])), reverse=reverse, keep=False)
        return self.segments.across(ends, self.gates, h, reverse)


@partial(jax.jit, static_argnames=("reverse", "keep"))  # lowered once for all layers
def walk(x, gates, B, angles, bias, h, *, reverse: bool, keep: bool):
    """([the state (b, h, c, n, p) before every chunk,] the last one); arguments as in `gpu_forward.forward`.

    reverse: the cotangents of states instead, those after every chunk, of x = dy and of C and its bias.
    """
    (batch, length, count, p), n = x.shape, B.shape[3]
    heads, chunks = tile.Heads.of(x, B), length // Q
    together = heads.together

    def at(step):
        return chunks - 1 - step if reverse else step

    def copies(refs, s, step, slot):
        (x_ref, gates_ref, B_ref, angles_ref), (b, head, group) = refs[:4], heads.place()
        rows = pl.ds(at(step) * Q, Q)
        yield B_ref.at[b, rows, group], s["B"].at[slot]
        for k in range(together):
            yield gates_ref.at[b, head + k, at(step)], s["gates"].at[slot, k]
            yield x_ref.at[b, rows, head + k], s["x"].at[slot, k]
            yield angles_ref.at[b, rows, head + k], s["angles"].at[slot, k]

    def once(refs, s):
        _, head, _ = heads.place()
        for k in range(together * (bias.shape[1] == 1)):
            yield refs[4].at[head + k], s["bias"].at[k]

    scratch = {
        "B": matrix(Q, n, STAGES),
        "x": matrix(Q, p, STAGES, together),
        "angles": keys.turns(STAGES, together, width=angles.shape[3]),
        "gates": tile.vectors(STAGES, together, GATES),
        **({"bias": plgpu.SMEM((together, 1, n), jnp.float32)} if bias.shape[1] == 1 else {}),
        "key": matrix(Q, n, together),
        "weighted": matrix(Q, p, together),
        "state": matrix(n, p, together),
    }
    states = (jax.ShapeDtypeStruct((batch, count, chunks, n, p), jnp.bfloat16),) * keep
    out_type = *states, jax.ShapeDtypeStruct((batch, count, n, p), jnp.float32)
    rings, inputs = {"tokens": (STAGES, 1 + 3 * together, copies)}, (x, gates, B, angles, bias, h)
    kernel = partial(_all_chunks, heads, chunks, reverse, keep)
    return keys.launch(
        kernel, rings, (together * (bias.shape[1] == 1), once), inputs, out_type, scratch, heads.grid, together, chunks
    )


def _all_chunks(heads: tile.Heads, chunks: int, reverse: bool, keep: bool, refs: list, s: dict, thread) -> None:
    """The walk of one warpgroup, over the chunks of its head."""
    (bias_ref, h_ref, *out_refs), (b, head, _) = refs[4:], heads.place()
    head += thread
    of_head = s["bias"].at[thread] if "bias" in s else bias_ref.at[head]
    weighted, state, key = (s[name].at[thread] for name in ("weighted", "state", "key"))
    if "bias" in s:
        plgpu.barrier_wait(s["ready"])

    def visit(i, h):
        slot = jax.lax.rem(i, STAGES)
        plgpu.barrier_wait(s["tokens arrived"].at[slot])
        gates = s["gates"].at[slot, thread]
        sums = gates.at[SUMS]
        _make(s, slot, thread, of_head, key)
        weight = tile.to_here(sums) if reverse else tile.to_end(sums) * tile.load(gates.at[STRICT], ROWS)
        x = tile.load(s["x"].at[slot, thread]) * tile.over_columns(weight, weighted.shape[1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        weighted[...] = x.astype(jnp.bfloat16)
        if keep:
            state[...] = h.astype(jnp.bfloat16)
        plgpu.commit_smem()
        if keep:
            plgpu.copy_smem_to_gmem(state, out_refs[0].at[b, head, chunks - 1 - i if reverse else i])
        (h,) = tile.accumulate((h * tile.through(sums, *h.shape), key.T, weighted))
        plgpu.barrier_arrive(s["tokens used"].at[slot])
        return h

    start = tile.load(h_ref.at[b, head], shared=False)
    out_refs[-1][b, head] = jax.lax.fori_loop(0, chunks, visit, start)
    plgpu.wait_smem_to_gmem(0)


def _make(s: dict, slot, thread, bias, key) -> None:
    """The turned keys of a chunk."""
    for j, lo, hi in keys.blocks(key.shape[1]):
        turned, parts = None, (key.at[:, lo], key.at[:, hi])
        if j < s["angles"].shape[-1] // BLOCK:
            turned = keys.turn(s["angles"].at[slot, thread, :, pl.ds(j * BLOCK, BLOCK)])
        keys.key(s["B"].at[slot], bias, (lo, hi), parts, turned)
