"""One token of state space duality against a loop in float64; each kernel in a simulator and through its compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.ssd import ssd, ssd_step
from tests.hopper import run, spills
from tests.oracles import assert_close
from tests.steps import HOPPER, TPU, outputs_and_gradients, simulator
from tests.tpus import compiles

if jax.__version_info__ >= (0, 11, 2):
    from kernels_pallas.ssd import step_gpu, step_tpu

needs_kernels = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax 0.11.2")


def problem(rng, batch, written, read, heads, p, groups, n, also=""):
    """Decays from 1 to e^-300 and 0; lanes None where the axis is left out."""
    lanes = lambda count: (batch,) if count is None else (batch, count)  # noqa: E731
    a = -np.exp(rng.uniform(np.log(1e-6), np.log(10), size=(batch, heads)))
    a[0, 0], a[-1, -1], a[0, -1] = 0, -300, -np.inf
    arrays = dict(x=rng.normal(size=(*lanes(written), heads, p)), log_decay_bh=a)
    arrays |= dict(B=rng.normal(size=(*lanes(written), groups, n)), C=rng.normal(size=(*lanes(read), groups, n)))
    arrays |= dict(state_bhpn=rng.normal(size=(batch, heads, p, n)))
    more = dict(dt_bh=rng.uniform(0.1, 1, size=a.shape), z=rng.normal(size=(*lanes(read), heads, p)))
    more |= dict(D_h=rng.normal(size=(heads,) if "D" in also else (heads, p)))
    return arrays | {k: v for k, v in more.items() if k[0] in also or k == "D_h" and "each" in also}


def loop(x, log_decay_bh, B, C, state_bhpn, dt_bh=None, D_h=None, z=None):
    """(y, state), head after head, lane after lane."""
    lanes = lambda v: v.reshape(len(v), -1, *v.shape[-2:])  # noqa: E731
    h, y = np.zeros(state_bhpn.shape), np.zeros((*lanes(C).shape[:2], *x.shape[-2:]))
    for b, i in np.ndindex(h.shape[:2]):
        group = i // (h.shape[1] // B.shape[-2])
        h[b, i] = np.exp(log_decay_bh[b, i]) * state_bhpn[b, i]
        for r in range(lanes(x).shape[1]):
            h[b, i] += (1 if dt_bh is None else dt_bh[b, i]) * np.outer(lanes(x)[b, r, i], lanes(B)[b, r, group])
        for s in range(y.shape[1]):
            y[b, s, i] = h[b, i] @ lanes(C)[b, s, group]
            if D_h is not None:
                y[b, s, i] += D_h[i] * lanes(x)[b, s, i]
            if z is not None:
                y[b, s, i] *= lanes(z)[b, s, i] / (1 + np.exp(-lanes(z)[b, s, i]))
    return y.reshape(*C.shape[:-2], *x.shape[-2:]), h


def as_arrays(p, dtype, narrow=None):
    return {k: jnp.asarray(v, narrow if narrow and k in ("x", "B", "C", "z") else dtype) for k, v in p.items()}


def by(implementation):
    return partial(ssd_step, implementation=implementation)


PLAIN = {  # batch, lanes written and read, heads, channels, groups, states; what else is given
    "plain": (2, None, None, 4, 3, 2, 5, ""),
    "more written than read": (2, 4, 2, 2, 3, 2, 5, "z"),
    "lanes, one read": (1, 2, None, 2, 3, 1, 5, "d"),
    "all": (2, 3, 3, 4, 3, 4, 5, ("d", "z", "each")),
}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("case", PLAIN)
def test_values_and_gradients(case, backend, rng, x64, monkeypatch):
    """As on a CPU and as on others. The gradients are the definition's, whose own is JAX's of a loop that is right."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    p = problem(rng, *PLAIN[case])
    expected = loop(**p)
    bars = tuple(rng.normal(size=v.shape) for v in expected)
    definition, gradients = outputs_and_gradients(by("reference"), as_arrays(p, jnp.float64), bars)
    for dtype in (jnp.float64, jnp.float32):
        outputs, found = outputs_and_gradients(by("xla"), as_arrays(p, dtype), bars)
        for out, same, ref in zip(outputs, definition, expected, strict=True):
            assert out.dtype == dtype
            assert_close(same, ref)
            assert_close(out, ref, scale=5)
        for name, value in found.items():
            assert_close(value, gradients[name], scale=5, gradient=True, label=f"gradient of {name}")


GPU = {
    "Mamba-2, gated": (2, None, None, 4, 32, 2, 64, "dzD", jnp.bfloat16),
    "Mamba-3, two lanes written and one read": (1, 2, None, 2, 16, 2, 128, "", jnp.float32),
    "four heads of a group, eight lanes": (1, 8, 4, 4, 32, 1, 16, "z", jnp.float32),
    "blocks of rows, a skip a channel": (1, 3, 3, 1, 128, 1, 96, ("each", "d"), jnp.bfloat16),
}


TPU_CASES = {
    "two blocks of heads of a group": (2, None, None, 16, 16, 1, 128, "dzD", jnp.bfloat16),
    "blocks of heads with B and C of their own, more written than read": (1, 2, None, 16, 8, 16, 128, "", jnp.float32),
    "a group for four heads": (1, 1, 2, 8, 8, 2, 128, ("z",), jnp.float32),
}


@needs_kernels
@pytest.mark.parametrize(("implementation", "case"), [*(("gpu", c) for c in GPU), *(("tpu", c) for c in TPU_CASES)])
def test_kernels(implementation, case, rng, simulated, monkeypatch):
    monkeypatch.setattr(step_tpu, "BLOCK_BYTES", 2**16)
    *shape, narrow = (GPU | TPU_CASES)[case]
    p = as_arrays(problem(rng, *shape), jnp.float32, narrow)
    with simulator(implementation):
        y, h = ssd_step(**p, implementation=implementation)
    assert (y.dtype, h.dtype) == (narrow, jnp.float32)
    for out, ref in zip((y, h), loop(**jax.tree.map(lambda v: np.asarray(v, np.float64), p)), strict=True):
        assert_close(out, ref, scale=shape[-2])


@needs_kernels
def test_gradients_and_vmap_of_a_kernel(rng, simulated):
    """Mapped are rows of the batch, and the parameter D, of which a kernel has one."""
    p = as_arrays(problem(rng, 2, None, None, 2, 32, 1, 32, "dzD"), jnp.float32)
    bars = rng.normal(size=p["x"].shape), rng.normal(size=p["state_bhpn"].shape)
    step = by("gpu")
    rows = {k: v if k == "D_h" else v[:, None] for k, v in p.items()}
    every_D = {k: jnp.stack([v, 2 * v]) if k == "D_h" else v for k, v in p.items()}
    with simulator("gpu"):
        values, found = outputs_and_gradients(by("gpu"), p, bars)
        by_row = jax.vmap(lambda p: step(**p), in_axes=({k: None if k == "D_h" else 0 for k in p},))(rows)
        by_D = jax.vmap(lambda p: step(**p), in_axes=({k: 0 if k == "D_h" else None for k in p},))(every_D)
    (plain, expected), (twice, _) = (outputs_and_gradients(by("xla"), q, bars) for q in (p, p | dict(D_h=2 * p["D_h"])))
    for name, value in expected.items():
        assert_close(found[name], value, label=f"gradient of {name}")
    for value, row, of_D, ref, doubled in zip(values, by_row, by_D, plain, twice, strict=True):
        assert_close(value, ref)
        assert_close(row[:, 0], ref)
        assert_close(of_D, jnp.stack([ref, doubled]))


def test_one_token_is_a_sequence_of_one(rng):
    p = as_arrays(problem(rng, 2, 2, 2, 4, 3, 2, 5, "dzD"), jnp.float32)
    names = dict(log_decay_bh="log_decay_blh", dt_bh="dt_blh", state_bhpn="initial_state")
    tokens = {names.get(k, k): v if k in ("D_h", "state_bhpn") else v[:, None] for k, v in p.items()}
    (y, h), (expected, last) = ssd_step(**p), ssd(**tokens)
    assert_close(y, expected[:, 0])
    assert_close(h, last)


def test_wrong_input_is_named(rng, untyped):
    p = as_arrays(problem(rng, 2, None, None, 4, 3, 2, 5), jnp.float32)
    lanes = as_arrays(problem(rng, 2, 2, 3, 4, 3, 2, 5), jnp.float32)
    for arrays, change, message in [
        (p, dict(x=p["x"][0]), r"x must be \(batch, \[lanes,\] heads, channels\)"),
        (p, dict(B=p["B"][:1]), r"B has shape \(1, 2, 5\); x \(2, 4, 3\) needs \(2, 'groups', 'states'\)"),
        (p, dict(B=p["B"][:, [0, 1, 1]]), "B has 3 groups; they must divide the 4 heads of x"),
        (lanes, dict(B=lanes["B"][:, :1]), r"B has shape \(2, 1, 2, 5\); x \(2, 2, 4, 3\) needs \(2, 2, 'groups'"),
        (lanes, dict(C=lanes["C"][..., :4]), r"C has shape \(2, 3, 2, 4\); B \(2, 2, 2, 5\) needs"),
        (lanes, dict(z=lanes["x"]), r"z has shape \(2, 2, 4, 3\).*need \(2, 3, 4, 3\)"),
        (lanes, dict(D_h=jnp.ones(4)), r"D_h takes the lanes written to those read"),
        (p, dict(D_h=jnp.ones(3)), r"D_h has shape \(3,\); x \(2, 4, 3\) needs \(4,\) or \(4, 3\)"),
        (p, dict(log_decay_bh=p["log_decay_bh"][:, :2]), r"log_decay_bh has shape \(2, 2\).*need \(2, 4\)"),
        (p, dict(state_bhpn=p["state_bhpn"][..., :4]), r"state_bhpn has shape \(2, 4, 3, 4\).*need \(2, 4, 3, 5\)"),
        (p, dict(implementation="cuda"), "implementation is 'cuda'; it may be auto, reference, xla, gpu, tpu"),
        (p, dict(implementation="gpu"), "implementation 'gpu' cannot run this: the backend is cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            ssd_step(**(arrays | change))


@needs_kernels
def test_what_a_tpu_kernel_does_not_take():
    given = dict(x=jnp.zeros(()), B=None, C=None, z=None)
    assert not step_tpu.refusal(**given, h=jnp.zeros((1, 8, 64, 128)))
    for shape, message in [
        ((1, 8, 64, 64), "there are 64 states, no multiple of 128"),
        ((1, 8, 12, 128), "there are 12 channels, no multiple of 8"),
        ((1, 4, 64, 128), "there are 4 heads, no multiple of 8"),
    ]:
        assert step_tpu.refusal(**given, h=jnp.zeros(shape)) == message


@needs_kernels
def test_what_a_gpu_kernel_does_not_take(rng):
    p = problem(rng, 1, None, None, 2, 64, 1, 48)
    given = {k: jnp.zeros(p[k].shape) for k in ("x", "B", "C")} | dict(z=None, h=jnp.zeros((1, 2, 64, 48)))
    assert not step_gpu.refusal(**given)
    for change, message in [
        (dict(C=jnp.zeros(1, jnp.float16)), "C is float16; it takes float32 and bfloat16"),
        (dict(h=jnp.zeros((1, 2, 64, 24))), "there are 24 states, no multiple of 16"),
        (dict(h=jnp.zeros((1, 2, 16, 48))), "there are 16 channels, no multiple of 32"),
        (dict(h=jnp.zeros((1, 2, 24, 64))), "there are 24 channels, no multiple of 16"),
    ]:
        assert step_gpu.refusal(**given | change) == message


COMPILE = """
from kernels_pallas.ssd import ssd_step

def check(batch, heads, p, n, groups, written, read, dtype, gated, implementation="gpu"):
    given = dict(x=like(batch, written, heads, p, of=dtype), log_decay_bh=like(batch, heads))
    given |= dict(B=like(batch, written, groups, n, of=dtype), C=like(batch, read, groups, n, of=dtype))
    more = dict(dt_bh=like(batch, heads), D_h=like(heads, split=False), z=like(batch, read, heads, p, of=dtype))
    step = lambda h, p: ssd_step(**p, state_bhpn=h, implementation=implementation)
    in_place(step, like(batch, heads, p, n), given | (more if gated else {}))
"""
ONE = """
for shape in [(128, 64, 64, 128, 1, 1, 1, "bfloat16", True), (128, 64, 64, 128, 64, 2, 1, "float32", False),
              (128, 64, 64, 128, 64, 8, 4, "float32", False), (1, 8, 128, 16, 1, 3, 3, "bfloat16", True)]:
    check(*shape)
"""
TWO = """
check(4, 2, 64, 64, 1, 1, 1, "bfloat16", True)
"""


@needs_kernels
def test_it_compiles_for_hopper_in_place_and_without_a_spill():
    assert spills(HOPPER + COMPILE + ONE) == (4, {"0"})


@needs_kernels
def test_two_gpus_take_their_own_rows():
    out, _ = run(HOPPER + COMPILE + TWO, devices=2)
    assert "collectives\n" in out


ON_TPU = """
for shape in [(128, 64, 64, 128, 1, 1, 1, "bfloat16", True), (128, 64, 64, 128, 64, 2, 1, "float32", False),
              (8, 8, 64, 128, 8, 8, 4, "float32", False)]:
    check(*shape, implementation="tpu")
"""


@needs_kernels
def test_the_tpu_compiler_takes_it_in_place():
    compiles(TPU + COMPILE + ON_TPU)
