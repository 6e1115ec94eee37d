r"""One token of the selective state space recurrence.

$h' = e^{dt A} h + dt B x$ and $y = (C h' + D x)\,\mathrm{silu}(z)$, for every channel d: what `selective_scan` computes
of a sequence of one token. All there is to do is to read every state once and to write it once; the kernels write it
where it lies.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import stepping
from kernels_pallas.dispatch import FUSED, at_least_float32, choose
from kernels_pallas.selective_scan import reference

IMPLEMENTATIONS = ("reference", "xla", *FUSED)
AXES = dict(x="b d", dt="b d", A="d n", B="b n", C="b n", h="b d n", D="d", z="b d", dt_bias="d")


def selective_scan_step(
    x_bd: Float[Array, "b d"],
    dt_bd: Float[Array, "b d"],
    A_dn: Float[Array, "d n"],
    B_bn: Float[Array, "b n"],
    C_bn: Float[Array, "b n"],
    D_d: Float[Array, " d"] | None,
    state_bdn: Float[Array, "b d n"],
    *,
    z_bd: Float[Array, "b d"] | None = None,
    dt_bias_d: Float[Array, " d"] | None = None,
    softplus: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "b d"], Float[Array, "b d n"]]:
    """y, and the state after the token.

    dt: time of the token, as it is or of softplus(dt + dt_bias). A: eigenvalues in 1/time. z: gates y, where given.
    implementation: "gpu" and "tpu", kernels for Hopper GPUs and for TPUs, write the new state over the old one, which
    is copied first where the caller still has it: donate it to `jax.jit`. Their gradients are those of "xla".
    Computed in A's dtype, float32 or better, which the state has; y has x's.
    Raises ValueError naming the argument whose shape does not fit, or an unknown implementation.
    """
    optional = dict(D_d=D_d, z_bd=z_bd, dt_bias_d=dt_bias_d)
    _check(x_bd, A_dn, dict(dt_bd=dt_bd, B_bn=B_bn, C_bn=C_bn, state_bdn=state_bdn) | optional)
    precise = at_least_float32(A_dn.dtype)
    exact = lambda v: None if v is None else v.astype(precise)  # noqa: E731
    arrays = dict(x=x_bd, dt=dt_bd, A=exact(A_dn), B=B_bn, C=C_bn, h=exact(state_bdn))
    arrays |= dict(D=exact(D_d), z=z_bd, dt_bias=exact(dt_bias_d))
    chosen = choose(implementation, IMPLEMENTATIONS, lambda name: _module(name).refusal(**arrays), "xla")
    if chosen in FUSED:
        kernel = partial(composed, _module("tpu").core, softplus)
        kernel = partial(_module("gpu").step, softplus=softplus) if chosen == "gpu" else kernel
        return stepping.run(kernel, partial(composed, advance, softplus), AXES, "b d, b d n", arrays)
    return composed(advance if chosen == "xla" else _sequence_of_one, softplus, **arrays)


def composed(core, softplus: bool, x, dt, A, B, C, h, D=None, z=None, dt_bias=None):
    """(y, state) from (y before skip and gate, state) = core(x, dt, A, B, C, h), all of one dtype."""
    exact = lambda v: v.astype(h.dtype)  # noqa: E731
    dt = exact(dt) if dt_bias is None else exact(dt) + dt_bias[None]
    y, h = core(exact(x), jax.nn.softplus(dt) if softplus else dt, A, exact(B), exact(C), h)
    y = y if D is None else y + D[None] * exact(x)
    y = y if z is None else y * jax.nn.silu(exact(z))
    return y.astype(x.dtype), h


def advance(x_bd, dt_bd, A_dn, B_bn, C_bn, h_bdn):
    h_bdn = jnp.exp(dt_bd[..., None] * A_dn[None]) * h_bdn + (dt_bd * x_bd)[..., None] * B_bn[:, None]
    return jnp.sum(h_bdn * C_bn[:, None], -1), h_bdn


def _sequence_of_one(x, dt, A, B, C, h):
    x, dt, B, C = (v[:, None] for v in (x, dt, B, C))
    y, last = reference.run(x, dt, A, B, C, None, h)
    return y[:, 0], last


def _module(implementation: str):
    return importlib.import_module(f"kernels_pallas.selective_scan.step_{implementation}")


def _check(x, A, given: dict) -> None:
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x_bd must be (batch, channels), none of them 0; it is {x.shape}")
    batch, d = x.shape
    if A.ndim != 2 or A.shape[0] != d or not A.shape[1]:
        raise ValueError(f"A_dn has shape {A.shape}; x_bd {x.shape} needs ({d}, states)")
    n = A.shape[1]
    shapes = dict(dt_bd=x.shape, B_bn=(batch, n), C_bn=(batch, n), state_bdn=(batch, d, n))
    shapes |= dict(D_d=(d,), z_bd=x.shape, dt_bias_d=(d,))
    for name, shape in shapes.items():
        if given[name] is not None and given[name].shape != shape:
            raise ValueError(f"{name} has shape {given[name].shape}; x_bd {x.shape} and A_dn {A.shape} need {shape}")
