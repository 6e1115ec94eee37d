r"""DSS: diagonal state spaces (Gupta et al. 2022, arXiv:2203.14343).

S4D's predecessor, and with zero-order hold the same system: N complex eigenvalues shared by all channels, none of
them a pair, B = 1, and $C = W$ (DSS_exp) or C = W divided by the sum of the row's powers (DSS_softmax):
$K_k = \mathrm{Re} \sum_n w_n \frac{e^{\lambda_n dt} - 1}{\lambda_n (e^{\lambda_n dt L} - 1)} e^{\lambda_n dt k}$
(DSS, Proposition 1). The softmax needs the length L, and here, unlike in the paper, keeps Re lambda negative
too: a state that grows could not be stepped.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssm import hippo
from ssm.discretize import check_rule, discretize
from ssm.initializers import complex_normal, complex_parameter, constant, log_uniform
from ssm.mixers.s4d import State, System, discrete, run, step
from ssm.naming import unknown

KERNELS = ("softmax", "exp")


class DSS(nn.Module):
    """DSS as a layer: parameters Lambda, W, D and dt (DSS, section 3).

    state_size: N complex states. kernel: "softmax" over `length` tokens, or "exp". rule, weight: of
    `ssm.discretize`. dt_min, dt_max: range of dt at the start. step_scale, bidirectional, form: as in `S4D`;
    with step_scale the softmax is still over `length` tokens of the unscaled dt: over the same time.
    """

    width: int
    state_size: int = 64
    kernel: str = "softmax"
    length: int | None = None
    rule: str = "zoh"
    weight: float | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    step_scale: float = 1.0
    bidirectional: bool = False
    form: str = "auto"

    def setup(self):
        check_rule(self.rule, "dss")
        if self.kernel not in KERNELS:
            raise unknown("kernel", self.kernel, KERNELS)
        if self.kernel == "softmax" and not self.length:
            raise ValueError("length must be given to the softmax kernel of dss: it normalises over that many tokens")
        N, H = self.state_size, self.width
        A = hippo.diagonal("legs", 2 * N)
        self.log_dt = self.param("log_dt", log_uniform(self.dt_min, self.dt_max), (H,))
        self.A_log = self.param("A_log", constant(np.log(-A.real)), (N,))
        self.A_imag = self.param("A_imag", constant(A.imag), (N,))
        directions = ("W", "W_reverse")[: 1 + self.bidirectional]
        self.W = [complex_parameter(self, name, complex_normal(1.0), (H, N)) for name in directions]
        self.D = self.param("D", nn.initializers.normal(1.0), (H,))

    def system(self) -> System:
        A = jax.lax.complex(-jnp.exp(self.A_log), self.A_imag)[None]
        dt = jnp.exp(self.log_dt)
        C = [0.5 * W for W in self.W]
        if self.kernel == "softmax":
            total = A * discretize("zoh", A, self.length * dt[:, None]).current
            C = [c / total for c in C]
        A = jnp.broadcast_to(A, C[0].shape)
        C_reverse = C[1] if self.bidirectional else None
        options = dict(rule=self.rule, weight=self.weight, C_reverse_dn=C_reverse)
        return discrete(A, jnp.ones_like(A), C[0], self.D, self.step_scale * dt, **options)

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        return run(self.form, x_bld, self.system(), state, segment_ids)

    def step(self, x_bd, state: State):
        return step(x_bd, self.system(), state)

    def initial_state(self, batch_size: int) -> State:
        return State(jnp.zeros((batch_size, self.width, self.state_size), jnp.complex64))
