"""Attention against a float64 loop over queries and keys, with absolute rotary positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.mixers import attention
from ssm.mixers.attention import Attention, empty_state, parallel, step, turn
from tests.oracles import assert_close

WINDOW = 7


def turned(x, position, base):
    """RoPE as rotations of the plane: the pair (x_i, x_{i + p/2}) is one complex number."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def loop(q, k, v, window, base, ids):
    """One query and one key after another; positions count from the start of the row."""
    y, (_, _, heads, p) = np.zeros(q.shape), q.shape
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h // (heads // k.shape[2])
        start = max([s for s in range(1, t + 1) if ids[b, s] != ids[b, s - 1]], default=0)
        seen = range(max(start, t - window + 1), t + 1)
        turn = turned if base else lambda x, position, base: x
        scores = np.array([turn(q[b, t, h], t, base) @ turn(k[b, s, g], s, base) / np.sqrt(p) for s in seen])
        weights = np.exp(scores - scores.max())
        y[b, t, h] = weights / weights.sum() @ v[b, list(seen), g]
    return y


def draw(rng, length, heads=4, groups=2, size=6):
    shapes = (2, length, heads, size), (2, length, groups, size), (2, length, groups, size)
    return [2 * rng.normal(size=shape) for shape in shapes]


run = jax.jit(parallel, static_argnames=("window", "base"))
advance = jax.jit(step, static_argnames="base")


def ring(x, start, end, base=None):
    """(g, window, p) of one row's tokens start to end - 1, the first of which has slot 0."""
    out = np.zeros((x.shape[1], WINDOW, x.shape[2]))
    for t in range(max(start, end - WINDOW), end):
        slot = (t - start) % WINDOW
        out[:, slot] = x[t] if base is None else [turned(row, slot, base) for row in x[t]]
    return out


@pytest.mark.parametrize(
    ("groups", "length", "base"),
    [(1, 1, 100.0), (2, WINDOW - 1, None), (2, WINDOW, 10.0), (4, WINDOW + 1, None), (1, 23, None), (2, 23, 100.0)],
)
def test_parallel_is_the_loop(groups, length, base, rng):
    """A window off by one, a block that sees too little, a head in the wrong group, an angle too large: all fail."""
    q, k, v = draw(rng, length, groups=groups)
    ids = np.sort(rng.integers(0, 3, size=(2, length)), 1)[:, ::-1].copy()
    for segments in (np.zeros_like(ids), ids):
        out, _ = run(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), window=WINDOW, base=base, segment_ids=segments)
        assert_close(out, loop(q, k, v, WINDOW, base, segments), scale=10)


@pytest.mark.parametrize("length", [5, 23])
def test_queries_together_see_the_keys_that_each_sees(length, monkeypatch, rng):
    """Three at a time: in one block without a state before it, and in blocks of a window."""
    monkeypatch.setattr(attention, "QUERIES", 3)
    q, k, v = draw(rng, length)
    out, _ = jax.jit(partial(parallel, window=WINDOW))(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    assert_close(out, loop(q, k, v, WINDOW, 10000.0, np.zeros((2, length))), scale=10)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (4,), (5, 13), (14, 15), (0, 20)])
def test_a_state_is_the_tokens_that_it_saw(cuts, rng):
    """In pieces shorter and longer than the window, the second segment begun in one of them."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(rng, 23))
    ids = jnp.asarray([[5] * 12 + [4] * 11, [5] * 23])
    expected = loop(*(np.asarray(x, np.float64) for x in (q, k, v)), WINDOW, 50.0, np.asarray(ids))
    state, outs, cuts = None, [], [0, *(cut for cut in cuts if cut), 23]
    for a, b in zip(cuts, cuts[1:], strict=False):
        if ids[0, a] != ids[0, a - 1] and a:
            state = jax.tree.map(lambda s: s.at[0].set(0), state)  # a piece's first token goes on from the state
        out, state = run(*(x[:, a:b] for x in (q, k, v)), state, window=WINDOW, base=50.0, segment_ids=ids[:, a:b])
        outs.append(out)
    assert_close(jnp.concatenate(outs, 1), expected, scale=10)
    np.testing.assert_array_equal(state.kept_b, [WINDOW, WINDOW])
    np.testing.assert_array_equal(state.slot_b, [11 % WINDOW, 23 % WINDOW])
    k, v = (np.asarray(x, np.float64) for x in (k, v))
    for row, start in enumerate((12, 0)):
        assert_close(state.keys_bgkp[row], ring(k[row], start, 23, 50.0), scale=10)
        assert_close(state.values_bgkp[row], ring(v[row], start, 23))


def test_another_segments_tokens_leave_the_state(rng):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(rng, 10))
    _, state = run(q, k, v, window=WINDOW, segment_ids=jnp.asarray([[0] * 7 + [1] * 3, [2] * 10]))
    np.testing.assert_array_equal(state.kept_b, [3, WINDOW])
    np.testing.assert_array_equal(state.slot_b, [3, 10 % WINDOW])
    for row, start in enumerate((7, 0)):
        np.testing.assert_array_equal(state.values_bgkp[row], ring(np.asarray(v[row]), start, 10))
    assert not np.any(state.keys_bgkp[0, :, 3:])


@pytest.mark.parametrize("base", [50.0, None])
def test_step_after_step_is_the_loop(base, rng):
    """Three times around the ring, the rows at different slots, the second row's first tokens read at once: a query
    that is not turned on for the keys of the lap before, a slot off by one, or a row in another's slot fails."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(rng, 24, groups=2))
    ids = np.asarray([[0] * 24, [1] * 3 + [0] * 21])
    expected = loop(*(np.asarray(x, np.float64) for x in (q, k, v)), WINDOW, base, ids)
    first, state = run(*(x[:, :5] for x in (q, k, v)), window=WINDOW, base=base, segment_ids=jnp.asarray(ids[:, :5]))
    outs = [first]
    for t in range(5, 24):
        y, state = advance(*(x[:, t] for x in (q, k, v)), state, base=base)
        outs.append(y[:, None])
    assert_close(jnp.concatenate(outs, 1), expected, scale=10)
    _, whole = run(q, k, v, window=WINDOW, base=base, segment_ids=jnp.asarray(ids))
    for out, ref in zip(state, whole, strict=True):
        assert_close(out, ref, scale=10)


def test_a_cache_in_bfloat16(rng):
    """Half the memory; of bfloat16 activations it loses a rounding, after a prompt and after steps."""
    layer = Attention(8, heads=2, window=WINDOW, cache_dtype="bfloat16")
    exact = layer.clone(cache_dtype="float32")
    x = jnp.asarray(rng.normal(size=(2, 12, 8)), jnp.bfloat16)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    outs = []
    for each in (layer, exact):
        y, state = jax.jit(each.apply)(variables, x)
        one = jax.jit(lambda x, state, each=each: each.apply(variables, x, state, method="step"))
        outs.append([y, *(one(x[:, t], state)[0] for t in range(3))])
        assert jax.tree.map(lambda s: (s.shape, s.dtype), one(x[:, 0], state)[1]) == jax.tree.map(
            lambda s: (s.shape, s.dtype), each.initial_state(2)
        )
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    for out, ref in zip(*outs, strict=True):
        assert_close(out, np.asarray(ref, np.float32))
    with pytest.raises(ValueError, match="unknown cache_dtype 'bf16'; did you mean 'bfloat16'"):
        Attention(8, cache_dtype="bf16").initial_state(1)


def test_a_step_copies_no_cache():
    """Donated, it is written to in place: what a step needs besides is far smaller."""
    q, cache = jnp.zeros((2, 4, 32)), empty_state(2, 1024, 4, 32)
    compiled = jax.jit(step, donate_argnums=3).lower(q, q, q, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * cache.keys_bgkp.nbytes


def test_positions_are_as_exact_after_a_hundred_thousand_tokens(rng):
    """Absolute positions in float32 would be off by 1e-3: each token's angle is a difference within the window."""
    q, k, v = (jnp.asarray(x[:1, :, :1, :2], jnp.float32) for x in draw(rng, 12))
    far = [jnp.tile(x, (1, 10_000, 1, 1)) for x in (q, k, v)]
    y, _ = run(*far, window=WINDOW, base=1.5)
    assert_close(y[:, -12:], y[:, 12:24])


def test_rotation_keeps_lengths_and_depends_on_the_difference(rng):
    x, y = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    assert_close(jnp.sum(turn(x, 9, 100.0) * turn(y, 5, 100.0)), np.sum(np.asarray(turn(x, 4, 100.0) * y)), scale=10)
    assert_close(jnp.linalg.norm(turn(x, 9, 100.0)), np.linalg.norm(x))
    assert_close(turn(x, 3, 100.0)[0, 0, 0], turned(np.asarray(x[0, 0, 0], np.float64), 3, 100.0), scale=10)


def test_heads_and_sizes_of_the_layer(rng):
    """The layer is its projections around `parallel`; 3 x 4 head channels need not be the width."""
    x = jnp.asarray(rng.normal(size=(2, 9, 5)), jnp.float32)
    layer = Attention(5, heads=3, kv_heads=1, head_size=4, window=4, rope=False, bias=True)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
    mixed = np.asarray(x) @ params["in_proj"]["kernel"] + params["in_proj"]["bias"]
    q, k, v = np.split(mixed.reshape(2, 9, 5, 4), [3, 4], 2)
    y = loop(q, k, v, 4, None, np.zeros((2, 9)))
    expected = y.reshape(2, 9, 12) @ params["out_proj"]["kernel"] + params["out_proj"]["bias"]
    assert_close(jax.jit(layer.apply)(variables, x)[0], expected, scale=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_heads=3), "kv_heads is 3; it must divide the 4 heads"),
        (dict(heads=3), "heads is 3; it must divide the width, 8, or head_size be given"),
        (dict(head_size=3), "head_size is 3; rope turns pairs: it must be even, or rope off"),
        (dict(window=0), "window is 0; a token sees at least itself"),
    ],
)
def test_wrong_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(8, **options).init(jax.random.key(0), jnp.zeros((1, 1, 8)))
