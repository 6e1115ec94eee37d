r"""Attention over a sliding window, the lineage's yardstick and its partner in hybrids (Vaswani et al. 2017).

$y_t = \sum_{s} \mathrm{softmax}_s(q_t^\top k_s / \sqrt{p}) v_s$ over the last `window` tokens s <= t, with grouped
queries (Ainslie et al. 2023, arXiv:2305.13245) and rotary positions (RoPE; Su et al. 2021, arXiv:2104.09864).
Rotated products depend on t - s alone, so positions count from the first token that is looked at: they stay below
2 x window, and as exact, however long the sequence.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.dispatch import at_least_float32, rounded_product
from kernels_pallas.rotation import rotate
from ssm.initializers import uniform_fan_in
from ssm.naming import check_state, unknown
from ssm.recurrence import segment_starts

QUERIES = 512  # that look at their keys together: what the last of them sees, the first need not pass over
CACHES = ("float32", "bfloat16")


class State(NamedTuple):
    """The last `window` tokens of the segment, in a ring: its token u is in slot u mod window, the key turned by the
    slot's angle. `slot` is the next token's, `kept` how many there are, whole numbers; other slots hold zeros.

    A token is written into its slot and nothing else moves. A query is turned by its own slot for the keys of slots up
    to it, and by `window` more for the others, which are of the lap before.
    """

    keys_bgkp: Float[Array, "b g k p"]
    values_bgkp: Float[Array, "b g k p"]
    slot_b: Float[Array, " b"]
    kept_b: Float[Array, " b"]


def turn(
    x_blhp: Float[Array, "b l h p"], first: int | Int[Array, " b"], base: float, *, backwards: bool = False
) -> Float[Array, "b l h p"]:
    """Each pair (x_i, x_{i + p/2}) turned by the angle position * base^(-2i/p) (RoPE, eq. 15; p even).

    Positions count up from `first`, which may be each row's own. backwards: by minus the angle.
    """
    x = x_blhp.astype(at_least_float32(x_blhp.dtype))
    planes = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(planes, dtype=x.dtype) / planes)
    position = jnp.reshape(first, (-1, 1)) + jnp.arange(x.shape[1])[None]
    angle = position.astype(x.dtype)[..., None] * frequency[None, None]
    # The table is made once; fused into what follows, it would be made for each head and row.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
    return rotate(x, (cos[:, :, None], (-sin if backwards else sin)[:, :, None]), "halves").astype(x_blhp.dtype)


def parallel(
    q_blhp: Float[Array, "b l h p"],
    k_blgp: Float[Array, "b l g p"],
    v_blgp: Float[Array, "b l g p"],
    state: State | None = None,
    *,
    window: int,
    base: float | None = 10000.0,
    segment_ids: Int[Array, "b l"] | None = None,
    cache_dtype: str = "float32",
) -> tuple[Float[Array, "b l h p"], State]:
    """Attention of every token over itself and the window - 1 before it, in blocks of at most `window` tokens.

    Head i reads group i // (h/g) of keys and values. base: of RoPE; None: no positions. The softmax is float32.
    A block sees itself and the one before, so that time and memory grow as length x window. cache_dtype: of the keys
    and values of a state that is made anew.
    """
    batch, length = q_blhp.shape[:2]
    block, count = min(length, window), -(-length // window)
    before = 0 if state is None and count == 1 else window  # an empty state is not worth looking at
    starts = segment_starts(segment_ids)
    run = jnp.zeros((batch, length), int) if starts is None else jnp.cumsum(starts, 1)
    empty = empty_state(batch, window, *k_blgp.shape[2:], _cache(cache_dtype, k_blgp.dtype))
    state = empty if state is None else state
    keys, values, valid = _in_order(state, base)
    keys, values = (jnp.concatenate([old.astype(x.dtype), x], 1) for old, x in ((keys, k_blgp), (values, v_blgp)))
    runs = jnp.concatenate([valid.astype(run.dtype) - 1, run], 1)

    q, own = (_fill(x, count * block).reshape(batch * count, block, *x.shape[2:]) for x in (q_blhp, run))
    k, v, seen = (_windows(x[:, window - before :], before, block, count) for x in (keys, values, runs))
    if base is not None:
        q, k = turn(q, before, base), turn(k, 0, base)
    y = []
    for start in range(0, block, QUERIES):
        end = min(start + QUERIES, block)
        near = slice(max(0, before + start - window + 1), before + end)
        age = jnp.arange(before + start, before + end)[:, None] - jnp.arange(near.start, near.stop)[None]
        mask = ((age >= 0) & (age < window))[None] & (own[:, start:end, None] == seen[:, None, near])
        y.append(_attend(q[:, start:end], k[:, near], v[:, near], mask))
    y = jnp.concatenate(y, 1).reshape(batch, count * block, *q_blhp.shape[2:])[:, :length]
    return y, _ring(state, keys, values, runs, length, base)


def step(
    q_bhp: Float[Array, "b h p"],
    k_bgp: Float[Array, "b g p"],
    v_bgp: Float[Array, "b g p"],
    state: State,
    *,
    base: float | None = 10000.0,
) -> tuple[Float[Array, "b h p"], State]:
    """One token, by one pass over the keys and one over the values; arguments as in `parallel`."""
    batch, groups, window, size = state.keys_bgkp.shape
    slot_b, slots = state.slot_b.astype(int), jnp.arange(window)
    laps = [q_bhp]
    if base is not None:
        k_bgp = turn(k_bgp[:, None], slot_b, base)[:, 0]
        laps = [turn(q_bhp[:, None], slot_b + past, base)[:, 0] for past in (0, window)]
    keys, values = (
        x_bgkp.at[jnp.arange(batch), :, slot_b].set(x_bgp.astype(x_bgkp.dtype), mode="promise_in_bounds")
        for x_bgkp, x_bgp in ((state.keys_bgkp, k_bgp), (state.values_bgkp, v_bgp))
    )
    seen_bk = jnp.mod(slot_b[:, None] - slots[None], window) <= state.kept_b.astype(int)[:, None]
    behind_bk = slots[None] <= slot_b[:, None]
    seen_blk = jnp.stack([seen_bk & behind_bk, seen_bk & ~behind_bk] if len(laps) == 2 else [seen_bk], 1)

    product = partial(rounded_product, dtype=q_bhp.dtype, precision="default")
    laps_blgip = jnp.stack(laps, 1).reshape(batch, len(laps), groups, -1, size)
    scores = product("blgip,bgkp->blgik", laps_blgip, keys) / size**0.5
    weights = jax.nn.softmax(jnp.where(seen_blk[:, :, None, None], scores, -jnp.inf), (1, 4))
    y = jnp.sum(product("blgik,bgkp->blgip", weights, values), 1).reshape(q_bhp.shape).astype(q_bhp.dtype)
    after = jnp.mod(slot_b + 1, window), jnp.minimum(state.kept_b + 1, window)
    return y, State(keys, values, *(x.astype(jnp.float32) for x in after))


def empty_state(batch_size: int, window: int, groups: int, head_size: int, dtype=jnp.float32) -> State:
    """No token."""
    none, zero = jnp.zeros((batch_size, groups, window, head_size), dtype), jnp.zeros(batch_size)
    return State(none, none, zero, zero)


def _cache(name, dtype):
    """What keys and values of `dtype` are kept in."""
    if name not in CACHES:
        raise unknown("cache_dtype", name, CACHES)
    return at_least_float32(jnp.dtype(dtype)) if name == "float32" else jnp.dtype(name)


def _attend(q_blhp, k_bsgp, v_bsgp, mask_bls):
    """The softmax in at least float32; `jax.nn.dot_product_attention` in bfloat16 breaks under strict promotion."""
    b, l, h, p = q_blhp.shape
    q_blgip = q_blhp.reshape(b, l, k_bsgp.shape[2], -1, p)
    wide = at_least_float32(q_blhp.dtype)
    scores = jnp.einsum("blgip,bsgp->bgils", q_blgip, k_bsgp, preferred_element_type=wide) / p**0.5
    weights = jax.nn.softmax(jnp.where(mask_bls[:, None, None], scores, -jnp.inf)).astype(v_bsgp.dtype)
    return jnp.einsum("bgils,bsgp->blgip", weights, v_bsgp).reshape(b, l, h, p)


def _fill(x, length):
    """x with zeros after its tokens, `length` in all."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _windows(x, before, block, count):
    """What each block looks at, (b * count, before + block, ...), from `before` tokens and those of the blocks."""
    x = _fill(x, before + count * block)
    if count == 1:
        return x
    blocks = x.reshape(len(x), count + 1, block, *x.shape[2:])
    return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], 2).reshape(len(x) * count, 2 * block, *x.shape[2:])


def _in_order(state, base) -> tuple[Float[Array, "b k g p"], Float[Array, "b k g p"], Bool[Array, "b k"]]:
    """The keys as they were before they were turned, and the values, the newest last; and where there are any."""
    window = state.keys_bgkp.shape[2]
    slots = jnp.mod(state.slot_b.astype(int)[:, None] + jnp.arange(window)[None], window)
    keys, values = (jnp.swapaxes(x, 1, 2) for x in (state.keys_bgkp, state.values_bgkp))
    keys = keys if base is None else turn(keys, 0, base, backwards=True)
    keys, values = (jnp.take_along_axis(x, slots[:, :, None, None], 1) for x in (keys, values))
    return keys, values, jnp.arange(window)[None] >= window - state.kept_b.astype(int)[:, None]


def _ring(state, keys_bsgp, values_bsgp, runs_bs, length, base):
    """The state after the last of `length` tokens: its own segment's tokens, zeros for others."""
    dtype, window = state.keys_bgkp.dtype, state.keys_bgkp.shape[2]
    last = runs_bs[:, -1:]
    fresh = jnp.sum(runs_bs[:, -length:] == last, 1)
    slot = jnp.mod(jnp.where(last[:, 0] == 0, state.slot_b.astype(fresh.dtype), 0) + fresh, window)
    valid = runs_bs[:, -window:] == last
    order = jnp.mod(jnp.arange(window)[None] - slot[:, None], window)[:, :, None, None]
    kept = (jnp.where(valid[..., None, None], x[:, -window:], 0).astype(dtype) for x in (keys_bsgp, values_bsgp))
    keys, values = (jnp.take_along_axis(x, order, 1) for x in kept)
    keys = keys if base is None else turn(keys, 0, base)
    count = jnp.sum(valid, 1)
    return State(*(jnp.swapaxes(x, 1, 2) for x in (keys, values)), *(x.astype(jnp.float32) for x in (slot, count)))


class Attention(nn.Module):
    """Attention as a layer.

    heads: of queries; kv_heads: of keys and values, a divisor of `heads` (None: as many). head_size: None: width/heads.
    window: how many tokens a token sees, itself included, and how many the state keeps.
    rope: rotary positions with base `rope_base`; off: none (NoPE). bias: of both projections. cache_dtype: of the
    state's keys and values, of `CACHES`.
    """

    width: int
    heads: int = 4
    kv_heads: int | None = None
    head_size: int | None = None
    window: int = 2048
    rope: bool = True
    rope_base: float = 10000.0
    bias: bool = False
    cache_dtype: str = "float32"

    def _sizes(self):
        """(query heads, heads of keys and values, head size)."""
        groups = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads < 1 or groups < 1 or self.heads % groups:
            raise ValueError(f"kv_heads is {groups}; it must divide the {self.heads} heads")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"heads is {self.heads}; it must divide the width, {self.width}, or head_size be given")
        size = self.width // self.heads if self.head_size is None else self.head_size
        if size < 1 or self.rope and size % 2:
            raise ValueError(f"head_size is {size}; rope turns pairs: it must be even, or rope off")
        if self.window < 1:
            raise ValueError(f"window is {self.window}; a token sees at least itself")
        return self.heads, groups, size

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        options = dict(window=self.window, segment_ids=segment_ids, cache_dtype=self.cache_dtype)
        return self._layer(x_bld, state, partial(parallel, **options))

    def step(self, x_bd, state: State):
        return self._layer(x_bd, state, step)

    @nn.compact
    def _layer(self, x, state, core):
        heads, groups, size = self._sizes()
        check_state("attention", state, self.initial_state(len(x)))
        dense = partial(nn.Dense, use_bias=self.bias, dtype=x.dtype, kernel_init=uniform_fan_in)
        mixed = dense((heads + 2 * groups) * size, name="in_proj")(x)
        mixed = mixed.reshape(*x.shape[:-1], heads + 2 * groups, size)
        q, k, v = jnp.split(mixed, [heads, heads + groups], -2)
        y, state = core(q, k, v, state, base=self.rope_base if self.rope else None)
        return dense(self.width, name="out_proj")(y.reshape(*x.shape[:-1], heads * size)), state

    def initial_state(self, batch_size: int) -> State:
        _, groups, size = self._sizes()
        return empty_state(batch_size, self.window, groups, size, _cache(self.cache_dtype, jnp.float32))
