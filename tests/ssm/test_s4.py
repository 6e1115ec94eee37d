"""S4 in every form against a dense NumPy loop over all N states, in float64; then the layer."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm import hippo
from ssm.mixers import s4
from ssm.mixers.s4 import S4, State

WEIGHT = {"bilinear": 0.5, "generalized_bilinear": 0.3, "forward_euler": 0.0, "backward_euler": 1.0}
MEASURES = ("legs", "legt", "lagt", "fout")
FORMS = ("recurrent", "parallel")
LENGTH = 64  # that of the truncated C


def error(out, reference):
    return np.linalg.norm(np.asarray(out) - np.asarray(reference)) / np.linalg.norm(np.asarray(reference))


class Continuous(NamedTuple):
    """C and C_reverse not yet truncated."""

    Lambda: np.ndarray
    P: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    dt: np.ndarray
    C_reverse: np.ndarray


def continuous(rng, measure="legs", N=8, dt=(0.02, 0.1, 0.05)):
    """Near a measure's system, without what is special in it, such as a real B."""
    Lambda, P, B, _ = hippo.dplr(measure, N)
    noise = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)  # noqa: E731
    d, n = len(dt), N // 2
    Lambda = np.tile(np.minimum(Lambda.real, -0.01) + 1j * Lambda.imag, (d, 1))
    P = P.T * (1 + 0.1 * noise(d, P.shape[1], n))
    return Continuous(Lambda, P, B + 0.1 * noise(d, n), noise(d, n), rng.normal(size=d), np.array(dt), noise(d, n))


def options(rule):
    return dict(rule=rule, weight=0.3 if rule == "generalized_bilinear" else None)


def system(continuous, rule="bilinear", length=LENGTH, tokens=1, bidirectional=False):
    Lambda, P, B, C, D, dt, C_reverse = map(jnp.asarray, continuous)
    transition = s4.discrete_transition(Lambda, P, B, dt, **options(rule))
    C, C_reverse = jnp.unstack(s4.truncate(jnp.stack([C, C_reverse], 1), transition, length), axis=1)
    C_reverse = C_reverse if bidirectional else None
    return s4.discrete(Lambda, P, B, C, D, dt, length, tokens=tokens, C_reverse_dn=C_reverse, **options(rule))


@functools.partial(jax.jit, static_argnames=("form", "rule", "length", "bidirectional"))
def run(form, x, continuous, h=None, segment_ids=None, rule="bilinear", length=LENGTH, bidirectional=False):
    """(y, h) of a form; the truncation of C is part of it, so that gradients pass through."""
    state = None if h is None else State(h)
    made = system(continuous, rule, length, x.shape[1], bidirectional)
    y, state = s4.run(form, x, made, state, segment_ids, s4.FORMS)
    return y, state.h_bdn


def dense(continuous, rule="bilinear"):
    """(A_bar, B_bar) of every channel, (d, N, N) and (d, N), by NumPy's solve of the definition."""
    both = lambda x: np.concatenate([x, x.conj()], -1)  # noqa: E731
    pairs, w = [], WEIGHT[rule]
    for Lambda, P, B, dt in zip(*map(both, continuous[:3]), continuous.dt, strict=True):
        A, eye = np.diag(Lambda) - P.T @ P.conj(), np.eye(len(B))
        implicit = eye - w * dt * A
        pairs.append((np.linalg.solve(implicit, eye + (1 - w) * dt * A), np.linalg.solve(implicit, dt * B)))
    return tuple(np.stack(x) for x in zip(*pairs, strict=True))


def oracle(x, continuous, h=None, rule="bilinear"):
    """(y, kept half of the last h), token after token."""
    A_bar, B_bar = dense(continuous, rule)
    n = continuous.C.shape[1]
    h = np.zeros((len(x), *continuous.C.shape), complex) if h is None else h
    h, y = np.concatenate([h, h.conj()], -1), np.zeros_like(x)
    for t in range(x.shape[1]):
        h = np.einsum("dnm,bdm->bdn", A_bar, h) + B_bar * x[:, t, :, None]
        y[:, t] = 2 * np.einsum("dn,bdn->bd", continuous.C, h[..., :n]).real + continuous.D * x[:, t]
    return y, h[..., :n]


def state_of(rng, b=2, d=3, n=4):
    return rng.normal(size=(b, d, n)) + 1j * rng.normal(size=(b, d, n))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("measure", MEASURES)
def test_forms_equal_the_dense_loop(x64, rng, measure, form):
    """Every rule, one of them with rank 2; an odd length below the configured one; a state carried in and out."""
    x, h, parameters = rng.normal(size=(2, 63, 3)), state_of(rng), continuous(rng, measure)
    for rule in {"legs": WEIGHT, "legt": ("bilinear", "generalized_bilinear")}.get(measure, ("bilinear",)):
        y, last = run(form, x, parameters, h, rule=rule)
        for got, wanted in zip((y, last), oracle(x, parameters, h, rule), strict=True):
            assert error(got, wanted) < 1e-12, rule


@pytest.mark.parametrize("length, tokens", [(64, 1), (64, 64), (64, 65), (64, 200), (1, 1), (1, 65)])
def test_lengths_around_the_configured_one(x64, rng, length, tokens):
    """Shorter input cuts the kernel, longer doubles C's length until it suffices: fails for one doubling too few.

    With length 1, I - A_bar is as small as dt A: its inverse costs a digit of what the recurrence reads.
    """
    x, parameters = rng.normal(size=(2, tokens, 3)), continuous(rng)
    wanted = oracle(x, parameters)
    for form in FORMS:
        for got, reference in zip(run(form, x, parameters, length=length), wanted, strict=True):
            assert error(got, reference) < (1e-11 if length == 1 else 1e-12), form


@pytest.mark.parametrize("measure, rule", [("legs", "bilinear"), ("legt", "generalized_bilinear")])
def test_gradients_of_the_forms_agree(x64, rng, measure, rule):
    """Of y and the last state, with respect to every parameter, the input and the first state, doubling included."""
    arguments = rng.normal(size=(2, 65, 3)), continuous(rng, measure), state_of(rng)
    y_bar, h_bar = rng.normal(size=(2, 65, 3)), state_of(rng)

    def value(form, *arguments):
        y, h = run(form, *arguments, rule=rule)
        return (y * y_bar).sum() + (h * h_bar).real.sum()

    wanted, got = (jax.jit(jax.grad(functools.partial(value, f), (0, 1, 2)))(*arguments) for f in FORMS)
    for x, y in zip((got[0], *got[1][:-1], got[2]), (wanted[0], *wanted[1][:-1], wanted[2]), strict=True):
        assert error(x, y) < 4e-12


@pytest.mark.parametrize("form", FORMS)
def test_split_in_two_with_the_state_carried(x64, rng, form):
    x, h, parameters = rng.normal(size=(2, 65, 3)), state_of(rng), continuous(rng)
    y, last = run(form, x, parameters, h)
    first, between = run(form, x[:, :40], parameters, h)
    second, end = run(form, x[:, 40:], parameters, between)
    assert max(error(np.concatenate([first, second], 1), y), error(end, last)) < 1e-12


def kernel(A_bar, B_bar, C, length):
    """2 Re C A_bar^j B_bar of every channel, (d, l), by powers of the dense transition."""
    n, K, h = C.shape[1], [], B_bar
    for _ in range(length):
        K.append(2 * (C * h[:, :n]).sum(-1).real)
        h = np.einsum("dnm,dm->dn", A_bar, h)
    return np.stack(K, 1)


@pytest.mark.parametrize("tokens", [1, 20, 65])
def test_bidirectional_equals_a_double_loop(x64, rng, tokens):
    """The second kernel reads strictly the tokens to come: fails where the present is in both."""
    x, parameters = rng.normal(size=(2, tokens, 3)), continuous(rng)
    matrices = dense(parameters)
    K, K_reverse = (kernel(*matrices, C, tokens) for C in (parameters.C, parameters.C_reverse))
    y = parameters.D * x
    for t in range(tokens):
        for s in range(tokens):
            y[:, t] += x[:, s] * (K[:, t - s] if s <= t else K_reverse[:, s - t - 1])
    for form in FORMS:
        assert error(run(form, x, parameters, bidirectional=True)[0], y) < 1e-12, form


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_equals_separate(x64, rng, bidirectional):
    """Rows packed at different places; the first segment continues the state, the last one makes the new one."""
    x, h, parameters = rng.normal(size=(2, 20, 3)), state_of(rng), continuous(rng)
    ids = np.array([[0] * 7 + [1] * 1 + [2] * 12, [5] * 12 + [3] * 8])
    call = functools.partial(run, "recurrent", continuous=parameters, bidirectional=bidirectional)
    y, last = call(x, h=None if bidirectional else h, segment_ids=ids)
    for row, cuts in enumerate([(0, 7, 8, 20), (0, 12, 20)]):
        for start, stop in zip(cuts, cuts[1:], strict=False):
            carried = None if bidirectional or start else h[row : row + 1]
            alone, end = call(x[row : row + 1, start:stop], h=carried)
            assert error(y[row : row + 1, start:stop], alone) < 1e-12
        assert error(last[row : row + 1], end) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_vmap_and_no_jit(x64, rng, form):
    x, h, parameters = rng.normal(size=(2, 2, 5, 3)), np.stack([state_of(rng), state_of(rng)]), continuous(rng)
    several = jax.vmap(functools.partial(run, form), (0, None, 0))(x, parameters, h)
    made = jax.jit(system)(parameters)
    with jax.disable_jit():
        y, state = s4.FORMS[form](jnp.asarray(x[1]), made, State(jnp.asarray(h[1])))
    assert error(several[0][1], y) < 1e-13
    assert error(several[1][1], state.h_bdn) < 1e-13


@pytest.mark.parametrize("form", FORMS)
def test_causality_by_gradient(x64, rng, form):
    """dy_t/dx_s is 0 for s > t; and of the second kernel alone, with C and D at 0, for s <= t."""
    x, parameters = rng.normal(size=(1, 9, 3)), continuous(rng)

    def jacobian(parameters):
        of_x = jax.jacrev(lambda x: run(form, x, parameters, bidirectional=parameters.C is zero)[0][0, :, 1])
        return np.abs(np.asarray(of_x(x)[:, 0, :, 1]))

    zero = np.zeros_like(parameters.C)
    forward, later = jacobian(parameters), jacobian(parameters._replace(C=zero, D=np.zeros(3)))
    lower = np.tril(np.ones((9, 9), bool))
    assert forward[~lower].max() < 1e-14 < 1e-4 < forward[lower].min()
    assert later[lower].max() < 1e-14 < 1e-4 < later[~lower].min()


def in_single(parameters):
    return jax.tree.map(lambda x: x.astype("F" if np.iscomplexobj(x) else "f"), parameters)


def test_step_agrees_with_parallel_over_ten_thousand_steps(rng):
    """In float32, against float64; the kernel is doubled eight times from the length that C was truncated for."""
    parameters, x = in_single(continuous(rng, dt=(0.002, 0.1, 0.01))), rng.normal(size=(1, 12_000, 3))
    reference, last = oracle(x, parameters)
    x = jnp.asarray(x, jnp.float32)

    @jax.jit
    def stepped(x):
        made, h = system(parameters), jnp.zeros((1, 3, 4), jnp.complex64)
        state, y = jax.lax.scan(lambda s, x_bd: s4.step(x_bd, made, s)[::-1], State(h), jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(y, 0, 1), state.h_bdn

    for y, h in (stepped(x), run("parallel", x, parameters)):
        assert max(error(y, reference), error(h, last)) < 2e-6 * 12_000**0.5


@pytest.mark.parametrize("rule", ["bilinear", "backward_euler"])
@pytest.mark.parametrize("form", FORMS)
def test_dt_A_down_to_minus_300(rng, form, rule):
    """In float32, in value against float64, and in finite gradients."""
    parameters = continuous(rng)
    parameters.Lambda.real[:, 0] = -300 / parameters.dt
    parameters.Lambda.real[:, 1] = -1e-2
    parameters, x = in_single(parameters), rng.normal(size=(1, 65, 3)).astype(np.float32)

    def loss(x, parameters):
        y, _ = run(form, x, parameters, rule=rule)
        return (y**2).sum(), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, parameters)
    assert error(y, oracle(x, parameters, rule=rule)[0]) < 2e-6 * 65**0.5
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


def test_every_transition_is_stable(x64, rng):
    """P on both sides: fails for Lambda - P Q^* with another Q, here P's conjugate."""
    for measure in MEASURES:
        parameters = continuous(rng, measure)
        Lambda, P, B = map(jnp.asarray, parameters[:3])
        P = 5 * P * jnp.asarray(1 + rng.normal(size=P.shape) + 0j)
        real = s4.dense(s4.discrete_transition(Lambda, P, B, jnp.asarray(parameters.dt)))
        assert np.abs(np.linalg.eigvals(real)).max() < 1


def layer(**fields):
    return S4(**dict(width=4, state_size=8, length=32) | fields)


@functools.cache
def initialised(module):
    return jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 4, module.width)))


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(module, *arguments, **named):
    return module.apply(*arguments, **named)


def test_layer_steps_as_it_reads_a_sequence(rng):
    """Prompt in one piece, then token by token."""
    x = jnp.asarray(rng.normal(size=(2, 40, 4)), jnp.float32)
    module = layer()
    parameters = initialised(module)
    y, last = apply(module, parameters, x)
    prompt, state = apply(module, parameters, x[:, :25], module.initial_state(2))
    pieces = [prompt]
    for t in range(25, 40):
        y_t, state = apply(module, parameters, x[:, t], state, method="step")
        pieces.append(y_t[:, None])
    assert max(error(np.concatenate(pieces, 1), y), error(state.h_bdn, last.h_bdn)) < 2e-6 * 40**0.5


def test_layer_is_the_oracle_in_float32(rng):
    """Every measure and both directions of parameters: exp of log_dt and A_log, copies told to their channels."""
    x = rng.normal(size=(2, 50, 4)).astype(np.float32)
    for measure in MEASURES:
        module = layer(A_init=measure, copies=2, length=64)
        parameters = initialised(module)
        kept = jax.tree.map(np.asarray, parameters["params"])
        number = {name: kept[name]["real"] + 1j * kept[name]["imag"] for name in ("P", "B", "C")}
        Lambda, P, B = (np.tile(v, (2,) + (1,) * (v.ndim - 1)) for v in (
            -np.exp(kept["A_log"]) + 1j * kept["A_imag"], number["P"], number["B"]))  # fmt: skip
        made = Continuous(Lambda, P, B, number["C"], kept["D"], np.exp(kept["log_dt"]), None)
        A_bar, _ = dense(made)
        left = np.eye(8) - np.linalg.matrix_power(A_bar, 64)
        row = np.concatenate([made.C, made.C.conj()], -1)
        made = made._replace(C=np.linalg.solve(np.swapaxes(left, 1, 2), row[..., None])[:, :4, 0])
        assert error(apply(module, parameters, x)[0], oracle(x, made)[0]) < 2e-6 * 50**0.5, measure


def test_state_is_the_measures_online_memory(rng):
    """h = V^* x with x' = A x + B u of HiPPO-LegS: fails for a transposed or conjugated P or B."""
    u, dt = rng.normal(size=30), 0.05
    A, B = hippo.measure("legs", 8)
    implicit, x = np.eye(8) - dt / 2 * A, np.zeros(8)
    for u_t in u:
        x = np.linalg.solve(implicit, (np.eye(8) + dt / 2 * A) @ x + dt * B * u_t)
    module = layer(width=1, dt_min=dt, dt_max=dt)
    _, state = apply(module, initialised(module), jnp.asarray(u, jnp.float32)[None, :, None])
    assert error(state.h_bdn[0, 0], hippo.dplr("legs", 8).V.conj().T @ x) < 2e-6 * 30**0.5


def test_C_starts_as_a_draw_that_no_length_changes():
    """Truncated for 16 or 256 tokens, the recurrence reads the same C, of variance 1: the round trip."""
    c = []
    for length in (16, 256):
        module = layer(width=64, length=length, bidirectional=True)
        made = apply(module, initialised(module), method="system")
        c.append(np.stack([made.c_dn, made.c_reverse_dn]) / 2)
    assert error(c[0], c[1]) < 1e-4  # of length 16, I - A_bar^L is as small as 16 dt, from 0.016
    assert abs(np.mean(np.abs(c[1]) ** 2) - 1) < 0.15
    assert abs(np.vdot(*c[1])) < 0.15 * c[1][0].size


def test_copies_are_shared_by_their_channels_alone(rng):
    """The first of two copies moves channels 0 and 2 of four; None gives every channel its own."""
    x = jnp.asarray(rng.normal(size=(1, 16, 4)), jnp.float32)
    module = layer(copies=2)
    parameters = initialised(module)

    def energy(imag):
        moved = {"params": parameters["params"] | {"A_imag": imag}}
        return (apply(module, moved, x)[0] ** 2).sum((0, 1))

    jacobian = jax.jacrev(energy)(parameters["params"]["A_imag"])
    assert ((np.abs(jacobian).sum(-1) > 0) == np.array([[1, 0], [0, 1], [1, 0], [0, 1]], bool)).all()
    assert initialised(layer(copies=None))["params"]["P"]["real"].shape == (4, 1, 4)
    assert initialised(layer(copies=1, A_init="legt"))["params"]["P"]["real"].shape == (1, 2, 4)


def test_training_makes_no_dense_matrix():
    """Of width 4 and 32 states: what only the new state or the recurrence needs is not compiled."""
    module, x = layer(state_size=32, length=128), jnp.zeros((1, 128, 4))
    compiled = lambda f: jax.jit(f).lower(initialised(module), x).compile().as_text()  # noqa: E731
    assert "[4,32,32]" in compiled(lambda p, x: module.apply(p, x))
    assert "[4,32,32]" not in compiled(jax.grad(lambda p, x: module.apply(p, x)[0].sum()))


def test_bfloat16_activations_and_float32_states(rng):
    x = jnp.asarray(rng.normal(size=(2, 33, 4)), jnp.bfloat16)
    for form in FORMS:
        module = layer(form=form)
        y, state = apply(module, initialised(module), x)
        exact, _ = apply(module, initialised(module), x.astype(jnp.float32))
        assert (y.dtype, state.h_bdn.dtype) == (jnp.bfloat16, jnp.complex64)
        assert error(y.astype(jnp.float32), exact) < 8e-3


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(copies=3), "copies is 3; it must be a divisor of width, which is 4"),
        (dict(length=None), "length is None; s4 needs that of its training sequences, at least 1 token"),
        (dict(rule="zoh"), "rule 'zoh' is not one that s4 can take. Allowed: bilinear, generalized_bilinear"),
        (dict(rule="bilinaer"), "unknown rule 'bilinaer'; did you mean 'bilinear'"),
        (dict(weight=0.3), "weight is fixed by rule 'bilinear'"),
        (dict(A_init="fut"), "unknown measure 'fut'; did you mean 'fout'"),
        (dict(form="paralel"), "unknown form 'paralel'; did you mean 'parallel'"),
        (dict(state_size=7), "state_size must be even and positive, for conjugate pairs; got 7"),
        (dict(dt_min=0.2), "dt_min is 0.2 and dt_max is 0.1"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer(**fields).init, jax.random.key(0), jnp.zeros((1, 4, 4)))


def test_wrong_calls_are_named():
    x, ids = jnp.zeros((1, 4, 4)), jnp.zeros((1, 4), int)
    module = layer(bidirectional=True)
    with pytest.raises(ValueError, match="state was given to a bidirectional mixer"):
        apply(module, initialised(module), x, module.initial_state(1))
    module = layer(form="parallel")
    with pytest.raises(ValueError, match="form 'parallel' cannot take segment_ids"):
        apply(module, initialised(module), x, segment_ids=ids)
    made = apply(module, initialised(module), method="system")
    with pytest.raises(ValueError, match="x has 33 tokens and the system's kernel 32; make it with tokens=33"):
        s4.parallel(jnp.zeros((1, 33, 4)), made)


def test_segments_choose_the_recurrence(rng):
    """form "auto" with segment_ids: the second half reads nothing of the first."""
    x = jnp.asarray(rng.normal(size=(1, 16, 4)), jnp.float32)
    module = layer()
    y, _ = apply(module, initialised(module), x, segment_ids=jnp.arange(16)[None] // 8)
    assert error(y[:, 8:], apply(module, initialised(module), x[:, 8:])[0]) < 2e-6 * 8**0.5
