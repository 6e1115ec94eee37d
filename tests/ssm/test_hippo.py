"""The matrices of HiPPO against closed forms, dense linear algebra and the matrix exponential, in float64."""

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from ssm import hippo

SHIFT = {"legs": -0.5, "legt": 0, "lagt": 0, "fout": 0}


def error(out, reference):
    return np.linalg.norm(out - reference) / np.linalg.norm(reference)


def hippo_n(N):
    """S5, eq. (11): entry by entry."""
    entry = [[np.sqrt((n + 0.5) * (k + 0.5)) * np.sign(k - n) for k in range(N)] for n in range(N)]
    return np.array(entry) - np.eye(N) / 2


def both_halves(kept, axis=-1):
    return np.concatenate([kept, kept.conj()], axis)


def test_small_matrices_as_the_papers_print_them():
    """Fails for a transposed matrix, a lost minus sign, and a window of another length."""
    s3, s5, s2, pi = np.sqrt(3), np.sqrt(5), np.sqrt(2), np.pi
    legs = -np.array([[1, 0, 0], [s3, 2, 0], [s5, s3 * s5, 3]])
    legt = -np.array([[1, -s3, s5], [s3, 3, -s3 * s5], [s5, s3 * s5, 5]]) / 2
    lagt = -np.array([[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]])
    fout = np.array([[-1, 0, -s2, 0], [0, 0, 0, 0], [-s2, 0, -2, -pi], [0, 0, pi, 0]])
    for name, A, B in [
        ("legs", legs, [1, s3, s5]),
        ("legt", legt, [0.5, s3 / 2, s5 / 2]),
        ("lagt", lagt, [1, 1, 1]),
        ("fout", fout, [1, 0, s2, 0]),
    ]:
        np.testing.assert_allclose(hippo.measure(name, len(B))[0], A, rtol=1e-15, err_msg=name)
        np.testing.assert_allclose(hippo.measure(name, len(B))[1], B, rtol=1e-15, err_msg=name)


@pytest.mark.parametrize("N", [2, 16, 64])
@pytest.mark.parametrize("name", SHIFT)
def test_nplr_is_normal_plus_low_rank(name, N):
    A, P, B = hippo.nplr(name, N)
    normal = A + P @ P.T
    assert np.max(np.abs(normal + normal.T - 2 * SHIFT[name] * np.eye(N))) < 1e-12 * np.max(np.abs(A))
    assert P.shape[1] == np.linalg.matrix_rank(P) == min(1 + (name == "legt"), N)
    assert all((x == y).all() for x, y in zip((A, B), hippo.measure(name, N), strict=True))


@pytest.mark.parametrize("N", [2, 6, 16, 64])
@pytest.mark.parametrize("name", SHIFT)
def test_dplr_reassembles(name, N):
    """Fails where the double eigenvalue 0 of fout is not given a pair of its own: V is then not unitary."""
    A, P, B = hippo.nplr(name, N)
    Lambda, P_kept, B_kept, V_kept = hippo.dplr(name, N)
    V, rank = both_halves(V_kept), P.shape[1]
    P_full, B_full = both_halves(P_kept, axis=0), both_halves(B_kept)
    assert np.linalg.norm(V.conj().T @ V - np.eye(N)) < 1e-12 * N
    assert error(V @ (np.diag(both_halves(Lambda)) - P_full @ P_full.conj().T) @ V.conj().T, A) < 1e-11
    assert error(V @ P_full, P) < 1e-12 and error(V @ B_full, B) < 1e-12
    Q = 2 * (V_kept @ P_kept).real
    assert error(2 * (V_kept * Lambda @ V_kept.conj().T).real - Q @ Q.T, A) < 1e-11 and Q.shape == (N, rank)


@pytest.mark.parametrize("name", SHIFT)
def test_kept_eigenvalues_are_the_upper_half_in_ascending_order(name):
    A, P, _ = hippo.nplr(name, 32)
    dense = np.sort(np.linalg.eigvals(A + P @ P.T).imag)[16:]
    Lambda = hippo.dplr(name, 32).Lambda
    np.testing.assert_allclose(Lambda.imag, dense, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(Lambda.real, SHIFT[name], atol=1e-13)
    assert (np.diff(Lambda.imag) > 0).all() and Lambda.imag[0] >= 0


def test_dplr_has_the_eigenvalues_of_legs():
    """Those of the triangular matrix, -1 ... -N; they are ill-conditioned, hence the small N."""
    Lambda, P, _, _ = hippo.dplr("legs", 8)
    P = both_halves(P, axis=0)
    eigenvalues = np.linalg.eigvals(np.diag(both_halves(Lambda)) - P @ P.conj().T)
    np.testing.assert_allclose(np.sort(eigenvalues.real), -np.arange(8, 0, -1), rtol=1e-8)


@pytest.mark.parametrize("name", SHIFT)
def test_kept_half_of_dplr_has_the_transfer_function(name, rng):
    """C (s - A)^-1 B for a real C, by Woodbury on Cauchy sums over the kept half (S4, Lemma C.3)."""
    N = 32
    A, B = hippo.measure(name, N)
    C = rng.normal(size=N)
    Lambda, P, B_kept, V = hippo.dplr(name, N)
    C_kept = C @ V

    for s in [0.1, 1 + 3j, 0.5 - 40j, 5j]:

        def cauchy(left, right, s=s):
            upper = left.T / (s - Lambda) @ right
            return upper + left.conj().T / (s - Lambda.conj()) @ right.conj()

        correction = np.linalg.solve(np.eye(P.shape[1]) + cauchy(P.conj(), P), cauchy(P.conj(), B_kept))
        kept = cauchy(C_kept, B_kept) - cauchy(C_kept, P) @ correction
        assert error(kept, C @ np.linalg.solve(s * np.eye(N) - A, B)) < 1e-11


def test_phases_make_B_real_and_positive():
    """Otherwise an initialisation depends on the eigensolver at hand."""
    for name in SHIFT:
        B = hippo.dplr(name, 16).B
        assert np.max(np.abs(B.imag)) < 1e-13 and np.min(B.real) > 1e-3


def test_diagonals_are_the_closed_forms():
    pi = np.pi
    np.testing.assert_allclose(hippo.diagonal("lin", 6), [-0.5, -0.5 + 1j * pi, -0.5 + 2j * pi], rtol=1e-15)
    np.testing.assert_allclose(hippo.diagonal("inv", 4), [-0.5 + 12j / pi, -0.5 + 4j / (3 * pi)], rtol=1e-15)
    np.testing.assert_array_equal(hippo.diagonal("real", 3), [-1, -2, -3])
    assert hippo.diagonal("real", 3).dtype == np.float64
    dense = np.linalg.eigvals(hippo_n(32))
    dense = dense[dense.imag > 0]
    assert error(hippo.diagonal("legs", 32), dense[np.argsort(dense.imag)]) < 1e-12


def test_inv_follows_the_fastest_eigenvalue_of_legs():
    """S4D: both grow as N^2 / pi. Fails for N / 2 in place of N, or for 2n in place of 2n + 1."""
    for N in (64, 256):
        fastest = hippo.diagonal("legs", N).imag[-1]
        assert abs(hippo.diagonal("inv", N).imag[0] / fastest - 1) < 2 / N


@pytest.mark.parametrize("P, J", [(4, 1), (16, 2), (24, 4), (64, 8)])
def test_blocks_are_hippo_n(P, J, rng):
    """2 Re(V diag V^-1) is J copies of HiPPO-N, and so is the impulse response, for a real B and C."""
    Lambda, V, V_inverse = hippo.block_diagonal_hippo_n(P, J)
    dense = scipy.linalg.block_diag(*[hippo_n(P // J)] * J)
    assert Lambda.shape == (P // 2,)
    assert error(both_halves(V) * both_halves(Lambda) @ both_halves(V_inverse, axis=0), dense) < 1e-12
    assert np.linalg.norm(V_inverse @ V - np.eye(P // 2)) < 1e-12
    B, C = rng.normal(size=(P, 3)), rng.normal(size=(2, P))
    for t in (0.0, 0.1, 1.7):
        impulse = 2 * (C @ V * np.exp(Lambda * t) @ (V_inverse @ B)).real
        assert error(impulse, C @ scipy.linalg.expm(dense * t) @ B) < 1e-11


@pytest.mark.parametrize("r_min, r_max, max_phase", [(0.0, 1.0, 2 * np.pi), (0.4, 0.9, np.pi / 10)])
def test_ring_is_uniform_by_area(r_min, r_max, max_phase):
    """Fails for a radius that is uniform, and for a phase or modulus drawn from the same numbers."""
    nu_log, theta_log = hippo.ring(jax.random.key(1), 20_000, r_min, r_max, max_phase)
    assert nu_log.dtype == theta_log.dtype == np.float32
    assert np.isfinite(nu_log).all() and np.isfinite(theta_log).all()
    modulus, phase = np.exp(-np.exp(np.float64(nu_log))), np.exp(np.float64(theta_log))
    assert r_min <= modulus.min() + 1e-6 and modulus.max() <= r_max + 1e-6 and phase.max() <= max_phase * (1 + 1e-6)
    area = (modulus**2 - r_min**2) / (r_max**2 - r_min**2)
    assert scipy.stats.kstest(area, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(phase / max_phase, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(area, phase)[0, 1]) < 0.03


def test_ring_stays_finite():
    """On a circle, at the centre, and where a uniform draw is 0: this key draws one for a phase."""
    _, theta_log = hippo.ring(jax.random.key(8), 2**21)
    assert np.isfinite(theta_log).all()
    for r in (0.0, 0.99, 1.0):
        nu_log, _ = hippo.ring(jax.random.key(0), 4, r, r)
        assert np.isfinite(nu_log).all()
        np.testing.assert_allclose(np.exp(-np.exp(nu_log)), r, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hippo.measure("leg", 4), "unknown measure 'leg'; did you mean 'leg[st]'"),
        (lambda: hippo.nplr("fourier", 4), "unknown measure 'fourier'.*fout, lagt, legs, legt"),
        (lambda: hippo.diagonal("linear", 4), "unknown diagonal initialisation 'linear'; did you mean 'lin'"),
        (lambda: hippo.dplr("legs", 5), "state_size must be even and positive.* got 5"),
        (lambda: hippo.measure("fout", 5), "state_size must be even and positive.* got 5"),
        (lambda: hippo.diagonal("inv", 0), "state_size must be even and positive.* got 0"),
        (lambda: hippo.block_diagonal_hippo_n(20, 4), "state_size must be a positive multiple of 2 x blocks"),
        (lambda: hippo.block_diagonal_hippo_n(8, 0), "got 8 for blocks 0"),
        (lambda: hippo.ring(jax.random.key(0), 4, 0.9, 0.5), "r_min and r_max must .* got 0.9 and 0.5"),
        (lambda: hippo.ring(jax.random.key(0), 4, 0.9, 1.5), "r_min and r_max must .* got 0.9 and 1.5"),
        (lambda: hippo.ring(jax.random.key(0), 4, max_phase=7.0), "max_phase must lie in .* got 7.0"),
    ],
)
def test_errors_name_the_field(call, message):
    with pytest.raises(ValueError, match=message):
        call()
