"""The TPU kernels: values in the simulator of TPU memory, and what the TPU compiler says of them without a TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.short_convolution import fused, tpu
from tests.short_convolutions import check, check_mapped
from tests.tpus import compiles

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("tested with the accelerators' jax", allow_module_level=True)

COMPILE = """
from kernels_pallas.short_convolution import fused, specs, tpu

for (b, l, d, k, dtype), resets in (*((spec, False) for spec in specs.GPU), ((3, 16 * 331, 384, 3, "bfloat16"), True)):
    x, reach = like((b, l, d), dtype), like((b, l), "int32") if resets else None
    assert not fused.refusal("tpu", x, k)
    filters = like((k, d)), like((d,)), like((b, k - 1, d)), reach
    compile(lambda *arrays: tpu.forward(*arrays, True), (x, *filters))
    compile(lambda *arrays: tpu.backward(*arrays, True), (x, x, *filters))
"""


@pytest.mark.parametrize(
    ("shape", "k", "dtype", "resets", "activation"),
    [
        ((2, 64, 256), 4, jnp.float32, False, "silu"),
        ((2, 48, 128), 3, jnp.float32, True, "silu"),
        ((1, 8, 128), 4, jnp.float32, True, "none"),
        ((2, 96, 128), 2, jnp.bfloat16, True, "silu"),
    ],
)
def test_values_and_all_gradients(shape, k, dtype, resets, activation, rng, monkeypatch, simulated):
    """One tile and several, of one group and of two; two blocks of channels."""
    monkeypatch.setattr(tpu, "FORWARD", 16)
    monkeypatch.setattr(tpu, "BACKWARD", 16)
    monkeypatch.setattr(tpu, "WIDTH", 128)
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 2**17)
    with pltpu.force_tpu_interpret_mode():
        check("tpu", rng, shape, k, dtype, resets, activation)


def test_vmap(rng, monkeypatch, simulated):
    """The first tile of each mapped call starts from its own state, though the grid has one axis more.
    By Pallas's plain interpreter: the simulator of TPU memory takes no mapped grid."""
    monkeypatch.setattr(tpu.pl, "pallas_call", partial(tpu.pl.pallas_call, interpret=True))
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 2**16)
    check_mapped("tpu", rng, (4, 64, 128))


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((1, 24, 128))
    assert fused.refusal("tpu", x, 4) == ""
    assert fused.refusal("tpu", x.astype(jnp.bfloat16), 4) == "the length is 24, no multiple of 16"
    assert fused.refusal("tpu", x[:, 4:], 4) == "the length is 20, no multiple of 8"
    assert fused.refusal("tpu", x[..., 1:], 4) == "there are 127 channels, no multiple of 128"
    assert fused.refusal("tpu", x, 1) == "there are 1 taps; it takes 2 to 4"


def test_the_tpu_compiler_takes_them():
    """Blocks that VMEM cannot hold, and operations that Mosaic lacks, fail here."""
    compiles(COMPILE)
