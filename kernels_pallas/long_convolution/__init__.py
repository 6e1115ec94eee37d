r"""The diagonal state space model $h_t = a h_{t-1} + b u_t$, $y_t = \mathrm{Re} \sum_n c_n h_{t,n} + D u_t$.

Every channel d has its own n states, so that y is u convolved with one kernel a channel; the states of single
tokens are never stored. A conjugate pair is kept as one state, with its c doubled by the caller.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from kernels_pallas.dispatch import FUSED, at_least_float32, choose
from kernels_pallas.long_convolution import reference, xla

IMPLEMENTATIONS = ("reference", "xla", *FUSED)


def long_convolution(
    u: Float[Array, "_ _ _"],
    a: Inexact[Array, "d n"],
    b: Inexact[Array, "d n"],
    c: Inexact[Array, "d n"],
    D: Float[Array, " d"],
    initial_state: Inexact[Array, "b d n"] | None = None,
    *,
    c_reverse: Inexact[Array, "d n"] | None = None,
    reset: Bool[Array, "b l"] | None = None,
    channels_first: bool = False,
    chunk_size: int = 128,
    precision: str = "auto",
    implementation: str = "auto",
) -> tuple[Float[Array, "_ _ _"], Inexact[Array, "b d n"]]:
    """y, and the state after the last token.

    a, b, c: the discrete system, real or complex (all alike). c_reverse: also read, from the states of the
    reversed sequence, the tokens after t: y_t += Re sum c_reverse a^j b u_{t+1+j}; it takes no initial state.
    reset: True at tokens that forget the states before them, which needs the reference implementation.
    channels_first: u and y are (d, b, l), as the products are made, else (b, l, d), which is transposed twice.
    chunk_size: of "xla", in tokens, at most; "gpu", the kernel for Hopper GPUs, and "tpu" have their own.
    precision: of the factors of matrix products; the sums are float32 or better, as the states are. The relative
    error of y, S4D-Lin on 16 384 float32 tokens ("tpu": with its kernel simulated on a CPU):
      "default"  2.2e-3 in "gpu", 2.0e-3 in "tpu", of one bfloat16 part; 3.0e-4 in "xla" on an NVIDIA GPU, of TF32
      "high"     3.9e-6 in "gpu" and "tpu", of two parts; as "default" in "xla" on an NVIDIA GPU
      "highest"  1.3e-6, 0.9e-6 in "tpu", which is the states' own; on a CPU "xla" has no other for float32
      "auto"     "default" of bfloat16 tokens, else "high" in "gpu" and "tpu" and "highest" in "xla"
    From bfloat16 tokens it is 2.2e-3 in "default", of which y's own rounding makes 1.7e-3. y has u's dtype.
    Raises ValueError naming the argument whose shape, dtype or combination does not fit.
    """
    u_dbl = u if channels_first else jnp.transpose(u, (2, 0, 1))
    like = jax.ShapeDtypeStruct((*u_dbl.shape[1:], u_dbl.shape[0]), u.dtype)
    _check(like, a, b, c, D, initial_state, c_reverse, reset, chunk_size)
    if precision == "auto" and u.dtype == jnp.bfloat16:
        precision = "default"
    chosen = _choose(implementation, like, a, reset, "high" if precision == "auto" else precision)
    if precision == "auto":
        precision = "high" if chosen in FUSED else "highest"
    h = jnp.zeros((like.shape[0], *a.shape), a.dtype) if initial_state is None else initial_state.astype(a.dtype)
    precise = at_least_float32(u.dtype)
    if chosen == "reference":
        exact = jnp.transpose(u_dbl, (1, 2, 0)).astype(precise)
        y, last = reference.run(exact, a, b, c, c_reverse, h, reset)
        y_dbl = jnp.transpose(y + D.astype(precise)[None, None] * exact, (2, 0, 1)).astype(u.dtype)
    else:
        y_dbl, last = _by_chunks(u_dbl, (a, b, c, c_reverse, D.astype(precise)), h, chosen, chunk_size, precision)
    return y_dbl if channels_first else jnp.transpose(y_dbl, (1, 2, 0)), last


def _by_chunks(u_dbl, system: tuple, h_bdn, chosen: str, chunk_size: int, precision: str):
    """The walks of `xla`, one after another over parts of the sequence that are each a multiple of a chunk."""
    parts = _cut(u_dbl, chosen, chunk_size, precision)
    tables = [xla.tables(*system, q) for _, q, _, _ in parts]
    h = jnp.concatenate([jnp.swapaxes(x, 0, 1) for x in xla.planes(h_bdn)], -1)
    g, y = jnp.zeros_like(h), [None] * len(parts)
    for i, (name, _, exact, u) in enumerate(parts):
        y[i], h = _walk(u, tables[i][0], h, False, name, exact)
    for i, (name, _, exact, u) in reversed(list(enumerate(parts if system[3] is not None else []))):
        later, g = _walk(u, tables[i][1], g, True, name, exact)
        y[i] += later
    last = [jnp.swapaxes(x, 0, 1) for x in jnp.split(h, len(xla.planes(h_bdn)), -1)]
    y = [x.astype(u_dbl.dtype) for x in y]
    return y[0] if len(y) == 1 else jnp.concatenate(y, 2), jax.lax.complex(*last) if len(last) == 2 else last[0]


def _cut(u_dbl, chosen: str, chunk_size: int, precision: str) -> list[tuple]:
    """(implementation, chunk, precision, tokens): the most that the implementation takes in chunks, then the rest."""
    length, rounded = u_dbl.shape[2], precision == "default" and u_dbl.dtype == jnp.bfloat16
    if chosen in FUSED:
        q, multiple, rest = _module(chosen).CHUNK, _module(chosen).TILE, precision if rounded else "highest"
    else:
        q, rest = min(chunk_size, length), precision
        q = multiple = next((k for k in range(q, q // 2, -1) if length % k == 0), q)
    whole = length - length % multiple
    narrow = u_dbl if rounded or chosen in FUSED else u_dbl.astype(at_least_float32(u_dbl.dtype))
    parts = [(chosen, q, precision, narrow[..., :whole])]
    return parts + (_cut(u_dbl[..., whole:], "xla", chunk_size, rest) if whole < length else [])


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _walk(u, tables, h, reverse, implementation, precision):
    return _module(implementation).sweep(u, tables, h, reverse, precision)[:2]


def _forward(u, tables, h, reverse, implementation, precision):
    y, last, states = _module(implementation).sweep(u, tables, h, reverse, precision)
    return (y, last), (u, tables, states)


def _backward(reverse, implementation, precision, saved, cotangents):
    (u, tables, states), (dy, d_last) = saved, cotangents
    module = _module(implementation)
    du, dh, costates = module.sweep(dy, tables.adjoint(), d_last, not reverse, precision)
    return du, module.gradients(u, dy, tables, states, costates, reverse, precision), dh


_walk.defvjp(_forward, _backward)


def _module(implementation: str):
    return importlib.import_module(f"kernels_pallas.long_convolution.{implementation}")


def _choose(implementation: str, u, a, reset: Array | None, precision: str) -> str:
    if reset is not None:
        if implementation in ("xla", *FUSED):
            forgetful = "a convolution cannot forget; use 'reference'"
            raise ValueError(f"implementation {implementation!r} takes no reset: {forgetful}")
        implementation = "reference" if implementation == "auto" else implementation
    return choose(implementation, IMPLEMENTATIONS, lambda name: _module(name).refusal(u, a, precision), "xla")


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
