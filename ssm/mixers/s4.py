r"""S4: the structured state space model (Gu et al. 2021, arXiv:2111.00396).

$x'(t) = A x(t) + B u(t)$, $y(t) = C x(t) + D u(t)$ with $A = \Lambda - P P^*$, diagonal plus low rank, one system of
N states for every channel. The same P on both sides keeps A stable (SaShiMi, arXiv:2202.09729).

Of N complex states, in conjugate pairs, half are kept; C is a row, without conjugate, and y = 2 Re C x. The
parameter is not C but the row $\tilde C = C (I - \bar A^L)$, with L the configured length: training then needs no power
of $\bar A$ (S4, Lemma C.3).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from ssm import hippo
from ssm.convolution import convolve, dplr
from ssm.discretize import RATIONAL_RULES, check_rule, discretize, rational_weight
from ssm.initializers import complex_normal, complex_parameter, constant, log_uniform
from ssm.mixers.s4d import run
from ssm.recurrence import segment_starts

SLOWEST = 1e-3  # least decay rate at the start, in 1/time: all measures but legs have Re Lambda = 0


class Transition(NamedTuple):
    """The discrete h_t = a h_{t-1} - sum_r p_r Re(q_r . h_{t-1}) + b u_t: diagonal plus low rank again."""

    a_dn: Complex[Array, "d n"]
    p_drn: Complex[Array, "d r n"]
    q_drn: Complex[Array, "d r n"]
    b_dn: Complex[Array, "d n"]


class System(NamedTuple):
    """Both views of a discrete system: its recurrence, y_t = Re c . h_t + D u_t, and its kernel, y = K * u + D u.

    Under jit only the view that is used is computed. c_reverse, K_reverse: what reads the tokens after t.
    """

    transition: Transition
    c_dn: Complex[Array, "d n"]
    D_d: Float[Array, " d"]
    K_dl: Float[Array, "d l"]
    c_reverse_dn: Complex[Array, "d n"] | None = None
    K_reverse_dl: Float[Array, "d l"] | None = None


class State(NamedTuple):
    h_bdn: Complex[Array, "b d n"]


def discrete_transition(
    Lambda_dn: Complex[Array, "d n"],
    P_drn: Complex[Array, "d r n"],
    B_dn: Complex[Array, "d n"],
    dt_d: Float[Array, " d"],
    *,
    rule: str = "bilinear",
    weight: float | None = None,
) -> Transition:
    r"""$\bar A$ and $\bar B$ in O(N) (S4, Appendix C.2, for every rule rational in A).

    With a and g the decay and gain of $\Lambda$ alone, w the rule's weight and $S = (I + w P^* g P)^{-1}$:
    $\bar A = a - g P S P^* g / dt$ and $\bar B = g B - w g P S P^* g B$. dt_d in time per token.
    Raises ValueError for a rule that is not rational in A.
    """
    check_rule(rule, "s4", RATIONAL_RULES)
    a, _, gain = discretize(rule, Lambda_dn, dt_d[:, None], weight=weight)
    w = rational_weight(rule, weight)
    gain_P = gain[:, None] * P_drn
    inner = 2 * jnp.einsum("drn,dsn->drs", P_drn.conj(), gain_P, precision="highest").real
    S_drs = jnp.linalg.inv(jnp.eye(inner.shape[-1], dtype=inner.dtype)[None] + w * inner)
    q_drn = 2 * jnp.einsum("drs,dsn->drn", S_drs.astype(a.dtype), gain[:, None] * P_drn.conj(), precision="highest")
    pulled = jnp.einsum("drn,dn->dr", q_drn, B_dn, precision="highest").real.astype(a.dtype)
    b = gain * B_dn - w * jnp.einsum("drn,dr->dn", gain_P, pulled, precision="highest")
    return Transition(a, gain_P / dt_d[:, None, None].astype(a.dtype), q_drn, b)


def dense(transition: Transition) -> Float[Array, "d m m"]:
    r"""$\bar A$ as a real matrix that acts on (Re h, Im h), m = N."""
    a, p, q, _ = transition
    diagonal = lambda x: x[..., None] * jnp.eye(a.shape[-1], dtype=x.dtype)[None]  # noqa: E731
    re, im = diagonal(a.real), diagonal(a.imag)
    normal = jnp.concatenate([jnp.concatenate([re, -im], 2), jnp.concatenate([im, re], 2)], 1)
    return normal - jnp.einsum("drm,drn->dmn", _column(p), _row(q), precision="highest")


def _column(h):
    return jnp.concatenate([h.real, h.imag], -1)


def _row(c):
    """The real row whose product with _column(h) is Re(c . h)."""
    return _column(c.conj())


def _number(column):
    return jax.lax.complex(*jnp.split(column, 2, axis=-1))


def _times(row_dkm, A_dmm):
    return jnp.einsum("dkm,dmn->dkn", row_dkm, A_dmm, precision="highest")


def _power(A_dmm, exponent):
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.matrix_power(A_dmm, exponent)


def _krylov(A_dmm, v_dm, length):
    """v, A v, A^2 v, ... along axis 1, by doubling."""
    table = v_dm[:, None]
    while table.shape[1] < length:
        table = jnp.concatenate([table, _times(table, jnp.swapaxes(A_dmm, 1, 2))], 1)
        A_dmm = _times(A_dmm, A_dmm)
    return table[:, :length]


def truncate(C_dkn: Complex[Array, "d k n"], transition: Transition, length: int) -> Complex[Array, "d k n"]:
    r"""$\tilde C = C (I - \bar A^L)$ of k rows a channel: what the kernel of L taps reads (S4, Lemma C.3)."""
    row = _row(C_dkn)
    return _number(row - _times(row, _power(dense(transition), length))).conj()


def untruncate(C_dkn: Complex[Array, "d k n"], transition: Transition, length: int) -> Complex[Array, "d k n"]:
    r"""$C = \tilde C (I - \bar A^L)^{-1}$: what the recurrence reads."""
    transposed = jnp.swapaxes(_power(dense(transition), length), 1, 2)
    left = jnp.eye(transposed.shape[-1], dtype=transposed.dtype)[None] - transposed
    row = jnp.linalg.solve(left, jnp.swapaxes(_row(C_dkn), 1, 2))
    return _number(jnp.swapaxes(row, 1, 2)).conj()


def discrete(
    Lambda_dn: Complex[Array, "d n"],
    P_drn: Complex[Array, "d r n"],
    B_dn: Complex[Array, "d n"],
    C_dn: Complex[Array, "d n"],
    D_d: Float[Array, " d"],
    dt_d: Float[Array, " d"],
    length: int,
    *,
    tokens: int = 1,
    rule: str = "bilinear",
    weight: float | None = None,
    C_reverse_dn: Complex[Array, "d n"] | None = None,
) -> System:
    r"""The discrete system of a continuous one whose C is truncated: $\tilde C$ for `length`.

    Lambda_dn in 1/time, P_drn in time^-1/2, dt_d in time per token; conjugate pairs are kept once. The kernel
    has `length` taps; where tokens is more, $\tilde C$ is first made that of twice the length,
    $\tilde C (I + \bar A^L)$, as often as it takes. Raises ValueError for a rule that is not rational in A.
    """
    transition = discrete_transition(Lambda_dn, P_drn, B_dn, dt_d, rule=rule, weight=weight)
    tilde = jnp.stack([C_dn] if C_reverse_dn is None else [C_dn, C_reverse_dn], 1)
    c, *c_reverse = jnp.unstack(2 * untruncate(tilde, transition, length), axis=1)
    if length < tokens:
        row, power = _row(tilde), _power(dense(transition), length)
        while length < tokens:
            row, power, length = row + _times(row, power), _times(power, power), 2 * length
        tilde = _number(row).conj()
    kernels = dplr(Lambda_dn, P_drn, B_dn, tilde, dt_d, length, rule=rule, weight=weight)
    K, *K_reverse = jnp.unstack(kernels, axis=1)
    return System(transition, c, D_d, K, *c_reverse, *K_reverse)


def _advance(transition, h_bdn, u_bd):
    a, p, q, b = transition
    pulled = jnp.einsum("drn,bdn->bdr", q, h_bdn, precision="highest").real.astype(a.dtype)
    low_rank = jnp.einsum("drn,bdr->bdn", p, pulled, precision="highest")
    return a[None] * h_bdn - low_rank + b[None] * u_bd[..., None].astype(a.dtype)


def _read(c_dn, h_bdn):
    return jnp.einsum("dn,bdn->bd", c_dn, h_bdn, precision="highest").real


def recurrent(
    x_bld: Float[Array, "b l d"],
    system: System,
    state: State | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], State]:
    """Token after token, O(N) each: the definition; and the one form that can forget where a segment starts."""
    transition, c, D, _, c_reverse, _ = system
    starts = segment_starts(segment_ids)
    keep = jnp.ones(x_bld.shape[:2], bool) if starts is None else ~starts
    x = x_bld.astype(D.dtype)
    xs = jnp.moveaxis(x, 1, 0), keep.T[:, :, None, None]
    h = jnp.zeros((len(x), *c.shape), c.dtype) if state is None else state.h_bdn

    def advance(h, xs):
        u_bd, keep_b11 = xs
        h = _advance(transition, jnp.where(keep_b11, h, 0), u_bd)
        return h, _read(c, h)

    def retreat(g, xs):
        u_bd, keep_b11 = xs
        return jnp.where(keep_b11, _advance(transition, g, u_bd), 0), _read(c_reverse, g)

    last, y_lbd = jax.lax.scan(advance, h, xs)
    if c_reverse is not None:
        y_lbd += jax.lax.scan(retreat, jnp.zeros_like(h), xs, reverse=True)[1]
    return (jnp.moveaxis(y_lbd, 0, 1) + D[None, None] * x).astype(x_bld.dtype), State(last)


def parallel(
    x_bld: Float[Array, "b l d"], system: System, state: State | None = None
) -> tuple[Float[Array, "b l d"], State]:
    """y = K * x by FFT (S4, eq. 5); with a reverse kernel also over the tokens after t.

    States go in and out by powers of the dense transition, which nothing computes under jit if the new state is
    not used. Raises ValueError where x is longer than the kernel.
    """
    length = x_bld.shape[1]
    transition, c, D, K, _, K_reverse = system
    if K.shape[1] < length:
        raise ValueError(f"x has {length} tokens and the system's kernel {K.shape[1]}; make it with tokens={length}")
    x = x_bld.astype(D.dtype)
    y = convolve(x, K, K_reverse) + D[None, None] * x
    A = dense(transition)
    impulse = _krylov(A, _column(transition.b_dn), length)
    last = jnp.einsum("bld,dlm->bdm", x, jnp.flip(impulse, 1), precision="highest")
    if state is not None:
        h = _column(state.h_bdn)
        rows = _times(_krylov(jnp.swapaxes(A, 1, 2), _row(c), length), A)
        y += jnp.einsum("dlm,bdm->bld", rows, h, precision="highest")
        last += jnp.einsum("dnm,bdm->bdn", _power(A, length), h, precision="highest")
    return y.astype(x_bld.dtype), State(_number(last))


def step(x_bd: Float[Array, "b d"], system: System, state: State) -> tuple[Float[Array, "b d"], State]:
    """One token, O(N)."""
    x = x_bd.astype(system.D_d.dtype)
    h = _advance(system.transition, state.h_bdn, x)
    return (_read(system.c_dn, h) + system.D_d[None] * x).astype(x_bd.dtype), State(h)


FORMS = {"recurrent": recurrent, "parallel": parallel, "auto": parallel}


class S4(nn.Module):
    r"""S4 as a layer: parameters Lambda, P, B, $\tilde C$, D and dt, and how they start.

    length: that of $\tilde C$, in tokens; inputs may be shorter or longer, and longer ones cost a matrix power.
    state_size: N. A_init: a measure of `ssm.hippo`. copies: distinct (A, B) that the channels share in turn (the
    paper's n_ssm), None for one a channel. rule, weight: of `ssm.discretize`, rational in A. dt_min, dt_max:
    range of dt at the start, in time per token. step_scale: factor on dt, 2 for input sampled at half the rate, of
    whose tokens `length` is then half. bidirectional: a second C reads the tokens to come. form: see `s4d.run`, with
    the convolution for "auto".
    """

    width: int
    state_size: int = 64
    length: int | None = None
    A_init: str = "legs"
    copies: int | None = 1
    rule: str = "bilinear"
    weight: float | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    step_scale: float = 1.0
    bidirectional: bool = False
    form: str = "auto"

    def setup(self):
        copies = self.width if self.copies is None else self.copies
        if copies < 1 or self.width % copies:
            raise ValueError(f"copies is {copies}; it must be a divisor of width, which is {self.width}")
        if not self.length or self.length < 1:
            raise ValueError(f"length is {self.length}; s4 needs that of its training sequences, at least 1 token")
        check_rule(self.rule, "s4", RATIONAL_RULES)
        Lambda, P, B, _ = hippo.dplr(self.A_init, self.state_size)
        shape = (copies, Lambda.size)
        self.log_dt = self.param("log_dt", log_uniform(self.dt_min, self.dt_max), (self.width,))
        self.A_log = self.param("A_log", constant(np.log(np.maximum(-Lambda.real, SLOWEST))), shape)
        self.A_imag = self.param("A_imag", constant(Lambda.imag), shape)
        self.P = complex_parameter(self, "P", constant(P.T), (copies, *P.T.shape))
        self.B = complex_parameter(self, "B", constant(B), shape)
        self.D = self.param("D", nn.initializers.normal(1.0), (self.width,))
        directions = ("C", "C_reverse")[: 1 + self.bidirectional]
        self.C = [complex_parameter(self, name, self._truncated, (self.width, Lambda.size)) for name in directions]

    def _truncated(self, key, shape):
        C = complex_normal(1.0)(key, shape)
        transition = discrete_transition(*self._continuous(), rule=self.rule, weight=self.weight)
        return truncate(C[:, None], transition, self._tokens())[:, 0]

    def _tokens(self):
        """How many are as long as `length` is at a step_scale of 1."""
        return max(1, round(self.length / self.step_scale))

    def _continuous(self):
        Lambda = jax.lax.complex(-jnp.exp(self.A_log), self.A_imag)
        repeats = self.width // len(Lambda)
        shared = (jnp.tile(x, (repeats, *[1] * (x.ndim - 1))) for x in (Lambda, self.P, self.B))
        return *shared, self.step_scale * jnp.exp(self.log_dt)

    def system(self, tokens: int = 1) -> System:
        """The discrete system, its kernel for so many tokens; a loop over `s4.step` makes it once, outside."""
        Lambda, P, B, dt = self._continuous()
        C_reverse = self.C[1] if self.bidirectional else None
        options = dict(tokens=tokens, rule=self.rule, weight=self.weight, C_reverse_dn=C_reverse)
        return discrete(Lambda, P, B, self.C[0], self.D, dt, self._tokens(), **options)

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        return run(self.form, x_bld, self.system(x_bld.shape[1]), state, segment_ids, FORMS)

    def step(self, x_bd, state: State):
        return step(x_bd, self.system(), state)

    def initial_state(self, batch_size: int) -> State:
        return State(jnp.zeros((batch_size, self.width, self.state_size // 2), jnp.complex64))
