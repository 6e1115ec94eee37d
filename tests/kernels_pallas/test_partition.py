"""Under `jit`, devices run a kernel on their own part of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas.partition import over_batch
from tests import hopper


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


TWO = """
from kernels_pallas import dispatch
from kernels_pallas.associative_scan import associative_scan
from kernels_pallas.long_convolution import long_convolution

dispatch.backend_refusal = lambda implementation: ""

def like(*shape, of="float32", split=False):
    return jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, PartitionSpec(*["x"] * split)))

def scan(a, b):
    return jax.grad(lambda a, b: associative_scan(a, b, implementation="gpu")[0].sum(), argnums=(0, 1))(a, b)

def convolution(u, a, D):
    return jax.grad(lambda u, a: long_convolution(u, a, a, a, D, implementation="gpu")[0].sum(), argnums=(0, 1))(u, a)

u, a = like(8, 1024, 4, split=True), like(4, 32, of="complex64")
for function, arrays in ((scan, (like(128), like(4, 64, 128, split=True))), (convolution, (u, a, like(4)))):
    hlo = compile(function, arrays)
    print("collectives", *sorted({name for name in ("all-gather", "all-reduce", "all-to-all") if f" {name}" in hlo}))
"""


def test_two_gpus_exchange_the_gradients_of_what_they_share():
    """And nothing of the batch."""
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("the kernels need jax 0.11.2")
    out, _ = hopper.run(TWO, devices=2)
    assert [line for line in out.splitlines() if line.startswith("collectives")] == ["collectives all-reduce"] * 2
