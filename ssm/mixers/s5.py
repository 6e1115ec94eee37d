r"""S5: one multi-input multi-output diagonal system for all channels (Smith et al. 2022, arXiv:2208.04933).

$x'(t) = \Lambda x(t) + B u(t)$, $y(t) = \mathrm{Re}\, C x(t) + D u(t)$ with u of H channels and x of P states, of which
conjugate pairs are kept once and C counts twice. The states are made by a parallel scan.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from kernels_pallas.diagonal_system import diagonal_system
from ssm import hippo
from ssm.discretize import ONE_INPUT_RULES, check_rule, discretize, first_order
from ssm.initializers import complex_normal, complex_parameter, constant, log_uniform
from ssm.naming import unknown
from ssm.recurrence import segment_starts


class System(NamedTuple):
    """h_t = a h_{t-1} + gain (B u)_t, y_t = Re C (h_t + feedthrough (B u)_t) + D u_t.

    feedthrough: None where it is 0. C_reverse, where present, reads the states of the reversed sequence, the token t
    included.
    """

    a_n: Complex[Array, " n"]
    gain_n: Complex[Array, " n"]
    feedthrough_n: Complex[Array, " n"] | None
    B_nd: Complex[Array, "n d"]
    C_dn: Complex[Array, "d n"]
    D_d: Float[Array, " d"]
    C_reverse_dn: Complex[Array, "d n"] | None = None


class State(NamedTuple):
    h_bn: Complex[Array, "b n"]


def discrete(
    A_n: Complex[Array, " n"],
    B_nd: Complex[Array, "n d"],
    C_dn: Complex[Array, "d n"],
    D_d: Float[Array, " d"],
    dt_n: Float[Array, " n"],
    *,
    rule: str = "zoh",
    weight: float | None = None,
    C_reverse_dn: Complex[Array, "d n"] | None = None,
) -> System:
    """The discrete system of a continuous one whose states are kept once a conjugate pair (S5, eq. 6).

    A_n: eigenvalues in 1/time; dt_n: time per token, one for every state.
    """
    return System(
        *coefficients(rule, A_n, dt_n, weight), B_nd, 2 * C_dn, D_d, None if C_reverse_dn is None else 2 * C_reverse_dn
    )


def coefficients(rule: str, A_n: Array, dt_n: Array, weight: float | None) -> tuple[Array, Array, Array | None]:
    """a, gain and feedthrough of a `System`."""
    a, gain, feedthrough = first_order(discretize(rule, A_n, dt_n, weight=weight))
    return a, gain, None if rule in ONE_INPUT_RULES else feedthrough


def recurrent(
    x_bld: Float[Array, "b l d"],
    system: System,
    state: State | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], State]:
    """Token after token: the definition."""
    return parallel(x_bld, system, state, segment_ids=segment_ids, implementation="reference")


def parallel(
    x_bld: Float[Array, "b l d"],
    system: System,
    state: State | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
    implementation: str = "xla",
) -> tuple[Float[Array, "b l d"], State]:
    """All states by a parallel scan (S5, section 2.2)."""
    a, gain, feedthrough, B_nd, C_dn, D_d, C_reverse_dn = system
    reset = segment_starts(segment_ids)
    run = partial(diagonal_system, x_bld, a, gain[:, None] * B_nd, implementation=implementation)
    y, last = run(C_dn, D_d, None if state is None else state.h_bn, reset=reset)
    if C_reverse_dn is not None:
        ends = None if reset is None else jnp.roll(reset, -1, 1)
        y += run(C_reverse_dn, jnp.zeros_like(D_d), reverse=True, reset=ends)[0]
        C_dn = C_dn + C_reverse_dn
    if feedthrough is not None:
        through_dd = _product(C_dn * feedthrough[None], B_nd).real
        y += jnp.einsum("bld,ed->ble", x_bld.astype(D_d.dtype), through_dd, precision="highest").astype(y.dtype)
    return y, State(last)


def step(x_bd: Float[Array, "b d"], system: System, state: State) -> tuple[Float[Array, "b d"], State]:
    """One token."""
    a, gain, feedthrough, B_nd, C_dn, D_d, _ = system
    x = x_bd.astype(D_d.dtype)
    v = _product(x.astype(B_nd.dtype), B_nd.T)
    h = a[None] * state.h_bn + gain[None] * v
    read = h if feedthrough is None else h + feedthrough[None] * v
    y = _product(read, C_dn.T).real + D_d[None] * x
    return y.astype(x_bd.dtype), State(h)


_product = partial(jnp.matmul, precision="highest")


FORMS = {"recurrent": "reference", "parallel": "xla", "auto": "auto"}


def run(form: str, x_bld: Array, system: System, state: State | None, segment_ids: Array | None):
    """The named form of a system; "auto" is what is fastest on the backend.

    Raises ValueError for an unknown form, or a state given to both directions.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if system.C_reverse_dn is not None and state is not None:
        raise ValueError("state was given to a bidirectional mixer, which has none: it reads the future")
    return parallel(x_bld, system, state, segment_ids=segment_ids, implementation=FORMS[form])


TRUNCATED_STD = 0.87962566  # of a standard normal cut at two standard deviations
C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")


class S5(nn.Module):
    """S5 as a layer: parameters Lambda, B, C, D and dt, and how they start (S5, appendix B).

    state_size: P, counted before conjugate pairs are kept once. blocks: J diagonal blocks of HiPPO-N, each even.
    C_init: trunc_standard_normal or lecun_normal in HiPPO's basis, or complex_normal in the eigenbasis.
    rule, weight: of `ssm.discretize`. dt_min, dt_max: range of dt, one a state, at the start.
    step_scale: factor on dt, 2 for input sampled at half the rate. clip_eigenvalues: keep Re Lambda <= -1e-4.
    bidirectional: a second C reads the reversed sequence. form: see `run`.
    """

    width: int
    state_size: int = 64
    blocks: int = 1
    C_init: str = "lecun_normal"
    rule: str = "zoh"
    weight: float | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    step_scale: float = 1.0
    clip_eigenvalues: bool = False
    bidirectional: bool = False
    form: str = "auto"

    def setup(self):
        check_rule(self.rule, "s5")
        if self.C_init not in C_INITS:
            raise unknown("C_init", self.C_init, C_INITS)
        A, V, V_inverse = hippo.block_diagonal_hippo_n(self.state_size, self.blocks)
        self.A_real = self.param("A_real", constant(A.real), A.shape)
        self.A_imag = self.param("A_imag", constant(A.imag), A.shape)
        self.log_dt = self.param("log_dt", log_uniform(self.dt_min, self.dt_max), A.shape)
        self.B = complex_parameter(self, "B", self._init_B, V_inverse)
        directions = ("C", "C_reverse")[: 1 + self.bidirectional]
        self.C = [complex_parameter(self, name, self._init_C, V) for name in directions]
        self.D = self.param("D", nn.initializers.normal(1.0), (self.width,))

    def _init_B(self, key, V_inverse):
        draw = nn.initializers.lecun_normal()(key, (self.state_size, self.width))
        return V_inverse.astype(np.complex64) @ draw.astype(jnp.complex64)

    def _init_C(self, key, V):
        if self.C_init == "complex_normal":
            return complex_normal(1.0)(key, (self.width, V.shape[1]))
        fan_in = self.state_size * (self.width if self.C_init == "lecun_normal" else 1)
        draw = jax.random.truncated_normal(key, -2, 2, (2, self.width, self.state_size)) / TRUNCATED_STD
        return jax.lax.complex(*draw) / fan_in**0.5 @ V.astype(np.complex64)

    def system(self) -> System:
        A_real = jnp.minimum(self.A_real, -1e-4) if self.clip_eigenvalues else self.A_real
        return discrete(
            jax.lax.complex(A_real, self.A_imag),
            self.B,
            self.C[0],
            self.D,
            self.step_scale * jnp.exp(self.log_dt),
            rule=self.rule,
            weight=self.weight,
            C_reverse_dn=self.C[1] if self.bidirectional else None,
        )

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        return run(self.form, x_bld, self.system(), state, segment_ids)

    def step(self, x_bd, state: State):
        return step(x_bd, self.system(), state)

    def initial_state(self, batch_size: int) -> State:
        return State(jnp.zeros((batch_size, self.state_size // 2), jnp.complex64))
