r"""Liquid-S4: a state space model whose transition hears the input (Hasani et al. 2022, arXiv:2209.12951).

$x_k = (\bar A + \bar B u_k) x_{k-1} + \bar B u_k$, $y_k = \mathrm{Re}\, C x_k + D u_k$ (eq. 9), elementwise in the
states. A is S4D's diagonal here, where the paper's is S4's.

Unrolled (eq. 10), the product $u_{k_1} \cdots u_{k_p}$, $k_1 < \dots < k_p \le k$, enters $y_k$ with the weight
$C \bar A^{k - k_1 - p + 1} \bar B^p$. The paper's kernels keep the products of neighbours,
$v^p_k = u_k u_{k-1} \cdots u_{k-p+1}$, up to degree P:

    kb:  y = K * u + sum_{p=2}^P K^p * v^p + D u,  K^p_j = C Abar^j Bbar^p        (eq. 13, Proposition 1)
    pb:  y = K * u + sum_{p=2}^P C Bbar^p v^p + D u, Abar = 1 for what is correlated   (eq. 16)

The exact recurrence grows where $|\bar A + \bar B u_k| > 1$; the kernels cannot. The published code lays other products
along time, in reverse: all combinations of a few last inputs, or u_k u_{k-1}^2 u_{k-2} for the third degree. Those here
are causal, and terms of eq. 10.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from ssm.discretize import ONE_INPUT_RULES, check_rule
from ssm.mixers import s4d
from ssm.mixers.s4d import S4D, System
from ssm.naming import unknown
from ssm.recurrence import linear_recurrence, segment_starts

MODES = ("exact", "kb", "pb")


class State(NamedTuple):
    """h, and the degree - 1 inputs before the next one, the newest last: none in the exact recurrence."""

    h_bdn: Inexact[Array, "b d n"]
    recent_bkd: Float[Array, "b k d"]


def recurrent(
    x_bld: Float[Array, "b l d"],
    system: System,
    state: State | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], State]:
    """The exact recurrence, token after token: the definition (eq. 9)."""
    a, b, c, D, _ = system
    starts = segment_starts(segment_ids)
    keep = jnp.ones(x_bld.shape[:2], bool) if starts is None else ~starts
    x = x_bld.astype(D.dtype)

    def advance(h, xs):
        u_bd, keep_b11 = xs
        bu = b[None] * u_bd[..., None].astype(b.dtype)
        h = (a[None] + bu) * jnp.where(keep_b11, h, 0) + bu
        return h, jnp.einsum("dn,bdn->bd", c, h, precision="highest").real

    state = _started(x, system, state)
    h, y_lbd = jax.lax.scan(advance, state.h_bdn, (jnp.moveaxis(x, 1, 0), keep.T[:, :, None, None]))
    return (jnp.moveaxis(y_lbd, 0, 1) + D[None, None] * x).astype(x_bld.dtype), State(h, state.recent_bkd)


def parallel(
    x_bld: Float[Array, "b l d"],
    system: System,
    state: State | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], State]:
    """The exact recurrence by an associative scan over its linear maps, one a token."""
    a, b, c, D, _ = system
    x = x_bld.astype(D.dtype)
    bu = b[None, None] * x[..., None].astype(b.dtype)
    state = _started(x, system, state)
    reset = segment_starts(segment_ids)
    h, last = linear_recurrence(a[None, None] + bu, bu, state.h_bdn, reset=reset, implementation="xla")
    y = jnp.einsum("dn,bldn->bld", c, h, precision="highest").real + D[None, None] * x
    return y.astype(x_bld.dtype), State(last, state.recent_bkd)


def _started(x_bld, system, state, degree=1):
    if state is not None:
        return state
    batch, _, d = x_bld.shape
    a = system.a_dn
    return State(jnp.zeros((batch, *a.shape), a.dtype), jnp.zeros((batch, degree - 1, d), x_bld.dtype))


def correlations(
    x_bld: Float[Array, "b l d"], recent_bkd: Float[Array, "b k d"], segment_ids: Int[Array, "b l"] | None = None
) -> tuple[list[Float[Array, "b l d"]], Float[Array, "b k d"]]:
    r"""$v^p_k = u_k u_{k-1} \cdots u_{k-p+1}$ for p = 1 ... k + 1, within a segment; and the new recent inputs."""
    k = recent_bkd.shape[1]
    u = jnp.concatenate([recent_bkd, x_bld], 1)
    ids = jnp.zeros(u.shape[:2], int) if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (k, 0)), mode="edge")
    products = [u]
    for _ in range(k):
        before = jnp.pad(products[-1][:, :-1], ((0, 0), (1, 0), (0, 0)))
        products.append(u * jnp.where(segment_starts(ids)[..., None], 0, before))
    recent = jnp.where(ids[..., None] == ids[:, -1:, None], u, 0)[:, x_bld.shape[1] :]
    return [v[:, k:] for v in products], recent


def convolution(
    x_bld: Float[Array, "b l d"],
    system: System,
    state: State | None = None,
    *,
    kernel: str = "pb",
    degree: int = 2,
    form: str = "auto",
    segment_ids: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], State]:
    """The kernels of degree 2 ... P = `degree` beside S4D's own, every convolution in the named form of `s4d.run`.

    One state serves all of "kb", as all have the same transition: h is driven by sum_p Bbar^p v^p.
    Raises ValueError for an unknown kernel and as `s4d.run`.
    """
    if kernel not in MODES[1:]:
        raise unknown("kernel", kernel, MODES[1:])
    _, b, c, D, _ = system
    x = x_bld.astype(D.dtype)
    products, recent = correlations(x, _started(x, system, state, degree).recent_bkd, segment_ids)
    y, (h,) = s4d.run(form, x, system, None if state is None else s4d.State(state.h_bdn), segment_ids)
    for p, v in enumerate(products[1:], 2):
        if kernel == "pb":
            y += (c * b**p).sum(-1).real[None, None] * v
            continue
        y_p, (h_p,) = s4d.run(form, v, system._replace(b_dn=b**p, D_d=jnp.zeros_like(D)), None, segment_ids)
        y, h = y + y_p, h + h_p
    return y.astype(x_bld.dtype), State(h, recent)


def run(
    mode: str,
    degree: int | None,
    form: str,
    x_bld: Array,
    system: System,
    state: State | None,
    segment_ids: Array | None,
) -> tuple[Array, State]:
    """The named mode in the named form; "auto" is, for the exact recurrence, a loop on a CPU and a scan elsewhere.

    degree: of "kb" and "pb", 2 where None. Raises ValueError for an unknown mode or form, a degree below 2, and
    a degree given to the exact recurrence, which has all.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if mode != "exact":
        degree = 2 if degree is None else degree
        if degree < 2:
            raise ValueError(f"degree is {degree}; it must be at least 2, the products of two inputs")
        return convolution(x_bld, system, state, kernel=mode, degree=degree, form=form, segment_ids=segment_ids)
    if degree is not None:
        raise ValueError(f"degree is {degree}, but mode 'exact' has every degree; leave it out or use 'kb' or 'pb'")
    forms = {"recurrent": recurrent, "parallel": parallel}
    forms["auto"] = recurrent if jax.default_backend() == "cpu" else parallel
    if form not in forms:
        raise unknown("form", form, forms)
    return forms[form](x_bld, system, state, segment_ids=segment_ids)


def step(
    x_bd: Float[Array, "b d"], system: System, state: State, *, mode: str = "pb", degree: int | None = None
) -> tuple[Float[Array, "b d"], State]:
    """One token of any mode: kb and pb need no more than h and the recent inputs."""
    y, state = run(mode, degree, "recurrent", x_bd[:, None], system, state, None)
    return y[:, 0], state


class LiquidS4(S4D):
    """Liquid-S4 as a layer: S4D's parameters, with the paper's rule and range of dt.

    mode: "exact", "kb" or "pb"; degree: of the last two, 2 by default. The other fields are S4D's; there is no
    bidirectional form, and rule exponential_trapezoidal, which reads two inputs a step, has none that is liquid.
    """

    rule: str = "bilinear"
    dt_max: float = 0.2
    mode: str = "pb"
    degree: int | None = None

    def setup(self):
        check_rule(self.rule, "liquid_s4", ONE_INPUT_RULES)
        if self.bidirectional:
            raise ValueError("bidirectional is not for liquid_s4: its products of inputs are causal; leave it False")
        super().setup()

    def __call__(self, x_bld, state: State | None = None, *, segment_ids=None):
        return run(self.mode, self.degree, self.form, x_bld, self.system(), state, segment_ids)

    def step(self, x_bd, state: State):
        return step(x_bd, self.system(), state, mode=self.mode, degree=self.degree)

    def initial_state(self, batch_size: int) -> State:
        degree = 1 if self.mode == "exact" else self.degree or 2
        recent = jnp.zeros((batch_size, degree - 1, self.width))
        return State(super().initial_state(batch_size).h_bdn, recent)
