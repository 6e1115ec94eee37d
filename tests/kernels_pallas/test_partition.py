"""Under `jit`, devices run a kernel on their own part of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas.partition import over_batch


def plain(a, b):
    return jnp.cumsum(a[None, None] * b, 1), b.sum(1)


def cut(multiple=1):
    """`plain` over the batch, and the shapes of b that it is traced with."""
    seen = []

    def kernel(a, b):
        seen.append(b.shape)
        return plain(a, b)

    return over_batch(kernel, "n, b l n", "b l n, b n", multiple), seen


@pytest.fixture
def mesh():
    return jax.make_mesh((2,), ("data",), (AxisType.Auto,))


@pytest.fixture
def arrays(rng, mesh):
    b = jax.device_put(rng.normal(size=(4, 6, 3)).astype(np.float32), NamedSharding(mesh, PartitionSpec("data")))
    return jnp.arange(3.0), b


@pytest.mark.parametrize(("multiple", "local"), [(1, 2), (2, 2), (4, 4)])
def test_each_device_runs_its_part(arrays, multiple, local):
    """Four rows on two devices; where a part must have four, all of them are given to both."""
    run, seen = cut(multiple)
    run = jax.jit(run).lower(*arrays).compile()
    assert seen[-1] == (local, 6, 3)
    assert ("all-gather" in run.as_text()) == (local == 4)
    for out, ref in zip(run(*arrays), plain(*arrays), strict=True):
        np.testing.assert_allclose(out, ref, rtol=1e-6)


def test_the_other_axes_are_whole(arrays, mesh):
    """A sequence that is cut along its length is put together: the kernel needs all of it."""
    a, b = arrays
    b = jax.device_put(b, NamedSharding(mesh, PartitionSpec(None, "data")))
    run, seen = cut()
    out = jax.jit(run)(a, b)
    assert seen[-1] == (4, 6, 3)
    np.testing.assert_allclose(out[0], plain(a, b)[0], rtol=1e-6)


def test_vmap_and_shard_map(arrays, mesh):
    a, b = arrays
    run, _ = cut()
    two = jnp.stack([a, 2 * a])
    for out, ref in zip(
        jax.vmap(run, in_axes=(0, None))(two, b), jax.vmap(plain, in_axes=(0, None))(two, b), strict=True
    ):
        np.testing.assert_allclose(out, ref, rtol=1e-6)
    data = PartitionSpec("data")
    inside = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), data), out_specs=data, check_vma=False)
    np.testing.assert_allclose(jax.jit(inside)(a, b)[0], plain(a, b)[0], rtol=1e-6)
