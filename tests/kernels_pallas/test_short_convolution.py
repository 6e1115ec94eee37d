"""The short causal convolution against a float64 loop over tokens and taps, and its adjoint against the loop's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.short_convolution import ACTIVATIONS, short_convolution
from tests.oracles import assert_close

D = 3
NAMES = ("x_bld", "weight_dk", "bias_d", "initial_state")
each_implementation = pytest.mark.parametrize("implementation", ["reference", "xla"])
LENGTHS = [1, 2, 3, 63, 64, 65]


def problem(rng, length, k):
    shapes = (2, length, D), (D, k), (D,), (2, k - 1, D)
    reset = np.zeros((2, length), bool)
    reset[0, rng.integers(length, size=length // 8)] = True
    reset[1, length // 2 :: 2] = True
    return [rng.normal(size=shape) for shape in shapes], reset


def loop(x, weight, bias, state, reset, activation):
    """(y, last state), every tap of every token by itself."""
    y, k = np.zeros(x.shape), weight.shape[1]
    last = np.zeros(state.shape)
    for row, t in np.ndindex(x.shape[:2]):
        for lag in range(k):
            if not reset[row, max(0, t - lag + 1) : t + 1].any():
                source = x[row, t - lag] if lag <= t else state[row, k - 1 + t - lag]
                y[row, t] += weight[:, k - 1 - lag] * source
    for row, slot in np.ndindex(state.shape[:2]):
        t = x.shape[1] - (k - 1) + slot
        if not reset[row, max(0, t + 1) :].any():
            last[row, slot] = x[row, t] if t >= 0 else state[row, k - 1 + t]
    y += bias
    return y / (1 + np.exp(-y)) if activation == "silu" else y, last


def adjoint(x, weight, bias, state, reset, y_bar, last_bar):
    """Gradients of sum(y_bar y) + sum(last_bar last) without activation, by the same walk over tokens and taps."""
    k = weight.shape[1]
    x_bar, weight_bar, state_bar = np.zeros(x.shape), np.zeros(weight.shape), np.zeros(state.shape)
    for row, t in np.ndindex(x.shape[:2]):
        for lag in range(k):
            if not reset[row, max(0, t - lag + 1) : t + 1].any():
                source, bar = (x, x_bar) if lag <= t else (state, state_bar)
                at = t - lag if lag <= t else k - 1 + t - lag
                bar[row, at] += weight[:, k - 1 - lag] * y_bar[row, t]
                weight_bar[:, k - 1 - lag] += source[row, at] * y_bar[row, t]
    for row, slot in np.ndindex(state.shape[:2]):
        t = x.shape[1] - (k - 1) + slot
        if not reset[row, max(0, t + 1) :].any():
            bar, at = (x_bar, t) if t >= 0 else (state_bar, k - 1 + t)
            bar[row, at] += last_bar[row, slot]
    return x_bar, weight_bar, y_bar.sum((0, 1)), state_bar


@each_implementation
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients(length, k, implementation, rng, x64):
    """Also of lengths below k, whose last state keeps a part of the initial one."""
    arrays, reset = problem(rng, length, k)
    y_bar, last_bar = rng.normal(size=arrays[0].shape), rng.normal(size=arrays[3].shape)

    def run(arrays, reset, activation):
        options = dict(reset=reset, activation=activation, implementation=implementation)
        return short_convolution(*arrays, **options)

    def total(arrays, reset):
        y, last = run(arrays, reset, "none")
        return jnp.sum(y_bar * y) + jnp.sum(last_bar * last)

    for starts in (None, reset):
        forget = np.zeros(reset.shape, bool) if starts is None else reset
        for activation in ACTIVATIONS:
            out = jax.jit(run, static_argnums=2)(arrays, starts, activation)
            for value, ref, label in zip(out, loop(*arrays, forget, activation), ("y", "last"), strict=True):
                assert_close(value, ref, scale=k, label=f"{label} {activation}")
        grads = jax.jit(jax.grad(total))(arrays, starts)
        for name, out, ref in zip(NAMES, grads, adjoint(*arrays, forget, y_bar, last_bar), strict=True):
            assert_close(out, ref, gradient=True, scale=length * k, label=f"gradient of {name}")


@each_implementation
def test_the_gradient_through_silu(implementation, rng, x64):
    arrays, reset = problem(rng, 9, 4)
    direction = [rng.normal(size=a.shape) for a in arrays]
    moved = lambda eps: np.sum(  # noqa: E731
        np.sin(loop(*(a + eps * v for a, v in zip(arrays, direction, strict=True)), reset, "silu")[0])
    )
    options = dict(reset=jnp.asarray(reset), implementation=implementation)
    total = lambda *a: jnp.sum(jnp.sin(short_convolution(*a, **options)[0]))  # noqa: E731
    _, slope = jax.jvp(total, tuple(map(jnp.asarray, arrays)), tuple(map(jnp.asarray, direction)))
    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-7)


@each_implementation
def test_pieces_and_packed_rows_are_the_whole(implementation, rng):
    """A piece of one token included, and a segment shorter than the filter."""
    (x, weight, bias, state), _ = problem(rng, 12, 4)
    x, weight, bias, state = (jnp.asarray(a, jnp.float32) for a in (x, weight, bias, state))
    run = lambda x, state=None, **options: short_convolution(  # noqa: E731
        x, weight, bias, state, implementation=implementation, **options
    )
    y, last = run(x, state)
    first, middle = run(x[:, :1], state)
    second, end = run(x[:, 1:], middle)
    np.testing.assert_array_equal(jnp.concatenate([first, second], 1), y)
    np.testing.assert_array_equal(end, last)
    reset = jnp.zeros((2, 12), bool).at[:, jnp.asarray([5, 10])].set(True)
    packed, last = run(x, reset=reset)
    parts = [run(part) for part in (x[:, :5], x[:, 5:10], x[:, 10:])]
    np.testing.assert_array_equal(packed, jnp.concatenate([y for y, _ in parts], 1))
    np.testing.assert_array_equal(last, parts[-1][1])
    fresh, _ = run(x, state, reset=reset.at[:, 0].set(True))
    np.testing.assert_array_equal(fresh, packed)


@each_implementation
def test_bfloat16_and_vmap(implementation, rng):
    arrays, reset = problem(rng, 17, 4)
    x, weight, bias, state = (jnp.asarray(a, jnp.float32) for a in arrays)
    x = x.astype(jnp.bfloat16)
    run = lambda x, state, reset: short_convolution(  # noqa: E731
        x, weight, bias, state, reset=reset, implementation=implementation
    )
    y, last = run(x, state, jnp.asarray(reset))
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = np.asarray(x, np.float64)
    expected, end = loop(rounded, *(np.asarray(a, np.float64) for a in (weight, bias, state)), reset, "silu")
    assert_close(y, expected)
    assert_close(last, end)
    mapped, ends = jax.vmap(run)(x[:, None], state[:, None], jnp.asarray(reset)[:, None])
    np.testing.assert_array_equal(mapped[:, 0], y)
    np.testing.assert_array_equal(ends[:, 0], last)


def test_padding_of_any_size_is_not_read(rng):
    """Infinite padding in front of a segment: to multiply it by 0 would not forget it."""
    (x, weight, bias, _), _ = problem(rng, 8, 4)
    x, weight = jnp.asarray(x, jnp.float32).at[:, :5].set(jnp.inf), jnp.asarray(weight, jnp.float32)
    y, _ = short_convolution(x, weight, reset=jnp.zeros((2, 8), bool).at[:, 5].set(True))
    np.testing.assert_array_equal(y[:, 5:], short_convolution(x[:, 5:], weight)[0])


def test_wrong_input_is_named(rng, untyped):
    arrays, reset = problem(rng, 5, 4)
    p = dict(zip(NAMES, (jnp.asarray(a, jnp.float32) for a in arrays), strict=True)) | dict(reset=jnp.asarray(reset))
    for change, message in [
        (dict(x_bld=p["x_bld"][0]), r"x_bld must be \(batch, length, width\), none of them 0; it is \(5, 3\)"),
        (dict(x_bld=p["x_bld"][:, :0]), r"it is \(2, 0, 3\)"),
        (dict(weight_dk=p["weight_dk"].T), r"weight_dk has shape \(4, 3\).* needs \(3, at least 1 tap\)"),
        (dict(bias_d=p["bias_d"][:2]), r"bias_d has shape \(2,\); .* and 4 taps need \(3,\)"),
        (dict(initial_state=p["initial_state"][:1]), r"initial_state has shape \(1, 3, 3\); .* need \(2, 3, 3\)"),
        (dict(reset=p["reset"][:, 1:]), r"reset has shape \(2, 4\); .* need \(2, 5\)"),
        (dict(activation="relu"), "activation is 'relu'; it may be silu, none"),
        (dict(implementation="cuda"), "implementation is 'cuda'; it may be auto, reference, xla"),
    ]:
        with pytest.raises(ValueError, match=message):
            short_convolution(**(p | change))
