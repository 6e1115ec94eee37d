r"""HiPPO: from a measure on the past to the matrices of a state space model, and the forms it is computed in.

A measure w weighs the past of a signal u by age; p_0, p_1, ... are orthonormal functions of age under w.
The coefficients of the past,

    x_n(t) = int u(t - age) p_n(age) w(age) d age ,

obey x' = A x + B u (HiPPO, Theorem 1; "How to Train Your HiPPO" for the time-invariant LegS and for FouT):

| name | w(age)        | p_n(age)                                                    |
|------|---------------|-------------------------------------------------------------|
| legs | e^{-age}      | sqrt(2n+1) P_n(2 e^{-age} - 1), Legendre, warped            |
| legt | 1/2 on [0, 2] | sqrt(2n+1) P_n(1 - age), Legendre                           |
| fout | 1/2 on [0, 2] | 1, 0, and sqrt2 cos(pi k age), sqrt2 sin(pi k age) in pairs |
| lagt | 1 on [0, inf) | e^{-age/2} L_n(age), Laguerre                               |

This is exact for legs and lagt. legt and fout read the value that leaves their window, u(t - 2), off their
own coefficients, and are exact where N of them hold the signal.

The windows are 2 units of time long, as in S4: their mean age is then 1, as that of legs is, and one range of
step sizes serves all. LegS with A/t and B/t in place of A and B is the original, time-varying HiPPO-LegS,
whose measure is uniform on the whole past (Theorem 2); `ssm.online` has it.

All matrices are float64 NumPy arrays: they initialise parameters, once, on the host. Of every pair of complex
conjugates the one with Im >= 0 is kept, in ascending order of Im; the real output is y = 2 Re(C z).

Gu et al. 2020 [HiPPO]; Gu et al. 2022 [S4]; Gu et al. 2022 [S4D]; Gu et al. 2023 [How to Train Your HiPPO];
Smith et al. 2023 [S5]; Orvieto et al. 2023 [LRU].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Complex, Float, Inexact, PRNGKeyArray

from ssm.naming import unknown


def _legs(N):
    n = np.arange(N)
    scale = np.sqrt(2 * n + 1)
    A = -np.tril(np.outer(scale, scale), -1) - np.diag(n + 1.0)
    return A, scale[:, None] / np.sqrt(2), scale


def _legt(N):
    n = np.arange(N)
    scale = np.sqrt(2 * n + 1)
    sign = np.where(n[:, None] >= n, 1, (-1.0) ** (n[:, None] - n))
    parity = np.stack([n % 2 == 0, n % 2 == 1], axis=1)
    return -np.outer(scale, scale) * sign / 2, scale[:, None] * parity / np.sqrt(2), scale / 2


def _lagt(N):
    return np.eye(N) / 2 - np.tril(np.ones((N, N))), np.full((N, 1), np.sqrt(0.5)), np.ones(N)


def _fout(N):
    """Index 1 is sin(0): a state that is always zero, there so that every frequency has its pair."""
    _pairs(N)
    frequency = np.where(np.arange(N - 1) % 2 == 0, np.pi * (np.arange(N - 1) // 2), 0)
    B = np.where(np.arange(N) % 2 == 0, np.sqrt(2), 0)
    B[0] = 1
    return np.diag(frequency, -1) - np.diag(frequency, 1) - np.outer(B, B), B[:, None], B


MEASURES = {"legs": _legs, "legt": _legt, "lagt": _lagt, "fout": _fout}


def _matrices(name, N):
    if name not in MEASURES:
        raise unknown("measure", name, MEASURES)
    return MEASURES[name](N)


def _pairs(state_size):
    if state_size < 2 or state_size % 2:
        raise ValueError(f"state_size must be even and positive, for conjugate pairs; got {state_size}")
    return state_size // 2


def measure(name: str, N: int) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"]]:
    """(A, B) of x' = A x + B u for the measure "legs", "legt", "lagt" or "fout" (table of the module).

    HiPPO, Theorems 1 and 2; "legs" is S4, eq. (2). Raises ValueError for an unknown measure, and for an odd
    state_size of "fout".

    >>> A, B = measure("legs", 64)
    """
    A, _, B = _matrices(name, N)
    return A, B


def nplr(name: str, N: int) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n r"], Float[np.ndarray, " n"]]:
    """(A, P, B) with A + P P^T = c I + skew-symmetric: normal plus low rank (S4, Theorem 1).

    c is -1/2 for "legs" and 0 for the others; the rank r is 2 for "legt" and 1 for the others.
    Raises as `measure`.
    """
    return _matrices(name, N)


class DPLR(NamedTuple):
    """The kept half of A = V (Lambda - P P^*) V^*, where V is N x N, unitary, and in conjugate pairs.

    P and B are those of `nplr` in the basis V, and a real output C becomes C V. In the kept half,
    A = 2 Re(V Lambda V^*) - Q Q^T with Q = 2 Re(V P), and Q is the P of `nplr`.
    """

    Lambda: Complex[np.ndarray, " n"]
    P: Complex[np.ndarray, "n r"]
    B: Complex[np.ndarray, " n"]
    V: Complex[np.ndarray, "N n"]


def dplr(name: str, N: int) -> DPLR:
    """The diagonal plus low-rank form of a measure's A and B, N / 2 conjugate pairs of it (S4, Theorem 1).

    The phase of every eigenvector, which nothing determines, is chosen such that B is real and not negative.
    Raises as `measure`, and ValueError for an odd state_size.
    """
    A, P, B = _matrices(name, N)
    Lambda, V = _normal_pairs(A + P @ P.T, B)
    return DPLR(Lambda, V.conj().T @ P, V.conj().T @ B, V)


def _normal_pairs(normal, B):
    """The kept half of the eigenpairs of c I + skew: by eigh, since eig loses digits of a normal matrix."""
    half = _pairs(len(normal))
    imag, V = np.linalg.eigh(-0.5j * (normal - normal.T))
    imag, kept = imag[half:], V[:, half:]
    if imag[0] <= 1e-9 * imag[-1]:
        imag[0], kept[:, 0] = 0, _conjugate_pair_of_plane(V[:, half - 1 : half + 1])
    phase = np.angle(kept.conj().T @ B)
    return np.mean(np.diag(normal)) + 1j * imag, kept * np.exp(1j * phase)


def _conjugate_pair_of_plane(V):
    """v with (v, conj v) an orthonormal basis of V's plane, where eigenvalue 0 is double."""
    _, q = np.linalg.eigh((V @ V.conj().T).real)
    return (q[:, -1] + 1j * q[:, -2]) / np.sqrt(2)


def _diagonal_lin(N):
    return -0.5 + 1j * np.pi * np.arange(_pairs(N))


def _diagonal_inv(N):
    return -0.5 + 1j * N / np.pi * (N / (2 * np.arange(_pairs(N)) + 1) - 1)


def _diagonal_legs(N):
    return dplr("legs", N).Lambda


def _diagonal_real(N):
    return -(np.arange(N) + 1.0)


DIAGONALS = {"lin": _diagonal_lin, "inv": _diagonal_inv, "legs": _diagonal_legs, "real": _diagonal_real}


def diagonal(name: str, N: int) -> Inexact[np.ndarray, " n"]:
    r"""The eigenvalues that S4D starts from: N / 2 complex ones for state_size N; N real ones for "real".

    "lin": $-1/2 + i \pi n$ (S4D-Lin); "inv": $-1/2 + i \frac{N}{\pi} (\frac{N}{2n+1} - 1)$ (S4D-Inv, n = 0
    the fastest); "legs": those of LegS without its low-rank term (S4D-LegS, and DSS); "real": $-(n + 1)$
    (S4D-Real, and Mamba), with n = 0, 1, ... S4D, Section 4.
    Raises ValueError for an unknown name, and for an odd state_size where eigenvalues come in pairs.
    """
    if name not in DIAGONALS:
        raise unknown("diagonal initialisation", name, DIAGONALS)
    return DIAGONALS[name](N)


def block_diagonal_hippo_n(
    P: int, J: int
) -> tuple[Complex[np.ndarray, " n"], Complex[np.ndarray, "P n"], Complex[np.ndarray, "n P"]]:
    """(Lambda, V, V^-1), kept halves, of J blocks of HiPPO-N: 2 Re(V Lambda V^-1) (S5, Appendix B.1).

    HiPPO-N is LegS without its low-rank term. With state_size P and blocks J, a block has size P / J, and
    n = P / 2; S5's parameters in this basis are V^-1 B and C V.
    Raises ValueError where state_size does not split into blocks of even size.
    """
    if J < 1 or P < 1 or P % (2 * J):
        raise ValueError(f"state_size must be a positive multiple of 2 x blocks; got {P} for blocks {J}")
    block = dplr("legs", P // J)
    V = scipy.linalg.block_diag(*[block.V] * J)
    return np.tile(block.Lambda, J), V, V.conj().T


def ring(
    key: PRNGKeyArray, N: int, r_min: float = 0.0, r_max: float = 1.0, max_phase: float = 2 * np.pi
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    r"""(nu_log, theta_log), float32: eigenvalues that are uniform by area on a ring of the unit disc.

    $\lambda = \exp(-e^{\nu^{log}} + i e^{\theta^{log}})$ has $|\lambda|^2$ uniform on [r_min^2, r_max^2] and its
    phase on [0, max_phase] (LRU, Lemma 3.2). Both logarithms are finite, on the circles too.
    Raises ValueError unless 0 <= r_min <= r_max <= 1 and 0 < max_phase <= 2 pi.
    """
    if not 0 <= r_min <= r_max <= 1:
        raise ValueError(f"r_min and r_max must satisfy 0 <= r_min <= r_max <= 1; got {r_min} and {r_max}")
    if not 0 < max_phase <= 2 * np.pi:
        raise ValueError(f"max_phase must lie in (0, 2 pi]; got {max_phase}")
    float32 = jnp.finfo(jnp.float32)
    u1, u2 = jax.random.uniform(key, (2, N), jnp.float32, minval=float32.tiny)
    square = jnp.clip(u1 * (r_max**2 - r_min**2) + r_min**2, float32.tiny, 1 - float32.epsneg)
    return jnp.log(-jnp.log(square) / 2), jnp.log(max_phase * u2)
