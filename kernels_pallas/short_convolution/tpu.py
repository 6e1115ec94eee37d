r"""A short causal convolution on TPUs, and all its gradients: tokens in sublanes, channels in lanes.

Tiles of tokens are streamed through VMEM, each with the few tokens before it. The backward pass takes the tiles and
their tokens from the last to the first and makes the values before the activation again: with $g_t$ the cotangent of
one, what token t sends to the inputs before it waits for them in VMEM, and the gradients of the taps and the bias are
summed over all tiles. Under shard_map both need check_vma=False.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
FORWARD, BACKWARD = 128, 32  # tokens at a time: what they need at once goes into registers
WIDTH = 256  # channels at a time, at most
BLOCK_BYTES = 6 * 2**20  # of all blocks, two of each in flight; VMEM has 16 MiB or more


def refusal(x: jax.Array, k: int) -> str:
    """Why these tokens cannot be run here; "" where they can."""
    _, length, channels = x.shape
    if length % (packed := _packed(x)):
        return f"the length is {length}, no multiple of {packed}"
    return f"there are {channels} channels, no multiple of {LANES}" if channels % LANES else ""


def _packed(x: jax.Array) -> int:
    """Tokens in the smallest block: those of a packed register."""
    return SUBLANES * 4 // x.dtype.itemsize


class Walk(NamedTuple):
    """The grid: batch rows and channels in any order, and for each tile after tile of tokens."""

    shape: tuple[int, int, int]
    tile: int  # tokens in a block
    lanes: int  # channels in a block
    group: int  # tokens at a time
    packed: int
    backwards: bool

    @classmethod
    def of(cls, streamed: int, x: jax.Array, reach: jax.Array | None, group: int, backwards: bool) -> "Walk":
        """The walk over `streamed` arrays like x, at most `group` tokens at a time: the longest tiles that fit."""
        _, length, channels = x.shape
        lanes = max(n for n in range(LANES, WIDTH + 1, LANES) if channels % n == 0)
        group = math.gcd(length, group)
        token_bytes = streamed * lanes * x.dtype.itemsize + (reach is not None) * LANES * 4
        most = max(BLOCK_BYTES // (2 * token_bytes), group)
        tile = max(n for n in range(group, most + 1, group) if length % n == 0)
        return cls(x.shape, tile, lanes, group, _packed(x), backwards)

    @property
    def steps(self) -> int:
        return self.shape[1] // self.tile

    def tile_at(self, step: jax.Array) -> jax.Array:
        return self.steps - 1 - step if self.backwards else step

    def groups(self, body: Callable) -> None:
        """body(first token) for the groups of a tile."""

        def visit(i, _):
            i = self.tile // self.group - 1 - i if self.backwards else i
            body(pl.multiple_of(i * self.group, self.group))

        jax.lax.fori_loop(0, self.tile // self.group, visit, None)

    def launch(self, body: Callable, inputs: list[tuple], outputs: list[tuple], scratch: list) -> tuple:
        """body(refs of inputs, outputs and scratch), each given as the kind of its blocks and the array."""
        batch, length, channels = self.shape
        early = lambda step: jnp.maximum(self.tile_at(step) * (self.tile // self.packed) - 1, 0)  # noqa: E731

        def like(kind, array):
            """(shape, block, its index) of an array."""
            if kind == "tokens":
                return self.shape, (1, self.tile, self.lanes), lambda i, j, step: (i, self.tile_at(step), j)
            if kind == "before":
                return self.shape, (1, self.packed, self.lanes), lambda i, j, step: (i, early(step), j)
            if kind == "reach":
                return (batch, length, 1), (1, self.tile, 1), lambda i, j, step: (i, self.tile_at(step), 0)
            if kind == "filters":
                return array.shape, (len(array), self.lanes), lambda i, j, step: (0, j)
            rows = array.shape[1]
            return (batch, rows, channels), (1, rows, self.lanes), lambda i, j, step: (i, 0, j)

        spec = lambda given: pl.BlockSpec(*like(*given)[1:])  # noqa: E731
        return pl.pallas_call(
            body,
            grid=(batch, channels // self.lanes, self.steps),
            in_specs=list(map(spec, inputs)),
            out_specs=list(map(spec, outputs)),
            out_shape=[jax.ShapeDtypeStruct(like(*given)[0], given[1].dtype) for given in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        )(*(array for _, array in inputs))


class Group(NamedTuple):
    """What a group of tokens (tokens, lanes) is computed from, in float32."""

    filters: list[jax.Array]  # the taps and the bias
    x: jax.Array
    before: jax.Array  # the SUBLANES tokens before
    reach: jax.Array | None
    at: pl.Slice

    @classmethod
    def of(cls, walk: Walk, step: jax.Array, first: jax.Array, x, before, state, filters, reach: list) -> "Group":
        at = pl.ds(first, walk.group)
        last = lambda tokens: tokens.astype(jnp.float32)[-SUBLANES:]  # noqa: E731
        inside = pl.multiple_of(jnp.maximum(first - walk.packed, 0), walk.packed)
        outside = jnp.where(walk.tile_at(step) == 0, state[0], last(before[0]))
        earlier = jnp.where(first == 0, outside, last(x[0, pl.ds(inside, walk.packed)]))
        rows = [filters[j : j + 1] for j in range(len(filters))]
        wide = (walk.group, walk.lanes)
        sees = jnp.broadcast_to(reach[0][0, at], wide) if reach else None
        return cls(rows, x[0, at].astype(jnp.float32), earlier, sees, at)

    def seen(self, lag: int, v: jax.Array) -> jax.Array:
        """v, or 0 at tokens that do not see so far."""
        return v if self.reach is None else jnp.where(self.reach >= lag, v, 0)

    def taps(self) -> tuple[jax.Array, list]:
        """The values before the activation, and the inputs that every token sees, the newest first."""
        both = jnp.concatenate([self.before, self.x])
        *weight, bias = self.filters
        lags = range(1, len(weight))
        inputs = [self.x, *(self.seen(lag, pltpu.roll(both, lag, 0)[SUBLANES:]) for lag in lags)]
        return sum((w * v for w, v in zip(weight[::-1], inputs, strict=True)), bias), inputs


def forward(x, weight_kd, bias_d, state_bkd, reach_bl, silu: bool) -> tuple[jax.Array]:
    """As `fused` has it."""
    walk = Walk.of(2, x, reach_bl, FORWARD, backwards=False)

    def kernel(x_ref, before_ref, state_ref, filters_ref, *refs):
        (*reach_ref, y_ref), step = refs, pl.program_id(2)

        def group(first):
            here = Group.of(walk, step, first, x_ref, before_ref, state_ref, filters_ref, reach_ref)
            z, _ = here.taps()
            y_ref[0, here.at] = (z * jax.nn.sigmoid(z) if silu else z).astype(y_ref.dtype)

        walk.groups(group)

    return tuple(walk.launch(kernel, _inputs(x, weight_kd, bias_d, state_bkd, reach_bl), [("tokens", x)], []))


def backward(x, dy, weight_kd, bias_d, state_bkd, reach_bl, silu: bool) -> tuple[jax.Array, jax.Array]:
    """As `fused` has it; a part of the sums is a sublane's."""
    k, walk = len(weight_kd), Walk.of(3, x, reach_bl, BACKWARD, backwards=True)

    def kernel(dy_ref, x_ref, before_ref, state_ref, filters_ref, *refs):
        (*reach_ref, dx_ref, sums_ref, later_ref), step = refs, pl.program_id(2)

        @pl.when(step == 0)
        def _():
            sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)
            later_ref[...] = jnp.zeros(later_ref.shape, jnp.float32)

        def add(j, v):
            rows = pl.ds(j * SUBLANES, SUBLANES)
            sums_ref[0, rows] += sum(v[i : i + SUBLANES] for i in range(0, walk.group, SUBLANES))

        def group(first):
            here = Group.of(walk, step, first, x_ref, before_ref, state_ref, filters_ref, reach_ref)
            (z, inputs), g = here.taps(), dy_ref[0, here.at].astype(jnp.float32)
            if silu:
                s = jax.nn.sigmoid(z)
                g *= s * (1 + z * (1 - s))
            add(k, g)
            dx = jnp.zeros_like(g)
            for lag, v in enumerate(inputs):
                add(k - 1 - lag, g * v)
                dx += here.filters[k - 1 - lag] * (sent_back(here, lag, g) if lag else g)
            dx_ref[0, here.at] = dx.astype(dx_ref.dtype)

        def sent_back(here, lag, g):
            """g of the token `lag` after every one that it sees."""
            sent = here.seen(lag, g)
            rows = pl.ds((lag - 1) * SUBLANES, SUBLANES)
            both = jnp.concatenate([sent, later_ref[rows]])
            later_ref[rows] = sent[:SUBLANES]
            return pltpu.roll(both, len(both) - lag, 0)[: walk.group]

        walk.groups(group)

    inputs = [("tokens", dy), *_inputs(x, weight_kd, bias_d, state_bkd, reach_bl)]
    sums = jax.ShapeDtypeStruct((len(x), (k + 1) * SUBLANES, x.shape[2]), jnp.float32)
    later = pltpu.VMEM(((k - 1) * SUBLANES, walk.lanes), jnp.float32)
    dx, sums = walk.launch(kernel, inputs, [("tokens", x), ("rows", sums)], [later])
    return dx, jnp.swapaxes(sums.reshape(len(x), k + 1, SUBLANES, -1), 1, 2)


def _inputs(x, weight_kd, bias_d, state_bkd, reach_bl) -> list[tuple]:
    state = jnp.pad(state_bkd, ((0, 0), (SUBLANES - state_bkd.shape[1], 0), (0, 0)))
    filters = jnp.concatenate([weight_kd, bias_d[None]])
    reach = [] if reach_bl is None else [("reach", reach_bl[..., None])]
    return [("tokens", x), ("before", x), ("rows", state), ("filters", filters), *reach]
