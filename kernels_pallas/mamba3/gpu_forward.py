"""One walk over the chunks of a head, its state in registers; keys are made, and turned, where they are multiplied."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mamba3 import gpu_tiles as keys
from kernels_pallas.mamba3.gpu_tiles import BLOCK, GATES, STRICT, SUMS, matrix
from kernels_pallas.ssd import gpu_tiles as tile
from kernels_pallas.ssd.gpu_tiles import COLUMNS, ROWS, Q

STAGES = 2


@partial(jax.jit, static_argnames="rank")  # lowered once for all layers
def forward(x, gates, B, C, angles, B_bias, C_bias, h, D, z=None, *, rank: int):
    """(y, the last state) of x (b, l, h, p), B and C (b, l, g, n), states (b, h, n, p) and D (h, p).

    gates: (b, h, c, 4, q), of every lane the log2 decay from the start of its chunk, by what later tokens and its own
    read its input, and how much of theta it turns. angles: of `gpu_angles`. Biases: (h, 1 or q, n).
    """
    (_, length, _, p), n = x.shape, B.shape[3]
    heads = tile.Heads.of(x, B)

    def of_keys(refs, s, step, slot):
        (B_ref, C_ref, angles_ref), (b, head, group) = refs[2:5], heads.place()
        rows = pl.ds(step * Q, Q)
        yield B_ref.at[b, rows, group], s["B"].at[slot]
        yield C_ref.at[b, rows, group], s["C"].at[slot]
        for k in range(heads.together):
            yield angles_ref.at[b, rows, head + k], s["angles"].at[k]

    def of_heads(refs, s, step, slot):
        (x_ref, gates_ref), (b, head, _) = refs[:2], heads.place()
        rows = pl.ds(step * Q, Q)
        for k in range(heads.together):
            yield gates_ref.at[b, head + k, step], s["gates"].at[slot, k]
            yield x_ref.at[b, rows, head + k], s["x"].at[slot, k]
            if z is not None:
                yield refs[9].at[b, rows, head + k], s["z"].at[slot, k]

    def of_walk(refs, s):
        _, head, _ = heads.place()
        for k in range(heads.together):
            yield refs[8].at[head + k], s["D"].at[k]
            for i in range(2 * (rank == 1)):
                yield refs[5 + i].at[head + k], s["biases"].at[i, k]

    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(h.shape, jnp.float32)
    inputs = (x, gates, B, C, angles, B_bias, C_bias, h, D) + (() if z is None else (z,))
    rings = {
        "heads": (STAGES, (2 + (z is not None)) * heads.together, of_heads),
        "keys": (1, 2 + heads.together, of_keys),
    }
    scratch = _scratch(p, n, angles.shape[3], heads.together, gated=z is not None, biased=rank == 1)
    once = (1 + 2 * (rank == 1)) * heads.together, of_walk
    kernel = partial(_all_chunks, heads, length // Q, rank)
    return keys.launch(kernel, rings, once, inputs, out_type, scratch, heads.grid, heads.together, length // Q)


def _all_chunks(heads: tile.Heads, chunks: int, rank: int, refs: list, s: dict, thread) -> None:
    """The walk of one warpgroup, over the chunks of its head."""
    (*bias_refs, h_ref), (y_ref, last_ref), (b, head, _) = refs[5:8], refs[-2:], heads.place()
    head += thread
    biases = [s["biases"].at[k, thread] if "biases" in s else ref.at[head] for k, ref in enumerate(bias_refs)]
    start = tile.load(h_ref.at[b, head], shared=False)
    s["state"].at[thread][...] = start.astype(jnp.bfloat16)
    plgpu.barrier_wait(s["ready"])
    plgpu.commit_smem()

    def visit(i, h):
        slot, weighted = jax.lax.rem(i, STAGES), _scratch_of(s, thread)[1]
        plgpu.barrier_wait(s["heads arrived"].at[slot])
        plgpu.barrier_wait(s["keys arrived"].at[0])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        make(s, thread, biases)
        plgpu.barrier_arrive(s["keys used"].at[0])
        plgpu.commit_smem()
        y, h = _chunk(s, thread, slot, rank, h)
        s["state"].at[thread][...] = h.astype(jnp.bfloat16)
        skip = tile.over_rows(tile.load(s["D"].at[thread], COLUMNS), Q)
        y += skip * tile.load(s["x"].at[slot, thread])
        if "z" in s:
            y *= tile.silu(tile.load(s["z"].at[slot, thread]))
        plgpu.barrier_arrive(s["heads used"].at[slot])
        plgpu.commit_smem()
        weighted[...] = y.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weighted, y_ref.at[b, pl.ds(i * Q, Q), head])
        return h

    last_ref[b, head] = jax.lax.fori_loop(0, chunks, visit, start)
    plgpu.wait_smem_to_gmem(0)


def _scratch(p: int, n: int, planes: int, together: int, gated: bool, biased: bool) -> dict:
    apart = {"biases": plgpu.SMEM((2, together, 1, n), jnp.float32)} if biased else {}
    apart |= {} if (n, p) == (2 * Q, Q) else {"weighted": matrix(Q, p, together)}
    return apart | {
        **{name: matrix(Q, n, 1) for name in ("B", "C")},
        "k": matrix(Q, n, together),
        "q": [matrix(Q, Q, together) for _ in range(n // Q)],
        **{name: matrix(Q, p, STAGES, together) for name in ("x", "z")[: 1 + gated]},
        "angles": keys.turns(together, width=planes),
        "gates": tile.vectors(STAGES, together, GATES),
        "D": plgpu.SMEM((together, p), jnp.float32),
        "state": matrix(n, p, together),
    }


def _scratch_of(s, thread) -> tuple:
    """Where scores and what is weighted go: to where q was, if there is room for both."""
    return s["q"][0].at[thread], (s["weighted"] if "weighted" in s else s["q"][1]).at[thread]


def make(s, thread, bias_refs: list) -> None:
    """k and q of a chunk, from B and C; q in pieces of Q states."""
    thread = keys.anew(thread)
    k, q = s["k"].at[thread], [piece.at[thread] for piece in s["q"]]
    for i, lo, hi in keys.blocks(k.shape[1]):
        turned, at = None, pl.ds(i * BLOCK, BLOCK)
        targets = (k.at[:, lo], k.at[:, hi])
        if i < s["angles"].shape[-1] // BLOCK:
            turned = keys.turn(s["angles"].at[thread, :, at])
        keys.key(s["B"].at[0], bias_refs[0], (lo, hi), targets, turned)
        targets = (q[0].at[:, at], q[1].at[:, at]) if len(q) == 2 else (q[0].at[:, lo], q[0].at[:, hi])
        keys.key(s["C"].at[0], bias_refs[1], (lo, hi), targets, turned)


def _chunk(s, thread, slot, rank: int, h) -> tuple:
    """What the tokens of a chunk read, and the state after it, from the one before, which s has too."""
    thread = keys.anew(thread)
    k, x_tile, gates = s["k"].at[thread], s["x"].at[slot, thread], s["gates"].at[slot, thread]
    within, weighted = _scratch_of(s, thread)
    pieces = [(piece.at[thread], pl.ds(i * Q, Q)) for i, piece in enumerate(s["q"])]
    chains = [(q, k.at[:, at].T) for q, at in pieces], [(q, s["state"].at[thread, at]) for q, at in pieces]
    scores, y = keys.chains(*chains)
    sums = gates.at[SUMS]
    left, same = keys.pairs(gates, rank, pl.ds(0, Q))
    scores *= left * jnp.where(same, keys.own(gates, Q), keys.later(gates, pl.ds(0, Q)))
    within[...] = scores.astype(jnp.bfloat16)
    leaves = tile.over_columns(tile.to_end(sums) * tile.load(gates.at[STRICT], ROWS), x_tile.shape[1])
    weighted[...] = (tile.load(x_tile) * leaves).astype(jnp.bfloat16)
    plgpu.commit_smem()
    y *= tile.over_columns(tile.to_here(sums), y.shape[1])
    h *= tile.through(sums, *h.shape)
    return tile.accumulate((y, within, x_tile), (h, k.T, weighted))
