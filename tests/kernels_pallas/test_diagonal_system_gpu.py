"""The kernels for Hopper GPUs: values in the simulator of shared memory and barriers, and what ptxas says of them.

The values on a GPU, forward and backward, are in experiments/results/kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.diagonal_system as op
from tests.hopper import spills
from tests.oracles import relative

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernel needs jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels_pallas.diagonal_system import gpu, gpu_tiles  # noqa: E402

COMPILE = """
import jax.numpy as jnp
from kernels_pallas.diagonal_system import gpu

like = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype, sharding=one)
for dtype, precision, d, n in [("bfloat16", "default", 256, 128), ("float32", "high", 256, 128)]:
    batch, length = 16, 16384
    segments = gpu._segments(batch, length)
    x, table, plane = like(batch, length, d, dtype=dtype), like(2 * n, d), like(n)
    arrays = (x, table, (plane, plane), table, like(d), like(batch, 2 * n))
    compile(lambda *arrays: gpu.sweep(*arrays, False, precision), arrays)
    if dtype == "bfloat16":
        states = like(batch * segments, length // segments // gpu.ROWS, n // gpu.STATES, 2 * gpu.STATES)
        arrays = (x, x, table, (plane, plane), table, states, states)
        compile(lambda *arrays: gpu.gradients(*arrays, False), arrays)
"""


def simulate(monkeypatch):
    """The kernel in the simulator, which cannot look at shared memory in another shape: values are reshaped instead."""
    tile = gpu.tile
    monkeypatch.setattr(tile, "write", lambda ref, value: ref.__setitem__(..., value.reshape(ref.shape)))
    monkeypatch.setattr(tile, "read", lambda ref: ref[...].reshape(tile.CHUNK, -1)[:, : 2 * tile.STATES])
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def problem(rng, batch, length, d, n):
    draw = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)  # noqa: E731
    a = draw(n)
    a *= (1 - np.geomspace(0.001, 0.5, n)) / abs(a)
    a[:2] = 0, np.exp(-300)
    return dict(
        u_bld=rng.normal(size=(batch, length, d)), a_n=a, B_nd=draw(n, d), C_dn=draw(d, n), D_d=rng.normal(size=d),
        initial_state_bn=draw(batch, n),
    )  # fmt: skip


def outputs_and_gradients(p, bars, options):
    """Of the call and of its derivative, which of float32 tokens goes another way."""

    def run(p):
        return op.diagonal_system(**p, **options)

    def back(p, bars):
        return jax.vjp(run, p)[1](bars)[0]

    return jax.jit(run)(p), jax.jit(back)(p, bars)


CASES = {  # dtype, precision, batch, length, channels, states, reverse, stages of the ring; bounds, of gradients too
    "two segments, two slabs, one not full": ("bfloat16", "default", 4, 128, 64, 33, False, None, 5e-3, 8e-3),
    "reverse, matrices that do not stay": ("bfloat16", "default", 8, 32, 128, 40, True, 3, 5e-3, 8e-3),
    "two parts, reverse, do not stay": ("float32", "high", 4, 64, 128, 40, True, 4, 1e-5, 4e-5),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients(case, rng, monkeypatch, simulated):
    """Against the loop over tokens in float64; two segments, slabs and tiles: what is lost between them shows."""
    dtype, precision, batch, length, d, n, reverse, stages, bound, looser = CASES[case]
    if stages:
        monkeypatch.setattr(gpu_tiles.Plan, "stages", property(lambda plan: min(stages, plan.matrices)))
    p = problem(rng, batch, length, d, n)
    narrow = lambda x: x.astype(np.complex64 if np.iscomplexobj(x) else np.float32)  # noqa: E731
    p, (dy, d_last) = jax.tree.map(narrow, (p, (rng.normal(size=p["u_bld"].shape), p["initial_state_bn"][::-1])))
    p["u_bld"], dy = (np.asarray(jnp.asarray(x, dtype)) for x in (p["u_bld"], dy))
    with simulate(monkeypatch):
        options = dict(reverse=reverse, precision=precision, implementation="gpu")
        out = outputs_and_gradients(p, (dy, d_last), options)
    with jax.enable_x64(True):
        wide = lambda x: x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)  # noqa: E731
        exact = jax.tree.map(wide, (p, (dy, d_last)))
        ref = outputs_and_gradients(*exact, dict(reverse=reverse, implementation="reference"))
    (y, last), gradients = jax.tree.map(lambda x: wide(np.asarray(x)), out)
    assert relative(y, ref[0][0]) < bound and relative(last, ref[0][1]) < bound
    for name, value in gradients.items():
        assert relative(value, ref[1][name]) < looser, f"gradient of {name}"


def test_what_does_not_fit_is_refused(simulated):
    u, a = jnp.zeros((4, 128, 64)), jnp.zeros(33, jnp.complex64)
    assert gpu.refusal(u, a, "high") == ""
    for change, message in [
        (dict(u=u.astype(jnp.float16)), "u is float16"),
        (dict(u=u.astype(jnp.bfloat16)), "the precision of bfloat16 is 'high', not one of default"),
        (dict(precision="highest"), "the precision of float32 is 'highest', not one of default, high"),
        (dict(u=jnp.zeros((4, 128, 96))), "there are 96 channels, no multiple of 64 up to 256"),
        (dict(a=jnp.zeros(257, jnp.complex64)), "there are 257 states, more than 256"),
        (dict(u=u[:, :72]), "the length is 72, no multiple of 16"),
        (dict(u=u[:3, :48]), "a batch of 3 sequences of length 48 has no cut into a multiple of 8 rows"),
    ]:
        reason = gpu.refusal(**(dict(u=u, a=a, precision="high") | change))
        assert message in reason
    B = jnp.zeros((33, 64), jnp.complex64)
    with pytest.raises(ValueError, match="'gpu' cannot run this: the length is 72"):
        op.diagonal_system(u[:, :72], a, B, B.T, jnp.zeros(64), implementation="gpu")
    with pytest.raises(ValueError, match="'gpu' cannot run this: it takes no reset"):
        op.diagonal_system(u, a, B, B.T, jnp.zeros(64), implementation="gpu", reset=jnp.zeros(u.shape[:2], bool))


def test_auto_takes_what_was_measured(monkeypatch, simulated):
    a = jnp.zeros(128, jnp.complex64)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for devices, batch, length, chosen in [
        (1, 64, 1024, "gpu"),
        (1, 8, 1024, "auto"),
        (1, 64, 1032, "auto"),
        (2, 64, 1024, "auto"),
    ]:
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        u = jnp.zeros((batch, length, 64), jnp.bfloat16)
        assert op._choose("auto", u, a, None, "default") == chosen


def test_segments_keep_every_multiprocessor_busy():
    """Two warpgroups of four rows each, as long as a segment is worth it; and whole tiles."""
    for batch, length, segments in [(16, 16384, 64), (64, 1024, 16), (1, 16384, 256), (600, 1024, 1), (2, 64, 4)]:
        assert gpu._segments(batch, length) == segments


def test_it_compiles_for_hopper_without_a_spill():
    """Registers that do not fit would go to memory in every tile."""
    assert spills(COMPILE) == (3, {"0"})
