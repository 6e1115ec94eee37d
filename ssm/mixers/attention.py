r"""Attention over a sliding window, the lineage's yardstick and its partner in hybrids (Vaswani et al. 2017).

$y_t = \sum_{s} \mathrm{softmax}_s(q_t^\top k_s / \sqrt{p}) v_s$ over the last `window` tokens s <= t, with grouped
queries (Ainslie et al. 2023, arXiv:2305.13245) and rotary positions (RoPE; Su et al. 2021, arXiv:2104.09864).
Rotated products depend on t - s alone, so keys are kept unrotated and positions count from the window's first
token: they stay small, and exact, however long the sequence.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import at_least_float32
from kernels_pallas.rotation import rotate
from ssm.initializers import uniform_fan_in
from ssm.naming import check_state
from ssm.recurrence import segment_starts


class State(NamedTuple):
    """The last `window` tokens of the segment, the newest last; where `valid` is 0 there is none, and zeros."""

    keys_bkgp: Float[Array, "b k g p"]
    values_bkgp: Float[Array, "b k g p"]
    valid_bk: Float[Array, "b k"]


def turn(x_blhp: Float[Array, "b l h p"], first: int, base: float) -> Float[Array, "b l h p"]:
    """Each pair (x_i, x_{i + p/2}) turned by the angle position * base^(-2i/p) (RoPE, eq. 15; p even)."""
    x = x_blhp.astype(at_least_float32(x_blhp.dtype))
    planes = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(planes, dtype=x.dtype) / planes)
    angle = jnp.arange(first, first + x.shape[1], dtype=x.dtype)[:, None] * frequency[None]
    # The table is made once; fused into what follows, it would be made for each head and row.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
    return rotate(x, (cos[None, :, None], sin[None, :, None]), "halves").astype(x_blhp.dtype)


def parallel(
    q_blhp: Float[Array, "b l h p"],
    k_blgp: Float[Array, "b l g p"],
    v_blgp: Float[Array, "b l g p"],
    state: State | None = None,
    *,
    window: int,
    base: float | None = 10000.0,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l h p"], State]:
    """Attention of every token over itself and the window - 1 before it, in blocks of at most `window` tokens.

    Head i reads group i // (h/g) of keys and values. base: of RoPE; None: no positions. The softmax is float32.
    A block sees itself and the one before, so that time and memory grow as length x window.
    """
    batch, length = q_blhp.shape[:2]
    block, count = min(length, window), -(-length // window)
    before = 0 if state is None and count == 1 else window  # an empty state is not worth looking at
    starts = segment_starts(segment_ids)
    run = jnp.zeros((batch, length), int) if starts is None else jnp.cumsum(starts, 1)
    state = empty_state(batch, window, *k_blgp.shape[2:]) if state is None else state
    keys = jnp.concatenate([state.keys_bkgp.astype(k_blgp.dtype), k_blgp], 1)
    values = jnp.concatenate([state.values_bkgp.astype(v_blgp.dtype), v_blgp], 1)
    runs = jnp.concatenate([state.valid_bk.astype(run.dtype) - 1, run], 1)

    q, own = (_fill(x, count * block).reshape(batch * count, block, *x.shape[2:]) for x in (q_blhp, run))
    k, v, seen = (_windows(x[:, window - before :], before, block, count) for x in (keys, values, runs))
    if base is not None:
        q, k = turn(q, before, base), turn(k, 0, base)
    age = jnp.arange(before, before + block)[:, None] - jnp.arange(before + block)[None]
    near = (age >= 0) & (age < window)
    y = _attend(q, k, v, near[None] & (own[:, :, None] == seen[:, None]))
    return y.reshape(batch, count * block, *y.shape[2:])[:, :length], _last(keys, values, runs, window)


def empty_state(batch_size: int, window: int, groups: int, head_size: int) -> State:
    """No token."""
    none = jnp.zeros((batch_size, window, groups, head_size))
    return State(none, none, none[..., 0, 0])


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


def _last(keys, values, runs, window):
    """The state after the last token: its own segment's tokens, zeros for others."""
    valid = runs[:, -window:] == runs[:, -1:]
    kept = (jnp.where(valid[..., None, None], x[:, -window:], 0) for x in (keys, values))
    return State(*(x.astype(at_least_float32(x.dtype)) for x in kept), valid.astype(jnp.float32))


class Attention(nn.Module):
    """Attention as a layer.

    heads: of queries; kv_heads: of keys and values, a divisor of `heads` (None: as many). head_size: None: width/heads.
    window: how many tokens a token sees, itself included, and how many the state keeps.
    rope: rotary positions with base `rope_base`; off: none (NoPE). bias: of both projections.
    """

    width: int
    heads: int = 4
    kv_heads: int | None = None
    head_size: int | None = None
    window: int = 2048
    rope: bool = True
    rope_base: float = 10000.0
    bias: bool = False

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

    @nn.compact
    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        heads, groups, size = self._sizes()
        check_state("attention", state, self.initial_state(len(x_bld)))
        dense = partial(nn.Dense, use_bias=self.bias, dtype=x_bld.dtype, kernel_init=uniform_fan_in)
        mixed = dense((heads + 2 * groups) * size, name="in_proj")(x_bld)
        mixed = mixed.reshape(*x_bld.shape[:2], heads + 2 * groups, size)
        q, k, v = jnp.split(mixed, [heads, heads + groups], 2)
        base = self.rope_base if self.rope else None
        y, state = parallel(q, k, v, state, window=self.window, base=base, segment_ids=segment_ids)
        return dense(self.width, name="out_proj")(y.reshape(*x_bld.shape[:2], heads * size)), state

    def step(self, x_bd, state: State):
        y, state = self(x_bd[:, None], state)
        return y[:, 0], state

    def initial_state(self, batch_size: int) -> State:
        _, groups, size = self._sizes()
        return empty_state(batch_size, self.window, groups, size)
