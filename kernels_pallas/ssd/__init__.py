r"""State space duality's recurrence (Mamba-2, arXiv:2405.21060): a state of p x n a head, one scalar decay a token.

$h_t = e^{a_t} h_{t-1} + \sum_r x_{t,r} B_{t,r}^\top$ and $y_{t,r} = h_t C_{t,r}$; Mamba-2 has rank 1, Mamba-3's
multi-input multi-output form (arXiv:2603.15569) a larger one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.associative_scan import at_least_float32, varying_like
from kernels_pallas.ssd import reference, xla
from kernels_pallas.ssd.xla import segsum

__all__ = ["IMPLEMENTATIONS", "segsum", "ssd"]

IMPLEMENTATIONS = ("reference", "xla")


def ssd(
    x: Float[Array, "b l *r h p"],
    log_decay_blh: Float[Array, "b l h"],
    B: Float[Array, "b l *r g n"],
    C: Float[Array, "b l *r g n"],
    initial_state: Float[Array, "b h p n"] | None = None,
    *,
    reset: Bool[Array, "b l"] | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l *r h p"], Float[Array, "b h p n"]]:
    """y, and the state after the last token.

    Without a rank axis r, or with one. log_decay_blh: at most 0, down to -inf. B, C: head i reads group
    i // (h / g). initial_state: zeros by default. reset: True at tokens that forget the states before them.
    chunk_size: q of the "xla" implementation, whose time grows with q and whose memory for states with 1/q.
    Computed in float32 or better; y has x's dtype, the last state keeps the precision.
    Raises ValueError naming the argument whose shape or value does not fit, or an unknown implementation.
    """
    _check(x, log_decay_blh, B, C, initial_state, reset, chunk_size)
    precise = at_least_float32(x.dtype)
    with_rank = (lambda v: v.astype(precise)) if x.ndim == 5 else (lambda v: v.astype(precise)[:, :, None])
    shape = (x.shape[0], *x.shape[-2:], B.shape[-1])
    h = jnp.zeros(shape, precise) if initial_state is None else initial_state.astype(precise)
    a = log_decay_blh.astype(precise)
    a = a if reset is None else jnp.where(reset[:, :, None], -jnp.inf, a)
    arrays = with_rank(x), a, with_rank(B), with_rank(C)
    h = varying_like(h, *arrays)
    y, last = reference.run(*arrays, h) if _choose(implementation) == "reference" else xla.run(*arrays, h, chunk_size)
    return y.reshape(x.shape).astype(x.dtype), last


def _choose(implementation: str) -> str:
    if implementation == "auto":
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it may be auto, {', '.join(IMPLEMENTATIONS)}")
    return implementation


def _check(x, a, B, C, initial_state, reset, chunk_size) -> None:
    if x.ndim not in (4, 5) or 0 in x.shape:
        raise ValueError(f"x must be (batch, length, [rank,] heads, channels), none of them 0; it is {x.shape}")
    batch, length, *_, heads, p = x.shape
    if B.ndim != x.ndim or B.shape[:-2] != x.shape[:-2] or 0 in B.shape:
        axes = ", ".join(map(str, x.shape[:-2]))
        raise ValueError(f"B has shape {B.shape}; x {x.shape} needs ({axes}, groups, states)")
    if heads % B.shape[-2]:
        raise ValueError(f"B has {B.shape[-2]} groups; they must divide the {heads} heads of x")
    state = (batch, heads, p, B.shape[-1])
    shapes = {"log_decay_blh": (a, (batch, length, heads)), "C": (C, B.shape), "initial_state": (initial_state, state)}
    for name, (value, shape) in (shapes | {"reset": (reset, (batch, length))}).items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; x {x.shape} and B {B.shape} need {shape}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
