"""The TPU kernels: values in the simulator of TPU memory, and what the TPU compiler says of them without a TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas import dispatch
from kernels_pallas.selective_scan import selective_scan, tpu, tpu_backward, tpu_forward, tpu_tiles
from tests.kernels_pallas.test_selective_scan import outputs_and_gradients
from tests.oracles import relative
from tests.tpus import compiles

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("tested with the accelerators' jax", allow_module_level=True)

COMPILE = """
from kernels_pallas.selective_scan import tpu, tpu_backward, tpu_forward

def given(batch, length, d, n, dtype, gated, forgets):
    tokens, states = like((batch, length, d), dtype), like((batch, length, n))
    given = dict(x=tokens, dt=tokens, A=like((d, n)), B=states, C=states, D=like((d,)), dt_bias=like((d,)))
    return given | (dict(z=tokens) if gated else {}) | (dict(forget=like((batch, length))) if forgets else {})

benchmark, largest = (8, 4096, 2048, 16, "bfloat16", True, False), (8, 4096, 2048, 64, "float32", True, True)
for shape in (benchmark, largest) if name.startswith("v4") else (benchmark,):
    arrays = given(*shape)
    inputs = jax.eval_shape(lambda given: tpu.in_tiles(given, True), arrays)
    h = jax.eval_shape(tpu.in_registers, like((shape[0], shape[2], shape[3])))
    inputs, h = jax.tree.map(lambda x: like(x.shape, x.dtype), (inputs, h))
    saved = like((shape[0], shape[1] // tpu.TILE, *h.shape[1:]))
    compile(lambda *a: tpu_forward.forward(*a, True, True), (inputs, h))
    compile(lambda *a: tpu_backward.backward(*a, True), (inputs, saved, inputs.x, h))
"""


@pytest.fixture
def small(monkeypatch, simulated):
    """Slices of 2 states, tiles of 16 tokens in chunks of 8: several of each, and little to compile."""
    sizes = dict(STATES=2, TILE=16, CHUNK=8, AT_ONCE=2)
    for module in (tpu, tpu_forward, tpu_backward, tpu_tiles):
        for name, value in sizes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def problem(rng, batch, length, d, n, gated):
    """Decays from 1 to e^-300."""
    draw, two = rng.normal, (batch, length)
    A = -np.exp(draw(size=(d, n)))
    A[0, 0] = 0
    dt = draw(size=(*two, d)) - 1
    dt[0, length // 2, 1] = -300 / A[1].min()
    p = dict(x_bld=draw(size=(*two, d)), dt_bld=dt, A_dn=A, B_bln=draw(size=(*two, n)), C_bln=draw(size=(*two, n)))
    p |= dict(D_d=draw(size=d), dt_bias_d=draw(size=d), initial_state_bdn=draw(size=(batch, d, n)))
    return p | (dict(z_bld=draw(size=(*two, d))) if gated else {})


CASES = {  # dtype, batch, length, channels, states, softplus, gated, resets; bounds of outputs and of gradients
    "two slices of states, a ragged length": ("float32", 1, 33, 5, 3, True, True, True, 1e-6, 1e-6),
    "two groups of channels in bfloat16": ("bfloat16", 1, 16, 1100, 2, False, True, False, 4e-3, 4e-3),
    "one token, two rows": ("float32", 2, 1, 3, 1, True, False, True, 1e-6, 1e-6),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, rng, small):
    """Against the loop over tokens in float64."""
    dtype, batch, length, d, n, softplus, gated, resets, bound, of_gradients = CASES[case]
    p, always = problem(rng, batch, length, d, n, gated), ("A_dn", "D_d", "dt_bias_d", "initial_state_bdn")
    if not softplus:
        p |= {name: abs(p[name]) for name in ("dt_bld", "dt_bias_d")}
    p = {name: jnp.asarray(v, jnp.float32 if name in always else dtype) for name, v in p.items()}
    shapes = p["x_bld"].shape, (batch, d, n)
    bars = [np.asarray(jnp.asarray(rng.normal(size=s), dtype), np.float64) for s in shapes]
    options = dict(softplus=softplus, reset=jnp.asarray(rng.random((batch, length)) < 0.1) if resets else None)
    with pltpu.force_tpu_interpret_mode():
        out = jax.block_until_ready(outputs_and_gradients(p, bars, **options, implementation="tpu"))
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(v.astype(jnp.float32)), jnp.float64) for name, v in p.items()}
        ref = outputs_and_gradients(wide, bars, **options, implementation="reference")
    assert out[0][0].dtype == dtype
    for (path, x), y in zip(jax.tree.leaves_with_path(out), jax.tree.leaves(ref), strict=True):
        name = jax.tree_util.keystr(path)
        assert relative(x.astype(jnp.float32), y) < (bound if name.startswith("[0]") else of_gradients), name


def test_vmap(rng, monkeypatch, small):
    """The first tile of each mapped call starts from its own state, though the grid has one axis more.
    By Pallas's plain interpreter: the simulator of TPU memory takes no mapped grid."""
    monkeypatch.setattr(tpu_tiles.pl, "pallas_call", partial(tpu_tiles.pl.pallas_call, interpret=True))
    p = {name: jnp.asarray(v, jnp.float32) for name, v in problem(rng, 2, 24, 3, 2, False).items()}
    shared = ("A_dn", "D_d", "dt_bias_d")
    mapped = {name: None if name in shared else 0 for name in p}
    each = {name: v if name in shared else v[:, None] for name, v in p.items()}
    run = lambda p, name: selective_scan(**p, softplus=True, implementation=name)  # noqa: E731
    out = jax.jit(jax.vmap(lambda p: run(p, "tpu"), (mapped,)))(each)
    for x, y in zip(out, run(p, "reference"), strict=True):
        assert relative(x[:, 0], y) < 1e-6


def test_devices_share_the_batch(monkeypatch):
    """Kernels are replaced by what says on how much they run: two of four rows of a batch that two devices hold."""
    seen = []

    def forward(inputs, h, softplus, save):
        seen.append(inputs.x.shape)
        states = jnp.zeros((len(h), inputs.x.shape[1] // tpu.TILE, *h.shape[1:]))
        return [inputs.x, h, states][: 2 + save]

    def backward(inputs, saved, dy, d_last, softplus):
        seen.append(saved.shape)
        batch, groups, slices, states = d_last.shape[:4]
        sums = jnp.ones((batch, groups, saved.shape[1], slices, 4, 8, 2 * states))
        parts = jnp.ones((batch, groups, tpu_backward.PARTS, tpu.LANES))
        out = dict.fromkeys(("x", "dt", "z"), dy) | dict.fromkeys(("A", "h"), jnp.ones(d_last.shape))
        return out | dict.fromkeys("BC", sums) | dict.fromkeys(("D", "dt_bias"), parts)

    for name, function in dict(forward=forward, backward=backward).items():
        monkeypatch.setattr(tpu, name, function)
    monkeypatch.setattr(dispatch, "backend_refusal", lambda implementation: "")
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    x = jax.device_put(jnp.ones((4, 70, 6)), NamedSharding(mesh, PartitionSpec("data")))

    def total(x, A):
        out = selective_scan(x, x, A, x[..., :5], x[..., :5], z_bld=x, softplus=True, implementation="tpu")
        return sum(map(jnp.sum, out))

    dx, dA = jax.jit(jax.grad(total, (0, 1)))(x, -jnp.ones((6, 5)))
    assert seen[-2:] == [(2, 128, 1024), (2, 2, 1, 1, 5, 8, 128)]
    assert dx.sharding.spec[0] == "data"
    np.testing.assert_array_equal(dA, 4)  # one for every row, of both devices


def test_what_does_not_fit_is_refused(simulated):
    x, A = jnp.zeros((1, 16, 8)), jnp.zeros((8, 4))
    assert tpu.refusal(x, x.astype(jnp.bfloat16), A, None) == ""
    assert tpu.refusal(x, x, jnp.zeros((8, 65)), None) == "there are 65 states; it takes at most 64"
    with pytest.raises(ValueError, match="'tpu' cannot run this: x is float16"):
        selective_scan(x.astype(jnp.float16), x, A, x[..., :4], x[..., :4], implementation="tpu")


def test_the_tpu_compiler_takes_them():
    """Blocks that VMEM cannot hold, and operations that Mosaic lacks, fail here; v4 has the least VMEM."""
    compiles(COMPILE)
