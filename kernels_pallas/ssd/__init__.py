r"""State space duality's recurrence (Mamba-2, arXiv:2405.21060): a state of p x n a head, one scalar decay a token.

$h_t = e^{a_t} h_{t-1} + \Delta_t \sum_r x_{t,r} B_{t,r}^\top$ and $y_{t,r} = (h_t C_{t,r} + D x_{t,r})
\mathrm{silu}(z_{t,r})$; Mamba-2 has rank 1, Mamba-3's multi-input multi-output form (arXiv:2603.15569) a larger one.
"""

import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.dispatch import FUSED, at_least_float32, choose, varying_like
from kernels_pallas.ssd import reference, xla
from kernels_pallas.ssd.step import ssd_step
from kernels_pallas.ssd.xla import segsum

__all__ = ["IMPLEMENTATIONS", "segsum", "ssd", "ssd_step"]

IMPLEMENTATIONS = ("reference", "xla", *FUSED)


def ssd(
    x: Float[Array, "b l *r h p"],
    log_decay_blh: Float[Array, "b l h"],
    B: Float[Array, "b l *r g n"],
    C: Float[Array, "b l *r g n"],
    initial_state: Float[Array, "b h p n"] | None = None,
    *,
    dt_blh: Float[Array, "b l h"] | None = None,
    D_h: Float[Array, " h"] | Float[Array, "h p"] | None = None,
    z: Float[Array, "b l *r h p"] | None = None,
    reset: Bool[Array, "b l"] | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l *r h p"], Float[Array, "b h p n"]]:
    """y, and the state after the last token.

    Without a rank axis r, or with one. log_decay_blh: at most 0, down to -inf. B, C: head i reads group
    i // (h / g). initial_state: zeros by default. dt_blh, D_h (h,) or (h, p), z: left out, nothing is scaled, skipped
    or gated. reset: True at tokens that forget the states before them. chunk_size: q of the "xla" implementation,
    whose time grows with q and whose memory for states with 1/q; "gpu", the kernel for Hopper GPUs, and "tpu" have
    their own. Sums and states in float32 or better; "gpu" multiplies bfloat16, "tpu" what x, B and C are, the others in
    the states' precision.
    y has x's dtype, the last state keeps the precision.
    Raises ValueError naming the argument whose shape or value does not fit, or an unknown implementation.
    """
    _check(x, log_decay_blh, B, C, initial_state, dt_blh, D_h, z, reset, chunk_size)
    precise = at_least_float32(x.dtype)
    exact = lambda v: None if v is None else v.astype(precise)  # noqa: E731
    shape = (x.shape[0], *x.shape[-2:], B.shape[-1])
    h = jnp.zeros(shape, precise) if initial_state is None else initial_state.astype(precise)
    a, dt, D = map(exact, (log_decay_blh, dt_blh, D_h))
    a = a if reset is None else jnp.where(reset[:, :, None], -jnp.inf, a)
    chosen = choose(implementation, IMPLEMENTATIONS, lambda name: _module(name).refusal(x, B, C, z), "xla")
    if chosen in FUSED:
        dt = jnp.ones_like(a) if dt is None else dt
        return _module(chosen).run(x, a, B, C, h, dt, jnp.zeros(x.shape[-2], precise) if D is None else D, z)
    with_rank = lambda v: exact(v) if x.ndim == 5 else exact(v)[:, :, None]  # noqa: E731
    v = with_rank(x) if dt is None else dt[:, :, None, :, None] * with_rank(x)
    arrays = v, a, with_rank(B), with_rank(C)
    h = varying_like(h, *arrays)
    y, last = reference.run(*arrays, h) if chosen == "reference" else xla.run(*arrays, h, chunk_size)
    y = y.reshape(x.shape)
    y = y if D is None else y + D.reshape((1,) * (x.ndim - 2) + (x.shape[-2], -1)) * exact(x)
    y = y if z is None else y * jax.nn.silu(exact(z))
    return y.astype(x.dtype), last


def _module(implementation: str):
    return importlib.import_module(f"kernels_pallas.ssd.{implementation}")


def _check(x, a, B, C, initial_state, dt, D, z, reset, chunk_size) -> None:
    if x.ndim not in (4, 5) or 0 in x.shape:
        raise ValueError(f"x must be (batch, length, [rank,] heads, channels), none of them 0; it is {x.shape}")
    batch, length, *_, heads, p = x.shape
    if B.ndim != x.ndim or B.shape[:-2] != x.shape[:-2] or 0 in B.shape:
        axes = ", ".join(map(str, x.shape[:-2]))
        raise ValueError(f"B has shape {B.shape}; x {x.shape} needs ({axes}, groups, states)")
    if heads % B.shape[-2]:
        raise ValueError(f"B has {B.shape[-2]} groups; they must divide the {heads} heads of x")
    gates, state = (batch, length, heads), (batch, heads, p, B.shape[-1])
    shapes = {"log_decay_blh": (a, gates), "C": (C, B.shape), "initial_state": (initial_state, state)}
    shapes |= {"dt_blh": (dt, gates), "z": (z, x.shape), "reset": (reset, (batch, length))}
    for name, (value, shape) in shapes.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; x {x.shape} and B {B.shape} need {shape}")
    if D is not None and D.shape not in ((heads,), (heads, p)):
        raise ValueError(f"D_h has shape {D.shape}; x {x.shape} needs ({heads},) or ({heads}, {p})")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
