"""One token of the selective recurrence against a loop in float64; each kernel in a simulator and by its compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.selective_scan import selective_scan, selective_scan_step
from tests.hopper import run, spills
from tests.oracles import assert_close
from tests.steps import HOPPER, TPU, outputs_and_gradients, simulator
from tests.tpus import compiles

if jax.__version_info__ >= (0, 11, 2):
    from kernels_pallas.selective_scan import step_gpu, step_tpu

needs_kernels = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax 0.11.2")
NARROW = ("x_bd", "dt_bd", "B_bn", "C_bn", "z_bd")


def problem(rng, batch, d, n, also="Dz_"):
    """Decays from 1 to e^-300 or so; dt after softplus where it has a bias."""
    A = -np.exp(rng.normal(size=(d, n)))
    A[:, 0], A[:, 1] = 0, -400
    p = dict(x_bd=rng.normal(size=(batch, d)), dt_bd=rng.uniform(0.1, 1, size=(batch, d)), A_dn=A)
    p |= dict(B_bn=rng.normal(size=(batch, n)), C_bn=rng.normal(size=(batch, n)), D_d=None)
    p |= dict(state_bdn=rng.normal(size=(batch, d, n)))
    more = dict(D_d=rng.normal(size=d), z_bd=rng.normal(size=(batch, d)), dt_bias_d=rng.normal(size=d))
    return p | {k: v for k, v in more.items() if k[0] in also or k == "dt_bias_d" and "_" in also}


def loop(x_bd, dt_bd, A_dn, B_bn, C_bn, D_d, state_bdn, z_bd=None, dt_bias_d=None):
    """(y, state), number after number."""
    h, y = np.zeros(state_bdn.shape), np.zeros(x_bd.shape)
    for b, d in np.ndindex(x_bd.shape):
        dt = dt_bd[b, d] if dt_bias_d is None else np.log1p(np.exp(dt_bd[b, d] + dt_bias_d[d]))
        h[b, d] = np.exp(dt * A_dn[d]) * state_bdn[b, d] + dt * x_bd[b, d] * B_bn[b]
        y[b, d] = h[b, d] @ C_bn[b] + (0 if D_d is None else D_d[d] * x_bd[b, d])
        y[b, d] *= 1 if z_bd is None else z_bd[b, d] / (1 + np.exp(-z_bd[b, d]))
    return y, h


def as_arrays(p, dtype, narrow=None):
    return {k: None if v is None else jnp.asarray(v, narrow if narrow and k in NARROW else dtype) for k, v in p.items()}


def by(implementation, p):
    return partial(selective_scan_step, softplus="dt_bias_d" in p, implementation=implementation)


@pytest.mark.parametrize("also", ["", "Dz_"])
def test_values_and_gradients(also, rng, x64):
    p = problem(rng, 3, 5, 4, also)
    expected = loop(**p)
    bars = tuple(rng.normal(size=v.shape) for v in expected)
    definition, gradients = outputs_and_gradients(by("reference", p), as_arrays(p, jnp.float64), bars)
    for dtype in (jnp.float64, jnp.float32):
        outputs, found = outputs_and_gradients(by("xla", p), as_arrays(p, dtype), bars)
        for out, same, ref in zip(outputs, definition, expected, strict=True):
            assert out.dtype == dtype
            assert_close(same, ref)
            assert_close(out, ref, scale=4)
        for name, value in found.items():
            if value is not None:
                assert_close(value, gradients[name], scale=4, gradient=True, label=f"gradient of {name}")


@needs_kernels
@pytest.mark.parametrize(
    ("implementation", "shape", "also", "narrow"),
    [
        ("gpu", (2, 256, 16), "Dz_", jnp.bfloat16),
        ("gpu", (3, 32, 64), "", jnp.float32),
        ("gpu", (1, 96, 48), "D", jnp.float32),
        ("tpu", (16, 256, 16), "Dz_", jnp.bfloat16),
        ("tpu", (8, 128, 8), "", jnp.float32),
    ],
)
def test_kernels(implementation, shape, also, narrow, rng, simulated, monkeypatch):
    """Two batch rows together where they are even, on a GPU; two blocks of channels and of rows, on a TPU."""
    monkeypatch.setattr(step_gpu, "BUSY", 1)
    monkeypatch.setattr(step_tpu, "BLOCK_BYTES", 2**16)
    p = as_arrays(problem(rng, *shape, also), jnp.float32, narrow)
    with simulator(implementation):
        y, h = by(implementation, p)(**p)
    assert (y.dtype, h.dtype) == (narrow, jnp.float32)
    wide = {k: None if v is None else np.asarray(v, np.float64) for k, v in p.items()}
    for out, ref in zip((y, h), loop(**wide), strict=True):
        assert_close(out, ref, scale=shape[2])


@needs_kernels
def test_gradients_and_vmap_of_a_kernel(rng, simulated):
    """Mapped are rows of the batch, and the parameter D, of which a kernel has one."""
    p = as_arrays(problem(rng, 2, 32, 16), jnp.float32)
    bars = rng.normal(size=p["x_bd"].shape), rng.normal(size=p["state_bdn"].shape)
    parameters = ("A_dn", "D_d", "dt_bias_d")
    rows = {k: v if k in parameters else v[:, None] for k, v in p.items()}
    every_D = {k: jnp.stack([v, 2 * v]) if k == "D_d" else v for k, v in p.items()}
    step = lambda p: by("gpu", p)(**p)  # noqa: E731
    with simulator("gpu"):
        values, found = outputs_and_gradients(by("gpu", p), p, bars)
        by_row = jax.vmap(step, in_axes=({k: None if k in parameters else 0 for k in p},))(rows)
        by_D = jax.vmap(step, in_axes=({k: 0 if k == "D_d" else None for k in p},))(every_D)
    plain, expected = outputs_and_gradients(by("xla", p), p, bars)
    doubled = by("xla", p)(**p | dict(D_d=2 * p["D_d"]))
    for name, value in expected.items():
        assert_close(found[name], value, label=f"gradient of {name}")
    for value, row, of_D, ref, twice in zip(values, by_row, by_D, plain, doubled, strict=True):
        assert_close(value, ref, scale=16)
        assert_close(row[:, 0], ref, scale=16)
        assert_close(of_D, jnp.stack([ref, twice]))


def test_one_token_is_a_sequence_of_one(rng):
    p = as_arrays(problem(rng, 2, 5, 4), jnp.float32)
    names = dict(x_bd="x_bld", dt_bd="dt_bld", B_bn="B_bln", C_bn="C_bln", z_bd="z_bld")
    tokens = {names.get(k, k): v[:, None] if k in names else v for k, v in p.items() if k != "state_bdn"}
    expected, last = selective_scan(**tokens, initial_state_bdn=p["state_bdn"], softplus=True)
    y, h = by("auto", p)(**p)
    assert_close(y, expected[:, 0])
    assert_close(h, last)


def test_wrong_input_is_named(rng, untyped):
    p = as_arrays(problem(rng, 2, 5, 4), jnp.float32)
    for change, message in [
        (dict(x_bd=p["x_bd"][0]), r"x_bd must be \(batch, channels\), none of them 0; it is \(5,\)"),
        (dict(A_dn=p["A_dn"][:4]), r"A_dn has shape \(4, 4\); x_bd \(2, 5\) needs \(5, states\)"),
        (dict(C_bn=p["C_bn"][:, :2]), r"C_bn has shape \(2, 2\).*need \(2, 4\)"),
        (dict(state_bdn=p["state_bdn"][:1]), r"state_bdn has shape \(1, 5, 4\).*need \(2, 5, 4\)"),
        (dict(z_bd=p["D_d"]), r"z_bd has shape \(5,\).*need \(2, 5\)"),
        (dict(implementation="cuda"), "implementation is 'cuda'; it may be auto, reference, xla, gpu, tpu"),
        (dict(implementation="gpu"), "implementation 'gpu' cannot run this: the backend is cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            selective_scan_step(**(p | change))


@needs_kernels
def test_what_a_gpu_kernel_does_not_take():
    given = {name: jnp.zeros(()) for name in ("x", "dt", "B", "C")} | dict(D=None, z=None, dt_bias=None)
    given |= dict(A=jnp.zeros((64, 16)), h=jnp.zeros((1, 64, 16)))
    assert not step_gpu.refusal(**given)
    for change, message in [
        (dict(z=jnp.zeros((), jnp.float16)), "z is float16; it takes float32 and bfloat16"),
        (dict(A=jnp.zeros((64, 16), jnp.bfloat16)), "A is bfloat16; it takes float32"),
        (dict(h=jnp.zeros((1, 64, 8))), "there are 8 states, no multiple of 16"),
        (dict(h=jnp.zeros((1, 48, 16))), "there are 48 channels, no multiple of 32"),
        (
            dict(h=jax.ShapeDtypeStruct((2**16, 32, 16), "float32")),
            "there are 33554432 numbers in 65536 states, more than are counted here",
        ),
    ]:
        assert step_gpu.refusal(**given | change) == message


@needs_kernels
def test_what_a_tpu_kernel_does_not_take():
    given = {name: None for name in ("x", "dt", "B", "C", "D", "z", "dt_bias")}
    assert not step_tpu.refusal(**given, A=jnp.zeros((128, 16)), h=jnp.zeros((8, 128, 16)))
    for A, h, message in [
        (jnp.zeros((), jnp.bfloat16), (8, 128, 16), "A is bfloat16; it takes float32"),
        (jnp.zeros(()), (8, 128, 12), "there are 12 states, no multiple of 8"),
        (jnp.zeros(()), (8, 64, 16), "there are 64 channels, no multiple of 128"),
        (jnp.zeros(()), (1, 128, 16), "the batch is 1, no multiple of 8"),
    ]:
        assert step_tpu.refusal(**given, A=A, h=jnp.zeros(h)) == message


COMPILE = """
from kernels_pallas.selective_scan import selective_scan_step

def check(batch, d, n, dtype, gated, implementation="gpu"):
    given = dict(x_bd=like(batch, d, of=dtype), dt_bd=like(batch, d), A_dn=like(d, n, split=False))
    given |= dict(B_bn=like(batch, n), C_bn=like(batch, n), D_d=like(d, split=False))
    more = dict(z_bd=like(batch, d, of=dtype), dt_bias_d=like(d, split=False))
    step = lambda h, p: selective_scan_step(**p, state_bdn=h, softplus=gated, implementation=implementation)
    in_place(step, like(batch, d, n), given | (more if gated else {}))
"""
ONE = """
for shape in [(128, 4096, 16, "bfloat16", True), (1, 4096, 16, "bfloat16", True), (128, 2048, 64, "float32", False)]:
    check(*shape)
"""
TWO = """
check(4, 64, 16, "bfloat16", True)
"""


@needs_kernels
def test_it_compiles_for_hopper_in_place_and_without_a_spill():
    assert spills(HOPPER + COMPILE + ONE) == (3, {"0"})


SLICED = """
def step(h, xz, dt, A, B):
    x, z = jax.numpy.split(xz, 2, -1)
    return selective_scan_step(x, dt, A, B, B, None, h, z_bd=z, implementation="gpu")

hlo = compile(step, (like(1, 64, 16), like(1, 128), like(1, 64), like(64, 16), like(1, 16)))
print("fused" if "dynamic-slice" in hlo else "apart")
"""


@needs_kernels
def test_slices_stay_out_of_the_call():
    """At batch 1 x and z are slices of memory as it lies, which XLA would make a part of the call."""
    out, _ = run(HOPPER + COMPILE + SLICED)
    assert "apart\n" in out


@needs_kernels
def test_two_gpus_take_their_own_rows():
    out, _ = run(HOPPER + COMPILE + TWO, devices=2)
    assert "collectives\n" in out


ON_TPU = """
check(128, 4096, 16, "bfloat16", True, "tpu")
check(8, 2048, 64, "float32", False, "tpu")
"""


@needs_kernels
def test_the_tpu_compiler_takes_it_in_place():
    compiles(TPU + COMPILE + ON_TPU)
