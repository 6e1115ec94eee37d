"""Gated DeltaNet against float64 loops and their adjoint: every form and gradient, reflections, parity, the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.mixers import gated_deltanet, mamba2, mixer
from tests.oracles import assert_close, relative

HEADS, GROUPS, P, N, K = 4, 2, 3, 5, 4
NAMES = ("q", "k", "v", "beta", "log decay", "initial state")


def each_head(keys):
    return np.repeat(keys, HEADS // keys.shape[2], 2)


def loop(q, k, v, beta, log_decay, h, starts=None):
    """h = e^log_decay h (I - beta k k^T) + beta v k^T and y = h q, token after token: (y, last, decayed states)."""
    q, k, y, decayed = each_head(q), each_head(k), np.zeros(v.shape), []
    for t in range(v.shape[1]):
        decay = np.exp(log_decay[:, t]) * (1 if starts is None else ~starts[:, t, None])
        decayed.append(decay[..., None, None] * h)
        transition = np.eye(N) - beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None]
        h = decayed[-1] @ transition + (beta[:, t, :, None] * v[:, t])[..., None] * k[:, t, :, None]
        y[:, t] = np.einsum("bhpn,bhn->bhp", h, q[:, t])
    return y, h, decayed


def adjoint(q, k, v, beta, log_decay, h, y_bar, last_bar, starts):
    """Gradients of sum(y_bar y) + sum(last_bar last), token before token."""
    _, h, decayed = loop(q, k, v, beta, log_decay, h, starts)
    q_h, k_h, g = each_head(q), each_head(k), last_bar
    q_bar, k_bar, v_bar, beta_bar, log_bar = (np.zeros(x.shape) for x in (q_h, k_h, v, beta, log_decay))
    for t in range(v.shape[1] - 1, -1, -1):
        before, key, b = decayed[t], k_h[:, t], beta[:, t, :, None]
        error = v[:, t] - np.einsum("bhpn,bhn->bhp", before, key)
        after = before + (b * error)[..., None] * key[:, :, None]
        q_bar[:, t] = np.einsum("bhpn,bhp->bhn", after, y_bar[:, t])
        g = g + y_bar[:, t, ..., None] * q_h[:, t, :, None]
        along = np.einsum("bhpn,bhn->bhp", g, key)
        beta_bar[:, t] = np.sum(along * error, -1)
        v_bar[:, t] = b * along
        k_bar[:, t] = b * np.einsum("bhpn,bhp->bhn", g, error) - np.einsum("bhpn,bhp->bhn", before, b * along)
        g = g - (b * along)[..., None] * key[:, :, None]
        log_bar[:, t] = np.sum(g * before, (-2, -1))
        decay = np.exp(log_decay[:, t]) * ~starts[:, t, None]
        g = decay[..., None, None] * g
    grouped = lambda x: x.reshape(*x.shape[:2], q.shape[2], -1, N).sum(3)  # noqa: E731
    log_bar = np.where(starts[..., None], 0, log_bar)
    return grouped(q_bar), grouped(k_bar), v_bar, beta_bar, log_bar, g


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def problem(rng, length, batch=1):
    """Decays of 1, e^-300 and between; beta of 0, 1, 2 and between."""
    shape = (batch, length, HEADS)
    log_decay = -np.exp(rng.uniform(np.log(1e-4), np.log(3), size=shape))
    log_decay = np.where(rng.random(shape) < 0.3, rng.choice([0, 0, -300], size=shape), log_decay)
    beta = np.where(rng.random(shape) < 0.5, rng.choice([0, 1, 2], size=shape), 2 * rng.random(shape))
    q, k = rng.normal(size=(batch, length, GROUPS, N)), unit(rng.normal(size=(batch, length, GROUPS, N)))
    return [q, k, rng.normal(size=(*shape, P)), beta, log_decay, rng.normal(size=(batch, HEADS, P, N))]


def stepped(q, k, v, beta, log_decay=None, h=None, *, segment_ids):
    """`step` in a loop; a segment's first token is given an empty state."""
    changed = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0

    def advance(h, token):
        *token, forget = token
        y, h = gated_deltanet.step(*token, jnp.where(forget[:, None, None, None], 0, h))
        return h, y

    last, y = jax.lax.scan(
        advance, h, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, log_decay, changed))
    )
    return jnp.moveaxis(y, 0, 1), last


FORMS = {"recurrent": gated_deltanet.recurrent, "chunked": gated_deltanet.chunked, "step": stepped}


def total(arrays, bars, ids, form):
    out = FORMS[form](*arrays, segment_ids=ids)
    return sum(jnp.sum(bar * o) for bar, o in zip(bars, out, strict=True)), out


gradient = jax.jit(jax.grad(total, has_aux=True), static_argnums=3)  # once for a shape, whatever the values


def differentiated(form, dtype, arrays, bars, ids):
    """((y, last), gradients) of sum(y_bar y) + sum(last_bar last)."""
    arrays, bars = ([jnp.asarray(x, dtype) for x in given] for given in (arrays, bars))
    grads, out = gradient(arrays, bars, ids, form)
    return out, grads


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_every_form_in_value_and_gradient(length, rng, x64):
    """A segment begins at a third of the length. To the loops no length is special: they run at one."""
    arrays = problem(rng, length)
    bars = rng.normal(size=arrays[2].shape), rng.normal(size=arrays[5].shape)
    ids = np.arange(length)[None] >= max(1, length // 3)
    starts = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    values, expected = loop(*arrays, starts)[:2], adjoint(*arrays, *bars, starts)
    in_float32 = {65: FORMS, 200: ("chunked",)}.get(length, ())
    for form, dtype in [("chunked", jnp.float64), *((form, jnp.float32) for form in in_float32)]:
        outs, grads = differentiated(form, dtype, arrays, bars, jnp.asarray(ids, jnp.int32))
        for out, ref, name in zip(outs, values, ("y", "h"), strict=True):
            assert_close(out, ref, scale=length, label=f"{form}, {name}")
        for out, ref, name in zip(grads, expected, NAMES, strict=True):
            assert_close(out, ref, scale=length, gradient=True, label=f"{form}, gradient of {name}")


@pytest.mark.parametrize("same", [False, True], ids=["keys", "one_key"])
@pytest.mark.parametrize("log_decay", [0.0, -300.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_extremes(beta, log_decay, same, rng, x64):
    """Two chunks of one decay and one beta, all keys the same or none: the triangle is then 2 below its diagonal, and
    powers of it, from which an inverse might be summed, reach 1e18. Float32 keys are of length 1 to 6e-8."""
    q, k, v, *_, h = problem(rng, 128)
    k = np.asarray(unit(np.repeat(k[:, :1], 128, 1)) if same else k, np.float32).astype(float)
    gates = np.ones(v.shape[:3])
    arrays = [q, k, v, beta * gates, log_decay * gates, h]
    bars = rng.normal(size=v.shape), rng.normal(size=h.shape)
    starts = np.zeros((1, 128), bool)
    expected = [*loop(*arrays)[:2], *adjoint(*arrays, *bars, starts)]
    outs, grads = differentiated("chunked", jnp.float32, arrays, bars, jnp.zeros((1, 128), int))
    for out, ref, name in zip((*outs, *grads), expected, ("y", "h", *NAMES), strict=True):
        ref = np.where(np.abs(ref) < np.finfo(np.float32).tiny, 0, ref)
        assert_close(out, ref, scale=128, gradient=name in NAMES, label=name)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_twice_the_same_reflection(form, rng):
    """With beta = 2 and v = 0 a key mirrors the state: h (I - 2 k k^T), and at its second reading h is back."""
    k, h = unit(rng.normal(size=(1, 1, 1, N))), rng.normal(size=(1, 1, P, N))
    k, h = jnp.asarray(k, jnp.float32), jnp.asarray(h, jnp.float32)
    gates = jnp.zeros((1, 101, 1, P)), jnp.full((1, 101, 1), 2.0)
    keys = jnp.repeat(k, 101, 1)
    apply = jax.jit(FORMS[form])
    run = lambda n: apply(keys[:, :n], keys[:, :n], *(x[:, :n] for x in gates), None, h)  # noqa: E731
    y, once = run(1)
    assert_close(once, h @ (np.eye(N) - 2 * np.outer(k, k)), scale=N)
    assert_close(y[0, 0], -np.asarray(h[0]) @ np.asarray(k[0, 0, 0]), scale=N)
    for times, expected in ((2, h), (101, once)):
        assert_close(run(times)[1], expected, scale=N * times)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_parity_of_a_hundred_thousand_bits(form, rng):
    """One channel: the first token writes 1, a bit of 1 has beta = 2. No beta in [0, 1] ever turns the sign."""
    bits = rng.integers(0, 2, size=100_000)
    beta, v = 2.0 * bits, np.zeros(len(bits))
    beta[0], v[0], bits[0] = 1, 1, 0
    shape = lambda x, *axes: jnp.asarray(x, jnp.float32).reshape(1, -1, 1, *axes)  # noqa: E731
    one = jnp.ones((1, len(bits), 1, 1))
    run = jax.jit(lambda beta: FORMS[form](one, one, shape(v, 1), shape(beta))[0][0, :, 0, 0])
    np.testing.assert_array_equal(run(beta), 1 - 2 * (np.cumsum(bits) % 2))
    assert run(np.minimum(beta, 1)).min() >= 0


def test_pieces_carry_the_state(rng):
    """Cuts inside chunks, in a form that the piece before was not in; without a decay, as DeltaNet."""
    q, k, v, beta, _, h = (jnp.asarray(x, jnp.float32) for x in problem(rng, 150, batch=2))
    expected = loop(*(np.asarray(x, np.float64) for x in (q, k, v, beta, 0 * beta, h)))
    state, outs = h, []
    for form, first, end in (("chunked", 0, 37), ("recurrent", 37, 60), ("chunked", 60, 150)):
        y, state = jax.jit(FORMS[form])(*(x[:, first:end] for x in (q, k, v, beta)), None, state)
        outs.append(y)
    assert_close(jnp.concatenate(outs, 1), expected[0], scale=150)
    assert_close(state, expected[1], scale=150)


WIDTH = 6
SIZES = dict(state_size=N, heads=HEADS, head_size=P, groups=GROUPS, conv_width=K, chunk_size=16)


def silu(x):
    return x / (1 + np.exp(-x))


def layer_loop(params, x, conv, h, *, decay=True, negative_eigenvalues=False, output_gate=True, conv_bias=False):
    """The layer of section 3.4 of the paper: (y, inputs that the convolution keeps, h)."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    keys, inner, sigmoid = GROUPS * N, HEADS * P, lambda x: 1 / (1 + np.exp(-x))
    sizes = [inner * output_gate, 2 * keys + inner, HEADS, HEADS * decay]
    z, qkv, beta, dt = np.split(x @ p["in_proj"]["kernel"], np.cumsum(sizes)[:-1], -1)
    window = np.concatenate([conv, qkv], 1)
    taps = [sum(window[:, t + j] * p["conv"]["weight"][:, j] for j in range(K)) for t in range(x.shape[1])]
    mixed = silu(np.stack(taps, 1) + (p["conv"]["bias"] if conv_bias else 0))
    q, k, v = np.split(mixed, [keys, 2 * keys], -1)
    q, k, v = (x.reshape(*x.shape[:2], parts, -1) for x, parts in ((q, GROUPS), (k, GROUPS), (v, HEADS)))
    q, k = (x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6) for x in (q, k))
    beta = sigmoid(beta) * (2 if negative_eigenvalues else 1)
    log_decay = -np.exp(p["A_log"]) * np.log1p(np.exp(dt + p["dt_bias"])) if decay else np.zeros(beta.shape)
    y, h, _ = loop(q / np.sqrt(N), k, v, beta, log_decay, h)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
    y = y.reshape(*x.shape[:2], inner) * (silu(z) if output_gate else 1)
    return y @ p["out_proj"]["kernel"], window[:, x.shape[1] :], h


@pytest.mark.parametrize(
    "options",
    [{}, dict(negative_eigenvalues=True, conv_bias=True), dict(decay=False, output_gate=False)],
    ids=["default", "negative_eigenvalues", "deltanet"],
)
def test_the_layer_is_its_loop(options, rng):
    """Random parameters, so that none is at a value that hides it; whole, and token after token."""
    module = mixer("gated_deltanet", WIDTH, SIZES | options)
    x = jnp.asarray(rng.normal(size=(2, 21, WIDTH)), jnp.float32)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / len(leaf.shape), jnp.float32)  # noqa: E731
    variables = jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), x))
    assert ("A_log" in variables["params"]) == options.get("decay", True)
    state = jax.tree.map(draw, jax.eval_shape(lambda: module.initial_state(2)))
    expected = layer_loop(variables["params"], *(np.asarray(v, np.float64) for v in (x, *state)), **options)
    y, last = jax.jit(module.apply)(variables, x, state)
    step, outs = jax.jit(lambda x, state: module.apply(variables, x, state, method="step")), []
    for t in range(x.shape[1]):
        out, state = step(x[:, t], state)
        outs.append(out)
    for out in ((y, *last), (jnp.stack(outs, 1), *state)):
        for value, ref, label in zip(out, expected, ("y", "conv", "h"), strict=True):
            assert_close(value, ref, scale=21 * N, label=label)


def test_bfloat16_reflections_keep_their_length(rng):
    """beta = 2 at every token, keys far above the norm's epsilon: rounded to bfloat16, they would be of length 1 to
    1e-3 alone, and each reflection would lengthen or shorten the state."""
    module = mixer("gated_deltanet", WIDTH, SIZES | dict(decay=False, negative_eigenvalues=True, conv_bias=True))
    x = jnp.asarray(rng.normal(size=(1, 1024, WIDTH)), jnp.bfloat16).at[..., 0].set(1)
    variables = jax.jit(module.init)(jax.random.key(0), x[:, :1])
    values = HEADS * P + 2 * GROUPS * N  # where v begins in in_proj; beta is behind it
    params = variables["params"]
    kernel = params["in_proj"]["kernel"].at[:, values:].set(0).at[0, values + HEADS * P :].set(100)
    params["in_proj"]["kernel"] = kernel
    params["conv"]["bias"] = jnp.where(jnp.arange(2 * GROUPS * N + HEADS * P) < 2 * GROUPS * N, 5.0, 0.0)
    start = module.initial_state(1)._replace(h_bhpn=jnp.asarray(rng.normal(size=(1, HEADS, P, N)), jnp.float32))
    _, state = jax.jit(module.apply)(variables, x, start)
    assert relative(jnp.linalg.norm(state.h_bhpn, axis=-1), jnp.linalg.norm(start.h_bhpn, axis=-1)) < 1e-4


def test_parameters_start_in_their_ranges():
    options = dict(state_size=2, head_size=1, heads=64, dt_min=0.01, dt_floor=0.02, dt_max=0.05, conv_bias=True)
    module = mixer("gated_deltanet", 64, options)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    for values, (low, high) in (
        (jax.nn.softplus(params["dt_bias"]), (0.02, 0.05)),
        (jnp.exp(params["A_log"]), (0, 16)),
        (params["conv"]["weight"], (-0.5, 0.5)),
        (params["conv"]["bias"], (-0.5, 0.5)),
        (params["in_proj"]["kernel"], (-1 / 8, 1 / 8)),
    ):
        slack = (high - low) / 10
        assert low - 1e-6 <= values.min() < low + slack
        assert high - slack < values.max() <= high + 1e-6
    assert jax.tree.map(jnp.shape, mixer("gated_deltanet", 8, dict(state_size=3)).initial_state(2)) == (
        (2, 3, 48),
        (2, 4, 6, 3),
    )


def test_wrong_options_and_states_are_named(untyped):
    x = jnp.zeros((2, 3, WIDTH))
    name = "gated_deltanet"
    start = lambda **options: jax.eval_shape(mixer(name, WIDTH, SIZES | options).init, jax.random.key(0), x)  # noqa: E731
    for options, message in [
        (dict(groups=3), "groups is 3; it must divide the 4 heads"),
        (dict(A_range=(2.0, 1.0)), r"A_range is \(2.0, 1.0\); it must be \(low, high\) with 0 <= low < high"),
        (dict(head_size=0), "head_size is 0; it must be at least 1"),
        (dict(chunk_size=0), "chunk_size is 0; it must be at least 1"),
        (dict(form="chunk"), "unknown form 'chunk'; did you mean 'chunked'"),
        (dict(dt_min=0.2, dt_max=0.1), "dt_min is 0.2 and dt_max is 0.1"),
        (dict(negative_eigenvalue=True), "did you mean 'negative_eigenvalues'"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(**options)
    module, variables = mixer(name, WIDTH, SIZES), start()
    for state, message in [
        (module.initial_state(3), r"state.conv_bkd has shape \(3, 3, 32\); .* \(2, 3, 32\)"),
        (module.initial_state(2)._replace(h_bhpn=jnp.zeros((2, 4, 3, 7))), r"state.h_bhpn has shape \(2, 4, 3, 7\)"),
        (mamba2.State(*module.initial_state(2)), "state is a ssm.mixers.mamba2.State; gated_deltanet takes its own"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.apply, variables, x, state)
    q = jnp.zeros((1, 2, 1, 1))
    with pytest.raises(ValueError, match="chunk_size is 0; it must be at least 1"):
        gated_deltanet.chunked(q, q, q, q[..., 0], chunk_size=0)
