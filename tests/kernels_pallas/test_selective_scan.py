"""The selective scan against a float64 loop; the loop's gradients by finite differences, the rest by the loop's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.selective_scan import selective_scan
from tests.oracles import assert_close

D, N = 3, 4
NAMES = ("x_bld", "dt_bld", "A_dn", "B_bln", "C_bln", "D_d", "initial_state_bdn", "z_bld", "dt_bias_d")
each = pytest.mark.parametrize("implementation", ["reference", "xla"])


def problem(rng, length, batch=2):
    """Decays from 1, of a state whose A is 0, to e^-300 at the middle token of a channel."""
    draw = rng.normal
    A = -np.exp(draw(size=(D, N)))
    A[0, 0] = 0
    dt = draw(size=(batch, length, D)) - 2
    dt[-1, length // 2, 1] = -300 / A[1].min()
    x, z = draw(size=(batch, length, D)), draw(size=(batch, length, D))
    B, C = draw(size=(batch, length, N)), draw(size=(batch, length, N))
    return dict(zip(NAMES, (x, dt, A, B, C, draw(size=D), draw(size=(batch, D, N)), z, draw(size=D)), strict=True))


def loop(x_bld, dt_bld, A_dn, B_bln, C_bln, D_d=0.0, initial_state_bdn=0.0, z_bld=None, dt_bias_d=0.0, softplus=False,
         reset=None):  # fmt: skip
    """(y, last state), token after token."""
    y, h = np.zeros(x_bld.shape), np.zeros((len(x_bld), *A_dn.shape)) + initial_state_bdn
    for t in range(x_bld.shape[1]):
        dt = dt_bld[:, t] + dt_bias_d
        dt = np.logaddexp(0, dt) if softplus else dt
        if reset is not None:
            h = np.where(reset[:, t, None, None], 0, h)
        h = np.exp(dt[..., None] * A_dn) * h + (dt * x_bld[:, t])[..., None] * B_bln[:, t, None]
        y[:, t] = np.einsum("bdn,bn->bd", h, C_bln[:, t]) + D_d * x_bld[:, t]
    return y if z_bld is None else y * z_bld / (1 + np.exp(-z_bld)), h


def arrays(p, dtype=None):
    return {name: jnp.asarray(value, dtype) for name, value in p.items()}


def outputs_and_gradients(p, bars, **options):
    """(y, last), and the gradients for their cotangents."""

    @jax.jit
    def both(p, bars):
        out, pull = jax.vjp(lambda p: selective_scan(**p, **options), p)
        return out, pull(tuple(jnp.asarray(bar, o.dtype) for o, bar in zip(out, bars, strict=True)))[0]

    return both(p, bars)


@each
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_values(length, implementation, rng, x64):
    p = problem(rng, length)
    run = jax.jit(lambda p: selective_scan(**p, softplus=True, implementation=implementation))
    for out, ref in zip(run(arrays(p)), loop(**p, softplus=True), strict=True):
        assert_close(out, ref, scale=length)


@each
@pytest.mark.parametrize("absent", [("D_d",), ("z_bld",), ("dt_bias_d", "softplus"), ("initial_state_bdn", "z_bld")])
def test_what_is_optional(absent, implementation, rng, x64):
    """Each of them left out; without softplus a time is taken as it is, and so must not be below 0."""
    p = problem(rng, 20)
    p["dt_bld"] = abs(p["dt_bld"])
    p = {name: value for name, value in p.items() if name not in absent}
    options = dict(softplus="softplus" not in absent)
    for out, ref in zip(selective_scan(**arrays(p), **options, implementation=implementation), loop(**p, **options),
                        strict=True):  # fmt: skip
        assert_close(out, ref, scale=20)


def test_gradients_of_the_definition(rng, x64):
    """Along a random direction of all inputs at once, with a token that forgets."""
    p, direction = problem(rng, 9), problem(rng, 9)
    p["dt_bld"] = np.minimum(p["dt_bld"], 2)
    bars, reset = (rng.normal(size=(2, 9, D)), rng.normal(size=(2, D, N))), np.arange(18).reshape(2, 9) == 4
    for name in NAMES:
        _, gradients = outputs_and_gradients(
            arrays(p), bars, softplus=True, reset=jnp.asarray(reset), implementation="reference"
        )
        moved = [loop(**p | {name: p[name] + s * 1e-6 * direction[name]}, softplus=True, reset=reset) for s in (1, -1)]
        slope = sum(np.sum(bar * (a - b)) for bar, a, b in zip(bars, *moved, strict=True)) / 2e-6
        np.testing.assert_allclose(np.sum(gradients[name] * direction[name]), slope, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 64), (65, 64), (130, 32), (40, 1), (40, 100)])
def test_chunks_have_the_loops_gradients(length, chunk_size, rng, x64):
    p, bars = arrays(problem(rng, length)), (rng.normal(size=(2, length, D)), rng.normal(size=(2, D, N)))
    reset = jnp.asarray(rng.random((2, length)) < 0.1)
    chunked, reference = (
        outputs_and_gradients(p, bars, softplus=True, reset=reset, implementation=name, chunk_size=chunk_size)
        for name in ("xla", "reference")
    )
    for (path, out), ref in zip(jax.tree.leaves_with_path(chunked), jax.tree.leaves(reference), strict=True):
        assert_close(out, ref, scale=length, gradient=True, label=jax.tree_util.keystr(path))


def test_chunks_by_an_associative_scan(rng, x64, monkeypatch):
    """What a chunk is elsewhere than on a CPU."""
    p, bars = arrays(problem(rng, 70)), (rng.normal(size=(2, 70, D)), rng.normal(size=(2, D, N)))
    reset = jnp.asarray(rng.random((2, 70)) < 0.1)
    reference = outputs_and_gradients(p, bars, reset=reset, softplus=True, implementation="reference")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chunked = outputs_and_gradients(p, bars, reset=reset, softplus=True, implementation="xla")
    for out, ref in zip(jax.tree.leaves(chunked), jax.tree.leaves(reference), strict=True):
        assert_close(out, ref, scale=70, gradient=True)


@each
def test_reset_forgets(implementation, rng, x64):
    p, reset = problem(rng, 100), rng.random((2, 100)) < 0.1
    reset[0, 0] = True  # the state that is given, too
    run = jax.jit(lambda p, reset: selective_scan(**p, softplus=True, reset=reset, implementation=implementation))
    for out, ref in zip(run(arrays(p), jnp.asarray(reset)), loop(**p, softplus=True, reset=reset), strict=True):
        assert_close(out, ref, scale=100)


@each
def test_split_in_two(implementation, rng, x64):
    p = arrays(problem(rng, 100))
    cut = lambda part: {k: v[:, part] if v.ndim == 3 and k != "initial_state_bdn" else v for k, v in p.items()}  # noqa: E731
    y, last = selective_scan(**p, softplus=True, implementation=implementation)
    first, h = selective_scan(**cut(slice(None, 37)), softplus=True, implementation=implementation)
    second = cut(slice(37, None)) | dict(initial_state_bdn=h)
    second, end = selective_scan(**second, softplus=True, implementation=implementation)
    assert_close(jnp.concatenate([first, second], 1), y, scale=100)
    assert_close(end, last, scale=100)


@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_inputs(dtype, implementation, rng):
    """Of exact bfloat16 inputs, y differs by its own last rounding; states stay in float32."""
    p = arrays(problem(rng, 200), jnp.bfloat16)
    wide = {name: np.asarray(value, np.float64) for name, value in p.items()}
    always = ("A_dn", "D_d", "dt_bias_d", "initial_state_bdn")
    p = {name: value.astype(jnp.float32 if name in always else dtype) for name, value in p.items()}
    y, last = jax.jit(lambda p: selective_scan(**p, softplus=True, implementation=implementation))(p)
    assert (y.dtype, last.dtype) == (dtype, jnp.float32)
    expected, end = loop(**wide, softplus=True)
    assert_close(y, expected, scale=200)
    assert_close(last, end, scale=200)


def test_vmap(rng, x64):
    p = arrays(problem(rng, 70, batch=4))
    shared = ("A_dn", "D_d", "dt_bias_d")
    stacked = {k: v if k in shared else v.reshape(2, 2, *v.shape[1:]) for k, v in p.items()}
    run = jax.vmap(lambda p: selective_scan(**p, softplus=True), ({k: None if k in shared else 0 for k in p},))
    for out, ref in zip(run(stacked), selective_scan(**p, softplus=True), strict=True):
        assert_close(out.reshape(ref.shape), ref)


def test_the_gradient_keeps_one_state_a_chunk(rng):
    p, n = arrays(problem(rng, 2048), jnp.float32), 64
    p |= dict(A_dn=-jnp.ones((D, n)), B_bln=jnp.ones((2, 2048, n)), C_bln=jnp.ones((2, 2048, n)))
    p["initial_state_bdn"] = jnp.ones((2, D, n))
    lowered = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(selective_scan(**p, softplus=True)[0])))).lower(p)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * 2 * 2048 * D * n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_bld=(2, 0, D)), "x_bld must be (batch, length, channels), none of them 0; it is (2, 0, 3)"),
        (dict(A_dn=(D + 1, N)), "A_dn has shape (4, 4); x_bld (2, 5, 3) needs (3, states)"),
        (dict(dt_bld=(2, 5, 1)), "dt_bld has shape (2, 5, 1); x_bld (2, 5, 3) and A_dn (3, 4) need (2, 5, 3)"),
        (dict(C_bln=(2, 5, D)), "C_bln has shape (2, 5, 3)"),
        (dict(initial_state_bdn=(2, N, D)), "initial_state_bdn has shape (2, 4, 3)"),
        (dict(z_bld=(2, 4, D)), "z_bld has shape (2, 4, 3)"),
        (dict(reset=(2, 4)), "reset has shape (2, 4)"),
        (dict(chunk_size=0), "chunk_size is 0; it must be at least 1"),
        (dict(implementation="cuda"), "implementation is 'cuda'; it may be auto, reference, xla, gpu"),
        (dict(implementation="gpu"), "implementation 'gpu' cannot run this: the backend is cpu; 'auto' takes another"),
    ],
)
def test_wrong_input_is_named(change, message, rng, untyped):
    p = arrays(problem(rng, 5), jnp.float32)
    change = {k: jnp.zeros(v, bool if k == "reset" else None) if isinstance(v, tuple) else v for k, v in change.items()}
    with pytest.raises(ValueError) as error:
        selective_scan(**p | change)
    assert message in str(error.value)
