"""Online coefficients against projections by quadrature, which know of neither A nor B, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from ssm import hippo, online

MEASURES = ("legs", "legt", "lagt", "fout")
WEIGHTS = {
    "legs": lambda age: np.exp(-age),
    "legt": lambda age: np.full_like(age, 0.5),
    "lagt": np.ones_like,
    "fout": lambda age: np.full_like(age, 0.5),
    "scaled_legs": np.ones_like,
}
SUPPORT = {"legs": np.inf, "legt": 2, "lagt": np.inf, "fout": 2}
ORDERS = {"forward_euler": 1, "backward_euler": 1, "bilinear": 2, "zoh": 2}


def error(out, reference):
    out, reference = np.asarray(out), np.asarray(reference)
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


def quadrature(edges, nodes=12):
    """Nodes and weights of Gauss and Legendre on every interval between edges."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * x).ravel(), (half * w).ravel()


def projection(name, N, past, edges):
    """The definition: int past(age) p_n(age) w(age) d age."""
    ages, weights = quadrature(edges)
    return (past(ages) * WEIGHTS[name](ages) * weights) @ online.basis(name, N, ages)


def signal(t):
    """Of period 2, so that the window of fout sees no jump."""
    return 1 + np.sin(np.pi * t) + 0.5 * np.cos(2 * np.pi * t)


@pytest.mark.parametrize("name, oldest", [("legs", 60), ("legt", 2), ("lagt", 250), ("fout", 2), ("scaled_legs", 1)])
def test_bases_are_orthonormal(name, oldest):
    N = 12
    ages, weights = quadrature(np.linspace(0, oldest, 600))
    p = online.basis(name, N, ages)
    gram = p.T * WEIGHTS[name](ages) * weights @ p
    expected = np.eye(N)
    expected[1, 1] = name != "fout"
    np.testing.assert_allclose(gram, expected, atol=1e-12)


@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize("name", MEASURES)
def test_coefficients_converge_to_the_projection(name, rule, x64):
    """At the rule's order, with samples at the middle of each step. Fails for any wrong entry of A or B.

    legt and fout see their window through their own coefficients: the N of the one must hold the signal, and
    the T of the other its first window.
    """
    N, T = (20 if name == "legt" else 6), (40.0 if name == "fout" else 16.0)
    expected = projection(name, N, lambda age: signal(T - age), np.linspace(0, min(T, SUPPORT[name]), 200))
    errors = []
    for dt in (0.004, 0.002):
        middle = np.arange(dt / 2, T, dt)
        errors.append(error(online.project(name, signal(middle), N, dt, rule)[-1], expected))
    assert errors[1] < (2e-2 if ORDERS[rule] == 1 else 3e-5)
    assert abs(np.log2(errors[0] / errors[1]) - ORDERS[rule]) < 0.15


@pytest.mark.parametrize("name", ["legs", "lagt"])
def test_zoh_projects_a_step_function_exactly(name, x64, rng):
    """Where the ODE is exact, so is zoh for constant pieces, at every step. u_k reaches back from t_k."""
    u, dt = rng.normal(size=30), 0.17
    c = online.project(name, u, 8, dt, "zoh")
    for k in (1, 7, 30):
        newest_first = u[:k][::-1]
        expected = projection(name, 8, lambda age, v=newest_first: v[np.int64(age / dt)], np.arange(k + 1) * dt)
        assert error(c[k - 1], expected) < 1e-12


def test_zoh_projects_a_step_function_exactly_on_its_whole_past(x64, rng):
    """u_k is held from t = k to k + 1, after a unit of zeros."""
    u = rng.normal(size=40)
    c = online.project("scaled_legs", u, 12, rule="zoh")
    for k in (1, 9, 40):
        newest_first = np.append(u[:k][::-1], 0.0)
        edges = np.arange(k + 2) / (k + 1)
        expected = projection("scaled_legs", 12, lambda age, v=newest_first, k=k: v[np.int64(age * (k + 1))], edges)
        assert error(c[k - 1], expected) < 1e-12


@pytest.mark.parametrize("rule", ORDERS)
def test_scaled_legs_converges_to_the_projection_at_every_time(rule, x64):
    N, L = 6, 4000
    for share in (0.25, 1.0):
        expected = projection("scaled_legs", N, lambda a, T=share: signal(2 * T * (1 - a)), np.linspace(0, 1, 50))
        errors = []
        for length in (L, 2 * L):
            u = signal(2 * (np.arange(length) + 0.5) / length)
            c = online.project("scaled_legs", u, N, rule=rule)
            errors.append(error(c[int(share * length) - 1], expected))
        assert errors[1] < 3e-2 and errors[1] < 0.65 * errors[0]


def test_scaled_legs_has_no_timescale(x64):
    """HiPPO, Proposition 3: f(t / 5) at time 5 t has the coefficients of f at t. The warped LegS has not."""
    slow, fast = (signal(3 * (np.arange(L) + 0.5) / L) for L in (10_000, 2_000))
    for rule in ("bilinear", "zoh"):
        assert error(*(online.project("scaled_legs", u, 8, rule=rule)[-1] for u in (slow, fast))) < 5e-3
    assert error(*(online.project("legs", u, 8, 1e-3)[-1] for u in (slow, fast))) > 0.1


@pytest.mark.parametrize("N, expected", [(16, "8.4e-02"), (32, "4.5e-05"), (64, "1.5e-04")])
def test_scaled_legs_remembers_a_signal(N, expected, x64):
    """The mean squared error of sin(6 pi t) + cos(14 pi t) / 2, from its last coefficients, by bilinear.

    Sampled and reconstructed at the same L = 2000 points of [0, 1], both ends included. The figures are those
    of an independent dense loop in NumPy.
    """
    t = np.linspace(0, 1, 2000)
    f = np.sin(6 * np.pi * t) + np.cos(14 * np.pi * t) / 2
    c = online.project("scaled_legs", f, N)[-1]
    assert f"{np.mean((online.reconstruct('scaled_legs', c, 1 - t) - f) ** 2):.1e}" == expected


@pytest.mark.parametrize("rule", ORDERS)
def test_scaled_legs_is_the_dense_recurrence(rule, x64, rng):
    """HiPPO's formulas as they stand, by NumPy. Fails for a lower triangle read as the upper one."""
    u, (A, B), I = rng.normal(size=25), hippo.measure("legs", 7), np.eye(7)
    c, x = online.project("scaled_legs", u, 7, rule=rule), np.zeros(7)
    for k in range(1, 26):
        w = {"forward_euler": 0, "bilinear": 0.5}.get(rule, 1)
        inverse = np.linalg.inv(I - w * A / k)
        A_bar, B_bar = inverse @ (I + (1 - w) * A / k), inverse @ B / k
        if rule == "zoh":
            A_bar = expm(A * np.log((k + 1) / k))
            B_bar = np.linalg.solve(A, A_bar @ B - B)
        x = A_bar @ x + B_bar * u[k - 1]
        assert error(c[k - 1], x) < 1e-11


@pytest.mark.parametrize(
    "name, oldest, bound", [("legs", 3, 0.05), ("legt", 2, 3e-4), ("lagt", 12, 2e-3), ("fout", 2, 3e-4)]
)
def test_reconstruction_is_the_past(name, oldest, bound, x64):
    """By age: a past that is reversed, or scaled, is another one. lagt needs one that has come to rest."""
    T, dt = 40.0, 0.005
    past = (lambda age: np.exp(-((age - 5) ** 2) / 8)) if name == "lagt" else (lambda age: signal(T - age))
    c = online.project(name, past(T - np.arange(dt / 2, T, dt)), 24, dt)[-1]
    ages = np.linspace(0, oldest, 101)
    assert error(online.reconstruct(name, c, ages), past(ages)) < bound


def test_reconstruct_carries_leading_axes_and_leaves_nan_outside(rng):
    c, ages = rng.normal(size=(3, 2, 4)), np.array([-0.1, 0.0, 1.0, 2.0, 2.1])
    out = online.reconstruct("legt", c, ages)
    assert np.isnan(out[..., [0, 4]]).all()
    np.testing.assert_allclose(
        out[1, 1, 3], c[1, 1] @ np.sqrt([1, 3, 5, 7]) * 1 - 2 * c[1, 1, [1, 3]] @ np.sqrt([3, 7])
    )


def test_float32_is_float64_rounded(x64):
    """An error of float32's size x sqrt of the 2000 steps, by 64 coefficients."""
    u = signal(np.linspace(0, 4, 2000))
    for name, dt in [("scaled_legs", None), ("legs", 1e-3), ("legt", 1e-3)]:
        exact = online.project(name, u, 64, dt)
        rounded = online.project(name, u.astype(np.float32), 64, dt)
        assert rounded.dtype == jnp.float32 and error(rounded, exact) < 2e-6 * np.sqrt(2000)
        ages = np.linspace(0, 1, 9)
        past = online.reconstruct(name, rounded[-1], ages)
        assert past.dtype == jnp.float32 and error(past, online.reconstruct(name, exact[-1], ages)) < 1e-3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda u: online.project("leg", u, 4, 0.1), "unknown measure 'leg'; did you mean"),
        (lambda u: online.project("legt", u, 4), "dt is missing: measure 'legt' has a timescale"),
        (lambda u: online.project("legs", u, 4, 0.1, "zho"), "unknown rule 'zho'; did you mean 'zoh'"),
        (
            lambda u: online.project("legs", u, 4, 0.1, "dirac"),
            "'dirac' is not one that an online projection",
        ),
        (
            lambda u: online.basis("scaled_leg", 4, u),
            "unknown measure 'scaled_leg'; did you mean 'scaled_legs'",
        ),
    ],
)
def test_errors_name_the_field(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros(3, np.float32))
