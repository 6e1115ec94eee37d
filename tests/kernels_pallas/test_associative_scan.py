"""The linear recurrence against a float64 loop: every implementation, kind of number, direction and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.associative_scan import associative_scan
from ssm.recurrence import dense_recurrence, linear_recurrence, segment_starts
from tests import oracles
from tests.oracles import assert_close

PLAIN = ("reference", "xla")  # what runs on any backend
KINDS = [(kind, per_token) for kind in ("real", "complex") for per_token in (True, False)]


def numbers(rng, shape, kind):
    x = rng.normal(size=shape)
    return x + 1j * rng.normal(size=shape) if kind == "complex" else x


def problem(rng, length, kind, per_token, batch=2, n=3):
    """a inside the unit circle, 1 and 0 and e^-300 among them."""
    a = numbers(rng, (batch, length, n) if per_token else (n,), kind)
    a = a / (1 + abs(a))
    a[..., 0] = 1
    a[..., 1] *= np.exp(-300)
    return a, numbers(rng, (batch, length, n), kind), numbers(rng, (batch, n), kind)


def oracle(a, b, h, reverse):
    return oracles.scan(np.broadcast_to(a, b.shape), b, h, reverse)


def gradients(a, b, h, states_bar, last_bar, reverse):
    """The adjoint by the definition: perturb nothing, walk back in a loop."""
    a = np.broadcast_to(a, b.shape)
    states, _ = oracle(a, b, h, reverse)
    order = list(range(b.shape[1]))[:: -1 if reverse else 1]
    a_bar, b_bar, g = np.zeros_like(states), np.zeros_like(states), last_bar
    for i, t in reversed(list(enumerate(order))):
        g = g + states_bar[:, t]
        b_bar[:, t] = g
        a_bar[:, t] = g * np.conj(states[:, order[i - 1]] if i else h)
        g = np.conj(a[:, t]) * g
    return a_bar, b_bar, g


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(("kind", "per_token"), KINDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64])
def test_values_and_all_gradients(length, reverse, kind, per_token, implementation, rng, x64):
    a, b, h = problem(rng, length, kind, per_token)
    bars = numbers(rng, b.shape, kind), numbers(rng, h.shape, kind)

    def total(*inputs):
        outputs = linear_recurrence(*inputs, reverse=reverse, implementation=implementation)
        return sum(jnp.sum(jnp.asarray(bar).conj() * out).real for bar, out in zip(bars, outputs, strict=True))

    inputs = [jnp.asarray(x) for x in (a, b, h)]
    outputs = jax.jit(partial(linear_recurrence, reverse=reverse, implementation=implementation))(*inputs)
    for out, ref in zip(outputs, oracle(a, b, h, reverse), strict=True):
        assert_close(out, ref, scale=length)
    expected = gradients(a, b, h, *bars, reverse)
    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs)
    for name, out, ref in zip("abh", grads, expected, strict=True):
        ref = ref.sum((0, 1)) if name == "a" and not per_token else ref
        assert_close(out.conj(), ref, gradient=True, scale=length, label=f"gradient of {name}")


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_reset_is_separate_sequences(per_token, reverse, implementation, rng, x64):
    a, b, h = (jnp.asarray(x) for x in problem(rng, 20, "real", per_token))
    starts = np.array([7, 8, 15])
    reset = np.zeros((2, 20), bool)
    reset[:, starts - 1 if reverse else starts] = True
    out, last = associative_scan(a, b, h, reverse=reverse, reset=jnp.asarray(reset), implementation=implementation)
    pieces = np.split(np.arange(20), starts)
    for i, piece in enumerate(pieces):
        first = i == (len(pieces) - 1 if reverse else 0)
        part_a = a[:, piece] if per_token else a
        ref, end = associative_scan(
            part_a, b[:, piece], h if first else None, reverse=reverse, implementation="reference"
        )
        assert_close(out[:, piece], ref, scale=20)
    assert_close(last, out[:, 0 if reverse else -1])


@pytest.mark.parametrize("implementation", PLAIN)
def test_split_vmap_jit_and_half_precision(implementation, rng):
    a, b, h = (jnp.asarray(x, jnp.float32) for x in problem(rng, 65, "real", True))
    run = lambda a, b, h: associative_scan(a, b, h, implementation=implementation)  # noqa: E731
    states, last = run(a, b, h)
    once, run = run, jax.jit(run)
    first, middle = run(a[:, :40], b[:, :40], h)
    second, end = run(a[:, 40:], b[:, 40:], middle)
    assert_close(jnp.concatenate([first, second], 1), states, scale=65)
    assert_close(end, last, scale=65)
    assert_close(run(a, b, h)[0], states, scale=65)
    mapped, _ = jax.vmap(once)(a[:, None], b[:, None], h[:, None])
    assert_close(mapped[:, 0], states, scale=65)
    half, last = run(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), h)
    assert half.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    exact, _ = oracle(*(np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (a, b)), np.asarray(h), False)
    assert_close(half, exact)


@pytest.mark.parametrize("implementation", PLAIN)
def test_gradients_under_checkpoint(implementation, rng, x64):
    """Rematerialisation must not change a gradient."""
    a, b, h = (jnp.asarray(x) for x in problem(rng, 64, "real", True))
    total = lambda a, b, h: jnp.sum(jnp.sin(associative_scan(a, b, h, implementation=implementation)[0]))  # noqa: E731
    plain, again = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(a, b, h) for f in (total, jax.checkpoint(total)))
    for out, ref in zip(again, plain, strict=True):
        assert_close(out, ref)


def test_hundred_thousand_tokens_agree(rng):
    """A tree and a loop round differently; over 1e5 tokens of a slow decay both stay near float64."""
    a = np.full(2, 0.9999)
    b = rng.normal(size=(1, 100_000, 2))
    exact, _ = oracle(a, b, np.zeros((1, 2)), False)
    for implementation in PLAIN:
        out, _ = jax.jit(partial(associative_scan, implementation=implementation))(jnp.float32(a), jnp.float32(b))
        assert_close(out, exact, scale=10_000)


def test_dense_recurrence(rng, x64):
    A, b, h = rng.normal(size=(3, 3)) / 2, rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 3))
    states, last = dense_recurrence(*(jnp.asarray(x) for x in (A, b, h)))
    for row in range(2):
        eye = np.eye(3)
        ref, end = oracles.dense_ssm(A, 0 * eye, eye, eye, eye, 0 * eye, b[row], h[row])
        assert_close(states[row], ref, scale=9)
        assert_close(last[row], end, scale=9)


def test_segment_starts():
    starts = segment_starts(jnp.array([[5, 5, 2, 2, 2, 5]]))
    np.testing.assert_array_equal(starts, [[False, False, True, False, False, True]])
    assert segment_starts(None) is None


ONE = jnp.ones((2, 4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONE[:, :3], ONE), r"a has shape \(2, 3, 3\); b \(2, 4, 3\) needs \(2, 4, 3\) or \(3,\)"),
        ((ONE, ONE, ONE[:, 0, :2]), r"initial_state has shape \(2, 2\)"),
        ((ONE.astype(complex), ONE), "a has a complex dtype; give a pair of planes"),
        (((ONE, ONE), ONE), r"a has 2 plane\(s\), b has 1"),
        ((ONE[0, 0], ONE[:, :0]), "b must be"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        associative_scan(*arguments)
    with pytest.raises(ValueError, match="implementation is 'cuda'; it may be auto, reference, xla, gpu, tpu"):
        associative_scan(ONE, ONE, implementation="cuda")
    for other in ("gpu", "tpu"):
        with pytest.raises(ValueError, match=f"implementation '{other}' cannot run this: the backend is cpu"):
            associative_scan(ONE, ONE, implementation=other)
    with pytest.raises(ValueError, match=r"reset has shape \(2, 3\)"):
        associative_scan(ONE, ONE, reset=jnp.ones((2, 3), bool))
