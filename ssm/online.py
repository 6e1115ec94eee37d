r"""Online memory: the coefficients of a signal's past at every time, and the past that they stand for.

Beside the time-invariant measures of `ssm.hippo` stands "scaled_legs", the original HiPPO-LegS, uniform on the
whole past: x' = (A x + B u) / t, with the basis sqrt(2n+1) P_n(1 - 2 age), age in shares of the past. In
log-time s = ln t it is the time-invariant LegS, dx/ds = A x + B u.

Age is how long ago: 0 is now. Gu et al. 2020 [HiPPO].
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import eval_laguerre, eval_legendre

from ssm import hippo
from ssm.discretize import RULES, check_rule, discretize_dense
from ssm.naming import unknown

AnyArray = Array | np.ndarray

PROJECTION_RULES = ("forward_euler", "backward_euler", "bilinear", "zoh")


def _legendre(N, x):
    n = np.arange(N)
    return np.sqrt(2 * n + 1) * eval_legendre(n, x[:, None])


def _laguerre(N, ages):
    return np.exp(-ages[:, None] / 2) * eval_laguerre(np.arange(N), ages[:, None])


def _fourier(N, ages):
    angle = np.pi * (np.arange(N) // 2) * ages[:, None]
    waves = np.sqrt(2) * np.where(np.arange(N) % 2 == 0, np.cos(angle), np.sin(angle))
    waves[:, 0] = 1
    return waves


BASES = {
    "legs": (lambda N, ages: _legendre(N, 2 * np.exp(-ages) - 1), np.inf),
    "legt": (lambda N, ages: _legendre(N, 1 - ages), 2.0),
    "lagt": (_laguerre, np.inf),
    "fout": (_fourier, 2.0),
    "scaled_legs": (lambda N, ages: _legendre(N, 1 - 2 * ages), 1.0),
}


def basis(name: str, N: int, ages: Float[AnyArray, " t"]) -> Float[np.ndarray, "t n"]:
    """p_n(age) at every age: the functions that the coefficients of measure `name` multiply.

    ages: in units of time for the measures of `ssm.hippo`; for "scaled_legs" in shares of the past, from 0 now
    to 1 at its start. NaN outside of the measure's support. Raises ValueError for an unknown measure.
    """
    if name not in BASES:
        raise unknown("measure", name, BASES)
    function, oldest = BASES[name]
    ages = np.asarray(ages, np.float64)
    inside = (ages >= 0) & (ages <= oldest)
    return np.where(inside[:, None], function(N, np.where(inside, ages, 0)), np.nan)


def reconstruct(name: str, c: Float[AnyArray, "*batch n"], ages: Float[AnyArray, " t"]) -> Float[AnyArray, "*batch t"]:
    """The past that coefficients c stand for: u(now - age) = sum_n c_n p_n(age) (HiPPO, Section 2).

    ages and errors: as in `basis`. c may carry leading axes, such as the time of `project`.
    """
    return c @ basis(name, c.shape[-1], ages).T.astype(c.dtype)


def project(
    name: str, u_l: Float[AnyArray, " l"], N: int, dt: float | None = None, rule: str = "bilinear"
) -> Float[Array, "l n"]:
    """The first N coefficients of the past of u at each of its samples, in O(l N^2).

    dt: step between samples, in the measure's units of time; it cancels from "scaled_legs", whose step k is
    x' = (A x + B u) / k over a unit of time (HiPPO, eq. (4)) or, for zoh, exactly from t = k to k + 1. Before
    its first sample u counts as zero. rule: bilinear, backward_euler, zoh (O(N^3) a step for "scaled_legs"),
    or forward_euler (which overflows for "scaled_legs" where N is large).
    Raises ValueError for an unknown measure or rule, and for a missing dt.
    """
    check_rule(rule, "an online projection", PROJECTION_RULES)
    if name not in BASES:
        raise unknown("measure", name, BASES)
    if name != "scaled_legs" and dt is None:
        raise ValueError(f"dt is missing: measure {name!r} has a timescale, so the step must be given in it")
    u_l = jnp.asarray(u_l)
    A, B = (jnp.asarray(x, u_l.dtype) for x in hippo.measure(name.removeprefix("scaled_"), N))
    if name == "scaled_legs":
        return _project_scaled(rule, A, B, u_l)
    return _project(rule, A, B, u_l, jnp.asarray(dt, u_l.dtype))


@partial(jax.jit, static_argnames="rule")
def _project(rule, A, B, u_l, dt):
    coefficients = discretize_dense(rule, A, dt)
    B_bar = coefficients.current @ B

    def step(x, u):
        x = coefficients.decay @ x + B_bar * u
        return x, x

    return jax.lax.scan(step, jnp.zeros_like(B), u_l)[1]


@partial(jax.jit, static_argnames="rule")
def _project_scaled(rule, A, B, u_l):
    """A step of every rule here is x + dt phi (A x + B u), where phi = 1/(1 - w dt A) if it is rational."""

    def increment(dt, slope):
        if rule == "zoh":
            return discretize_dense(rule, A, dt).current @ slope
        implicit = jnp.eye(len(B), dtype=A.dtype) - RULES[rule].weight * dt * A
        return jax.scipy.linalg.solve_triangular(implicit, dt * slope, lower=True)

    def step(x, inputs):
        dt, u = inputs
        x = x + increment(dt, A @ x + B * u)
        return x, x

    k = jnp.arange(1, len(u_l) + 1, dtype=A.dtype)
    dt_l = jnp.log1p(1 / k) if rule == "zoh" else 1 / k
    return jax.lax.scan(step, jnp.zeros_like(B), (dt_l, u_l))[1]
