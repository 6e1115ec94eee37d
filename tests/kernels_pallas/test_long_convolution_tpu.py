"""The TPU kernels: values in the simulator of TPU memory, and what the TPU compiler says of them without a TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas.long_convolution as op
from kernels_pallas import dispatch
from kernels_pallas.long_convolution import tpu
from tests import convolutions
from tests.oracles import relative
from tests.tpus import compiles

COMPILE = """
from kernels_pallas.long_convolution import tpu
from kernels_pallas.long_convolution.xla import Tables

full, odd, many = (16, 16, 16384, 32, 2), (3, 8, 640, 64, 2), (8, 64, 1024, 7, 1)
for (d, batch, length, n, p), dtype, precision, first in [
    (full, "bfloat16", "default", True), (full, "float32", "highest", True), (odd, "float32", "high", True),
    (many, "bfloat16", "highest", False),
]:
    x = like((d, batch, length), dtype)
    walk = tpu.Walk.of(x, n, False)
    h, states = like((d, batch, p * n)), like((d // walk.group, walk.grid[2], batch, 128))
    theta, enter, leave = like((d, 128, 128)), like((d, p * n, 128)), like((d, 128, p * n))
    tables = Tables(theta if first else None, enter, leave, (like((d, n)),) * p)
    for function, arrays in ((tpu.sweep, (x, tables, h)), (tpu.gradients, (x, x, tables, states, states))):
        compile(lambda *arrays: function(*arrays, not first, precision), arrays)
"""


@pytest.fixture
def as_on_tpu(monkeypatch, simulated):
    """Calls are taken as on a TPU, by blocks so small that there are several of each kind."""
    monkeypatch.setattr(tpu, "ROWS", 32)
    monkeypatch.setattr(tpu, "CHANNELS", 4)


CASES = {  # dtype, precision, batch, length, channels, states; complex, both ways; bounds: y and u, other gradients
    "ragged, states in and out": ("float32", "highest", 8, 2 * 512 + 70, 4, 32, True, False, 1.5e-6, 2e-5),
    "tokens to come, blocks of sequences": ("float32", "high", 16, 768, 4, 5, True, True, 1e-5, 3e-5),
    "bfloat16 and the tokens to come": ("bfloat16", "default", 16, 512, 3, 33, True, True, 5e-3, 5e-3),
    "bfloat16 against exact tables": ("bfloat16", "highest", 16, 384, 2, 4, True, False, 3e-3, 3e-3),
    "real, blocks of channels": ("float32", "default", 8, 640, 8, 7, False, False, 5e-3, 8e-3),
    "a single chunk": ("float32", "highest", 8, 128, 1, 64, True, False, 1.5e-6, 2e-5),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, rng, as_on_tpu):
    """Against the loop over tokens in float64; several tiles and blocks: a state that is lost between them shows."""
    dtype, precision, *sizes, is_complex, both, bound, looser = CASES[case]
    p, bars = convolutions.problem(rng, dtype, *sizes, is_complex, both)
    with pltpu.force_tpu_interpret_mode():
        out = convolutions.outputs_and_gradients(p, bars, implementation="tpu", precision=precision)
    convolutions.check(out, p, bars, bound, looser)


def test_vmap_over_sequences(rng, as_on_tpu, monkeypatch):
    """Each mapped sequence starts from its own state, though the grid has one axis more.
    By Pallas's plain interpreter: the simulator of TPU memory takes no mapped grid."""
    monkeypatch.setattr(tpu.pl, "pallas_call", partial(tpu.pl.pallas_call, interpret=True))
    p, _ = convolutions.problem(rng, "float32", 16, 256, 2, 4, is_complex=False, both=False)
    p = jax.tree.map(jnp.asarray, p)
    u, state = p.pop("u").reshape(2, 8, 256, 2), p.pop("initial_state").reshape(2, 8, 2, 4)
    run = lambda name: jax.jit(jax.vmap(lambda u, h: op.long_convolution(u, **p, initial_state=h, implementation=name)))  # noqa: E731
    for out, ref in zip(run("tpu")(u, state), run("reference")(u, state), strict=True):
        assert relative(out, ref) < 1e-5


def test_what_does_not_fit_is_refused(monkeypatch):
    u, a = jnp.zeros((8, 128, 3)), jnp.zeros((3, 32), jnp.complex64)
    assert tpu.refusal(u, a, "high") == "" and tpu.refusal(jnp.zeros((16, 128, 3), jnp.bfloat16), a, "default") == ""
    for change, message in [
        (dict(u=jnp.zeros((6, 128, 3))), "the batch is 6, no multiple of 8"),
        (dict(u=u.astype(jnp.bfloat16)), "the batch is 8, no multiple of 16"),
        (dict(u=jnp.zeros((8, 127, 3))), "the length is 127, less than 128"),
        (dict(u=u.astype(jnp.float16)), "u is float16"),
        (dict(a=jnp.zeros((3, 65), jnp.complex64)), "65 states a channel, more than 64"),
        (dict(precision="float32"), "the precision is 'float32', not one of default, high, highest"),
    ]:
        assert message in tpu.refusal(**(dict(u=u, a=a, precision="high") | change))
    with pytest.raises(ValueError, match="'tpu' cannot run this: the backend is"):
        op.long_convolution(u, a, a, a, jnp.zeros(3), implementation="tpu")
    monkeypatch.setattr(dispatch, "backend_refusal", lambda implementation: "")
    with pytest.raises(ValueError, match="'tpu' cannot run this: the batch is 2"):
        op.long_convolution(u[:2], a, a, a, jnp.zeros(3), implementation="tpu")


def test_the_tpu_compiler_takes_them():
    """Blocks that VMEM cannot hold, and operations that Mosaic lacks, fail here."""
    compiles(COMPILE)
