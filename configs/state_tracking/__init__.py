"""What the configs of state tracking share: tasks that need a state, and models with and without one that turns."""

from ml_collections import ConfigDict

MODELS = ("mamba3", "mamba3_fixed", "mamba3_none", "mamba2", "mamba", "attention")
PATTERNS = {"mamba3_fixed": "mamba3", "mamba3_none": "mamba3"}
ROTATIONS = {"mamba3": "data", "mamba3_fixed": "fixed", "mamba3_none": "none"}
NO_DECAY = "(A_log|dt_bias|D|scale|bias|mimo_.|embedding)$"


def base(model: str, size: str, task: dict, *, depth: int, published: dict[str, float], source: str) -> ConfigDict:
    """A run of Mamba-3's set-up (arXiv:2603.15569, appendix D); published: figures in percent, by model."""
    pattern = PATTERNS.get(model, model)
    mixers = {
        "mamba3": {"state_size": 64, "head_size": 32, "rotation": ROTATIONS.get(model, "data")},
        "mamba2": {"state_size": 64, "head_size": 32},
        "mamba": {"state_size": 16},
        "attention": {"heads": 4, "window": 512},
    }
    config = ConfigDict()
    config.preset = size
    config.seed = 0
    value = published.get(model, 0.0) if size == "paper" else 0.0
    config.published = {"metric": task["metric"], "value": value, "source": source if model in published and value else ""}
    config.next = ""
    config.task = task
    config.model = {
        "pattern": pattern,
        "mixers": {pattern: mixers[pattern]},
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
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 0.001,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "clip_norm": 1.0,
        "schedule": "cosine",
        "warmup_steps": 0,
        "warmup_epochs": 0.0,
        "warmup_percent": 10.0,
        "groups": {"no_decay": {"match": NO_DECAY, "weight_decay": 0.0}},
    }
    # Of each duration one unit is given and the others are 0.
    config.batch_size = 256
    config.eval_batch_size = 256
    config.train_steps, config.train_epochs = 40000, 0.0
    config.eval_every_steps, config.eval_every_epochs = 2000, 0.0
    config.checkpoint_every_steps, config.checkpoint_every_epochs = 10000, 0.0
    config.log_every_steps = 200
    config.keep_checkpoints = 1
    config.eval_piece_tokens = 0  # longer sequences are evaluated in pieces of so many; 0: whole
    config.time_limit_minutes = 0.0  # 0: none
    config.devices = 1
    return config


def demo(config: ConfigDict) -> None:
    """Strings of up to 32 tokens, tested at 64, on two CPU cores."""
    config.model.update({"width": 32, "depth": 1, "mlp_size": 64})
    config.task.update({"lengths": (32,), "stage_steps": 0, "test_length": 64, "test_examples": 1024})
    config.batch_size = config.eval_batch_size = 64
    config.train_steps, config.eval_every_steps, config.checkpoint_every_steps = 1000, 200, 500
    config.log_every_steps = 50


def smoke(config: ConfigDict) -> None:
    """Four steps of a tiny model."""
    config.model.update({"width": 8, "depth": 1, "mlp_size": 16})
    for options in config.model.mixers.values():
        options.update({"head_size": 8, "state_size": 4} if "head_size" in options else {})
    config.task.update({"lengths": (8,), "stage_steps": 0, "test_length": 8, "test_examples": 8, "eval_lengths": (16,)})
    config.task.eval_examples = config.batch_size = config.eval_batch_size = 4
    config.train_steps = 4
    config.eval_every_steps = config.checkpoint_every_steps = config.log_every_steps = 2
