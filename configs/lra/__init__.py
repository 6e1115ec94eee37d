"""What the configs of Long Range Arena share (arXiv:2011.04006): a classifier, and each paper's way to train it.

A recipe is one row of a paper's table of hyperparameters:
    s4     the authors' repository, configs/experiment/lra/s4-*.yaml, its version of 2023 (after arXiv:2206.12037)
    s4d    the same of 2022, as arXiv:2206.11893 has it, with S4D-Inv's eigenvalues
    s5     the authors' repository, bin/run_experiments/*.sh (arXiv:2208.04933)
    lru    arXiv:2303.06349, table 9; it sweeps the learning rate and does not give it: S5's is taken
    mamba, mamba2, mamba3
           no paper's: rows that are new here, of two mixers, one of which reads backwards; depth, width, learning rate,
           batch and weight decay are those of B2S6's blocks (arXiv:2505.09022), which are bidirectional Mamba's
All use AdamW and a cosine after a warm-up, and train A, B and dt apart: at a lower rate and without weight decay.

SIZE fast is `paper` with activations in bfloat16, where parameters, states and decays of the SSM stay float32; a batch
of 100,000 to 500,000 tokens, which fills a large GPU; and fewer epochs, for minutes rather than days. Its learning
rates are the paper's, with a warm-up over a tenth of the steps. SIZE smoke is four steps of a tiny model.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

MODELS = ("s5", "lru", "s4", "s4d", "mamba", "mamba2", "mamba3")
SIZES = ("fast", "paper", "smoke")
PI = 3.141592653589793
SOURCES = {
    "s4": "Gu et al. 2023, S4-LegS",
    "s4d": "Gu et al. 2022, S4D-Inv",
    "s5": "Smith et al. 2023",
    "lru": "Orvieto et al. 2023",
}
Recipe = dict[str, Any]  # fields of the config's "model" and "optimizer", of its "mixer", and of the "run" as a whole


def s4(
    *,
    depth: int,
    width: int,
    state_size: int,
    batch_size: int,
    learning_rate: float,
    steps: int,
    warmup_steps: int,
    weight_decay: float = 0.05,
    ssm_rate: float = 0.001,
    dt_rate: float | None = None,
    norm: str = "batch",
    prenorm: bool = True,
    dropout: float = 0.0,
    **mixer: Any,
) -> Recipe:
    """A and B at ssm_rate, dt at dt_rate (None: as the rest); mixer: more of the mixer's options.

    Batch statistics have PyTorch's momentum, which is 0.9 the other way round.
    """
    model = {"depth": depth, "width": width, "norm": norm, "prenorm": prenorm, "dropout": dropout, "momentum": 0.9}
    dt = {} if dt_rate is None else {"learning_rate": dt_rate}
    groups = {
        "ssm": {"match": "mixer/(A_|B/|P/)", "learning_rate": ssm_rate, "weight_decay": 0.0},
        "dt": {"match": "mixer/log_dt", "weight_decay": 0.0, **dt},
    }
    return {
        "model": model,
        "mixer": {"state_size": state_size, "rule": "bilinear", **mixer},
        "optimizer": _optimizer(learning_rate, weight_decay, groups, warmup_steps=warmup_steps),
        "run": {"batch_size": batch_size, "train_steps": steps},
    }


def s4d(**fields: Any) -> Recipe:
    """As `s4`, with S4D-Inv's eigenvalues."""
    return s4(rule="zoh", A_init="inv", **fields)


S5_GROUPS = {
    "standard": ("A_|B/|log_dt", ""),
    "standard, dt global": ("A_|B/", ""),
    "B and C decay": ("A_|log_dt", "B/"),
    "B fast and C decay": ("A_|log_dt", ""),
    "no decay": ("A_|B/|C|D|log_dt", ""),
}  # what is slow and does not decay, and what is slow and decays; the rest is neither


def s5(
    *,
    depth: int,
    width: int,
    state_size: int,
    blocks: int,
    batch_size: int,
    epochs: float,
    ssm_rate: float,
    factor: float,
    weight_decay: float,
    groups: str,
    glu: str,
    warmup_epochs: float = 1.0,
    dropout: float = 0.0,
    momentum: float = 0.95,
    **mixer: Any,
) -> Recipe:
    """learning rate = factor * ssm_rate; groups: of `S5_GROUPS`; mixer: more of the mixer's options."""
    model = {"depth": depth, "width": width, "glu": glu, "dropout": dropout, "momentum": momentum}
    slow, slow_with_decay = S5_GROUPS[groups]
    parts = {"ssm": {"match": f"mixer/({slow})", "learning_rate": ssm_rate, "weight_decay": 0.0}}
    if slow_with_decay:
        parts["B"] = {"match": f"mixer/({slow_with_decay})", "learning_rate": ssm_rate}
    return {
        "model": model,
        "mixer": {"rule": "zoh", "state_size": state_size, "blocks": blocks, **mixer},
        "optimizer": _optimizer(factor * ssm_rate, weight_decay, parts, warmup_epochs=warmup_epochs),
        "run": {"batch_size": batch_size, "train_epochs": epochs},
    }


def lru(
    *,
    width: int,
    state_size: int,
    batch_size: int,
    steps: int,
    learning_rate: float,
    factor: float,
    ring: tuple[float, float],
    max_phase: float = 2 * PI,
    dropout: float = 0.0,
    bidirectional: bool = False,
) -> Recipe:
    """lambda, gamma and B at factor * learning_rate; ring: r_min and r_max."""
    groups = {
        "ssm": {
            "match": "mixer/(nu_log|theta_log|gamma_log|B/)",
            "learning_rate_factor": factor,
            "weight_decay": 0.0,
        }
    }
    return {
        "model": {"depth": 6, "width": width, "dropout": dropout, "bidirectional": bidirectional},
        "mixer": {"state_size": state_size, "r_min": ring[0], "r_max": ring[1], "max_phase": max_phase},
        "optimizer": _optimizer(learning_rate, 0.05, groups, warmup_percent=10.0),
        "run": {"batch_size": batch_size, "train_steps": steps},
    }


SELECTIVE = {
    "mamba": {"state_size": 16},
    "mamba2": {"state_size": 64, "head_size": 64},
    "mamba3": {"state_size": 64, "head_size": 64},
}


def selective(
    *,
    depth: int,
    width: int,
    batch_size: int,
    epochs: float,
    learning_rate: float,
    weight_decay: float = 0.05,
    norm: str = "batch",
    prenorm: bool = True,
    dropout: float = 0.0,
    **mixer: Any,
) -> dict[str, Recipe]:
    """Of Mamba, Mamba-2 and Mamba-3; mixer: options of all three. What weighs decays, and nothing else."""
    groups = {"no_decay": {"match": "(A_log|D|scale|bias|embedding)$", "weight_decay": 0.0}}
    return {
        name: {
            "model": {"depth": depth, "width": width, "norm": norm, "prenorm": prenorm, "dropout": dropout},
            "mixer": {**own, **mixer},
            "optimizer": _optimizer(learning_rate, weight_decay, groups, warmup_percent=10.0),
            "run": {"batch_size": batch_size, "train_epochs": epochs},
        }
        for name, own in SELECTIVE.items()
    }


def _optimizer(learning_rate: float, weight_decay: float, groups: Mapping[str, Any], **warmup: float) -> dict[str, Any]:
    return {"learning_rate": learning_rate, "weight_decay": weight_decay, "groups": groups, **warmup}


def base(
    model: str, size: str, task: Mapping[str, Any], recipe: Recipe, published: Mapping[str, float], *, length: int
) -> ConfigDict:
    """A run on the task by the recipe. length: tokens of an example; published: accuracy in percent by model."""
    config = ConfigDict()
    config.preset = size
    config.seed = 0
    value = 0.0 if size == "smoke" else published.get(model, 0.0)
    config.published = {"metric": "accuracy", "value": value, "source": SOURCES[model] if value else ""}
    config.next = ""
    config.start_from = ""  # see experiments/stages.py
    config.task = {**task, "resident": "auto"}
    config.model = {
        "pattern": model,
        "mixers": {model: recipe["mixer"] | ({"length": length} if model == "s4" else {})},
        "width": 128,
        "depth": 6,
        "norm": "batch",
        "prenorm": True,
        "momentum": 0.95,
        "glu": "full",
        "dropout": 0.0,
        "bidirectional": True,
        "pooling": "mean",
        "dtype": "float32",
        **recipe["model"],
    }
    config.optimizer = {
        "name": "adamw",
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 0.0,
        "schedule": "cosine",
        "warmup_steps": 0,
        "warmup_epochs": 0.0,
        "warmup_percent": 0.0,
        **recipe["optimizer"],
    }
    # Of each duration one unit is given and the others are 0.
    config.train_steps, config.train_epochs = 0, 0.0
    config.update(recipe["run"])
    config.eval_batch_size = config.batch_size
    config.eval_every_steps, config.eval_every_epochs = 0, 1.0
    config.checkpoint_every_steps, config.checkpoint_every_epochs = 0, 1.0
    config.log_every_steps = 100
    config.keep_checkpoints = 2
    config.time_limit_minutes = 0.0  # 0: none
    config.devices = 1
    return config


def fast(config: ConfigDict, *, batch_size: int, epochs: float, eval_epochs: float = 1.0) -> None:
    """eval_epochs: from one evaluation to the next."""
    config.model.dtype = "bfloat16"
    config.batch_size = config.eval_batch_size = batch_size
    config.train_steps, config.train_epochs = 0, epochs
    config.eval_every_epochs = eval_epochs
    config.optimizer.update({"warmup_steps": 0, "warmup_epochs": 0.0, "warmup_percent": 10.0})


def smoke(config: ConfigDict, *, length: int, **task: Any) -> None:
    """Four steps of a tiny model; length and task: of a small task."""
    config.task.update(task)
    config.model.update({"width": 8, "depth": 1})
    sizes = {"head_size": 8, "state_size": 4, "blocks": 1, "length": length}
    for options in config.model.mixers.values():
        options.update({name: size for name, size in sizes.items() if name in options})
    config.optimizer.update({"warmup_steps": 0, "warmup_epochs": 0.0})
    config.batch_size = config.eval_batch_size = 4
    config.train_steps, config.train_epochs = 4, 0.0
    config.eval_every_steps, config.eval_every_epochs = 2, 0.0
    config.checkpoint_every_steps, config.checkpoint_every_epochs = 2, 0.0
    config.log_every_steps = 2


def every_model(add: Callable[[str], None], size: str) -> None:
    for model in MODELS:
        add(f"{model},{size}")
