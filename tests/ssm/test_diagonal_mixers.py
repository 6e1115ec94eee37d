"""S4D, DSS, S5 and LRU against dense float64 loops whose matrices come from scipy, for every rule they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ssm.discretize import RULES
from ssm.mixers import dss, lru, mixer, s4d, s5
from tests.oracles import assert_close, dense_rule, dense_ssm, with_conjugates

D, N, LENGTH = 2, 3, 33
WEIGHT = 0.3
FORMS = ("recurrent", "parallel", "chunked")


def weight(rule):
    return WEIGHT if RULES[rule].weight is None else None


def eigenvalues(rng, *shape):
    return -0.1 - rng.random(shape) + 1j * rng.normal(size=shape) * 3


def normal(rng, *shape):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def paired(A):
    """A dense real-system matrix of kept conjugate halves."""
    return np.diag(with_conjugates(A))


def s4d_loop(u, A, B, C, skip, dt, rule, h=None):
    """One dense system a channel; the state is given and returned in the kept halves."""
    y, last = np.zeros(u.shape), np.zeros((len(u), *A.shape), complex)
    for i, d in np.ndindex(len(u), u.shape[2]):
        b, c = with_conjugates(B[d])[:, None], with_conjugates(C[d])[None]
        start = None if h is None else with_conjugates(h[i, d])
        discrete = dense_rule(rule, paired(A[d]), dt[d], WEIGHT)
        out, end = dense_ssm(*discrete, b, c, skip[d] * np.eye(1), u[i, :, d, None], start)
        assert np.abs(out.imag).max() < 1e-12 * np.abs(out).max()
        y[i, :, d], last[i, d] = out[:, 0].real, end[: A.shape[1]]
    return y, last


def s4d_arguments(rng):
    A = eigenvalues(rng, D, N)
    return dict(A=A, B=normal(rng, D, N), C=normal(rng, D, N), skip=rng.normal(size=D), dt=rng.uniform(0.05, 0.3, D))


def s4d_system(p, rule):
    A, B, C, skip, dt = (jnp.asarray(p[k]) for k in ("A", "B", "C", "skip", "dt"))
    return s4d.discrete(A, B, C, skip, dt, rule=rule, weight=weight(rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_s4d_is_the_dense_loop(form, rule, rng, x64):
    p, u = s4d_arguments(rng), rng.normal(size=(2, LENGTH, D))
    y, state = s4d.FORMS[form](jnp.asarray(u), s4d_system(p, rule))
    expected, last = s4d_loop(u, **p, rule=rule)
    assert_close(y, expected, scale=LENGTH * N)
    if RULES[rule].weight is not None or rule == "generalized_bilinear":  # folded states differ in the eighth rule
        assert_close(state.h_bdn, last, scale=LENGTH * N)


@pytest.mark.parametrize("form", FORMS)
def test_s4d_starts_from_a_state(form, rng, x64):
    p, u, h = s4d_arguments(rng), rng.normal(size=(2, LENGTH, D)), normal(rng, 2, D, N)
    y, state = s4d.FORMS[form](jnp.asarray(u), s4d_system(p, "zoh"), s4d.State(jnp.asarray(h)))
    expected, last = s4d_loop(u, **p, rule="zoh", h=h)
    assert_close(y, expected, scale=LENGTH * N)
    assert_close(state.h_bdn, last, scale=LENGTH * N)


@pytest.mark.parametrize("rule", RULES)
def test_s4d_gradients_by_differences_of_the_loop(rule, rng, x64):
    """Along one random direction in all parameters at once; the forms' gradients then agree term by term."""
    p, u = s4d_arguments(rng), rng.normal(size=(1, 12, D))
    direction = {k: normal(rng, *v.shape) if np.iscomplexobj(v) else rng.normal(size=v.shape) for k, v in p.items()}
    bar = rng.normal(size=u.shape)
    at = lambda eps: np.sum(bar * s4d_loop(u, **{k: p[k] + eps * direction[k] for k in p}, rule=rule)[0])  # noqa: E731
    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    grads = {}
    for form in FORMS:
        total = lambda p: jnp.sum(bar * s4d.FORMS[form](jnp.asarray(u), s4d_system(p, rule))[0])  # noqa: B023, E731
        grads[form] = jax.jit(jax.grad(total))({k: jnp.asarray(v) for k, v in p.items()})
        along = sum(np.sum(np.asarray(grads[form][k]) * direction[k]).real for k in p)
        np.testing.assert_allclose(along, slope, rtol=1e-6)
    for form in ("parallel", "chunked"):
        for k in p:
            assert_close(grads[form][k], grads["recurrent"][k], gradient=True, scale=LENGTH * N, label=f"{form} {k}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_s5_is_the_dense_loop(form, rule, rng, x64):
    """All channels share one state: a dense MIMO system of the completed pairs."""
    A, B, C, skip, dt = eigenvalues(rng, N), normal(rng, N, D), normal(rng, D, N), rng.normal(size=D), rng.random(N) / 5
    u = rng.normal(size=(2, LENGTH, D))
    arrays = (jnp.asarray(x) for x in (A, B, C, skip, dt))
    system = s5.discrete(*arrays, rule=rule, weight=weight(rule))
    y, _ = getattr(s5, form)(jnp.asarray(u), system)
    single = [dense_rule(rule, np.diag([a, np.conj(a)]), step, WEIGHT) for a, step in zip(A, dt, strict=True)]
    discrete = [scipy.linalg.block_diag(*parts) for parts in zip(*single, strict=True)]
    order = np.arange(2 * N).reshape(2, N).T.reshape(-1)
    b, c = with_conjugates(B, 0)[order], with_conjugates(C)[:, order]
    for row in range(2):
        expected, _ = dense_ssm(*discrete, b, c, np.diag(skip), u[row])
        assert_close(y[row], expected.real, scale=LENGTH * N)


@pytest.mark.parametrize("rule", lru.RULES)
def test_lru_is_the_papers_recurrence(rule, rng):
    """In the layer's own parameters: x_k = lambda x_{k-1} + exp(gamma) B u_k, where B enters as the rule says."""
    module = mixer("lru", D, dict(state_size=N, rule=rule, weight=weight(rule), r_min=0.2, r_max=0.99))
    u = rng.normal(size=(1, LENGTH, D))
    variables = jax.jit(module.init)(jax.random.key(0), jnp.asarray(u, jnp.float32))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    A = -np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"])
    gain = np.exp(p["gamma_log"])[:, None] * (p["B"]["real"] + 1j * p["B"]["imag"])
    np.testing.assert_allclose(np.exp(p["gamma_log"]), np.sqrt(1 - np.abs(np.exp(A)) ** 2), rtol=1e-4)
    C = p["C"]["real"] + 1j * p["C"]["imag"]
    decay, previous, current = dense_rule(rule, np.diag(A), 1.0, WEIGHT)
    expected, _ = dense_ssm(decay, previous, current, gain, C, np.diag(p["D"]), u[0])
    y, _ = jax.jit(module.apply)(variables, jnp.asarray(u, jnp.float32))
    assert_close(y[0], expected.real, scale=LENGTH * N)


@pytest.mark.parametrize("kernel", dss.KERNELS)
def test_dss_is_the_papers_kernel(kernel, rng):
    """Proposition 1, summed directly: the softmax over a row of L powers, or the plain exponentials."""
    module = mixer("dss", D, dict(state_size=N, kernel=kernel, length=LENGTH))
    u = rng.normal(size=(1, LENGTH, D))
    variables = jax.jit(module.init)(jax.random.key(0), jnp.asarray(u, jnp.float32))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    Lambda = -np.exp(p["A_log"]) + 1j * p["A_imag"]
    z = np.exp(p["log_dt"])[:, None] * Lambda
    rows = np.exp(z[..., None] * np.arange(LENGTH))
    scale = 1 / (Lambda * rows.sum(-1)) if kernel == "softmax" else (np.exp(z) - 1) / Lambda
    W = p["W"]["real"] + 1j * p["W"]["imag"]
    K = np.einsum("dn,dnl->dl", W * scale, rows).real
    expected = np.stack([np.convolve(u[0, :, d], K[d])[:LENGTH] + p["D"][d] * u[0, :, d] for d in range(D)], -1)
    y, _ = jax.jit(module.apply)(variables, jnp.asarray(u, jnp.float32))
    assert_close(y[0], expected, scale=LENGTH * N)


def test_strong_and_absent_decay(rng):
    """dt A from 0 to -300 in one layer: finite values and gradients, and no decay really keeps everything."""
    A = jnp.asarray([[0, -1e-12, -300, -1e5]], jnp.complex64)
    ones = jnp.ones_like(A)

    def run(A_real, form):
        system = s4d.discrete(jax.lax.complex(A_real, A.imag), ones, ones, jnp.zeros(1), jnp.ones(1))
        return s4d.FORMS[form](jnp.ones((1, 200, 1)), system)

    for form in FORMS:
        y, state = jax.jit(run, static_argnums=1)(A.real, form)
        np.testing.assert_allclose(state.h_bdn[0, 0, :2], 200, rtol=1e-5)
        grad = jax.jit(jax.grad(lambda a: jnp.sum(run(a, form)[0])))(A.real)  # noqa: B023
        assert np.all(np.isfinite(y)) and np.all(np.isfinite(grad))
