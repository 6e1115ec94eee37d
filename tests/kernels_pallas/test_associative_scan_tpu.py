"""The TPU kernels: values in the simulator of TPU memory, and what the TPU compiler says of them without a TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.associative_scan import reference, tpu
from tests import oracles
from tests.oracles import assert_close
from tests.tpus import compiles

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("tested with the accelerators' jax", allow_module_level=True)

KINDS = [(planes, per_token) for planes in (1, 2) for per_token in (True, False)]
COMPILE = """
from kernels_pallas.associative_scan import specs, tpu

most_planes, odd = specs.Spec(8, 4096, 2048, "complex", True), specs.Spec(3, 8 * 331, 384, "real", True)
for spec in (*specs.GPU, most_planes, odd):
    p = 2 if spec.number == "complex" else 1
    shape, n = (spec.batch, spec.length, spec.channels), spec.channels
    b, h = (like(shape, spec.dtype),) * p, (like((spec.batch, n)),) * p
    a = b if spec.per_token else (like((n,), spec.dtype),) * p
    assert not tpu.refusal(a, b), spec
    for function, arguments in ((tpu.scan, (a, b, h)), (tpu.adjoint, (a, h, b, b, h))):
        compile(lambda *x: function(*x, False), arguments)
"""


def shrink(monkeypatch, width, unroll, block_bytes):
    """Blocks of 128 channels and width // 128 rows of a batch; a few tiles a sequence, most of several groups."""
    monkeypatch.setattr(tpu, "WIDTH", width)
    monkeypatch.setattr(tpu, "UNROLL", unroll)
    monkeypatch.setattr(tpu, "BLOCK_BYTES", block_bytes)


def normal(rng, shape, planes, dtype=jnp.float32):
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(planes))


def problem(rng, planes, per_token, dtype, batch, n, length=96):
    """a inside the unit circle, 1 and 0 and e^-300 among them; b, h, and the cotangents of states and last."""
    a = rng.normal(size=(planes, *((batch, length, n) if per_token else (n,))))
    a = a / (1 + np.linalg.norm(a, axis=0))
    a[..., 0], a[0, ..., 0] = 0, 1
    a[..., 1] = 0
    a[..., 2] *= np.exp(-300)
    a = tuple(jnp.asarray(x, dtype) for x in a)
    tokens, row = (batch, length, n), (batch, n)
    b, d_states = normal(rng, tokens, planes, dtype), normal(rng, tokens, planes, dtype)
    return a, b, normal(rng, row, planes), d_states, normal(rng, row, planes)


def double(planes):
    return tuple(np.asarray(x, np.float64) for x in planes)


def as_complex(planes):
    real, *imaginary = double(planes)
    return real + 1j * imaginary[0] if imaginary else real


def loop(a, b, h, reverse):
    """(states, last) as planes, by the float64 loop."""
    a, b, h = map(as_complex, (a, b, h))
    outputs = oracles.scan(np.broadcast_to(a, b.shape), b, h, reverse)
    return [(x.real, x.imag) if np.iscomplexobj(x) else (x,) for x in outputs]


def cotangents(a, b, h, d_states, d_last, reverse):
    """Those of a, b and h, by JAX's own derivative of the loop in float64."""
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, tuple(map(double, (a, b, h))))
        bars = jax.tree.map(jnp.asarray, tuple(map(double, (d_states, d_last))))
        pullback = jax.jit(lambda inputs, bars: jax.vjp(lambda *x: reference.scan(*x, reverse), *inputs)[1](bars))
        return jax.tree.map(np.asarray, pullback(inputs, bars))


def simulate(function, reverse, *arguments):
    with pltpu.force_tpu_interpret_mode():
        return jax.block_until_ready(jax.jit(lambda *x: function(*x, reverse))(*arguments))


def adjoint(a, h, states, d_states, d_last, reverse):
    """The cotangent of an a that all rows share, summed over them, as the op does."""
    a_bar, b_bar, h_bar = tpu.adjoint(a, h, states, d_states, d_last, reverse)
    return a_bar if a[0].ndim == 3 else tuple(x.sum(0) for x in a_bar), b_bar, h_bar


def check(outputs, expected, names, **bounds):
    for name, out, ref in zip(names, outputs, expected, strict=True):
        for plane, (x, y) in enumerate(zip(out, ref, strict=True)):
            assert_close(x, y, label=f"{name}, plane {plane}", **bounds)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("planes", "per_token"), KINDS)
def test_values_and_all_gradients(planes, per_token, reverse, rng, monkeypatch):
    shrink(monkeypatch, width=256, unroll=2, block_bytes=2**19)
    a, b, h, *bars = problem(rng, planes, per_token, jnp.float32, batch=4, n=128)
    states, last = simulate(tpu.scan, reverse, a, b, h)
    check((states, last), loop(a, b, h, reverse), ("states", "last"), scale=96)
    outputs = simulate(adjoint, reverse, a, h, states, *bars)
    check(outputs, cotangents(a, b, h, *bars, reverse), "abh", scale=96, gradient=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("planes", "per_token"), [(1, True), (2, False)])
def test_half_precision_streams_with_states_in_float32(planes, per_token, reverse, rng, monkeypatch):
    shrink(monkeypatch, width=128, unroll=1, block_bytes=2**17)
    a, b, h, *bars = problem(rng, planes, per_token, jnp.bfloat16, batch=2, n=256)
    states, last = simulate(tpu.scan, reverse, a, b, h)
    assert states[0].dtype == jnp.bfloat16 and last[0].dtype == jnp.float32
    expected = loop(a, b, h, reverse)
    check((states,), expected[:1], ("states",))
    check((last,), expected[1:], ("last",), scale=96)
    a_bar, b_bar, h_bar = simulate(adjoint, reverse, a, h, states, *bars)
    assert a_bar[0].dtype == (jnp.bfloat16 if per_token else jnp.float32) and b_bar[0].dtype == jnp.bfloat16
    a_ref, b_ref, h_ref = cotangents(a, b, h, *bars, reverse)
    check((b_bar,), (b_ref,), "b")
    check((h_bar,), (h_ref,), "h", scale=96, gradient=True)
    rounded = tuple(x.astype(jnp.bfloat16) for x in a_bar)  # the states that it is made of are
    check((rounded,), (a_ref,), "a")


def test_vmap_over_sequences_and_a_shared_decay(rng, monkeypatch):
    """The first tile of each mapped sequence starts from its own state, though the grid has one axis more.
    By Pallas's plain interpreter: the simulator of TPU memory takes no mapped grid."""
    monkeypatch.setattr(tpu.pl, "pallas_call", partial(tpu.pl.pallas_call, interpret=True))
    shrink(monkeypatch, width=128, unroll=1, block_bytes=2**16)
    a, b, h, *bars = problem(rng, 1, False, jnp.float32, batch=4, n=128, length=64)
    fold = lambda x: x.reshape(2, 2, *x.shape[1:])  # noqa: E731
    b, h, *bars = jax.tree.map(fold, (b, h, *bars))
    run = lambda function, mapped, *x: jax.jit(jax.vmap(lambda *x: function(*x, False), (None, *mapped)))(a, *x)  # noqa: E731
    states, last = run(tpu.scan, (0, 0), b, h)
    d_a, d_b, d_h = run(adjoint, (0, 0, 0, 0), h, states, *bars)
    for i in range(2):
        *mine, b_i, h_i = jax.tree.map(lambda x: x[i], (*bars, b, h))  # noqa: B023
        here = jax.tree.map(lambda x: x[i], (states, last, d_a, d_b, d_h))  # noqa: B023
        check(here[:2], loop(a, b_i, h_i, False), ("states", "last"), scale=64)
        check(here[2:], cotangents(a, b_i, h_i, *mine, False), "abh", scale=64, gradient=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "per_token", "message"),
    [
        ((1, 20, 128), "float32", True, "the length is 20, no multiple of 8"),
        ((1, 24, 128), "bfloat16", True, "the length is 24, no multiple of 16"),
        ((1, 16, 192), "float32", False, "there are 192 channels, no multiple of 128"),
        ((1, 16, 128), "float16", True, "it takes float32 and bfloat16"),
    ],
)
def test_refusals_name_their_reason(shape, dtype, per_token, message):
    b = jnp.zeros(shape, dtype)
    assert tpu.refusal((b if per_token else b[0, 0],), (b,)) == message


def test_a_decay_of_half_precision_asks_nothing_of_the_length_unless_per_token():
    b, a = jnp.zeros((1, 8, 128)), jnp.zeros((1, 8, 128), jnp.bfloat16)
    assert tpu.refusal((a[0, 0],), (b,)) == ""
    assert tpu.refusal((a,), (b,)) == "the length is 8, no multiple of 16"


def test_the_tpu_compiler_takes_them():
    """Blocks that VMEM cannot hold, and operations that Mosaic lacks, fail here."""
    compiles(COMPILE)
