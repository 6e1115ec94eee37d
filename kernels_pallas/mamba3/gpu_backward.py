r"""The gradients of Mamba-3 on NVIDIA Hopper GPUs.

As in state space duality, a walk finds the state that enters every chunk and one the other way what every chunk's state
means for the tokens behind it; then all chunks are independent. A pair of warpgroups takes one chunk and goes over the
heads of a group: one makes q and finds its cotangent, the other k and its own. They turn them back and sum those of B,
C and theta in registers: no key and no angle of a head reaches memory, nor does its cotangent.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mamba3 import gpu_tiles as keys
from kernels_pallas.mamba3.gpu_tiles import BLOCK, GATES, RATE, STRICT, SUMS, matrix
from kernels_pallas.ssd import gpu_tiles as tile
from kernels_pallas.ssd.gpu_tiles import COLUMNS, ROWS, WGMMA, Q

STAGES = 2
READ, THROUGH, TURNED_Q, INSIDE, BEYOND, SKIPPED, OWNED, TURNED_K = range(8)  # sums of a chunk
SUMMED = 8


@partial(jax.jit, static_argnames=("rank", "splits"))  # lowered once for all layers
def gradients(
    x, gates, B, C, theta, starts, B_bias, C_bias, D, dy, states, costates, since, lanes, *, rank: int, splits: int
):
    """(dx, dB and dC (b, splits, l, g, n), what k and q say to theta (b, blocks, l, s), sums (b, h, c, 8, q), what B's
    and C's biases get (b, h, c, r, m, 64), and the angle before the chunk by k and by q (b, h, c, s / 32, 64)).

    The sums have, for every lane, what dy says to all it reads of before its token, parts of what dy's state says to
    x's state all the way through the chunk, what q's angles say to its rate, what x says to all that reads it in the
    chunk and beyond, what x says to dy, what its own token reads, and what k's angles say to its rate.
    """
    (batch, length, heads, p), (groups, n), planes = x.shape, B.shape[2:], theta.shape[2]
    steps, chunks, blocks = heads // groups // splits, length // Q, groups * splits

    def place(step):
        block, chunk = jax.lax.axis_index("block"), jax.lax.axis_index("chunk")
        return jax.lax.axis_index("batch"), block * steps + step, chunk, pl.ds(chunk * Q, Q), jax.lax.div(block, splits)

    def copies(refs, s, step, slot):
        b, head, chunk, rows, _ = place(step)
        yield refs[1].at[b, head, chunk], s["gates"].at[slot]
        yield refs[0].at[b, rows, head], s["x"].at[slot]
        yield refs[9].at[b, rows, head], s["dy"].at[slot]
        yield refs[5].at[b, chunk, head], s["starts"].at[slot]
        yield refs[8].at[head], s["D"].at[slot]
        if rank == 1:
            yield refs[7].at[head], s["biases"].at[slot, 0]
            yield refs[6].at[head], s["biases"].at[slot, 1]

    def of_states(refs, s, step, slot):
        b, head, chunk, _, _ = place(step)
        yield refs[10].at[b, head, chunk], s["states"].at[slot]
        yield refs[11].at[b, head, chunk], s["costates"].at[slot]

    def once(refs, s):
        b, _, chunk, rows, group = place(0)
        yield refs[3].at[b, rows, group], s["raw"].at[0]
        yield refs[2].at[b, rows, group], s["raw"].at[1]
        yield refs[12].at[b, chunk], s["triangles"].at[0]
        yield refs[14], s["triangles"].at[1]
        yield refs[13].at[b, chunk], s["lanes"].at[0]
        if planes == BLOCK:
            yield refs[4].at[b, chunk], s["theta"].at[0]

    out = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.float32)  # noqa: E731
    of_group, of_planes = out(splits, length, groups, n), out(blocks, length, planes)
    of_bias, ends = out(heads, chunks, rank, n // Q, Q), out(heads, chunks, planes // BLOCK, Q)
    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype), of_group, of_group, of_planes, of_planes
    out_type += out(heads, chunks, SUMMED, Q), of_bias, of_bias, ends, ends
    grid = dict(block=blocks, chunk=chunks, batch=batch)
    kernel = partial(_chunk, place, steps, splits, rank)
    theta = theta.reshape(batch, chunks, Q, planes)
    arrays = x, gates, B, C, theta, starts, B_bias, C_bias, D, dy, states, costates, since, lanes, keys.triangle()
    rings = {"heads": (STAGES, 5 + 2 * (rank == 1), copies), "states": (1, 2, of_states)}
    return keys.launch(
        kernel, rings, (5 + (planes == BLOCK), once), arrays, out_type, _scratch(p, n, planes, rank), grid, 2, steps
    )


def _scratch(p: int, n: int, planes: int, rank: int) -> dict:
    apart = ({} if p == Q else {"out": matrix(Q, p, 1)}) | ({} if n == Q else {"rest": keys.exact(2, 2)})
    vectors = lambda *shape: plgpu.SMEM((STAGES, *shape), jnp.float32)  # noqa: E731
    apart |= {"biases": vectors(2, 1, n)} if rank == 1 else {}
    apart |= {"theta": keys.exact(1)} if planes == BLOCK else {}  # there is room for one block
    return apart | {
        **{name: matrix(Q, n, 2) for name in ("raw", "key")},  # of q, and of k
        **{name: matrix(Q, p, STAGES) for name in ("x", "dy")},
        **{name: matrix(n, p, 1) for name in ("states", "costates")},
        **{name: matrix(Q, Q, 2) for name in ("dscores", "stage")},
        "triangles": matrix(Q, Q, 2),  # which angles a lane's is part of, and which are part of it
        "lanes": matrix(Q, BLOCK, 1),
        **{"gates": vectors(GATES, Q), "starts": vectors(planes), "D": vectors(p)},
        **{name: plgpu.Barrier(num_arrivals=2) for name in ("made", "over")},
    }


class Side(NamedTuple):
    """What one of the two warpgroups works on: the first on q and C, the second on k and B.

    Tiles of shared memory are asked for anew where they are used: their addresses and descriptors take registers.
    """

    s: dict
    thread: object
    chunk: object
    rank: int
    bias_ref: object
    theta_ref: object  # by chunks
    outs: tuple  # refs of the cotangents of B or C, and of theta; by heads, of its bias, and of the angle before
    slot: object = None  # of the rings
    head: object = None

    @property
    def planes(self) -> int:
        return self.theta_ref.shape[-1]

    def mine(self, name: str):
        return self.s[name].at[keys.anew(self.thread)]

    def other(self, name: str):
        return self.s[name].at[1 - keys.anew(self.thread)]

    def now(self, name: str):
        return self.s[name].at[keys.anew(self.slot)]

    def gates(self):
        return self.now("gates")

    def constant(self, name: str, index: int = 0):
        return self.s[name].at[keys.anew(index)]

    def parts(self) -> tuple:
        """Two tiles that are free."""
        stage = self.mine("stage")
        return stage.at[:, pl.ds(0, BLOCK)], stage.at[:, pl.ds(BLOCK, BLOCK)]

    def theta(self, i: int):
        """Of a block of planes."""
        if "theta" in self.s:
            return tile.load(self.constant("theta"))
        return tile.load(self.theta_ref.at[keys.anew(self.chunk), :, _planes(i)], shared=False)

    def turn(self, i: int) -> tuple:
        """(cos, sin) of a block of planes."""
        start = tile.load(self.now("starts").at[_planes(i)], COLUMNS)
        rate, ones = self.gates().at[RATE], self.constant("triangles", 1)
        return keys.turn(self.theta(i), start, rate, ones, self.parts())

    def totals(self):
        """Of every column of its stage by columns: over the lanes of each rank, and over those before any reset."""
        return tile.products((self.mine("stage").T, self.constant("lanes")))[0]


def _planes(i: int):
    return pl.ds(i * BLOCK, BLOCK)


def _chunk(place: Callable, steps: int, splits: int, rank: int, refs: list, s: dict, thread) -> None:
    """One chunk of all heads of a block: a warpgroup for q, and one for k and dx."""
    theta_ref, _, B_bias, C_bias = refs[4:8]
    dx_ref, dB_ref, dC_ref, theta_k, theta_q, sums_ref, of_B_bias, of_C_bias, ends_k, ends_q = refs[15:]
    b, _, chunk, rows, group = place(0)
    block = jax.lax.axis_index("block")
    split = jax.lax.rem(block, splits)

    def all_heads(visit, bias_ref, outs):
        side = Side(s, thread, chunk, rank, bias_ref, theta_ref.at[b], outs)
        zero = plgpu.layout_cast(jnp.zeros((Q, BLOCK), jnp.float32), WGMMA)
        totals = [zero, zero], [zero] * (side.planes // BLOCK)
        for j in range(2 * ("rest" in s)):
            side.mine("rest")[j] = zero

        def step(i, totals):
            slot, (_, head, _, _, _) = jax.lax.rem(i, STAGES), place(i)
            plgpu.barrier_wait(s["heads arrived"].at[slot])
            refs = dx_ref.at[b, rows, head], sums_ref.at[b, head, chunk]
            totals = visit(side._replace(slot=slot, head=head), refs, totals)
            plgpu.barrier_arrive(s["heads used"].at[slot])
            plgpu.barrier_arrive(s["states used"].at[0])
            tile.meet(s["over"])
            return totals

        of_keys, of_theta = jax.lax.fori_loop(0, steps, step, totals)
        for i, *places in keys.blocks(s["raw"].shape[-1]):
            for j, at in enumerate(places):
                outs[0][:, at] = tile.load(side.mine("rest").at[j]) if i else of_keys[j]
            if i < len(of_theta):
                outs[1][:, _planes(i)] = of_theta[i]

    plgpu.barrier_wait(s["ready"])

    @pl.when(thread == 0)
    def _():
        outs = dC_ref.at[b, split, rows, group], theta_q.at[b, block, rows]
        all_heads(_queries, C_bias, (*outs, of_C_bias.at[b, :, chunk], ends_q.at[b, :, chunk]))

    @pl.when(thread == 1)
    def _():
        outs = dB_ref.at[b, split, rows, group], theta_k.at[b, block, rows]
        all_heads(_keys, B_bias, (*outs, of_B_bias.at[b, :, chunk], ends_k.at[b, :, chunk]))
        plgpu.wait_smem_to_gmem(0)


def _make(side: Side) -> None:
    """Its key of a head; both are made when it returns."""
    for i, *places in keys.blocks(side.s["raw"].shape[-1]):
        turned, key = side.turn(i) if i < side.planes // BLOCK else None, side.mine("key")
        targets = tuple(key.at[:, at] for at in places)
        bias = side.now("biases").at[keys.anew(side.thread)] if side.rank == 1 else side.bias_ref.at[side.head]
        keys.key(side.mine("raw"), bias, tuple(places), targets, turned)
    plgpu.commit_smem()
    tile.meet(side.s["made"])


def _back(side: Side, i: int, places: list, bars: list, totals: tuple) -> tuple:
    """Turns the cotangents of a block of a key back, into the totals; (totals, what its angles say to their rate)."""
    side = side._replace(head=keys.anew(side.head))
    (of_keys, of_theta), (lo, hi), said = map(list, totals), bars, 0.0
    of_rank = lambda r, x: jnp.where(keys.column_numbers() == r, x, 0).sum(1)  # noqa: E731
    if i < side.planes // BLOCK:
        a, b = (tile.load(side.mine("key").at[:, at]) for at in places)
        keys.split(hi * a - lo * b, side.parts())
        side.outs[3][side.head, i] = of_rank(BLOCK - 1, side.totals())
        since, low = tile.products(*((side.constant("triangles"), part) for part in side.parts()))
        since += low
        said = (side.theta(i) * since).sum(1)
        of_theta[i] += tile.over_columns(tile.load(side.gates().at[RATE], ROWS), BLOCK) * since
        cos, sin = side.turn(i)
        lo, hi = lo * cos + hi * sin, hi * cos - lo * sin
    for j, (part, bar) in enumerate(zip(side.parts(), (lo, hi), strict=True)):
        part[...] = bar.astype(jnp.bfloat16)
        if i:
            side.mine("rest")[j] = tile.load(side.mine("rest").at[j]) + bar
        else:
            of_keys[j] += bar
    plgpu.commit_smem()
    biases = side.totals()
    for r in range(side.rank):
        side.outs[2][side.head, r, i] = of_rank(r, biases)
    return (of_keys, of_theta), said


def _queries(side: Side, refs: tuple, totals: tuple) -> tuple:
    """A head's part in the cotangents of C and, of q's angles, of theta."""
    sums_ref = refs[1]
    _make(side)
    read = said = through = 0.0
    for block in keys.columns(Q):
        of_scores = side.mine("key"), side.other("key").at[block].T
        scores, bar = tile.products(of_scores, (side.now("dy"), side.now("x").at[block].T))
        left, same = keys.pairs(side.gates(), side.rank, block)
        later, bar = keys.later(side.gates(), block), bar * left
        read += jnp.where(same, 0, scores * bar * later).sum(1)
        side.mine("dscores")[:, block] = (bar * jnp.where(same, keys.own(side.gates()), later)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_wait(side.s["states arrived"].at[0])
    since = tile.over_columns(tile.to_here(side.gates().at[SUMS]), BLOCK)
    for i, *places in keys.blocks(side.s["key"].shape[-1]):
        bars = []
        for at in places:
            (bar,) = tile.products((side.now("dy"), side.constant("states").at[at].T))
            bar *= since
            read += (bar * tile.load(side.mine("key").at[:, at])).sum(1)
            bars += tile.accumulate((bar, side.mine("dscores"), side.other("key").at[:, at]))
        totals, more = _back(side, i, places, bars, totals)
        said += more
    sums_ref[READ], sums_ref[TURNED_Q] = read, said
    for at in range(0, side.s["states"].shape[1], Q):
        for block in keys.columns(side.s["states"].shape[2]):
            a, b = (tile.load(side.constant(name).at[pl.ds(at, Q), block]) for name in ("states", "costates"))
            through += (a * b).sum(1)
    sums_ref[THROUGH] = through * tile.through(side.gates().at[SUMS], Q)
    return totals


def _keys(side: Side, refs: tuple, totals: tuple) -> tuple:
    """A head's part in the cotangents of B and, of k's angles, of theta; and its dx. Rows are read by columns here."""
    sums_ref = refs[1]
    _make(side)
    inside = owned = said = 0.0
    for block in keys.columns(Q):
        of_scores = side.mine("key"), side.other("key").at[block].T
        scores, bar = tile.products(of_scores, (side.now("x"), side.now("dy").at[block].T))
        left, same = keys.pairs(side.gates(), side.rank, block, transposed=True)
        both = scores * bar * left
        inside, owned = inside + jnp.where(same, 0, both).sum(1), owned + jnp.where(same, both, 0).sum(1)
        left *= jnp.where(same, keys.own(side.gates()), keys.later(side.gates()))
        side.mine("stage")[:, block] = (scores * left).astype(jnp.bfloat16)
        side.mine("dscores")[:, block] = (bar * left).astype(jnp.bfloat16)
    sums_ref[INSIDE], sums_ref[OWNED] = inside, owned
    plgpu.commit_smem()
    plgpu.barrier_wait(side.s["states arrived"].at[0])
    _inputs(side, refs)
    leaves = tile.to_end(side.gates().at[SUMS]) * tile.load(side.gates().at[STRICT], ROWS)
    for i, *places in keys.blocks(side.s["key"].shape[-1]):
        bars = []
        for at in places:
            (bar,) = tile.products((side.now("x"), side.constant("costates").at[at].T))
            bar *= tile.over_columns(leaves, BLOCK)
            bars += tile.accumulate((bar, side.mine("dscores"), side.other("key").at[:, at]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        totals, more = _back(side, i, places, bars, totals)
        said += more
    sums_ref[TURNED_K] = said
    return totals


def _inputs(side: Side, refs: tuple) -> None:
    """A head's dx, by what reads its lanes, which is in its stage, where dx then leaves from if it fits."""
    (dx_ref, sums_ref), width = refs, side.s["x"].shape[-1]
    to_end, later, dx, said, skipped = tile.to_end(side.gates().at[SUMS]), keys.later(side.gates()), [], 0.0, 0.0
    for block in keys.columns(width):
        (bar,) = tile.products((side.mine("key"), side.constant("costates").at[:, block]))
        bar *= tile.over_columns(to_end, BLOCK)
        said += (tile.load(side.now("x").at[:, block]) * bar).sum(1)
        (bar,) = tile.accumulate((later * bar, side.mine("stage"), side.now("dy").at[:, block]))
        x, dy = (tile.load(side.now(name).at[:, block]) for name in ("x", "dy"))
        skipped += (x * dy).sum(1)
        bar += tile.over_rows(tile.load(side.now("D").at[block], COLUMNS), Q) * dy
        dx.append(bar.astype(jnp.bfloat16))
    sums_ref[BEYOND], sums_ref[SKIPPED] = said, skipped
    out = side.constant("out") if "out" in side.s else side.mine("stage")
    for block, value in zip(keys.columns(width), dx, strict=True):
        out[:, block] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, dx_ref)
