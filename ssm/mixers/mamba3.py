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

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import at_least_float32
from kernels_pallas.mamba3 import State, mamba3, mamba3_step
from kernels_pallas.rotation import LAYOUTS
from ssm.discretize import discretize_log
from ssm.initializers import softplus_inverse_dt, uniform_fan_in
from ssm.naming import check_state, unknown
from ssm.norms import gated_rms_norm, rms_norm
from ssm.recurrence import segment_starts

Lanes = Float[Array, "b l *r h p"]
Keys = Float[Array, "b l *r g n"]
PerHead = Float[Array, "b l h"]
Angles = Float[Array, "b l #h s"]
Biases = Float[Array, "h r n"]


FORMS = {"recurrent": "reference", "chunked": "xla", "auto": "auto"}


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
    B_bias_hrn: Biases | None = None,
    C_bias_hrn: Biases | None = None,
    z: Lanes | None = None,
    turn_by_dt: bool = False,
    layout: str = "pairs",
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Lanes, State]:
    r"""Token after token: the definition (the equation at the top), y in v's dtype.

    v, B, C: with an axis of lanes r or without; B and C after their norm, head i reads group i // (h / g).
    dt_blh: time per token. A_blh: at most 0, in 1 / time. weight_blh: $\lambda$; None for the exponential Euler rule,
    $\lambda = 1$. angle_blhs: $\Delta_t \theta_t$, by how much each plane turns at a token, in radians, or with
    turn_by_dt $\theta_t$; (b, l, 1, s) where heads have the same; None: no plane turns. B_bias, C_bias: added to B and
    C; D_h: 0 where None; z: gates y by silu. layout: of the planes, see `kernels_pallas.rotation`.
    segment_ids: a token whose id differs from the one before forgets the state, the last token and the angle.
    """
    arrays = v, B, C, dt_blh, A_blh, weight_blh, angle_blhs, D_h, state
    options = dict(B_bias_hrn=B_bias_hrn, C_bias_hrn=C_bias_hrn, z=z, turn_by_dt=turn_by_dt, layout=layout)
    return chunked(*arrays, **options, segment_ids=segment_ids, implementation="reference")


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
    B_bias_hrn: Biases | None = None,
    C_bias_hrn: Biases | None = None,
    z: Lanes | None = None,
    turn_by_dt: bool = False,
    layout: str = "pairs",
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int = 64,
    implementation: str = "xla",
) -> tuple[Lanes, State]:
    """Matrix products over chunks of chunk_size tokens; arguments as in `recurrent`.

    implementation: of `kernels_pallas.mamba3`.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    rate_blh = dt_blh.astype(at_least_float32(v.dtype)) if turn_by_dt else None
    options = dict(rate_blh=rate_blh, B_bias_hrn=B_bias_hrn, C_bias_hrn=C_bias_hrn, D_h=D_h, z=z)
    options |= dict(reset=segment_starts(segment_ids), layout=layout)
    options |= dict(chunk_size=chunk_size, implementation=implementation)
    return mamba3(v, B, C, *_coefficients(A_blh, dt_blh, weight_blh, v.dtype), angle_blhs, state, **options)


def step(
    v: Float[Array, "b *r h p"],
    B: Float[Array, "b *r g n"],
    C: Float[Array, "b *r g n"],
    dt_bh: Float[Array, "b h"],
    A_bh: Float[Array, "b h"],
    weight_bh: Float[Array, "b h"] | None = None,
    angle_bhs: Float[Array, "b _ s"] | None = None,
    D_h: Float[Array, " h"] | None = None,
    state: State | None = None,
    *,
    B_bias_hrn: Biases | None = None,
    C_bias_hrn: Biases | None = None,
    z: Float[Array, "b *r h p"] | None = None,
    turn_by_dt: bool = False,
    layout: str = "pairs",
    implementation: str = "auto",
) -> tuple[Float[Array, "b *r h p"], State]:
    """One token; arguments as in `recurrent`, implementation: of `kernels_pallas.ssd.ssd_step`."""
    log_decay, previous, current = _coefficients(A_bh, dt_bh, weight_bh, v.dtype)
    previous = None if weight_bh is None else previous
    options = dict(rate_bh=dt_bh if turn_by_dt else None, B_bias_hrn=B_bias_hrn, C_bias_hrn=C_bias_hrn, D_h=D_h, z=z)
    options |= dict(layout=layout, implementation=implementation)
    return mamba3_step(v, B, C, log_decay, previous, current, angle_bhs, state, **options)


def _coefficients(A, dt, weight, dtype):
    """(log decay, previous, current) of the trapezoidal rule, or without weights of Euler's."""
    rule = "exponential_euler" if weight is None else "exponential_trapezoidal"
    precise = at_least_float32(dtype)
    A, dt, weight = (x if x is None else x.astype(precise) for x in (A, dt, weight))
    return discretize_log(rule, A, dt, weight=weight)


def _zeros(b, r, h, p, n, s, dtype=jnp.float32):
    """The state before any token: r lanes, h heads of p channels and n states, s planes that turn."""
    return State(*(jnp.zeros((b, *shape), dtype) for shape in ((h, s), (h, p, n), (r, h, n), (r, h, p))))


CHOICES = {
    "A_activation": ("heavy_tail", "softplus"),
    "angle_activation": ("tanh", "none"),
    "rotation": ("data", "fixed", "none"),
    "form": tuple(FORMS),
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
    A_range: where given, not in the published code: the projection has a bias a head with which -A starts log-uniform
    in it, to remember for long with large dt too. With "softplus" alone: "heavy_tail" hardly moves where it is small.
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
    A_range: Sequence[float] = ()
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
        options = dict(segment_ids=segment_ids, chunk_size=chunk_size, implementation=FORMS.get(self.form))
        return self._layer(x_bld, state, partial(chunked, **options))

    def step(self, x_bd, state: State):
        def run(*arrays, z, **options):
            *tokens, D_h, state = arrays
            *tokens, z = jax.tree.map(lambda x: x[:, 0], (*tokens, z))
            y, state = step(*tokens, D_h, state, z=z, implementation=FORMS.get(self.form), **options)
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
        if self.A_range:
            A += self.param("A_bias", softplus_inverse_dt(*self.A_range, floor=self.A_floor), (self.heads,))[None, None]
        A = jnp.minimum(-(heavy_tail if self.A_activation == "heavy_tail" else jax.nn.softplus)(A), -self.A_floor)
        weight = jax.nn.sigmoid(weight) if self.trapezoid else None
        B, C = self._normed("B", B), self._normed("C", C)
        if self.mimo:
            v, z = v[:, :, None] * self._lanes("mimo_x", 1 / self.rank, v), z[:, :, None] * self._lanes("mimo_z", 1, v)
        else:
            B, C = B[:, :, 0], C[:, :, 0]
        D = self.param("D", nn.initializers.ones, (self.heads,))
        options = dict(B_bias_hrn=self._bias("B"), C_bias_hrn=self._bias("C"), turn_by_dt=self.rotation == "data")
        options |= dict(layout="halves" if self.mimo else "pairs", z=None if self.output_norm else z)
        y, state = run(v, B, C, dt, A, weight, self._angle(theta), D, state, **options)
        y = self._normed_and_gated(y, z) if self.output_norm else y
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

    def _normed(self, name, B_blrgn):
        if not self.BC_norm:
            return B_blrgn
        scale = self.param(f"{name}_norm", lambda _: {"scale": jnp.ones(self.state_size)})["scale"]
        return rms_norm(B_blrgn, scale, eps=self.norm_eps)

    def _bias(self, name):
        shape = self.heads, self.rank, self.state_size
        return self.param(f"{name}_bias", nn.initializers.ones, shape) if self.BC_bias else None

    def _angle(self, theta_bls):
        """Of the planes, by time where rotation is "data", else a token."""
        if self.rotation == "none":
            return None
        if self.rotation == "fixed":
            frequency = 10000.0 ** (-np.arange(self.planes) / self.planes)
            # A constant's sum over time XLA would take while it compiles, for minutes.
            frequency = jax.lax.optimization_barrier(frequency.astype(np.float32))
            return jnp.broadcast_to(frequency, (*theta_bls.shape[:2], 1, self.planes))
        theta = jnp.pi * jnp.tanh(theta_bls) if self.angle_activation == "tanh" else theta_bls
        return theta[:, :, None]

    def _normed_and_gated(self, y, z):
        """Each head of y normed, times silu(z); lanes side by side."""
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
        if self.A_range and (len(self.A_range) != 2 or not 0 < self.A_range[0] <= self.A_range[1]):
            raise ValueError(f"A_range is {self.A_range}; it must be (low, high) with 0 < low <= high")
        if self.A_range and self.A_activation != "softplus":
            raise ValueError(f"A_range is {self.A_range}; it needs A_activation softplus")
        if self.rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction is {self.rope_fraction}; it must be 0.5 or 1.0")
        if self.rotation != "none" and (self.state_size % 2 or not self.planes):
            raise ValueError(f"state_size is {self.state_size}; where {self.rope_fraction} of it turns it must be a "
                             f"multiple of 2, at least {round(2 / self.rope_fraction)}")  # fmt: skip
        check_state("mamba3", state, self.initial_state(batch))
