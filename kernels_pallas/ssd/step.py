r"""One token of state space duality, with as many lanes written as the token has, and as many read as there are.

$h' = e^a h + \Delta \sum_r x_r B_r^\top$ and $y_s = (h' C_s + D x_s)\,\mathrm{silu}(z_s)$: what `ssd` computes of a
sequence of one token, but that the lanes read (s) may be others than the lanes written (r). Mamba-3's trapezoidal rule
writes the token before once more, and so twice the lanes that it reads. All there is to do is to read every state once
and to write it once; the kernels write it where it lies.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import stepping
from kernels_pallas.dispatch import FUSED, at_least_float32, choose
from kernels_pallas.ssd import reference

IMPLEMENTATIONS = ("reference", "xla", *FUSED)
ONE_PASS = 2  # lanes written times lanes read: of so few XLA makes one pass over the state, as fast as a kernel's
AXES = dict(x="b r h p", a="b h", B="b r g n", C="b s g n", h="b h p n", dt="b h", D="h", z="b s h p")


def ssd_step(
    x: Float[Array, "b *r h p"],
    log_decay_bh: Float[Array, "b h"],
    B: Float[Array, "b *r g n"],
    C: Float[Array, "b *s g n"],
    state_bhpn: Float[Array, "b h p n"],
    *,
    dt_bh: Float[Array, "b h"] | None = None,
    D_h: Float[Array, " h"] | Float[Array, "h p"] | None = None,
    z: Float[Array, "b *s h p"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "b *s h p"], Float[Array, "b h p n"]]:
    """y, and the state after the token.

    x and B with an axis of lanes r or without, C and z with one of lanes s or without, y as C. log_decay_bh: at most
    0, down to -inf. B, C: head i reads group i // (h / g). dt_bh, D_h (h,) or (h, p), z: left out, nothing is scaled,
    skipped or gated; D_h needs as many lanes read as written.
    implementation: "gpu" and "tpu", kernels for Hopper GPUs and for TPUs, write the new state over the old one, which
    is copied first where the caller still has it: donate it to `jax.jit`. Their gradients are those of "xla".
    Sums and states in float32 or better; y has x's dtype.
    Raises ValueError naming the argument whose shape does not fit, or an unknown implementation.
    """
    _check(x, log_decay_bh, B, C, state_bhpn, dt_bh, D_h, z)
    precise = at_least_float32(x.dtype)
    exact = lambda v: None if v is None else v.astype(precise)  # noqa: E731
    lanes = lambda v: None if v is None else v if v.ndim == 4 else v[:, None]  # noqa: E731
    arrays = dict(x=lanes(x), B=lanes(B), C=lanes(C), z=lanes(z))
    if implementation == "auto" and arrays["B"].shape[1] * arrays["C"].shape[1] <= ONE_PASS:
        implementation = "xla"
    chosen = choose(implementation, IMPLEMENTATIONS, lambda name: _module(name).refusal(**arrays, h=state_bhpn), "xla")
    arrays |= dict(a=exact(log_decay_bh), h=exact(state_bhpn), dt=exact(dt_bh), D=exact(D_h))
    if chosen in FUSED:
        axes = AXES | {"D": "h" if D_h is None or D_h.ndim == 1 else "h p"}
        kernel = _module("gpu").step if chosen == "gpu" else partial(composed, _module("tpu").core)
        y, h = stepping.run(kernel, partial(composed, advance), axes, "b s h p, b h p n", arrays)
    else:
        y, h = composed(advance if chosen == "xla" else _sequence_of_one, **arrays)
    return y if C.ndim == 4 else y[:, 0], h


def composed(core, x, a, B, C, h, dt=None, D=None, z=None):
    """(y, state) from (y before skip and gate, state) = core(x, a, B, C, h), all of one dtype."""
    exact = lambda v: v.astype(h.dtype)  # noqa: E731
    y, h = core(exact(x) if dt is None else dt[:, None, :, None] * exact(x), a, exact(B), exact(C), h)
    y = y if D is None else y + D.reshape(1, 1, x.shape[2], -1) * exact(x)
    y = y if z is None else y * jax.nn.silu(exact(z))
    return y.astype(x.dtype), h


def advance(x_brhp, a_bh, B_brgn, C_bsgn, h_bhpn):
    """Lane after lane, which compilers for accelerators make one loop of, with what is read of the state inside it; the
    one for CPUs sums it slower than a product of matrices does, which is a pass of its own."""
    per_group = h_bhpn.shape[1] // B_brgn.shape[2]
    of_head = lambda v_bgn: jnp.repeat(v_bgn, per_group, 1)[:, :, None]  # noqa: E731
    h = jnp.exp(a_bh)[..., None, None] * h_bhpn
    for r in range(x_brhp.shape[1]):
        h += x_brhp[:, r, :, :, None] * of_head(B_brgn[:, r])
    if jax.default_backend() == "cpu":
        return jnp.einsum("bhpn,bshn->bshp", h, jnp.repeat(C_bsgn, per_group, 2), precision="highest"), h
    return jnp.stack([jnp.sum(h * of_head(C_bsgn[:, s]), -1) for s in range(C_bsgn.shape[1])], 1), h


def _sequence_of_one(x, a, B, C, h):
    y, last = reference.run(x[:, None], a[:, None], B[:, None], C[:, None], h)
    return y[:, 0], last


def _module(implementation: str):
    return importlib.import_module(f"kernels_pallas.ssd.step_{implementation}")


def _check(x, a, B, C, state, dt, D, z) -> None:
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(f"x must be (batch, [lanes,] heads, channels), none of them 0; it is {x.shape}")
    batch, *_, heads, p = x.shape
    if B.ndim != x.ndim or B.shape[:-2] != x.shape[:-2] or 0 in B.shape:
        raise ValueError(f"B has shape {B.shape}; x {x.shape} needs {(*x.shape[:-2], 'groups', 'states')}")
    if heads % B.shape[-2]:
        raise ValueError(f"B has {B.shape[-2]} groups; they must divide the {heads} heads of x")
    if C.ndim not in (3, 4) or (C.shape[0], *C.shape[-2:]) != (batch, *B.shape[-2:]) or 0 in C.shape:
        raise ValueError(f"C has shape {C.shape}; B {B.shape} needs (batch, [lanes,] groups, states) as it has")
    shapes = {"log_decay_bh": (a, (batch, heads)), "state_bhpn": (state, (batch, heads, p, B.shape[-1]))}
    shapes |= {"dt_bh": (dt, (batch, heads)), "z": (z, (*C.shape[:-2], heads, p))}
    for name, (value, shape) in shapes.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; x {x.shape}, B {B.shape} and C {C.shape} need {shape}")
    if D is not None and D.shape not in ((heads,), (heads, p)):
        raise ValueError(f"D_h has shape {D.shape}; x {x.shape} needs ({heads},) or ({heads}, {p})")
    if D is not None and C.shape[:-2] != x.shape[:-2]:
        raise ValueError(f"D_h takes the lanes written to those read; x has shape {x.shape} and C {C.shape}")
