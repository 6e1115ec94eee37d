r"""S4D: the diagonal state space model (Gu et al. 2022, arXiv:2206.11893).

$x'(t) = A x(t) + B u(t)$, $y(t) = \mathrm{Re}\, C x(t) + D u(t)$ with diagonal A, one system of N states for every
channel. Of N complex states, conjugate pairs, half are kept and C counts twice.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int

from kernels_pallas.long_convolution import long_convolution
from kernels_pallas.long_convolution.xla import apply_table, powers
from ssm import hippo
from ssm.convolution import convolve, vandermonde
from ssm.discretize import RULES, check_rule, discretize, first_order
from ssm.initializers import complex_normal, complex_parameter, constant, log_uniform
from ssm.naming import unknown
from ssm.recurrence import segment_starts


class System(NamedTuple):
    """h_t = a h_{t-1} + b u_t, y_t = Re sum_n c h_t + D u_t, for every channel; c_reverse: see `parallel`."""

    a_dn: Inexact[Array, "d n"]
    b_dn: Inexact[Array, "d n"]
    c_dn: Inexact[Array, "d n"]
    D_d: Float[Array, " d"]
    c_reverse_dn: Inexact[Array, "d n"] | None = None


class State(NamedTuple):
    h_bdn: Inexact[Array, "b d n"]


def discrete(
    A_dn: Inexact[Array, "d n"],
    B_dn: Inexact[Array, "d n"],
    C_dn: Inexact[Array, "d n"],
    D_d: Float[Array, " d"],
    dt_d: Float[Array, " d"],
    *,
    rule: str = "zoh",
    weight: float | None = None,
    C_reverse_dn: Inexact[Array, "d n"] | None = None,
) -> System:
    """The discrete system of a continuous one, by any rule of `ssm.discretize` (S4D, eq. 6).

    A_dn: eigenvalues in 1/time, real, or complex with conjugate pairs kept once; dt_d in time per token.
    Raises ValueError for an unknown rule, and for exponential_trapezoidal with C_reverse_dn: what is read from
    the token to come would need that token twice.
    """
    if C_reverse_dn is not None:
        check_rule(rule, "a bidirectional S4D", tuple(name for name in RULES if name != "exponential_trapezoidal"))
    a, gain, feedthrough = first_order(discretize(rule, A_dn, dt_d[:, None], weight=weight))
    pairs = 2 if jnp.iscomplexobj(A_dn) else 1
    D_d = D_d + pairs * jnp.sum(C_dn * feedthrough * B_dn, -1).real
    return System(a, gain * B_dn, pairs * C_dn, D_d, None if C_reverse_dn is None else pairs * C_reverse_dn)


def recurrent(
    x_bld: Float[Array, "b l d"],
    system: System,
    state: State | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], State]:
    """Token after token: the definition; and the one form that can forget where a segment starts."""
    reset = segment_starts(segment_ids)
    a, b, c, D, c_reverse = system
    h = None if state is None else state.h_bdn
    y, h = long_convolution(x_bld, a, b, c, D, h, c_reverse=c_reverse, reset=reset, implementation="reference")
    return y, State(h)


def parallel(
    x_bld: Float[Array, "b l d"], system: System, state: State | None = None
) -> tuple[Float[Array, "b l d"], State]:
    """y = K * x by FFT with the Vandermonde kernel (S4D, eq. 7); with c_reverse also over the tokens after t."""
    length = x_bld.shape[1]
    a, b, c, D, c_reverse = system
    reverse = None if c_reverse is None else vandermonde(a, c_reverse * b, length)
    x = x_bld.astype(D.dtype)
    y = convolve(x, vandermonde(a, c * b, length), reverse) + D[None, None] * x
    table = powers(a, length)
    last = apply_table("dnl,bld->bdn", jnp.flip(table, -1), x, precision="highest") * b[None]
    if state is not None:
        y += jnp.einsum("bdn,dnl->bld", state.h_bdn * (c * a)[None], table, precision="highest").real
        last += (a * table[..., -1])[None] * state.h_bdn
    return y.astype(x_bld.dtype), State(last)


def chunked(
    x_bld: Float[Array, "b l d"], system: System, state: State | None = None, *, chunk_size: int = 128
) -> tuple[Float[Array, "b l d"], State]:
    """y by matrix products: a Toeplitz matrix inside a chunk, the state between chunks."""
    a, b, c, D, c_reverse = system
    h = None if state is None else state.h_bdn
    y, h = long_convolution(x_bld, a, b, c, D, h, c_reverse=c_reverse, chunk_size=chunk_size)
    return y, State(h)


def step(x_bd: Float[Array, "b d"], system: System, state: State) -> tuple[Float[Array, "b d"], State]:
    """One token."""
    a, b, c, D, _ = system
    h = a[None] * state.h_bdn + b[None] * x_bd[..., None].astype(a.dtype)
    y = jnp.einsum("dn,bdn->bd", c, h, precision="highest").real + D[None] * x_bd.astype(D.dtype)
    return y.astype(x_bd.dtype), State(h)


FORMS = {"recurrent": recurrent, "parallel": parallel, "chunked": chunked, "auto": chunked}


def run(
    form: str,
    x_bld: Array,
    system: tuple,
    state: tuple | None,
    segment_ids: Array | None,
    forms: Mapping[str, Callable] = FORMS,
) -> tuple[Array, tuple]:
    """The named form of a system; with segment_ids "auto" is the recurrence, which can forget.

    Raises ValueError for an unknown form, a convolution asked to forget, or a state given to both directions.
    """
    if form not in forms:
        raise unknown("form", form, forms)
    if system.c_reverse_dn is not None and state is not None:
        raise ValueError("state was given to a bidirectional mixer, which has none: it reads the future")
    if segment_ids is not None:
        if form in ("parallel", "chunked"):
            raise ValueError(f"form {form!r} cannot take segment_ids, a convolution cannot forget; use 'recurrent'")
        return forms["recurrent"](x_bld, system, state, segment_ids=segment_ids)
    return forms[form](x_bld, system, state)


class S4D(nn.Module):
    """S4D as a layer: parameters A, B, C, D and dt, and how they start.

    state_size: N, even where complex. A_init: eigenvalues, "legs", "inv", "lin" or "real" (S4D, section 4).
    rule, weight: of `ssm.discretize`. dt_min, dt_max: range of dt at the start, in time per token.
    step_scale: factor on dt, 2 for input sampled at half the rate. bidirectional: a second C reads the tokens to come.
    form: see `run`.
    """

    width: int
    state_size: int = 64
    A_init: str = "legs"
    rule: str = "zoh"
    weight: float | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    step_scale: float = 1.0
    bidirectional: bool = False
    form: str = "auto"

    def setup(self):
        check_rule(self.rule, "s4d")
        A = hippo.diagonal(self.A_init, self.state_size)
        shape = (self.width, A.size)
        self.log_dt = self.param("log_dt", log_uniform(self.dt_min, self.dt_max), shape[:1])
        self.A_log = self.param("A_log", constant(np.log(-A.real)), shape)
        self.D = self.param("D", nn.initializers.normal(1.0), shape[:1])
        directions = ("C", "C_reverse")[: 1 + self.bidirectional]
        if jnp.iscomplexobj(A):
            self.A_imag = self.param("A_imag", constant(A.imag), shape)
            self.B = complex_parameter(self, "B", constant(1 + 0j), shape)
            self.C = [complex_parameter(self, name, complex_normal(1.0), shape) for name in directions]
        else:
            self.B = self.param("B", nn.initializers.ones, shape)
            self.C = [self.param(name, nn.initializers.normal(1.0), shape) for name in directions]

    def system(self) -> System:
        A = -jnp.exp(self.A_log)
        A = jax.lax.complex(A, self.A_imag) if jnp.iscomplexobj(self.B) else A
        C_reverse = self.C[1] if self.bidirectional else None
        dt = self.step_scale * jnp.exp(self.log_dt)
        return discrete(A, self.B, self.C[0], self.D, dt, rule=self.rule, weight=self.weight, C_reverse_dn=C_reverse)

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        return run(self.form, x_bld, self.system(), state, segment_ids)

    def step(self, x_bd, state: State):
        return step(x_bd, self.system(), state)

    def initial_state(self, batch_size: int) -> State:
        complex_ = self.A_init != "real"
        shape = (batch_size, self.width, self.state_size // 2 if complex_ else self.state_size)
        return State(jnp.zeros(shape, jnp.complex64 if complex_ else jnp.float32))
