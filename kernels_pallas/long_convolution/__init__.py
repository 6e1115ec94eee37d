r"""The diagonal state space model $h_t = a h_{t-1} + b u_t$, $y_t = \mathrm{Re} \sum_n c_n h_{t,n} + D u_t$.

Every channel d has its own n states, so that y is u convolved with one kernel a channel; the states are never
stored. A conjugate pair is kept as one state, with its c doubled by the caller.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from kernels_pallas.associative_scan import at_least_float32
from kernels_pallas.long_convolution import reference, xla

IMPLEMENTATIONS = ("reference", "xla")


def long_convolution(
    u: Float[Array, "b l d"],
    a: Inexact[Array, "d n"],
    b: Inexact[Array, "d n"],
    c: Inexact[Array, "d n"],
    D: Float[Array, " d"],
    initial_state: Inexact[Array, "b d n"] | None = None,
    *,
    c_reverse: Inexact[Array, "d n"] | None = None,
    reset: Bool[Array, "b l"] | None = None,
    chunk_size: int = 128,
    precision: str = "highest",
    implementation: str = "auto",
) -> tuple[Float[Array, "b l d"], Inexact[Array, "b d n"]]:
    """y, and the state after the last token.

    a, b, c: the discrete system, real or complex (all alike). c_reverse: also read, from the states of the
    reversed sequence, the tokens after t: y_t += Re sum c_reverse a^j b u_{t+1+j}; it takes no initial state.
    reset: True at tokens that forget the states before them, which needs the reference implementation.
    precision: of the matrix products, as jax.lax.Precision names it. Computed in float32 or better; y has
    u's dtype. Raises ValueError naming the argument whose shape, dtype or combination does not fit.
    """
    _check(u, a, b, c, D, initial_state, c_reverse, reset, chunk_size)
    chosen = _choose(implementation, reset)
    dtype, precise = u.dtype, at_least_float32(u.dtype)
    u = u.astype(precise)
    h = jnp.zeros((u.shape[0], *a.shape), a.dtype) if initial_state is None else initial_state.astype(a.dtype)
    if chosen == "reference":
        y, last = reference.run(u, a, b, c, c_reverse, h, reset)
    else:
        y, last = xla.run(u, a, b, c, c_reverse, h, chunk_size, precision)
    return (y + D.astype(precise)[None, None] * u).astype(dtype), last


def _choose(implementation: str, reset: Array | None) -> str:
    if implementation == "auto":
        return "xla" if reset is None else "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it may be auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla" and reset is not None:
        raise ValueError("implementation 'xla' takes no reset: a convolution cannot forget; use 'reference'")
    return implementation


def _check(u, a, b, c, D, initial_state, c_reverse, reset, chunk_size) -> None:
    batch, length, d = u.shape
    if not length:
        raise ValueError("u has length 0")
    state = (batch, *a.shape)
    shapes = {"b": (b, a.shape), "c": (c, a.shape), "c_reverse": (c_reverse, a.shape), "D": (D, (d,))}
    shapes |= {"initial_state": (initial_state, state), "reset": (reset, (batch, length))}
    if a.shape[0] != d:
        raise ValueError(f"a has {a.shape[0]} channels, u has {d}")
    for name, (value, shape) in shapes.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; u {u.shape} and a {a.shape} need {shape}")
    for name, value in {"b": b, "c": c, "c_reverse": c_reverse}.items():
        if value is not None and value.dtype != a.dtype:
            raise ValueError(f"{name} is {value.dtype}, a is {a.dtype}: all real or all complex")
    if c_reverse is not None and initial_state is not None:
        raise ValueError("initial_state cannot enter a bidirectional convolution: give one of it and c_reverse")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
