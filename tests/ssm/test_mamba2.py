"""Mamba-2 against float64 loops: the whole layer, every form and gradient, a million tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.mixers import mamba, mamba2, mixer
from tests.oracles import assert_close, relative

WIDTH, HEADS, P, GROUPS, N, K = 6, 4, 3, 2, 5, 4
SIZES = dict(state_size=N, expand=2, head_size=P, groups=GROUPS, conv_width=K, chunk_size=16)
GAIN = {  # what x is multiplied by when it enters the state
    "exponential_euler": lambda A, dt: dt,
    "zoh": lambda A, dt: np.expm1(dt * A) / A,
    "dirac": lambda A, dt: np.ones_like(dt * A),
}


def loop(x, dt, A, B, C, D, h, rule="exponential_euler", starts=None):
    """h = e^(dt A) h + gain x B^T and y = h C + D x, row after row, head after head, token after token."""
    y, last = np.zeros(x.shape), np.zeros(h.shape)
    for b, i in np.ndindex(h.shape[:2]):
        state, group = h[b, i], i // (len(A) // B.shape[2])
        for t in range(x.shape[1]):
            if starts is not None and starts[b, t]:
                state = np.zeros_like(state)
            state = np.exp(dt[b, t, i] * A[i]) * state
            state = state + GAIN[rule](A[i], dt[b, t, i]) * np.outer(x[b, t, i], B[b, t, group])
            y[b, t, i] = state @ C[b, t, group] + D[i] * x[b, t, i]
        last[b, i] = state
    return y, last


def silu(x):
    return x / (1 + np.exp(-x))


def layer_loop(params, x, conv, h, *, dt_limit=(0, np.inf), norm_first=False, rule="exponential_euler"):
    """The layer of section 7 of the paper: (y, inputs that the convolution keeps, h)."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    inner, states = HEADS * P, GROUPS * N
    dense = lambda name, v: v @ p[name]["kernel"] + p[name].get("bias", 0)  # noqa: E731
    z, xBC, dt = np.split(dense("in_proj", x), [inner, 2 * inner + 2 * states], -1)
    window = np.concatenate([conv, xBC], 1)
    taps = [sum(window[:, t + j] * p["conv"]["weight"][:, j] for j in range(K)) for t in range(x.shape[1])]
    mixed = silu(np.stack(taps, 1) + p["conv"].get("bias", 0))
    heads, B, C = np.split(mixed, [inner, inner + states], -1)
    heads, B, C = (v.reshape(*v.shape[:2], parts, -1) for v, parts in ((heads, HEADS), (B, GROUPS), (C, GROUPS)))
    dt = np.clip(np.log1p(np.exp(dt + p["dt_bias"])), *dt_limit)
    y, h = loop(heads, dt, -np.exp(p["A_log"]), B, C, p["D"], h, rule)
    y = y.reshape(z.shape) * (1 if norm_first else silu(z))
    parts = y.reshape(*y.shape[:2], GROUPS, -1)
    y = (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)).reshape(y.shape) * p["norm"]["scale"]
    return dense("out_proj", y * (silu(z) if norm_first else 1)), window[:, x.shape[1] :], h


@pytest.mark.parametrize(
    "options",
    [{}, dict(norm_first=True, bias=True, rule="zoh"), dict(dt_limit=(0.3, 0.6), conv_bias=False, rule="dirac")],
    ids=lambda options: "-".join(map(str, options)) or "default",
)
def test_the_layer_is_its_loop(options, rng):
    """Random parameters, so that none is at a value that hides it; whole, and token after token."""
    module = mixer("mamba2", WIDTH, SIZES | options)
    x = jnp.asarray(rng.normal(size=(2, 21, WIDTH)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / len(leaf.shape), jnp.float32)  # noqa: E731
    variables = jax.tree.map(draw, shapes)
    state = jax.tree.map(draw, jax.eval_shape(lambda: module.initial_state(2)))
    kept = {k: v for k, v in options.items() if k in ("dt_limit", "norm_first", "rule")}
    biases = {name for name in ("in_proj", "out_proj", "conv") if "bias" in variables["params"][name]}
    wanted = dict(in_proj="bias" in options, out_proj="bias" in options, conv="conv_bias" not in options)
    assert biases == {name for name in wanted if wanted[name]}
    expected = layer_loop(variables["params"], *(np.asarray(v, np.float64) for v in (x, *state)), **kept)
    y, last = jax.jit(module.apply)(variables, x, state)
    step, outs = jax.jit(lambda x, state: module.apply(variables, x, state, method="step")), []
    for t in range(x.shape[1]):
        out, state = step(x[:, t], state)
        outs.append(out)
    for out in ((y, *last), (jnp.stack(outs, 1), *state)):
        for value, ref, label in zip(out, expected, ("y", "conv", "h"), strict=True):
            assert_close(value, ref, scale=21 * N, label=label)


def stepped(x, dt, A, B, C, D, h, *, rule, segment_ids):
    """`step` in a loop; a segment's first token is given an empty state."""
    changed = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0

    def advance(h, token):
        *arrays, forget = token
        h = jnp.where(forget[:, None, None, None], 0, h)
        y, h = mamba2.step(arrays[0], arrays[1], A, arrays[2], arrays[3], D, h, rule=rule)
        return h, y

    last, y = jax.lax.scan(advance, h, jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, dt, B, C, changed)))
    return jnp.moveaxis(y, 0, 1), last


FORMS = {"quadratic": mamba2.quadratic, "chunked": mamba2.chunked, "step": stepped}


@pytest.mark.parametrize(
    ("length", "rule"), [(1, "zoh"), (63, "dirac"), (64, "exponential_euler"), (65, "zoh"), (1000, "exponential_euler")]
)
def test_every_form_in_value_and_gradient(length, rule, rng, x64):
    """Float32 against float64, dt A from -3e-5 to -300; a segment begins at a third of the length."""
    shape = (1, length, HEADS)
    arrays = (
        rng.normal(size=(*shape, P)), np.exp(rng.uniform(np.log(1e-3), np.log(3), size=shape)),
        -np.asarray([0.03, 1, 10, 100]), rng.normal(size=(1, length, GROUPS, N)),
        rng.normal(size=(1, length, GROUPS, N)), rng.normal(size=HEADS), rng.normal(size=(1, HEADS, P, N)),
    )  # fmt: skip
    ids = jnp.asarray(np.arange(length)[None] >= max(1, length // 3), jnp.int32)
    starts = np.diff(ids, axis=1, prepend=0) != 0
    bars = rng.normal(size=(*shape, P)), rng.normal(size=(1, HEADS, P, N))

    def run(form, dtype):
        def total(arrays):
            y, h = form(*arrays, rule=rule, segment_ids=ids)
            return jnp.sum(y * bars[0].astype(dtype)) + jnp.sum(h * bars[1].astype(dtype)), (y, h)

        arguments = tuple(jnp.asarray(v, dtype) for v in arrays)
        (_, values), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(arguments)
        return values, grads

    values, expected = run(mamba2.recurrent, jnp.float64)
    for out, ref in zip(values, loop(*arrays, rule, starts), strict=True):
        assert_close(out, ref, scale=length * N)
    for form, function in FORMS.items():
        outs, grads = run(function, jnp.float32)
        for out, ref in zip(outs, values, strict=True):
            assert_close(out, ref, scale=length * N, label=form)
        for out, ref, name in zip(grads, expected, ("x", "dt", "A", "B", "C", "D", "h"), strict=True):
            assert_close(out, ref, scale=length * N, gradient=True, label=f"{form}, gradient of {name}")


def test_a_million_tokens(rng):
    """At once, in pieces with carried state, and token by token; without D all of y is memory, of 1e3 tokens."""
    length, piece = 2**20, 2**16
    options = dict(state_size=2, head_size=2, expand=1, chunk_size=16, dt_min=5e-4, dt_max=1e-3, A_range=(1.0, 2.0))
    layer = lambda form: mixer("mamba2", 2, options | dict(form=form))  # noqa: E731
    x = jnp.asarray(rng.normal(size=(1, length, 2)), jnp.float32)
    variables = jax.jit(layer("chunked").init)(jax.random.key(0), x[:, :1])
    variables["params"]["D"] = jnp.zeros(1)
    run = jax.jit(lambda form, x, state: layer(form).apply(variables, x, state), static_argnums=0)
    whole, end = run("chunked", x, None)
    state, parts = layer("chunked").initial_state(1), []
    for first in range(0, length, piece):
        y, state = run("chunked", x[:, first : first + piece], state)
        parts.append(y)
    loop, last = run("recurrent", x, None)
    for y, h in ((np.concatenate(parts, 1), state.h_bhpn), (loop, last.h_bhpn)):
        assert relative(y, whole) < 1e-4
        assert relative(h, end.h_bhpn) < 1e-4


def test_parameters_start_in_their_ranges(rng):
    options = dict(state_size=2, head_size=1, dt_min=0.01, dt_floor=0.02, dt_max=0.05, A_range=(3.0, 5.0))
    module = mixer("mamba2", 64, options)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    for values, (low, high) in (
        (jax.nn.softplus(params["dt_bias"]), (0.02, 0.05)),
        (jnp.exp(params["A_log"]), (3, 5)),
        (params["conv"]["weight"], (-0.5, 0.5)),
        (params["conv"]["bias"], (-0.5, 0.5)),
        (params["in_proj"]["kernel"], (-1 / 8, 1 / 8)),
    ):
        slack = (high - low) / 10
        assert low - 1e-6 <= values.min() < low + slack
        assert high - slack < values.max() <= high + 1e-6


def test_wrong_options_and_states_are_named(untyped):
    x = jnp.zeros((2, 3, WIDTH))
    start = lambda **options: jax.eval_shape(mixer("mamba2", WIDTH, SIZES | options).init, jax.random.key(0), x)  # noqa: E731
    for options, message in [
        (dict(head_size=5), "head_size is 5; it must divide expand x width, which is 12"),
        (dict(groups=3), "groups is 3; it must divide the 4 heads"),
        (dict(dt_limit=(0.1, 0.01)), r"dt_limit is \(0.1, 0.01\); it must be \(low, high\) with 0 <= low < high"),
        (dict(dt_limit=(0.1,)), r"dt_limit is \(0.1,\)"),
        (dict(A_range=(0.0, 1.0)), r"A_range is \(0.0, 1.0\)"),
        (dict(state_size=0), "state_size is 0; it must be at least 1"),
        (dict(chunk_size=0), "chunk_size is 0; it must be at least 1"),
        (dict(rule="bilinear"), "rule 'bilinear' is not one that mamba2 can take. Allowed: exponential_euler, zoh"),
        (dict(form="quadradic"), "unknown form 'quadradic'; did you mean 'quadratic'"),
        (dict(dt_min=0.2, dt_max=0.1), "dt_min is 0.2 and dt_max is 0.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(**options)
    module, variables = mixer("mamba2", WIDTH, SIZES), start()
    other = mixer("mamba2", WIDTH, SIZES | dict(state_size=7))
    for state, message in [
        (module.initial_state(3), r"state.conv_bkd has shape \(3, 3, 32\); .* \(2, 3, 32\)"),
        (other.initial_state(2), r"state.conv_bkd has shape \(2, 3, 40\)"),
        (module.initial_state(2)._replace(h_bhpn=jnp.zeros((2, 4, 3, 7))), r"state.h_bhpn has shape \(2, 4, 3, 7\)"),
        (mamba.State(*module.initial_state(2)), "state is a ssm.mixers.mamba.State; mamba2 takes its own State"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.apply, variables, x, state)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda state: module.apply(variables, x[:, 0], state, method="step"), state)  # noqa: B023


@pytest.mark.parametrize(("form", "implementation"), [("chunked", "xla"), ("auto", "auto")])
def test_chunked_asks_for_no_kernel(form, implementation, monkeypatch):
    """What the kernels are compared with is XLA's, the convolution too."""
    asked = []
    for name in ("ssd", "short_convolution"):
        run = getattr(mamba2, name)
        monkeypatch.setattr(mamba2, name, lambda *v, run=run, **o: asked.append(o["implementation"]) or run(*v, **o))
    layer = mixer("mamba2", WIDTH, SIZES | {"form": form})
    jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 3, WIDTH)))
    assert asked == [implementation] * 2
