"""Sequential CIFAR-10: a colour image read pixel by pixel, 1,024 steps of three channels, 10 classes.

    python -m experiments.train --config=configs/sequential/scifar.py:s4d,fast --workdir=runs/scifar
    python -m experiments.sweep --config=configs/sequential/scifar.py:fast --workdir=runs/scifar-all

Presets are MODEL,SIZE in any order; s5,fast where nothing is said. The second command trains every model.
    MODEL  s5 lru s4 s4d        the papers' models
           mamba mamba2 mamba3  new rows: one mixer forward and one backward
    SIZE   fast   bfloat16, batches of 128, 100 epochs, and images mirrored at random, which the papers' are not
           paper  the published hyperparameters
           smoke  four steps of a tiny model
The images are downloaded by TFDS. Of a copy here, a folder or a packed file: --config.task.data_dir=PATH. A copy in
JPEG is another data set, and the log says so.

Published, in percent: S4 91.80 (without LegS's theory 91.13; with augmentation 93.16), S4D 90.69, S5 90.10, LRU 89.0; a
causal Mamba 90.1. S4's and S4D's rows are configs/experiment/cifar/s4-cifar.yaml of the authors' repository, LRU's is
arXiv:2303.06349's table 9. For S5 no row was found: the hyperparameters are those of the grey images.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose, lra
from configs.lra import image

PUBLISHED = {"s4": 91.80, "s4d": 90.69, "s5": 90.10, "lru": 89.0}
S4 = lra.s4(depth=6, width=512, state_size=64, warmup_steps=900, norm="layer", copies=2, **image.S4)
RECIPES = image.RECIPES | {"s4": S4}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=lra.MODELS, size=lra.SIZES)
    task = {"name": "scifar", "data_dir": "", "validation": 5000, "flip": False, "crop": 0}
    config = lra.base(model, size, task, RECIPES[model], PUBLISHED, length=1024)
    if size == "fast":
        config.task.flip = True
        lra.fast(config, batch_size=128, epochs=100.0, eval_epochs=2.0)
    elif size == "smoke":
        lra.smoke(config, length=1024)
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """Every model in the preset's size."""
    lra.every_model(add, choose(preset, size=lra.SIZES)[0])
