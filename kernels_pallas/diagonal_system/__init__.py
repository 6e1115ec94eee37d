r"""One diagonal state space model for all channels: $h_t = a h_{t-1} + B u_t$, $y_t = \mathrm{Re}\, C h_t + D u_t$.

The states and B and C are complex; a conjugate pair is kept as one state, with its column of C doubled by the caller.
With $\bar y_t$ the cotangent of $y_t$, that of $h_t$ is $g_t = a^* g_{t+1} + C^H \bar y_t$: the same operation in the
other direction, and $\bar u_t = \mathrm{Re}\, B^H g_t + D \bar y_t$ is its output. From both come
$\bar B = \sum g_t u_t^T$, $\bar C = \sum \bar y_t h_t^H$ and $\bar a = \sum g_t h_{t-1}^*$.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from kernels_pallas.associative_scan.reference import conjugate
from kernels_pallas.diagonal_system import reference, xla
from kernels_pallas.dispatch import at_least_float32, choose

IMPLEMENTATIONS = ("reference", "xla", "gpu")
FEWEST_TOKENS = 2**16  # for which the kernel was measured to be the fastest
PRECISIONS = ("auto", "default", "high", "highest")


def diagonal_system(
    u_bld: Float[Array, "b l d"],
    a_n: Complex[Array, " n"],
    B_nd: Complex[Array, "n d"],
    C_dn: Complex[Array, "d n"],
    D_d: Float[Array, " d"],
    initial_state_bn: Complex[Array, "b n"] | None = None,
    *,
    reset: Bool[Array, "b l"] | None = None,
    reverse: bool = False,
    precision: str = "auto",
    implementation: str = "auto",
) -> tuple[Float[Array, "b l d"], Complex[Array, "b n"]]:
    """y, in u's dtype, and the last state reached.

    a, B, C, D: the discrete system; B holds the gain of the discretisation. reverse: from the last token to the first.
    reset: True at tokens that forget the states before them (after them, in reverse). implementation: "reference" goes
    token by token, "xla" makes all states by an associative scan, "gpu" is the kernel for Hopper GPUs, which takes no
    reset; of float32 tokens it saves nothing for gradients, which are those of "xla". "auto" takes it on a single
    device for 2^16 tokens or more, else two projections and the fastest scan.
    precision: of the factors of matrix products; sums and states are float32 or better. "default" takes bfloat16
    tokens as they are and rounds the other factors to bfloat16, and float32 ones to what the backend's products take;
    "highest" rounds nothing; "high" is between, in "gpu" two bfloat16 parts of each factor, an error of 6e-6.
    "auto": "default" of bfloat16 tokens, else "high" in "gpu" and "highest" elsewhere.
    Raises ValueError naming the argument whose shape, dtype or value does not fit.
    """
    _check(u_bld, a_n, B_nd, C_dn, D_d, initial_state_bn, reset, precision)
    if precision == "auto" and u_bld.dtype == jnp.bfloat16:
        precision = "default"
    chosen = _choose(implementation, u_bld, a_n, reset, "high" if precision == "auto" else precision)
    if precision == "auto":
        precision = "high" if chosen == "gpu" else "highest"
    h = jnp.zeros((u_bld.shape[0], *a_n.shape), a_n.dtype) if initial_state_bn is None else initial_state_bn
    h = h.astype(a_n.dtype)
    D_d = D_d.astype(at_least_float32(u_bld.dtype))
    if chosen == "reference":
        return reference.run(u_bld, a_n, B_nd, C_dn, D_d, h, reset, reverse)
    system = _planes(B_nd, 0), (a_n.real, a_n.imag), _planes(C_dn.conj().T, 0), D_d
    if chosen == "gpu":
        y, last = _fused(u_bld, *system, _planes(h, 1), reverse, precision)
    else:
        y, last = xla.run(u_bld, *system, _planes(h, 1), reset=reset, reverse=reverse, precision=precision, scan=chosen)
    return y, jax.lax.complex(*jnp.split(last, 2, 1))


def _planes(x, axis: int) -> jax.Array:
    return jnp.concatenate([x.real, x.imag], axis)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _fused(u, into, decay, out, D, h, reverse, precision):
    return _gpu().sweep(u, into, decay, out, D, h, reverse, precision)[:2]


def _forward(u, into, decay, out, D, h, reverse, precision):
    """What is saved is states before every tile, not of every token; of float32 tokens, whose parts do not fit beside
    their cotangents' in shared memory, it is how `xla` goes back."""
    if u.dtype == jnp.bfloat16:
        y, last, states = _gpu().sweep(u, into, decay, out, D, h, reverse, precision)
        return (y, last), (u, into, decay, out, D, states)
    exact = "highest" if precision == "high" else precision
    unfused = lambda *x: xla.run(*x, reset=None, reverse=reverse, precision=exact, scan="auto")  # noqa: E731
    return jax.vjp(unfused, u, into, decay, out, D, h)


def _backward(reverse, precision, saved, cotangents):
    if callable(saved):
        return saved(cotangents)
    (u, into, decay, out, D, states), (dy, d_last) = saved, cotangents
    du, dh, costates = _gpu().sweep(dy, out, conjugate(decay), into, D, d_last, not reverse, precision, True)
    d_into, d_decay, d_out = _gpu().gradients(u, dy, into, decay, out, states, costates, reverse)
    dD = jnp.einsum("bld,bld->d", *(x.astype(D.dtype) for x in (u, dy)))
    return du, d_into, d_decay, d_out, dD, dh


_fused.defvjp(_forward, _backward)


def _gpu():
    return importlib.import_module("kernels_pallas.diagonal_system.gpu")


def _choose(implementation: str, u, a, reset: Array | None, precision: str) -> str:
    """An implementation, or "auto": the fastest scan of those that make all states."""
    if implementation == "auto" and (u.shape[0] * u.shape[1] < FEWEST_TOKENS or jax.device_count() > 1):
        return "auto"
    refusal = lambda _: _gpu().refusal(u, a, precision) if reset is None else "it takes no reset"  # noqa: E731
    return choose(implementation, IMPLEMENTATIONS, refusal, "auto")


def _check(u, a, B, C, D, initial_state, reset, precision) -> None:
    batch, length, d = u.shape
    if not length:
        raise ValueError("u_bld has length 0")
    n = a.shape[0]
    complex_ = {"a_n": (a, (n,)), "B_nd": (B, (n, d)), "C_dn": (C, (d, n))}
    complex_ |= {"initial_state_bn": (initial_state, (batch, n))}
    real = {"D_d": (D, (d,)), "reset": (reset, (batch, length))}
    for name, (value, shape) in (complex_ | real).items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; u_bld {u.shape} and a_n {a.shape} need {shape}")
    for name, (value, _) in complex_.items():
        if value is not None and not jnp.iscomplexobj(value):
            raise ValueError(f"{name} is {value.dtype}; it must be complex")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it may be {', '.join(PRECISIONS)}")
