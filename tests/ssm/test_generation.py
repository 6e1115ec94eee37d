"""Prompts of unequal length, sampling against exact probabilities, and states that are saved, branched, rolled back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm import generation
from ssm.generation import candidates, generate, padded, prefill, sample, stream
from tests.ssm.test_language_model import FAMILIES, VOCABULARY, assert_all_close, language_model, start

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10], [3, 4, 5, 6]]
MORE = [[4, 4], [1, 2, 3, 4, 5], [7]]


def alone(model, variables, texts):
    """Logits after each text, and its state, from the model itself: one text at a time, token after token."""
    step = jax.jit(lambda token, state: model.apply(variables, token, state, method="step"))
    ends = []
    for text in texts:
        state = model.initial_state(1)
        for token in text:
            logits, state = step(jnp.asarray([token]), state)
        ends.append((logits, state))
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *ends)


@pytest.mark.parametrize("name", FAMILIES)
def test_unequal_prompts_are_each_prompt_alone(name, rng):
    """At once, in pieces (some of them all padding), and going on, unequally, from a state that was given."""
    model, variables, _ = start(rng, name)
    expected = alone(model, variables, PROMPTS)
    whole = prefill(model, variables, PROMPTS)
    assert_all_close(whole, expected)
    assert_all_close(prefill(model, variables, PROMPTS, piece=3), expected)
    both = alone(model, variables, [a + b for a, b in zip(PROMPTS, MORE, strict=True)])
    assert_all_close(prefill(model, variables, MORE, state=whole[1]), both)


@pytest.mark.parametrize("piece", [1, 4, 9])
def test_pieces_of_any_size(piece, rng):
    model, variables, _ = start(rng, "s5 attention")
    assert_all_close(prefill(model, variables, PROMPTS, piece=piece), prefill(model, variables, PROMPTS))
    _, state = prefill(model, variables, PROMPTS)
    expected = prefill(model, variables, MORE, state=state)
    assert_all_close(prefill(model, variables, MORE, state=state, piece=piece), expected)


def writer(rng):
    """A model of two mixers whose next token is not a foregone conclusion."""
    return start(rng, "s5 attention", tie_embeddings=False)[:2]


def test_greedy_text_is_the_whole_sequence_read_again(rng):
    model, variables = writer(rng)
    written = generate(model, variables, PROMPTS, max_tokens=6)
    apply = jax.jit(model.apply)
    for prompt, row in zip(PROMPTS, written.tokens_bl, strict=True):
        text = jnp.asarray([prompt + row.tolist()])
        logits, _ = apply(variables, jnp.pad(text, ((0, 0), (0, 15 - text.shape[1]))))
        np.testing.assert_array_equal(row, logits[0, len(prompt) - 1 :].argmax(-1)[:6])
    assert len(np.unique(written.tokens_bl, axis=0)) == 3
    np.testing.assert_array_equal(written.lengths_b, [6, 6, 6])


DRAW = dict(max_tokens=12, temperature=1.5, top_k=9, top_p=0.95)


def test_a_row_stops_and_keeps_its_state(rng, monkeypatch):
    """Every row goes on as without `stop` until it draws one; then it repeats it, and reads nothing more.
    In programs of four tokens: what has stopped is carried from one to the next."""
    monkeypatch.setattr(generation, "TOGETHER", 4)
    model, variables = writer(rng)
    key = jax.random.key(3)
    free = generate(model, variables, PROMPTS, key=key, **DRAW).tokens_bl
    stop = (int(free[0, 2]), int(free[1, 4]))
    ends = [min([i for i, token in enumerate(row) if token in stop], default=11) for row in free]
    assert len(set(ends)) > 1
    written = generate(model, variables, PROMPTS, key=key, stop=stop, **DRAW)
    np.testing.assert_array_equal(written.lengths_b, np.asarray(ends) + 1)
    assert written.tokens_bl.shape[1] == max(ends) + 1
    texts = []
    for row, expected, end, prompt in zip(written.tokens_bl, free, ends, PROMPTS, strict=True):
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert set(row[end + 1 :].tolist()) <= {int(expected[end])}
        texts.append(prompt + row[: end + 1].tolist())
    assert_all_close(written.state, alone(model, variables, texts)[1])


def test_a_stream_yields_what_is_generated_and_compiles_once(rng, monkeypatch):
    """A step that were compiled for each token, setting, key or prompt would show in the count."""
    model, variables = writer(rng)
    key = jax.random.key(4)
    compiled = generation._step, generation._draw, generation._write
    for function in compiled:
        function.clear_cache()
    expected = generate(model, variables, PROMPTS, key=key, **DRAW).tokens_bl
    monkeypatch.setattr(generation, "TOGETHER", 5)
    by_five = generate(model, variables, PROMPTS, key=key, **DRAW).tokens_bl
    np.testing.assert_array_equal(by_five, expected)
    tokens = list(stream(model, variables, PROMPTS, key=key, **DRAW))
    np.testing.assert_array_equal(np.stack(tokens, 1), expected)
    twin = language_model("s5 attention", tie_embeddings=False)
    other = list(stream(twin, variables, PROMPTS, key=jax.random.key(5), **DRAW | dict(max_tokens=3)))
    assert np.any(np.stack(other, 1) != expected[:, :3])
    assert [function._cache_size() for function in compiled] == [1, 1, 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_state_goes_round_the_loop(name, rng):
    """One by one and by one program; in bfloat16 the state keeps its dtypes, or a loop would not take it."""
    model, variables, _ = start(rng, name)
    tokens = generate(model, variables, PROMPTS, max_tokens=3).tokens_bl
    np.testing.assert_array_equal(np.stack(list(stream(model, variables, PROMPTS, max_tokens=3)), 1), tokens)
    half, state = model.clone(dtype="bfloat16"), model.initial_state(3)
    step = partial(half.apply, method="step")
    _, after = jax.eval_shape(step, variables, jnp.zeros(3, jnp.int32), state)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), after) == jax.tree.map(lambda s: (s.shape, s.dtype), state)


def test_every_step_and_row_draws_anew(rng):
    """A model that knows nothing; one key for all steps, or one draw for all rows, would repeat itself."""
    model, variables = writer(rng)
    nothing = jax.tree.map(jnp.zeros_like, variables)
    tokens = generate(model, nothing, PROMPTS, max_tokens=40, temperature=1.0, key=jax.random.key(0)).tokens_bl
    assert all(len(np.unique(line)) > 6 for line in tokens)
    assert np.mean(tokens[0] == tokens[1]) < 0.4


def test_states_are_saved_branched_and_rolled_back(rng, tmp_path):
    model, variables = writer(rng)
    first = generate(model, variables, PROMPTS, max_tokens=3)
    np.savez(tmp_path / "state.npz", *jax.tree.leaves(first.state))
    expected = generate(model, variables, MORE, max_tokens=5, state=first.state)
    again = generate(model, variables, MORE, max_tokens=5, state=first.state)  # back to where we were
    np.testing.assert_array_equal(again.tokens_bl, expected.tokens_bl)

    with np.load(tmp_path / "state.npz") as kept:
        restored = jax.tree.unflatten(jax.tree.structure(model.initial_state(3)), list(kept.values()))
    np.testing.assert_array_equal(
        generate(model, variables, MORE, max_tokens=5, state=restored).tokens_bl, expected.tokens_bl
    )
    branches = jax.tree.map(lambda s: jnp.repeat(s[1:2], 3, 0), first.state)
    written = generate(model, variables, MORE, max_tokens=5, state=branches)
    np.testing.assert_array_equal(written.tokens_bl[1], expected.tokens_bl[1])
    texts = [PROMPTS[1] + first.tokens_bl[1].tolist() + more for more in MORE]
    logits, _ = alone(model, variables, texts)
    np.testing.assert_array_equal(written.tokens_bl[:, 0], logits.argmax(-1))


def test_a_state_is_no_larger_after_a_hundred_thousand_tokens(rng):
    """And as much a state: the last tokens alone, which are all that a window holds, give attention's again, where
    they end in the same slot of seven: 100,000 and 12 leave the same rest."""
    for pattern in ("mamba", "attention"):
        model, variables, _ = start(rng, pattern)
        text = rng.integers(0, VOCABULARY, size=(1, 100_000))
        size = [
            sum(leaf.nbytes for leaf in jax.tree.leaves(prefill(model, variables, prompt, piece=4096)[1]))
            for prompt in (text[:, -12:], text)
        ]
        assert size[0] == size[1]
        if pattern == "attention":
            assert_all_close(*(prefill(model, variables, part, piece=4096) for part in (text, text[:, -12:])))


def probabilities(logits, temperature, top_k, top_p):
    """One row by the definition: sort, cut, normalise."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += p[token] / p[order].sum()
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.6), (1.3, 4, 0.8), (0.5, 100, 0.9), (1.0, 1, 1e-6)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_candidates_have_the_exact_probabilities(temperature, top_k, top_p, rng):
    logits = np.concatenate([3 * rng.normal(size=(6, 11)), [[0.0] * 11], [[1.0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 5]]])
    log_p, tokens = candidates(jnp.asarray(logits, jnp.float32), temperature, top_k, top_p)
    out = np.zeros_like(logits)
    np.put_along_axis(out, np.asarray(tokens), np.asarray(jax.nn.softmax(log_p), np.float64), 1)
    expected = np.stack([probabilities(row, temperature, top_k, top_p) for row in logits])
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_array_equal(out > 0, expected > 0)


def test_samples_come_as_often_as_they_should(rng):
    """Chi squared of 40,000 draws: a token beside the one that was meant, or a wrong weight, is far outside."""
    logits, count = rng.normal(size=11), 40_000
    drawn = sample(jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1)), jax.random.key(0), 1.2, 8, 0.9)
    expected = count * probabilities(logits, 1.2, 8, 0.9)
    seen = np.bincount(drawn, minlength=11)
    assert not seen[expected == 0].any()
    likely = expected > 0
    assert np.sum((seen[likely] - expected[likely]) ** 2 / expected[likely]) < 30


def test_cold_samples_are_the_likeliest(rng):
    logits = jnp.asarray(1e4 * rng.normal(size=(50, 11)), jnp.float32)
    for temperature, top_k in [(0.0, 0), (1e-30, 0), (1.0, 1)]:
        np.testing.assert_array_equal(sample(logits, jax.random.key(0), temperature, top_k), logits.argmax(-1))


def test_padded_prompts():
    tokens, lengths = padded([[1, 2, 3], np.array([4])], 5)
    np.testing.assert_array_equal(tokens, [[1, 2, 3], [4, 0, 0]])
    np.testing.assert_array_equal(lengths, [3, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompts=[]), "prompts is empty; there must be at least one"),
        (dict(prompts=[[1], []]), "prompt 1 is empty; a model needs a token to go on from"),
        (dict(prompts=[[1], [2, 11]]), "prompt 1: 11 is outside the vocabulary, whose 11 tokens count from 0"),
        (dict(prompts=[[-1]]), "prompt 0: -1 is outside the vocabulary"),
        (dict(prompts=[[0.5]]), "prompt 0 is float64 of shape"),
        (dict(prompts=["text"]), "prompt 0 is <U4 of shape"),
        (dict(max_tokens=0), "max_tokens is 0; it must be at least 1"),
        (dict(temperature=-1.0), "temperature is -1.0; it must be 0"),
        (dict(temperature=float("nan")), "temperature is nan; it must be 0"),
        (dict(top_k=-1), "top_k is -1; it must be 0"),
        (dict(top_p=0.0), "top_p is 0.0; it must be above 0 and at most 1"),
        (dict(top_p=1.5), "top_p is 1.5; it must be above 0 and at most 1"),
        (dict(temperature=0.5, key=None), r"key is None; temperature 0.5 draws: pass jax.random.key\(seed\)"),
        (dict(stop=(50,)), "stop: 50 is outside the vocabulary"),
        (dict(piece=0), "piece is 0; it must be None or at least one token"),
        (dict(state=2), r"state of layer 0 is State\(h_bn=\(2, 8\)\); this model and batch size have State"),
    ],
)
def test_wrong_requests_are_named(options, message):
    """At the call, and not at the first token."""
    model = language_model("lru")
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), int))
    if "state" in options:
        options = options | dict(state=model.initial_state(options["state"]))
    request = dict(prompts=PROMPTS, max_tokens=2, key=jax.random.key(0)) | options
    for write in (generate, stream):
        with pytest.raises(ValueError, match=message):
            write(model, variables, **request)
