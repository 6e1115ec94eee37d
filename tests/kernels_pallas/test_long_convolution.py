"""The diagonal state space model against a float64 loop over dense matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.long_convolution import long_convolution, xla
from tests.oracles import assert_close, dense_ssm, relative

IMPLEMENTATIONS = ("reference", "xla")  # what runs on any backend
D, N = 3, 4


def problem(rng, length, kind="complex"):
    draw = lambda *shape: rng.normal(size=shape) + (1j * rng.normal(size=shape) if kind == "complex" else 0)  # noqa: E731
    a = draw(D, N)
    a = a / (0.5 + abs(a))
    a[0, :3] = 1, 0, np.exp(-300)
    return dict(
        u=rng.normal(size=(2, length, D)), a=a, b=draw(D, N), c=draw(D, N), D=rng.normal(size=D),
        initial_state=draw(2, D, N),
    )  # fmt: skip


def loop(u, a, b, c, D, initial_state=None, c_reverse=None):
    y, last = np.zeros(u.shape), np.zeros((len(u), *a.shape), a.dtype)
    for i, d in np.ndindex(len(u), u.shape[2]):
        eye = np.eye(a.shape[1])
        h = None if initial_state is None else initial_state[i, d]
        single = np.diag(a[d]), 0 * eye, eye, b[d][:, None]
        out, last[i, d] = dense_ssm(*single, c[d][None], D[d] * np.eye(1), u[i, :, d, None], h)
        y[i, :, d] = out[:, 0].real
        if c_reverse is not None:
            future = np.append(u[i, 1:, d], 0)[::-1, None]
            out, _ = dense_ssm(*single, c_reverse[d][None], np.zeros((1, 1)), future)
            y[i, :, d] += out[::-1, 0].real
    return y, last


def jax_arrays(p, dtype=None):
    return {k: jnp.asarray(v, dtype) if dtype and not np.iscomplexobj(v) else jnp.asarray(v) for k, v in p.items()}


CHUNK = 16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 63])
def test_values(length, kind, implementation, rng, x64):
    p = problem(rng, length, kind)
    y, last = long_convolution(**jax_arrays(p), chunk_size=CHUNK, implementation=implementation)
    for out, ref, label in zip((y, last), loop(**p), ("y", "last state"), strict=True):
        assert_close(out, ref, scale=length * N, label=label)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_channels_first(implementation, rng, x64):
    p = jax_arrays(problem(rng, 20))
    y, last = long_convolution(**p, implementation=implementation)
    p["u"] = jnp.transpose(p["u"], (2, 0, 1))
    first, end = long_convolution(**p, channels_first=True, implementation=implementation)
    np.testing.assert_array_equal(jnp.transpose(first, (1, 2, 0)), y)
    np.testing.assert_array_equal(end, last)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 2, CHUNK, CHUNK + 1, 63])
def test_both_directions(length, implementation, rng, x64):
    p = problem(rng, length) | dict(initial_state=None)
    p["c_reverse"] = np.conj(p["c"]) * 2
    arrays = jax_arrays({k: v for k, v in p.items() if v is not None})
    y, _ = long_convolution(**arrays, chunk_size=CHUNK, implementation=implementation)
    assert_close(y, loop(**p)[0], scale=length * N)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("length", [1, CHUNK + 1, 40])
def test_gradients_agree_with_finite_differences_and_between_forms(length, both, rng, x64):
    """The loop's derivative along a random direction, by central differences of the NumPy oracle; then, term by
    term, the implementations."""
    p = problem(rng, length)
    if both:
        p = {k: v for k, v in p.items() if k != "initial_state"} | dict(c_reverse=p["c"][::-1].copy())
    bars = rng.normal(size=p["u"].shape), rng.normal(size=(2, D, N)) * (not both)

    def reference_total(q):
        y, last = loop(**q)
        return np.sum(bars[0] * y) + np.sum(bars[1] * last.real)

    def total(q, implementation):
        y, last = long_convolution(**q, chunk_size=CHUNK, implementation=implementation)
        return jnp.sum(bars[0] * y) + jnp.sum(bars[1] * last.real)

    direction = {k: rng.normal(size=v.shape) * (1 + 1j * np.iscomplexobj(v)) for k, v in p.items()}
    direction = {k: v if np.iscomplexobj(p[k]) else v.real for k, v in direction.items()}
    move = lambda eps: {k: p[k] + eps * direction[k] for k in p}  # noqa: E731
    slope = (reference_total(move(1e-6)) - reference_total(move(-1e-6))) / 2e-6
    grads = [
        jax.jit(jax.grad(total), static_argnums=1)(jax_arrays(p), implementation) for implementation in IMPLEMENTATIONS
    ]
    for g in grads:
        along = sum(np.sum(np.asarray(g[k]) * direction[k]).real for k in p)
        np.testing.assert_allclose(along, slope, rtol=1e-6)
    for k in p:
        assert_close(grads[1][k], grads[0][k], gradient=True, scale=length * N, label=f"gradient of {k}")


def test_split_reset_vmap_and_precision(rng):
    p = jax_arrays(problem(rng, 50), jnp.float32)
    p = {k: v.astype(jnp.complex64) if jnp.iscomplexobj(v) else v for k, v in p.items()}
    u, state = p.pop("u"), p.pop("initial_state")

    @jax.jit
    def run(u, state, reset=None):
        return long_convolution(u, initial_state=state, chunk_size=CHUNK, **p, reset=reset)

    y, last = run(u, state)
    first, middle = run(u[:, :21], state)
    second, end = run(u[:, 21:], middle)
    assert_close(jnp.concatenate([first, second], 1), y, scale=50)
    assert_close(end, last, scale=50)
    reset = jnp.zeros((2, 50), bool).at[:, 21].set(True)
    packed, end = run(u, state, reset=reset)
    second, alone = run(u[:, 21:], None)
    assert_close(packed, jnp.concatenate([first, second], 1), scale=50)
    assert_close(end, alone, scale=50)
    mapped, _ = jax.vmap(run)(u[:, None], state[:, None])
    assert_close(mapped[:, 0], y, scale=50)
    assert run(u.astype(jnp.bfloat16), state)[0].dtype == jnp.bfloat16
    assert_close(run(u.astype(jnp.bfloat16), state)[0], y)


@pytest.mark.parametrize("both", [False, True])
def test_bfloat16(both, rng):
    """Its products are of bfloat16, forward and backward, unless more is asked for; sums and states are not."""
    p = {k: np.asarray(x, np.complex64 if np.iscomplexobj(x) else np.float32) for k, x in problem(rng, 40).items()}
    p |= dict(c_reverse=p["c"][::-1]) if both else {}
    u = jnp.asarray(p.pop("u"), jnp.bfloat16)
    p = {k: jnp.asarray(x) for k, x in p.items() if not both or k != "initial_state"}

    @partial(jax.jit, static_argnums=2)
    def outputs_and_gradient(u, p, precision):
        run = lambda u: long_convolution(u, **p, chunk_size=CHUNK, precision=precision, implementation="xla")  # noqa: E731
        outputs, pull = jax.vjp(run, u)
        return *outputs, pull((u, jnp.zeros_like(outputs[1])))[0]

    auto, default, highest = (outputs_and_gradient(u, p, how) for how in ("auto", "default", "highest"))
    exact = outputs_and_gradient(u.astype(jnp.float32), p, "auto")
    for label, *x in zip(("y", "last state", "gradient"), auto, default, highest, exact, strict=True):
        as_auto, as_default, as_highest, reference = (np.asarray(v, np.result_type(v.dtype, np.float32)) for v in x)
        np.testing.assert_array_equal(as_auto, as_default, err_msg=label)
        assert 1e-4 < relative(as_auto, reference) < 8e-3, label
        assert relative(as_highest, reference) < (1e-5 if label == "last state" else 4e-3), label
    assert auto[0].dtype == auto[2].dtype == jnp.bfloat16


def test_chunks_divide_the_length_where_they_can(rng, x64, monkeypatch):
    """49 = 4 x 12 + 1 would leave a walk of one token; 7 x 7 leaves none. 17 has no divisor that is near."""
    p = jax_arrays(problem(rng, 49))
    walks = []
    monkeypatch.setattr(
        xla, "sweep", lambda u, tables, *rest, sweep=xla.sweep: walks.append(u.shape) or sweep(u, tables, *rest)
    )
    for length, chunk, expected in [(49, 12, [49]), (48, 20, [48]), (17, 16, [16, 1]), (45, 40, [40, 5])]:
        walks.clear()
        long_convolution(**(p | dict(u=p["u"][:, :length])), chunk_size=chunk, implementation="xla")
        assert [shape[2] for shape in walks] == expected


def test_reset_reads_no_later_segment(rng, x64):
    p = jax_arrays({k: v for k, v in problem(rng, 12).items() if k != "initial_state"})
    u, reverse = p.pop("u"), dict(c_reverse=p["c"])
    reset = jnp.zeros((2, 12), bool).at[:, 5].set(True)
    packed, _ = long_convolution(u, reset=reset, **p, **reverse)
    parts = [long_convolution(part, **p, **reverse)[0] for part in (u[:, :5], u[:, 5:])]
    assert_close(packed, jnp.concatenate(parts, 1), scale=12)


def test_wrong_input_is_named(rng, untyped):
    p = jax_arrays(problem(rng, 5), jnp.float32)
    for change, message in [
        (dict(D=p["D"][:2]), r"D has shape \(2,\)"),
        (dict(b=p["b"].real), "b is float32, a is complex64: all real or all complex"),
        (dict(c_reverse=p["c"]), "initial_state cannot enter a bidirectional convolution"),
        (dict(implementation="xla", reset=jnp.zeros((2, 5), bool)), "implementation 'xla' takes no reset"),
        (dict(implementation="cuda"), "implementation is 'cuda'; it may be auto, reference, xla, gpu"),
        (dict(implementation="gpu"), "implementation 'gpu' cannot run this: the backend is cpu; 'auto' takes another"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(a=p["a"][:2]), "a has 2 channels, u has 3"),
        (dict(u=p["u"][:, :0]), "u has length 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            long_convolution(**(p | change))
