r"""The first-order linear recurrence that the whole line shares: $h_t = a_t h_{t-1} + b_t$.

Real, or complex as a pair of planes (real, imaginary). The gradients of all inputs come from one scan in
the other direction: with $\bar h_t$ the cotangent of $h_t$, the adjoint is
$g_t = \bar h_t + a_{t+1}^* g_{t+1}$, and $\bar b_t = g_t$, $\bar a_t = g_t h_{t-1}^*$,
$\bar h_{-1} = a_0^* g_0$ (* conjugates).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from kernels_pallas.associative_scan import reference, xla
from kernels_pallas.associative_scan.reference import times

Planes = Inexact[Array, "..."] | tuple[Inexact[Array, "..."], Inexact[Array, "..."]]
IMPLEMENTATIONS = {"reference": reference.scan, "xla": xla.scan}


def associative_scan(
    a: Planes,
    b: Planes,
    initial_state: Planes | None = None,
    *,
    reverse: bool = False,
    reset: Bool[Array, "b l"] | None = None,
    implementation: str = "auto",
) -> tuple[Planes, Planes]:
    """All states h of $h_t = a_t h_{t-1} + b_t$, and the last one reached.

    a: (b, l, n), or (n,) where it is the same at every token; any modulus, though states grow where it
    exceeds 1. b: (b, l, n). initial_state: (b, n), zeros by default. A complex argument is a pair of such
    planes, and then all are. reverse: from the last token to the first. reset: True at tokens that forget
    the states before them (after them, in reverse). Computed in float32 or better; h has b's dtype, the
    last state keeps the precision.
    Raises ValueError naming the argument whose shape or dtype does not fit, or an unknown implementation.
    """
    a_planes, b_planes = _planes("a", a), _planes("b", b)
    _check_b(b_planes)
    h = tuple(jnp.zeros(x.shape[::2], x.dtype) for x in b_planes)
    h = h if initial_state is None else _planes("initial_state", initial_state)
    _check(a_planes, b_planes, h, reset)
    dtype = b_planes[0].dtype
    precise = at_least_float32(dtype)
    a_planes, b_planes, h = jax.tree.map(lambda x: x.astype(precise), (a_planes, b_planes, h))
    if reset is not None:
        a_planes = tuple(jnp.where(reset[:, :, None], 0, jnp.broadcast_to(x, b_planes[0].shape)) for x in a_planes)
    states = _scan(a_planes, b_planes, h, reverse, _choose(implementation))
    last = tuple(x[:, 0 if reverse else -1] for x in states)
    states = tuple(x.astype(dtype) for x in states)
    return (states, last) if isinstance(b, tuple) else (states[0], last[0])


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of states and decays for inputs of a real `dtype`."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _planes(name: str, x: Planes) -> tuple:
    planes = x if isinstance(x, tuple) else (x,)
    if any(jnp.iscomplexobj(plane) for plane in planes):
        raise ValueError(f"{name} has a complex dtype; give a pair of planes (real, imaginary)")
    return planes


def _check_b(b: tuple) -> None:
    shape = b[0].shape
    if len(shape) != 3 or 0 in shape or b[-1].shape != shape:
        raise ValueError(f"b must be (batch, length, channels), none of them 0; it is {[x.shape for x in b]}")


def _check(a: tuple, b: tuple, h: tuple, reset: Array | None) -> None:
    shape = b[0].shape
    expected = {"a": (a, (shape, shape[-1:])), "initial_state": (h, (shape[::2],))}
    for name, (planes, shapes) in expected.items():
        if len(planes) != len(b):
            raise ValueError(f"{name} has {len(planes)} plane(s), b has {len(b)}: all real or all complex")
        for plane in planes:
            if plane.shape not in shapes:
                raise ValueError(f"{name} has shape {plane.shape}; b {shape} needs {' or '.join(map(str, shapes))}")
    if reset is not None and reset.shape != shape[:2]:
        raise ValueError(f"reset has shape {reset.shape}; b {shape} needs {shape[:2]}")


def _choose(implementation: str) -> str:
    if implementation == "auto":
        return "reference" if jax.default_backend() == "cpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it may be auto, {', '.join(IMPLEMENTATIONS)}")
    return implementation


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan(a, b, h, reverse, implementation):
    return IMPLEMENTATIONS[implementation](a, b, h, reverse)


def _forward(a, b, h, reverse, implementation):
    states = IMPLEMENTATIONS[implementation](a, b, h, reverse)
    return states, (a, h, states)


def _backward(reverse, implementation, saved, cotangents):
    a, h, states = saved
    first = -1 if reverse else 0
    conjugate = lambda x: (x[0], *(-y for y in x[1:]))  # noqa: E731
    a_conj = conjugate(a)
    zero = tuple(jnp.zeros_like(x) for x in h)
    a_next = a_conj if a[0].ndim == 1 else tuple(_shift(x, z, not reverse) for x, z in zip(a_conj, zero, strict=True))
    adjoint = _scan(a_next, cotangents, zero, not reverse, implementation)
    previous = tuple(_shift(x, y, reverse) for x, y in zip(states, h, strict=True))
    a_bar = times(adjoint, conjugate(previous))
    if a[0].ndim == 1:
        a_bar = tuple(x.sum((0, 1)) for x in a_bar)
    entry = tuple(jnp.broadcast_to(x if x.ndim == 1 else x[:, first], h[0].shape) for x in a_conj)
    return a_bar, adjoint, times(entry, tuple(x[:, first] for x in adjoint))


def _shift(x, entering, backwards):
    """x_{t-1} with `entering` at the first token; or x_{t+1} with it at the last, if backwards."""
    entering = entering[:, None]
    return jnp.concatenate([x[:, 1:], entering] if backwards else [entering, x[:, :-1]], 1)


_scan.defvjp(_forward, _backward)
