"""What every operation shares: which implementation runs, and in which precision."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

FUSED = ("gpu", "tpu")  # implementations for the backend of the same name


def choose(implementation: str, implementations: Sequence[str], refusal: Callable[[str], str], otherwise: str) -> str:
    """The implementation to run: what is asked for, or by "auto" the backend's kernel, or `otherwise`.

    refusal: why the kernel for a backend cannot take this call; "" where it can.
    Raises ValueError for a name that is none of the implementations, and for a kernel that cannot take the call.
    """
    if implementation == "auto":
        backend = jax.default_backend()
        taken = backend in implementations and not (backend_refusal(backend) or refusal(backend))
        return backend if taken else otherwise
    if implementation not in implementations:
        raise ValueError(f"implementation is {implementation!r}; it may be auto, {', '.join(implementations)}")
    if implementation in FUSED and (reason := backend_refusal(implementation) or refusal(implementation)):
        raise ValueError(f"implementation {implementation!r} cannot run this: {reason}; 'auto' takes another")
    return implementation


def backend_refusal(implementation: str) -> str:
    """Why no kernel for "gpu" or "tpu" can run in this process; "" where one can."""
    if jax.default_backend() != implementation:
        return f"the backend is {jax.default_backend()}"
    if implementation == "gpu" and jax.__version_info__ < (0, 11, 2):
        return f"it needs jax 0.11.2, this is {jax.__version__}"
    if implementation == "gpu" and not 9 <= float(jax.local_devices()[0].compute_capability) < 10:
        return "it needs compute capability 9, of Hopper"
    return ""


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of states and decays for inputs of a real `dtype`."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def varying_like(h: Array, *arrays: Array) -> Array:
    """h, as different along the axes of a mesh as the arrays are: what `shard_map` asks of a scan's carry."""
    return sum((jnp.zeros_like(v, h.dtype, shape=h.shape) for v in arrays), h)


def rounded_product(equation: str, left, right, dtype, precision: str):
    """An einsum of factors rounded to `dtype`, summed in float32 or better: also of those products that a CPU lacks."""
    exact = at_least_float32(dtype)
    taken = exact if jax.default_backend() == "cpu" else dtype
    left, right = (x.astype(dtype).astype(taken) for x in (left, right))
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=exact)
