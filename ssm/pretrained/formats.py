"""The published layouts as tables: which tensor is which parameter, and which field of config.json is which of ours.

state-spaces is what mamba_ssm writes (mamba-*, mamba2-*), huggingface what transformers does.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# Tensors -------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """From the published axes of a tensor to ours, and back."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


SAME = Change(np.asarray, np.asarray)
LINEAR = Change(np.transpose, np.transpose)  # (out, in) to (in, out)
DEPTHWISE = Change(lambda x: x[:, 0], lambda x: x[:, None])  # (d, 1, k) to (d, k)

HEAD = "lm_head.weight"  # with tied embeddings the embedding once more, in files that hold it
ENDS = {  # our path: the published name
    "embedding/embedding": ("backbone.{embedding}.weight", SAME),
    "norm/scale": ("backbone.norm_f.weight", SAME),
    "head/kernel": (HEAD, LINEAR),
}
BLOCK = {  # the same below block_{i} and backbone.layers.{i}
    "norm/scale": ("norm.weight", SAME),
    "mixer/in_proj/kernel": ("mixer.in_proj.weight", LINEAR),
    "mixer/in_proj/bias": ("mixer.in_proj.bias", SAME),
    "mixer/conv/weight": ("mixer.conv1d.weight", DEPTHWISE),
    "mixer/conv/bias": ("mixer.conv1d.bias", SAME),
    "mixer/A_log": ("mixer.A_log", SAME),
    "mixer/D": ("mixer.D", SAME),
    "mixer/out_proj/kernel": ("mixer.out_proj.weight", LINEAR),
    "mixer/out_proj/bias": ("mixer.out_proj.bias", SAME),
}
TENSORS = {
    "mamba": BLOCK
    | {
        "mixer/x_proj/kernel": ("mixer.x_proj.weight", LINEAR),
        "mixer/dt_proj/kernel": ("mixer.dt_proj.weight", LINEAR),
        "mixer/dt_proj/bias": ("mixer.dt_proj.bias", SAME),
    },
    "mamba2": BLOCK
    | {
        "mixer/dt_bias": ("mixer.dt_bias", SAME),
        "mixer/norm/scale": ("mixer.norm.weight", SAME),
    },
}

# Fields --------------------------------------------------------------------------------------------

INFINITE = (0.0, float("inf"))
HUGGINGFACE = {  # our field: the published one, and its value where it is absent
    "vocabulary": ("vocab_size", 50280),
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 32),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_embeddings": ("tie_word_embeddings", True),
    "mixer.state_size": ("state_size", 16),
    "mixer.expand": ("expand", 2),
    "mixer.conv_width": ("conv_kernel", 4),
    "mixer.conv_bias": ("use_conv_bias", True),
    "mixer.bias": ("use_bias", False),
    "mixer.dt_min": ("time_step_min", 0.001),
    "mixer.dt_max": ("time_step_max", 0.1),
    "mixer.dt_floor": ("time_step_floor", 1e-4),
}
HUGGINGFACE_MAMBA2 = HUGGINGFACE | {
    "vocabulary": ("vocab_size", 32768),
    "width": ("hidden_size", 4096),
    "depth": ("num_hidden_layers", 64),
    "tie_embeddings": ("tie_word_embeddings", False),
    "mixer.state_size": ("state_size", 128),
    "mixer.head_size": ("head_dim", 64),
    "mixer.groups": ("n_groups", 8),
    "mixer.dt_limit": ("time_step_limit", INFINITE),
    "mixer.norm_eps": ("layer_norm_epsilon", 1e-5),
}
HUGGINGFACE_MAMBA = HUGGINGFACE | {"mixer.dt_rank": ("time_step_rank", "auto")}
STATE_SPACES = {
    "vocabulary": ("vocab_size", 50277),
    "width": ("d_model", 2560),
    "depth": ("n_layer", 64),
    "tie_embeddings": ("tie_embeddings", True),
    "mixer.expand": ("ssm_cfg.expand", 2),
    "mixer.conv_width": ("ssm_cfg.d_conv", 4),
    "mixer.conv_bias": ("ssm_cfg.conv_bias", True),
    "mixer.bias": ("ssm_cfg.bias", False),
    "mixer.dt_min": ("ssm_cfg.dt_min", 0.001),
    "mixer.dt_max": ("ssm_cfg.dt_max", 0.1),
    "mixer.dt_floor": ("ssm_cfg.dt_init_floor", 1e-4),
}
STATE_SPACES_MAMBA2 = STATE_SPACES | {
    "mixer.state_size": ("ssm_cfg.d_state", 128),
    "mixer.head_size": ("ssm_cfg.headdim", 64),
    "mixer.groups": ("ssm_cfg.ngroups", 1),
    "mixer.dt_limit": ("ssm_cfg.dt_limit", INFINITE),
    "mixer.norm_first": ("ssm_cfg.norm_before_gate", False),
}
STATE_SPACES_MAMBA = STATE_SPACES | {
    "mixer.state_size": ("ssm_cfg.d_state", 16),
    "mixer.dt_rank": ("ssm_cfg.dt_rank", "auto"),
}
WITHOUT_MEANING = (  # fields of ssm_cfg that say how training began, or which kernel runs
    *("dt_init", "dt_scale", "conv_init", "A_init_range"),
    *("chunk_size", "use_fast_path", "use_mem_eff_path", "process_group", "sequence_parallel"),
)
# Fields of a mixer that no layout needs: they change no result, or only where `implied` has them.
NEUTRAL = ("width", "parent", "name", "form", "chunk_size", "norm_eps", "A_range")


class Format(NamedTuple):
    """How one architecture is published.

    fields: see above; "mixer." marks the mixer's own, "ssm_cfg." a field of that object.
    fixed: published fields of which only these values mean what we compute; the first where the field is absent.
    implied: fields of ours that the architecture decides.
    """

    layout: str
    mixer: str
    embedding: str
    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, tuple]
    implied: Mapping[str, Any]


HIDDEN_ACT = {"hidden_act": ("silu", "swish")}
PLAIN = {"d_intermediate": (0,), "attn_layer_idx": ([],), "rms_norm": (True,), "ssm_cfg.layer": ("Mamba1",)}
PLAIN_MAMBA2 = PLAIN | {
    "ssm_cfg.layer": ("Mamba2",),
    "ssm_cfg.d_ssm": (None,),
    "ssm_cfg.D_has_hdim": (False,),
    "ssm_cfg.rmsnorm": (True,),
}
FALCON = HUGGINGFACE_MAMBA | {"mixer.norm_eps": ("mixer_rms_eps", 1e-6)}
NO_NORM, NORM = {"mixer.norm_BCdt": False}, {"mixer.norm_BCdt": True}
EPS = {"norm_eps": 1e-5}  # fixed in mamba_ssm
FORMATS = {
    "MambaForCausalLM": Format("huggingface", "mamba", "embeddings", HUGGINGFACE_MAMBA, HIDDEN_ACT, NO_NORM),
    "FalconMambaForCausalLM": Format("huggingface", "mamba", "embeddings", FALCON, HIDDEN_ACT, NORM),
    "Mamba2ForCausalLM": Format("huggingface", "mamba2", "embeddings", HUGGINGFACE_MAMBA2, HIDDEN_ACT, {}),
    "Mamba1": Format("state-spaces", "mamba", "embedding", STATE_SPACES_MAMBA, PLAIN, EPS | NO_NORM),
    "Mamba2": Format(
        "state-spaces", "mamba2", "embedding", STATE_SPACES_MAMBA2, PLAIN_MAMBA2, EPS | {"mixer.norm_eps": 1e-5}
    ),
}
MODEL_TYPES = {"MambaForCausalLM": "mamba", "FalconMambaForCausalLM": "falcon_mamba", "Mamba2ForCausalLM": "mamba2"}
