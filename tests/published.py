"""Tiny checkpoints as mamba_ssm and transformers publish them, and what they compute, one token after another."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

VOCABULARY, WIDTH, DEPTH, STATE, INNER, TAPS, RANK, HEADS, GROUPS = 24, 8, 2, 3, 16, 4, 2, 4, 2
HUGGINGFACE = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, vocab_size=VOCABULARY, state_size=STATE)
STATE_SPACES = dict(d_model=WIDTH, n_layer=DEPTH, vocab_size=VOCABULARY - 5, rms_norm=True)
CONFIGS = {
    "MambaForCausalLM": HUGGINGFACE | dict(time_step_rank=RANK),
    "FalconMambaForCausalLM": HUGGINGFACE | dict(time_step_rank=RANK, mixer_rms_eps=1e-3),
    "Mamba2ForCausalLM": HUGGINGFACE
    | dict(num_heads=HEADS, head_dim=INNER // HEADS, n_groups=GROUPS, tie_word_embeddings=True),
    "Mamba1": STATE_SPACES | dict(ssm_cfg=dict(d_state=STATE, dt_rank=RANK)),
    "Mamba2": STATE_SPACES | dict(ssm_cfg=dict(layer="Mamba2", d_state=STATE, headdim=INNER // HEADS, ngroups=GROUPS)),
}
ARCHITECTURES = tuple(CONFIGS)


def is_second(architecture: str) -> bool:
    return architecture.startswith("Mamba2")


def config(architecture: str, **more) -> dict:
    """config.json; what it leaves out has the published default."""
    named = {"architectures": [architecture]} if "CausalLM" in architecture else {}
    return named | CONFIGS[architecture] | more


def shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by its published name, without lm_head.weight."""
    through = INNER + 2 * GROUPS * STATE if is_second(architecture) else INNER
    mixer = {"conv1d.weight": (through, 1, TAPS), "conv1d.bias": (through,), "out_proj.weight": (WIDTH, INNER)}
    if is_second(architecture):
        mixer |= {"in_proj.weight": (INNER + through + HEADS, WIDTH), "norm.weight": (INNER,)}
        mixer |= dict.fromkeys(("A_log", "D", "dt_bias"), (HEADS,))
    else:
        mixer |= {"in_proj.weight": (2 * INNER, WIDTH), "x_proj.weight": (RANK + 2 * STATE, INNER)}
        mixer |= {"dt_proj.weight": (INNER, RANK), "dt_proj.bias": (INNER,), "A_log": (INNER, STATE), "D": (INNER,)}
    found = {f"backbone.layers.{i}.mixer.{name}": shape for i in range(DEPTH) for name, shape in mixer.items()}
    found |= {f"backbone.layers.{i}.norm.weight": (WIDTH,) for i in range(DEPTH)}
    embedding = "embeddings" if "CausalLM" in architecture else "embedding"
    return found | {"backbone.norm_f.weight": (WIDTH,), f"backbone.{embedding}.weight": (VOCABULARY, WIDTH)}


def tensors(architecture: str, rng: np.random.Generator, dtype=np.float32, head: str = "absent") -> dict:
    """Random ones. head: "absent", or the embedding "again", or a matrix of its "own"."""
    found = {name: rng.normal(size=shape) * 0.5 for name, shape in shapes(architecture).items()}
    if head != "absent":
        embedding = next(value for name, value in found.items() if "embedding" in name)
        found["lm_head.weight"] = embedding if head == "again" else rng.normal(size=embedding.shape)
    return {name: value.astype(dtype) for name, value in found.items()}


def write(folder: pathlib.Path, config: dict, tensors: dict) -> pathlib.Path:
    """A checkpoint of one safetensors file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits(architecture: str, tensors: dict, tokens: np.ndarray) -> np.ndarray:
    """(l, vocabulary) for tokens (l,), in float64."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    embedding = next(value for name, value in t.items() if "embedding" in name)
    x = embedding[tokens]
    for i in range(DEPTH):
        p = {name[18:]: value for name, value in t.items() if name.startswith(f"backbone.layers.{i}.")}
        x = x + (_mamba2 if is_second(architecture) else _mamba)(p, _norm(x, p["norm.weight"]), architecture)
    return _norm(x, t["backbone.norm_f.weight"]) @ t.get("lm_head.weight", embedding).T


def _norm(x, weight=1.0, eps=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _silu(x):
    return x / (1 + np.exp(-x))


def _convolved(p, x):
    padded = np.pad(x, ((TAPS - 1, 0), (0, 0)))
    weight = p["mixer.conv1d.weight"][:, 0]
    return _silu(sum(weight[:, j] * padded[j : j + len(x)] for j in range(TAPS)) + p["mixer.conv1d.bias"])


def _mamba(p, x, architecture):
    x, z = np.split(x @ p["mixer.in_proj.weight"].T, 2, -1)
    x = _convolved(p, x)
    dt, B, C = np.split(x @ p["mixer.x_proj.weight"].T, [RANK, RANK + STATE], -1)
    if architecture.startswith("Falcon"):
        dt, B, C = (_norm(v, eps=CONFIGS[architecture]["mixer_rms_eps"]) for v in (dt, B, C))
    dt = np.log1p(np.exp(dt @ p["mixer.dt_proj.weight"].T + p["mixer.dt_proj.bias"]))
    h, y = np.zeros((INNER, STATE)), []
    for t in range(len(x)):
        h = np.exp(-dt[t][:, None] * np.exp(p["mixer.A_log"])) * h + np.outer(dt[t] * x[t], B[t])
        y.append(h @ C[t] + p["mixer.D"] * x[t])
    return (np.array(y) * _silu(z)) @ p["mixer.out_proj.weight"].T


def _mamba2(p, x, architecture):
    z, x, dt = np.split(x @ p["mixer.in_proj.weight"].T, [INNER, -HEADS], -1)
    x, B, C = np.split(_convolved(p, x), [INNER, INNER + GROUPS * STATE], -1)
    x = x.reshape(len(x), HEADS, -1)
    B, C = (np.repeat(v.reshape(len(v), GROUPS, STATE), HEADS // GROUPS, 1) for v in (B, C))
    dt = np.log1p(np.exp(dt + p["mixer.dt_bias"]))
    h, y = np.zeros((HEADS, INNER // HEADS, STATE)), []
    for t in range(len(x)):
        decay = np.exp(-dt[t] * np.exp(p["mixer.A_log"]))
        h = decay[:, None, None] * h + np.einsum("hp,hn->hpn", dt[t][:, None] * x[t], B[t])
        y.append((np.einsum("hpn,hn->hp", h, C[t]) + p["mixer.D"][:, None] * x[t]).reshape(-1))
    gated = (np.array(y) * _silu(z)).reshape(len(x), GROUPS, -1)
    return (_norm(gated).reshape(len(x), -1) * p["mixer.norm.weight"]) @ p["mixer.out_proj.weight"].T
