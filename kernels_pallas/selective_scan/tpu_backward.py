r"""The gradients of the recurrence on TPUs: one walk from the last tile to the first.

With $\bar y_t$ the cotangent of what is read of the states, $g_t = C_t \bar y_t + e^{dt_{t+1} A} g_{t+1}$ is that of
$h_t$. The states of a tile are made again from those before it, and stay in VMEM until the walk back has used them.
The sums over channels, of $\bar C_t = \sum_d h_t \bar y_t$ and $\bar B_t = \sum_d g_t dt_t x_t$, are kept as one row a
token and state until a chunk is done, and then taken over its sublanes and lanes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.selective_scan import tpu_tiles as tiles
from kernels_pallas.selective_scan.fused import LOG_2_E
from kernels_pallas.selective_scan.tpu_forward import Inputs, advance, decay, drive
from kernels_pallas.selective_scan.tpu_tiles import AT_ONCE, CHUNK, LANES, PITCH, SUBLANES, TILE, Walk

PARTS = SUBLANES * SUBLANES  # rows of a group's sums over tokens
G = 0  # a block has one group


@partial(jax.jit, static_argnums=(4,))
def backward(inputs: Inputs, saved: jax.Array, dy: jax.Array, d_last: jax.Array, softplus: bool) -> dict:
    """The cotangents of all inputs, by name, and "h", that of the state before the first token.

    saved: the states before every tile. d_last: (b, groups, slices, states, 8, 128), of the state after the last token.
    A's, D's and dt_bias's are parts, one for every batch row, as B's and C's are for every group of channels.
    """
    walk = Walk.of(inputs.x, inputs.A, 1, 1, backwards=True)
    given = inputs.kinds() | {"dy": ("tokens", dy), "saved": ("states", saved), "d last": ("state", d_last)}
    outputs = {f"d {name}": ("tokens", given[name][1]) for name in ("x", "dt", "z") if name in given}
    outputs |= {"d h": ("state", d_last), "d A": ("state", d_last)}
    of_chunk = TILE // CHUNK, SUBLANES, CHUNK * walk.states // SUBLANES
    of_tokens = tiles.float32(walk.batch, walk.groups, walk.tiles, walk.slices, *of_chunk)
    of_channels = tiles.float32(walk.batch, walk.groups, PARTS, LANES)
    outputs |= {f"d {name}": ("of tokens", of_tokens) for name in "BC"}
    outputs |= {f"d {name}": ("of channels", of_channels) for name in ("D", "dt_bias")}
    scratch = {f"{name} rows": tiles.rows(TILE, 1) for name in ("dt", "u", "y", "dy", "d u", "d exponent")}
    scratch |= {f"{name} columns": tiles.columns(TILE, getattr(inputs, name).shape[3]) for name in "BC"}
    scratch |= {f"d {name} rows": tiles.rows(CHUNK * walk.states) for name in "BC"}
    scratch |= {"states": pltpu.VMEM((TILE + 1, walk.states, SUBLANES, LANES), jnp.float32)}
    scratch |= {"state": pltpu.VMEM((walk.states, SUBLANES, LANES), jnp.float32)}

    def kernel(step, part, refs):
        @pl.when((step == 0) & (part == 0))
        def _():
            refs["d h"][...] = refs["d last"][...]
            for name in ("d A", "d D", "d dt_bias"):
                refs[name][...] = jnp.zeros(refs[name].shape, jnp.float32)

        refs["states"][0] = refs["state"][...] = refs["saved"][0, G]

        def again(i, _):
            first = pl.multiple_of(i * CHUNK, CHUNK)
            tiles.spread(refs, first, first)
            drive(refs, G, first, first, softplus)
            kept = refs["states"].at[pl.ds(first + 1, CHUNK)]
            advance(refs, walk, G, part, first, refs["state"], first if "z" in refs else None, kept)
            ungate(refs, first)

        def back(i, _):
            first = pl.multiple_of(TILE - (i + 1) * CHUNK, CHUNK)
            send_back(refs, walk, part, first)
            add_up(refs, TILE // CHUNK - 1 - i)
            leave(refs, part == walk.slices - 1, first, softplus)

        jax.lax.fori_loop(0, TILE // CHUNK, again, None)
        jax.lax.fori_loop(0, TILE // CHUNK, back, None)

    out = walk.launch(kernel, given, outputs, scratch)
    return dict(zip((name.removeprefix("d ") for name in outputs), out, strict=True))


def ungate(refs: dict, first) -> None:
    """The cotangents of y before its gate, and that of the gate, of a chunk."""
    tokens = pl.ds(first, CHUNK)
    for s, channels in tiles.sublanes(G):
        dy = refs["dy"][tokens, channels].astype(jnp.float32)
        if "z" in refs:
            z, x = (refs[name][tokens, channels].astype(jnp.float32) for name in "zx")
            y = refs["y rows"].at[G][tiles.spaced(first, s)] + refs["D"][:, channels] * x
            gate = tiles.sigmoid(z)
            refs["d z"][tokens, channels] = (dy * y * gate * (1 + z * (1 - gate))).astype(refs["d z"].dtype)
            dy *= z * gate
        refs["dy rows"].at[G][tiles.spaced(first, s)] = dy


def send_back(refs: dict, walk: Walk, part, first) -> None:
    """Takes the cotangents of the state across a chunk."""
    n_range, B, C = range(walk.states), refs["B columns"], refs["C columns"]
    g_ref, d_A_ref = (refs[name].at[G, part] for name in ("d h", "d A"))

    def some(k, carry):
        g, d_A = map(list, carry)
        for t in (CHUNK - 1 - k * AT_ONCE - j for j in range(AT_ONCE)):
            dt, u, dy = (refs[f"{name} rows"][G, tiles.row(first, t)] for name in ("dt", "u", "dy"))
            d_u = d_exponent = 0.0
            for n in n_range:
                g[n] += tiles.everywhere(C, n, first + t) * dy
                at = tiles.row(t * walk.states, n)
                refs["d B rows"][at], refs["d C rows"][at] = g[n] * u, refs["states"][first + t + 1, n] * dy
                d_u += g[n] * tiles.everywhere(B, n, first + t)
                g[n] *= decay(refs, walk, G, n, first + t, dt)
                sent = g[n] * refs["states"][first + t, n]
                d_exponent += sent * refs["A"][G, n]
                d_A[n] += sent * dt
            for name, value in (("d u", d_u), ("d exponent", d_exponent)):
                walk.add(part, refs[f"{name} rows"].at[G, tiles.row(first, t)], value)
        return tuple(g), tuple(d_A)

    carry = tuple(tuple(ref[n] for n in n_range) for ref in (g_ref, d_A_ref))
    for ref, values in zip((g_ref, d_A_ref), jax.lax.fori_loop(0, CHUNK // AT_ONCE, some, carry), strict=True):
        for n in n_range:
            ref[n] = values[n]


def add_up(refs: dict, chunk) -> None:
    """The sums over channels for B and C, of every token and state of a chunk: eight in the sublanes of every lane."""
    for name in "BC":
        parts, target = refs[f"d {name} rows"], refs[f"d {name}"]
        total, lane = jnp.zeros(target.shape[1:], jnp.float32), jax.lax.broadcasted_iota(jnp.int32, target.shape[1:], 1)
        for i in range(target.shape[2]):
            at = i * SUBLANES * PITCH
            over_sublanes = sum(parts[pl.ds(at + s, SUBLANES, stride=PITCH)] for s in range(SUBLANES))
            total = jnp.where(lane == i, jnp.sum(over_sublanes, 1, keepdims=True), total)
        target[chunk] = total


def leave(refs: dict, complete, first, softplus: bool) -> None:
    """The cotangents of x and dt of a chunk; those of D and dt_bias where it is complete, of all slices."""
    tokens = pl.ds(first, CHUNK)
    for s, channels in tiles.sublanes(G):
        names = "dt", "dy", "d u", "d exponent"
        dt, dy, d_u, d_exponent = (refs[f"{name} rows"].at[G][tiles.spaced(first, s)] for name in names)
        x, D = refs["x"][tokens, channels].astype(jnp.float32), refs["D"][:, channels]
        d_dt = d_exponent / LOG_2_E + d_u * x
        if softplus:
            d_dt *= jax.nn.sigmoid(refs["dt"][tokens, channels].astype(jnp.float32) + refs["dt_bias"][:, channels])
        refs["d x"][tokens, channels] = (d_u * dt + D * dy).astype(refs["d x"].dtype)
        refs["d dt"][tokens, channels] = d_dt.astype(refs["d dt"].dtype)
        for name, value in (("d D", dy * x), ("d dt_bias", d_dt)):
            at = pl.ds(s * SUBLANES, SUBLANES)
            refs[name][G, at] += jnp.where(complete, value.reshape(-1, SUBLANES, LANES).sum(0), 0.0)
