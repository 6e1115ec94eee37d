"""Pathfinder: whether two marked points are joined by a dashed path, 32 x 32 pixels (arXiv:2011.04006, section 2.2).

    python -m experiments.train --config=configs/lra/pathfinder.py:s5,fast --workdir=runs/pathfinder
    python -m experiments.sweep --config=configs/lra/pathfinder.py:fast --workdir=runs/pathfinder-all

Presets are MODEL,SIZE in any order; s5,fast where nothing is said. The second command trains every model.
    MODEL  s5 lru s4 s4d        the papers' models
           mamba mamba2 mamba3  new rows: one mixer forward and one backward
    SIZE   fast   bfloat16, batches of 128, 80 epochs: see configs/lra/__init__.py
           paper  the published hyperparameters
           smoke  four steps of a tiny model
The images are drawn from --config.task.seed into --config.task.data_dir. The benchmark's own:
    --config.task.source=lra_release --config.task.data_dir=DIR/lra_release/lra_release
Path-X, the same with 128 x 128 pixels, is configs/lra/pathx.py.

Published, in percent: S4 94.20, S4D 93.78, S5 95.33, LRU 95.1; a causal Mamba, as others report it, 69.26.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose, lra

PUBLISHED = {"s4": 94.20, "s4d": 93.78, "s5": 95.33, "lru": 95.1}
S4 = {"batch_size": 64, "learning_rate": 0.004, "dt_rate": 0.001, "steps": 500_000}
RECIPES = {
    "s4": lra.s4(depth=6, width=256, state_size=64, copies=None, warmup_steps=50_000, **S4),
    "s4d": lra.s4d(depth=6, width=256, state_size=64, warmup_steps=2_500, weight_decay=0.03, **S4),
    "s5": lra.s5(
        depth=6,
        width=192,
        state_size=256,
        blocks=8,
        batch_size=64,
        epochs=200.0,
        ssm_rate=0.0009,
        factor=5.0,
        weight_decay=0.03,
        groups="standard",
        glu="half1",
        C_init="trunc_standard_normal",
        dropout=0.05,
        momentum=0.9,
    ),
    "lru": lra.lru(
        width=192,
        state_size=256,
        batch_size=64,
        steps=500_000,
        learning_rate=0.0045,
        factor=0.25,
        ring=(0.9, 0.999),
        bidirectional=True,
    ),
    **lra.selective(depth=6, width=256, batch_size=48, epochs=250.0, learning_rate=0.004),
}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=lra.MODELS, size=lra.SIZES)
    task = {"name": "pathfinder", "resolution": 32, "source": "generated", "data_dir": "data", "seed": 0}
    config = lra.base(model, size, task, RECIPES[model], PUBLISHED, length=1024)
    if size == "fast":
        lra.fast(config, batch_size=128, epochs=80.0, eval_epochs=2.0)
    elif size == "smoke":
        config.task.update({"examples": (16, 4, 4)})
        lra.smoke(config, length=1024)
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """Every model in the preset's size."""
    lra.every_model(add, choose(preset, size=lra.SIZES)[0])
