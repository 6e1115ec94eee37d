"""Mamba against float64 loops written from the equations: the selective recurrence, and the whole block."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.discretize import ONE_INPUT_RULES
from ssm.mixers.mamba import FORMS, Mamba, State, chunked, step
from tests.oracles import assert_close, dense_rule

D, N = 3, 4
NAMES = ("x", "dt", "A", "B", "C", "D", "initial state")
each_form = pytest.mark.parametrize("form", FORMS)


def problem(rng, length, strongest=-300.0):
    """Decays e^{dt A} from 1, where dt A = 0, to e^strongest."""
    draw = rng.normal
    dt = np.exp(draw(size=(2, length, D)))
    A = -np.exp(draw(size=(D, N)))
    A[0, 0] = 0
    dt[1, length // 2, 1] = strongest / A[1].min()
    B, C, x = draw(size=(2, length, N)), draw(size=(2, length, N)), draw(size=(2, length, D))
    return [x, dt, A, B, C, draw(size=D), draw(size=(2, D, N))]


def loop(x, dt, A, B, C, D, h, negative=False):
    """h = e^{dt A} h + dt B x and y = C h + D x, token after token; negative: 2 e^{dt A} - 1 for the decay."""
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        decay = np.exp(dt[:, t, :, None] * A)
        h = (2 * decay - 1 if negative else decay) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y[:, t] = np.einsum("bdn,bn->bd", h, C[:, t]) + D * x[:, t]
    return y, h


def adjoint(x, dt, A, B, C, D, h, y_bar, last_bar, negative=False):
    """Gradients of sum(y_bar y) + sum(last_bar last), token before token."""
    states = [h]
    for t in range(x.shape[1]):
        states.append(
            loop(*(v[:, t : t + 1] for v in (x, dt)), A, *(v[:, t : t + 1] for v in (B, C)), D, states[-1], negative)[1]
        )
    x_bar, B_bar, C_bar, dt_bar = np.zeros(x.shape), np.zeros(B.shape), np.zeros(C.shape), np.zeros(dt.shape)
    A_bar, g = np.zeros(A.shape), last_bar
    for t in range(x.shape[1] - 1, -1, -1):
        decay = np.exp(dt[:, t, :, None] * A)
        decay, slope = (2 * decay - 1, 2 * decay) if negative else (decay, decay)
        g = g + y_bar[:, t, :, None] * C[:, t, None]
        C_bar[:, t] = np.einsum("bd,bdn->bn", y_bar[:, t], states[t + 1])
        z_bar = g * slope * states[t]
        A_bar += np.einsum("bdn,bd->dn", z_bar, dt[:, t])
        read = np.einsum("bdn,bn->bd", g, B[:, t])
        dt_bar[:, t] = np.einsum("bdn,dn->bd", z_bar, A) + read * x[:, t]
        x_bar[:, t] = read * dt[:, t] + D * y_bar[:, t]
        B_bar[:, t] = np.einsum("bdn,bd->bn", g, dt[:, t] * x[:, t])
        g = g * decay
    return x_bar, dt_bar, A_bar, B_bar, C_bar, np.sum(y_bar * x, (0, 1)), g


@each_form
@pytest.mark.parametrize(
    ("length", "negative"), [(1, False), (63, False), (64, False), (65, False), (65, True), (1000, False)]
)
def test_values_and_all_gradients(length, negative, form, rng, x64):
    p = problem(rng, length)
    bars = rng.normal(size=p[0].shape), rng.normal(size=p[6].shape)

    def total(args):
        out = FORMS[form](*args, negative_eigenvalues=negative)
        return sum(jnp.sum(bar * o) for bar, o in zip(bars, out, strict=True)), out

    grads, out = jax.jit(jax.grad(total, has_aux=True))([jnp.asarray(v) for v in p])
    for label, value, ref in zip(("y", "last state"), out, loop(*p, negative), strict=True):
        assert_close(value, ref, scale=length, label=label)
    for label, value, ref in zip(NAMES, grads, adjoint(*p, *bars, negative), strict=True):
        assert_close(value, ref, scale=length, gradient=True, label=label)


@each_form
def test_float32_and_bfloat16(form, rng):
    """Activations alone are rounded: with exact bfloat16 inputs the error of y is that of its last rounding."""
    p = [np.asarray(v, np.float32) for v in problem(rng, 65)]
    p[0] = np.asarray(jnp.asarray(p[0], jnp.bfloat16), np.float32)
    expected, end = loop(*(np.asarray(v, np.float64) for v in p))
    for dtype in (jnp.float32, jnp.bfloat16):
        y, last = jax.jit(FORMS[form])(jnp.asarray(p[0], dtype), *map(jnp.asarray, p[1:]))
        assert (y.dtype, last.dtype) == (dtype, jnp.float32)
        assert_close(y, expected, scale=65)
        assert_close(last, end, scale=65)


@each_form
@pytest.mark.parametrize("rule", ONE_INPUT_RULES)
def test_every_rule_is_its_dense_system(rule, form, rng, x64):
    """Each token's coefficients are those of the scalar system x' = A x + B u, by matrix exponentials and solves."""
    x, dt, A, B, C, D, h = problem(rng, 5, strongest=-2.0)
    A[0, 0] = -0.1
    y, last = jax.jit(FORMS[form], static_argnames="rule")(*map(jnp.asarray, (x, dt, A, B, C, D, h)), rule=rule)
    for row, d, n in np.ndindex(2, *A.shape):
        for t in range(5):
            decay, _, current = (float(m.item()) for m in dense_rule(rule, A[d, n].reshape(1, 1), dt[row, t, d]))
            h[row, d, n] = decay * h[row, d, n] + current * B[row, t, n] * x[row, t, d]
    assert_close(last, h, scale=100)
    assert_close(y[:, -1], np.einsum("bdn,bn->bd", h, C[:, -1]) + D * x[:, -1], scale=100)


@pytest.mark.parametrize("chunk_size", [1, 16, 65, 100])
def test_chunks_of_any_size(chunk_size, rng, x64):
    """Those that do not divide the length leave padding, where dirac alone lets inputs in: they must be zeros."""
    p = list(map(jnp.asarray, problem(rng, 65)))
    expected = jax.jit(partial(FORMS["recurrent"], rule="dirac"))(*p)
    outs = jax.jit(partial(chunked, rule="dirac", chunk_size=chunk_size))(*p)
    for out, ref in zip(outs, expected, strict=True):
        assert_close(out, ref, scale=65)


@each_form
def test_segments_forget_in_values_and_gradients(form, rng, x64):
    """A segment of one token, one that ends with a chunk, one that spans chunks."""
    p = list(map(jnp.asarray, problem(rng, 100)))
    cuts = [0, 10, 11, 64, 100]
    ids = jnp.asarray(np.repeat([[7, 2, 7, 0]], np.diff(cuts), 1).repeat(2, 0))

    def packed(x, h, p):
        y, last = FORMS[form](x, *p, h, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last)), (y, last)

    def separate(x, h, p):  # for every form the same program
        parts = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            cut = lambda v: v[:, start:end]  # noqa: B023,E731
            h = h if start == 0 else jnp.zeros_like(h)
            parts.append(FORMS["recurrent"](cut(x), cut(p[0]), p[1], cut(p[2]), cut(p[3]), p[4], h))
        y, last = jnp.concatenate([y for y, _ in parts], 1), parts[-1][1]
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last)), (y, last)

    results = [jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(p[0], p[6], p[1:6]) for f in (packed, separate)]
    for out, ref in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(out, ref, scale=100, gradient=True)


@each_form
def test_theorem_1_is_a_gated_recurrence(form, rng, x64):
    """N = 1, A = -1, B = 1, dt = softplus(s): h = (1 - g) h + g x with g = sigmoid(s), by zoh and no other rule."""
    x, s, h = rng.normal(size=(2, 40, D)), 5 * rng.normal(size=(2, 40, D)), rng.normal(size=(2, D))
    one = jnp.ones((2, 40, 1))
    start, given = jnp.asarray(h)[..., None], (one, one, jnp.zeros(D))
    run = jax.jit(partial(FORMS[form], rule="zoh"))
    y, _ = run(jnp.asarray(x), jax.nn.softplus(s), -jnp.ones((D, 1)), *given, start)
    for t in range(40):
        g = 1 / (1 + np.exp(-s[:, t]))
        h = (1 - g) * h + g * x[:, t]
        assert_close(y[:, t], h, scale=40)


@each_form
def test_parity_of_a_hundred_thousand_bits(form, rng):
    """No input, and a state of 1 whose sign each bit of 1 turns: with a long dt, e^{dt A} is 0, the eigenvalue -1."""
    bits = rng.integers(0, 2, size=100_000)
    dt = jnp.asarray(50.0 * bits, jnp.float32).reshape(1, -1, 1)
    one, start = jnp.ones_like(dt), jnp.ones((1, 1, 1))
    options = dict(rule="zoh", negative_eigenvalues=True)
    y, _ = jax.jit(partial(FORMS[form], **options))(0 * one, dt, -start[0], one, one, jnp.ones(1), start)
    np.testing.assert_array_equal(y[0, :, 0], 1 - 2 * (np.cumsum(bits) % 2))


@each_form
def test_step_after_step(form, rng, x64):
    p = list(map(jnp.asarray, problem(rng, 9)))
    y, last = jax.jit(FORMS[form])(*p)
    h, one = p[6], jax.jit(step)
    for t in range(9):
        out, h = one(p[0][:, t], p[1][:, t], p[2], p[3][:, t], p[4][:, t], p[5], h)
        assert_close(out, y[:, t], scale=9)
    assert_close(h, last, scale=9)


@each_form
def test_hundred_thousand_tokens(form, rng):
    """A state that forgets nothing, slow and fast ones, and a last chunk that is not full."""
    length = 100_003
    x, B, C = (rng.normal(size=(1, length, 3)).astype(np.float32) for _ in range(3))
    dt = np.exp(rng.uniform(-7, -2, size=(1, length, 3))).astype(np.float32)
    A = -np.asarray([[0, 1e-3, 1], [1e-2, 10, 300], [1, 2, 3]], np.float32)
    p = [x, dt, A, B, C, np.ones(3, np.float32), np.zeros((1, 3, 3), np.float32)]
    y, last = jax.jit(FORMS[form])(*map(jnp.asarray, p))
    expected, end = loop(*(np.asarray(v, np.float64) for v in p))
    assert_close(y, expected, scale=10_000)
    assert_close(last, end, scale=10_000)


def weights(rng, module, dtype=jnp.float64):
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, module.width), dtype))["params"]
    return jax.tree.map(lambda v: v.astype(dtype) + 0.3 * rng.normal(size=v.shape), params)


def block(p, x, rank, n, state, norm=None, negative=False):
    """Figure 3 and Algorithm 2, token after token."""
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    linear = lambda name, v: v @ p[name]["kernel"] + p[name].get("bias", 0)  # noqa: E731
    rms = (lambda v: v) if norm is None else lambda v: v / np.sqrt(np.mean(v**2, -1, keepdims=True) + norm)
    (recent, h), out = state, []
    for t in range(x.shape[1]):
        u, z = np.split(linear("in_proj", x[:, t]), 2, -1)
        window = np.concatenate([recent, u[:, None]], 1)
        recent = window[:, 1:]
        u = silu(np.einsum("bkd,dk->bd", window, p["conv"]["weight"]) + p["conv"].get("bias", 0))
        dt, B, C = (rms(v) for v in np.split(linear("x_proj", u), [rank, rank + n], -1))
        dt = np.log1p(np.exp(linear("dt_proj", dt)))
        y, h = loop(u[:, None], dt[:, None], -np.exp(p["A_log"]), B[:, None], C[:, None], p["D"], h, negative)
        out.append(linear("out_proj", y[:, 0] * silu(z)))
    return np.stack(out, 1), (recent, h)


OPTIONS = [
    dict(),
    dict(dt_rank=3, bias=True, conv_bias=False, conv_width=2, expand=3),
    dict(norm_BCdt=True, norm_eps=0.1, width=20),
    dict(negative_eigenvalues=True),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_block_is_its_equations(options, rng, x64):
    module = Mamba(**dict(width=6, state_size=5) | options)
    params = weights(rng, module)
    state = State(*(jnp.asarray(rng.normal(size=s.shape)) for s in module.initial_state(2)))
    x = rng.normal(size=(2, 7, module.width))
    rank = options.get("dt_rank", 2 if module.width == 20 else 1)
    host = jax.tree.map(np.asarray, params)
    norm = 0.1 if module.norm_BCdt else None
    expected, end = block(host, x, rank, 5, map(np.asarray, state), norm, module.negative_eigenvalues)
    for form in (*FORMS, "auto"):
        y, last = jax.jit(module.clone(form=form).apply)({"params": params}, jnp.asarray(x), state)
        for out, ref in zip((y, *last), (expected, *end), strict=True):
            assert_close(out, ref, scale=100)
    step = jax.jit(lambda params, x, state: module.apply({"params": params}, x, state, method="step"))
    y, _ = step(params, jnp.asarray(x[:, 0]), state)
    assert_close(y, expected[:, 0], scale=100)


def test_the_start_is_the_papers():
    """S4D-Real, dt log-uniform in its range and not below its floor, PyTorch's linear layers, D = 1."""
    module = Mamba(width=256, state_size=5, dt_min=1e-5, dt_max=0.1, dt_floor=1e-3)
    p = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 256)))["params"]
    np.testing.assert_allclose(np.exp(p["A_log"]), np.tile([1, 2, 3, 4, 5], (512, 1)), rtol=1e-6)
    np.testing.assert_array_equal(p["D"], 1)
    dt = np.log1p(np.exp(np.asarray(p["dt_proj"]["bias"], np.float64)))
    assert 0.999e-3 <= dt.min() and 0.05 < dt.max() <= 0.1001
    np.testing.assert_allclose(np.mean(dt < 1.001e-3), 0.5, atol=0.1)
    kernels = {name: p[name]["kernel"] for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    bounds = {name: kernel.shape[0] ** -0.5 for name, kernel in kernels.items()}
    assert {name: k.shape for name, k in kernels.items()} == {
        "in_proj": (256, 1024), "x_proj": (512, 26), "dt_proj": (16, 512), "out_proj": (512, 256),
    }  # fmt: skip
    for values, bound in [(kernels[name], bounds[name]) for name in kernels] + [(p["conv"]["weight"], 0.5)]:
        assert 0.97 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
        np.testing.assert_allclose(np.std(values), bound / 3**0.5, rtol=0.1)


def test_dt_in_bfloat16_keeps_its_bias(rng):
    """The bias, near -7 at the start, is added in float32: in bfloat16 it would move dt by 2 percent."""
    module = Mamba(width=4, state_size=2)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 4)))["params"]
    still = params | {"dt_proj": params["dt_proj"] | {"kernel": jnp.zeros((1, 8))}}
    state = State(jnp.zeros((1, 3, 8)), jnp.ones((1, 8, 2)))
    zero = jnp.zeros((1, 1, 4), jnp.bfloat16)
    still["conv"] = params["conv"] | {"bias": jnp.zeros(8)}
    _, last = module.apply({"params": still}, zero, state)
    dt = jax.nn.softplus(params["dt_proj"]["bias"])[:, None]
    assert last.h_bdn.dtype == jnp.float32
    assert_close(1 - last.h_bdn[0], 1 - jnp.exp(-dt * jnp.exp(params["A_log"])), scale=1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rule="exponential_trapezoidal"), "rule 'exponential_trapezoidal' is not one that mamba can take"),
        (dict(rule="bilinear", negative_eigenvalues=True), "rule 'bilinear' is not one that mamba with negative"),
        (
            dict(form="chunk"),
            "unknown form 'chunk'; did you mean 'chunked'? Allowed: auto, chunked, parallel, recurrent",
        ),
        (dict(state_size=0), "state_size is 0; it must be at least 1"),
        (dict(dt_rank=0), "dt_rank is 0; it must be at least 1"),
        (dict(chunk_size=0), "chunk_size is 0; it must be at least 1"),
        (dict(dt_min=0.2), "dt_min is 0.2 and dt_max is 0.1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        Mamba(**dict(width=4) | options).init(jax.random.key(0), jnp.zeros((1, 2, 4)))
    assert message in str(error.value)


def test_a_state_of_another_shape_is_named(untyped):
    module, x = Mamba(width=4, state_size=5), jnp.zeros((2, 3, 4))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    for state, message in [
        (module.initial_state(1), r"state.conv_bkd has shape \(1, 3, 8\); this layer and batch have \(2, 3, 8\)"),
        (module.initial_state(2)._replace(h_bdn=jnp.zeros((2, 8, 4))), r"state.h_bdn has shape \(2, 8, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.apply, variables, x, state)
        with pytest.raises(ValueError, match=message):
            module.apply(variables, x[:, 0], state, method="step")


def test_the_gradient_keeps_one_state_a_chunk(rng):
    """Compiled memory grows with the states of a chunk, not of the sequence: form auto trains long sequences."""
    p = list(map(jnp.asarray, problem(rng, 2048)))
    compiled = jax.jit(jax.grad(lambda *p: jnp.sum(jnp.sin(chunked(*p)[0])), argnums=tuple(range(7)))).lower(*p)
    states = 4 * 2 * 2048 * D * N
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 2 * states
