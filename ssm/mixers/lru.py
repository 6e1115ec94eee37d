r"""LRU: the linear recurrent unit (Orvieto et al. 2023, arXiv:2303.06349).

$x_k = \lambda x_{k-1} + \gamma B u_k$, $y_k = \mathrm{Re}\, C x_k + D u_k$ with
$\lambda = \exp(-e^\nu + i e^\theta)$ learned as it is.
In the terms of `ssm.discretize`: A = log lambda with one unit of time a token, and the rule "dirac".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssm import hippo
from ssm.discretize import check_rule
from ssm.initializers import complex_normal, complex_parameter
from ssm.mixers.s5 import State, System, coefficients, run, step

RULES = ("dirac", "zoh", "exponential_euler", "exponential_trapezoidal")


class LRU(nn.Module):
    """LRU as a layer: parameters nu, theta, gamma, B, C, D (LRU, section 3 and appendix A).

    state_size: N complex states, none of them a pair. r_min, r_max, max_phase: the ring in which the lambdas
    start, uniformly in area. rule: how B enters ("dirac": as the paper has it); one whose decay is
    exp(dt A). bidirectional: a second C reads the reversed sequence. form: see `s5.run`.
    """

    width: int
    state_size: int = 128
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 6.283185307179586
    rule: str = "dirac"
    weight: float | None = None
    bidirectional: bool = False
    form: str = "auto"

    def setup(self):
        check_rule(self.rule, "lru", RULES)
        N, H = self.state_size, self.width
        ring = lambda key: hippo.ring(key, N, self.r_min, self.r_max, self.max_phase)  # noqa: E731
        self.nu_log = self.param("nu_log", lambda key: ring(key)[0])
        self.theta_log = self.param("theta_log", lambda key: ring(key)[1])
        self.gamma_log = self.param("gamma_log", lambda _: 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(self.nu_log))))
        self.B = complex_parameter(self, "B", complex_normal(1 / H), (N, H))
        directions = ("C", "C_reverse")[: 1 + self.bidirectional]
        self.C = [complex_parameter(self, name, complex_normal(2 / N), (H, N)) for name in directions]
        self.D = self.param("D", nn.initializers.normal(1.0), (H,))

    def system(self) -> System:
        A = jax.lax.complex(-jnp.exp(self.nu_log), jnp.exp(self.theta_log))
        B = jnp.exp(self.gamma_log).astype(self.B.dtype)[:, None] * self.B
        first = coefficients(self.rule, A, jnp.ones_like(self.nu_log), self.weight)
        return System(*first, B, self.C[0], self.D, self.C[1] if self.bidirectional else None)

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        return run(self.form, x_bld, self.system(), state, segment_ids)

    def step(self, x_bd, state: State):
        return step(x_bd, self.system(), state)

    def initial_state(self, batch_size: int) -> State:
        return State(jnp.zeros((batch_size, self.state_size), jnp.complex64))
