r"""The gradients of Mamba-3 on NVIDIA Hopper GPUs.

As in state space duality, a walk finds the state that enters every chunk and one the other way what every chunk's state
means for the tokens behind it; then all chunks are independent. A pair of warpgroups takes one chunk and goes over the
heads of a group: one makes q and the scores and finds q's cotangent, the other k's and that of x. They turn theirs back
and sum those of B, C and theta in registers: no key of a head reaches memory, nor does its cotangent.
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
READ, OWNED, TURNED, THROUGH, INSIDE, BEYOND, SKIPPED = range(7)  # sums of a chunk
SUMMED = 7


@partial(jax.jit, static_argnames=("rank", "splits"))  # lowered once for all layers
def gradients(
    x, gates, B, C, angles, B_bias, C_bias, theta, D, dy, states, costates, since, lanes, *, rank: int, splits: int
):
    """(dx, dB and dC (b, splits, l, g, n), what angles say to theta (b, blocks, l, s), sums (b, h, c, 7, q), what B's
    and C's biases get (b, h, c, r, m, 64), and the angle before the chunk (b, h, c, s / 32, 64)).

    The sums have, for every lane, what dy says to all it reads of before its token, what it says to what it reads of
    its own, what angles say to its rate, parts of what dy's state says to x's state all the way through the chunk, and
    what x says to all that reads it in the chunk, to all that does beyond, and to dy. theta in turns.
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
        yield refs[4].at[b, rows, head], s["angles"].at[slot]
        yield refs[8].at[head], s["D"].at[slot]
        if rank == 1:
            yield refs[6].at[head], s["biases"].at[slot, 0]
            yield refs[5].at[head], s["biases"].at[slot, 1]

    def of_states(refs, s, step, slot):
        b, head, chunk, _, _ = place(step)
        yield refs[10].at[b, head, chunk], s["states"].at[slot]
        yield refs[11].at[b, head, chunk], s["costates"].at[slot]

    def once(refs, s):
        b, _, chunk, rows, group = place(0)
        yield refs[3].at[b, rows, group], s["raw"].at[0]
        yield refs[2].at[b, rows, group], s["raw"].at[1]
        yield refs[12].at[b, chunk], s["since"].at[0]
        yield refs[13].at[b, chunk], s["lanes"].at[0]
        if planes == BLOCK:
            yield refs[7].at[b, chunk], s["theta"].at[0]

    out = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.float32)  # noqa: E731
    of_group, of_bias = out(splits, length, groups, n), out(heads, chunks, rank, n // Q, Q)
    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype), of_group, of_group, out(blocks, length, planes)
    out_type += out(heads, chunks, SUMMED, Q), of_bias, of_bias, out(heads, chunks, planes // BLOCK, Q)
    grid = dict(block=blocks, chunk=chunks, batch=batch)
    kernel = partial(_chunk, place, steps, splits, rank)
    theta = theta.reshape(batch, chunks, Q, planes)
    arrays = x, gates, B, C, angles, B_bias, C_bias, theta, D, dy, states, costates, since, lanes
    rings = {"heads": (STAGES, 5 + 2 * (rank == 1), copies), "states": (1, 2, of_states)}
    scratch = _scratch(p, n, planes, rank, lanes.shape[2])
    return keys.launch(kernel, rings, (4 + (planes == BLOCK), once), arrays, out_type, scratch, grid, 2, steps)


def _scratch(p: int, n: int, planes: int, rank: int, kinds: int) -> dict:
    apart = ({} if p == Q else {"out": matrix(Q, p, 1)}) | ({} if n == Q else {"rest": keys.exact(2, 2)})
    vectors = lambda *shape: plgpu.SMEM((STAGES, *shape), jnp.float32)  # noqa: E731
    apart |= {"biases": vectors(2, 1, n)} if rank == 1 else {}
    apart |= {"theta": keys.exact(1)} if planes == BLOCK else {}  # there is room for one block
    return apart | {
        **{name: matrix(Q, n, 2) for name in ("raw", "key")},  # of q, and of k
        **{name: matrix(Q, p, STAGES) for name in ("x", "dy")},
        **{name: matrix(n, p, 1) for name in ("states", "costates")},
        "angles": keys.turns(STAGES, width=planes),
        **{name: matrix(Q, Q, 1) for name in ("dscores", "own", "since")},
        "stage": matrix(Q, Q, 2),
        "lanes": matrix(kinds, Q, 1),
        **{"gates": vectors(GATES, Q), "D": vectors(p)},
        **{name: plgpu.Barrier(num_arrivals=2) for name in ("made", "over")},
        **{name: plgpu.Barrier(num_arrivals=1) for name in ("scored", "said", "heard")},
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
    outs: tuple  # refs of the cotangents of B or C, by heads, of its bias; of theta, by heads, of the angle before
    slot: object = None  # of the rings
    head: object = None

    @property
    def turning(self) -> int:
        """Blocks of planes that turn."""
        return self.theta_ref.shape[-1] // BLOCK

    def mine(self, name: str):
        return self.s[name].at[keys.anew(self.thread)]

    def other(self, name: str):
        return self.s[name].at[1 - keys.anew(self.thread)]

    def now(self, name: str):
        return self.s[name].at[keys.anew(self.slot)]

    def gates(self):
        return self.now("gates")

    def constant(self, name: str):
        return self.s[name].at[keys.anew(0)]

    def theta(self, i: int):
        """Of a block of planes."""
        if "theta" in self.s:
            return tile.load(self.constant("theta"))
        return tile.load(self.theta_ref.at[keys.anew(self.chunk), :, _planes(i)], shared=False)

    def turn(self, i: int) -> tuple:
        """(cos, sin) of a block of planes."""
        return keys.turn(self.now("angles").at[:, _planes(i)])

    def totals(self, *staged) -> Callable:
        """Of every column of what is staged: over the lanes of each rank, and over those before any reset."""
        (totals,) = keys.chains([(stage.T, self.constant("lanes").T) for stage in staged])
        kinds = keys.column_numbers(totals.shape[1])
        return lambda kind: jnp.where(kinds == kind, totals, 0).sum(1)


def _planes(i: int):
    return pl.ds(i * BLOCK, BLOCK)


def _halves(stage) -> tuple:
    return stage.at[:, pl.ds(0, BLOCK)], stage.at[:, pl.ds(BLOCK, BLOCK)]


def _zero():
    return plgpu.layout_cast(jnp.zeros((Q, BLOCK), jnp.float32), WGMMA)


def _chunk(place: Callable, steps: int, splits: int, rank: int, refs: list, s: dict, thread) -> None:
    """One chunk of all heads of a block: a warpgroup for q, and one for k and dx."""
    B_bias, C_bias, theta_ref = refs[5:8]
    dx_ref, dB_ref, dC_ref, dtheta, sums_ref, of_B_bias, of_C_bias, ends = refs[14:]
    b, _, chunk, rows, group = place(0)
    block = jax.lax.axis_index("block")
    split = jax.lax.rem(block, splits)

    def all_heads(visit, bias_ref, outs):
        side = Side(s, thread, chunk, rank, bias_ref, theta_ref.at[b], outs)
        totals = [_zero(), _zero()], [_zero()] * (side.turning * (len(outs) > 2))
        for j in range(2 * ("rest" in s)):
            side.mine("rest")[j] = _zero()

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
        for i, total in enumerate(of_theta):
            outs[2][:, _planes(i)] = total

    plgpu.barrier_wait(s["ready"])

    @pl.when(thread == 0)
    def _():
        outs = dC_ref.at[b, split, rows, group], of_C_bias.at[b, :, chunk]
        all_heads(_queries, C_bias, (*outs, dtheta.at[b, block, rows], ends.at[b, :, chunk]))

    @pl.when(thread == 1)
    def _():
        all_heads(_keys, B_bias, (dB_ref.at[b, split, rows, group], of_B_bias.at[b, :, chunk]))
        plgpu.wait_smem_to_gmem(0)


def _make(side: Side) -> None:
    """Its key of a head; both are made when it returns."""
    for i, *places in keys.blocks(side.s["raw"].shape[-1]):
        turned, key = side.turn(i) if i < side.turning else None, side.mine("key")
        targets = tuple(key.at[:, at] for at in places)
        bias = side.now("biases").at[keys.anew(side.thread)] if side.rank == 1 else side.bias_ref.at[side.head]
        keys.key(side.mine("raw"), bias, tuple(places), targets, turned)
    plgpu.commit_smem()
    tile.meet(side.s["made"])


def _to_angles(side: Side, places: list, bars: list, stage) -> None:
    """What the cotangents of a block of a key say to its angles, as a sum of two bfloat16."""
    (lo, hi), (a, b) = bars, (tile.load(side.mine("key").at[:, at]) for at in places)
    keys.split(hi * a - lo * b, _halves(stage))


def _back(side: Side, i: int, bars: list, of_keys: list) -> list:
    """Turns the cotangents of a block of a key back, and adds them to those of the heads before."""
    side, (lo, hi), of_keys = side._replace(head=keys.anew(side.head)), bars, list(of_keys)
    if i < side.turning:
        cos, sin = side.turn(i)
        lo, hi = lo * cos + hi * sin, hi * cos - lo * sin
    for j, (part, bar) in enumerate(zip(_halves(side.mine("stage")), (lo, hi), strict=True)):
        part[...] = bar.astype(jnp.bfloat16)
        if i:
            side.mine("rest")[j] = tile.load(side.mine("rest").at[j]) + bar
        else:
            of_keys[j] += bar
    plgpu.commit_smem()
    total = side.totals(side.mine("stage"))
    for r in range(side.rank):
        side.outs[1][side.head, r, i] = total(r)
    return of_keys


def _queries(side: Side, refs: tuple, totals: tuple) -> tuple:
    """A head's part in the cotangents of C and theta."""
    (of_keys, of_theta), sums_ref = totals, refs[1]
    of_theta, said, parts = list(of_theta), 0.0, list(keys.blocks(side.s["key"].shape[-1]))
    _make(side)
    read = _scores(side, sums_ref)
    plgpu.barrier_wait(side.s["states arrived"].at[0])
    for i, *places in parts[side.turning :] + parts[: side.turning]:  # k's angles have spoken by then
        since, bars = tile.over_columns(tile.to_here(side.gates().at[SUMS]), BLOCK), []
        for at in places:
            (bar,) = tile.products((side.now("dy"), side.constant("states").at[at].T))
            bar *= since
            read += bar * tile.load(side.mine("key").at[:, at])
            bars += tile.accumulate((bar, side.constant("dscores"), side.other("key").at[:, at]))
        if i < side.turning:
            _to_angles(side, places, bars, side.mine("stage"))
            of_theta[i], more = _angles(side, i, of_theta[i])
            said += more
        of_keys = _back(side, i, bars, of_keys)
    sums_ref[READ], sums_ref[TURNED] = read.sum(1), said
    return of_keys, of_theta


def _scores(side: Side, sums_ref):
    """Leaves what k and x need of the scores; (q, BLOCK) parts of what dy says to what it reads in the chunk."""
    read = owned = 0.0
    for block in keys.columns(Q):
        of_scores = side.mine("key"), side.other("key").at[block].T
        scores, bar = tile.products(of_scores, (side.now("dy"), side.now("x").at[block].T))
        left, same = keys.pairs(side.gates(), side.rank, block)
        later, own = keys.later(side.gates(), block), keys.own(side.gates())
        mine, scores = jnp.where(same, scores * left, 0), jnp.where(same, 0, scores * left)
        owned += mine * bar
        # rounded as products with it are, beyond any simplification: almost all of `read` is to cancel in a log decay
        scores = jax.lax.optimization_barrier(scores.astype(jnp.bfloat16))
        side.other("stage")[:, block] = scores
        side.constant("own")[:, block] = (mine * own).astype(jnp.bfloat16)
        read += scores.astype(jnp.float32) * (bar * later)
        side.constant("dscores")[:, block] = (bar * left * jnp.where(same, own, later)).astype(jnp.bfloat16)
    sums_ref[OWNED] = owned.sum(1)
    plgpu.commit_smem()
    plgpu.barrier_arrive(side.s["scored"])
    return read


def _angles(side: Side, i: int, of_theta) -> tuple:
    """What the angles of a block of planes, of q and of k, say to theta, and to its rate; and to the angle before."""
    plgpu.barrier_wait(side.s["said"])
    stages = side.mine("stage"), side.constant("own")
    side.outs[3][side.head, i] = side.totals(*stages)(side.s["lanes"].shape[1] - 1)
    (since,) = keys.chains([(side.constant("since"), half) for stage in stages for half in _halves(stage)])
    if i + 1 < side.turning:
        plgpu.barrier_arrive(side.s["heard"])
    of_theta += tile.over_columns(tile.load(side.gates().at[RATE], ROWS), BLOCK) * since
    return of_theta, (side.theta(i) * since).sum(1)


def _keys(side: Side, refs: tuple, totals: tuple) -> tuple:
    """A head's part in the cotangent of B; and its dx."""
    of_keys, through = totals[0], _zero()
    _make(side)
    plgpu.barrier_wait(side.s["states arrived"].at[0])
    for at in range(0, side.s["states"].shape[1], Q):
        for block in keys.columns(side.s["states"].shape[2]):
            a, b = (tile.load(side.constant(name).at[pl.ds(at, Q), block]) for name in ("states", "costates"))
            through += a * b
    refs[1][THROUGH] = through.sum(1) * tile.through(side.gates().at[SUMS], Q)
    _inputs(side, refs)
    for i, *places in keys.blocks(side.s["key"].shape[-1]):
        leaves, bars = tile.to_end(side.gates().at[SUMS]) * tile.load(side.gates().at[STRICT], ROWS), []
        for at in places:
            (bar,) = tile.products((side.now("x"), side.constant("costates").at[at].T))
            bar *= tile.over_columns(leaves, BLOCK)
            bars += tile.accumulate((bar, side.constant("dscores").T, side.other("key").at[:, at]))
        if i < side.turning:
            if i:
                plgpu.barrier_wait(side.s["heard"])
            _to_angles(side, places, bars, side.constant("own"))
            plgpu.barrier_arrive(side.s["said"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        of_keys = _back(side, i, bars, of_keys)
    return of_keys, []


def _inputs(side: Side, refs: tuple) -> None:
    """A head's dx, by what reads its lanes; it leaves from where the scores were, if it fits."""
    (dx_ref, sums_ref), blocks = refs, keys.columns(side.s["x"].shape[-1])
    to_end, dx, inside, beyond, skipped = tile.to_end(side.gates().at[SUMS]), [], 0.0, 0.0, 0.0
    for block in blocks:
        (bar,) = tile.products((side.mine("key"), side.constant("costates").at[:, block]))
        bar *= tile.over_columns(to_end, BLOCK)
        beyond += tile.load(side.now("x").at[:, block]) * bar
        dx.append(bar)
    sums_ref[BEYOND] = beyond.sum(1)
    plgpu.barrier_wait(side.s["scored"])
    for j, block in enumerate(blocks):
        (bar,) = tile.products((side.mine("stage").T, side.now("dy").at[:, block]))
        x, dy = (tile.load(side.now(name).at[:, block]) for name in ("x", "dy"))
        inside, skipped = inside + x * bar, skipped + x * dy
        bar = keys.later(side.gates()) * (dx[j] + bar)
        bar += tile.over_rows(tile.load(side.now("D").at[block], COLUMNS), Q) * dy
        (bar,) = tile.accumulate((bar, side.constant("own").T, side.now("dy").at[:, block]))
        dx[j] = bar.astype(jnp.bfloat16)
    sums_ref[INSIDE], sums_ref[SKIPPED] = inside.sum(1), skipped.sum(1)
    plgpu.commit_smem()  # all have read
    out = side.constant("out") if "out" in side.s else side.mine("stage")
    for block, value in zip(blocks, dx, strict=True):
        out[:, block] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, dx_ref)
