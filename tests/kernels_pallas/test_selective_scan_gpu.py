"""The kernels for Hopper GPUs: values in the simulator of shared memory and barriers, and what ptxas says of them.

The values on a GPU, forward and backward, are in experiments/results/kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas import dispatch
from kernels_pallas.selective_scan import selective_scan
from tests.hopper import spills
from tests.kernels_pallas.test_selective_scan import outputs_and_gradients
from tests.oracles import relative

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernels need jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels_pallas.selective_scan import gpu, gpu_forward, gpu_tiles  # noqa: E402

COMPILE = """
from kernels_pallas.selective_scan import gpu_backward, gpu_forward

like = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=one)
for batch, length, d, n, dtype, gated, forgets in [
    (8, 4096, 2048, 16, "bfloat16", True, False), (1, 4096, 2048, 16, "bfloat16", False, True),
    (8, 4096, 2048, 32, "bfloat16", True, True), (8, 4096, 2048, 16, "float32", True, True),
]:
    x, by_states, channels = like(batch, length, d, dtype=dtype), like(batch, length, n), like(d)
    z, forget = x if gated else None, like(batch, length) if forgets else None
    inputs = gpu_forward.Inputs(x, x, like(d, n), by_states, by_states, channels, channels, z, forget)
    h = like(batch, inputs.plan().segments, d, n)
    compile(lambda *a: gpu_forward.forward(*a, True, True), (inputs, h))
    compile(lambda *a: gpu_backward.backward(*a, True), (inputs, like(batch, length // 64, d, n), x, h))
    if batch == 1:
        compile(lambda inputs: gpu_forward.summaries(inputs, None, True), (inputs,))
        compile(lambda *a: gpu_forward.summaries(*a, False), (inputs, x))
"""


def simulate(monkeypatch):
    """Segments of a length that the simulator has the time for."""
    monkeypatch.setattr(gpu_tiles, "SHORTEST_SEGMENT", 33)
    monkeypatch.setattr(gpu_forward, "AT_ONCE", 2)
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def problem(rng, length, d, n, gated):
    """Decays from 1 to e^-300."""
    draw, two = rng.normal, (1, length)
    A = -np.exp(draw(size=(d, n)))
    A[0, 0] = 0
    dt = draw(size=(*two, d)) - 1
    dt[0, length // 2, 1] = -300 / A[1].min()
    p = dict(x_bld=draw(size=(*two, d)), dt_bld=dt, A_dn=A, B_bln=draw(size=(*two, n)), C_bln=draw(size=(*two, n)))
    p |= dict(D_d=draw(size=d), dt_bias_d=draw(size=d), initial_state_bdn=draw(size=(1, d, n)))
    return p | (dict(z_bld=draw(size=(*two, d))) if gated else {})


CASES = {  # dtype, length, channels, states, softplus, gated, resets; bound of y and the state, of B and C, of others
    "a ragged length in two segments": ("float32", 100, 5, 5, True, True, True, 1e-6, 2e-5, 2e-6),
    "bfloat16 in one": ("bfloat16", 64, 40, 32, False, True, False, 4e-3, 8e-3, 8e-3),
    "more states than a kernel takes": ("float32", 20, 3, 33, False, False, True, 1e-6, 2e-5, 2e-6),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, rng, monkeypatch, simulated):
    """Against the loop over tokens in float64; two segments: a state that is lost between them shows."""
    dtype, length, d, n, softplus, gated, resets, bound, looser, others = CASES[case]
    p, always = problem(rng, length, d, n, gated), ("A_dn", "D_d", "dt_bias_d", "initial_state_bdn")
    if not softplus:
        p |= {name: abs(p[name]) for name in ("dt_bld", "dt_bias_d")}
    p = {name: jnp.asarray(v, jnp.float32 if name in always else dtype) for name, v in p.items()}
    bars = [np.asarray(jnp.asarray(rng.normal(size=s), dtype), np.float64) for s in (p["x_bld"].shape, (1, d, n))]
    options = dict(softplus=softplus, reset=jnp.asarray(rng.random((1, length)) < 0.05) if resets else None)
    with simulate(monkeypatch):
        out = outputs_and_gradients(p, bars, **options, implementation="gpu")
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(v.astype(jnp.float32)), jnp.float64) for name, v in p.items()}
        ref = outputs_and_gradients(wide, bars, **options, implementation="reference")
    assert out[0][0].dtype == dtype
    for (path, x), y in zip(jax.tree.leaves_with_path(out), jax.tree.leaves(ref), strict=True):
        name = jax.tree_util.keystr(path)
        limit = bound if name.startswith("[0]") else looser if "B_bln" in name or "C_bln" in name else others
        assert relative(x.astype(jnp.float32), y) < limit, name


def test_the_sequence_is_cut_where_warpgroups_are_few():
    """Never into pieces that are shorter than they are worth, always into whole tiles of whole blocks of channels."""
    plan = gpu_tiles.Plan.of
    assert plan(8, 4096, 2048, 16)[1:5] == (1, 32, 64, 64)
    assert plan(1, 65536, 2048, 16)[1:5] == (16, 32, 64, 64)
    assert plan(1, 1024, 64, 32)[1:5] == (2, 2, 8, 32)
    for length in (1000, 1023, 1024, 4095, 5000):
        tokens, channels = gpu_tiles.multiples(1, length, 100, 16)
        whole = plan(1, length + -length % tokens, 100 + -100 % channels, 16)
        assert whole.segments * whole.steps * gpu_tiles.TILE == length + -length % tokens


def test_devices_share_the_batch(monkeypatch):
    """Kernels are replaced by what says on how much they run: two of four rows of a batch that two devices hold."""
    seen = []

    def forward(inputs, h, softplus, save):
        seen.append(inputs.x.shape)
        return [inputs.x, h, jnp.zeros((len(h), 2, *h.shape[2:]))]

    def backward(inputs, saved, dy, g, softplus):
        seen.append(saved.shape)
        parts = dict(
            x=dy, dt=dy, z=dy, B=inputs.B[:, None], C=inputs.C[:, None], A=g, h=g, D=g[..., 0], dt_bias=g[..., 0]
        )
        return {name: jnp.ones_like(value) for name, value in parts.items()}

    for name, function in dict(forward=forward, backward=backward).items():
        monkeypatch.setattr(gpu, name, function)
    monkeypatch.setattr(dispatch, "backend_refusal", lambda implementation: "")
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    x = jax.device_put(jnp.ones((4, 70, 6)), NamedSharding(mesh, PartitionSpec("data")))

    def total(x, A):
        out = selective_scan(x, x, A, x[..., :5], x[..., :5], z_bld=x, softplus=True, implementation="gpu")
        return sum(map(jnp.sum, out))

    dx, dA = jax.jit(jax.grad(total, (0, 1)))(x, -jnp.ones((6, 5)))
    assert seen[-2:] == [(2, 128, 64), (2, 2, 64, 16)]
    assert dx.sharding.spec[0] == "data"
    np.testing.assert_array_equal(dA, 4)  # one for every row, of both devices


def test_what_does_not_fit_is_refused(simulated):
    x, A = jnp.zeros((1, 16, 8)), jnp.zeros((8, 4))
    assert gpu.refusal(x, x.astype(jnp.bfloat16), A, None) == ""
    assert "z is float16" in gpu.refusal(x, x, A, x.astype(jnp.float16))
    with pytest.raises(ValueError, match="'gpu' cannot run this: x is float16"):
        selective_scan(x.astype(jnp.float16), x, A, x[..., :4], x[..., :4], implementation="gpu")


def test_it_compiles_for_hopper_without_a_spill():
    """Registers that do not fit would go to memory with every token."""
    assert spills(COMPILE) == (10, {"0"})
