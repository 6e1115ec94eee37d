r"""The discretisation module: every rule that turns (A, dt) into the coefficients of a recurrence.

A continuous system x'(t) = A x(t) + B u(t), sampled with steps dt, becomes for every model of the lineage

    h_t = decay_t h_{t-1} + previous_t (B u)_{t-1} + current_t (B u)_t .

A rule is the choice of these three. With z = dt A:

| rule                     | decay                       | previous         | current         | who chose it       |
|--------------------------|-----------------------------|------------------|-----------------|--------------------|
| zoh                      | e^z                         | 0                | dt (e^z - 1)/z  | S4D, DSS, S5       |
| bilinear                 | (1 + z/2)/(1 - z/2)         | 0                | dt/(1 - z/2)    | LSSL, S4, Liquid-S4|
| generalized_bilinear     | (1 + (1-w)z)/(1 - w z)      | 0                | dt/(1 - w z)    | HiPPO              |
| forward_euler            | 1 + z                       | 0                | dt              | HiPPO              |
| backward_euler           | 1/(1 - z)                   | 0                | dt/(1 - z)      | HiPPO              |
| exponential_euler        | e^z                         | 0                | dt              | Mamba, Mamba-2     |
| dirac                    | e^z                         | 0                | 1               | LRU, event streams |
| exponential_trapezoidal  | e^z                         | (1-w) dt e^z     | w dt            | Mamba-3            |

`weight` w is in both rules that take it the share given to the current end of the interval, 1/2 unless
said otherwise; it may vary with time, as Mamba-3's does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from ssm.naming import unknown

Weight = Float[Array, "..."] | float | None


class Coefficients(NamedTuple):
    """h_t = decay h_{t-1} + previous (B u)_{t-1} + current (B u)_t; elementwise, or as matrices."""

    decay: Inexact[Array, "..."]
    previous: Inexact[Array, "..."]
    current: Inexact[Array, "..."]


def phi1(z: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    r"""$\varphi_1(z) = (e^z - 1)/z$ with $\varphi_1(0) = 1$, exact in value and gradient near 0.

    Inside |z| < 1/2 the Taylor series is summed: the quotient is accurate there, its derivative is not.
    """
    near = jnp.abs(z) < 0.5
    inside = jnp.where(near, z, jnp.zeros_like(z))
    series = jnp.ones_like(z)
    for k in range(17, 1, -1):
        series = 1 + series * inside / k
    outside = jnp.where(near, jnp.ones_like(z), z)
    return jnp.where(near, series, jnp.expm1(outside) / outside)


def _zoh(z, dt, w):
    return jnp.exp(z), jnp.zeros_like(z), dt * phi1(z)


def _generalized_bilinear(z, dt, w):
    return (1 + (1 - w) * z) / (1 - w * z), jnp.zeros_like(z), dt / (1 - w * z)


def _exponential_euler(z, dt, w):
    return jnp.exp(z), jnp.zeros_like(z), dt


def _dirac(z, dt, w):
    return jnp.exp(z), jnp.zeros_like(z), jnp.ones_like(z)


def _exponential_trapezoidal(z, dt, w):
    decay = jnp.exp(z)
    return decay, (1 - w) * dt * decay, w * dt


class Rule(NamedTuple):
    """One row of the module's table.

    weight: the fixed share of the current end; None where the caller may choose it; nan where it has no role.
    rational: whether the rule is rational in A, so that S4's Woodbury kernel can use it.
    """

    diagonal: Callable
    weight: float | None
    rational: bool


RULES = {
    "zoh": Rule(_zoh, float("nan"), False),
    "bilinear": Rule(_generalized_bilinear, 0.5, True),
    "generalized_bilinear": Rule(_generalized_bilinear, None, True),
    "forward_euler": Rule(_generalized_bilinear, 0.0, True),
    "backward_euler": Rule(_generalized_bilinear, 1.0, True),
    "exponential_euler": Rule(_exponential_euler, float("nan"), False),
    "dirac": Rule(_dirac, float("nan"), False),
    "exponential_trapezoidal": Rule(_exponential_trapezoidal, None, False),
}
RATIONAL_RULES = tuple(name for name, rule in RULES.items() if rule.rational)
ONE_INPUT_RULES = tuple(name for name in RULES if name != "exponential_trapezoidal")  # whose `previous` is 0


def check_rule(rule: str, mixer: str, allowed: tuple[str, ...] = tuple(RULES)) -> None:
    """Raise ValueError where `rule` is no rule, or is none of those that `mixer` can take."""
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if rule not in allowed:
        raise ValueError(f"rule {rule!r} is not one that {mixer} can take. Allowed: {', '.join(allowed)}")


def _weight(rule: str, weight: Weight) -> Weight:
    check_rule(rule, "discretize")
    fixed = RULES[rule].weight
    if fixed is None:
        return 0.5 if weight is None else weight
    if weight is not None:
        raise ValueError(f"weight is fixed by rule {rule!r}; generalized_bilinear and "
                         "exponential_trapezoidal take one")  # fmt: skip
    return fixed


def _as_dtype_of(A, value):
    return value.astype(A.dtype) if isinstance(value, jax.Array | np.ndarray | np.generic) else value


def discretize(
    rule: str,
    A: Inexact[Array, "..."],
    dt: Float[Array, "..."],
    *,
    weight: Weight = None,
) -> Coefficients:
    """The coefficients of a diagonal system, elementwise.

    A: eigenvalues, real or complex, in 1 / time; dt: step, in time; weight: share of the current end (see
    the module). All of one rank or scalars, broadcast together. Complex where A is.
    Raises ValueError for an unknown rule, or a weight where the rule fixes it.
    """
    w = _as_dtype_of(A, _weight(rule, weight))
    dt = _as_dtype_of(A, dt)
    z = dt * A
    decay, previous, current = RULES[rule].diagonal(z, dt, w)
    previous, current = (jnp.broadcast_to(c, z.shape).astype(z.dtype) for c in (previous, current))
    return Coefficients(decay, previous, current)


LOG_RULES = ("zoh", "exponential_euler", "dirac", "exponential_trapezoidal")


class LogCoefficients(NamedTuple):
    """h_t = e^log_decay (h_{t-1} + previous (B u)_{t-1}) + current (B u)_t: what sums of decays are made from."""

    log_decay: Inexact[Array, "..."]
    previous: Inexact[Array, "..."]
    current: Inexact[Array, "..."]


def discretize_log(
    rule: str,
    A: Inexact[Array, "..."],
    dt: Float[Array, "..."],
    *,
    weight: Weight = None,
) -> LogCoefficients:
    """The coefficients of a diagonal system by a rule whose decay is e^{dt A} (`LOG_RULES`), the logarithm kept.

    A product of decays is then a sum that neither overflows nor vanishes. Arguments as in `discretize`.
    Raises ValueError for a rule whose decay is not an exponential, and as `discretize` does.
    """
    check_rule(rule, "a sum of log decays", LOG_RULES)
    w = _as_dtype_of(A, _weight(rule, weight))
    dt = _as_dtype_of(A, dt)
    z = dt * A
    _, _, current = RULES[rule].diagonal(z, dt, w)
    previous = (1 - w) * dt if rule == "exponential_trapezoidal" else jnp.zeros_like(z)
    previous, current = (jnp.broadcast_to(c, z.shape).astype(z.dtype) for c in (previous, current))
    return LogCoefficients(z, previous, current)


def first_order(coefficients: Coefficients) -> tuple[Inexact[Array, "..."], ...]:
    r"""(decay, gain, feedthrough) of a time-invariant system, its `previous` folded away.

    With $h'_t = h_t + f v_t$ and f = previous / decay, the recurrence is $h'_t = decay h'_{t-1} + gain v_t$ with
    gain = current + f, and $h_t = h'_t - f v_t$: the read-out's feedthrough is -f. Where decay is 0 so is
    previous, for every rule here.
    """
    decay, previous, current = coefficients
    alive = decay != 0
    f = jnp.where(alive, previous / jnp.where(alive, decay, jnp.ones_like(decay)), 0)
    return decay, current + f, -f


def discretize_dense(
    rule: str,
    A: Inexact[Array, "n n"],
    dt: Float[Array, ""] | float,
    *,
    weight: Float[Array, ""] | float | None = None,
) -> Coefficients:
    """The coefficients of a dense system, as (n, n) matrices that multiply h and B u.

    The rules of `discretize` with matrix exponentials and solves in place of exponentials and quotients; a
    singular A is no special case. Raises as `discretize` does.
    """
    w, dt = _as_dtype_of(A, _weight(rule, weight)), _as_dtype_of(A, dt)
    n = A.shape[-1]
    eye, zero = jnp.eye(n, dtype=A.dtype), jnp.zeros_like(A)
    z = dt * A
    if RULES[rule].rational:
        implicit = eye - w * z
        return Coefficients(jnp.linalg.solve(implicit, eye + (1 - w) * z), zero, dt * jnp.linalg.inv(implicit))
    if rule == "zoh":
        augmented = jax.scipy.linalg.expm(jnp.block([[z, dt * eye], [zero, zero]]))
        return Coefficients(augmented[:n, :n], zero, augmented[:n, n:])
    decay = jax.scipy.linalg.expm(z)
    if rule == "exponential_trapezoidal":
        return Coefficients(decay, (1 - w) * dt * decay, w * dt * eye)
    return Coefficients(decay, zero, eye if rule == "dirac" else dt * eye)


def rational_weight(rule: str, weight: float | None = None) -> float:
    r"""The w of a rule that is rational in A: $\bar A = (I - w\, dt A)^{-1} (I + (1-w)\, dt A)$.

    Its transfer function is then $(I - \bar A z)^{-1} \bar B = (m - d\, dt A)^{-1} dt B$ with m = 1 - z and
    d = w + (1-w) z. S4 (Lemma C.4) writes the bilinear case as
    $\frac{2}{1+z} (\frac{2}{dt} \frac{1-z}{1+z} - A)^{-1} B$, which is 0/0 at the root of unity z = -1; here d
    merely vanishes. Raises ValueError for any other rule.
    """
    check_rule(rule, "Woodbury's identity", RATIONAL_RULES)
    return _weight(rule, weight)
