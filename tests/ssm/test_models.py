"""The classifier: padding that changes nothing, every option, every error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.blocks import Block, Norm
from ssm.mixers import MIXERS
from ssm.models import SequenceClassifier, layers
from ssm.two_towers import PairClassifier
from tests.oracles import assert_close

BOTH_WAYS = ("s4", "dss", "s4d", "s5", "lru", "liquid_s4", "mamba")  # mamba stands for all that are causal
LENGTHS = jnp.asarray([12, 7, 1])
MIXER_OPTIONS = {name: dict(state_size=4) for name in MIXERS if name != "attention"}
MIXER_OPTIONS["attention"] = dict(heads=2, window=5)
MIXER_OPTIONS["mamba2"]["head_size"] = 2
MIXER_OPTIONS["mamba3"]["head_size"] = 4
MIXER_OPTIONS["gated_deltanet"]["heads"] = 2
MIXER_OPTIONS["s4"]["length"] = MIXER_OPTIONS["dss"]["length"] = 12


def classifier(**options):
    names = options.get("pattern", "s4d").split()
    mixers = {name: MIXER_OPTIONS[name] for name in names if name in MIXER_OPTIONS}
    return SequenceClassifier(**dict(classes=3, input_size=2, width=4, depth=2, mixers=mixers) | options)


def start(rng, **options):
    model = classifier(**options)
    x = jnp.asarray(rng.normal(size=(3, 12, 2)), jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0), x), x


@pytest.mark.parametrize(
    ("name", "bidirectional"), [(name, False) for name in MIXERS] + [(name, True) for name in BOTH_WAYS]
)
def test_padding_changes_nothing(name, bidirectional, rng):
    """A row alone, unpadded, gives the logits of the padded batch, whatever the padding holds. That a second layer
    masks what the first one wrote, and a row without padding, are of the block: S4D and Mamba stand for all."""
    if name == "liquid_s4" and bidirectional:
        with pytest.raises(ValueError, match="bidirectional is not for liquid_s4"):
            start(rng, pattern=name, bidirectional=True)
        return
    depth, rows = (2, (0, 1)) if name in ("s4d", "mamba") else (1, (1,))
    model, variables, x = start(rng, pattern=name, bidirectional=bidirectional, depth=depth)
    noise = jnp.where(jnp.arange(12)[None, :, None] < LENGTHS[:, None, None], x, 1e3 * x)
    batch = jax.jit(model.apply)(variables, noise, LENGTHS)
    for row in rows:
        alone = jax.jit(model.apply)(variables, x[row : row + 1, : LENGTHS[row]])
        assert_close(batch[row : row + 1], alone, scale=12)


def test_a_causal_mixer_and_its_mirror_read_both_ways(rng):
    """With the two mixers' parameters exchanged, the block of the reversed sequence is the reversed block's output."""
    block = Block(mixer="mamba", options=MIXER_OPTIONS["mamba"], glu="none", bidirectional=True)
    x = jnp.asarray(rng.normal(size=(2, 9, 4)), jnp.float32)
    params = jax.jit(block.init)(jax.random.key(0), x)["params"]
    mirrored = params | {"mixer": params["mixer_reverse"], "mixer_reverse": params["mixer"]}
    apply = jax.jit(lambda params, x: block.apply({"params": params}, x))
    assert_close(apply(mirrored, x[:, ::-1])[:, ::-1], apply(params, x), scale=12)
    moved = np.abs(apply(params, x.at[:, 4, 0].add(1.0)) - apply(params, x)).max((0, 2))
    assert (moved > 1e-6).all(), "a token in the middle does not reach every output"


def test_pairs_are_their_documents_encoded_alone(rng):
    """A pair's vectors are those of single documents; the head's MLP is of u, v, u - v and u v."""
    options = dict(classes=3, encoder="token", input_size=7, width=4, depth=2, bidirectional=True)
    options |= dict(mixers={"s4d": MIXER_OPTIONS["s4d"]}, norm="batch")
    pairs, lengths = jnp.asarray(rng.integers(0, 7, size=(3, 2, 12))), jnp.asarray([[12, 7], [1, 12], [5, 3]])
    model = PairClassifier(**options)
    variables = jax.jit(model.init)(jax.random.key(0), pairs, lengths)
    params = dict(variables["params"])
    head, hidden = (jax.tree.map(np.float64, params.pop(name)) for name in ("head", "head_hidden"))
    identity = {"head": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}}
    alone = jax.jit(SequenceClassifier(**options | {"classes": 4}).apply)
    stats = {"batch_stats": variables["batch_stats"]}
    u, v = (alone({"params": params | identity, **stats}, pairs[:, i], lengths[:, i]) for i in (0, 1))
    features = np.concatenate([u, v, u - v, u * v], -1).astype(np.float64)
    middle = jax.nn.gelu(jnp.asarray(features @ hidden["kernel"] + hidden["bias"], jnp.float32))
    expected = np.asarray(middle, np.float64) @ head["kernel"] + head["bias"]
    assert_close(jax.jit(model.apply)(variables, pairs, lengths), expected, scale=12)


def test_inputs_that_are_no_pairs(untyped):
    model = PairClassifier(classes=2, encoder="token", input_size=7)
    for inputs, lengths, message in (
        ((3, 12), None, r"inputs have shape \(3, 12\); their second axis must hold a pair"),
        ((3, 2, 12), (3,), r"lengths has shape \(3,\); 3 pairs need \(3, 2\)"),
    ):
        arrays = (None if shape is None else jnp.zeros(shape, jnp.int32) for shape in (inputs, lengths))
        with pytest.raises(ValueError, match=message):
            model.init(jax.random.key(0), *arrays)


@pytest.mark.parametrize(
    ("pooling", "norm", "prenorm"),
    [  # every pair of two options
        (pooling, norm, (i + j) % 2 == 0)
        for i, pooling in enumerate(("mean", "max", "first", "last"))
        for j, norm in enumerate(("batch", "layer", "rms"))
    ],
)
def test_norms_and_poolings_respect_padding(norm, prenorm, pooling, rng):
    model, variables, x = start(rng, norm=norm, prenorm=prenorm, pooling=pooling, glu="half2", depth=1)
    noise = jnp.where(jnp.arange(12)[None, :, None] < LENGTHS[:, None, None], x, 1e3)
    train = jax.jit(lambda x: model.apply(variables, x, LENGTHS, train=True, mutable=["batch_stats"]))
    (clean, stats), (dirty, dirty_stats) = train(jnp.where(noise == 1e3, 0, x)), train(noise)
    assert_close(dirty, clean, scale=12)
    for out, ref in zip(jax.tree.leaves(dirty_stats), jax.tree.leaves(stats), strict=True):
        assert_close(out, ref, scale=12)
    logits = jax.jit(model.apply)(variables, noise, LENGTHS)
    assert_close(logits[1:2], jax.jit(model.apply)(variables, x[1:2, :7]), scale=12)


def test_batch_statistics_are_those_of_the_real_tokens(rng):
    x = rng.normal(size=(3, 12, 4)) * 3 + 1
    mask = np.arange(12)[None] < np.asarray(LENGTHS)[:, None]
    real = x[mask]
    norm, inputs = Norm("batch", momentum=0.0), (jnp.asarray(x, jnp.float32), jnp.asarray(mask))
    variables = norm.init(jax.random.key(0), *inputs)
    y, updates = norm.apply(variables, *inputs, train=True, mutable=["batch_stats"])
    assert_close(y[mask], (real - real.mean(0)) / np.sqrt(real.var(0) + 1e-5), scale=100)
    assert_close(updates["batch_stats"]["batch"]["mean"], real.mean(0), scale=100)
    assert_close(updates["batch_stats"]["batch"]["var"], real.var(0), scale=100)


@pytest.mark.parametrize("glu", ["full", "half1", "half2", "none"])
def test_gated_units_are_their_formulas(glu, rng):
    from ssm.blocks import GatedUnit

    y = jnp.asarray(rng.normal(size=(1, 5, 3)), jnp.float32)
    unit = GatedUnit(glu)
    variables = unit.init(jax.random.key(0), y)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    v = np.asarray(jax.nn.gelu(y), np.float64)
    if glu == "none":
        expected = v
    else:
        gate = variables["params"]["gate"]
        g = v @ np.asarray(gate["kernel"], np.float64) + np.asarray(gate["bias"])
        expected = {
            "full": lambda: g[..., :3] * sigmoid(g[..., 3:]),
            "half1": lambda: v * sigmoid(g),
            "half2": lambda: np.asarray(y) * sigmoid(g),
        }[glu]()
    assert_close(unit.apply(variables, y), expected, scale=10)


def test_dropout_is_tied_along_the_length(rng):
    from ssm.blocks import GatedUnit

    unit = GatedUnit("none", dropout=0.5)
    out = unit.apply({}, jnp.ones((4, 6, 8)), train=True, rngs={"dropout": jax.random.key(0)})
    dropped = np.asarray(out == 0)
    assert 0 < dropped.mean() < 1
    np.testing.assert_array_equal(dropped, dropped[:, :1].repeat(6, 1))


def test_encoders_read_what_they_say(rng):
    """An image is its pixels / 255 row after row; a token is its embedding."""
    model = classifier(encoder="image", input_size=2)
    image = rng.integers(0, 256, size=(3, 4, 3, 2)).astype(np.uint8)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(image))
    pixels = jnp.asarray(image.reshape(3, 12, 2) / 255, jnp.float32)
    assert_close(
        jax.jit(model.apply)(variables, jnp.asarray(image)), jax.jit(classifier().apply)(variables, pixels), scale=12
    )
    tokens = classifier(encoder="token", input_size=5)
    ids = jnp.asarray(rng.integers(0, 5, size=(2, 12)))
    variables = jax.jit(tokens.init)(jax.random.key(0), ids)
    swapped = variables["params"]["encoder"]["embedding"]["embedding"][jnp.asarray([1, 0, 2, 3, 4])]
    exchanged = jax.tree.map(lambda x: x, variables)
    exchanged["params"]["encoder"]["embedding"]["embedding"] = swapped
    apply, names = jax.jit(tokens.apply), jnp.asarray([1, 0, 2, 3, 4])[ids]
    assert_close(apply(exchanged, names), apply(variables, ids), scale=12)


def test_bfloat16_activations_give_float32_logits(rng):
    model, variables, x = start(rng)
    out = jax.jit(classifier(dtype="bfloat16").apply)(variables, x)
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - jax.jit(model.apply)(variables, x)).max() < 0.1


def test_training_in_bfloat16_rounds_activations_alone(rng):
    """What a block gives on is bfloat16; gradients, batch statistics and what makes them stay float32."""
    model, variables, x = start(rng, norm="batch", momentum=0.5, depth=1, dtype="bfloat16")
    x = x + 50  # where the mean of squares less the squared mean, in bfloat16, is all wrong

    def train(params):
        kept = dict(train=True, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
        logits, updated = model.apply(variables | {"params": params}, x, LENGTHS, **kept)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0]), (logits, updated)

    (loss, (logits, updated)), gradient = jax.jit(jax.value_and_grad(train, has_aux=True))(variables["params"])
    kept = (loss, logits, gradient, updated["batch_stats"], variables["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    seen = updated["intermediates"]
    block = seen["block_0"]
    assert block["__call__"][0].dtype == block["mixer"]["__call__"][0][0].dtype == jnp.bfloat16
    assert block["norm"]["batch"]["__call__"][0].dtype == jnp.float32
    real = np.arange(12)[None] < np.asarray(LENGTHS)[:, None]
    inputs = np.asarray(seen["encoder"]["__call__"][0], np.float64)[real]
    statistics = updated["batch_stats"]["block_0"]["norm"]["batch"]
    assert_close(statistics["mean"], 0.5 * inputs.mean(0), scale=100)
    np.testing.assert_allclose(statistics["var"], 0.5 + 0.5 * inputs.var(0), rtol=1e-3)


def test_patterns_repeat():
    assert layers("s4d s4d s5", 5) == ["s4d", "s4d", "s5", "s4d", "s4d"]


X = jnp.zeros((2, 12, 2))


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        (dict(pattern="s4d s6"), X, "unknown mixer in pattern 's6'; did you mean"),
        (dict(mixers={"s4": {}}), X, "unknown mixer with options 's4'; did you mean 's4d'"),
        (dict(dropout=2.0), X, "dropout is 2.0; it must be at least 0 and below 1"),
        (dict(width=0), X, "width is 0; it must be at least 1"),
        (dict(mixers={"s4d": dict(state=4)}), X, "unknown option of s4d 'state'; did you mean 'state_size'"),
        (dict(norm="bach"), X, "unknown norm 'bach'; did you mean 'batch'"),
        (dict(glu="half3"), X, "unknown glu 'half3'"),
        (dict(pooling="men"), X, "unknown pooling 'men'; did you mean 'mean'"),
        (dict(encoder="imag"), X, "unknown encoder 'imag'; did you mean 'image'"),
        (dict(dtype="float16"), X, "unknown dtype 'float16'"),
        (dict(depth=0), X, "depth 0"),
        (dict(input_size=3), X, "inputs have 2 channels; input_size is 3"),
        (dict(), X[0], r"inputs have shape \(12, 2\); the continuous encoder takes 3 axes"),
        (dict(), X.astype(int), "inputs are int32; the continuous encoder takes floats"),
        (dict(encoder="token"), X[..., 0], "inputs are float32; the token encoder takes integers"),
    ],
)
def test_wrong_options_and_inputs_are_named(options, inputs, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options).init(jax.random.key(0), inputs)


def test_lengths_must_be_one_a_row(untyped):
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\); 2 sequences need \(2,\)"):
        classifier().init(jax.random.key(0), X, LENGTHS)
