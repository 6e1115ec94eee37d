r"""Gated DeltaNet: a state that is corrected rather than added to (Yang et al. 2024, arXiv:2412.06464).

With keys of length 1, a step $\beta_t$ and a decay $\alpha_t$ a head and token (eq. 10),

$h_t = \alpha_t h_{t-1} (I - \beta_t k_t k_t^\top) + \beta_t v_t k_t^\top$, $y_t = h_t q_t$:

what the decayed state answers to $k_t$ moves by the share $\beta_t$ towards $v_t$. With $\alpha = 1$ it is DeltaNet
(arXiv:2406.06484). The transition has the eigenvalue $\alpha_t (1 - \beta_t)$ along $k_t$ and $\alpha_t$ elsewhere:
with $\beta$ in (0, 2) it reflects, and products of reflections follow what decays cannot, such as parity
(arXiv:2411.12537). Transitions are no longer diagonal, and do not commute.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import at_least_float32, varying_like
from kernels_pallas.short_convolution import short_convolution
from kernels_pallas.ssd import segsum
from ssm.discretize import discretize_log
from ssm.initializers import short_convolution_parameters, softplus_inverse_dt, uniform_fan_in
from ssm.naming import check_state, unknown
from ssm.norms import gated_rms_norm, l2_norm, rms_norm
from ssm.recurrence import segment_starts

FORMS = ("auto", "recurrent", "chunked")
einsum = partial(jnp.einsum, precision="highest")


class State(NamedTuple):
    """The last conv_width - 1 inputs of the convolution, the newest last, and h; float32."""

    conv_bkd: Float[Array, "b k d"]
    h_bhpn: Float[Array, "b h p n"]


def recurrent(
    q_blgn: Float[Array, "b l g n"],
    k_blgn: Float[Array, "b l g n"],
    v_blhp: Float[Array, "b l h p"],
    beta_blh: Float[Array, "b l h"],
    log_decay_blh: Float[Array, "b l h"] | None = None,
    initial_state: Float[Array, "b h p n"] | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    r"""Token after token, the definition: y in v's dtype, and h after the last token in float32 or better.

    q, k: head i reads group i // (h / g); k of length 1: where beta |k|^2 exceeds 2 the state can grow.
    beta_blh: in [0, 2]. log_decay_blh: $\log \alpha$, at most 0, down to -inf; None: no decay.
    segment_ids: a token whose id differs from the one before forgets what came before. The gradient keeps one state a
    token.
    """
    h, tokens = _prepared(q_blgn, k_blgn, v_blhp, beta_blh, log_decay_blh, initial_state, segment_ids)

    def advance(h, token):
        q_bhn, k_bhn, v_bhp, beta_bh, log_decay_bh = token
        h = jnp.exp(log_decay_bh)[..., None, None] * h
        error_bhp = v_bhp - einsum("bhpn,bhn->bhp", h, k_bhn)
        h = h + (beta_bh[..., None] * error_bhp)[..., None] * k_bhn[:, :, None]
        return h, einsum("bhpn,bhn->bhp", h, q_bhn)

    last, y = jax.lax.scan(advance, h, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1).astype(v_blhp.dtype), last


def chunked(
    q_blgn: Float[Array, "b l g n"],
    k_blgn: Float[Array, "b l g n"],
    v_blhp: Float[Array, "b l h p"],
    beta_blh: Float[Array, "b l h"],
    log_decay_blh: Float[Array, "b l h"] | None = None,
    initial_state: Float[Array, "b h p n"] | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    r"""Matrix products inside chunks, one dense transition between them; arguments as in `recurrent`.

    A token adds $u_t k_t^\top$ with $u_t = \beta_t (v_t - \alpha_t h_{t-1} k_t)$, so that in a chunk entered by h
    (section 3.3, the extended WY form), with $L_{ts} = \alpha_t \cdots \alpha_{s+1}$ and
    $\gamma_t = \alpha_t \cdots \alpha_1$,

    $(I + T) U = \mathrm{diag}(\beta) (V - \mathrm{diag}(\gamma) K h^\top)$, $T_{ts} = \beta_t L_{ts} k_t^\top k_s$ for
    s < t. That triangle is solved, not inverted: with keys of length 1 no entry of $(I + T)^{-1}$ exceeds 2.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    h, tokens = _prepared(q_blgn, k_blgn, v_blhp, beta_blh, log_decay_blh, initial_state, segment_ids)
    batch, length, heads, p = v_blhp.shape
    q = min(chunk_size, length)
    y, queries, transition, added = _inside(*(_chunks(x, q) for x in tokens))

    def across(h, chunk):
        transition_bhmn, added_bhpn = chunk
        return einsum("bhpm,bhmn->bhpn", h, transition_bhmn) + added_bhpn, h

    last, states = jax.lax.scan(across, h, (jnp.moveaxis(transition, 1, 0), jnp.moveaxis(added, 1, 0)))
    y += einsum("bchqn,cbhpn->bchqp", queries, states)
    y = jnp.swapaxes(y, 2, 3).reshape(batch, -1, heads, p)
    return y[:, :length].astype(v_blhp.dtype), last


def step(
    q_bgn: Float[Array, "b g n"],
    k_bgn: Float[Array, "b g n"],
    v_bhp: Float[Array, "b h p"],
    beta_bh: Float[Array, "b h"],
    log_decay_bh: Float[Array, "b h"] | None = None,
    h_bhpn: Float[Array, "b h p n"] | None = None,
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """One token; arguments as in `recurrent`."""
    token = jax.tree.map(lambda x: x[:, None], (q_bgn, k_bgn, v_bhp, beta_bh, log_decay_bh))
    y, h_bhpn = recurrent(*token, h_bhpn)
    return y[:, 0], h_bhpn


def _prepared(q, k, v, beta, log_decay, h, segment_ids):
    """The state before the first token, and (q, k, v, beta, log_decay) of every head in float32 or better."""
    precise, heads = at_least_float32(v.dtype), v.shape[2]
    q, k = (jnp.repeat(x.astype(precise), heads // x.shape[2], 2) for x in (q, k))
    v, beta = v.astype(precise), beta.astype(precise)
    if log_decay is None:  # kept from the compiler, which would sum up a constant for seconds
        log_decay = jax.lax.optimization_barrier(jnp.zeros_like(beta))
    log_decay = log_decay.astype(precise)
    if segment_ids is not None:
        log_decay = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, log_decay)
    h = jnp.zeros((len(v), *v.shape[2:], k.shape[-1]), precise) if h is None else h.astype(precise)
    tokens = q, k, v, beta, log_decay
    return varying_like(h, *tokens), tokens


def _chunks(x_blh, q):
    """(b, l, h, ...) as (b, c, h, q, ...); what is added behind has no key, no step and no decay."""
    x = jnp.pad(x_blh, ((0, 0), (0, -x_blh.shape[1] % q)) + ((0, 0),) * (x_blh.ndim - 2))
    return jnp.swapaxes(x.reshape(len(x), -1, q, *x.shape[2:]), 2, 3)


@jax.checkpoint
def _inside(q_bchqn, k_bchqn, v_bchqp, beta_bchq, log_decay_bchq):
    """What a chunk answers without a state, the queries that the entering state answers, and its map of states.

    The map is h -> h transition + added. Made anew by the backward pass, so that no (q, q) matrix is kept.
    """
    p, n = v_bchqp.shape[-1], k_bchqn.shape[-1]
    decay_bchqs = jnp.exp(segsum(log_decay_bchq))
    entering_bchq1 = jnp.exp(jnp.cumsum(log_decay_bchq, -1))[..., None]
    T = beta_bchq[..., None] * decay_bchqs * einsum("bchqn,bchsn->bchqs", k_bchqn, k_bchqn)
    right = beta_bchq[..., None] * jnp.concatenate([v_bchqp, entering_bchq1 * k_bchqn], -1)
    U = jax.lax.linalg.triangular_solve(T, right, left_side=True, lower=True, unit_diagonal=True)

    scores = decay_bchqs * einsum("bchqn,bchsn->bchqs", q_bchqn, k_bchqn)
    y, read = jnp.split(einsum("bchqs,bchsm->bchqm", scores, U), [p], -1)
    to_end = decay_bchqs[..., -1, :, None] * k_bchqn
    added, removed = jnp.split(einsum("bchqm,bchqn->bchmn", U, to_end), [p], -2)
    eye = jnp.eye(n, dtype=U.dtype)[None, None, None]
    return y, entering_bchq1 * q_bchqn - read, entering_bchq1[..., -1:, :] * eye - removed, added


class GatedDeltaNet(nn.Module):
    r"""Gated DeltaNet as a layer: in_proj gives z, q, k, v, beta and dt of every token (section 3.4).

    heads of head_size channels (2 x state_size where None); groups: heads that share q and k (None: heads).
    conv_width, conv_bias: of the convolution over q, k and v, with SiLU after it; q and k are then brought to length 1,
    and q is divided by sqrt(state_size).
    decay: $\alpha = e^{\Delta A}$ as in Mamba-2; off, $\alpha = 1$ (DeltaNet). dt_min, dt_max, dt_floor: range of dt at
    the start; A_range: of -A, uniform. negative_eigenvalues: $\beta$ is twice the sigmoid.
    output_gate: silu(z) times the RMS norm of each head's y, one scale for all heads; off, the norm alone.
    form: of `FORMS`, "auto" being "chunked" by chunk_size tokens.
    """

    width: int
    state_size: int = 128
    heads: int = 4
    head_size: int | None = None
    groups: int | None = None
    conv_width: int = 4
    conv_bias: bool = False
    decay: bool = True
    negative_eigenvalues: bool = False
    output_gate: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    A_range: Sequence[float] = (0.0, 16.0)
    norm_eps: float = 1e-5
    chunk_size: int = 64
    form: str = "auto"

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        return self._layer(x_bld, state, segment_ids, self.form)

    def step(self, x_bd, state: State):
        y, state = self._layer(x_bd[:, None], state, None, "recurrent")
        return y[:, 0], state

    def initial_state(self, batch_size: int) -> State:
        groups, p = self._sizes()
        convolved = 2 * groups * self.state_size + self.heads * p
        shapes = (self.conv_width - 1, convolved), (self.heads, p, self.state_size)
        return State(*(jnp.zeros((batch_size, *shape), jnp.float32) for shape in shapes))

    def _sizes(self):
        """(groups, head size)."""
        groups = self.heads if self.groups is None else self.groups
        return groups, 2 * self.state_size if self.head_size is None else self.head_size

    @nn.compact
    def _layer(self, x_bld, state, segment_ids, form):
        self._check()
        batch, length, _ = x_bld.shape
        check_state("gated_deltanet", state, self.initial_state(batch))
        conv, h = (None, None) if state is None else state
        groups, p = self._sizes()
        keys, inner, precise = groups * self.state_size, self.heads * p, at_least_float32(x_bld.dtype)
        dense = partial(nn.Dense, use_bias=False, dtype=x_bld.dtype, kernel_init=uniform_fan_in)

        widths = [inner * self.output_gate, 2 * keys + inner, self.heads, self.heads * self.decay]
        z, qkv, beta, dt = jnp.split(dense(sum(widths), name="in_proj")(x_bld), np.cumsum(widths)[:-1].tolist(), -1)
        taps = self.param("conv", short_convolution_parameters(2 * keys + inner, self.conv_width, self.conv_bias))
        qkv, conv = short_convolution(qkv, taps["weight"], taps.get("bias"), conv, reset=segment_starts(segment_ids))
        q, k, v = jnp.split(qkv, [keys, 2 * keys], -1)

        # Rounded to bfloat16 a key is longer or shorter than 1 by up to 2^-9, and so is what a reflection keeps.
        q, k = (l2_norm(x.astype(precise).reshape(batch, length, groups, -1)) for x in (q, k))
        beta = (2 if self.negative_eigenvalues else 1) * jax.nn.sigmoid(beta.astype(precise))
        run = recurrent if form == "recurrent" else partial(chunked, chunk_size=self.chunk_size)
        v, log_decay = v.reshape(batch, length, self.heads, p), self._log_decay(dt.astype(precise))
        y, h = run(q * self.state_size**-0.5, k, v, beta, log_decay, h, segment_ids=segment_ids)

        scale = self.param("norm", lambda _: {"scale": jnp.ones(p)})["scale"]
        if self.output_gate:
            y = gated_rms_norm(y, z.reshape(y.shape), scale, norm_first=True, eps=self.norm_eps)
        else:
            y = rms_norm(y, scale, eps=self.norm_eps)
        return dense(self.width, name="out_proj")(y.reshape(batch, length, inner)), State(conv, h)

    def _log_decay(self, dt_blh):
        if not self.decay:
            return None
        low, high = self.A_range
        draw = lambda key: jnp.log(high - (high - low) * jax.random.uniform(key, (self.heads,)))  # noqa: E731
        A = -jnp.exp(self.param("A_log", draw).astype(dt_blh.dtype))[None, None]
        start = softplus_inverse_dt(self.dt_min, self.dt_max, self.dt_floor)
        dt_bias = self.param("dt_bias", start, (self.heads,)).astype(dt_blh.dtype)[None, None]
        return discretize_log("exponential_euler", A, jax.nn.softplus(dt_blh + dt_bias)).log_decay

    def _check(self):
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        for name in ("state_size", "heads", "head_size", "groups", "conv_width", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.heads % self._sizes()[0]:
            raise ValueError(f"groups is {self.groups}; it must divide the {self.heads} heads")
        if len(self.A_range) != 2 or not 0 <= self.A_range[0] < self.A_range[1]:
            raise ValueError(f"A_range is {self.A_range}; it must be (low, high) with 0 <= low < high")
