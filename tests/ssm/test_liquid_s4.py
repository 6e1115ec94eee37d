"""Liquid-S4's three modes against NumPy loops of their equations, in float64; then the layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.mixers import liquid_s4
from ssm.mixers.liquid_s4 import LiquidS4, State
from ssm.mixers.s4d import System, discrete

EXACT = ("recurrent", "parallel")
FORMS = (*EXACT, "chunked")


def error(out, reference):
    return np.linalg.norm(np.asarray(out) - np.asarray(reference)) / np.linalg.norm(np.asarray(reference))


def system(rng, d=3, n=4):
    """A stable discrete system, complex, with Bbar large enough for the third degree to be seen."""
    noise = lambda: rng.normal(size=(d, n)) + 1j * rng.normal(size=(d, n))  # noqa: E731
    a = 0.9 * np.exp(1j * rng.uniform(0, 3, (d, n)))
    return System(a, 0.2 * noise(), noise(), rng.normal(size=d))


@functools.partial(jax.jit, static_argnames=("mode", "degree", "form"))
def run(mode, degree, form, x, system, state=None, segment_ids=None):
    return liquid_s4.run(mode, degree, form, x, system, state, segment_ids)


def past(rng, degree):
    """A state with a past."""
    h = rng.normal(size=(2, 3, 4)) + 1j * rng.normal(size=(2, 3, 4))
    return State(h, rng.normal(size=(2, degree - 1, 3)))


step = jax.jit(liquid_s4.step, static_argnames=("mode", "degree"))


def exact_loop(x, system, h):
    """Eq. (9), as printed."""
    a, b, c, D, _ = system
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        bu = b * x[:, t, :, None]
        h = (a + bu) * h + bu
        y[:, t] = (c * h).sum(-1).real + D * x[:, t]
    return y, h


def kernel_sums(mode, degree, x, system, state=None):
    """y by double sums over the kernels, and the last h: products reach into the state's recent inputs."""
    a, b, c, D, _ = system
    length, past = x.shape[1], np.zeros((len(x), degree - 1, x.shape[2])) if state is None else state.recent_bkd
    u = np.concatenate([past, x], 1)
    v = {
        p: np.stack([u[:, t + degree - p : t + degree].prod(1) for t in range(length)], 1) for p in range(1, degree + 1)
    }
    h0 = np.zeros((len(x), *a.shape)) if state is None else state.h_bdn
    h, y = np.stack([a ** (t + 1) * h0 for t in range(length)], 1).astype(complex), D * x
    for p in range(1, degree + 1) if mode == "kb" else (1,):
        for t in range(length):
            for s in range(t + 1):
                h[:, t] += a ** (t - s) * b**p * v[p][:, s, :, None]
    y += (c * h).sum(-1).real
    if mode == "pb":
        y += sum((c * b**p).sum(-1).real * v[p] for p in range(2, degree + 1))
    return y, h[:, -1]


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_exact_forms_equal_the_loop(x64, rng, length, form):
    x, made, state = rng.normal(size=(2, length, 3)), system(rng), past(rng, 1)
    for entering, h in ((None, 0), (state, state.h_bdn))[length < 65 :]:
        y, last = run("exact", None, form, x, made, entering)
        reference, h = exact_loop(x, made, h)
        assert error(y, reference) < 1e-12
        assert error(last.h_bdn, h) < 1e-12


def test_exact_gradients_agree(x64, rng):
    arguments = rng.normal(size=(2, 33, 3)), system(rng), past(rng, 1)
    y_bar, h_bar = rng.normal(size=(2, 33, 3)), past(rng, 1).h_bdn

    def value(form, *arguments):
        y, state = run("exact", None, form, *arguments)
        return (y * y_bar).sum() + (state.h_bdn * h_bar).real.sum()

    got, wanted = (jax.jit(jax.grad(functools.partial(value, form), (0, 1, 2)))(*arguments) for form in EXACT)
    for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert x.size == 0 or error(x, y) < 4e-12


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("mode", ["kb", "pb"])
def test_kernels_equal_the_sums(x64, rng, mode, degree):
    """Every form, with and without a past. Fails for a product that misses or repeats an input."""
    x, made, state = rng.normal(size=(2, 17, 3)), system(rng), past(rng, degree)
    for form in FORMS if degree == 3 else ("parallel",):
        for entering in (None, state):
            y, last = run(mode, degree, form, x, made, entering)
            reference, h = kernel_sums(mode, degree, x, made, entering)
            assert error(y, reference) < 1e-12, form
            assert error(last.h_bdn, h) < 1e-12, form
    assert error(last.recent_bkd, x[:, 18 - degree :]) == 0


def test_kb_is_exact_where_all_correlations_are_of_neighbours(x64, rng):
    """Two tokens side by side in silence; with a third one kb of any degree misses the outer pair."""
    x, made = np.zeros((2, 20, 3)), system(rng)
    x[:, 5:7] = rng.normal(size=(2, 2, 3))
    kb = run("kb", 2, "parallel", x, made)[0]
    assert error(kb, run("exact", None, "recurrent", x, made)[0]) < 1e-12
    x[:, 7] = 1
    assert error(run("kb", 3, "parallel", x, made)[0], run("exact", None, "recurrent", x, made)[0]) > 1e-3


@pytest.mark.parametrize("mode", ["exact", "kb", "pb"])
def test_split_anywhere_and_stepped(x64, rng, mode):
    """Pieces longer and shorter than the window of recent inputs, then single tokens, end where the whole does."""
    degree = None if mode == "exact" else 4
    x, made, state = rng.normal(size=(2, 20, 3)), system(rng), past(rng, degree or 1)
    whole, last = run(mode, degree, "parallel", x, made, state)
    pieces, start = [], 0
    for stop in (9, 11):
        y, state = run(mode, degree, "parallel", x[:, start:stop], made, state)
        pieces, start = [*pieces, y], stop
    for t in range(11, 20):
        y, state = step(x[:, t], made, state, mode=mode, degree=degree)
        pieces.append(y[:, None])
    assert error(np.concatenate(pieces, 1), whole) < 1e-12
    assert error(state.h_bdn, last.h_bdn) < 1e-12
    assert (np.asarray(state.recent_bkd) == last.recent_bkd).all()


@pytest.mark.parametrize(
    "mode, form", [("exact", "recurrent"), ("exact", "parallel"), ("kb", "auto"), ("pb", "recurrent")]
)
def test_packed_equals_separate(x64, rng, mode, form):
    """No product reaches over a boundary, in the row or in the recent inputs that leave it."""
    degree = None if mode == "exact" else 4
    x, made, state = rng.normal(size=(2, 20, 3)), system(rng), past(rng, degree or 1)
    ids = np.array([[0] * 7 + [1] * 1 + [2] * 12, [5] * 12 + [3] * 6 + [5] * 2])
    y, last = run(mode, degree, form, x, made, state, ids)
    for row, cuts in enumerate([(0, 7, 8, 20), (0, 12, 18, 20)]):
        pick = lambda tree, row=row: jax.tree.map(lambda v: v[row : row + 1], tree)  # noqa: E731
        for start, stop in zip(cuts, cuts[1:], strict=False):
            alone, end = run(mode, degree, "recurrent", pick(x)[:, start:stop], made, None if start else pick(state))
            assert error(y[row : row + 1, start:stop], alone) < 1e-12
        token = rng.normal(size=(1, 3))
        after = [step(token, made, s, mode=mode, degree=degree)[0] for s in (pick(last), end)]
        assert error(*after) < 1e-12


@pytest.mark.parametrize("mode", ["exact", "kb", "pb"])
def test_vmap_no_jit_and_causality(x64, rng, mode):
    degree = None if mode == "exact" else 3
    x, made = rng.normal(size=(2, 1, 7, 3)), jax.tree.map(jnp.asarray, system(rng))
    several, _ = jax.vmap(lambda x: run(mode, degree, "parallel", x, made))(x)
    with jax.disable_jit():
        alone, _ = liquid_s4.run(mode, degree, "parallel", jnp.asarray(x[1]), made, None, None)
    assert error(several[1], alone) < 1e-13
    jacobian = jax.jacrev(lambda x: run(mode, degree, "parallel", x, made)[0][0, :, 0])(x[0])[:, 0, :, 0]
    lower = np.tril(np.ones((7, 7), bool))
    assert np.abs(jacobian)[~lower].max() < 1e-14 < 1e-4 < np.abs(jacobian)[lower].min()


def test_ten_thousand_steps(rng):
    """In float32, token by token and in one piece, against float64; small inputs keep the exact mode from growing."""
    made, x = system(rng), 0.3 * rng.normal(size=(1, 10_000, 3))
    single = jax.tree.map(lambda v: v.astype(np.complex64 if np.iscomplexobj(v) else np.float32), made)
    for mode, degree in (("exact", None), ("pb", 3)):

        @jax.jit
        def stepped(x, made, mode=mode, degree=degree):
            token = lambda s, x_bd: liquid_s4.step(x_bd, made, s, mode=mode, degree=degree)[::-1]  # noqa: E731
            state = State(jnp.zeros((1, 3, 4), jnp.complex64), jnp.zeros((1, (degree or 1) - 1, 3)))
            return jnp.moveaxis(jax.lax.scan(token, state, jnp.moveaxis(x, 1, 0))[1], 0, 1)

        y, _ = run(mode, degree, "parallel", jnp.asarray(x, jnp.float32), single)
        with jax.enable_x64(True):
            reference = exact_loop(x, made, 0)[0] if mode == "exact" else run("pb", 3, "recurrent", x, made)[0]
        assert error(y, reference) < 2e-6 * 10_000**0.5
        assert error(stepped(jnp.asarray(x, jnp.float32), single), reference) < 2e-6 * 10_000**0.5


@pytest.mark.parametrize("A_real", [True, False])
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_strong_decay_and_real_eigenvalues(rng, rule, A_real):
    """dt A = -300 beside -3e-4: values against the loop, finite gradients."""
    x, A = rng.normal(size=(1, 65, 1)).astype(np.float32), np.array([[-3000.0, -0.003, -1.0]], np.float32)
    A = A if A_real else A + np.complex64(2j)
    dt, D = np.array([0.1], np.float32), np.ones(1, np.float32)

    for form in EXACT:

        def loss(A, form=form):
            made = discrete(A, jnp.ones_like(A), jnp.ones_like(A), jnp.asarray(D), jnp.asarray(dt), rule=rule)
            y, _ = liquid_s4.run("exact", None, form, jnp.asarray(x), made, None, None)
            return (y**2).sum(), (y, made)

        gradient, (y, made) = jax.jit(jax.grad(loss, has_aux=True))(A)
        double = jax.tree.map(lambda v: np.asarray(v).astype(np.result_type(v.dtype, float)), made)
        assert error(y, exact_loop(x.astype(float), double, 0)[0]) < 2e-6 * 65**0.5
        assert np.isfinite(gradient).all()


def layer(**fields):
    return LiquidS4(**dict(width=4, state_size=8) | fields)


@functools.cache
def initialised(module):
    return jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 4, module.width)))


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(module, *arguments, **named):
    return module.apply(*arguments, **named)


@pytest.mark.parametrize("mode", ["exact", "kb", "pb"])
def test_layer_steps_as_it_reads_a_sequence(rng, mode):
    """From the module's own first state; the mode and degree of the layer reach what it calls."""
    x = jnp.asarray(rng.normal(size=(2, 12, 4)), jnp.float32)
    degree = None if mode == "exact" else 3
    module = layer(mode=mode, degree=degree)
    parameters, state = initialised(module), module.initial_state(2)
    y, last = apply(module, parameters, x)
    wanted, _ = run(mode, degree, "recurrent", x, apply(module, parameters, method="system"))
    assert error(y, wanted) < 2e-6 * 12**0.5
    for t in range(12):
        y_t, state = apply(module, parameters, x[:, t], state, method="step")
        assert error(y_t, y[:, t]) < 2e-6 * 12**0.5
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, last)
    assert error(state.h_bdn, last.h_bdn) < 2e-6 * 12**0.5


def test_layer_starts_as_s4d_and_with_degree_two(rng):
    """kb and pb read, of quiet input, what S4D reads; and 2 is the degree that is not said."""
    x = jnp.asarray(rng.normal(size=(2, 12, 4)), jnp.float32)
    pb = layer()
    parameters = initialised(pb)
    linear, _ = run("pb", 2, "parallel", 1e-4 * x, apply(pb, parameters, method="system"))
    for mode in ("exact", "kb", "pb"):
        assert error(apply(layer(mode=mode), parameters, 1e-4 * x)[0], linear) < 1e-3
    assert (apply(pb, parameters, x)[0] == apply(layer(degree=2), parameters, x)[0]).all()
    assert error(apply(layer(degree=3), parameters, x)[0], apply(pb, parameters, x)[0]) > 1e-7


def test_bfloat16_activations_and_float32_states(rng):
    x = jnp.asarray(rng.normal(size=(2, 33, 4)), jnp.bfloat16)
    for mode in ("exact", "kb", "pb"):
        module = layer(mode=mode)
        y, state = apply(module, initialised(module), x)
        exact, _ = apply(module, initialised(module), x.astype(jnp.float32))
        assert [v.dtype for v in (y, *state)] == [jnp.bfloat16, jnp.complex64, jnp.float32]
        assert error(y.astype(jnp.float32), exact) < 8e-3


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(mode="kbb"), "unknown mode 'kbb'; did you mean 'kb'"),
        (dict(degree=1), "degree is 1; it must be at least 2"),
        (dict(mode="exact", degree=3), "degree is 3, but mode 'exact' has every degree"),
        (dict(mode="exact", form="chunked"), "unknown form 'chunked'. Allowed: auto, parallel, recurrent"),
        (dict(form="parallle"), "unknown form 'parallle'; did you mean 'parallel'"),
        (dict(bidirectional=True), "bidirectional is not for liquid_s4"),
        (dict(rule="exponential_trapezoidal"), "rule 'exponential_trapezoidal' is not one that liquid_s4 can take"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer(**fields).init, jax.random.key(0), jnp.zeros((1, 4, 4)))


def test_a_convolution_cannot_forget():
    module = layer(form="parallel")
    with pytest.raises(ValueError, match="form 'parallel' cannot take segment_ids"):
        apply(module, initialised(module), jnp.zeros((1, 4, 4)), segment_ids=jnp.zeros((1, 4), int))
