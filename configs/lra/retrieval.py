"""Retrieval: whether one paper cites another, two texts of 4,000 bytes (arXiv:2011.04006, section 2.2).

    python -m experiments.train --config=configs/lra/retrieval.py:s5,fast --workdir=runs/retrieval
    python -m experiments.sweep --config=configs/lra/retrieval.py:fast --workdir=runs/retrieval-all

Presets are MODEL,SIZE in any order; s5,fast where nothing is said. The second command trains every model.
    MODEL  s5 lru s4 s4d        the papers' models
           mamba mamba2 mamba3  new rows: one mixer forward and one backward
    SIZE   fast   bfloat16, batches of 64 pairs, 15 epochs: see configs/lra/__init__.py
           paper  the published hyperparameters
           smoke  four steps of a tiny model
The pairs are in the benchmark's release, and nowhere else: --config.task.data_dir=DIR/lra_release/lra_release, or the
folder in it that holds new_aan_pairs.train.tsv. Both texts go through one stack, and an MLP compares the two vectors:
`ssm.two_towers`.

Published, in percent: S4 90.90, S4D 91.09, S5 91.40, LRU 89.9; a causal Mamba, as others report it, 72.14.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose, lra

PUBLISHED = {"s4": 90.90, "s4d": 91.09, "s5": 91.40, "lru": 89.9}
STEPS = {"steps": 50_000, "warmup_steps": 5_000}
RECIPES = {
    "s4": lra.s4(depth=6, width=256, state_size=4, batch_size=64, learning_rate=0.01, **STEPS),
    "s4d": lra.s4d(depth=6, width=256, state_size=64, batch_size=64, learning_rate=0.01, **STEPS),
    "s5": lra.s5(
        depth=6,
        width=128,
        state_size=256,
        blocks=16,
        batch_size=32,
        epochs=20.0,
        ssm_rate=0.001,
        factor=2.0,
        weight_decay=0.05,
        groups="standard, dt global",
        glu="half1",
        C_init="trunc_standard_normal",
    ),
    "lru": lra.lru(
        width=128,
        state_size=256,
        batch_size=64,
        steps=100_000,
        learning_rate=0.002,
        factor=0.5,
        ring=(0.5, 0.9),
        dropout=0.1,
    ),
    **lra.selective(depth=6, width=128, batch_size=60, epochs=200.0, learning_rate=0.004),
}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=lra.MODELS, size=lra.SIZES)
    task = {"name": "retrieval", "data_dir": "data/lra_release/lra_release", "length": 4000}
    config = lra.base(model, size, task, RECIPES[model], PUBLISHED, length=4000)
    if size == "fast":
        lra.fast(config, batch_size=64, epochs=15.0)
    elif size == "smoke":
        lra.smoke(config, length=64)
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """Every model in the preset's size."""
    lra.every_model(add, choose(preset, size=lra.SIZES)[0])
