"""Byte-level language models of a text file: Mamba-3, Mamba-2, Mamba, attention, and S5 before them.

    python -m experiments.train --config=configs/language_model.py:mamba3,demo --workdir=runs/mamba3
    python -m experiments.sweep --config=configs/language_model.py:shakespeare --workdir=runs/shakespeare

Presets are MODEL,SIZE in any order; mamba3,demo where nothing is said. The second command trains every model of
TABLE with the preset's size and prints their table.
    MODEL  mamba3 mamba2 mamba attention s5, or a hybrid of Mamba-3 and attention: hybrid
    SIZE   demo         a small model, a minute or two on two CPU cores
           shakespeare  5.05 million parameters, minutes on a GPU
           smoke        four steps of a tiny model
The text is TinyShakespeare (Karpathy 2015; 1.1 MB), downloaded by TFDS; any other file is
--config.task.path=FILE. The first 90 % is trained on, and the figure is that of the last 5 % at the step that is
best on the 5 % between. A pattern names the mixer of each layer, over and over:
    --config.model.pattern="mamba3 mamba3 attention"

What is equal in the table: depth, width, batches, optimizer, steps, and the parameters, to 1 %, which the size of
the MLPs makes up for (MLP_SIZE). No paper has figures for these settings.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose

MODELS = ("mamba3", "mamba2", "mamba", "attention", "s5", "hybrid")
SIZES = ("demo", "shakespeare", "smoke")
TABLE = ("mamba3", "mamba2", "mamba", "attention")
PATTERNS = {"hybrid": "mamba3 mamba3 attention"}
MIXERS = {
    "mamba3": {"state_size": 64, "head_size": 64},
    "mamba2": {"state_size": 64, "head_size": 64},
    "mamba": {"state_size": 16},
    "attention": {"heads": 4, "window": 2048},
    "s5": {"state_size": 256, "blocks": 4},
}
# Of the preset shakespeare: multiples of 8 that give all the 5.05 million parameters of Mamba-3 with 512, to 1 %.
MLP_SIZE = {"mamba3": 512, "mamba2": 520, "mamba": 512, "attention": 736, "s5": 912, "hybrid": 592}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=MODELS, size=SIZES)
    pattern = PATTERNS.get(model, model)
    config = ConfigDict()
    config.preset = size
    config.seed = 0
    config.published = {"metric": "bits_per_byte", "value": 0.0, "source": ""}
    config.next = ""
    config.task = {"name": "language_model", "path": "", "length": 256}
    config.model = {
        "pattern": pattern,
        "mixers": {name: dict(MIXERS[name]) for name in sorted(set(pattern.split()))},
        "width": 256,
        "depth": 6,
        "mlp_size": MLP_SIZE[model],
        "dropout": 0.3,
        "tie_embeddings": True,
        "norm_eps": 1e-5,
        "scan_layers": False,
        "remat": False,
        "dtype": "bfloat16",
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 0.002,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "clip_norm": 1.0,
        "schedule": "cosine",
        "warmup_steps": 100,
        "warmup_epochs": 0.0,
        "warmup_percent": 0.0,
        "groups": {
            "no_decay": {
                "match": "(A_log|A_real|A_imag|log_dt|D|scale|bias|mimo_.|B/(real|imag))$",
                "weight_decay": 0.0,
            }
        },
    }
    # Of each duration one unit is given and the others are 0.
    config.batch_size = 64
    config.eval_batch_size = 64
    config.train_steps, config.train_epochs = 1000, 0.0
    config.eval_every_steps, config.eval_every_epochs = 100, 0.0
    config.checkpoint_every_steps, config.checkpoint_every_epochs = 500, 0.0
    config.log_every_steps = 50
    config.keep_checkpoints = 1
    config.sample_tokens = 200  # written at each evaluation; 0: none
    config.time_limit_minutes = 0.0  # 0: none
    config.devices = 1
    {"demo": _demo, "shakespeare": lambda config: None, "smoke": _smoke}[size](config)
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """The table's models, in the preset's size."""
    _, size = choose(preset, model=("all",), size=SIZES)
    for model in TABLE:
        add(f"{model},{size}")


def _small(config: ConfigDict, width: int, head: int, state: int) -> None:
    depth = max(2, len(config.model.pattern.split()))
    config.model.update({"width": width, "depth": depth, "mlp_size": 2 * width, "dropout": 0.0, "dtype": "float32"})
    for name, options in config.model.mixers.items():
        if "state_size" in options:
            options.state_size = state
        if "head_size" in options:
            options.head_size = head
        if name == "s5":
            options.blocks = 1
        if name == "attention":
            options.heads = width // head


def _demo(config: ConfigDict) -> None:
    _small(config, width=96, head=32, state=32)
    config.task.length = 128
    config.batch_size, config.eval_batch_size = 16, 50
    config.train_steps = 400
    config.eval_every_steps, config.checkpoint_every_steps = 100, 200
    config.log_every_steps = 20


def _smoke(config: ConfigDict) -> None:
    _small(config, width=8, head=4, state=4)
    config.task.length = 16
    config.batch_size = config.eval_batch_size = 4
    config.train_steps = 4
    config.optimizer.warmup_steps = 2
    config.eval_every_steps = config.checkpoint_every_steps = config.log_every_steps = 2
    config.sample_tokens = 8
