r"""The selective state space recurrence (Mamba, arXiv:2312.00752): a diagonal state whose dt, B and C change by token.

$h_t = e^{dt_t A} h_{t-1} + dt_t B_t x_t$ and $y_t = (C_t h_t + D x_t)\,\mathrm{silu}(z_t)$, for every channel d with
states n of its own; B and C are shared by the channels.
"""

import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.dispatch import FUSED, at_least_float32, choose, varying_like
from kernels_pallas.selective_scan import reference, xla
from kernels_pallas.selective_scan.step import selective_scan_step

__all__ = ["IMPLEMENTATIONS", "selective_scan", "selective_scan_step"]

IMPLEMENTATIONS = ("reference", "xla", "gpu", "tpu")


def selective_scan(
    x_bld: Float[Array, "b l d"],
    dt_bld: Float[Array, "b l d"],
    A_dn: Float[Array, "d n"],
    B_bln: Float[Array, "b l n"],
    C_bln: Float[Array, "b l n"],
    D_d: Float[Array, " d"] | None = None,
    initial_state_bdn: Float[Array, "b d n"] | None = None,
    *,
    z_bld: Float[Array, "b l d"] | None = None,
    dt_bias_d: Float[Array, " d"] | None = None,
    softplus: bool = False,
    reset: Bool[Array, "b l"] | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """y, and the state after the last token.

    dt: time of each token, as it is or of softplus(dt + dt_bias). A: eigenvalues in 1/time. z: gates y, where given.
    initial_state: zeros by default. reset: True at tokens that forget the states before them. chunk_size: of "xla", in
    tokens; its gradient keeps one state a chunk. "gpu", the kernel for Hopper GPUs, and "tpu" keep one in 64 tokens;
    "gpu" sums the gradients of B and C over channels as bfloat16 products where y's cotangent is bfloat16, and "tpu"
    takes at most 64 states a channel.
    Computed in A's dtype, float32 or better, which the state has; y has x's.
    Raises ValueError naming the argument whose shape or value does not fit, or an unknown implementation.
    """
    optional = {"D_d": D_d, "z_bld": z_bld, "dt_bias_d": dt_bias_d, "reset": reset}
    _check(x_bld, dt_bld, A_dn, B_bln, C_bln, initial_state_bdn, optional, chunk_size)
    precise = at_least_float32(A_dn.dtype)
    A = A_dn.astype(precise)
    h = jnp.zeros((len(x_bld), *A.shape), precise) if initial_state_bdn is None else initial_state_bdn.astype(precise)
    refusal = lambda backend: _kernel(backend).refusal(x_bld, dt_bld, A, z_bld)  # noqa: E731
    chosen = choose(implementation, IMPLEMENTATIONS, refusal, "xla")
    if chosen in FUSED:
        return _kernel(chosen).run(x_bld, dt_bld, A, B_bln, C_bln, D_d, dt_bias_d, z_bld, reset, h, softplus)
    x, dt, B, C = (v.astype(precise) for v in (x_bld, dt_bld, B_bln, C_bln))
    dt = dt if dt_bias_d is None else dt + dt_bias_d.astype(precise)[None, None]
    arrays = x, jax.nn.softplus(dt) if softplus else dt, A, B, C, reset
    h = varying_like(h, x, dt, A, B, C)
    y, last = reference.run(*arrays, h) if chosen == "reference" else xla.run(*arrays, h, chunk_size)
    y = y if D_d is None else y + D_d.astype(precise)[None, None] * x
    y = y if z_bld is None else y * jax.nn.silu(z_bld.astype(precise))
    return y.astype(x_bld.dtype), last


def _kernel(backend: str):
    return importlib.import_module(f"kernels_pallas.selective_scan.{backend}")


def _check(x, dt, A, B, C, initial_state, optional: dict, chunk_size) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x_bld must be (batch, length, channels), none of them 0; it is {x.shape}")
    batch, length, d = x.shape
    if A.ndim != 2 or A.shape[0] != d or not A.shape[1]:
        raise ValueError(f"A_dn has shape {A.shape}; x_bld {x.shape} needs ({d}, states)")
    n = A.shape[1]
    shapes = dict(dt_bld=x.shape, B_bln=(batch, length, n), C_bln=(batch, length, n), initial_state_bdn=(batch, d, n))
    shapes |= dict(D_d=(d,), z_bld=x.shape, dt_bias_d=(d,), reset=(batch, length))
    given = dict(dt_bld=dt, B_bln=B, C_bln=C, initial_state_bdn=initial_state) | optional
    for name, shape in shapes.items():
        if given[name] is not None and given[name].shape != shape:
            raise ValueError(f"{name} has shape {given[name].shape}; x_bld {x.shape} and A_dn {A.shape} need {shape}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
