"""Published checkpoints: what they compute against a loop over their own tensors, round trips, and every error."""

import json

import huggingface_hub.constants
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file, save_file

from ssm import pretrained
from ssm.language_model import LanguageModel
from tests import published
from tests.oracles import assert_close
from tests.published import ARCHITECTURES, config, write

BFLOAT16 = ml_dtypes.bfloat16
TOKENS = np.array([3, 0, 17, 5, 5, 23, 1, 8, 2])


def logits(loaded, tokens=TOKENS):
    return jax.jit(loaded.model.apply)(loaded.variables, tokens[None])[0][0]


def raw(folder):
    """Bytes, dtype and shape of every tensor."""
    tensors = load_file(folder / "model.safetensors")
    return {name: (value.tobytes(), value.dtype.name, value.shape) for name, value in tensors.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits(architecture, tmp_path, rng):
    """Defaults too: the loop takes all that config.json does not say from the published code."""
    tensors = published.tensors(architecture, rng)
    loaded = pretrained.load(write(tmp_path, config(architecture), tensors))
    assert_close(logits(loaded), published.logits(architecture, tensors, TOKENS), scale=100)
    assert loaded.layout == ("huggingface" if "CausalLM" in architecture else "state-spaces")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untied_head(architecture, tmp_path, rng):
    tensors = published.tensors(architecture, rng, head="own")
    field = "tie_word_embeddings" if "CausalLM" in architecture else "tie_embeddings"
    loaded = pretrained.load(write(tmp_path, config(architecture, **{field: False}), tensors))
    assert_close(logits(loaded), published.logits(architecture, tensors, TOKENS), scale=100)


@pytest.mark.parametrize("head", ["absent", "again"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(architecture, dtype, head, tmp_path, rng):
    """The same bytes, a mixture of dtypes too; config.json with what we do not know; lm_head where it was."""
    tensors = published.tensors(architecture, rng, dtype, head)
    name = "backbone.layers.1.mixer.A_log"
    tensors[name] = tensors[name].astype(np.float32)
    about = config(architecture, note={"of": [1, "ours"]}, time_step_scale=None)
    folder = write(tmp_path / "in", about, tensors)
    pretrained.save(tmp_path / "out", pretrained.load(folder))
    assert raw(tmp_path / "out") == raw(folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == about
    again = pretrained.load(tmp_path / "out")
    assert again.dtypes == {name: value.dtype.name for name, value in tensors.items()}
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(again.variables))


def test_activations_in_bfloat16(tmp_path, rng):
    tensors = published.tensors("Mamba2", rng)
    loaded = pretrained.load(write(tmp_path, config("Mamba2"), tensors), dtype="bfloat16")
    error = np.linalg.norm(logits(loaded) - (ref := published.logits("Mamba2", tensors, TOKENS))) / np.linalg.norm(ref)
    assert 1e-4 < error < 3e-2


def shard(folder):
    """The checkpoint in `folder` in two files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    place = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def test_shards(tmp_path, rng):
    whole = write(tmp_path / "whole", config("Mamba1"), published.tensors("Mamba1", rng, BFLOAT16))
    shards = shard(write(tmp_path / "shards", config("Mamba1"), load_file(whole / "model.safetensors")))
    pretrained.save(tmp_path / "out", pretrained.load(shards))
    assert raw(tmp_path / "out") == raw(whole)


def test_intermediate_size_goes_before_expand(tmp_path, rng):
    """As in Falcon-Mamba-7B's own config.json."""
    tensors = published.tensors("FalconMambaForCausalLM", rng)
    about = config("FalconMambaForCausalLM", expand=16, intermediate_size=published.INNER)
    loaded = pretrained.load(write(tmp_path, about, tensors))
    assert_close(logits(loaded), published.logits("FalconMambaForCausalLM", tensors, TOKENS), scale=100)


def test_transformers_writes_infinity_as_an_object(tmp_path, rng):
    tensors = published.tensors("Mamba2ForCausalLM", rng)
    limit = [0.25, {"__float__": "Infinity"}]
    loaded = pretrained.load(write(tmp_path, config("Mamba2ForCausalLM", time_step_limit=limit), tensors))
    assert loaded.model.mixers["mamba2"]["dt_limit"] == (0.25, float("inf"))


# Export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, layout", [
    ("MambaForCausalLM", "state-spaces"),
    ("Mamba2ForCausalLM", "state-spaces"),
    ("Mamba1", "huggingface"),
    ("Mamba2", "huggingface"),
    ("FalconMambaForCausalLM", "huggingface"),
])  # fmt: skip
def test_another_layout(source, layout, tmp_path, rng):
    """The tensors under the other layout's names, and the same model again."""
    tensors = published.tensors(source, rng, head="again")
    loaded = pretrained.load(write(tmp_path / "in", config(source), tensors))
    pretrained.save(tmp_path / "out", pretrained.export(loaded.model, loaded.variables, layout, dtype="bfloat16"))
    names = {name.replace("embeddings", "embedding"): value.astype(BFLOAT16) for name, value in tensors.items()}
    if layout == "huggingface":
        del names["lm_head.weight"]
        names["backbone.embeddings.weight"] = names.pop("backbone.embedding.weight")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.tobytes() for name, value in out.items()} == {n: v.tobytes() for n, v in names.items()}
    again = pretrained.load(tmp_path / "out")
    assert again.layout == layout
    assert_close(logits(again), published.logits(source, names, TOKENS), scale=100)


def test_stacked_blocks_are_exported_one_by_one(tmp_path):
    options = dict(
        vocabulary=24, width=8, depth=3, pattern="mamba2", mixers={"mamba2": dict(state_size=4, head_size=4)}
    )
    model = LanguageModel(**options, scan_layers=True, tie_embeddings=False)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS[None])
    pretrained.save(tmp_path / "out", pretrained.export(model, variables))
    assert_close(
        logits(pretrained.load(tmp_path / "out")), jax.jit(model.apply)(variables, TOKENS[None])[0][0], scale=9
    )


@pytest.mark.parametrize("options, layout, message", [
    (dict(pattern="mamba"), "hugginface", "unknown layout 'hugginface'; did you mean 'huggingface'?"),
    (dict(pattern="mamba mamba2"), "huggingface", "unknown pattern of a published layout 'mamba mamba2'"),
    (dict(pattern="s5"), "huggingface", "unknown pattern of a published layout 's5'"),
    (dict(pattern="mamba", mixers={"mamba": dict(rule="zoh")}), "huggingface", "no place for mixer.rule='zoh'"),
    (dict(pattern="mamba", mixers={"mamba": dict(norm_BCdt=True)}), "state-spaces", "mixer.norm_BCdt=True"),
    (dict(pattern="mamba", norm_eps=1e-6), "state-spaces", "no place for norm_eps=1e-06"),
    (dict(pattern="mamba", mlp_size=4), "huggingface", "no place for block_0/mlp/down/kernel"),
    (dict(pattern="mamba2", norm_eps=1e-6, mixers={"mamba2": dict(head_size=4)}), "huggingface",
     "one field layer_norm_epsilon for both 1e-06 and 1e-05"),
])  # fmt: skip
def test_what_a_layout_cannot_say(options, layout, message):
    model = LanguageModel(vocabulary=24, width=8, depth=1, **options)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS[None])
    with pytest.raises(ValueError, match=message) as error:
        pretrained.export(model, variables, layout)
    assert "\n" not in str(error.value)


# Errors --------------------------------------------------------------------------------------------


def refused(folder):
    with pytest.raises(ValueError) as error:
        pretrained.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("architecture, change, message", [
    ("Mamba1", {"backbone.layers.1.mixer.D": None},
     "tensor backbone.layers.1.mixer.D of shape (16,) is missing"),
    ("Mamba1", {"backbone.norm_f.weight": None, "backbone.layers.1.mixer.D": None},
     "backbone.layers.1.mixer.D of shape (16,) is missing, with 1 more"),
    ("Mamba2", {"backbone.layers.0.mixer.norm2.weight": np.ones(3)}, "mixer.norm2.weight has no place"),
    ("Mamba2", {"backbone.layers.2.norm.weight": np.ones(8, "f")}, "tensor backbone.layers.2.norm.weight has no place"),
    ("MambaForCausalLM", {"backbone.layers.0.mixer.in_proj.weight": np.ones((8, 32), "f")},
     "tensor backbone.layers.0.mixer.in_proj.weight has shape (8, 32); expected (32, 8)"),
    ("MambaForCausalLM", {"backbone.norm_f.weight": np.ones(8)}, "tensor backbone.norm_f.weight is float64; supported"),
    ("Mamba1", {"lm_head.weight": np.ones((24, 8), "f")},
     "lm_head.weight differs from the embedding, although config.json ties them"),
])  # fmt: skip
def test_wrong_tensors(architecture, change, message, tmp_path, rng):
    tensors = published.tensors(architecture, rng) | change
    tensors = {name: value for name, value in tensors.items() if value is not None}
    assert message in refused(write(tmp_path, config(architecture), tensors))


@pytest.mark.parametrize("about, message", [
    (config("MambaForCausalLM", architectures=["Mamba3ForCausalLM"]),
     "unknown architecture 'Mamba3ForCausalLM'; did you mean 'MambaForCausalLM'? Allowed: FalconMamba"),
    (config("Mamba1", ssm_cfg={"layer": "Mamba3"}), "unknown architecture 'Mamba3'; did you mean"),
    (dict(model_type="mamba"), "config.json names no architecture"),
    (config("MambaForCausalLM", hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu' is supported"),
    (config("MambaForCausalLM", hidden_size="8"), "hidden_size is '8'; it must be like 768"),
    (config("MambaForCausalLM", time_step_rank="big"), "time_step_rank is 'big'; it must be like 'auto'"),
    (config("MambaForCausalLM", intermediate_size=20), "intermediate_size is 20; it must be a multiple of 8"),
    (config("Mamba2ForCausalLM", n_groups=3), "groups is 3; it must divide the 4 heads"),
    (config("MambaForCausalLM", use_bias=1), "use_bias is 1; it must be like False"),
    (config("MambaForCausalLM", expand=0), "expand is 0; it must be at least 1"),
    (config("Mamba1", attn_layer_idx=[1]), "attn_layer_idx is [1]; only [] is supported"),
    (config("Mamba1", d_intermediate=16), "d_intermediate is 16; only 0"),
    (config("Mamba1", rms_norm=False), "rms_norm is False; only True"),
    (config("Mamba1", ssm_cfg=dict(d_sate=3)), "unknown field of ssm_cfg 'd_sate'; did you mean 'd_state'?"),
    (config("Mamba2", ssm_cfg=dict(layer="Mamba2", d_ssm=8)), "ssm_cfg.d_ssm is 8; only None"),
    (config("Mamba2", ssm_cfg=dict(layer="Mamba2", D_has_hdim=True)), "ssm_cfg.D_has_hdim is True; only False"),
    (config("Mamba2", ssm_cfg=dict(layer="Mamba2", rmsnorm=False)), "ssm_cfg.rmsnorm is False; only True"),
])  # fmt: skip
def test_wrong_config(about, message, tmp_path):
    assert message in refused(write(tmp_path, about, {}))


def test_fields_that_only_a_beginning_or_a_kernel_reads(tmp_path, rng):
    about = config("Mamba2")
    about["ssm_cfg"] |= dict(A_init_range=[1, 16], use_mem_eff_path=True, chunk_size=256, dt_init_floor=1e-4)
    loaded = pretrained.load(write(tmp_path, about, published.tensors("Mamba2", rng)))
    assert loaded.config == about


@pytest.mark.parametrize("content, message", [
    (None, "config.json does not exist"),
    ('{"d_model": 8,', "config.json is not JSON"),
    ("[1]", "config.json holds a list; it must hold a JSON object"),
])  # fmt: skip
def test_no_config(content, message, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    assert message in refused(tmp_path)


def test_damaged_files(tmp_path, rng):
    folder = write(tmp_path, config("Mamba1"), published.tensors("Mamba1", rng))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    assert refused(folder).startswith(f"{file} cannot be read: ")
    file.unlink()
    assert "has no weights: no model.safetensors or pytorch_model.bin" in refused(folder)


def test_damaged_shards(tmp_path, rng):
    folder = shard(write(tmp_path, config("Mamba1"), published.tensors("Mamba1", rng)))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors does not exist, although model.safetensors.index.json" in refused(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index.json has no weight_map" in refused(folder)


def test_pytorch_files_need_pytorch(tmp_path, monkeypatch):
    (write(tmp_path, config("Mamba1"), {}) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert "pytorch_model.bin is a PyTorch file; to read it, pip install torch" in refused(tmp_path)


def test_nothing_is_overwritten_or_half_written(tmp_path, rng, monkeypatch):
    folder = write(tmp_path / "in", config("Mamba1"), published.tensors("Mamba1", rng))
    loaded = pretrained.load(folder)
    before = raw(folder)
    with pytest.raises(ValueError, match="in exists; nothing was written"):
        pretrained.save(folder, loaded)
    loaded.variables["params"]["block_1"]["mixer"]["D"] = np.ones(3)
    with pytest.raises(ValueError, match=r"block_1/mixer/D .* has shape \(3,\); expected \(16,\)"):
        pretrained.save(tmp_path / "out", loaded)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        pretrained.save(tmp_path / "out", pretrained.load(folder))
    assert raw(folder) == before and [p.name for p in tmp_path.iterdir()] == ["in"]


# The hub -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no/such/folder", "nothing", "../x", "org/"])
def test_neither_folder_nor_name(name):
    assert "neither a folder nor the name ORG/NAME" in refused(name)


def test_no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused("org/mamba").startswith("org/mamba is not a folder and cannot be downloaded: ")


def test_only_what_is_needed_is_downloaded(tmp_path, rng, monkeypatch):
    """PyTorch's files only where there are no others."""
    folder = write(tmp_path, config("Mamba1"), published.tensors("Mamba1", rng))
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pretrained.load("org/mamba")
    assert [name for name, _ in asked] == ["org/mamba"] and not any(".bin" in p for p in asked[0][1])
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused("org/mamba")
    assert len(asked) == 3 and asked[2][1] == ("pytorch_model*.bin", "pytorch_model.bin.index.json")
