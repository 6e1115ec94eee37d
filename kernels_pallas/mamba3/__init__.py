r"""Mamba-3's recurrence (arXiv:2603.15569): a state of p x n a head, keys that turn, a rule with two ends.

With $k_t = R(\phi_t)(B_t + b_B)$ and $q_t = R(\phi_t)(C_t + b_C)$, planes turned by the angles summed so far,

$h_t = e^{a_t} (h_{t-1} + \beta_t \sum_r v_{t-1,r} k_{t-1,r}^\top) + \gamma_t \sum_r v_{t,r} k_{t,r}^\top$ and
$y_{t,r} = (h_t q_{t,r} + D v_{t,r}) \mathrm{silu}(z_{t,r})$; of r lanes that share h there is one in the SISO form.
"""

import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.dispatch import at_least_float32, choose, varying_like
from kernels_pallas.mamba3 import reference, xla
from kernels_pallas.mamba3.step import mamba3_step
from kernels_pallas.mamba3.tokens import State, Tokens
from kernels_pallas.rotation import LAYOUTS

__all__ = ["IMPLEMENTATIONS", "State", "mamba3", "mamba3_step"]

IMPLEMENTATIONS = ("reference", "xla", "gpu")


def mamba3(
    v: Float[Array, "b l *r h p"],
    B: Float[Array, "b l *r g n"],
    C: Float[Array, "b l *r g n"],
    log_decay_blh: Float[Array, "b l h"],
    previous_blh: Float[Array, "b l h"],
    current_blh: Float[Array, "b l h"],
    theta_blhs: Float[Array, "b l #h s"] | None = None,
    initial_state: State | None = None,
    *,
    rate_blh: Float[Array, "b l h"] | None = None,
    B_bias_hrn: Float[Array, "h r n"] | None = None,
    C_bias_hrn: Float[Array, "h r n"] | None = None,
    D_h: Float[Array, " h"] | None = None,
    z: Float[Array, "b l *r h p"] | None = None,
    reset: Bool[Array, "b l"] | None = None,
    layout: str = "pairs",
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l *r h p"], State]:
    r"""y, and the state after the last token.

    With an axis of lanes r, or without. B, C: head i reads group i // (h / g). log_decay: a, at most 0, down to -inf;
    previous and current: $\beta$ and $\gamma$, a rule of `ssm.discretize.discretize_log`. theta: by how much each
    plane turns at a token, in radians, times rate where that is given; one axis of heads is of size 1 where all turn
    alike. Without theta none does. The planes are those of `kernels_pallas.rotation.rotate`, in `layout`.
    Left out, biases, D and z add, skip and gate nothing, and the initial state is zero. reset: True at tokens that
    forget the state, the last token and the angle. chunk_size: tokens in a chunk of "xla", which takes the best
    kernel of `kernels_pallas.ssd` for its core where the implementation is "auto"; "gpu", for Hopper GPUs, has its own.
    Sums, states and angles in float32 or better; "gpu" multiplies bfloat16. y has v's dtype.
    Raises ValueError naming the argument whose shape or value does not fit, or an unknown implementation.
    """
    gates = dict(log_decay_blh=log_decay_blh, previous_blh=previous_blh, current_blh=current_blh, rate_blh=rate_blh)
    biases = dict(B_bias_hrn=B_bias_hrn, C_bias_hrn=C_bias_hrn)
    _check(v, B, C, gates, theta_blhs, initial_state, biases, D_h, z, reset, layout, chunk_size)
    lanes = lambda x: x if x is None or v.ndim == 5 else x[:, :, None]  # noqa: E731
    tokens = Tokens(*map(lanes, (v, B, C)), *gates.values(), theta_blhs, *biases.values())
    precise = at_least_float32(v.dtype)
    exact = lambda tree: jax.tree.map(lambda x: x.astype(precise), tree)  # noqa: E731
    state = exact(tokens.zero_state() if initial_state is None else initial_state)
    if reset is not None:
        begun = lambda x: jnp.where(reset[(slice(None), 0) + (None,) * (x.ndim - 1)], 0, x)  # noqa: E731
        state = jax.tree.map(begun, state)
    chosen = choose(implementation, IMPLEMENTATIONS, lambda name: _module(name).refusal(tokens, z), "xla")
    if chosen == "gpu":
        y, last = _module("gpu").run(tokens, state, D_h, lanes(z), reset, layout)
        return y.reshape(v.shape), last
    tokens = exact(tokens)
    state = jax.tree.map(lambda x: varying_like(x, *jax.tree.leaves(tokens)), state)
    if chosen == "reference":
        y, last = reference.run(tokens, state, reset, layout)
    else:
        core = dict(chunk_size=chunk_size, implementation="auto" if implementation == "auto" else "xla")
        y, last = xla.run(tokens, state, reset, layout, v.dtype, core)
    y = y if D_h is None else y + D_h.astype(precise)[None, None, None, :, None] * tokens.v
    y = y if z is None else y * jax.nn.silu(lanes(z).astype(precise))
    return y.reshape(v.shape).astype(v.dtype), last


def _module(implementation: str):
    return importlib.import_module(f"kernels_pallas.mamba3.{implementation}")


def _check(v, B, C, gates, theta, state, biases, D, z, reset, layout, chunk_size) -> None:
    if v.ndim not in (4, 5) or 0 in v.shape:
        raise ValueError(f"v must be (batch, length, [rank,] heads, channels), none of them 0; it is {v.shape}")
    batch, length, *ranks, heads, p = v.shape
    if B.ndim != v.ndim or B.shape[:-2] != v.shape[:-2] or 0 in B.shape:
        axes = ", ".join(map(str, v.shape[:-2]))
        raise ValueError(f"B has shape {B.shape}; v {v.shape} needs ({axes}, groups, states)")
    groups, n = B.shape[-2:]
    if heads % groups:
        raise ValueError(f"B has {groups} groups; they must divide the {heads} heads of v")
    if theta is not None:
        if theta.ndim != 4 or theta.shape[:2] != v.shape[:2] or theta.shape[2] not in (1, heads):
            raise ValueError(
                f"theta_blhs has shape {theta.shape}; v {v.shape} needs ({batch}, {length}, 1 or {heads}, planes)"
            )
        if n % 2 or theta.shape[3] > n // 2:
            raise ValueError(f"{theta.shape[3]} angles for {n} states: "
                             "the states must be even, with an angle for at most each two")  # fmt: skip
    rank, planes = ranks[0] if ranks else 1, 0 if theta is None else theta.shape[3]
    given = gates | biases | {"C": C, "D_h": D, "z": z, "reset": reset}
    shapes = dict.fromkeys(gates, (batch, length, heads)) | dict.fromkeys(biases, (heads, rank, n))
    shapes |= {"C": B.shape, "D_h": (heads,), "z": v.shape, "reset": (batch, length)}
    if state is not None:
        ends = (heads, planes), (heads, p, n), (rank, heads, n), (rank, heads, p)
        for name, shape in zip(State._fields, ends, strict=True):
            given[f"initial_state.{name}"], shapes[f"initial_state.{name}"] = getattr(state, name), (batch, *shape)
    for name, shape in shapes.items():
        if given[name] is not None and given[name].shape != shape:
            raise ValueError(f"{name} has shape {given[name].shape}; v {v.shape} and B {B.shape} need {shape}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it may be {' or '.join(LAYOUTS)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
