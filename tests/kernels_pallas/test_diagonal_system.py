"""One diagonal system for all channels, against a float64 loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.diagonal_system import diagonal_system
from tests.oracles import assert_close, relative

IMPLEMENTATIONS = ("reference", "xla", "auto")  # what runs on any backend
D, N = 3, 5


def problem(rng, length):
    draw = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)  # noqa: E731
    a = draw(N)
    a = a / (0.3 + abs(a))
    a[:3] = 1, 0, np.exp(-300)
    return dict(
        u_bld=rng.normal(size=(2, length, D)), a_n=a, B_nd=draw(N, D), C_dn=draw(D, N), D_d=rng.normal(size=D),
        initial_state_bn=draw(2, N),
    )  # fmt: skip


def loop(u_bld, a_n, B_nd, C_dn, D_d, initial_state_bn, reset=None, reverse=False):
    y, h = np.zeros(u_bld.shape), initial_state_bn.copy()
    for t in range(u_bld.shape[1])[:: -1 if reverse else 1]:
        if reset is not None:
            h[reset[:, t]] = 0
        h = a_n * h + u_bld[:, t] @ B_nd.T
        y[:, t] = (h @ C_dn.T).real + D_d * u_bld[:, t]
    return y, h


def arrays(p, dtype=None):
    """p as JAX arrays, the real ones in dtype."""
    return {k: jnp.asarray(v) if np.iscomplexobj(v) else jnp.asarray(v, dtype) for k, v in p.items()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63])
def test_values(length, reverse, implementation, rng, x64):
    """The last token of a walk is a reset in one row and the first one in the other: neither is special."""
    p, reset = problem(rng, length), rng.random((2, length)) < 0.1
    reset[0, -1] = reset[1, 0] = True
    for mask in (None, reset):
        given = None if mask is None else jnp.asarray(mask)
        out = diagonal_system(**arrays(p), reset=given, reverse=reverse, implementation=implementation)
        for x, ref, label in zip(out, loop(**p, reset=mask, reverse=reverse), ("y", "last state"), strict=True):
            assert_close(x, ref, scale=length * N, label=label)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_agree_with_finite_differences_and_between_forms(reverse, rng, x64):
    """The loop's derivative along a random direction, by central differences of the NumPy oracle; then, term by
    term, the implementations."""
    p, reset = problem(rng, 20), np.arange(20)[None] == np.array([[7], [12]])
    bars = rng.normal(size=(2, 20, D)), rng.normal(size=(2, N)), rng.normal(size=(2, N))

    def score(y, last):
        return sum((bar * x).sum() for bar, x in zip(bars, (y, last.real, last.imag), strict=True))

    direction = {k: rng.normal(size=v.shape) * (1 + 0.5j if np.iscomplexobj(v) else 1) for k, v in p.items()}
    move = lambda eps: {k: p[k] + eps * direction[k] for k in p}  # noqa: E731
    value = lambda eps: score(*loop(**move(eps), reset=reset, reverse=reverse))  # noqa: E731
    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    options = dict(reset=jnp.asarray(reset), reverse=reverse)
    total = lambda q, name: score(*diagonal_system(**q, **options, implementation=name))  # noqa: E731
    grads = [jax.jit(jax.grad(total), static_argnums=1)(arrays(p), name) for name in IMPLEMENTATIONS]
    for g in grads:
        np.testing.assert_allclose(sum((g[k] * direction[k]).sum().real for k in p), slope, rtol=1e-6)
        for k in p:
            assert_close(g[k], grads[0][k], gradient=True, scale=20 * N, label=f"gradient of {k}")


def test_split_vmap_and_state_in_pieces(rng):
    p = arrays({k: v.astype(np.complex64) if np.iscomplexobj(v) else v for k, v in problem(rng, 50).items()}, "float32")
    u, state = p.pop("u_bld"), p.pop("initial_state_bn")
    run = jax.jit(lambda u, h: diagonal_system(u, initial_state_bn=h, **p))
    y, last = run(u, state)
    first, middle = run(u[:, :21], state)
    second, end = run(u[:, 21:], middle)
    assert_close(jnp.concatenate([first, second], 1), y, scale=50)
    assert_close(end, last, scale=50)
    mapped, _ = jax.vmap(run)(u[:, None], state[:, None])
    assert_close(mapped[:, 0], y, scale=50)


def test_precision(rng):
    """Products of bfloat16 tokens are of bfloat16 unless more is asked for; states, sums and other tokens are not."""
    p = {k: v.astype(np.complex64) if np.iscomplexobj(v) else v for k, v in problem(rng, 40).items()}
    p = arrays(p, "float32")
    p["u_bld"] = p["u_bld"].astype(jnp.bfloat16)
    run = jax.jit(partial(diagonal_system, implementation="xla"), static_argnames="precision")
    outputs = {how: run(**p, precision=how) for how in ("auto", "default", "high", "highest")}
    exact = run(**(p | dict(u_bld=p["u_bld"].astype(jnp.float32))))
    wide = lambda x: np.asarray(x, np.result_type(x.dtype, np.float32))  # noqa: E731
    for i, label in enumerate(("y", "last state")):
        as_auto, as_default, _, as_highest = (wide(out[i]) for out in outputs.values())
        np.testing.assert_array_equal(as_auto, as_default, err_msg=label)
        assert 1e-4 < relative(as_auto, exact[i]) < 8e-3, label
        assert relative(as_highest, exact[i]) < (1e-5 if label == "last state" else 4e-3), label
    assert outputs["auto"][0].dtype == jnp.bfloat16 and exact[0].dtype == jnp.float32
    wider = {k: np.asarray(v, np.complex128 if jnp.iscomplexobj(v) else np.float64) for k, v in p.items()}
    assert_close(exact[0], loop(**wider)[0], scale=40)


def test_wrong_input_is_named(rng, untyped):
    p = arrays(problem(rng, 5), "float32")
    for change, message in [
        (dict(D_d=p["D_d"][:2]), r"D_d has shape \(2,\)"),
        (dict(B_nd=p["B_nd"].T), r"B_nd has shape \(3, 5\); u_bld \(2, 5, 3\) and a_n \(5,\) need \(5, 3\)"),
        (dict(C_dn=p["C_dn"].real), "C_dn is float32; it must be complex"),
        (dict(initial_state_bn=p["initial_state_bn"][:1]), r"initial_state_bn has shape \(1, 5\)"),
        (dict(reset=jnp.zeros((2, 4), bool)), r"reset has shape \(2, 4\)"),
        (dict(u_bld=p["u_bld"][:, :0]), "u_bld has length 0"),
        (dict(precision="float32"), "precision is 'float32'; it may be auto, default, high, highest"),
        (dict(implementation="cuda"), "implementation is 'cuda'; it may be auto, reference, xla, gpu"),
        (dict(implementation="gpu"), "implementation 'gpu' cannot run this: the backend is cpu; 'auto' takes another"),
    ]:
        with pytest.raises(ValueError, match=message):
            diagonal_system(**(p | change))
