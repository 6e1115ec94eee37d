"""What the configs of state tracking share: Mamba-3's set-up (arXiv:2603.15569, appendix D), and its ablations.

Stated there: lengths from 3 to a largest one that grows from 40 to 160, 10,000 steps each, a test at 256; batches of
256; one layer for parity and three for arithmetic; 64 states; widths 32 and 64; eight learning rates from 1e-4 to 1e-2.
Chosen here, for it states none: four stages (40, 80, 120, 160); and, after Grazzi et al. (arXiv:2411.12537, appendix
E), on whose tasks it trains: AdamW with weight decay 0.1, gradients clipped at 1, a warm-up over a tenth of the steps,
then a cosine. Heads have 32 channels, and an MLP of twice the width follows each mixer.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

MODELS = ("mamba3", "mamba3_fixed", "mamba3_none", "mamba2", "mamba", "attention")
PATTERNS = {"mamba3_fixed": "mamba3", "mamba3_none": "mamba3"}
MIXERS = {
    "mamba3": {"state_size": 64, "head_size": 32, "rotation": "data"},
    "mamba2": {"state_size": 64, "head_size": 32},
    "mamba": {"state_size": 16},
    "attention": {"heads": 4, "window": 2048},
}
ROTATIONS = {"mamba3_fixed": "fixed", "mamba3_none": "none"}
LENGTHS = {
    "min_length": 3,
    "lengths": (40, 80, 120, 160),
    "stage_steps": 10000,
    "test_min_length": 0,
    "test_length": 256,
    "test_examples": 8192,
    "eval_lengths": (512, 1024, 2048),
    "eval_examples": 1024,
}


def base(preset: str, task: Mapping[str, Any], model: str, *, depth: int) -> ConfigDict:
    """A run of the set-up above on the task."""
    pattern = PATTERNS.get(model, model)
    config = ConfigDict()
    config.preset = preset if model in MIXERS else f"{model.removeprefix('mamba3_')}-{preset}"
    config.seed = 0
    config.published = {"metric": task["metric"], "value": 0.0, "source": ""}
    config.next = ""
    config.task = dict(task)
    config.model = {
        "pattern": pattern,
        "mixers": {pattern: dict(MIXERS[pattern])},
        "width": 64,
        "depth": depth,
        "mlp_size": 128,
        "dropout": 0.0,
        "tie_embeddings": False,
        "norm_eps": 1e-5,
        "scan_layers": False,
        "remat": False,
        "dtype": "float32",
    }
    if model in ROTATIONS:
        config.model.mixers.mamba3.rotation = ROTATIONS[model]
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 0.001,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 1.0,
        "schedule": "cosine",
        "warmup_steps": 0,
        "warmup_epochs": 0.0,
        "warmup_percent": 10.0,
        "groups": {"no_decay": {"match": "(A_log|D|scale|bias|embedding)$", "weight_decay": 0.0}},
    }
    # Of each duration one unit is given and the others are 0.
    config.batch_size = config.eval_batch_size = 256
    config.train_steps, config.train_epochs = 40000, 0.0
    config.eval_every_steps, config.eval_every_epochs = 2000, 0.0
    config.checkpoint_every_steps, config.checkpoint_every_epochs = 10000, 0.0
    config.log_every_steps = 200
    config.keep_checkpoints = 1
    config.eval_piece_tokens = 0  # sequences of more tokens are evaluated in pieces of so many; 0: whole
    config.time_limit_minutes = 0.0  # 0: none
    config.devices = 1
    return config


def publish(config: ConfigDict, figures: Mapping[str, float], model: str) -> None:
    """The paper's figure beside the run's own, where it has one."""
    if model in figures:
        config.published.update({"value": figures[model], "source": "Lahoti et al. 2026"})


def smoke(config: ConfigDict) -> None:
    """Four steps of a tiny model."""
    config.model.update({"width": 8, "depth": 1, "mlp_size": 16})
    sizes = {"head_size": 8, "state_size": 4, "heads": 2}
    for options in config.model.mixers.values():
        options.update({name: size for name, size in sizes.items() if name in options})
    config.task.update({"lengths": (8,), "stage_steps": 0, "test_length": 8, "test_examples": 8, "eval_lengths": (16,)})
    config.task.eval_examples = config.batch_size = config.eval_batch_size = 4
    config.train_steps = 4
    config.eval_every_steps = config.checkpoint_every_steps = config.log_every_steps = 2
