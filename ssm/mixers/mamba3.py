r"""Mamba-3: a trapezoidal rule, states that turn, several inputs and outputs a head (arXiv:2603.15569).

With $v_t$ the input, $k_t = B_t$, $q_t = C_t$, a scalar decay a head and token, and planes of the state turned by
the angles $\Delta_t \theta_t$ (section 3; the rule is `ssm.discretize`'s exponential_trapezoidal with weight
$\lambda_t$):

$h_t = e^{\Delta_t A_t} (h_{t-1} + (1 - \lambda_t) \Delta_t v_{t-1} k_{t-1}^\top) R_t^\top
+ \lambda_t \Delta_t v_t k_t^\top$, $y_t = h_t q_t + D v_t$.

Turning k and q by the angle summed up so far, $\phi_t = \sum_{s \le t} \Delta_s \theta_s$, takes the $R_t$ out of the
recurrence. As the published code turns both by $+\phi$, the state turns by $-\phi$: it is the system with eigenvalues
$A - i\theta$. With R inputs and outputs (MIMO), $v k^\top$ is a sum over R lanes that share h.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import at_least_float32
from kernels_pallas.ssd import ssd, ssd_step
from ssm.discretize import discretize, discretize_log
from ssm.initializers import softplus_inverse_dt, uniform_fan_in
from ssm.naming import check_state, unknown
from ssm.norms import gated_rms_norm, rms_norm
from ssm.recurrence import segment_starts
from ssm.rotation import rotate, summed_angle

Lanes = Float[Array, "b l *r h p"]
Keys = Float[Array, "b l *r g n"]
PerHead = Float[Array, "b l h"]
Angles = Float[Array, "b l h s"]


class State(NamedTuple):
    """The summed angle within [-pi, pi], h of k that are turned by it, and the last token's turned k and its v."""

    angle_bhs: Float[Array, "b h s"]
    h_bhpn: Float[Array, "b h p n"]
    k_brhn: Float[Array, "b r h n"]
    v_brhp: Float[Array, "b r h p"]


def recurrent(
    v: Lanes,
    B: Keys,
    C: Keys,
    dt_blh: PerHead,
    A_blh: PerHead,
    weight_blh: PerHead | None = None,
    angle_blhs: Angles | None = None,
    D_h: Float[Array, " h"] | None = None,
    state: State | None = None,
    *,
    layout: str = "pairs",
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Lanes, State]:
    r"""Token after token: the definition (the equation at the top), y in v's dtype.

    v, B, C: with an axis of lanes r or without; B and C after norm and bias, head i reads group i // (h / g).
    dt_blh: time per token. A_blh: at most 0, in 1 / time. weight_blh: $\lambda$; None for the exponential Euler rule,
    $\lambda = 1$. angle_blhs: $\Delta_t \theta_t$, by how much each plane turns at a token, in radians; None: no plane
    does. D_h: 0 where None. layout: of the planes, see `rotate`. segment_ids: a token whose id differs from the one
    before forgets the state, the last token and the angle.
    """
    v_blrhp, k, q, angle_bhs, state, reset = _turned(v, B, C, angle_blhs, state, segment_ids, layout)
    coefficients = _coefficients(discretize, A_blh, dt_blh, weight_blh, v_blrhp.dtype)
    keep = jnp.ones(v.shape[:2], bool) if reset is None else ~reset

    def advance(carry, token):
        keep_b, (decay, previous, current), v_brhp, k_brhn, q_brhn = token
        h, v_before, k_before = jax.tree.map(lambda x: jnp.where(keep_b[:, None, None, None], x, 0), carry)
        h = decay * h + previous * _outer(v_before, k_before) + current * _outer(v_brhp, k_brhn)
        return (h, v_brhp, k_brhn), jnp.einsum("bhpn,brhn->brhp", h, q_brhn, precision="highest")

    coefficients = tuple(x[..., None, None] for x in coefficients)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (keep, coefficients, v_blrhp, k, q))
    (h, v_brhp, k_brhn), y = jax.lax.scan(advance, (state.h_bhpn, state.v_brhp, state.k_brhn), tokens)
    return _read(jnp.moveaxis(y, 0, 1), v, v_blrhp, D_h), State(angle_bhs, h, k_brhn, v_brhp)


def chunked(
    v: Lanes,
    B: Keys,
    C: Keys,
    dt_blh: PerHead,
    A_blh: PerHead,
    weight_blh: PerHead | None = None,
    angle_blhs: Angles | None = None,
    D_h: Float[Array, " h"] | None = None,
    state: State | None = None,
    *,
    layout: str = "pairs",
    chunk_size: int = 64,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Lanes, State]:
    r"""Matrix products over chunks of chunk_size tokens; arguments as in `recurrent`.

    All that is older than the token is state space duality's recurrence with the input one token late,
    $g_t = a_t g_{t-1} + (a_t \gamma_{t-1} + \beta_t) v_{t-1} k_{t-1}^\top$ with $(a, \beta, \gamma)$ the rule's
    coefficients: $h_t = g_t + \gamma_t v_t k_t^\top$. No token looks ahead, and nothing is subtracted again.
    """
    v_blrhp, k, q, angle_bhs, state, reset = _turned(v, B, C, angle_blhs, state, segment_ids, layout)
    rule = A_blh, dt_blh, weight_blh, v_blrhp.dtype
    decay, previous, current = _coefficients(discretize, *rule)
    late = decay * _late(current, jnp.zeros_like(current[:, 0])) + previous
    late = late if reset is None else jnp.where(reset[..., None], 0, late)
    x = late[:, :, None, :, None] * _late(v_blrhp, state.v_brhp)

    as_given = lambda x: (x if v.ndim == 5 else x[:, :, 0]).astype(v.dtype)  # noqa: E731
    arrays = as_given(x), _coefficients(discretize_log, *rule).log_decay, as_given(_late(k, state.k_brhn)), as_given(q)
    y, g = ssd(*arrays, state.h_bhpn, reset=reset, chunk_size=chunk_size)
    score = jnp.einsum("blrhn,blihn->blrih", q, k, precision="highest") * current[:, :, None, None]
    now = jnp.einsum("blrih,blihp->blrhp", score, v_blrhp, precision="highest")
    h = g + current[:, -1, :, None, None] * _outer(v_blrhp[:, -1], k[:, -1])
    y = y.reshape(v_blrhp.shape).astype(now.dtype) + now
    return _read(y, v, v_blrhp, D_h), State(angle_bhs, h, k[:, -1], v_blrhp[:, -1])


def step(
    v: Float[Array, "b *r h p"],
    B: Float[Array, "b *r g n"],
    C: Float[Array, "b *r g n"],
    dt_bh: Float[Array, "b h"],
    A_bh: Float[Array, "b h"],
    weight_bh: Float[Array, "b h"] | None = None,
    angle_bhs: Float[Array, "b h s"] | None = None,
    D_h: Float[Array, " h"] | None = None,
    state: State | None = None,
    *,
    layout: str = "pairs",
    implementation: str = "auto",
) -> tuple[Float[Array, "b *r h p"], State]:
    """One token; arguments as in `recurrent`, implementation: of `kernels_pallas.ssd.ssd_step`.

    It writes twice the lanes that it reads: those of the token before, as far as the rule has them, and its own.
    """
    token = jax.tree.map(lambda x: x[:, None], (v, B, C, angle_bhs))
    v_blrhp, k, q, angle_bhs, state, _ = _turned(*token, state, None, layout)
    now_brhp, k_brhn, q_brhn = v_blrhp[:, 0], k[:, 0], q[:, 0]
    decay, previous, current = _coefficients(discretize_log, A_bh, dt_bh, weight_bh, now_brhp.dtype)
    x, keys = current[:, None, :, None] * now_brhp, k_brhn
    if weight_bh is not None:
        before = (jnp.exp(decay) * previous)[:, None, :, None] * state.v_brhp
        x, keys = jnp.concatenate([before, x], 1), jnp.concatenate([state.k_brhn, keys], 1)
    y, h = ssd_step(x, decay, keys, q_brhn, state.h_bhpn, implementation=implementation)
    return _read(y[:, None], token[0], v_blrhp, D_h)[:, 0], State(angle_bhs, h, k_brhn, now_brhp)


def _coefficients(discretization, A_blh, dt_blh, weight_blh, dtype):
    A, dt, weight = (x if x is None else x.astype(dtype) for x in (A_blh, dt_blh, weight_blh))
    rule = "exponential_euler" if weight is None else "exponential_trapezoidal"
    return discretization(rule, A, dt, weight=weight)


def _late(x, entering):
    """x one token later, `entering` at the first."""
    return jnp.concatenate([entering[:, None], x[:, :-1]], 1)


def _outer(v_brhp, k_brhn):
    return jnp.einsum("brhp,brhn->bhpn", v_brhp, k_brhn, precision="highest")


def _read(y_blrhp, v, v_blrhp, D_h):
    y = y_blrhp if D_h is None else y_blrhp + D_h.astype(v_blrhp.dtype)[None, None, None, :, None] * v_blrhp
    return y.reshape(v.shape).astype(v.dtype)


def _turned(v, B, C, angle_blhs, state, segment_ids, layout):
    """v, k and q with their lanes, a k and q for each head turned by the summed angle, and what they start from."""
    precise = at_least_float32(v.dtype)
    v, k, q = (x.astype(precise) if v.ndim == 5 else x.astype(precise)[:, :, None] for x in (v, B, C))
    k, q = (jnp.repeat(x, v.shape[3] // x.shape[3], 3) for x in (k, q))
    planes = 0 if angle_blhs is None else angle_blhs.shape[-1]
    state = _zeros(*v[:, 0].shape, k.shape[-1], planes, precise) if state is None else state
    reset, angle = segment_starts(segment_ids), state.angle_bhs
    if angle_blhs is not None:
        total = summed_angle(angle_blhs.astype(precise), angle, reset)
        turn = jnp.cos(total)[:, :, None], jnp.sin(total)[:, :, None]
        k, q, angle = rotate(k, turn, layout), rotate(q, turn, layout), total[:, -1]
    return v, k, q, angle, state, reset


def _zeros(b, r, h, p, n, s, dtype=jnp.float32):
    """The state before any token: r lanes, h heads of p channels and n states, s planes that turn."""
    return State(*(jnp.zeros((b, *shape), dtype) for shape in ((h, s), (h, p, n), (r, h, n), (r, h, p))))


STEPS = {"recurrent": "reference", "chunked": "xla", "auto": "auto"}  # form: of `ssd_step`
CHOICES = {
    "A_activation": ("heavy_tail", "softplus"),
    "angle_activation": ("tanh", "none"),
    "rotation": ("data", "fixed", "none"),
    "form": tuple(STEPS),
}


def heavy_tail(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 + x above 0 and 1 / (1 - x) below: positive, and slower to reach 0 than softplus."""
    return jnp.maximum(x, 0) + 1 / (1 - jnp.minimum(x, 0))


class Mamba3(nn.Module):
    r"""Mamba-3 as a layer: in_proj gives z, x, B, C, dt, A, lambda and theta of every token (section 3.4).

    expand, head_size: heads of head_size channels make expand x width. groups: heads that share B and C before the
    bias. mimo, rank: R lanes made from x by mimo_x, gated by mimo_z, added up by mimo_o; 1 without mimo.
    rotation: "data", "none", or "fixed", rotary embedding's $10000^{-i/s}$ radians a token for plane i of s.
    rope_fraction: of the states that turn, 0.5 or 1. angle_activation: $\theta$ is $\pi \tanh$ of its projection, as
    in the published code, or with "none" the projection, as in the paper.
    A_activation: A is minus this of its projection, at most -A_floor; "softplus" is the published code's up to 2.3.2.
    trapezoid: off, lambda is 1. BC_norm, BC_bias: RMS norm of B and C over the states, then a bias a head and lane.
    output_norm: RMS norm of each head before the gate. dt_min, dt_max, dt_floor: range of dt at the start.
    chunk_size: 64 / R where None. form: "recurrent", "chunked", or "auto", which is the latter.
    """

    width: int
    state_size: int = 128
    expand: int = 2
    head_size: int = 64
    groups: int = 1
    mimo: bool = False
    rank: int = 1
    rotation: str = "data"
    rope_fraction: float = 0.5
    angle_activation: str = "tanh"
    A_activation: str = "heavy_tail"
    A_floor: float = 1e-4
    trapezoid: bool = True
    BC_norm: bool = True
    BC_bias: bool = True
    output_norm: bool = False
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    form: str = "auto"

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        chunk_size = max(1, 64 // self.rank) if self.chunk_size is None else self.chunk_size
        run = recurrent if self.form == "recurrent" else partial(chunked, chunk_size=chunk_size)
        return self._layer(x_bld, state, partial(run, segment_ids=segment_ids))

    def step(self, x_bd, state: State):
        def run(*arrays, layout):
            *tokens, D_h, state = arrays
            tokens = jax.tree.map(lambda x: x[:, 0], tokens)
            y, state = step(*tokens, D_h, state, layout=layout, implementation=STEPS[self.form])
            return y[:, None], state

        y, state = self._layer(x_bd[:, None], state, run)
        return y[:, 0], state

    def initial_state(self, batch_size: int) -> State:
        return _zeros(batch_size, self.rank, self.heads, self.head_size, self.state_size, self.planes)

    @property
    def heads(self) -> int:
        return self.expand * self.width // self.head_size

    @property
    def planes(self) -> int:
        """How many planes of the state turn."""
        return 0 if self.rotation == "none" else int(self.state_size * self.rope_fraction) // 2

    @nn.compact
    def _layer(self, x_bld, state, run):
        self._check(state, len(x_bld))
        dense = partial(nn.Dense, use_bias=False, dtype=x_bld.dtype, kernel_init=uniform_fan_in)
        z, v, B, C, dt, A, weight, theta = self._split(dense(sum(self._sizes()), name="in_proj")(x_bld))
        start = softplus_inverse_dt(self.dt_min, self.dt_max, self.dt_floor)
        dt = jax.nn.softplus(dt + self.param("dt_bias", start, (self.heads,))[None, None])
        A = jnp.minimum(-(heavy_tail if self.A_activation == "heavy_tail" else jax.nn.softplus)(A), -self.A_floor)
        weight = jax.nn.sigmoid(weight) if self.trapezoid else None
        B, C = self._key("B", B), self._key("C", C)
        if self.mimo:
            v, z = v[:, :, None] * self._lanes("mimo_x", 1 / self.rank, v), z[:, :, None] * self._lanes("mimo_z", 1, v)
        else:
            B, C = B[:, :, 0], C[:, :, 0]
        D = self.param("D", nn.initializers.ones, (self.heads,))
        arrays = v, B, C, dt, A, weight, self._angle(dt, theta), D, state
        y, state = run(*arrays, layout="halves" if self.mimo else "pairs")
        y = self._gate(y, z)
        if self.mimo:
            y = (y * self._lanes("mimo_o", 1 / self.rank, y)).sum(2)
        return dense(self.width, name="out_proj")(y.reshape(*x_bld.shape[:2], -1)), state

    def _sizes(self):
        """Of z, x, B, C, dt, A, lambda and theta, in this order in in_proj."""
        h, inner, keys = self.heads, self.heads * self.head_size, self.rank * self.groups * self.state_size
        return inner, inner, keys, keys, h, h, h * self.trapezoid, self.planes * (self.rotation == "data")

    def _split(self, projected):
        """The parts, z and x with their heads, B and C with lanes and groups; all but z and x in float32."""
        z, v, B, C, *rest = jnp.split(projected, np.cumsum(self._sizes())[:-1].tolist(), -1)
        z, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in (z, v))
        B, C = (x.reshape(*x.shape[:2], self.rank, self.groups, -1) for x in (B, C))
        return z, v, *(x.astype(jnp.float32) for x in (B, C, *rest))

    def _lanes(self, name, value, like):
        lanes_hrp = self.param(name, nn.initializers.constant(value), (self.heads, self.rank, self.head_size))
        return jnp.swapaxes(lanes_hrp, 0, 1)[None, None].astype(like.dtype)

    def _key(self, name, B_blrgn):
        """B or C after its norm and its bias."""
        if self.BC_norm:
            scale = self.param(f"{name}_norm", lambda _: {"scale": jnp.ones(self.state_size)})["scale"]
            B_blrgn = rms_norm(B_blrgn, scale, eps=self.norm_eps)
        if not self.BC_bias:
            return B_blrgn
        bias_hrn = self.param(f"{name}_bias", nn.initializers.ones, (self.heads, self.rank, self.state_size))
        return jnp.repeat(B_blrgn, self.heads // self.groups, 3) + jnp.swapaxes(bias_hrn, 0, 1)[None, None]

    def _angle(self, dt_blh, theta_bls):
        if self.rotation == "none":
            return None
        if self.rotation == "fixed":
            frequency = 10000.0 ** (-np.arange(self.planes) / self.planes)
            return jnp.broadcast_to(frequency.astype(np.float32), (*dt_blh.shape, self.planes))
        theta = jnp.pi * jnp.tanh(theta_bls) if self.angle_activation == "tanh" else theta_bls
        return dt_blh[..., None] * theta[:, :, None]

    def _gate(self, y, z):
        """y silu(z), each head of y normed before it where output_norm; lanes side by side."""
        if not self.output_norm:
            return y * nn.silu(z)
        scale = self.param("norm", lambda _: {"scale": jnp.ones(self.heads * self.head_size)})["scale"]
        y, z = (x.reshape(*x.shape[:-2], -1) for x in (y, z))
        y = gated_rms_norm(y, z, scale, groups=self.heads, norm_first=True, eps=self.norm_eps)
        return y.reshape(*y.shape[:-1], self.heads, -1)

    def _check(self, state, batch):
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise unknown(field, getattr(self, field), allowed)
        for field in ("state_size", "expand", "head_size", "groups", "rank"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        inner = self.expand * self.width
        if inner % self.head_size:
            raise ValueError(f"head_size is {self.head_size}; it must divide expand x width, which is {inner}")
        if self.heads % self.groups:
            raise ValueError(f"groups is {self.groups}; it must divide the {self.heads} heads")
        if self.rank > 1 and not self.mimo:
            raise ValueError(f"rank is {self.rank}; it must be 1 without mimo")
        if self.rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction is {self.rope_fraction}; it must be 0.5 or 1.0")
        if self.rotation != "none" and (self.state_size % 2 or not self.planes):
            raise ValueError(f"state_size is {self.state_size}; where {self.rope_fraction} of it turns it must be a "
                             f"multiple of 2, at least {round(2 / self.rope_fraction)}")  # fmt: skip
        check_state("mamba3", state, self.initial_state(batch))
