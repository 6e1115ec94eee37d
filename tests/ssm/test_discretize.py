"""Every rule against scipy's matrix exponential in float64: values, orders of convergence, gradients at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ssm.discretize import RATIONAL_RULES, RULES, discretize, discretize_dense, first_order, phi1, rational_weight
from tests.oracles import assert_close, dense_rule

ORDER_FREE = {"forward_euler": 1, "backward_euler": 1, "bilinear": 2, "generalized_bilinear": 2}
ORDER_CONSTANT = {
    "forward_euler": 1, "backward_euler": 1, "bilinear": 2, "generalized_bilinear": 2, "exponential_euler": 1,
    "exponential_trapezoidal": 2,
}  # fmt: skip
ORDER_SMOOTH = {"zoh": 1, "bilinear": 1, "backward_euler": 1, "exponential_euler": 1, "exponential_trapezoidal": 2}


def system(rng, n=4):
    """A stable dense A with complex eigenvalues, and its diagonal form."""
    Lambda = -0.3 - rng.random(n) + 1j * rng.normal(size=n) * 3
    V = rng.normal(size=(n, n)) + 1j * rng.normal(size=(n, n))
    return V @ np.diag(Lambda) @ np.linalg.inv(V), Lambda, V


def slope(errors, steps):
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("rule", RULES)
def test_dense_and_diagonal_are_the_definition(rule, rng, x64):
    A, Lambda, V = system(rng)
    w = 0.3 if RULES[rule].weight is None else None
    expected = dense_rule(rule, A, 0.2, 0.3)
    dense = discretize_dense(rule, jnp.asarray(A), 0.2, weight=w)
    diagonal = discretize(rule, jnp.asarray(Lambda), jnp.full(4, 0.2), weight=w)
    for name, out, elements, ref in zip(dense._fields, dense, diagonal, expected, strict=True):
        assert_close(out, ref, label=name, scale=30)
        assert_close(V @ np.diag(elements) @ np.linalg.inv(V), ref, label=f"diagonal {name}", scale=30)


@pytest.mark.parametrize("rule", RULES)
def test_order_of_the_decay(rule, rng, x64):
    """Exponential rules are exact; the rational ones converge with their order: a bilinear at w = 0.4 would give 1."""
    A, *_ = system(rng)
    steps = 2.0 ** -np.arange(4, 9)
    exact = scipy.linalg.expm(A)
    errors = [
        np.linalg.norm(np.linalg.matrix_power(discretize_dense(rule, jnp.asarray(A), dt).decay, round(1 / dt)) - exact)
        for dt in steps
    ]
    if rule in ORDER_FREE:
        assert abs(slope(errors, steps) - ORDER_FREE[rule]) < 0.15
    else:
        assert max(errors) < 1e-11


def forced(rule, A, B, u, dt):
    decay, previous, current = (np.asarray(c) for c in discretize_dense(rule, jnp.asarray(A), dt))
    h = np.zeros(len(A), complex)
    for k in range(1, round(1 / dt) + 1):
        h = decay @ h + previous @ B * u((k - 1) * dt) + current @ B * u(k * dt)
    return h


def response(A, B, u):
    """x(1) by Gauss-Legendre quadrature of the variation of constants: nothing of ours in it."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t = (nodes + 1) / 2
    return sum(w / 2 * scipy.linalg.expm(A * (1 - s)) @ B * u(s) for s, w in zip(t, weights, strict=True))


RESPONSES = [("constant", *item) for item in ORDER_CONSTANT.items()] + [
    ("smooth", *item) for item in ORDER_SMOOTH.items()
]


@pytest.mark.parametrize(("kind", "rule", "order"), RESPONSES)
def test_order_of_the_response(kind, rule, order, rng, x64):
    """Only Mamba-3's rule is of second order for input that moves; zoh is exact for input that does not."""
    A, *_ = system(rng)
    B, u = rng.normal(size=4), (lambda t: 1.0) if kind == "constant" else (lambda t: np.sin(5 * t) + t)
    steps = 2.0 ** -np.arange(5, 10)
    exact = response(A, B, u)
    errors = [np.linalg.norm(forced(rule, A, B, u, dt) - exact) for dt in steps]
    assert abs(slope(errors, steps) - order) < 0.2


def test_zoh_is_exact_for_constant_input_and_a_singular_matrix(rng, x64):
    A, *_ = system(rng)
    B = rng.normal(size=4)
    assert_close(forced("zoh", A, B, lambda t: 1.0, 0.25), response(A, B, lambda t: 1.0), scale=100)
    assert_close(discretize_dense("zoh", jnp.zeros((3, 3)), 0.5).current, 0.5 * np.eye(3))


EDGES = [0.0, 1e-12, -1e-12, 1e-4, -0.4999, -0.5001, -1.0, -50.0, -300.0, 1e-12j, -0.3 + 40j, -300 + 1j, 0.49j, 0.51j]


def taylor_phi1(z):
    """(e^z - 1)/z and its derivative in 40 digits' worth of longdouble series, or directly where |z| is large."""
    z = np.clongdouble(z)
    if abs(z) > 5:
        return (np.exp(z) - 1) / z, (np.exp(z) * (z - 1) + 1) / z**2
    terms = [np.clongdouble(1)]
    for k in range(2, 80):
        terms.append(terms[-1] * z / k)
    derivative = sum(np.clongdouble(k - 1) / k * t for k, t in zip(range(2, 80), terms, strict=False))
    return sum(terms), derivative


@pytest.mark.parametrize("z", EDGES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_phi1_and_its_gradient(z, dtype, x64):
    """The naive quotient is 0/0 at 0, and its derivative has lost all of float32 at 1e-4."""
    kind = jnp.complex64 if dtype == jnp.float32 else jnp.complex128
    point = jnp.asarray(z, kind if isinstance(z, complex) else dtype)
    value, slope = taylor_phi1(complex(point))
    bound = dict(rtol=3e-6) if dtype == jnp.float32 else dict(rtol=1e-13)
    np.testing.assert_allclose(complex(phi1(point)), complex(value), **bound)
    gradient = jax.grad(phi1, holomorphic=isinstance(z, complex))(point)
    np.testing.assert_allclose(complex(gradient), complex(slope), **(bound | dict(atol=1e-37)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("z", [0j, 1e-12 + 0j, -300 + 0j, -300 + 40j, -1e-12 + 1e-12j])
def test_values_and_gradients_are_finite(rule, z):
    def total(real, imag, dt):
        parts = first_order(discretize(rule, jax.lax.complex(real, imag), dt))
        return sum(part.real + part.imag for part in parts)

    arguments = jnp.float32(10 * z.real), jnp.float32(10 * z.imag), jnp.float32(0.1)
    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*arguments)
    assert np.isfinite(value) and np.all(np.isfinite(gradients))


@pytest.mark.parametrize("rule", RULES)
def test_first_order_is_the_same_recurrence(rule, rng, x64):
    """Folding `previous` away changes the states and not the output, through the feedthrough."""
    A = jnp.asarray(-rng.random(3) + 1j * rng.normal(size=3))
    coefficients = discretize(rule, A, jnp.full(3, 0.1))
    decay, gain, feedthrough = (np.asarray(x) for x in first_order(coefficients))
    coefficients = jax.tree.map(np.asarray, coefficients)
    h = folded = np.zeros(3, complex)
    before = 0.0
    for v in rng.normal(size=20):
        h = coefficients.decay * h + coefficients.previous * before + coefficients.current * v
        folded = decay * folded + gain * v
        before = v
        assert_close(folded + feedthrough * v, h, scale=10)


@pytest.mark.parametrize("rule", RATIONAL_RULES)
def test_the_weight_gives_the_transfer_function(rule, rng, x64):
    A, *_ = system(rng)
    Abar, _, Bbar = dense_rule(rule, A, 0.2)
    for z in (-1.0, 1j, np.exp(0.3j), 1.0):
        w = rational_weight(rule)
        expected = np.linalg.solve(np.eye(4) - z * Abar, Bbar)
        assert_close(0.2 * np.linalg.inv((1 - z) * np.eye(4) - (w + (1 - w) * z) * 0.2 * A), expected, scale=100)


def test_names_and_weights_are_checked():
    with pytest.raises(ValueError, match="unknown rule 'zho'; did you mean 'zoh'"):
        discretize("zho", jnp.zeros(1), jnp.ones(1))
    with pytest.raises(ValueError, match="weight is fixed by rule 'zoh'"):
        discretize("zoh", jnp.zeros(1), jnp.ones(1), weight=0.5)
    with pytest.raises(ValueError, match="rule 'zoh' is not one that Woodbury's identity can take. Allowed"):
        rational_weight("zoh")
