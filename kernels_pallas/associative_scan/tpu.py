r"""The recurrence on TPUs: tokens in sublanes, channels in lanes, tiles streamed through VMEM one after another.

Eight tokens are one register, each the map h -> a h + b: three rounds of composing it with the one 1, 2 and 4 tokens
before give the maps from the state that enters the register, which is all that waits for the registers before. The
backward pass is one kernel of the same shape that walks the other way: what token t sends back is
$c_t = a_t^* c_{t+1} + a_t^* \bar h_t$, and $\bar b_t = \bar h_t + c_{t+1}$, $\bar a_t = \bar b_t h_{t-1}^*$.
Under shard_map both need check_vma=False.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.associative_scan.reference import conjugate, plus, times

LANES = 128
SUBLANES = 8  # tokens in a register
UNROLL = 4  # registers (packed ones, of 16-bit inputs) at a time
WIDTH = 512  # channels and batch rows side by side, whose latencies overlap
BLOCK_BYTES = 8 * 2**20  # of all blocks, two of each in flight; VMEM has 16 MiB or more
WHOLE = slice(None)
Planes = tuple[jax.Array, ...]
Shaped = jax.Array | jax.ShapeDtypeStruct


def refusal(a: Planes, b: Planes) -> str:
    """Why these planes cannot be run here; "" where they can."""
    _, length, channels = b[0].shape
    if any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in (*a, *b)):
        return "it takes float32 and bfloat16"
    if length % (packed := _packed(*_streamed(a), *b)):
        return f"the length is {length}, no multiple of {packed}"
    if channels % LANES:
        return f"there are {channels} channels, no multiple of {LANES}"
    return ""


def _streamed(a: Planes) -> Planes:
    return a if a[0].ndim == 3 else ()


def _packed(*streamed: Shaped) -> int:
    """Tokens in the smallest block: those of a packed register."""
    return max(SUBLANES * 4 // x.dtype.itemsize for x in streamed)


class Walk(NamedTuple):
    """The grid: batch rows and channels in any order, and for each tile after tile of tokens."""

    shape: tuple[int, int, int]
    rows: int  # of the batch in a block
    tile: int  # tokens in a block
    lanes: int  # channels in a block
    group: int  # tokens at a time
    packed: int
    backwards: bool

    @classmethod
    def of(cls, streamed: tuple[Shaped, ...], backwards: bool) -> "Walk":
        """The walk over these arrays (batch, length, channels): the longest tiles that fit."""
        batch, length, channels = shape = streamed[0].shape
        lanes = max(n for n in range(LANES, WIDTH + 1, LANES) if channels % n == 0)
        rows = max(n for n in range(1, WIDTH // lanes + 1) if batch % n == 0)
        packed = _packed(*streamed)
        group = math.gcd(length, UNROLL * packed)
        most = BLOCK_BYTES // (2 * rows * lanes * sum(x.dtype.itemsize for x in streamed))
        tile = max(n for n in range(group, max(most, group) + 1, group) if length % n == 0)
        return cls(shape, rows, tile, lanes, group, packed, backwards)

    @property
    def steps(self) -> int:
        return self.shape[1] // self.tile

    @property
    def groups(self) -> int:
        return self.tile // self.group

    def tile_at(self, step: jax.Array) -> jax.Array:
        return self.steps - 1 - step if self.backwards else step

    def group_at(self, i: jax.Array) -> pl.Slice:
        """The tokens of a tile's i-th group on the way."""
        i = self.groups - 1 - i if self.backwards else i
        return pl.ds(pl.multiple_of(i * self.group, self.group), self.group)

    def next_at(self, step: jax.Array) -> jax.Array:
        """The smallest block that comes after a step's tile; after the last tile, any."""
        if self.backwards:
            return jnp.maximum(self.tile_at(step) * (self.tile // self.packed) - 1, 0)
        return jnp.minimum((step + 1) * self.tile, self.shape[1] - self.packed) // self.packed

    def decay(self, refs: tuple, at: pl.Slice) -> Planes:
        """a at these tokens, or for all of them where it is the same at each."""
        if refs[0].shape[1] == self.tile:
            return _load(refs, at)
        return tuple(jnp.broadcast_to(x, (1, self.group, self.lanes)) for x in _load(refs))

    def launch(self, body: Callable, inputs: list[tuple], outputs: list[tuple]) -> tuple[Planes, ...]:
        """body(refs of planes, ...), each given as the kind of its blocks and the arrays, or their dtypes."""
        batch, length, channels = self.shape
        first = lambda i, j, step: (i, 0, j)  # noqa: E731
        kinds = {  # tokens in all, block, which block
            "tokens": (length, (self.rows, self.tile, self.lanes), lambda i, j, step: (i, self.tile_at(step), j)),
            "next": (length, (self.rows, self.packed, self.lanes), lambda i, j, step: (i, self.next_at(step), j)),
            "group": (self.group, (self.rows, self.group, self.lanes), first),
            "state": (1, (self.rows, 1, self.lanes), first),
            "fixed": (1, (1, 1, self.lanes), lambda i, j, step: (0, 0, j)),
        }
        specs = lambda given: [(pl.BlockSpec(*kinds[kind][1:]),) * len(planes) for kind, planes in given]  # noqa: E731
        like = lambda kind, dtype: jax.ShapeDtypeStruct((batch, kinds[kind][0], channels), dtype)  # noqa: E731
        return pl.pallas_call(
            body,
            grid=(batch // self.rows, channels // self.lanes, self.steps),
            in_specs=specs(inputs),
            out_specs=specs(outputs),
            out_shape=[tuple(like(kind, dtype) for dtype in dtypes) for kind, dtypes in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        )(*(planes for _, planes in inputs))


def _load(refs: tuple, at: pl.Slice | slice = WHOLE) -> Planes:
    return tuple(ref[:, at].astype(jnp.float32) for ref in refs)


def _store(refs: tuple, values: Planes, at: pl.Slice | slice = WHOLE) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[:, at] = value.astype(ref.dtype)


def _where(condition: jax.Array, x: Planes, y: tuple) -> Planes:
    return tuple(jnp.where(condition, p, q) for p, q in zip(x, y, strict=True))


def _last(x: Planes, backwards: bool) -> Planes:
    """Of planes (rows, tokens, lanes), the last token on the way."""
    return tuple(plane[:, :1] if backwards else plane[:, -1:] for plane in x)


def _before(x: Planes, count: int, entering: tuple, backwards: bool) -> Planes:
    """What was `count` tokens earlier on the way; `entering` before the first."""
    tokens = x[0].shape[1]
    token = jax.lax.broadcasted_iota(jnp.int32, x[0].shape, 1)
    inside = token < tokens - count if backwards else token >= count
    return _where(inside, tuple(pltpu.roll(p, tokens - count if backwards else count, 1) for p in x), entering)


def _states(a: Planes, b: Planes, h: Planes, backwards: bool) -> tuple[Planes, Planes]:
    """All states (rows, tokens, lanes) of a group that h enters, and the last; a may have one row."""
    registers = [slice(i, i + SUBLANES) for i in range(0, b[0].shape[1], SUBLANES)]
    zero, one, states = (0.0,) * len(h), (1.0, 0.0)[: len(h)], {}
    for cut in registers[:: -1 if backwards else 1]:
        decay, state = tuple(x[:, cut] for x in a), tuple(x[:, cut] for x in b)
        for count in (1, 2, 4):
            state = plus(state, times(decay, _before(state, count, zero, backwards)))
            decay = times(decay, _before(decay, count, one, backwards))
        states[cut.start] = state = plus(state, times(decay, h))
        h = _last(state, backwards)
    in_order = (states[cut.start] for cut in registers)
    return tuple(jnp.concatenate(x, 1) for x in zip(*in_order, strict=True)), h


def _decay(a: Planes) -> tuple[str, Planes]:
    return ("tokens", a) if a[0].ndim == 3 else ("fixed", tuple(x[None, None] for x in a))


def _as_state(h: Planes) -> tuple[str, Planes]:
    return "state", tuple(x[:, None] for x in h)


def scan(a: Planes, b: Planes, h: Planes, reverse: bool) -> tuple[Planes, Planes]:
    """All states, in b's dtype, and the last one in float32; arguments as in `reference.scan`."""
    walk = Walk.of((*_streamed(a), *b, *b), reverse)

    def kernel(a_refs, b_refs, h_refs, out_refs, last_refs):
        @pl.when(pl.program_id(2) == 0)
        def _():
            _store(last_refs, _load(h_refs))

        def group(i, h):
            at = walk.group_at(i)
            states, h = _states(walk.decay(a_refs, at), _load(b_refs, at), h, reverse)
            _store(out_refs, states, at)
            return h

        _store(last_refs, jax.lax.fori_loop(0, walk.groups, group, _load(last_refs)))

    outputs = [("tokens", [x.dtype for x in b]), ("state", [jnp.float32] * len(b))]
    states, last = walk.launch(kernel, [_decay(a), ("tokens", b), _as_state(h)], outputs)
    return states, tuple(x[:, 0] for x in last)


def adjoint(a: Planes, h: Planes, states: Planes, d_states: Planes, d_last: Planes, reverse: bool) -> tuple:
    """As `reference.adjoint`."""
    per_token, back = a[0].ndim == 3, not reverse
    walk = Walk.of((*_streamed(a), *_streamed(a), *states, *d_states, *d_states), back)

    def kernel(a_refs, h_refs, state_refs, next_refs, d_refs, c_refs, da_refs, db_refs, dh_refs):
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            _store(dh_refs, _load(c_refs))
            if not per_token:
                _store(da_refs, tuple(jnp.zeros(ref.shape, ref.dtype) for ref in da_refs))

        beyond = _where(step == walk.steps - 1, _load(h_refs), _last(_load(next_refs), reverse))

        def group(i, c):
            at, further = walk.group_at(i), walk.group_at(jnp.minimum(i + 1, walk.groups - 1))
            a_conj, d = conjugate(walk.decay(a_refs, at)), _load(d_refs, at)
            sent, c_out = _states(a_conj, times(a_conj, d), c, back)
            db = plus(d, _before(sent, 1, c, back))
            entering = _where(i == walk.groups - 1, beyond, _last(_load(state_refs, further), reverse))
            da = times(db, conjugate(_before(_load(state_refs, at), 1, entering, reverse)))
            _store(db_refs, db, at)
            if per_token:
                _store(da_refs, da, at)
            else:
                _store(da_refs, plus(_load(da_refs), da))
            return c_out

        _store(dh_refs, jax.lax.fori_loop(0, walk.groups, group, _load(dh_refs)))

    inputs = [_decay(a), _as_state(h), ("tokens", states), ("next", states), ("tokens", d_states), _as_state(d_last)]
    a_bar = ("tokens", [x.dtype for x in a]) if per_token else ("group", [jnp.float32] * len(a))
    outputs = [a_bar, ("tokens", [x.dtype for x in d_states]), ("state", [jnp.float32] * len(h))]
    da, db, dh = walk.launch(kernel, inputs, outputs)
    da = da if per_token else tuple(x.sum(1) for x in da)
    return da, db, tuple(x[:, 0] for x in dh)
