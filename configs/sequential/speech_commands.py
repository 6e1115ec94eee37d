"""Speech Commands: which of 35 words, from the raw waveform, 16,000 samples (Warden 2018, arXiv:1804.03209).

    python -m experiments.train --config=configs/sequential/speech_commands.py:s5,paper --workdir=runs/commands
    python -m experiments.sweep --config=configs/sequential/speech_commands.py:fast --workdir=runs/commands-all
    python -m experiments.evaluate runs/commands --config.task.rate=8000 --config.model.mixers.s5.step_scale=2

Presets are MODEL,SIZE in any order; s5,fast where nothing is said. The second command trains every model. The third
tries one on every second sample, unseen in training, with twice the step: of s4, s4d and s5.
    MODEL  s5 lru s4 s4d        the papers' models
           mamba mamba2 mamba3  new rows: one mixer forward and one backward
    SIZE   fast   bfloat16, batches of 64, 40 epochs
           paper  the published hyperparameters, batches of 16
           smoke  four steps of a tiny model
The recordings, 2.3 GB, are downloaded by TFDS. Of a copy here, a folder or a packed file: --config.task.data_dir=PATH

Published, in percent, and at half the rate: S4 96.08 and 91.32, S4D 96.18 and 91.80, S5 96.53 and 94.53. S4's and S4D's
rows are configs/experiment/sc/s4-sc.yaml of the authors' repository, with a warm-up over a tenth of the steps; S5's is
its bin/run_experiments. LRU has none: the width and batch are S4's, the ring that of its images. Recordings shorter
than a second are padded with zeros; here the padding is masked, there it is read.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import choose, lra

PUBLISHED = {"s4": 96.08, "s4d": 96.18, "s5": 96.53}
S4 = {"depth": 6, "width": 128, "state_size": 64, "learning_rate": 0.01, "step_scale": 1.0}


def recipes(batch_size: int, epochs: float, per_epoch: int) -> dict[str, lra.Recipe]:
    """per_epoch: training steps an epoch."""
    steps = round(epochs * per_epoch)
    run = {"batch_size": batch_size, "steps": steps}
    s4: dict[str, Any] = {**S4, **run, "warmup_steps": steps // 10}
    return {
        "s4": lra.s4(copies=2, **s4),
        "s4d": lra.s4d(**s4),
        "s5": lra.s5(
            depth=6,
            width=96,
            state_size=128,
            blocks=16,
            batch_size=batch_size,
            epochs=epochs,
            ssm_rate=0.002,
            factor=4.0,
            weight_decay=0.04,
            dropout=0.1,
            groups="no decay",
            glu="half1",
            C_init="lecun_normal",
            step_scale=1.0,
        ),
        "lru": lra.lru(
            width=128,
            state_size=128,
            learning_rate=0.004,
            factor=0.25,
            ring=(0.9, 0.999),
            dropout=0.1,
            bidirectional=True,
            **run,
        ),
        **lra.selective(depth=6, width=128, batch_size=batch_size, epochs=epochs, learning_rate=0.004),
    }


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=lra.MODELS, size=lra.SIZES)
    task = {"name": "speech_commands", "data_dir": "", "rate": 16000}
    recipe = recipes(batch_size=16, epochs=40.0, per_epoch=5000)[model]
    config = lra.base(model, size, task, recipe, PUBLISHED, length=16000)
    if size == "fast":
        lra.fast(config, batch_size=64, epochs=40.0)
    elif size == "smoke":
        lra.smoke(config, length=1000, rate=1000)
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """Every model in the preset's size."""
    lra.every_model(add, choose(preset, size=lra.SIZES)[0])
