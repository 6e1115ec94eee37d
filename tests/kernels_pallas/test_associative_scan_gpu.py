"""The GPU kernels: values in the simulator of shared memory and barriers, and what ptxas says of them without a GPU.

The values on a GPU, forward and backward, are in experiments/results/kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.associative_scan import reference
from tests.hopper import spills
from tests.oracles import assert_close

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernels need jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels_pallas.associative_scan import gpu  # noqa: E402

COMPILE = """
from kernels_pallas.associative_scan import gpu, specs

both = specs.Spec(8, 4096, 2048, "complex", True), specs.Spec(3, 8 * 331, 384, "real", True)
for spec in (*specs.GPU[:2], *both):
    p = 2 if spec.number == "complex" else 1
    like = lambda shape, dtype: (jax.ShapeDtypeStruct(shape, dtype, sharding=one),) * p
    shape, n = (spec.batch, spec.length, spec.channels), spec.channels
    a, b = like(shape if spec.per_token else (n,), spec.dtype), like(shape, spec.dtype)
    h = like((spec.batch, n), "float32")
    assert not gpu.refusal(a, b), spec
    for function, arguments in ((gpu.scan, (a, b, h)), (gpu.adjoint, (a, h, b, b, h))):
        compile(lambda *x: function(*x, False), arguments)
"""


def planes(rng, count, *shape, dtype=jnp.float32):
    return tuple(jnp.asarray(rng.normal(size=shape) / 2, dtype) for _ in range(count))


@pytest.mark.parametrize(
    ("count", "per_token", "reverse", "dtype"),
    [
        (1, True, False, jnp.float32),
        (1, True, True, jnp.bfloat16),
        (1, False, False, jnp.float32),
        (2, False, True, jnp.float32),
        (2, True, False, jnp.float32),
    ],
)
def test_values_and_all_gradients(count, per_token, reverse, dtype, rng, monkeypatch):
    """Two segments of two tiles: a state dropped between them, or a gradient at an edge of a tile, shows."""
    monkeypatch.setattr(gpu, "SHORTEST_SEGMENT", 16)
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(gpu, "TILE_BYTES", 8 * gpu.LANES * jnp.dtype(dtype).itemsize)
    shape = (1, 32, gpu.LANES)
    a = planes(rng, count, *(shape if per_token else shape[-1:]), dtype=dtype)
    a = tuple(0.7 * x for x in a)
    b, d_states = planes(rng, count, *shape, dtype=dtype), planes(rng, count, *shape, dtype=dtype)
    h, d_last = planes(rng, count, 1, gpu.LANES), planes(rng, count, 1, gpu.LANES)
    grid = gpu.Grid.of(b[0], reverse, 4)
    assert (grid.segments, grid.steps, grid.tile) == (2, 2, 8)
    wide = lambda x: jax.tree.map(lambda v: v.astype(jnp.float32), x)  # noqa: E731
    (states, last), pull = jax.vjp(lambda *x: reference.scan(*x, reverse), *wide((a, b, h)))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        out = gpu.scan(a, b, h, reverse)
        gradients = gpu.adjoint(a, h, tuple(x.astype(dtype) for x in states), d_states, d_last, reverse)
    gradients = (gradients[0] if per_token else tuple(x.sum(0) for x in gradients[0]), *gradients[1:])
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves((states, last)), strict=True):
        assert_close(x, np.asarray(y), scale=32)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(pull(wide((d_states, d_last)))), strict=True):
        bound = dict(scale=32, gradient=True)
        assert_close(x.astype(dtype) if dtype == jnp.bfloat16 else x, np.asarray(y), **bound)


def test_what_does_not_fit_is_refused():
    b = (jnp.zeros((1, 16, 128)),)
    assert gpu.refusal(b, b) == ""
    assert "length is 12" in gpu.refusal(b, (jnp.zeros((1, 12, 128)),))
    assert "96 channels" in gpu.refusal(b, (jnp.zeros((1, 16, 96)),))


def test_it_compiles_for_hopper_without_a_spill():
    """Registers that do not fit would go to memory, and the walk would wait for them."""
    assert spills(COMPILE) == (8, {"0"})
