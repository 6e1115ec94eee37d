r"""Mamba: a diagonal state space model whose dt, B and C are read from the input (Gu and Dao 2023, arXiv:2312.00752).

For every channel d and state n (eq. 2, with the matrices of Algorithm 2),

    h_t = Abar_t h_{t-1} + Bbar_t x_t,   y_t = C_t h_t + D x_t,   (Abar_t, Bbar_t) = discretize(A, dt_t, B_t).

The paper's rule is zoh (eq. 4); its code, and so every published checkpoint, has Abar = e^{dt A} and Bbar = dt B, which
is `exponential_euler`. The decays differ in all of d and n, so that chunks have no form in matrix products: `chunked`
keeps the states of one chunk at a time and makes those of the others again for the gradient.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import at_least_float32
from kernels_pallas.selective_scan import selective_scan, selective_scan_step
from kernels_pallas.selective_scan.xla import by_chunks, tree
from kernels_pallas.short_convolution import short_convolution
from ssm.discretize import LOG_RULES, ONE_INPUT_RULES, check_rule, discretize
from ssm.initializers import constant, short_convolution_parameters, softplus_inverse_dt, uniform_fan_in
from ssm.naming import check_state, unknown
from ssm.norms import rms_norm
from ssm.recurrence import segment_starts


class State(NamedTuple):
    """The last conv_width - 1 inputs of the convolution, the newest last, and h."""

    conv_bkd: Float[Array, "b k d"]
    h_bdn: Float[Array, "b d n"]


def recurrent(
    x_bld: Float[Array, "b l d"],
    dt_bld: Float[Array, "b l d"],
    A_dn: Float[Array, "d n"],
    B_bln: Float[Array, "b l n"],
    C_bln: Float[Array, "b l n"],
    D_d: Float[Array, " d"],
    initial_state: Float[Array, "b d n"] | None = None,
    *,
    rule: str = "exponential_euler",
    negative_eigenvalues: bool = False,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Token after token: the definition. y, and the state after the last token.

    A: eigenvalues in 1/time; dt: time of each token, positive; rule: any of `ONE_INPUT_RULES`. Computed in A's dtype,
    which the state has; y has x's. The gradient keeps one state a token.
    negative_eigenvalues: Abar_t is twice the rule's, minus 1, and so from -1 to 1: a token can turn a state's sign,
    which parity needs (Grazzi et al. 2024, arXiv:2411.12537). Bbar_t stays. For rules of `LOG_RULES`.
    Raises ValueError for a rule that reads two inputs a step, or whose decay is no exponential and is to be so doubled.
    """
    coefficients = _coefficients(rule, negative_eigenvalues)
    return _run(_loop, coefficients, x_bld, dt_bld, A_dn, B_bln, C_bln, D_d, initial_state, segment_ids)


def parallel(
    x_bld: Float[Array, "b l d"],
    dt_bld: Float[Array, "b l d"],
    A_dn: Float[Array, "d n"],
    B_bln: Float[Array, "b l n"],
    C_bln: Float[Array, "b l n"],
    D_d: Float[Array, " d"],
    initial_state: Float[Array, "b d n"] | None = None,
    *,
    rule: str = "exponential_euler",
    negative_eigenvalues: bool = False,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """All states at once by an associative scan (section 3.3.2), in memory together; arguments as in `recurrent`."""
    coefficients = _coefficients(rule, negative_eigenvalues)
    return _run(_tree, coefficients, x_bld, dt_bld, A_dn, B_bln, C_bln, D_d, initial_state, segment_ids)


def chunked(
    x_bld: Float[Array, "b l d"],
    dt_bld: Float[Array, "b l d"],
    A_dn: Float[Array, "d n"],
    B_bln: Float[Array, "b l n"],
    C_bln: Float[Array, "b l n"],
    D_d: Float[Array, " d"],
    initial_state: Float[Array, "b d n"] | None = None,
    *,
    rule: str = "exponential_euler",
    negative_eigenvalues: bool = False,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Chunk after chunk, as the paper recomputes (section 3.3.2): the gradient keeps one state a chunk.

    In a chunk, what is faster: on a CPU token after token, elsewhere a scan; by exponential_euler on a Hopper GPU, all
    of it in one kernel, whose eigenvalues are positive. Arguments as in `recurrent`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    if rule == "exponential_euler" and not negative_eigenvalues:
        reset = segment_starts(segment_ids)
        return selective_scan(x_bld, dt_bld, A_dn, B_bln, C_bln, D_d, initial_state, reset=reset, chunk_size=chunk_size)
    form, coefficients = partial(_chunks, chunk_size), _coefficients(rule, negative_eigenvalues)
    return _run(form, coefficients, x_bld, dt_bld, A_dn, B_bln, C_bln, D_d, initial_state, segment_ids)


def step(
    x_bd: Float[Array, "b d"],
    dt_bd: Float[Array, "b d"],
    A_dn: Float[Array, "d n"],
    B_bn: Float[Array, "b n"],
    C_bn: Float[Array, "b n"],
    D_d: Float[Array, " d"],
    h_bdn: Float[Array, "b d n"],
    *,
    rule: str = "exponential_euler",
    z_bd: Float[Array, "b d"] | None = None,
    softplus: bool = False,
    negative_eigenvalues: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "b d"], Float[Array, "b d n"]]:
    """One token; arguments as in `recurrent`, but dt before softplus where it says so, and y silu(z) where z is given.

    implementation: of `kernels_pallas.selective_scan_step`, which exponential_euler is computed by.
    """
    if rule == "exponential_euler" and not negative_eigenvalues:
        options = dict(z_bd=z_bd, softplus=softplus, implementation=implementation)
        return selective_scan_step(x_bd, dt_bd, A_dn, B_bn, C_bn, D_d, h_bdn, **options)
    coefficients = _coefficients(rule, negative_eigenvalues)
    x, dt, B, C, D, h = (v.astype(A_dn.dtype) for v in (x_bd, dt_bd, B_bn, C_bn, D_d, h_bdn))
    decay, current = coefficients(A_dn[None], (nn.softplus(dt) if softplus else dt)[..., None])
    h = decay * h + current * (x[..., None] * B[:, None])
    y = jnp.sum(h * C[:, None], -1) + D[None] * x
    return (y if z_bd is None else y * nn.silu(z_bd.astype(y.dtype))).astype(x_bd.dtype), h


def _coefficients(rule, negative_eigenvalues):
    """(A, dt) -> (Abar, what B x is multiplied by)."""
    check_rule(rule, "mamba", ONE_INPUT_RULES)
    if negative_eigenvalues:
        allowed = tuple(name for name in ONE_INPUT_RULES if name in LOG_RULES)
        check_rule(rule, "mamba with negative eigenvalues", allowed)

    def coefficients(A, dt):
        decay, _, current = discretize(rule, A, dt)
        return 2 * decay - 1 if negative_eigenvalues else decay, current

    return coefficients


def _advance(coefficients, A_nd, h_bnd, x_bd, dt_bd, B_bn, C_bn):
    """(C h, h) after one token. The channels are the last axis here: it is the long one, and a CPU's vectors."""
    decay, current = coefficients(A_nd[None], dt_bd[:, None])
    h_bnd = decay * h_bnd + current * (B_bn[..., None] * x_bd[:, None])
    return jnp.sum(C_bn[..., None] * h_bnd, 1), h_bnd


def _run(form, coefficients, x_bld, dt, A_dn, B, C, D, h_bdn, segment_ids):
    """What every form shares: one dtype, the state before the first token, and D."""
    x, dt, B, C, D = (v.astype(A_dn.dtype) for v in (x_bld, dt, B, C, D))
    h = jnp.zeros((len(x), *A_dn.shape), A_dn.dtype) if h_bdn is None else h_bdn.astype(A_dn.dtype)
    y, last = form(coefficients, A_dn, h, x, dt, B, C, segment_starts(segment_ids))
    return (y + D[None, None] * x).astype(x_bld.dtype), last


def _loop(coefficients, A_dn, h_bdn, x, dt, B, C, reset):
    A_nd = A_dn.T

    @partial(jax.checkpoint, prevent_cse=False)
    def advance(h_bnd, token):
        *token, forget_b = token
        if forget_b is not None:
            h_bnd = jnp.where(forget_b[:, None, None], 0, h_bnd)
        y_bd, h_bnd = _advance(coefficients, A_nd, h_bnd, *token)
        return h_bnd, y_bd

    in_time = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, dt, B, C, reset))
    last, y_lbd = jax.lax.scan(advance, h_bdn.mT, in_time)
    return jnp.moveaxis(y_lbd, 0, 1), last.mT


def _tree(coefficients, A_dn, h_bdn, x, dt, B, C, reset):
    decay, current = coefficients(A_dn[None, None], dt[..., None])
    return tree(decay, current * (x[..., None] * B[:, :, None]), C, reset, h_bdn)


def _chunks(q, coefficients, A_dn, h_bdn, x, dt, B, C, reset):
    """Padding has dt = 0 and x = 0, which leave the state as it is by every rule."""
    inside = partial(_loop if jax.default_backend() == "cpu" else _tree, coefficients, A_dn)
    return by_chunks(inside, q, h_bdn, (x, dt, B, C, reset))


FORMS = {"recurrent": recurrent, "parallel": parallel, "chunked": chunked}
STEPS = {"auto": "auto", "recurrent": "reference", "parallel": "xla", "chunked": "xla"}
SIZES = ("width", "state_size", "expand", "conv_width", "chunk_size")


class Mamba(nn.Module):
    """Mamba's block (section 3.4, figure 3): in_proj, convolution, selective state space model, gate, out_proj.

    expand: channels inside, as a multiple of width. dt_rank: inputs of dt_proj, ceil(width / 16) by default.
    dt_min, dt_max, dt_floor: range of dt at the start, one a channel, and what it is raised to (section 3.6).
    conv_bias; bias, of in_proj and out_proj. norm_BCdt: root-mean-square norms without weights, with norm_eps, of B, C
    and what dt_proj reads (Falcon-Mamba, arXiv:2410.05355). rule: of `ONE_INPUT_RULES`.
    negative_eigenvalues: see `recurrent`.
    form: of `FORMS`, or "auto" for `chunked`, the fastest whose gradient fits in memory. chunk_size: its tokens.
    """

    width: int
    state_size: int = 16
    expand: int = 2
    conv_width: int = 4
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    norm_BCdt: bool = False
    norm_eps: float = 1e-6
    rule: str = "exponential_euler"
    negative_eigenvalues: bool = False
    chunk_size: int = 64
    form: str = "auto"

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        def scan(x, z, dt, *arrays):
            form = "chunked" if self.form == "auto" else self.form
            options = dict(chunk_size=self.chunk_size) if form == "chunked" else {}
            options |= dict(rule=self.rule, negative_eigenvalues=self.negative_eigenvalues)
            y, h = FORMS[form](x, nn.softplus(dt), *arrays, segment_ids=segment_ids, **options)
            return y * nn.silu(z), h

        return self._mix(x_bld, state, segment_starts(segment_ids), scan)

    def step(self, x_bd, state: State):
        def scan(x, z, dt, A, B, C, D, h):
            options = dict(rule=self.rule, negative_eigenvalues=self.negative_eigenvalues)
            options |= dict(z_bd=z[:, 0], softplus=True, implementation=STEPS[self.form])
            y, h = step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, h, **options)
            return y[:, None], h

        y, state = self._mix(x_bd[:, None], state, None, scan)
        return y[:, 0], state

    @nn.compact
    def _mix(self, x_bld, state, reset, scan):
        self._check(state, len(x_bld))
        d, n, dtype = self.expand * self.width, self.state_size, x_bld.dtype
        dense = partial(nn.Dense, kernel_init=uniform_fan_in, dtype=dtype)
        conv_bkd, h_bdn = self.initial_state(len(x_bld)) if state is None else state

        x, z = jnp.split(dense(2 * d, use_bias=self.bias, name="in_proj")(x_bld), 2, -1)
        conv = self.param("conv", short_convolution_parameters(d, self.conv_width, self.conv_bias))
        x, conv_bkd = short_convolution(x, conv["weight"], conv.get("bias"), conv_bkd, reset=reset)
        dt, B, C = self._select(x, dense)
        A_log = self.param("A_log", constant(np.log(np.arange(1, n + 1))), (d, n))
        D = self.param("D", nn.initializers.ones, (d,))
        y, h_bdn = scan(x, z, dt, -jnp.exp(A_log.astype(dt.dtype)), B, C, D, h_bdn)
        return dense(self.width, use_bias=self.bias, name="out_proj")(y), State(conv_bkd, h_bdn)

    def _select(self, x_bld, dense):
        """dt before softplus, B and C of every token (Algorithm 2, lines 2 to 4), in float32; dt has its bias."""
        n, d, dtype = self.state_size, x_bld.shape[-1], at_least_float32(x_bld.dtype)
        rank = self.dt_rank or -(-self.width // 16)
        read = dense(rank + 2 * n, use_bias=False, name="x_proj")(x_bld).astype(dtype)
        dt, B, C = jnp.split(read, [rank, rank + n], -1)
        if self.norm_BCdt:
            dt, B, C = (rms_norm(v, eps=self.norm_eps) for v in (dt, B, C))
        start = softplus_inverse_dt(self.dt_min, self.dt_max, self.dt_floor)
        dt_proj = dense(d, bias_init=lambda key, shape, dtype: start(key, shape), name="dt_proj", dtype=dtype)
        return dt_proj(dt), B, C

    def _check(self, state, batch_size):
        _coefficients(self.rule, self.negative_eigenvalues)
        if self.form not in STEPS:
            raise unknown("form", self.form, STEPS)
        for name in (*SIZES, *([] if self.dt_rank is None else ["dt_rank"])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_state("mamba", state, self.initial_state(batch_size))

    def initial_state(self, batch_size: int) -> State:
        d = self.expand * self.width
        shapes = (batch_size, self.conv_width - 1, d), (batch_size, d, self.state_size)
        return State(*(jnp.zeros(shape, jnp.float32) for shape in shapes))
