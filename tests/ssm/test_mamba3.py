"""Mamba-3 against float64 loops of its equations, complex systems, Mamba-2, closed forms; and every ablation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.rotation import summed_angle
from ssm.mixers import mamba2, mixer
from ssm.mixers.mamba3 import State, chunked, recurrent, step
from tests.oracles import assert_close

FORMS = [recurrent, chunked]
NAMES = ("v", "B", "C", "dt", "A", "weight", "angle", "D", "state")
CASES = {  # lanes, heads, groups, planes that turn, layout, arguments left out
    "siso": (None, 2, 1, 2, "pairs", ()),
    "mimo": (2, 2, 2, 1, "halves", ()),
    "euler": (None, 2, 2, 2, "pairs", ("weight",)),
    "still": (2, 2, 1, 0, "pairs", ("angle",)),
    "plain": (None, 2, 1, 0, "pairs", ("angle", "weight", "D", "state")),
}


def draw(rng, case, length, batch=2, p=2, n=4):
    """Arguments with decays from 1 down to e^-300, and large angles."""
    r, h, g, s, layout, without = CASES[case]
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    dt = np.exp(normal(batch, length, h))
    z = rng.choice([0.0, -1e-3, -0.3, -3.0, -300.0], size=dt.shape, p=[0.2, 0.3, 0.3, 0.15, 0.05])
    state = State(normal(batch, h, s), normal(batch, h, p, n), normal(batch, r or 1, h, n), normal(batch, r or 1, h, p))
    tokens = (batch, length) if r is None else (batch, length, r)
    values = normal(*tokens, h, p), normal(*tokens, g, n), normal(*tokens, g, n), dt, z / dt, rng.uniform(size=dt.shape)
    values += 3 * normal(batch, length, h, s), normal(h), state
    arguments = [None if name in without else value for name, value in zip(NAMES, values, strict=True)]
    return jax.tree.map(jnp.asarray, arguments), layout


def turn(angles, n, layout):
    """The n x n matrix that turns the planes by the angles."""
    R = np.eye(n)
    for i, a in enumerate(angles):
        one, two = (2 * i, 2 * i + 1) if layout == "pairs" else (i, i + n // 2)
        R[[one, one, two, two], [one, two, one, two]] = np.cos(a), -np.sin(a), np.sin(a), np.cos(a)
    return R


def loop(arguments, layout, starts=()):
    """Steps 1 to 6 for one row after another, one head after another: (y, state)."""
    v, B, C, dt, A, weight, angle, D, state = jax.tree.map(np.asarray, arguments)
    siso = v.ndim == 4
    v, B, C = (x[:, :, None] if siso else x for x in (v, B, C))
    b, l, r, h, p = v.shape
    g, n = B.shape[-2:]
    weight = np.ones((b, l, h)) if weight is None else weight
    angle = np.zeros((b, l, h, 0)) if angle is None else angle
    shapes = (b, h, angle.shape[-1]), (b, h, p, n), (b, r, h, n), (b, r, h, p)
    state = [np.zeros(s) for s in shapes] if state is None else [np.array(x) for x in state]
    phi, S, k_last, v_last = state
    y = np.zeros(v.shape)
    for i, j in np.ndindex(b, h):
        for t in range(l):
            if t in starts:
                phi[i, j], S[i, j], k_last[i, :, j], v_last[i, :, j] = 0, 0, 0, 0
            phi[i, j] += angle[i, t, j]
            R = turn(phi[i, j], n, layout)
            k, q = B[i, t, :, j // (h // g)] @ R.T, C[i, t, :, j // (h // g)] @ R.T
            d, w = dt[i, t, j], weight[i, t, j]
            alpha = np.exp(A[i, t, j] * d)
            S[i, j] = alpha * S[i, j] + (1 - w) * d * alpha * v_last[i, :, j].T @ k_last[i, :, j]
            S[i, j] += w * d * v[i, t, :, j].T @ k
            y[i, t, :, j] = q @ S[i, j].T + (0 if D is None else D[j]) * v[i, t, :, j]
            k_last[i, :, j], v_last[i, :, j] = k, v[i, t, :, j]
    return (y[:, :, 0] if siso else y), State(phi, S, k_last, v_last)


def assert_states_close(out, ref):
    assert np.abs(np.sin((np.asarray(out.angle_bhs) - ref.angle_bhs) / 2)).max(initial=0) < 1e-12
    for name in State._fields[1:]:
        assert_close(getattr(out, name), getattr(ref, name), label=name)


def ids(length):
    """Three documents, the second of one token; and the tokens at which two of them start."""
    starts = length // 3, length // 3 + 1
    row = sum(np.arange(length) >= start for start in starts).astype(int)
    return jnp.asarray(np.stack([row, row])), starts


LENGTHS = [(case, length, False) for case in ("siso", "mimo") for length in (1, 63, 64)] + [("siso", 1000, False)]
PACKED = [(case, 65, True) for case in CASES] + [("mimo", 1000, True)]


@pytest.mark.parametrize(("case", "length", "packed"), LENGTHS + PACKED)
def test_every_form_is_the_loop_with_one_gradient(case, length, packed, x64, rng):
    arguments, layout = draw(rng, case, length)
    segments, starts = ids(length) if packed else (None, ())
    expected_y, expected = loop(arguments, layout, starts)

    def loss(arguments, form):
        y, state = form(*arguments, layout=layout, segment_ids=segments)
        return sum(jnp.sum(jnp.sin(x)) for x in (y, *state)), (y, state)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    grads = []
    for form in FORMS:
        (_, (y, state)), grad = run(arguments, form)
        assert_close(y, expected_y, label=form.__name__)
        assert_states_close(state, expected)
        grads.append(jax.tree_util.tree_leaves_with_path(grad))
    for (path, out), (_, ref) in zip(*grads, strict=True):
        assert_close(out, ref, gradient=True, label=NAMES[path[0].idx] + jax.tree_util.keystr(path[1:]))


@pytest.mark.parametrize("case", ["siso", "mimo"])
def test_steps_are_the_loop(case, x64, rng):
    arguments, layout = draw(rng, case, 9)
    *tokens, D, state = arguments
    expected_y, expected = loop(arguments, layout)
    advance = jax.jit(lambda token, state: step(*token, D, state, layout=layout))
    for t in range(9):
        y, state = advance([x[:, t] for x in tokens], state)
        assert_close(y, expected_y[:, t])
    assert_states_close(state, expected)


@pytest.mark.parametrize("case", ["siso", "mimo"])
@pytest.mark.parametrize("form", [recurrent, partial(chunked, chunk_size=4)])
def test_documents_do_not_see_each_other(form, case, rng):
    """To the bit: no gradient from one to the other; nor does a later token change y, as it would by a rounding if
    the state held already what the next token takes of this one, and y gave it back."""
    arguments, layout = draw(rng, case, 12)
    arguments = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    segments = jnp.asarray([[0] * 5 + [1] * 7] * 2)

    def late(arguments):
        y, state = form(*arguments, layout=layout, segment_ids=segments)
        return sum(jnp.sum(jnp.sin(x)) for x in (y[:, 5:], *state))

    *tokens, _, state = jax.jit(jax.grad(late))(arguments)
    for name, g in zip(NAMES, tokens, strict=False):
        assert not np.abs(g[:, :5]).any(), name
        assert np.abs(g[:, 5:]).any(), name
    assert not any(np.abs(g).any() for g in state)

    run = jax.jit(lambda arguments: form(*arguments, layout=layout)[0])
    changed = [x.at[:, 7:].multiply(0.7) for x in arguments[:7]]
    np.testing.assert_array_equal(run([*changed, *arguments[7:]])[:, :7], run(arguments)[:, :7])


@pytest.mark.parametrize("low", [-0.3, 0.0])
def test_angles_keep_their_digits_for_a_million_tokens(low, rng):
    """A float32 sum is 3e-3 and 8.5 radians off: the angles below 0 are what keeps its sum small."""
    angle = jnp.asarray(rng.uniform(low, 0.3, (1, 1_000_000, 1, 3)), jnp.float32)
    exact = np.cumsum(np.asarray(angle, np.float64), 1)
    out = np.asarray(jax.jit(summed_angle)(angle, jnp.zeros((1, 1, 3)), None), np.float64)
    assert np.abs(np.sin((out - exact) / 2)).max() < 1e-5
    assert np.abs(out).max() < 3.1416


def test_angles_of_a_document_are_those_of_it_alone(rng):
    """Bit for bit, wherever it stands, and in pieces within a rounding of the state."""
    angle, zero = jnp.asarray(rng.normal(size=(1, 300, 1, 3)), jnp.float32), jnp.zeros((1, 1, 3))
    run = jax.jit(summed_angle)
    reset = jnp.zeros((1, 300), bool).at[0, jnp.asarray([100, 101])].set(True)
    np.testing.assert_array_equal(run(angle, zero, reset)[:, 101:], run(angle[:, 101:], zero, None))
    pieces = run(angle[:, 100:], run(angle[:, :100], zero, None)[:, -1], None)
    assert np.abs(np.sin((pieces - run(angle, zero, None)[:, 100:]) / 2)).max() < 3e-7


def test_gradients_of_the_angle_are_those_of_a_sum(x64, rng):
    angle, weights = (jnp.asarray(rng.normal(size=(1, 20, 1, 3))) for _ in range(2))
    start, reset = jnp.asarray(rng.normal(size=(1, 1, 3))), jnp.zeros((1, 20), bool).at[0, 7].set(True)

    def plain(angle, start, reset):
        return jnp.concatenate([start[:, None] + jnp.cumsum(angle[:, :7], 1), jnp.cumsum(angle[:, 7:], 1)], 1)

    def grad(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(weights * jnp.sin(f(*a, reset))), argnums=(0, 1)))(angle, start)

    for out, ref in zip(grad(summed_angle), grad(plain), strict=True):
        assert_close(out, ref, gradient=True)


@pytest.mark.parametrize("form", FORMS)
def test_turning_is_a_complex_system(form, x64, rng):
    """h_t = e^{dt (A - i theta)} (h_{t-1} + (1 - w) dt b_{t-1} v_{t-1}) + w dt b_t v_t and y = Re conj(c) h, the pairs
    being (real, imaginary): the paper's system with -theta. Its last state is ours turned back by the last angle."""
    length, pairs = 65, 2
    (v, B, C, dt, A, weight, _, _, _), _ = draw(rng, "siso", length)
    theta = rng.normal(size=(2, length, 1, pairs))
    y, state = jax.jit(form)(v, B, C, dt, A, weight, dt[..., None] * theta)
    phi, last, *_ = (np.asarray(x) for x in state)
    v, B, C, dt, A, weight = (np.asarray(x) for x in (v, B, C, dt, A, weight))
    b, c, last = (x[..., ::2] + 1j * x[..., 1::2] for x in (B, C, last))
    h, before = np.zeros((2, 2, 2, pairs), complex), 0
    for t in range(length):
        d, w = (x[:, t, :, None, None] for x in (dt, weight))
        decay = np.exp(d * (A[:, t, :, None, None] - 1j * theta[:, t, :, None]))
        h, before = decay * (h + (1 - w) * d * before), v[:, t, :, :, None] * b[:, t, :, None]
        h += w * d * before
        assert_close(y[:, t], np.sum((c[:, t, :, None].conj() * h).real, -1), label=f"token {t}")
    assert_close(last * np.exp(-1j * phi[:, :, None]), h)


@pytest.mark.parametrize("form", FORMS)
def test_half_turns_count_parity_and_positive_decays_cannot(form, rng):
    """y_t = cos(pi (x_1 + ... + x_t)) from a state that holds 1. Without turns, each of a thousand real systems that
    reads the same bit all the time, h <- a h + b with a > 0, is monotone where parity alternates."""
    bits = rng.integers(0, 2, 1000)
    zeros, one = jnp.zeros((1, 1000, 1)), jnp.zeros((1, 1000, 1, 2)).at[..., 0].set(1)
    start = State(jnp.zeros((1, 1, 1)), one[:, :1], jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 1)))
    angle = jnp.asarray(np.pi * bits, jnp.float32).reshape(1, 1000, 1, 1)
    y, _ = jax.jit(form)(zeros[..., None], one, one, zeros, zeros, None, angle, None, start)
    np.testing.assert_allclose(y.ravel(), (-1.0) ** np.cumsum(bits), atol=1e-6)

    same = lambda *shape: jnp.broadcast_to(rng.normal(size=shape).astype(np.float32), (1, 12, *shape))  # noqa: E731
    dt, A = jnp.exp(same(1000)), -jnp.exp(same(1000) - 2)
    y, _ = jax.jit(form)(same(1000, 1), same(1000, 1), same(1000, 1), dt, A)
    moves = np.diff(y[0, ..., 0], axis=0)
    assert (np.abs(moves[0]) > 1e-3).sum() > 500
    assert (moves * np.sign(moves[:1]) > -1e-5 * np.abs(y).max(1)[0, :, 0]).all()


@pytest.mark.parametrize(("weight", "order"), [(0.5, 2), (0.3, 1), (None, 1)])
def test_order_of_convergence(weight, order, x64):
    """h' = (A - i theta) h + cos(t) from 0 to 1, of which Re h is read, by 16 and by 256 steps."""
    A, theta, errors = -0.7, 2.0, []
    z = A - 1j * theta
    exact = sum((np.exp(w) - np.exp(z)) / (w - z) / 2 for w in (1j, -1j)).real
    for steps in (16, 256):
        dt = jnp.full((1, steps, 1), 1 / steps)
        v, one = jnp.cos(jnp.cumsum(dt, 1))[..., None], jnp.zeros((1, steps, 1, 2)).at[..., 0].set(1)
        # The left end of the first step is the input at 0: the state's v, with a k that has not turned.
        start = State(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1, 2)), one[:, :1], jnp.ones((1, 1, 1, 1)))
        share = None if weight is None else jnp.full_like(dt, weight)
        y, _ = jax.jit(chunked)(v, one, one, dt, jnp.full_like(dt, A), share, theta * dt[..., None], None, start)
        errors.append(abs(y[0, -1, 0, 0] - exact))
    assert np.log2(errors[0] / errors[1]) / 4 == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_all_off_is_mamba2(form, x64, rng):
    """The recurrence with one A a head: of a float64 loop (dt x B^T, then C h + D x), and of Mamba-2's own function."""
    x, B, C, dt = (np.asarray(x) for x in draw(rng, "plain", 65)[0][:4])
    A, D, (segments, starts) = -np.exp(rng.normal(size=2)), rng.normal(size=2), ids(65)
    h, expected = np.zeros((2, 2, 2, 4)), np.zeros(x.shape)
    for t in range(65):
        h = (0 if t in starts else np.exp(dt[:, t] * A)[..., None, None]) * h
        h = h + np.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t, 0])
        expected[:, t] = np.einsum("bhpn,bn->bhp", h, C[:, t, 0]) + D[:, None] * x[:, t]
    x, B, C, dt, A, D = map(jnp.asarray, (x, B, C, dt, A, D))
    y, state = jax.jit(form)(x, B, C, dt, jnp.broadcast_to(A, dt.shape), D_h=D, segment_ids=segments)
    theirs = jax.jit(mamba2.recurrent)(x, dt, A, B, C, D, segment_ids=segments)
    for ref_y, ref_h in ((expected, h), theirs):
        assert_close(y, ref_y)
        assert_close(state.h_bhpn, ref_h)


def test_hundred_thousand_tokens(rng):
    """Float32 against the same arguments in float64, with a decay of 1e-4 a token and turns throughout."""
    length = 100_000
    normal = lambda *shape: rng.normal(size=(1, length, *shape)).astype(np.float32)  # noqa: E731
    dt = np.exp(0.3 * normal(1)) * 0.01
    arguments = normal(1, 1), normal(1, 2), normal(1, 2), dt, np.full_like(dt, -0.01), dt * 50, 3 * dt[..., None]
    y, state = jax.jit(chunked)(*map(jnp.asarray, arguments))
    with jax.enable_x64(True):
        ref, last = jax.jit(recurrent)(*(jnp.asarray(x, jnp.float64) for x in arguments))
    assert_close(y, ref, scale=length)
    assert_close(state.h_bhpn, last.h_bhpn, scale=length)


OFF = dict(trapezoid=False, rotation="none", BC_norm=False, BC_bias=False)
LAYERS = [
    dict(),
    dict(A_activation="softplus", A_floor=0.5, angle_activation="none", rope_fraction=1.0, groups=2),
    dict(rotation="fixed", trapezoid=False, output_norm=True),
    dict(A_activation="softplus", A_range=(0.001, 0.1)),
    dict(rotation="none", BC_norm=False),
    OFF,
    dict(mimo=True, rank=2, BC_bias=False),
    dict(mimo=True, rank=3, groups=2, output_norm=True, rope_fraction=1.0),
    dict(mimo=True, rank=2) | OFF,
]


def build(**options):
    return mixer("mamba3", 3, dict(state_size=8, head_size=2, expand=4, chunk_size=8) | options)


def layer_loop(params, m, x):
    """The whole layer in float64, from its parameters: 6 heads of 2, states of 8."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    sigmoid, softplus = lambda x: 1 / (1 + np.exp(-x)), lambda x: np.log1p(np.exp(x))
    heavy = lambda x: np.where(x > 0, 1 + x, 1 / (1 + np.abs(x)))  # noqa: E731
    rms = lambda x: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5)  # noqa: E731
    (b, l, _), r, g = x.shape, m.rank, m.groups
    s = {"none": 0}.get(m.rotation, {0.5: 2, 1.0: 4}[m.rope_fraction])
    sizes = 12, 12, 8 * r * g, 8 * r * g, 6, 6, 6 * m.trapezoid, s * (m.rotation == "data")
    assert params["in_proj"]["kernel"].shape[1] == sum(sizes)
    z, v, B, C, dt, A, weight, theta = np.split(x @ params["in_proj"]["kernel"], np.cumsum(sizes)[:-1], -1)
    dt = softplus(dt + params["dt_bias"])
    A = A + params.get("A_bias", 0)
    A = -np.maximum((heavy if m.A_activation == "heavy_tail" else softplus)(A), m.A_floor)
    keys = []
    for name, key in (("B", B), ("C", C)):
        key = key.reshape(b, l, r, g, 8)
        if m.BC_norm:
            key = rms(key) * params[f"{name}_norm"]["scale"]
        key = key.repeat(6 // g, 3)
        keys.append(key + np.swapaxes(params[f"{name}_bias"], 0, 1) if m.BC_bias else key)
    theta = np.pi * np.tanh(theta) if m.angle_activation == "tanh" else theta
    angle = dt[..., None] * theta[:, :, None]
    if m.rotation != "data":
        angle = np.broadcast_to(1e4 ** -(np.arange(s) / max(s, 1)), (b, l, 6, s))
    lanes = {name: np.swapaxes(params[name], 0, 1) if m.mimo else 1 for name in ("mimo_x", "mimo_z", "mimo_o")}
    z, v = (x.reshape(b, l, 1, 6, 2) for x in (z, v))
    v, z = v * lanes["mimo_x"], z * lanes["mimo_z"]
    arguments = v, *keys, dt, A, sigmoid(weight) if m.trapezoid else None, angle, params["D"], None
    y, state = loop(arguments, "halves" if m.mimo else "pairs")
    y = rms(y) * params["norm"]["scale"].reshape(6, 2) if m.output_norm else y
    y = (y * z * sigmoid(z) * lanes["mimo_o"]).sum(2)
    return y.reshape(b, l, 12) @ params["out_proj"]["kernel"], state


@pytest.mark.parametrize("options", LAYERS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_layer_is_its_equations(options, rng):
    """Every ingredient, on and off, with random parameters."""
    module = build(**options)
    x = jnp.asarray(rng.normal(size=(2, 20, 3)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    params = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), shapes)["params"]
    expected, last = layer_loop(params, module, np.asarray(x, np.float64))
    y, state = jax.jit(module.apply)({"params": params}, x)
    assert_close(y, expected, scale=100)
    for name in State._fields[1:]:
        assert_close(getattr(state, name), getattr(last, name), scale=100, label=name)
    step = jax.jit(lambda x, state: module.apply({"params": params}, x, state, method="step"))
    y, stepped = step(x[:, 0], module.initial_state(2))
    assert_close(y, expected[:, 0], scale=100)
    assert jax.tree.map(jnp.shape, stepped) == jax.tree.map(jnp.shape, state)


def test_bfloat16(rng):
    """MIMO in bfloat16 is the same layer on rounded activations; its states stay float32."""
    module = build(mimo=True, rank=2)
    x = jnp.asarray(rng.normal(size=(2, 33, 3)), jnp.bfloat16)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    y, state = jax.jit(module.apply)(variables, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert_close(y, jax.jit(module.apply)(variables, x.astype(jnp.float32))[0])


def test_the_start():
    """dt log-uniform in [dt_min, dt_max], from dt_floor on, -A in A_range; biases and D one; R lanes that share x."""
    remembers = dict(A_activation="softplus", A_range=(0.001, 0.1))
    module = mixer("mamba3", 64, dict(head_size=1, state_size=4, mimo=True, rank=2, dt_floor=0.01) | remembers)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    dt, A = (np.log1p(np.exp(np.asarray(params[name], np.float64))) for name in ("dt_bias", "A_bias"))
    assert dt.min() == pytest.approx(0.01, rel=1e-4)
    assert 0.08 < dt.max() < 0.1001
    assert 0.001 <= A.min() < 0.0015 and 0.07 < A.max() <= 0.1 and np.median(A) == pytest.approx(0.01, rel=0.3)
    for name, value in dict(B_bias=1, C_bias=1, D=1, mimo_x=0.5, mimo_z=1, mimo_o=0.5).items():
        assert (params[name] == value).all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rotation="rope"), "unknown rotation 'rope'; did you mean 'none'"),
        (dict(A_activation="heavytail"), "unknown A_activation 'heavytail'; did you mean 'heavy_tail'"),
        (dict(A_range=(0.001, 0.1)), r"A_range is \(0.001, 0.1\); it needs A_activation softplus"),
        (dict(A_range=(0.1, 0.01), A_activation="softplus"), "must be .low, high. with 0 < low <= high"),
        (dict(form="parallel"), "unknown form 'parallel'"),
        (dict(rank=4), "rank is 4; it must be 1 without mimo"),
        (dict(rank=0, mimo=True), "rank is 0; it must be at least 1"),
        (dict(head_size=5), "head_size is 5; it must divide expand x width, which is 12"),
        (dict(groups=4), "groups is 4; it must divide the 6 heads"),
        (dict(rope_fraction=0.25), "rope_fraction is 0.25; it must be 0.5 or 1.0"),
        (dict(state_size=2), "state_size is 2; where 0.5 of it turns it must be a multiple of 2, at least 4"),
        (dict(chunk_size=0), "chunk_size is 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build(**options).init, jax.random.key(0), jnp.zeros((1, 2, 3)))


def test_a_state_or_layout_that_does_not_fit_is_named(rng):
    module, x = build(), jnp.zeros((2, 3, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"state.k_brhn has shape \(2, 2, 6, 8\); this layer and batch have"):
        jax.eval_shape(module.apply, variables, x, build(mimo=True, rank=2).initial_state(2))
    tokens = draw(rng, "siso", 3)[0][:7]
    with pytest.raises(ValueError, match="unknown layout 'pair'; did you mean 'pairs'"):
        recurrent(*tokens, layout="pair")
    with pytest.raises(ValueError, match="3 angles for 4 states"):
        recurrent(*tokens[:6], jnp.zeros((2, 3, 2, 3)))
