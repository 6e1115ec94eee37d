"""Kernels over several devices: under `jit`, each device runs one on its own part of the batch.

XLA cannot look into a kernel: without a rule it would give every device the whole batch.
"""

from collections.abc import Callable

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def over_batch(function: Callable, operands: str, results: str, multiple: int = 1) -> Callable:
    """A function of arrays to a tuple of arrays, that is cut along the axis b and along no other.

    operands, results: the axes of every array, as in "b l n, n". A part has a multiple of `multiple` of the batch, or
    all of it. On one device, and under `vmap`, it is the function itself.
    """
    if jax.device_count() == 1:
        return function
    axes = [[array.split() for array in side.split(",")] for side in (operands, results)]
    first = next(i for i, array in enumerate(axes[0]) if "b" in array)

    def partition(mesh, arguments, outputs):
        split = _batch_axes(mesh, arguments[first], axes[0][first].index("b"), multiple)
        place = lambda array: NamedSharding(mesh, PartitionSpec(*(split if a == "b" else None for a in array)))  # noqa: E731
        return mesh, function, tuple(map(place, axes[1])), tuple(map(place, axes[0]))

    cut = custom_partitioning(function)
    whole = tuple(dict.fromkeys(axis for side in axes for array in side for axis in array if axis != "b"))
    rule = f"{operands.strip()} -> {results.strip()}"
    cut.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    cut = custom_vmap(cut)

    @cut.def_vmap
    def every(size, batched, *arrays):
        out = jax.vmap(function, in_axes=tuple(0 if is_batched else None for is_batched in batched))(*arrays)
        return out, tuple(True for _ in out)

    return cut


def _batch_axes(mesh, argument, axis: int, multiple: int):
    """The mesh's axes that the batch is cut along; None where its parts would not be whole."""
    spec = argument.sharding.spec
    split = spec[axis] if axis < len(spec) else None
    names = () if split is None else split if isinstance(split, tuple) else (split,)
    parts = 1
    for name in names:
        parts *= mesh.shape[name]
    return split if argument.shape[axis] % (parts * multiple) == 0 else None
