"""What the kernels of all backends share: what they take and refuse, how they pad, and a softplus."""

import math

import jax
import jax.numpy as jnp

NEVER = -1e30  # as dt before softplus
AXES = dict(x="b l d", dt="b l d", A="d n", B="b l n", C="b l n", D="d", dt_bias="d", z="b l d", forget="b l")
LOG_2_E = math.log2(math.e)
# log(1 + e) / e for e from 0 to 1, to 1.8e-7
LOG_1_PLUS = (1.0, -0.499995023, 0.333192706, -0.248443693, 0.191114306)
LOG_1_PLUS += (-0.136747703, 0.0783616677, -0.0295885075, 0.00525345793)


def refusal(x, dt, A, z) -> str:
    """Why a kernel cannot take these arrays; "" where it can."""
    for name, value in {"x": x, "dt": dt, "z": z}.items():
        if value is not None and value.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {value.dtype}; it takes float32 or bfloat16"
    return "" if A.dtype == jnp.float32 else f"A is {A.dtype}; it takes float32"


def present(x, dt, A, B, C, D, dt_bias, z, reset, softplus: bool) -> dict:
    """Those of the arrays that there are, by the names of AXES; what is not streamed in float32.

    D and dt_bias are 0 where they are None; forget, of reset, is -inf at tokens that forget the states before them.
    """
    if dt_bias is not None and not softplus:  # it would move the padding, which must take no time
        dt, dt_bias = dt.astype(jnp.float32) + dt_bias.astype(jnp.float32)[None, None], None
    B, C, D, dt_bias = (jnp.zeros(x.shape[2]) if v is None else v.astype(jnp.float32) for v in (B, C, D, dt_bias))
    forget = None if reset is None else jnp.where(reset, -jnp.inf, 0.0)
    arrays = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, z=z, forget=forget)
    return {name: value for name, value in arrays.items() if value is not None}


def pad(v: jax.Array, axes: str, to: dict, value: float = 0.0) -> jax.Array:
    """v with `to` more of each of its axes."""
    widths = [(0, to.get(axis, 0)) for axis in axes.split()]
    return jnp.pad(v, widths, constant_values=value) if any(map(sum, widths)) else v


def softplus(x):
    """log(1 + e^x) of few instructions, as exact for small ones as for large."""
    e = jnp.exp2(-LOG_2_E * jnp.abs(x))
    total = jnp.full_like(x, LOG_1_PLUS[-1])
    for coefficient in LOG_1_PLUS[-2::-1]:
        total = total * e + coefficient
    return jnp.maximum(x, 0.0) + total * e
