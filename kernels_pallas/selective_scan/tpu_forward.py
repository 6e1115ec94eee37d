"""The walk from the first token to the last on TPUs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.selective_scan import fused
from kernels_pallas.selective_scan import tpu_tiles as tiles
from kernels_pallas.selective_scan.tpu_tiles import AT_ONCE, CHUNK, TILE, Walk

GROUPS, TILES = 2, 2  # in a block, at most: groups share the numbers that are spread


class Inputs(NamedTuple):
    """Arrays as the kernels take them, in whole tiles and groups; all but x, dt and z in float32."""

    x: jax.Array  # (b, l, d)
    dt: jax.Array
    A: jax.Array  # (groups, slices, states, 8, 128), times log2 e
    B: jax.Array  # (slices, b, l, states), and last 0, or -inf at tokens that forget, where any do
    C: jax.Array
    D: jax.Array  # (1, d)
    dt_bias: jax.Array
    z: jax.Array | None = None

    def kinds(self) -> dict:
        """The kind of every array's blocks, and it."""
        kinds = dict(x="tokens", dt="tokens", A="A", B="by states", C="by states", D="channels", dt_bias="channels")
        kinds |= {} if self.z is None else {"z": "tokens"}
        return {name: (kind, getattr(self, name)) for name, kind in kinds.items()}


@partial(jax.jit, static_argnums=(2, 3))
def forward(inputs: Inputs, h: jax.Array, softplus: bool, save: bool) -> tuple[jax.Array, ...]:
    """y, the state after the last token, and the states before every tile where they are to be saved.

    h: (b, groups, slices, states, 8, 128), the state before the first.
    """
    walk = Walk.of(inputs.x, inputs.A, GROUPS, TILES, backwards=False)
    groups, given = range(walk.block_groups), inputs.kinds() | {"h": ("state", h)}
    outputs = {"y": ("tokens", inputs.x), "last": ("state", h)}
    outputs |= {"states": ("states", tiles.float32(walk.batch, walk.tiles, *h.shape[1:]))} if save else {}
    scratch = {name: tiles.rows(CHUNK, walk.block_groups) for name in ("dt rows", "u rows")}
    scratch |= {"y rows": tiles.rows(TILE * walk.block_tiles, walk.block_groups)}
    scratch |= {f"{name} columns": tiles.columns(CHUNK, getattr(inputs, name).shape[3]) for name in "BC"}

    def kernel(step, part, refs):
        @pl.when((step == 0) & (part == 0))
        def _():
            refs["last"][...] = refs["h"][...]

        def tile(k, _):
            for g in groups if save else ():
                refs["states"][k, g] = refs["last"][g, part]

            def chunk(i, _):
                first = pl.multiple_of(k * TILE + i * CHUNK, CHUNK)
                tiles.spread(refs, first, 0)
                for g in groups:
                    drive(refs, g, first, 0, softplus)
                for g in groups:
                    advance(refs, walk, g, part, 0, refs["last"].at[g, part], first)
                for g in groups:
                    leave(refs, g, first)

            jax.lax.fori_loop(0, TILE // CHUNK, chunk, None)

        jax.lax.fori_loop(0, walk.block_tiles, tile, None)

    return walk.launch(kernel, given, outputs, scratch)


def drive(refs: dict, g: int, first, at, softplus: bool) -> None:
    """The rows of dt and of u = dt x, from `at` on, of the chunk that begins with the block's token `first`."""
    tokens = pl.ds(first, CHUNK)
    for s, channels in tiles.sublanes(g):
        dt = refs["dt"][tokens, channels].astype(jnp.float32) + refs["dt_bias"][:, channels]
        dt = fused.softplus(dt) if softplus else dt
        refs["dt rows"].at[g][tiles.spaced(at, s)] = dt
        refs["u rows"].at[g][tiles.spaced(at, s)] = dt * refs["x"][tokens, channels].astype(jnp.float32)


def advance(refs: dict, walk: Walk, g: int, part, at, state, first=None, kept=None) -> None:
    """Takes the state across a chunk; with `first`, what its tokens read of it to the rows of y from there on.

    at: where the chunk's rows of dt and u and its columns begin. kept: room for the states after each of its tokens.
    """
    n_range, B, C = range(walk.states), refs["B columns"], refs["C columns"]

    def some(k, h):
        h = list(h)
        for t in (k * AT_ONCE + j for j in range(AT_ONCE)):
            dt, u, y = refs["dt rows"][g, tiles.row(at, t)], refs["u rows"][g, tiles.row(at, t)], 0.0
            for n in n_range:
                h[n] = decay(refs, walk, g, n, at + t, dt) * h[n] + u * tiles.everywhere(B, n, at + t)
                if first is not None:
                    y += tiles.everywhere(C, n, at + t) * h[n]
                if kept is not None:
                    kept[t, n] = h[n]
            if first is not None:
                walk.add(part, refs["y rows"].at[g, tiles.row(first, t)], y)
        return tuple(h)

    h = jax.lax.fori_loop(0, CHUNK // AT_ONCE, some, tuple(state[n] for n in n_range))
    for n in n_range:
        state[n] = h[n]


def decay(refs: dict, walk: Walk, g: int, n: int, t, dt: jax.Array) -> jax.Array:
    """e^{dt A}, or 0."""
    exponent, columns = dt * refs["A"][g, n], refs["B columns"]
    forgets = columns.shape[0] > walk.states
    return jnp.exp2(exponent + tiles.everywhere(columns, walk.states, t) if forgets else exponent)


def leave(refs: dict, g: int, first) -> None:
    """y of a chunk."""
    tokens = pl.ds(first, CHUNK)
    for s, channels in tiles.sublanes(g):
        y = refs["y rows"].at[g][tiles.spaced(first, s)]
        y += refs["D"][:, channels] * refs["x"][tokens, channels].astype(jnp.float32)
        if "z" in refs:
            z = refs["z"][tokens, channels].astype(jnp.float32)
            y *= z * tiles.sigmoid(z)
        refs["y"][tokens, channels] = y.astype(refs["y"].dtype)
