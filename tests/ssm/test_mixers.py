"""What every mixer promises, whatever its mathematics: forms, states, segments, causality, errors.

The mathematics itself is held against dense float64 loops in the files of the single mixers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from ssm.mixers import MIXERS, mixer
from tests.oracles import assert_close, relative

WIDTH, STATE = 4, 8
OPTIONS = {  # what each mixer is tested with where a test says nothing
    "s4": dict(length=65),
    "dss": dict(length=65),
    "s5": dict(blocks=2),
    "mamba": dict(chunk_size=16),
    "mamba2": dict(head_size=2, groups=2, chunk_size=16),
    "mamba3": dict(head_size=4, chunk_size=16),
    "gated_deltanet": dict(heads=2, head_size=3, groups=1, chunk_size=16),
    "attention": dict(heads=2, kv_heads=1, window=7),
}
OWN = [(name, {}) for name in MIXERS] + [("liquid_s4", dict(mode="exact")), ("liquid_s4", dict(mode="kb", degree=3))]
CASES = OWN + [
    ("s4d", dict(A_init="real", rule="exponential_euler")),
    ("s4d", dict(A_init="lin", rule="exponential_trapezoidal", weight=0.7)),
    ("dss", dict(kernel="exp", rule="bilinear")),
    ("s5", dict(rule="exponential_trapezoidal", C_init="complex_normal", clip_eigenvalues=True)),
    ("s5", dict(rule="dirac", C_init="trunc_standard_normal", step_scale=2.0)),
    ("lru", dict(rule="exponential_trapezoidal", r_min=0.9, r_max=0.999)),
    ("mamba", dict(rule="bilinear", norm_BCdt=True, dt_rank=2)),
    ("mamba3", dict(mimo=True, rank=2, groups=2, output_norm=True)),
    ("mamba3", dict(rotation="fixed", rope_fraction=1.0, trapezoid=False)),
    ("gated_deltanet", dict(decay=False, negative_eigenvalues=True, output_gate=False, groups=None)),
]
FORMS = {  # besides "auto"; three where nothing is said
    "s4": ("recurrent", "parallel"),
    "s5": ("recurrent", "parallel"),
    "lru": ("recurrent", "parallel"),
    "mamba2": ("recurrent", "quadratic", "chunked"),
    "mamba3": ("recurrent", "chunked"),
    "gated_deltanet": ("recurrent", "chunked"),
    "attention": ("auto",),
}


def each(cases):
    ids = ["-".join([name, *map(str, options.values())]) for name, options in cases]
    return pytest.mark.parametrize(("name", "options"), cases, ids=ids)


def forms(name, options):
    if options.get("mode") == "exact":
        return "recurrent", "parallel"
    return FORMS.get(name, ("recurrent", "parallel", "chunked"))


def layer(name, **options):
    if name == "attention":  # which has one form, and a window for a state
        return mixer(name, WIDTH, OPTIONS[name] | {k: v for k, v in options.items() if k != "form"})
    return mixer(name, WIDTH, OPTIONS.get(name, {}) | dict(state_size=STATE) | options)


def start(name, options, rng, length, batch=2):
    module = layer(name, **options)
    x = jnp.asarray(rng.normal(size=(batch, length, WIDTH)), jnp.float32)
    return module, jax.jit(module.init)(jax.random.key(1), x[:, :1]), x


@partial(jax.jit, static_argnums=0)
def step(module, variables, x, state):
    return module.apply(variables, x, state, method="step")


def stepped(module, variables, x):
    state, y = module.apply(variables, len(x), method="initial_state"), []
    for t in range(x.shape[1]):
        out, state = step(module, variables, x[:, t], state)
        y.append(out)
    return np.stack(y, 1), state


def assert_all_close(out, ref, scale=65):
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(ref), strict=True):
        assert_close(a, b, scale=scale)


@each(CASES)
@pytest.mark.parametrize("length", [1, 65])
def test_every_form_is_step_after_step(name, options, length, rng):
    module, variables, x = start(name, options, rng, length)
    expected = stepped(module, variables, x)
    for form in (*forms(name, options), "auto"):
        apply = layer(name, form=form, **options).apply
        assert_all_close(jax.jit(apply)(variables, x), expected)


@pytest.mark.parametrize("name", ["s4d", "lru"])
def test_jit_changes_nothing(name, rng):
    module, variables, x = start(name, {}, rng, 9)
    assert_all_close(module.apply(variables, x), jax.jit(module.apply)(variables, x), scale=9)


def whole(variables, x, weights, ids, module):
    return jnp.sum(weights * jnp.sin(module.apply(variables, x, segment_ids=ids)[0]))


def pieces(variables, x, weights, module):
    """Halves with the state carried from one to the other, compiled once for both."""

    def half(state, x):
        y, state = module.apply(variables, x, state)
        return state, y

    start = module.apply(variables, len(x), method="initial_state")
    _, y = jax.lax.scan(half, start, jnp.stack(jnp.split(x, 2, 1)))
    return jnp.sum(weights * jnp.sin(jnp.concatenate(list(y), 1)))


# Of the same shapes in every test: what one has compiled, the cache gives to the others.
of_whole = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)), static_argnums=4)
of_pieces = jax.jit(jax.value_and_grad(pieces, argnums=(0, 1)), static_argnums=3)


@each(OWN)
def test_a_sequence_in_two_pieces(name, options, rng):
    """Values, and gradients through the carried state: every form continues its own state."""
    module, variables, x = start(name, options, rng, 24)
    weights = jnp.ones_like(x)
    ref, ref_grads = of_whole(variables, x, weights, jnp.zeros(x.shape[:2], int), module)
    for form in forms(name, options):
        value, grads = of_pieces(variables, x, weights, layer(name, form=form, **options))
        np.testing.assert_allclose(value, ref, rtol=1e-4, atol=1e-4)
        paths = jax.tree_util.tree_leaves_with_path(grads)
        for (path, out), expected in zip(paths, jax.tree.leaves(ref_grads), strict=True):
            # S4's C~ was made for 65 tokens: what it says of each piece's C passes through (I - Abar^65)^-1.
            scale = 24 * (100 if name == "s4" else 10)
            assert_close(out, expected, gradient=True, scale=scale, label=f"{form} {jax.tree_util.keystr(path)}")


@each(OWN)
def test_packed_is_separate(name, options, rng):
    """As steps are, from an empty state for each document."""
    module, variables, x = start(name, options, rng, 24)
    ids = jnp.asarray(np.repeat([[3, 1, 2]], [10, 1, 13], axis=1).repeat(2, 0))
    packed, last = jax.jit(module.apply)(variables, x, segment_ids=ids)
    ends = [stepped(module, variables, part) for part in (x[:, :10], x[:, 10:11], x[:, 11:])]
    assert_all_close(packed, np.concatenate([y for y, _ in ends], 1))
    assert_all_close(last, ends[-1][1])


@each(OWN)
def test_no_gradient_from_the_future_or_another_row(name, options, rng):
    """To what the second of two pieces says of its token 5, and to what a document says of its own."""
    module, variables, x = start(name, options, rng, 24)
    ids = jnp.asarray([[0] * 14 + [1] * 10] * 2)
    one = jnp.zeros_like(x).at[0, 17].set(1)
    for form in (*forms(name, options), None):
        if form is None:
            _, (_, g) = of_whole(variables, x, one, ids, module)
        else:
            _, (_, g) = of_pieces(variables, x, one, layer(name, form=form, **options))
        assert np.abs(g[0, 17]).sum() > 0
        reach = np.abs(g[0, 10:14]).sum() > 0
        assert reach == (form is not None)
        ahead = np.abs(g[0, 18:]).max()  # an FFT mixes all tokens and cancels them to rounding
        assert ahead <= (2e-6 * np.abs(g).max() if form == "parallel" else 0)
        assert not np.abs(g[1]).any()


@each(OWN)
def test_vmap(name, options, rng):
    module, variables, x = start(name, options, rng, 9)
    y, state = jax.jit(jax.vmap(lambda row: module.apply(variables, row[None])))(x)
    expected = stepped(module, variables, x)
    assert_all_close((y[:, 0], jax.tree.map(lambda s: s[:, 0], state)), expected, scale=9)


CAUSAL_ONLY = ("liquid_s4", "mamba", "mamba2", "mamba3", "gated_deltanet", "attention")
BOTH_WAYS = [name for name in MIXERS if name not in CAUSAL_ONLY]


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bidirectional_is_the_layer_and_its_mirror(name, rng):
    """C = 0 leaves what is read backwards: on the mirrored input it is the causal layer's answer, which S5 and
    LRU read at the token itself and the convolutions one token on."""
    module, variables, x = start(name, dict(bidirectional=True), rng, 33)
    read = "W" if name == "dss" else "C"
    params = variables["params"]
    forward = {k: v for k, v in params.items() if k != f"{read}_reverse"}
    forward[read] = params[f"{read}_reverse"]
    silent = params | {read: jax.tree.map(jnp.zeros_like, params[read]), "D": jnp.zeros(WIDTH)}
    mirrored, _ = jax.jit(layer(name).apply)({"params": forward | {"D": jnp.zeros(WIDTH)}}, x[:, ::-1])
    expected = mirrored[:, ::-1]
    if name not in ("s5", "lru"):
        expected = jnp.pad(expected[:, 1:], ((0, 0), (0, 1), (0, 0)))
    for form in forms(name, {}):
        out, _ = jax.jit(layer(name, bidirectional=True, form=form).apply)({"params": silent}, x)
        assert_all_close(out, expected)
    with pytest.raises(ValueError, match="state was given to a bidirectional mixer"):
        module.apply(variables, x, layer(name).initial_state(2))


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bidirectional_segments(name, rng):
    module, variables, x = start(name, dict(bidirectional=True), rng, 20)
    ids = jnp.asarray([[0] * 8 + [1] * 12] * 2)
    apply = jax.jit(module.apply)
    packed, _ = apply(variables, x, segment_ids=ids)
    parts = [apply(variables, part)[0] for part in (x[:, :8], x[:, 8:])]
    assert_all_close(packed, jnp.concatenate(parts, 1), scale=20)


@pytest.mark.parametrize("name", ["s4d", "s5", "lru"])
def test_hundred_thousand_tokens(name, rng):
    """The slowest initial modes still agree between the loop and the parallel form after 1e5 tokens."""
    options = dict(s4d={}, s5={}, lru=dict(r_min=0.999, r_max=0.9999))[name]
    module, variables, x = start(name, options, rng, 100_000, batch=1)
    loop, last = jax.jit(layer(name, form="recurrent", **options).apply)(variables, x)
    y, end = jax.jit(layer(name, form="chunked" if name == "s4d" else "parallel", **options).apply)(variables, x)
    assert_close(y, loop, scale=10_000)
    assert_close(jax.tree.leaves(end)[0], jax.tree.leaves(last)[0], scale=10_000)


def test_bfloat16_activations_keep_float32_states(rng):
    for name in MIXERS:
        module, variables, x = start(name, {}, rng, 65)
        apply = jax.jit(module.apply)
        y, state = apply(variables, x.astype(jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        assert all(leaf.dtype in (jnp.complex64, jnp.float32) for leaf in jax.tree.leaves(state))
        assert_close(y, apply(variables, x.astype(jnp.bfloat16).astype(jnp.float32))[0])


def test_a_layer_crosses_to_nnx(rng):
    module, variables, x = start("s4d", {}, rng, 9)
    ported = bridge.ToNNX(module, rngs=nnx.Rngs(params=jax.random.key(1))).lazy_init(x)
    assert_all_close(ported(x)[0], module.apply(jax.tree.map(lambda v: v, nnx_params(ported)), x)[0], scale=9)


def nnx_params(ported):
    return {"params": nnx.to_pure_dict(nnx.state(ported, nnx.Param))}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("s4dd", {}, "unknown mixer 's4dd'; did you mean 's4d'"),
        ("s4d", dict(rule="zho"), "unknown rule 'zho'; did you mean 'zoh'"),
        ("s4", dict(rule="zoh"), "rule 'zoh' is not one that s4 can take. Allowed: bilinear"),
        ("lru", dict(rule="bilinear"), "rule 'bilinear' is not one that lru can take. Allowed: dirac"),
        ("s4d", dict(bidirectional=True, rule="exponential_trapezoidal"), "not one that a bidirectional S4D can take"),
        ("s4d", dict(state_size=7), "state_size"),
        ("s5", dict(state_size=12, blocks=4), "state_size must be a positive multiple of 2 x blocks; got 12"),
        ("s5", dict(C_init="normal"), "unknown C_init 'normal'; did you mean 'lecun_normal'"),
        ("s4d", dict(stat_size=8), "unknown option of s4d 'stat_size'; did you mean 'state_size'"),
        ("s4d", dict(form="paralel"), "unknown form 'paralel'; did you mean 'parallel'"),
        ("s5", dict(form="chunked"), "unknown form 'chunked'"),
        ("s4d", dict(dt_min=0.1, dt_max=0.01), "dt_min is 0.1 and dt_max is 0.01"),
        ("dss", dict(length=None), "length must be given to the softmax kernel of dss"),
        ("dss", dict(kernel="soft"), "unknown kernel 'soft'; did you mean 'softmax'"),
        ("lru", dict(r_min=0.9, r_max=0.5), "r_min"),
    ],
)
def test_wrong_options_are_named(name, options, message, rng):
    with pytest.raises(ValueError, match=message):
        start(name, options, rng, 5)


def test_a_convolution_cannot_forget(rng):
    module, variables, x = start("s4d", dict(form="chunked"), rng, 5)
    with pytest.raises(ValueError, match="form 'chunked' cannot take segment_ids"):
        module.apply(variables, x, segment_ids=jnp.zeros((2, 5), int))


@pytest.mark.parametrize("name", ["s4", "s4d", "dss", "s5"])
def test_half_the_samples_with_twice_the_step(name):
    """A smooth signal sampled at half the rate: the layer's outputs are its own at every second sample.

    With the step left as it is they differ by 0.3 and more.
    """
    time = np.linspace(0, 1, 256)
    centres = (0.4, 0.5, 0.6, 0.5)
    pulses = [np.exp(-(((time - c) / 0.15) ** 2)) * np.cos(w * time) for w, c in enumerate(centres)]
    x = jnp.asarray(np.stack(pulses, -1)[None], jnp.float32)
    options = dict(bidirectional=True, form="parallel", dt_min=0.003, dt_max=0.03)
    options |= dict(length=256) if name in ("s4", "dss") else {}
    full, half = (layer(name, step_scale=scale, **options) for scale in (1.0, 2.0))
    variables = jax.jit(full.init)(jax.random.key(1), x)
    every, second = (jax.jit(m.apply)(variables, u)[0] for m, u in ((full, x), (half, x[:, ::2])))
    assert relative(second, every[:, ::2]) < 0.02
