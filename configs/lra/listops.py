"""ListOps: the value of a nested expression, 500 to 2,000 tokens (Long Range Arena, arXiv:2011.04006, section 2.2).

    python -m experiments.train --config=configs/lra/listops.py:s5,fast --workdir=runs/listops
    python -m experiments.sweep --config=configs/lra/listops.py:fast --workdir=runs/listops-all

Presets are MODEL,SIZE in any order; s5,fast where nothing is said. The second command trains every model.
    MODEL  s5 lru s4 s4d        the papers' models
           mamba mamba2 mamba3  new rows: one mixer forward and one backward
    SIZE   fast   bfloat16, batches of 64, 40 epochs: see configs/lra/__init__.py
           paper  the published hyperparameters
           smoke  four steps of a tiny model on short expressions
The expressions are drawn from --config.task.seed into --config.task.data_dir, under a minute's work. The benchmark's
own: --config.task.source=lra_release --config.task.data_dir=DIR/lra_release/lra_release

Published, in percent: S4 59.60, S4D 60.18, S5 62.15, LRU 60.2; a causal Mamba, as others report it, 38.02. Of Mamba-2
and Mamba-3 and of any bidirectional Mamba there is none.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose, lra

PUBLISHED = {"s4": 59.60, "s4d": 60.18, "s5": 62.15, "lru": 60.2}
POST = {"norm": "batch", "prenorm": False}
RECIPES = {
    "s4": lra.s4(
        depth=6, width=256, state_size=4, batch_size=32, learning_rate=0.01, steps=120_000, warmup_steps=12_000, **POST
    ),
    "s4d": lra.s4d(
        depth=8, width=128, state_size=64, batch_size=50, learning_rate=0.01, steps=80_000, warmup_steps=8_000, **POST
    ),
    "s5": lra.s5(
        depth=8,
        width=128,
        state_size=16,
        blocks=8,
        batch_size=50,
        epochs=40.0,
        ssm_rate=0.001,
        factor=3.0,
        weight_decay=0.04,
        groups="B fast and C decay",
        glu="half2",
        C_init="lecun_normal",
    ),
    "lru": lra.lru(
        width=128, state_size=256, batch_size=32, steps=80_000, learning_rate=0.003, factor=0.5, ring=(0.0, 0.99)
    ),
    **lra.selective(depth=8, width=128, batch_size=32, epochs=120.0, learning_rate=0.008, weight_decay=0.03, **POST),
}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=lra.MODELS, size=lra.SIZES)
    task = {"name": "listops", "source": "generated", "data_dir": "data", "seed": 0, "length": 2048}
    config = lra.base(model, size, task, RECIPES[model], PUBLISHED, length=2048)
    if size == "fast":
        lra.fast(config, batch_size=64, epochs=40.0)
    elif size == "smoke":
        config.task.update({"examples": (64, 8, 8), "min_length": 4})
        lra.smoke(config, length=32, max_length=32)
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """Every model in the preset's size."""
    lra.every_model(add, choose(preset, size=lra.SIZES)[0])
