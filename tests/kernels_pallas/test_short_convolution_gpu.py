"""The GPU kernels: values in the simulator of memory and warpgroups, and what ptxas says of them without a GPU.

The values on a GPU, forward and backward, are in experiments/results/kernels.
"""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.short_convolution import fused
from tests import hopper
from tests.short_convolutions import check, check_mapped

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernels need jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels_pallas.short_convolution import gpu  # noqa: E402

COMPILE = """
from kernels_pallas.short_convolution import fused, gpu, specs

like = lambda shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=one)
for (b, l, d, k, dtype), resets in (*((spec, False) for spec in specs.GPU), ((3, 1001, 2000, 3, "bfloat16"), True)):
    x, reach = like((b, l, d), dtype), like((b, l), "int32") if resets else None
    assert not fused.refusal("gpu", x, k)
    filters = like((k, d)), like((d,)), like((b, k - 1, d)), reach
    compile(lambda *arrays: gpu.forward(*arrays, True), (x, *filters))
    compile(lambda *arrays: gpu.backward(*arrays, True), (x, x, *filters))
"""


@pytest.mark.parametrize(
    ("shape", "k", "dtype", "resets", "activation"),
    [
        ((2, 16, 256), 4, jnp.float32, False, "silu"),
        ((2, 17, 130), 3, jnp.float32, True, "silu"),
        ((1, 35, 260), 4, jnp.float32, True, "none"),
        ((2, 40, 129), 2, jnp.bfloat16, True, "silu"),
    ],
)
def test_values_and_all_gradients(shape, k, dtype, resets, activation, rng, monkeypatch, simulated):
    """One tile, and tiles and blocks of channels that overlap: by all but one token, where a tile starts at the second
    token, and the one before it sends to one after it."""
    monkeypatch.setattr(gpu, "TILE", 16)
    monkeypatch.setattr(gpu, "AT_ONCE", 4)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        check("gpu", rng, shape, k, dtype, resets, activation)


def test_vmap(rng, monkeypatch, simulated):
    monkeypatch.setattr(gpu, "TILE", 16)
    monkeypatch.setattr(gpu, "AT_ONCE", 4)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        check_mapped("gpu", rng, (4, 20, 128))


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((1, 128, 128))
    assert fused.refusal("gpu", x, 4) == ""
    assert fused.refusal("gpu", x.astype(jnp.float16), 4) == "x is float16; it takes float32 and bfloat16"
    assert fused.refusal("gpu", x, 5) == "there are 5 taps; it takes 2 to 4"
    assert fused.refusal("gpu", x[:, 1:], 4) == "the length is 127, less than 128"
    assert fused.refusal("gpu", x[..., 1:], 4) == "there are 127 channels, less than 128"


def test_it_compiles_for_hopper_without_a_spill():
    """Registers that do not fit would go to memory, and the walk would wait for them."""
    assert hopper.spills(COMPILE) == (10, {"0"})


TWO = """
from kernels_pallas import dispatch
from kernels_pallas.short_convolution import short_convolution

dispatch.backend_refusal = lambda implementation: ""

def like(*shape, of="float32", split=False):
    return jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, PartitionSpec(*["x"] * split)))

def gradients(x, weight, bias, reset):
    total = lambda *arrays: short_convolution(*arrays, reset=reset, implementation="gpu")[0].sum()
    return jax.grad(total, argnums=(0, 1, 2))(x, weight, bias)

reset = like(4, 128, of="bool", split=True)
hlo = compile(gradients, (like(4, 128, 128, split=True), like(128, 4), like(128), reset))
print("collectives", *sorted({name for name in ("all-gather", "all-reduce", "all-to-all") if f" {name}" in hlo}))
"""


def test_two_gpus_exchange_the_gradients_of_the_filters():
    """And nothing of the batch."""
    assert "collectives all-reduce\n" in hopper.run(TWO, devices=2)[0]
