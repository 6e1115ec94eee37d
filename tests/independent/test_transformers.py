"""Checkpoints that transformers writes, read by us: the same logits, states and text as its own models give."""

import json
import os
from functools import partial

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")

import jax
import numpy as np
import pytest
import torch
import transformers

from ssm import generation, pretrained
from tests.oracles import relative

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2)
MAMBA2 = SIZES | dict(state_size=16, num_heads=8, head_dim=8, chunk_size=8)
MODELS = {
    "mamba": ("Mamba", SIZES | dict(state_size=8, time_step_rank=4)),
    "mamba, biases": (
        "Mamba",
        SIZES | dict(state_size=5, use_bias=True, use_conv_bias=False, tie_word_embeddings=False),
    ),
    "falcon": (
        "FalconMamba",
        SIZES | dict(state_size=8, time_step_rank=4, mixer_rms_eps=1e-2, expand=16, intermediate_size=64),
    ),
    "mamba2, 1 group": ("Mamba2", MAMBA2 | dict(n_groups=1, use_bias=True, tie_word_embeddings=True)),
    "mamba2, 2 groups": ("Mamba2", MAMBA2 | dict(n_groups=2, layer_norm_epsilon=1e-3)),
    "mamba2, 8 groups": ("Mamba2", MAMBA2 | dict(n_groups=8, use_conv_bias=False)),
}
BOUND = 1e-5


def build(name, folder, **more):
    """A model with random weights, none of them where transformers starts them, and what we read of it."""
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, pretrained.load(folder)


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp("model"))


def tokens(rng, *shape):
    return rng.integers(3, 97, shape)


def theirs(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), **more)


def apply(loaded, *args, **more):
    return _apply(loaded.model, loaded.variables, *args, **more)


@partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, variables, *args, **more):
    return model.apply(variables, *args, **more)


@pytest.mark.parametrize("length", [1, 2, 13, 21])
def test_logits(both, length, rng):
    model, ours = both
    ids = tokens(rng, 2, length)
    assert relative(apply(ours, ids)[0], theirs(model, ids, use_cache=False).logits) < BOUND


@pytest.mark.parametrize("prompt", [2, 13])
def test_steps_after_a_prompt(both, prompt, rng):
    """One token at a time from the state after a prompt, theirs from their cache; and both states at the end."""
    model, ours = both
    ids = tokens(rng, 2, prompt + 6)
    out, (_, state) = theirs(model, ids[:, :prompt], use_cache=True), apply(ours, ids[:, :prompt])
    for t in range(prompt, prompt + 6):
        out = theirs(model, ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
        logits, state = apply(ours, ids[:, t], state, method="step")
        assert relative(logits, out.logits[:, 0]) < BOUND
    for i, (_, h) in enumerate(state):
        assert relative(h, out.cache_params.get_recurrent_state(i, state_idx=0)) < BOUND


def test_a_prompt_in_pieces(both, rng):
    """Ours goes on from its state. Theirs, for Mamba and Falcon, forgets it: their scan starts from zero again."""
    model, ours = both
    ids = tokens(rng, 2, 18)
    whole = theirs(model, ids, use_cache=False).logits[:, 13:]
    _, state = apply(ours, ids[:, :13])
    assert relative(apply(ours, ids[:, 13:], state)[0], whole) < BOUND
    cache = theirs(model, ids[:, :13], use_cache=True).cache_params
    error = relative(theirs(model, ids[:, 13:], cache_params=cache, use_cache=True).logits, whole)
    assert (error > 1e-3) == (ours.model.pattern == "mamba")


def test_left_padding(both, rng):
    """Padding is their attention_mask and our segment of its own: a row gives what it gives alone.

    Theirs does not where in_proj has a bias, which the convolution then reads in place of the padding.
    """
    model, ours = both
    ids = tokens(rng, 2, 9)
    mask = np.array([[1] * 9, [0] * 4 + [1] * 5])
    logits = apply(ours, ids, segment_ids=mask)[0]
    alone = theirs(model, ids[1:, 4:], use_cache=False).logits[0]
    padded = theirs(model, ids, attention_mask=torch.tensor(mask)).logits
    assert relative(logits[0], padded[0]) < BOUND and relative(logits[1, 4:], alone) < BOUND
    assert (relative(padded[1, 4:], alone) > 1e-3) == model.config.use_bias


def test_greedy_text(both, rng):
    model, ours = both
    ids = tokens(rng, 2, 7)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        expected = model.generate(torch.tensor(ids), attention_mask=torch.ones(2, 7), max_new_tokens=20, **options)
    written = generation.generate(ours.model, ours.variables, ids, max_tokens=20).tokens_bl
    np.testing.assert_array_equal(written, expected[:, 7:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mamba", "falcon", "mamba2, 2 groups"])
def test_half_precision_is_computed_in_float32(name, dtype, tmp_path, rng):
    """The logits of transformers' model with the same rounded weights in float32."""
    model, _ = build(name, tmp_path / "float32")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
    ours = pretrained.load(tmp_path / "half")
    assert set(ours.dtypes.values()) == {dtype}
    ids = tokens(rng, 2, 21)
    assert relative(apply(ours, ids)[0], theirs(model.float(), ids, use_cache=False).logits) < BOUND


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mamba", "mamba2, 1 group"])
def test_pytorch_files_of_mamba_ssm(name, dtype, tmp_path, rng):
    """The same weights under mamba_ssm's names in pytorch_model.bin, in two of them, and in the format before zip."""
    model, ours = build(name, tmp_path / "theirs")
    folder = tmp_path / "bin"
    pretrained.save(folder, pretrained.export(ours.model, ours.variables, "state-spaces"))
    (folder / "model.safetensors").unlink()
    tensors = {
        key.replace("embeddings", "embedding"): value.to(getattr(torch, dtype))
        for key, value in model.state_dict().items()
    }
    model.to(getattr(torch, dtype)).float()
    ids = tokens(rng, 2, 11)
    expected = theirs(model, ids).logits
    file = folder / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        loaded = pretrained.load(folder)
        assert loaded.layout == "state-spaces" and loaded.dtypes == dict.fromkeys(tensors, dtype)
        assert relative(apply(loaded, ids)[0], expected) < BOUND
    place = {key: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, key in enumerate(tensors)}
    for shard in set(place.values()):
        torch.save({key: value for key, value in tensors.items() if place[key] == shard}, folder / shard)
    file.with_name("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
    file.unlink()
    assert relative(apply(pretrained.load(folder), ids)[0], expected) < BOUND


def test_damaged_pytorch_files(tmp_path):
    build("mamba", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"

    def refused():
        with pytest.raises(ValueError, match="pytorch_model.bin cannot be read: ") as error:
            pretrained.load(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    torch.save({"model": {"a": torch.ones(2)}}, file)
    assert "no table of tensors" in refused()
    torch.save({"a": torch.ones(200)}, file)
    file.write_bytes(file.read_bytes()[:-300])
    refused()
    file.write_bytes(b"version https://git-lfs")
    refused()
    torch.save(Trap(), file)
    refused()
    assert Trap.sprung == 0


class Trap:
    """Counts how often it is unpickled."""

    sprung = 0

    def __reduce__(self):
        return spring, ()


def spring():
    Trap.sprung += 1


def test_dt_limit(tmp_path, rng):
    """Against their whole forward pass: their one-token steps do not limit dt."""
    model, ours = build("mamba2, 2 groups", tmp_path, time_step_limit=(0.5, 0.9))
    ids = tokens(rng, 2, 21)
    assert relative(apply(ours, ids)[0], theirs(model, ids, use_cache=False).logits) < BOUND


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_we_write(name, tmp_path, rng):
    model, ours = build(name, tmp_path / "theirs")
    pretrained.save(tmp_path / "ours", pretrained.export(ours.model, ours.variables, "huggingface"))
    again = type(model).from_pretrained(tmp_path / "ours")
    ids = tokens(rng, 2, 11)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert relative(theirs(again, ids).logits, theirs(model, ids).logits) < BOUND  # the same fields of config.json
