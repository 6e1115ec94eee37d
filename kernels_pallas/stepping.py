"""What the kernels of one token share: states written where they lie, by every device for its part of the batch."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from kernels_pallas.partition import over_batch


def run(kernel: Callable, plain: Callable, axes: Mapping[str, str], results: str, arrays: Mapping) -> tuple:
    """kernel(**arrays), a tuple, with the gradients of `plain(**arrays)`; what is None is left out of both.

    axes: of every array by name, as in "b h p n"; results: of what both return.
    """
    present = [name for name, value in arrays.items() if value is not None]
    named = lambda function: lambda *values: function(**dict(zip(present, values, strict=True)))  # noqa: E731
    operands = [axes[name] for name in present]
    # keeps XLA from fusing slices into the kernel's call, as it does at batch 1
    apart = lambda **values: kernel(**jax.lax.optimization_barrier(values))  # noqa: E731
    local = _merged(named(apart), named(plain), [array.split() for array in operands])
    call = jax.custom_vjp(over_batch(local, ", ".join(operands), results))
    call.defvjp(lambda *values: (call(*values), values), lambda values, bars: jax.vjp(named(plain), *values)[1](bars))
    return call(*(arrays[name] for name in present))


def _merged(kernel: Callable, plain: Callable, axes: list[list[str]]) -> Callable:
    """A mapped axis becomes part of the batch; where parameters are mapped too, it is `plain` that is mapped."""
    call = custom_vmap(kernel)

    @call.def_vmap
    def every(size, batched, *arrays):
        if any(mapped and "b" not in names for names, mapped in zip(axes, batched, strict=True)):
            out = jax.vmap(plain, in_axes=tuple(0 if mapped else None for mapped in batched))(*arrays)
            return out, tuple(True for _ in out)

        def merge(v, names, mapped):
            if "b" not in names:
                return v
            v = v if mapped else jnp.broadcast_to(v[None], (size, *v.shape))
            return v.reshape(-1, *v.shape[2:])

        out = call(*map(merge, arrays, axes, batched))
        return tuple(v.reshape(size, -1, *v.shape[1:]) for v in out), tuple(True for _ in out)

    return call
