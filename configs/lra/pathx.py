"""Path-X: Pathfinder with 128 x 128 pixels, 16,384 steps (Long Range Arena, arXiv:2011.04006, section 2.2).

    python -m experiments.train --config=configs/lra/pathx.py:s5,fast --workdir=runs/pathx
    python -m experiments.sweep --config=configs/lra/pathx.py:fast --workdir=runs/pathx-all

Presets are MODEL,SIZE in any order; s5,fast where nothing is said. The second command trains every model.
    MODEL  s5 lru s4 s4d        the papers' models
           mamba mamba2 mamba3  new rows: one mixer forward and one backward
    SIZE   fast   bfloat16, batches of 32, 12 epochs (60,000 steps): see configs/lra/__init__.py
           paper  the published hyperparameters
           smoke  four steps of a tiny model on images of 32 x 32
The images are drawn from --config.task.seed into --config.task.data_dir. The benchmark's own, of which the release has
a wrong copy beside the right one: --config.task.source=lra_release --config.task.data_dir=DIR/lra_release/lra_release

A run stays at 50 % for thousands of steps, and for some seeds for good: 4 of 10 with S5, as a user of its code found;
S4 is at 92 % after 100,000 steps of its paper preset. What lets a model start is a memory as long as the image: dt from
1e-4 with S4, S4D and S5; with LRU a ring at the edge of the unit disc and phases below pi / 10, without which it fits
the training images at most.

Published, in percent: S4 96.35, S4D 92.80, S5 98.58, LRU 94.2; a causal Mamba, as others report it, 67.32.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose, lra

PUBLISHED = {"s4": 96.35, "s4d": 92.80, "s5": 98.58, "lru": 94.2}
SLOW = {"dt_min": 0.0001, "dt_max": 0.1}
RECIPES = {
    "s4": lra.s4(
        depth=6,
        width=256,
        state_size=64,
        batch_size=16,
        learning_rate=0.001,
        dt_rate=0.001,
        steps=500_000,
        warmup_steps=50_000,
        copies=None,
        **SLOW,
    ),
    "s4d": lra.s4d(
        depth=6,
        width=256,
        state_size=64,
        batch_size=16,
        learning_rate=0.0005,
        ssm_rate=0.0005,
        dt_rate=0.0005,
        steps=500_000,
        warmup_steps=10_000,
        **SLOW,
    ),
    "s5": lra.s5(
        depth=6,
        width=128,
        state_size=256,
        blocks=16,
        batch_size=32,
        epochs=75.0,
        ssm_rate=0.0006,
        factor=3.0,
        weight_decay=0.06,
        groups="B and C decay",
        glu="half1",
        C_init="complex_normal",
        momentum=0.9,
        **SLOW,
    ),
    "lru": lra.lru(
        width=128,
        state_size=256,
        batch_size=32,
        steps=250_000,
        learning_rate=0.0018,
        factor=0.25,
        ring=(0.999, 0.9999),
        max_phase=lra.PI / 10,
        bidirectional=True,
    ),
    **lra.selective(depth=6, width=128, batch_size=24, epochs=120.0, learning_rate=0.001, **SLOW),
}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=lra.MODELS, size=lra.SIZES)
    task = {"name": "pathx", "resolution": 128, "source": "generated", "data_dir": "data", "seed": 0}
    config = lra.base(model, size, task, RECIPES[model], PUBLISHED, length=128 * 128)
    if size == "fast":
        lra.fast(config, batch_size=32, epochs=12.0)
    elif size == "smoke":
        config.task.update({"examples": (16, 4, 4)})
        lra.smoke(config, length=32 * 32, resolution=32)
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """Every model in the preset's size."""
    lra.every_model(add, choose(preset, size=lra.SIZES)[0])
