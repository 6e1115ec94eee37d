"""The kernel for Hopper GPUs: values in the simulator of shared memory and barriers, and what ptxas says of it.

The values on a GPU, forward and backward, are in experiments/results/kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.ssd as op
from tests.dualities import expected, outputs_and_gradients, problem, wide
from tests.hopper import run, spills
from tests.oracles import relative

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernel needs jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels_pallas.ssd import gpu, gpu_tiles, gpu_walk  # noqa: E402

COMPILE = """
from functools import partial
from kernels_pallas.ssd import gpu, gpu_backward, gpu_walk

batch, length, heads = 8, 4096, 64
like = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=one)
for p, groups, n, rank in [(64, 1, 128, 1), (64, 1, 128, 4), (32, 64, 64, 1)]:
    x, B, D = like(batch, length, heads, p), like(batch, length, groups, n), like(heads, p, dtype="float32")
    gates, h = (like(batch, heads, *shape, dtype="float32") for shape in ((length // 64, 2, 64), (n, p)))
    states = like(batch, heads, length // 64, n, p)
    compile(lambda *arrays: gpu.forward(*arrays, None, rank=rank), (x, gates, B, B, h, D))
    compile(lambda *arrays: gpu.forward(*arrays, rank=rank), (x, gates, B, B, h, D, x))
    gradients = partial(gpu_backward.gradients, rank=rank, splits=1)
    compile(gradients, (x, gates, B, B, D, x, states, states))
    for reverse, keep in [(False, True), (True, True), (True, False)][: 3 * (rank == groups)]:
        compile(partial(gpu_walk.walk, reverse=reverse, keep=keep), (x, gates, B, h))
"""


def simulate(monkeypatch):
    """The kernel in the simulator, whose products take no start: it is added."""

    def accumulate(*terms):
        products = gpu_tiles.products(*(term[1:] for term in terms))
        return tuple(start + product for (start, *_), product in zip(terms, products, strict=True))

    monkeypatch.setattr(gpu_tiles, "accumulate", accumulate)
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


CASES = {  # batch, length, rank, heads, channels, groups, states; what else is given
    "two heads of a group, a state between chunks": (1, 128, None, 2, 64, 1, 64, "dD"),
    "a ragged length, padded states, two blocks of channels, two lanes": (1, 33, 2, 1, 128, 1, 16, "D"),
    "a group a head, two blocks of states, gated": (1, 65, None, 2, 32, 2, 128, ("d", "z", "each")),
    "two walks, one of padded states, gated": (1, 33, None, 1, 32, 1, 144, ("d", "z", "D")),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, rng, monkeypatch, simulated):
    """Against the loop over tokens in float64."""
    *shape, also = CASES[case]
    p = problem(rng, *shape, also)
    reset = jnp.asarray(rng.random(p["log_decay_blh"].shape[:2]) < 0.03)
    state = rng.normal(size=p["initial_state"].shape).astype(np.float32)
    bars = rng.normal(size=p["x"].shape).astype(jnp.bfloat16), state
    with simulate(monkeypatch):
        out = outputs_and_gradients(p, bars, reset, "gpu")
        alone = op.ssd(**jax.tree.map(jnp.asarray, p), reset=reset, implementation="gpu")[0] if "z" in p else out[0][0]
    ref = expected(p, bars, reset)
    for value, exact in zip((*out[0], alone), (*ref[0], ref[0][0]), strict=True):
        assert relative(wide(value), exact) < 5e-3
    for name, value in out[1].items():
        bound = 1.5e-2 if name == "log_decay_blh" else 5e-3  # the one is of sums whose terms cancel
        assert relative(wide(value), ref[1][name]) < bound, f"gradient of {name}"
    assert not wide(out[1]["log_decay_blh"])[p["log_decay_blh"] == -300].any(), "exactly: in float32 nothing crosses"


def test_what_cancels_in_a_log_decay(rng, monkeypatch, simulated):
    """Tokens that read themselves above all: both warpgroups of the backward pass must round what they read alike."""
    p = problem(rng, 1, 64, None, 2, 32, 1, 16, "")
    p["C"], bars = p["B"], (30 * p["x"], 0 * p["initial_state"])
    with simulate(monkeypatch):
        out = outputs_and_gradients(p, bars, None, "gpu")[1]["log_decay_blh"]
    assert relative(wide(out), expected(p, bars, None)[1]["log_decay_blh"]) < 1.5e-2


def test_segments_are_the_whole(rng, monkeypatch, simulated):
    """Few heads: the sequence is cut in two, and what enters each segment comes from a walk of its own."""
    monkeypatch.setattr(gpu_walk, "SHORTEST_SEGMENT", 64)
    p = problem(rng, 1, 128, None, 1, 32, 1, 16, "d")
    assert gpu_walk.Segments.of(jnp.zeros((1, 128, 1, 32))).count == 2
    bars = rng.normal(size=p["x"].shape).astype(jnp.bfloat16), np.ones_like(p["initial_state"])
    with simulate(monkeypatch):
        cut = outputs_and_gradients(p, bars, None, "gpu")
        monkeypatch.setattr(gpu_walk, "SHORTEST_SEGMENT", 512)
        whole = outputs_and_gradients(p, bars, None, "gpu")
    for value, exact in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        assert relative(wide(value), wide(exact)) < 3e-3


def test_what_does_not_fit_is_refused(simulated):
    x, B = jnp.zeros((1, 8, 2, 64), jnp.bfloat16), jnp.zeros((1, 8, 1, 128), jnp.bfloat16)
    assert gpu.refusal(x, B, B, x) == ""
    lanes = lambda v: jnp.zeros((1, 8, 3, *v.shape[2:]), v.dtype)  # noqa: E731
    for change, message in [
        (dict(x=x.astype(jnp.float32)), "x is float32, and its products are of bfloat16"),
        (dict(z=x.astype(jnp.float32)), "z is float32"),
        (dict(x=x[..., :48]), "a head has 48 channels, not one of 32, 64, 128"),
        (dict(B=jnp.zeros((1, 8, 1, 257), jnp.bfloat16)), "there are 257 states, more than 256"),
        (dict(x=lanes(x), B=lanes(B), C=lanes(B)), "the rank is 3, which does not divide 64"),
    ]:
        assert message in gpu.refusal(**(dict(x=x, B=B, C=B, z=None) | change))
    with pytest.raises(ValueError, match="'gpu' cannot run this: a head has 16 channels"):
        op.ssd(x[..., :16], jnp.zeros((1, 8, 2)), B, B, implementation="gpu")


TWO = """
from kernels_pallas import dispatch
from kernels_pallas.ssd import ssd

dispatch.backend_refusal = lambda implementation: ""

def like(*shape, of="bfloat16", split=True):
    return jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, PartitionSpec(*["x"] * split)))

def gradients(x, a, B, D):
    run = lambda x, a, B, D: ssd(x, a, B, B, dt_blh=a, D_h=D, z=x, implementation="gpu")[0].astype("float32").sum()
    return jax.grad(run, argnums=(0, 1, 2, 3))(x, a, B, D)

arrays = like(4, 128, 2, 64), like(4, 128, 2, of="float32"), like(4, 128, 1, 64), like(2, of="float32", split=False)
hlo = compile(gradients, arrays)
print("collectives", *sorted({name for name in ("all-gather", "all-reduce", "all-to-all") if f" {name}" in hlo}))
"""


def test_two_gpus_exchange_the_gradient_of_D_alone():
    out, _ = run(TWO, devices=2)
    assert "collectives all-reduce\n" in out


def test_it_compiles_for_hopper_without_a_spill():
    """Registers that do not fit would go to memory in every chunk."""
    assert spills(COMPILE) == (12, {"0"})
