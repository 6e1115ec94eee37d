r"""A short causal convolution on NVIDIA Hopper GPUs, and all its gradients, in one pass over the tokens each.

A warpgroup walks over TILE tokens with up to 2 channels a lane, the last k - 1 inputs in registers: every token is read
once, but for the few that two tiles share. The backward pass walks the same way: with $g_t$ the cotangent before the
activation, made again from x, $\bar x_{t-j}$ waits in registers for the $g$ of the tokens after it, and the gradients
of the taps and the bias are summed over the tile. Where tiles do not divide the tokens, or blocks the channels, the
last one starts inside the one before it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.selective_scan.gpu_tiles import OPTIONS, load, sigmoid

LANES = 128
VECTORS = (2, 1)  # channels of a lane
TILE = 128  # tokens of a warpgroup
AT_ONCE = 8  # tokens that are loaded together
AXES = ("block", "tile", "batch")


def refusal(x: jax.Array, k: int) -> str:
    """Why these tokens cannot be run here; "" where they can."""
    _, length, channels = x.shape
    if length < TILE:
        return f"the length is {length}, less than {TILE}"
    return f"there are {channels} channels, less than {LANES}" if channels < LANES else ""


def width(channels: int) -> int:
    """Channels of a warpgroup: the most, of those that do the fewest channels twice."""
    fitting = [LANES * v for v in VECTORS if channels % v == 0 and channels >= LANES * v]
    return min(fitting, key=lambda n: (pl.cdiv(channels, n) * n, -n))


class Walk(NamedTuple):
    """A warpgroup's tokens and channels, their filters, and the arrays in memory."""

    x: jax.Ref
    weight: list
    bias: jax.Array
    state: jax.Ref
    reach: jax.Ref | None
    silu: bool

    @classmethod
    def here(cls, x, weight, bias, state, reach: list, silu: bool) -> "Walk":
        walk = cls(x, [], None, state, reach[0] if reach else None, silu)
        return walk._replace(weight=[walk.load(weight.at[j]) for j in range(weight.shape[0])], bias=walk.load(bias))

    @property
    def first(self) -> jax.Array:
        """The first token."""
        return jnp.minimum(self.own, self.x.shape[1] - TILE)

    @property
    def own(self) -> jax.Array:
        """The first token that the tile before does not have."""
        return jax.lax.axis_index("tile") * TILE

    @property
    def channels(self) -> pl.Slice:
        n = width(self.x.shape[2])
        return pl.ds(jnp.minimum(jax.lax.axis_index("block") * n, self.x.shape[2] - n), n)

    @property
    def layout(self):
        """Neighbouring channels in a lane."""
        n = width(self.x.shape[2])
        return plgpu.Layout.WG_STRIDED((n,), n // LANES)

    def load(self, ref) -> jax.Array:
        return load(ref.at[self.channels], self.layout)

    def token(self, ref, t) -> jax.Array:
        return self.load(ref.at[jax.lax.axis_index("batch"), t])

    def fetch(self, first, count: int, *refs) -> list[tuple]:
        """Of every ref `count` tokens, each with how many inputs before it it sees; beyond the last token, others."""
        first = jnp.minimum(first, self.x.shape[1] - count)
        row = jax.lax.axis_index("batch")
        reach = lambda t: None if self.reach is None else self.reach[row, t]  # noqa: E731
        return [(*(self.token(ref, first + u) for ref in refs), reach(first + u)) for u in range(count)]

    def over(self, body, carry, *refs):
        """carry = body(t, what `fetch` found of it, carry) for all tokens, the next ones on their way meanwhile."""

        def some(i, ahead_and_carry):
            here, carry = ahead_and_carry
            first = self.first + i * AT_ONCE
            ahead = self.fetch(first + AT_ONCE, AT_ONCE, *refs)
            for u, fetched in enumerate(here):
                carry = body(first + u, fetched, carry)
            return ahead, carry

        start = self.fetch(self.first, AT_ONCE, *refs), carry
        return jax.lax.fori_loop(0, TILE // AT_ONCE, some, start)[1]

    def before(self) -> list:
        """The k - 1 inputs before the first token, the newest first."""
        slots, found = len(self.weight) - 1, []
        for lag in range(1, slots + 1):
            t = self.first - lag
            state = self.token(self.state, jnp.clip(slots + t, 0, slots - 1))
            x = self.token(self.x, jnp.maximum(t, 0)).astype(jnp.float32)
            found.append(_where(t < 0, state, x))
        return found

    def taps(self, x, recent: list, reach) -> tuple[jax.Array, list]:
        """A token's value before the activation, and the inputs that it sees, the newest first."""
        inputs = [x.astype(jnp.float32), *(_seen(reach, lag, v) for lag, v in enumerate(recent, 1))]
        z = self.bias
        for weight, v in zip(self.weight[::-1], inputs, strict=True):
            z += weight * v
        return z, inputs

    def write(self, ref, t, value) -> None:
        """Of tokens in order; those that are not this tile's go where its first one's overwrites them."""
        t = jnp.maximum(t, self.own)
        ref[jax.lax.axis_index("batch"), t, self.channels] = value.astype(ref.dtype)


def _where(condition, x, y):
    return jnp.where(jnp.broadcast_to(condition, x.shape), x, y)


def _seen(reach, lag: int, v):
    """v, or 0 where a token does not see so far."""
    return v if reach is None else _where(reach >= lag, v, jnp.zeros_like(v))


@partial(jax.jit, static_argnums=5)  # lowered once for all layers
def forward(x, weight_kd, bias_d, state_bkd, reach_bl, silu: bool) -> tuple[jax.Array]:
    """As `fused` has it."""

    def kernel(x_ref, weight_ref, bias_ref, state_ref, *refs):
        *reach_ref, y_ref = refs
        walk = Walk.here(x_ref, weight_ref, bias_ref, state_ref, reach_ref, silu)

        def token(t, fetched, recent):
            x, reach = fetched
            z, _ = walk.taps(x, recent, reach)
            walk.write(y_ref, t, z * sigmoid(z) if silu else z)
            return [x.astype(jnp.float32), *recent[:-1]]

        walk.over(token, walk.before(), x_ref)

    return (_launch(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), x, weight_kd, bias_d, state_bkd, reach_bl),)


@partial(jax.jit, static_argnums=6)
def backward(x, dy, weight_kd, bias_d, state_bkd, reach_bl, silu: bool) -> tuple[jax.Array, jax.Array]:
    """As `fused` has it; a part of the sums is a tile's."""
    (batch, length, channels), k = x.shape, len(weight_kd)

    def kernel(x_ref, dy_ref, weight_ref, bias_ref, state_ref, *refs):
        *reach_ref, dx_ref, sums_ref = refs
        walk = Walk.here(x_ref, weight_ref, bias_ref, state_ref, reach_ref, silu)
        end = walk.first + TILE

        def visit(t, fetched, recent, waiting):
            """g, the inputs of token t, and of the inputs before it and itself the cotangents, so far."""
            x, dy, reach = fetched
            z, inputs = walk.taps(x, recent, reach)
            g = dy.astype(jnp.float32)
            if silu:
                s = sigmoid(z)
                g *= s * (1.0 + z * (1.0 - s))
            before = enumerate(zip(walk.weight[-2::-1], waiting, strict=True), 1)
            waiting = [walk.weight[-1] * g, *(d + w * _seen(reach, lag, g) for lag, (w, d) in before)]
            return g, inputs, [inputs[0], *recent[:-1]], waiting

        def token(t, fetched, carry):
            recent, waiting, sums = carry
            g, inputs, recent, waiting = visit(t, fetched, recent, waiting)
            if length % TILE:
                g = _where(t >= walk.own, g, jnp.zeros_like(g))
            sums = [*(total + g * v for total, v in zip(sums, inputs[::-1], strict=False)), sums[-1] + g]
            walk.write(dx_ref, t - k + 1, waiting.pop())
            return recent, waiting, sums

        zero = plgpu.layout_cast(jnp.zeros_like(walk.bias), walk.layout)
        start = walk.before(), [zero] * (k - 1), [zero] * (k + 1)
        recent, waiting, sums = walk.over(token, start, x_ref, dy_ref)
        for j, total in enumerate(sums):
            sums_ref[jax.lax.axis_index("batch"), jax.lax.axis_index("tile"), j, walk.channels] = total
        for t in [end + lag for lag in range(k - 1)]:
            ((x, dy, reach),) = walk.fetch(t, 1, x_ref, dy_ref)
            dy = _where(t < length, dy, jnp.zeros_like(dy))
            _, _, recent, waiting = visit(t, (x, dy, reach), recent, waiting)
            walk.write(dx_ref, t - k + 1, waiting.pop())

    sums = jax.ShapeDtypeStruct((batch, pl.cdiv(length, TILE), k + 1, channels), jnp.float32)
    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype), sums]
    return tuple(_launch(kernel, out_type, x, dy, weight_kd, bias_d, state_bkd, reach_bl))


def _launch(kernel, out_type, x, *arrays):
    batch, length, channels = x.shape
    grid = pl.cdiv(channels, width(channels)), pl.cdiv(length, TILE), batch
    launch = plgpu.kernel(kernel, out_type=out_type, grid=grid, grid_names=AXES, compiler_params=OPTIONS)
    return launch(x, *(array for array in arrays if array is not None))
