"""The kernel for Hopper GPUs: values in the simulator of shared memory and barriers, and what ptxas says of it.

The values on a GPU, forward and backward, are in experiments/results/kernels.
"""

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas.long_convolution as op
from tests import convolutions
from tests.hopper import spills

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernel needs jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels_pallas.long_convolution import gpu, gpu_tiles  # noqa: E402

COMPILE = """
import jax.numpy as jnp
from kernels_pallas.long_convolution import gpu
from kernels_pallas.long_convolution.xla import Tables

like = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=one)
d, batch, length, n = 256, 16, 16384, 32
h, states = like(d, batch, 2 * n), like(d, batch // gpu.GROUP, gpu.GROUP, length // gpu.TILE, 2 * n)
for function, dtype, precision, first in [
    (gpu.sweep, "bfloat16", "default", True), (gpu.sweep, "bfloat16", "default", False),
    (gpu.sweep, "float32", "high", True), (gpu.sweep, "float32", "highest", True),
    (gpu.gradients, "bfloat16", "default", True), (gpu.gradients, "float32", "high", False),
    (gpu.gradients, "float32", "highest", True),
]:
    theta = like(d, 64, 64) if first else None
    tables = Tables(theta, like(d, 2 * n, 64), like(d, 64, 2 * n), (like(d, n),) * 2)
    x = like(d, batch, length, dtype=dtype)
    arrays = (x, tables, h) if function is gpu.sweep else (x, x, tables, states, states)
    compile(lambda *arrays: function(*arrays, not first, precision), arrays)
"""


def simulate(monkeypatch):
    """The kernel in the simulator, which cannot look at shared memory in another shape: values are reshaped instead."""
    monkeypatch.setattr(gpu_tiles, "write", lambda ref, value: ref.__setitem__(..., value.reshape(ref.shape)))
    monkeypatch.setattr(gpu_tiles, "read", lambda ref: ref[...].reshape(gpu.CHUNK, -1)[:, : 2 * gpu.STATES])
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


TILE = gpu.TILE
CASES = {  # dtype, precision, batch, length, channels, states; complex, both ways; bounds: y and u, other gradients
    "ragged, states in and out": ("float32", "highest", 4, 2 * TILE + 70, 2, 32, True, False, 1.5e-6, 2e-5),
    "the tokens to come, two groups": ("float32", "high", 8, TILE, 2, 5, True, True, 1e-5, 3e-5),
    "bfloat16 and the tokens to come": ("bfloat16", "default", 4, 2 * TILE, 2, 32, True, True, 5e-3, 8e-3),
    "real": ("float32", "default", 4, TILE, 2, 7, False, False, 5e-3, 8e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, rng, monkeypatch, simulated):
    """Against the loop over tokens in float64; two tiles or groups: a state that is lost between them shows."""
    dtype, precision, *sizes, is_complex, both, bound, looser = CASES[case]
    p, bars = convolutions.problem(rng, dtype, *sizes, is_complex, both)
    with simulate(monkeypatch):
        out = convolutions.outputs_and_gradients(p, bars, implementation="gpu", precision=precision)
    convolutions.check(out, p, bars, bound, looser)


def test_what_does_not_fit_is_refused(rng, simulated):
    u, a = jnp.zeros((4, 2048, 3)), jnp.zeros((3, 32), jnp.complex64)
    assert gpu.refusal(u, a, "high") == ""
    for change, message in [
        (dict(u=jnp.zeros((6, 2048, 3))), "the batch is 6, no multiple of 4"),
        (dict(u=jnp.zeros((4, 1023, 3))), "the length is 1023, less than 1024"),
        (dict(u=u.astype(jnp.float16)), "u is float16"),
        (dict(a=jnp.zeros((3, 33), jnp.complex64)), "33 states a channel, more than 32"),
        (dict(precision="float32"), "the precision is 'float32', not one of default, high, highest"),
    ]:
        assert message in gpu.refusal(**(dict(u=u, a=a, precision="high") | change))
    with pytest.raises(ValueError, match="'gpu' cannot run this: the batch is 2"):
        op.long_convolution(u[:2], a, a, a, jnp.zeros(3), implementation="gpu")


def test_it_compiles_for_hopper_without_a_spill():
    """Registers that do not fit would go to memory in every tile."""
    assert spills(COMPILE) == (7, {"0"})
