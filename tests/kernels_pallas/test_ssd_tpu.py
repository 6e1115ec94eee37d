"""The TPU kernels: values in the simulator of TPU memory, and what the TPU compiler says of them without a TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kernels_pallas.ssd as op
from kernels_pallas.ssd import tpu, tpu_walk
from tests.dualities import expected, outputs_and_gradients, problem, wide
from tests.oracles import relative
from tests.tpus import compiles

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("tested with the accelerators' jax", allow_module_level=True)

COMPILE = """
from kernels_pallas.ssd import tpu, tpu_backward
from kernels_pallas.ssd.tpu_walk import Walk

batch, length, heads, p, n = 8, 4096, 64, 64, 128
x, B = like((batch, length, heads, p), "bfloat16"), like((batch, length, 1, n), "bfloat16")
assert not tpu.refusal(x, B, B, x)
for z in (None, x)[: 1 + name.startswith("v4")]:  # where VMEM is smallest, with more to fetch too
    walk, gated = Walk.of(x, B, z, 1), () if z is None else (z,)
    _, blocks, spans = walk.grid
    gates, D = like((batch, blocks, length // 128, 3 * walk.heads, 128)), like((heads, p))
    h, states = like((batch, n, heads, p)), like((batch, spans, n, heads * p), "bfloat16")
    compile(lambda *arrays: tpu.forward(*arrays, rank=1, keep=True), (x, gates, B, B, D, h, *gated))
    compile(lambda *arrays: tpu_backward.gradients(*arrays, rank=1), (x, gates, B, B, D, x, states, h, *gated))
"""


def in_float32(p: dict) -> dict:
    return {k: v.astype(np.float32) for k, v in p.items()}


def cotangents(rng, p: dict, dtype) -> tuple:
    return tuple(rng.normal(size=p[k].shape).astype(of) for k, of in (("x", dtype), ("initial_state", np.float32)))


CASES = {  # batch, length, rank, heads, channels, groups, states; what else is given
    "spans of two chunks, two blocks of a group, gated": (1, 400, None, 8, 32, 1, 32, ("d", "D", "z")),
    "a ragged length, two lanes, groups of three heads": (1, 63, 2, 6, 64, 2, 16, ("d", "each")),
    "a token, a head a tile, two tiles at once, many states": (1, 1, None, 2, 128, 1, 144, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, rng, monkeypatch, simulated):
    """Against the loop over tokens in float64."""
    *shape, also = CASES[case]
    monkeypatch.setattr(tpu_walk, "SPAN", 2)
    monkeypatch.setattr(tpu_walk, "WIDTH", 256 if "at once" in case else 128)
    p = problem(rng, *shape, also)
    reset = jnp.asarray(rng.random(p["log_decay_blh"].shape[:2]) < 0.03).at[:, 0].set(False)
    bars = cotangents(rng, p, jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode():
        out = jax.block_until_ready(outputs_and_gradients(p, bars, reset, "tpu"))
    ref = expected(p, bars, reset)
    assert out[0][0].dtype == jnp.bfloat16 and out[0][1].dtype == jnp.float32
    for value, exact in zip(out[0], ref[0], strict=True):
        assert relative(wide(value), exact) < 4e-3
    for name, value in out[1].items():
        assert relative(wide(value), ref[1][name]) < 5e-3, f"gradient of {name}"
    assert not wide(out[1]["log_decay_blh"])[p["log_decay_blh"] == -300].any(), "exactly: in float32 nothing crosses"


def test_float32_stays_so(rng, simulated):
    """Sums of log2 decays over a chunk come near 100: their differences are known to 8e-6."""
    p = problem(rng, 1, 129, None, 2, 64, 1, 16, ("d", "D"))
    p["log_decay_blh"] = np.maximum(p["log_decay_blh"], -0.5)
    p, bars = in_float32(p), cotangents(rng, p, np.float32)
    with pltpu.force_tpu_interpret_mode():
        out = jax.block_until_ready(outputs_and_gradients(p, bars, None, "tpu"))
    for value, exact in zip(*map(jax.tree.leaves, (out, expected(p, bars, None))), strict=True):
        assert relative(wide(value), exact) < 1e-5


def test_what_cancels_in_a_log_decay(rng, simulated):
    """Tokens that read themselves above all: what they read and what is read of them must be rounded alike."""
    p = problem(rng, 1, 64, None, 2, 64, 1, 16, "d")
    p["C"], bars = p["B"], (30 * p["x"], 0 * p["initial_state"])
    with pltpu.force_tpu_interpret_mode():
        out = outputs_and_gradients(p, bars, None, "tpu")[1]["log_decay_blh"]
    assert relative(wide(out), expected(p, bars, None)[1]["log_decay_blh"]) < 1.5e-2


def test_vmap_and_two_devices(rng, monkeypatch, simulated):
    """By Pallas's plain interpreter: the simulator of TPU memory takes no mapped grid."""
    monkeypatch.setattr(tpu_walk.pl, "pallas_call", partial(tpu_walk.pl.pallas_call, interpret=True))
    p = in_float32(problem(rng, 2, 8, None, 1, 128, 1, 16, "d"))
    bars = cotangents(rng, p, np.float32)
    one = lambda p, bars: outputs_and_gradients(p, bars, None, "tpu")  # noqa: E731
    mapped = jax.vmap(one)(*jax.tree.map(lambda v: v[:, None], (p, bars)))
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    cut = one(*jax.device_put((p, bars), NamedSharding(mesh, PartitionSpec("data"))))
    for found in (jax.tree.map(lambda v: v[:, 0], mapped), cut):
        for value, exact in zip(*map(jax.tree.leaves, (found, expected(p, bars, None))), strict=True):
            assert relative(wide(value), exact) < 1e-4


def test_what_does_not_fit_is_refused(simulated):
    x, B = jnp.zeros((1, 8, 2, 64), jnp.bfloat16), jnp.zeros((1, 8, 1, 256), jnp.bfloat16)
    assert tpu.refusal(x, B, B, x) == "" and tpu.refusal(*(v.astype(jnp.float32) for v in (x, B, B, x))) == ""
    lanes = lambda v: jnp.zeros((1, 8, 3, *v.shape[2:]), v.dtype)  # noqa: E731
    for change, message in [
        (dict(x=x.astype(jnp.float16)), "x is float16; it takes float32 and bfloat16"),
        (dict(z=x.astype(jnp.float32)), "z is float32 and x is bfloat16"),
        (dict(x=x[..., :48]), "a head has 48 channels, not one of 32, 64, 128"),
        (dict(x=x[:, :, :1]), "there are 1 heads, no multiple of 2, whose channels fill 128 lanes"),
        (dict(B=jnp.zeros((1, 8, 1, 257), jnp.bfloat16)), "there are 257 states, more than 256"),
        (dict(x=lanes(x), B=lanes(B), C=lanes(B)), "the rank is 3, which does not divide a head's 64 channels"),
    ]:
        assert message in tpu.refusal(**(dict(x=x, B=B, C=B, z=None) | change))
    with pytest.raises(ValueError, match="'tpu' cannot run this: a head has 16 channels"):
        op.ssd(x[..., :16], jnp.zeros((1, 8, 2)), B, B, implementation="tpu")


def test_the_tpu_compiler_takes_them():
    """Blocks that VMEM cannot hold, and operations that Mosaic lacks, fail here."""
    compiles(COMPILE)
