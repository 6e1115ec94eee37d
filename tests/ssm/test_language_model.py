"""The language model over every mixer: one token at a time, packed, scanned, initialised; pieces: test_generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.blocks import GatedMLP
from ssm.language_model import LanguageModel, for_steps, stack_blocks, unstack_blocks
from ssm.mixers import MIXERS, mixer
from tests.oracles import assert_close, relative
from tests.ssm.test_mixers import OPTIONS, STATE

VOCABULARY, WIDTH, LENGTH = 11, 4, 12
# Every kind of state; all mixers: test_mixers.
FAMILIES = ("mamba", "mamba2", "mamba3", "gated_deltanet", "attention", "s5", "s4d")
SMALL = {name: OPTIONS.get(name, {}) | ({} if name == "attention" else {"state_size": STATE}) for name in MIXERS}


def language_model(pattern, **options):
    names = pattern.split()
    sizes = dict(vocabulary=VOCABULARY, width=WIDTH, depth=len(names), mlp_size=6)
    return LanguageModel(pattern=pattern, mixers={name: SMALL[name] for name in names}, **sizes | options)


def start(rng, pattern, **options):
    """A model whose layers matter: weights that are four times those of a real beginning."""
    model = language_model(pattern, **options)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, size=(2, LENGTH)))
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])
    grown = jax.tree_util.tree_map_with_path(
        lambda path, p: 4 * p if path[-1].key in ("kernel", "embedding") else p, variables
    )
    return model, grown, tokens


def assert_all_close(out, ref, scale=100, **options):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(ref), strict=True):
        assert_close(a, b, scale=scale, label=jax.tree_util.keystr(path), **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_token_by_token(name, rng):
    """Logits and state of one call, and of a step a token."""
    model, variables, tokens = start(rng, name)
    step = jax.jit(lambda token, state: model.apply(variables, token, state, method="step"))
    state, steps = model.initial_state(2), []
    for t in range(LENGTH):
        logits, state = step(tokens[:, t], state)
        steps.append(logits)
    assert_all_close((jnp.stack(steps, 1), state), jax.jit(model.apply)(variables, tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_are_separate(name, rng):
    """Logits of each alone; and no gradient, to the last bit, reaches the embeddings of the other's tokens."""
    model, variables, _ = start(rng, name, tie_embeddings=False)
    alone = jnp.asarray([rng.integers(0, 5, size=6), rng.integers(5, VOCABULARY, size=6)])
    logits, state = jax.jit(model.apply)(variables, alone)
    expected = logits.reshape(1, 12, VOCABULARY), jax.tree.map(lambda s: s[1:], state)

    def of_document(variables, start):
        out = model.apply(variables, alone.reshape(1, 12), segment_ids=jnp.asarray([[1] * 6 + [0] * 6]))
        return jnp.sum(jnp.sin(jax.lax.dynamic_slice_in_dim(out[0], start, 5, 1))), out

    gradient = jax.jit(jax.grad(of_document, has_aux=True))
    for first, own, others in [(0, slice(0, 5), slice(5, None)), (7, slice(5, None), slice(0, 5))]:
        gradients, packed = gradient(variables, first)
        assert_all_close(packed, expected)
        table = gradients["params"]["embedding"]["embedding"]
        assert np.abs(table[own]).max() > 0
        assert not np.any(table[others])


def test_bfloat16_activations(rng):
    """Of every mixer; the residual, the states and the logits stay float32."""
    for name in FAMILIES:
        model, variables, tokens = start(rng, name)
        logits, _ = jax.jit(model.apply)(variables, tokens)
        rounded, state = jax.jit(model.clone(dtype="bfloat16").apply)(variables, tokens)
        assert rounded.dtype == jnp.float32
        assert all(leaf.dtype in (jnp.complex64, jnp.float32) for leaf in jax.tree.leaves(state))
        assert 1e-3 < relative(rounded, logits) < 5e-2, name


def test_a_model_for_steps_has_the_same_numbers(rng):
    """Weights are rounded once; dt_proj multiplies in float32, and tokens are looked up in it."""
    model, variables, tokens = start(rng, "mamba attention", scan_layers=True, dtype="bfloat16")
    faster, rounded = for_steps(model, variables)
    assert (faster.scan_layers, faster.tie_embeddings) == (False, False)
    single = {path[-2].key for path, leaf in jax.tree_util.tree_leaves_with_path(rounded) if leaf.dtype == jnp.float32}
    layers = {"in_proj", "x_proj", "out_proj", "gate", "up", "down", "head"}
    assert layers.isdisjoint(single) and {"dt_proj", "embedding", "conv"} <= single
    plain = model.clone(scan_layers=False), {"params": unstack_blocks(variables["params"])}
    states = [model.initial_state(2)] * 2
    for t in range(2):  # not compiled: a compiler would round as often as it likes
        pairs = zip((plain, (faster, rounded)), states, strict=True)
        outputs = [model.apply(given, tokens[:, t], state, method="step") for (model, given), state in pairs]
        states = [state for _, state in outputs]
        assert_all_close(*outputs)
    again, same = for_steps(faster, rounded)
    assert again == faster and all(map(np.array_equal, *map(jax.tree.leaves, (same, rounded))))


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def swiglu(x, params):
    gate = x @ params["gate"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ params["up"]["kernel"])) @ params["down"]["kernel"]


@pytest.mark.parametrize(("mlp_size", "tied"), [(6, True), (0, False)])
def test_the_stack_is_its_equations(mlp_size, tied, rng):
    """Embedding, pre-norm residuals, norm and head in float64 around the mixers' own outputs."""
    options = dict(depth=3, mlp_size=mlp_size, tie_embeddings=tied, norm_eps=0.1)
    model, variables, tokens = start(rng, "s5 attention", **options)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
    x = params["embedding"]["embedding"][np.asarray(tokens)]
    for i, name in enumerate(["s5", "attention", "s5"]):
        block = params[f"block_{i}"]
        y = jnp.asarray(rms(x, block["norm"]["scale"], 0.1), jnp.float32)
        own = {"params": variables["params"][f"block_{i}"]["mixer"]}
        x = x + np.asarray(jax.jit(mixer(name, WIDTH, SMALL[name]).apply)(own, y)[0])
        if mlp_size:
            x = x + swiglu(rms(x, block["norm_mlp"]["scale"], 0.1), block["mlp"])
    head = params["embedding"]["embedding"].T if tied else params["head"]["kernel"]
    assert_close(jax.jit(model.apply)(variables, tokens)[0], rms(x, params["norm"]["scale"], 0.1) @ head, scale=100)


def test_hidden_layers_are_eight_thirds_of_the_width():
    for width, size in [(4, 128), (48, 128), (49, 256), (768, 2048)]:
        shapes = jax.eval_shape(GatedMLP().init, jax.random.key(0), jnp.zeros((1, width)))["params"]
        assert shapes["down"]["kernel"].shape == (size, width)


def test_scanned_layers_are_the_same_layers(rng):
    """A wrong order of layers, parameters, states or gradients fails."""
    model, variables, tokens = start(rng, "attention lru", depth=4)
    scanned = model.clone(scan_layers=True, remat=True)
    stacked = {"params": stack_blocks(variables["params"], 2)}
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), tokens)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    for out, ref in zip(jax.tree.leaves(unstack_blocks(stacked["params"])), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(out, ref)

    def loss(variables, state, model):
        logits, state = model.apply(variables, tokens, state)
        return jnp.sum(jnp.sin(logits)), (logits, state, model.apply(variables, tokens[:, 0], state, method="step"))

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    _, (_, before, _) = run(variables, model.initial_state(2), model)
    gradient, out = run(stacked, before, scanned)
    gradients, expected = run(variables, before, model)
    assert_all_close(out, expected)
    assert_all_close(unstack_blocks(gradient["params"]), gradients["params"], gradient=True)


def test_scanned_layers_begin_different(rng):
    params = start(rng, "lru", depth=2, scan_layers=True)[1]["params"]
    kernels = params["blocks"]["block_0"]["mlp"]["up"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).min() > 0


def test_remat_keeps_less_and_changes_nothing(rng):
    """What the backward pass keeps of each block is its input."""
    model, variables, tokens = start(rng, "attention")

    def loss(variables, remat):
        return jnp.sum(jnp.sin(model.clone(remat=remat).apply(variables, tokens)[0]))

    kept, gradients = [], []
    for remat in (True, False):
        pull = jax.eval_shape(lambda variables: jax.vjp(lambda v: loss(v, remat), variables)[1], variables)  # noqa: B023
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
        gradients.append(jax.jit(jax.grad(loss), static_argnums=1)(variables, remat))
    assert kept[0] < 0.5 * kept[1]
    assert_all_close(*gradients, gradient=True)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(("mlp_size", "writes"), [(64, 2), (0, 1)])
def test_what_writes_to_the_residual_begins_small(scan_layers, mlp_size, writes):
    """Kernels are uniform up to 1 / sqrt(fan in), out_proj and down 1 / sqrt(writes x depth) of that."""
    options = dict(width=64, depth=4, mlp_size=mlp_size, scan_layers=scan_layers, tie_embeddings=False)
    model = language_model("attention", vocabulary=999, **options)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    for kernel in params["embedding"]["embedding"], params["head"]["kernel"]:
        np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.02], atol=4e-4)
    blocks = [params["blocks"]["block_0"]] if scan_layers else [params[f"block_{i}"] for i in range(4)]
    layers = [("mixer", "in_proj", 1), ("mixer", "out_proj", 4 * writes)]
    layers += [("mlp", "gate", 1), ("mlp", "up", 1), ("mlp", "down", 8)] if mlp_size else []
    for block in blocks:
        for part, name, count in layers:
            largest = np.abs(block[part][name]["kernel"]).max() * (64 * count) ** 0.5
            assert 0.99 < largest <= 1.0001, name


def test_dropout_is_of_each_branch_and_of_training_alone(rng):
    model, variables, tokens = start(rng, "lru", depth=2, dropout=0.5, scan_layers=True)
    run = jax.jit(lambda seed: model.apply(variables, tokens, train=True, rngs={"dropout": jax.random.key(seed)})[0])
    assert relative(run(0), run(1)) > 0.01
    still = jax.jit(model.apply)(variables, tokens)[0]
    none = jax.jit(lambda: model.clone(dropout=0.0).apply(variables, tokens, train=True)[0])
    assert_close(still, none(), scale=10)


TOKENS = jnp.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(vocabulary=0), "vocabulary is 0; it must be at least 1"),
        (dict(width=0), "width is 0; it must be at least 1"),
        (dict(depth=0), "depth 0"),
        (dict(pattern="lrus"), "unknown mixer in pattern 'lrus'; did you mean 'lru'"),
        (dict(mixers={"s4": {}}), "unknown mixer with options 's4'"),
        (dict(mixers={"lru": {"state": 4}}), "unknown option of lru 'state'; did you mean 'state_size'"),
        (dict(mlp_size=-1), "mlp_size is -1; it must be None, 0 for no MLP, or its hidden size"),
        (dict(dropout=1.0), "dropout is 1.0; it must be at least 0 and below 1"),
        (dict(dtype="bf16"), "unknown dtype 'bf16'; did you mean 'bfloat16'"),
        (
            dict(scan_layers=True, pattern="lru s5", depth=3),
            "depth is 3; scan_layers takes a multiple of the pattern's 2",
        ),
    ],
)
def test_wrong_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(**dict(vocabulary=3, width=4, depth=1, pattern="lru") | options).init(jax.random.key(0), TOKENS)


def test_wrong_tokens_and_states_are_named(rng):
    model, variables, _ = start(rng, "lru")
    for token in (-1, VOCABULARY):
        with pytest.raises(
            ValueError, match=f"tokens: {token} is outside the vocabulary, whose 11 tokens count from 0"
        ):
            model.apply(variables, TOKENS.at[1, 2].set(token))
    logits, _ = jax.jit(model.apply)(variables, TOKENS.at[1, 2].set(VOCABULARY))
    assert np.isnan(logits[1, 2]).all() and np.isfinite(logits[0]).all()
    for state, message in [
        (model.initial_state(3), r"state of layer 0 is State\(h_bn=\(3, 8\)\); this model and batch size have State"),
        (language_model("s4d").initial_state(2), r"this model and batch size have State\(h_bn=\(2, 8\)\)"),
        (model.clone(depth=3).initial_state(2), "state has 3 layers; this model has 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.jit(model.apply)(variables, TOKENS, state)
