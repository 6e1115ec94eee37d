"""The kernels for Hopper GPUs: values in the simulator of shared memory and barriers, and what ptxas says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.mamba3 as op
from tests.hopper import run, spills
from tests.oracles import relative

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernel needs jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels_pallas.mamba3 import gpu  # noqa: E402
from kernels_pallas.mamba3.tokens import Tokens  # noqa: E402
from kernels_pallas.ssd import gpu_tiles, gpu_walk  # noqa: E402

COMPILE = """
from functools import partial
from kernels_pallas.mamba3 import gpu_backward, gpu_forward, gpu_walk

batch, length, heads = 8, 4096, 64
like = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=one)
half = partial(like, dtype="bfloat16")
for p, groups, n, rank, planes in [(64, 1, 128, 1, 32), (64, 1, 128, 4, 32), (32, 64, 64, 1, 32)]:
    c, x, B, D = length // 64, half(batch, length, heads, p), half(batch, length, groups, n), like(heads, p)
    gates, h = (like(batch, heads, *shape) for shape in ((c, 4, 64), (n, p)))
    theta, angles = like(batch, length, planes), like(batch, length, heads, planes, dtype="uint16")
    bias = like(heads, 1 if rank == 1 else 64, n)
    arrays, states = (x, gates, B, B, angles, bias, bias), half(batch, heads, c, n, p)
    masks = half(batch, c, 64, 64), half(batch, c, 8, 64)
    if FORWARD:
        compile(partial(gpu_forward.forward, rank=rank), (*arrays, h, D, x))
    else:
        compile(partial(gpu_backward.gradients, rank=rank, splits=1), (*arrays, theta, D, x, states, states, *masks))
    for reverse, keep in [(False, True), (True, True), (True, False)][: 3 * FORWARD * (rank == groups)]:
        compile(partial(gpu_walk.walk, reverse=reverse, keep=keep), (x, gates, B, angles, bias, h))
"""


def simulate(monkeypatch):
    """The kernel in the simulator, whose products take no start: it is added."""

    def accumulate(*terms):
        products = gpu_tiles.products(*(term[1:] for term in terms))
        return tuple(start + product for (start, *_), product in zip(terms, products, strict=True))

    monkeypatch.setattr(gpu_tiles, "accumulate", accumulate)
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def problem(rng, batch, length, rank, heads, p, groups, n, planes, also):
    """Moderate decays, but the first head's go from 1 to e^-300; angles of up to some turns a token."""
    lanes = (batch, length) if rank is None else (batch, length, rank)
    a = -np.exp(rng.uniform(np.log(1e-12), np.log(300), size=(batch, length, heads)))
    a = np.where(rng.random(a.shape) < 0.2, 0, np.where(rng.random(a.shape) < 0.1, -300, a))
    a[..., 1:] = -rng.uniform(0, 0.5, size=a[..., 1:].shape)
    exact = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    rounded = lambda *shape: exact(*shape).astype(jnp.bfloat16)  # noqa: E731
    arrays = dict(v=rounded(*lanes, heads, p), B=rounded(*lanes, groups, n), C=rounded(*lanes, groups, n))
    gates = {f"{name}_blh": rng.uniform(0.1, 1, size=a.shape).astype(np.float32) for name in ("previous", "current")}
    arrays |= dict(log_decay_blh=a.astype(np.float32)) | gates
    state = exact(batch, heads, planes), exact(batch, heads, p, n), exact(batch, rank or 1, heads, n)
    arrays |= dict(initial_state=op.State(*state, exact(batch, rank or 1, heads, p)))
    more = dict(theta_blhs=exact(batch, length, 1, planes), rate_blh=3 * rng.uniform(size=a.shape).astype(np.float32))
    more |= dict(B_bias_hrn=exact(heads, rank or 1, n), C_bias_hrn=exact(heads, rank or 1, n))
    more |= dict(D_h=exact(heads), z=rounded(*lanes, heads, p))
    return arrays | {k: v for k, v in more.items() if planes or k[0] not in "tr"} if also else arrays


def outputs_and_gradients(p, bars, reset, layout, implementation):
    def run(p):
        return op.mamba3(**p, reset=reset, layout=layout, implementation=implementation)

    @jax.jit
    def both(p, bars):
        outputs, pull = jax.vjp(run, p)
        return outputs, pull(bars)[0]

    return both(p, bars)


CASES = {  # batch, length, rank, heads, channels, groups, states, planes; whether all else is given; the layout
    "two heads of a group, a state between chunks": (1, 128, None, 2, 64, 1, 128, 32, True, "pairs"),
    "ragged, padded, two blocks of channels, two lanes": (1, 33, 2, 1, 128, 1, 16, 3, True, "halves"),
    "a group a head, all planes turn": (1, 65, None, 2, 32, 2, 128, 64, True, "pairs"),
    "nothing else is given": (1, 5, None, 2, 32, 1, 15, 0, False, "pairs"),
}


def cotangents(rng, p):
    state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), p["initial_state"])
    return rng.normal(size=p["v"].shape).astype(jnp.bfloat16), state


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, rng, monkeypatch, simulated):
    """Against the loop over tokens in float64."""
    *shape, also, layout = CASES[case]
    p = problem(rng, *shape, also)
    reset, bars = jnp.asarray(rng.random(p["log_decay_blh"].shape[:2]) < 0.03), cotangents(rng, p)
    with simulate(monkeypatch):
        (y, state), grads = outputs_and_gradients(p, bars, reset, layout, "gpu")
        alone = op.mamba3(**jax.tree.map(jnp.asarray, p), reset=reset, layout=layout, implementation="gpu")[0]
    with jax.enable_x64(True):
        ref, expected = wide(outputs_and_gradients(*wide((p, bars)), reset, layout, "reference"))
    assert np.abs(np.sin((wide(state.angle_bhs) - ref[1].angle_bhs) / 2)).max(initial=0) < 2e-6
    for out, value in zip((y, alone, *state[1:]), (ref[0], ref[0], *ref[1][1:]), strict=True):
        assert relative(wide(out), value) < 5e-3
    for (path, out), value in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        sums = "log_decay_blh", "rate_blh", "theta_blhs", "initial_state"  # whose terms cancel
        bound = 1.5e-2 if path[0].key in sums else 8e-3
        assert relative(wide(out), value) < bound, f"gradient of {jax.tree_util.keystr(path)}"
    assert not wide(grads["log_decay_blh"])[p["log_decay_blh"] == -300].any(), "exactly: in float32 nothing crosses"


def test_documents_do_not_see_each_other(rng, monkeypatch, simulated):
    """To the bit, though their angles are summed as one: what is said to angles is cut where they are reset."""
    p = problem(rng, 1, 128, None, 2, 32, 1, 16, 4, True)
    starts = jnp.zeros((1, 128), bool).at[0, jnp.asarray([70, 75])].set(True)
    y_bar, state_bar = cotangents(rng, p)
    y_bar[:, :75] = 0
    with simulate(monkeypatch):
        _, grads = outputs_and_gradients(p, (y_bar, state_bar), starts, "pairs", "gpu")
    for name, g in grads.items():
        if name == "initial_state":
            assert not any(np.asarray(x).any() for x in g)
        elif name not in ("D_h", "B_bias_hrn", "C_bias_hrn"):
            assert not wide(g)[:, :75].any(), name
            assert wide(g)[:, 75:].any(), name


def test_segments_are_the_whole(rng, monkeypatch, simulated):
    """Few heads: the sequence is cut in two, and what enters each segment comes from a walk of its own."""
    monkeypatch.setattr(gpu_walk, "SHORTEST_SEGMENT", 64)
    p = problem(rng, 1, 128, None, 1, 32, 1, 16, 4, True)
    reset, bars = jnp.zeros((1, 128), bool).at[0, 90].set(True), cotangents(rng, p)
    with simulate(monkeypatch):
        cut = outputs_and_gradients(p, bars, reset, "pairs", "gpu")
        monkeypatch.setattr(gpu_walk, "SHORTEST_SEGMENT", 512)
        whole = outputs_and_gradients(p, bars, reset, "pairs", "gpu")
    for value, expected in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        assert relative(*map(wide, (value, expected))) < 3e-3


def test_what_does_not_fit_is_refused(simulated):
    like = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    v, B, theta = like(1, 8, 1, 2, 64), like(1, 8, 1, 1, 128), like(1, 8, 1, 32)
    tokens = Tokens(v, B, B, *[None] * 4, theta, None, None)
    assert gpu.refusal(tokens, v) == ""
    for change, message in [
        (dict(v=like(1, 8, 1, 2, 64, dtype="float32")), "v is float32, and its products are of bfloat16"),
        (dict(v=like(1, 8, 1, 2, 48)), "a head has 48 channels, not one of 32, 64, 128"),
        (dict(B=like(1, 8, 1, 1, 129)), "there are 129 states, more than 128"),
        (dict(v=like(1, 8, 3, 2, 64)), "the rank is 3, not one of 1, 2, 4, 8, 16"),
        (dict(theta=like(1, 8, 2, 32)), "theta differs by head"),
    ]:
        assert message in gpu.refusal(tokens._replace(**change), v)
    assert "z is float32" in gpu.refusal(tokens, like(1, 8, 1, 2, 64, dtype="float32"))


TWO = """
from kernels_pallas import dispatch
from kernels_pallas.mamba3 import mamba3

dispatch.backend_refusal = lambda implementation: ""

def like(*shape, of="bfloat16", split=True):
    return jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, PartitionSpec(*["x"] * split)))

def gradients(*arrays):
    def run(v, a, B, theta, D):
        y, _ = mamba3(v, B, B, -a, a, a, theta, rate_blh=a, D_h=D, z=v, implementation="gpu")
        return y.astype("float32").sum()
    return jax.grad(run, argnums=(0, 1, 2, 3, 4))(*arrays)

arrays = like(4, 128, 2, 64), like(4, 128, 2, of="float32"), like(4, 128, 1, 64)
arrays += like(4, 128, 1, 16, of="float32"), like(2, of="float32", split=False)
hlo = compile(gradients, arrays)
print("collectives", *sorted({name for name in ("all-gather", "all-reduce", "all-to-all") if f" {name}" in hlo}))
"""


def test_two_gpus_exchange_the_gradient_of_D_alone():
    out, _ = run(TWO, devices=2)
    assert "collectives all-reduce\n" in out


def test_the_walks_compile_for_hopper_without_a_spill():
    """Registers that do not fit would go to memory in every chunk."""
    assert spills("FORWARD = True\n" + COMPILE) == (6, {"0"})


def test_the_gradients_compile_for_hopper_with_few_spills():
    """A thread has 240 registers, and the sums over heads take 48 of them: 60 bytes a head go to memory, of some 5000
    instructions."""
    compiled, most = spills("FORWARD = False\n" + COMPILE)
    assert (compiled, max(map(int, most)) <= 64) == (3, True)
