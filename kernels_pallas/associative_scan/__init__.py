r"""The first-order linear recurrence that the whole line shares: $h_t = a_t h_{t-1} + b_t$.

Real, or complex as a pair of planes (real, imaginary). The gradients of all inputs come from one scan in
the other direction: with $\bar h_t$ the cotangent of $h_t$, the adjoint is
$g_t = \bar h_t + a_{t+1}^* g_{t+1}$, and $\bar b_t = g_t$, $\bar a_t = g_t h_{t-1}^*$,
$\bar h_{-1} = a_0^* g_0$ (* conjugates).
"""

import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from kernels_pallas.dispatch import FUSED, at_least_float32, choose, varying_like
from kernels_pallas.partition import over_batch

Planes = Inexact[Array, "..."] | tuple[Inexact[Array, "..."], Inexact[Array, "..."]]
IMPLEMENTATIONS = ("reference", "xla", *FUSED)


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
    h = tuple(varying_like(x.astype(at_least_float32(dtype)), *a_planes, *b_planes) for x in h)
    if reset is not None:
        a_planes = tuple(jnp.where(reset[:, :, None], 0, jnp.broadcast_to(x, b_planes[0].shape)) for x in a_planes)
    refusal = lambda name: _module(name).refusal(a_planes, b_planes)  # noqa: E731
    chosen = choose(implementation, IMPLEMENTATIONS, refusal, "reference" if jax.default_backend() == "cpu" else "xla")
    states, last = _scan(a_planes, b_planes, h, reverse, chosen)
    return (states, last) if isinstance(b, tuple) else (states[0], last[0])


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


def _module(implementation: str):
    return importlib.import_module(f"kernels_pallas.associative_scan.{implementation}")


def _states(a, b, h, reverse, implementation):
    p, scan = len(b), _module(implementation).scan
    out = _over_batch(
        lambda *planes: sum(scan(*_cut(planes, p), reverse), ()),
        implementation,
        [_axes(a)] * p + ["b l n"] * p + ["b n"] * p,
        ["b l n"] * p + ["b n"] * p,
    )(*a, *b, *h)
    return tuple(_cut(out, p))


def _forward(a, b, h, reverse, implementation):
    states, last = _states(a, b, h, reverse, implementation)
    return (states, last), (a, h, states)


def _backward(reverse, implementation, saved, cotangents):
    a, h, states = saved
    p, adjoint = len(h), _module(implementation).adjoint
    a_bar, b_bar, h_bar = _cut(
        _over_batch(
            lambda *planes: sum(adjoint(*_cut(planes, p), reverse), ()),
            implementation,
            [_axes(a)] * p + ["b n"] * p + ["b l n"] * (2 * p) + ["b n"] * p,
            ["b l n" if a[0].ndim == 3 else "b n"] * p + ["b l n"] * p + ["b n"] * p,
        )(*a, *h, *states, *cotangents[0], *cotangents[1]),
        p,
    )
    a_bar = tuple((x if y.ndim == 3 else x.sum(0)).astype(y.dtype) for x, y in zip(a_bar, a, strict=True))
    return a_bar, b_bar, h_bar


_scan = jax.custom_vjp(_states, nondiff_argnums=(3, 4))
_scan.defvjp(_forward, _backward)


def _axes(a: tuple) -> str:
    return "b l n" if a[0].ndim == 3 else "n"


def _cut(planes: tuple, p: int) -> list[tuple]:
    return [tuple(planes[i : i + p]) for i in range(0, len(planes), p)]


def _over_batch(run, implementation: str, operands: list[str], results: list[str]):
    """A kernel that devices share by rows of the batch; what XLA makes it shares out itself."""
    return over_batch(run, ", ".join(operands), ", ".join(results)) if implementation in FUSED else run
