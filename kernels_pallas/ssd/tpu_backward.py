r"""The gradients of state space duality on TPUs: one walk over the spans of chunks, from the last to the first.

Of a span, whose first state the forward pass kept, the state that enters every chunk is found anew; then the chunks
are taken from the last to the first, with the costate in VMEM: what a state means for the rows behind it. A log decay
scales all that crosses it. Its cotangent is what rows from it to the end of the chunk read, less what is read of them,
and what crosses the end of the chunk from within or before it. What is read and what is read of a row are sums over the
same products of the same rounded numbers: of what the two find, almost all is to cancel.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.partition import over_batch
from kernels_pallas.ssd.tpu_tiles import LANES, Q, dot
from kernels_pallas.ssd.tpu_walk import LEAST, SUBLANES, Walk, chunk, clipped, flat, like

AT_ONCE = 8, 8  # tiles whose latencies overlap, at most: on the way to the states, and back
WHOLE = slice(None)


def cotangents(x, a, dt, B, C, D, z, states, dy, d_last, rank: int) -> tuple:
    """The cotangents of x, a, dt, B, C, D, the first state and z; arguments as in `tpu._fused`."""
    walk = Walk.of(x, B, z, rank)
    skip = jnp.broadcast_to(D.reshape(D.shape[0], -1), x.shape[2:])
    arrays = [x, walk.gates(a, dt), B, C, skip, dy, states, d_last] + [z] * (z is not None)
    axes = "b l h p, b k c i q, b l g n, b l g n, h p, b l h p, b s n d, b n h p" + ", b l h p" * (z is not None)
    results = "b l h p, b k c o q, b f l g n, b f l g n, b e h p, b n h p" + ", b l h p" * (z is not None)
    run = lambda *arrays: gradients(*arrays, rank=rank)  # noqa: E731
    dx, sums, dB, dC, dD, dh, *dz = over_batch(run, axes, results)(*arrays)
    da, ddt = _of_gates(walk, sums)
    da = jnp.where(clipped(a) > LEAST, da, 0)
    dB, dC = (v.sum(1).astype(B.dtype) for v in (dB, dC))
    return dx, da, ddt, dB, dC, dD.sum((0, 1) if D.ndim == 2 else (0, 1, 3)), dh, *(dz or [None])


def _of_gates(walk: Walk, sums: jax.Array) -> tuple:
    """The cotangents of log decays and of dt (b, l, h), from the sums of `gradients`."""
    (batch, blocks, count, *_), heads = sums.shape, walk.heads
    beyond = sums[:, :, :, 2 * heads :].reshape(batch, blocks, count, heads, walk.tile.p).sum(-1)
    since = np.triu(np.ones((Q, Q), np.float32))
    da = jnp.einsum("tq,bkchq->bkcht", since, sums[:, :, :, :heads], precision="highest") + beyond[..., None]
    rows = lambda v: jnp.transpose(v, (0, 2, 4, 1, 3)).reshape(batch, count * Q, blocks * heads)  # noqa: E731
    return rows(da), rows(sums[:, :, :, heads : 2 * heads])


@partial(jax.jit, static_argnames="rank")  # lowered once for all layers
def gradients(x, gates, B, C, D, dy, states, d_last, z=None, *, rank: int) -> tuple:
    """(dx, sums, dB and dC (b, shares, l, g, n), dD (b, 8, h, p), the cotangent of the first state[, dz]).

    The sums (b, blocks, c, 2 heads + tiles, q) have for every row of a head what it reads less what is read of it, and
    what x says to the cotangent of dt x; for every lane of a tile what crosses the end of the chunk. Arguments as in
    `tpu.forward`, and the states that it kept.
    """
    walk = Walk.of(x, B, z, rank)._replace(reverse=True)

    def kernel(r):
        @pl.when(pl.program_id(2) == 0)
        def _():
            r.dh[...] = r.d_last[...]
            r.dD[...] = jnp.zeros(r.dD.shape, jnp.float32)

        def keep(c, _):
            walk.visit(partial(_keep, walk, r, c), AT_ONCE[0])

        def visit(i, _):
            c = walk.chunks - 1 - i
            walk.tile.score(r.scores, r.B[chunk(c)], r.C[chunk(c)])
            r.queries[...] = r.C[chunk(c)].T
            r.d_scores[...] = jnp.zeros(r.d_scores.shape, jnp.float32)
            walk.visit(partial(_tile, walk, r, c), AT_ONCE[1])
            _keys_and_queries(walk, r, c)

        walk.enter(r)
        r.kept[0] = r.states[...]
        r.state[...] = r.states[...].astype(jnp.float32)
        jax.lax.fori_loop(0, walk.chunks - 1, keep, None)
        jax.lax.fori_loop(0, walk.chunks, visit, None)

    inputs = dict(x=("rows", flat(x)), gates=("gates", gates), B=("group", flat(B)), C=("group", flat(C)))
    inputs |= dict(D=("head", flat(D)[None]), dy=("rows", flat(dy)), states=("states", states))
    inputs |= dict(d_last=("state", flat(d_last))) | ({} if z is None else dict(z=("rows", flat(z))))
    (batch, _, heads, p), float32 = x.shape, partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    share = "share", float32((batch, walk.shares, *flat(B).shape[1:]))
    sums = float32((*gates.shape[:3], 2 * walk.heads + walk.tiles, Q))
    outputs = dict(dx=("rows", like(flat(x))), sums=("gates", sums), dB=share, dC=share)
    outputs |= dict(dD=("sum", float32((batch, SUBLANES, heads * p))), dh=("state", like(flat(d_last))))
    outputs |= {} if z is None else dict(dz=("rows", like(flat(z))))
    dx, sums, dB, dC, dD, dh, *dz = walk.launch(kernel, inputs, outputs, _scratch(walk, x.dtype)).values()
    dB, dC = (v.reshape(*v.shape[:3], *B.shape[2:]) for v in (dB, dC))
    dD, dh = (v.reshape(*v.shape[:2], heads, p) for v in (dD, dh))
    return dx.reshape(x.shape), sums, dB, dC, dD, dh, *(v.reshape(x.shape) for v in dz)


def _scratch(walk: Walk, dtype: jnp.dtype) -> dict:
    """Besides a chunk's: the states of a span, and of a chunk what both sides of all that it says to others are."""
    made = walk.scratch(dtype)
    width = walk.tiles * LANES
    return made | dict(
        queries=pltpu.VMEM((walk.tile.groups * walk.tile.n, Q), dtype),
        d_scores=made["scores"],
        kept=pltpu.VMEM((walk.chunks, walk.tile.n, width), dtype),
        state=pltpu.VMEM((walk.tile.n, width), jnp.float32),
        costate=pltpu.VMEM((walk.tile.n, width), dtype),
        **{name: pltpu.VMEM((Q, width), dtype) for name in ("written", "asked")},
    )


def _keep(walk: Walk, r: SimpleNamespace, c, t):
    """The state of a tile that leaves a chunk, and enters the next."""
    lanes, gate = chunk(t), walk.load(r, c, t)
    weighted = (r.x[chunk(c), lanes].astype(jnp.float32) * gate.weight).astype(r.x.dtype)
    state = walk.tile.write(r.keys.at[c], gate, r.state[:, lanes], weighted)
    yield r.state, (WHOLE, lanes), state
    yield r.kept, (c + 1, WHOLE, lanes), state


def _tile(walk: Walk, r: SimpleNamespace, c, t):
    """The gradients of a tile's rows, and its costate before them."""
    rows, lanes, of_type = chunk(c), chunk(t), r.x.dtype
    gate, x, skip = walk.load(r, c, t), r.x[rows, lanes].astype(jnp.float32), r.D[:, lanes]
    state, costate = r.kept[c, :, lanes], r.dh[:, lanes]
    to_here, to_end, rounded = gate.to_here, gate.to_end, costate.astype(of_type)
    scaled = (x * gate.dt).astype(of_type)
    exact, read = scaled.astype(jnp.float32), walk.tile.read(r.C[rows], state) * to_here
    dy = r.dy[rows, lanes]
    if hasattr(r, "z"):
        y = walk.tile.inside(r.scores, gate, scaled) + read + skip * x
        dy, dz = _gated(dy.astype(jnp.float32), y, r.z[rows, lanes].astype(jnp.float32))
        dy = dy.astype(of_type)
        yield r.dz, (rows, lanes), dz
    dy_exact = dy.astype(jnp.float32)
    beyond = walk.tile.read(r.B[rows], rounded) * to_end
    inside, paired = [], [0.0] * walk.tile.together
    for j, block, below in walk.tile.blocks():
        decay = gate.decay(j)
        weight = (r.scores[j, below] * decay).astype(of_type)
        d_weight = dot(dy[below], walk.tile.apart(scaled[block]), (1, 1))
        inside.append(walk.tile.joined(dot(weight, dy[below], (0, 0))))
        pairs = weight.astype(jnp.float32) * d_weight
        for i in range(j, walk.tile.together):
            paired[i] += pairs[(i - j) * walk.tile.p : (i - j + 1) * walk.tile.p]
        yield r.d_scores, (j, below), d_weight * decay, True
    d_scaled = beyond + jnp.concatenate(inside)
    balance = dy_exact * read + jnp.concatenate(paired) - exact * d_scaled
    asked = (dy_exact * to_here).astype(of_type)
    crossing = (exact * beyond).sum(0, keepdims=True)
    crossing += (costate * state.astype(jnp.float32)).sum(0, keepdims=True) * gate.through
    yield r.dx, (rows, lanes), gate.dt * d_scaled + skip * dy_exact
    yield r.dD, (WHOLE, lanes), (x * dy_exact).reshape(-1, SUBLANES, LANES).sum(0), True
    yield r.dh, (WHOLE, lanes), walk.tile.write(r.queries, gate, costate, asked)
    yield r.costate, (WHOLE, lanes), rounded
    yield r.asked, (WHOLE, lanes), asked
    yield r.written, (WHOLE, lanes), exact * to_end
    heads = lambda i: pl.ds(i * walk.heads + t * walk.tile.together, walk.tile.together)  # noqa: E731
    yield r.sums, (c, heads(0)), walk.tile.of_heads(balance)
    yield r.sums, (c, heads(1)), walk.tile.of_heads(x * d_scaled)
    yield r.sums, (c, pl.ds(2 * walk.heads + t, 1)), crossing


def _gated(dy: jax.Array, y: jax.Array, z: jax.Array) -> tuple:
    """The cotangents of y and z of y silu(z)."""
    sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * z)
    return dy * z * sigmoid, dy * y * sigmoid * (1 + z * (1 - sigmoid))


def _keys_and_queries(walk: Walk, r: SimpleNamespace, c) -> None:
    """The cotangents of a chunk's B and C, of all tiles of a block."""
    rows = chunk(c)
    B, C = r.B[rows], r.C[rows]
    d_scores = [walk.tile.seen(r.d_scores[j, below]).astype(B.dtype) for j, _, below in walk.tile.blocks()]
    for g in range(walk.tile.groups):
        n = slice(g * walk.tile.n, (g + 1) * walk.tile.n)
        dB, dC = (
            dot(walk.tile.own(g, weighted[...]), states, (1, 1))
            for weighted, states in ((r.written, r.costate[...]), (r.asked, r.kept[c]))
        )
        dB, dC = ([v[block] for _, block, _ in walk.tile.blocks()] for v in (dB, dC))
        for j, block, below in walk.tile.blocks():
            own = walk.tile.own(g, d_scores[j])
            for k, part in enumerate(jnp.split(dot(own, walk.tile.copies(B[block, n])), walk.tile.together - j)):
                dC[j + k] += part
            dB[j] += sum(jnp.split(dot(own, C[below, n], (0, 0)), walk.tile.together))
        r.dB[rows, n], r.dC[rows, n] = jnp.concatenate(dB), jnp.concatenate(dC)
