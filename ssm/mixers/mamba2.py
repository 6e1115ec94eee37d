r"""Mamba-2: state space duality (Dao and Gu 2024, arXiv:2405.21060).

One scalar decay a head: $h_t = e^{\Delta_t A} h_{t-1} + \bar\Delta_t x_t B_t^\top$, $y_t = h_t C_t + D x_t$, with
$\bar\Delta$ from a rule of `ssm.discretize`: the paper's is exponential_euler, $\bar\Delta = \Delta$.
The same map as one matrix (eq. 6, section 3.4): $Y = M \bar\Delta X + D X$ with $M = L \circ C B^\top$ and
$L_{ij} = e^{\Delta_i A + \dots + \Delta_{j+1} A}$: attention whose mask decays.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import at_least_float32
from kernels_pallas.short_convolution import short_convolution
from kernels_pallas.ssd import segsum, ssd, ssd_step
from ssm.discretize import check_rule, discretize_log
from ssm.initializers import short_convolution_parameters, softplus_inverse_dt, uniform_fan_in
from ssm.naming import check_state, unknown
from ssm.norms import gated_rms_norm
from ssm.recurrence import segment_starts

RULES = ("exponential_euler", "zoh", "dirac")
FORMS = {"recurrent": "reference", "chunked": "xla", "auto": "auto"}  # and "quadratic", whose step is "xla"
einsum = partial(jnp.einsum, precision="highest")


class State(NamedTuple):
    """The last conv_width - 1 inputs of the convolution, the newest last, and h; float32."""

    conv_bkd: Float[Array, "b k d"]
    h_bhpn: Float[Array, "b h p n"]


def quadratic(
    x_blhp: Float[Array, "b l h p"],
    dt_blh: Float[Array, "b l h"],
    A_h: Float[Array, " h"],
    B_blgn: Float[Array, "b l g n"],
    C_blgn: Float[Array, "b l g n"],
    D_h: Float[Array, " h"],
    initial_state: Float[Array, "b h p n"] | None = None,
    *,
    rule: str = "exponential_euler",
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """One (l, l) matrix a head: masked attention (SSD, section 4.1); arguments as in `recurrent`."""
    log_decay, v_blhp = _discretized(x_blhp, dt_blh, A_h, rule)
    if segment_ids is not None:
        log_decay = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, log_decay)
    log_decay = jnp.swapaxes(log_decay, 1, 2)
    B_blhn, C_blhn = (jnp.repeat(m.astype(v_blhp.dtype), len(A_h) // m.shape[2], 2) for m in (B_blgn, C_blgn))
    L_bhls = jnp.exp(segsum(log_decay))
    M_bhls = L_bhls * einsum("blhn,bshn->bhls", C_blhn, B_blhn)
    y = einsum("bhls,bshp->blhp", M_bhls, v_blhp)
    h = einsum("bshp,bshn->bhpn", jnp.swapaxes(L_bhls[:, :, -1], 1, 2)[..., None] * v_blhp, B_blhn)
    if initial_state is not None:
        decay_bhl = jnp.exp(jnp.cumsum(log_decay, -1))
        y += einsum("bhl,bhpn,blhn->blhp", decay_bhl, initial_state.astype(y.dtype), C_blhn)
        h += decay_bhl[:, :, -1, None, None] * initial_state.astype(y.dtype)
    return _skip(y, D_h, x_blhp), h


def chunked(
    x_blhp: Float[Array, "b l h p"],
    dt_blh: Float[Array, "b l h"],
    A_h: Float[Array, " h"],
    B_blgn: Float[Array, "b l g n"],
    C_blgn: Float[Array, "b l g n"],
    D_h: Float[Array, " h"],
    initial_state: Float[Array, "b h p n"] | None = None,
    *,
    rule: str = "exponential_euler",
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int = 64,
    implementation: str = "xla",
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Attention inside chunks, a recurrence between them (SSD, section 6); arguments as in `recurrent`.

    implementation: of `kernels_pallas.ssd`.
    """
    log_decay, current = _coefficients(dt_blh, A_h, rule, at_least_float32(x_blhp.dtype))
    options = dict(reset=segment_starts(segment_ids), chunk_size=chunk_size, implementation=implementation)
    return ssd(x_blhp, log_decay, B_blgn, C_blgn, initial_state, dt_blh=current, D_h=D_h, **options)


def recurrent(
    x_blhp: Float[Array, "b l h p"],
    dt_blh: Float[Array, "b l h"],
    A_h: Float[Array, " h"],
    B_blgn: Float[Array, "b l g n"],
    C_blgn: Float[Array, "b l g n"],
    D_h: Float[Array, " h"],
    initial_state: Float[Array, "b h p n"] | None = None,
    *,
    rule: str = "exponential_euler",
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Token after token, the definition: y in x's dtype, and h after the last token in float32 or better.

    dt_blh: time per token, positive. A_h: negative, in 1 / time. B, C: head i reads group i // (h / g).
    rule: one of `RULES`. segment_ids: a token whose id differs from the one before forgets what came before.
    Raises ValueError for another rule, and as `kernels_pallas.ssd` does.
    """
    arrays = x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_state
    return chunked(*arrays, rule=rule, segment_ids=segment_ids, implementation="reference")


def step(
    x_bhp: Float[Array, "b h p"],
    dt_bh: Float[Array, "b h"],
    A_h: Float[Array, " h"],
    B_bgn: Float[Array, "b g n"],
    C_bgn: Float[Array, "b g n"],
    D_h: Float[Array, " h"],
    h_bhpn: Float[Array, "b h p n"],
    *,
    rule: str = "exponential_euler",
    implementation: str = "auto",
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """One token; arguments as in `recurrent`, implementation: of `kernels_pallas.ssd.ssd_step`."""
    log_decay, current = _coefficients(dt_bh, A_h, rule, at_least_float32(x_bhp.dtype))
    options = dict(dt_bh=current, D_h=D_h, implementation=implementation)
    return ssd_step(x_bhp, log_decay, B_bgn, C_bgn, h_bhpn, **options)


def _discretized(x, dt, A_h, rule):
    """(dt A, what enters the state along B), in float32 or better."""
    precise = at_least_float32(x.dtype)
    log_decay, current = _coefficients(dt, A_h, rule, precise)
    return log_decay, current[..., None] * x.astype(precise)


def _coefficients(dt, A_h, rule, dtype):
    check_rule(rule, "mamba2", RULES)
    A = A_h.astype(dtype).reshape((1,) * (dt.ndim - 1) + A_h.shape)
    log_decay, _, current = discretize_log(rule, A, dt.astype(dtype))
    return log_decay, current


def _skip(y, D_h, x):
    D = D_h.astype(y.dtype).reshape((1,) * (x.ndim - 2) + (-1, 1))
    return (y + D * x.astype(y.dtype)).astype(x.dtype)


class Mamba2(nn.Module):
    """Mamba-2 as a layer: in_proj gives z, x, B, C and dt of every token (SSD, section 7).

    expand, head_size: heads of head_size channels make expand x width. groups: of heads that share B and C; the norm
    has as many parts. conv_width, conv_bias: of the convolution over x, B and C. bias: of in_proj and out_proj.
    dt_min, dt_max, dt_floor: range of dt at the start; dt_limit: between which it is kept. A_range: of -A at the
    start, uniform. norm_first, norm_eps: see `gated_rms_norm`. rule: one of `RULES`.
    form: "recurrent", "quadratic", "chunked" by chunk_size tokens, or "auto", the fastest one.
    The layers start as the published ones, uniformly within 1 / sqrt(inputs).
    """

    width: int
    state_size: int = 128
    expand: int = 2
    head_size: int = 64
    groups: int = 1
    conv_width: int = 4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_limit: Sequence[float] = (0.0, float("inf"))
    A_range: Sequence[float] = (1.0, 16.0)
    conv_bias: bool = True
    bias: bool = False
    norm_first: bool = False
    norm_eps: float = 1e-5
    rule: str = "exponential_euler"
    chunk_size: int = 64
    form: str = "auto"

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        core = partial(quadratic, rule=self.rule, segment_ids=segment_ids)
        if self.form in FORMS:
            options = dict(chunk_size=self.chunk_size, implementation=FORMS[self.form])
            core = partial(chunked, rule=self.rule, segment_ids=segment_ids, **options)
        return self._layer(x_bld, state, segment_ids, core)

    def step(self, x_bd, state: State):
        def core(x, dt, A_h, B, C, D_h, h):
            options = dict(rule=self.rule, implementation=FORMS.get(self.form, "xla"))
            y, h = step(x[:, 0], dt[:, 0], A_h, B[:, 0], C[:, 0], D_h, h, **options)
            return y[:, None], h

        y, state = self._layer(x_bd[:, None], state, None, core)
        return y[:, 0], state

    def initial_state(self, batch_size: int) -> State:
        inner, states = self.expand * self.width, self.groups * self.state_size
        shapes = (self.conv_width - 1, inner + 2 * states), (self.heads, self.head_size, self.state_size)
        return State(*(jnp.zeros((batch_size, *shape), jnp.float32) for shape in shapes))

    @property
    def heads(self) -> int:
        return self.expand * self.width // self.head_size

    @nn.compact
    def _layer(self, x_bld, state, segment_ids, core):
        self._check()
        batch, length, _ = x_bld.shape
        check_state("mamba2", state, self.initial_state(batch))
        conv, h = (None, None) if state is None else state
        inner, states, heads = self.expand * self.width, self.groups * self.state_size, self.heads
        dense = partial(nn.Dense, use_bias=self.bias, dtype=x_bld.dtype, kernel_init=uniform_fan_in)

        widths = np.cumsum([inner, inner + 2 * states])
        z, xBC, dt = jnp.split(dense(int(widths[-1]) + heads, name="in_proj")(x_bld), widths, -1)
        taps = self.param("conv", short_convolution_parameters(inner + 2 * states, self.conv_width, self.conv_bias))
        options = dict(reset=segment_starts(segment_ids), implementation="xla" if self.form == "chunked" else "auto")
        xBC, conv = short_convolution(xBC, taps["weight"], taps.get("bias"), conv, **options)
        x, B, C = jnp.split(xBC, np.cumsum([inner, states]), -1)

        precise = at_least_float32(x_bld.dtype)
        start = softplus_inverse_dt(self.dt_min, self.dt_max, self.dt_floor)
        dt_bias = self.param("dt_bias", start, (heads,)).astype(precise)[None, None]
        dt = jnp.clip(jax.nn.softplus(dt.astype(precise) + dt_bias), *self.dt_limit)
        A_log = self.param("A_log", lambda key: jnp.log(jax.random.uniform(key, (heads,), jnp.float32, *self.A_range)))
        D = self.param("D", nn.initializers.ones, (heads,))
        split = lambda v, parts: v.reshape(batch, length, parts, -1)  # noqa: E731
        B, C = split(B, self.groups), split(C, self.groups)
        y, h = core(split(x, heads), dt, -jnp.exp(A_log), B, C, D, h)

        scale = self.param("norm", lambda _: {"scale": jnp.ones(inner)})["scale"]
        options = dict(groups=self.groups, norm_first=self.norm_first, eps=self.norm_eps)
        y = gated_rms_norm(y.reshape(batch, length, inner), z, scale, **options)
        return dense(self.width, name="out_proj")(y), State(conv, h)

    def _check(self):
        check_rule(self.rule, "mamba2", RULES)
        if self.form not in (*FORMS, "quadratic"):
            raise unknown("form", self.form, (*FORMS, "quadratic"))
        inner = self.expand * self.width
        for name in ("state_size", "expand", "head_size", "groups", "conv_width", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if inner % self.head_size:
            raise ValueError(f"head_size is {self.head_size}; it must divide expand x width, which is {inner}")
        if self.heads % self.groups:
            raise ValueError(f"groups is {self.groups}; it must divide the {self.heads} heads")
        if len(self.dt_limit) != 2 or not 0 <= self.dt_limit[0] < self.dt_limit[1]:
            raise ValueError(f"dt_limit is {self.dt_limit}; it must be (low, high) with 0 <= low < high")
        if len(self.A_range) != 2 or not 0 < self.A_range[0] <= self.A_range[1]:
            raise ValueError(f"A_range is {self.A_range}; it must be (low, high) with 0 < low <= high")
