"""What the configs of synthetic tasks share: a language model of the task's tokens, and how it is trained."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

MIXERS = {
    "mamba3": {"state_size": 64, "head_size": 32, "rotation": "data"},
    "mamba2": {"state_size": 64, "head_size": 32},
    "mamba": {"state_size": 16},
    "gated_deltanet": {"state_size": 64, "heads": 2, "head_size": 64},
    "attention": {"heads": 4, "window": 2048},
}


def base(preset: str, task: Mapping[str, Any], pattern: str, *, depth: int) -> ConfigDict:
    """A run on the task of `depth` layers of width 64, without MLPs, with AdamW at a constant learning rate."""
    config = ConfigDict()
    config.preset = preset
    config.seed = 0
    config.published = {"metric": task["metric"], "value": 0.0, "source": ""}
    config.next = ""
    config.task = dict(task)
    config.model = {
        "pattern": pattern,
        "mixers": {pattern: dict(MIXERS[pattern])},
        "width": 64,
        "depth": depth,
        "mlp_size": 0,
        "dropout": 0.0,
        "tie_embeddings": False,
        "norm_eps": 1e-5,
        "scan_layers": False,
        "remat": False,
        "dtype": "float32",
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 0.001,
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 0.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "warmup_epochs": 0.0,
        "warmup_percent": 0.0,
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
    config.replicas = {}  # learning_rates and seeds that train together: see experiments/replicas.py; {}: one run
    return config


def publish(config: ConfigDict, figures: Mapping[str, float], model: str, source: str) -> None:
    """The paper's figure beside the run's own, where it has one."""
    if model in figures:
        config.published.update({"value": figures[model], "source": source})


def smoke(config: ConfigDict, **fields: Any) -> None:
    """Four steps of a tiny model, of one learning rate and seed; fields: of a small task."""
    config.replicas = {}
    config.model.update({"width": 8, "depth": 1, "mlp_size": 0})
    sizes = {"head_size": 8, "state_size": 4, "heads": 2, "window": 16}
    for options in config.model.mixers.values():
        options.update({name: size for name, size in sizes.items() if name in options})
    config.task.update({"stage_steps": 0} if "stage_steps" in config.task else {})
    config.task.update({"test_examples": 8, "eval_examples": 4, **fields})
    config.batch_size = config.eval_batch_size = 4
    config.train_steps = 4
    config.eval_every_steps = config.checkpoint_every_steps = config.log_every_steps = 2
