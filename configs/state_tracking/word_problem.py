"""Word problems of finite groups: the product of the elements read so far (arXiv:2404.08819, section 5).

    python -m experiments.train --config=configs/state_tracking/word_problem.py:S3,mamba3 --workdir=runs/S3
    python -m experiments.sweep --config=configs/state_tracking/word_problem.py:paper --workdir=runs/words

Presets are GROUP,MODEL,SIZE in any order; S3,mamba3,paper where nothing is said. The second command trains CONTROLS on
the preset's group, and without one in it on every group, in the preset's size.
    GROUP  S3 A4 A5 S5 Z60 A4xZ5
    MODEL  mamba3, mamba2 and others: see configs/state_tracking/parity.py
    SIZE   paper   words of 20 elements, every prefix scored; tested at 20, 40 and 80; three seeds of each of eight
                   learning rates as one program
           smoke   four steps of a tiny model
--config.model.depth=1 to 4 and --config.task.lengths="(12,)" --config.task.test_length=12 are the axes of the paper's
figure 3: which depth reaches an accuracy of 90 % at which length, where a word counts as right if all its prefixes
are. The figure has no table, so nothing is published here. Its S4 and Mamba need more layers for longer words of A5;
a layer whose transitions commute, as Mamba-3's rotations do, can follow Z60 and no group that does not.
The paper trains on up to 10^6 words for up to 500 epochs in batches of 512 with weight decay 0.01 and a learning rate
of 1e-4, Mamba with width 698; here words are drawn without end, and the width, learning rates, schedule and steps are
those of configs/state_tracking/__init__.py.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose, state_tracking

GROUPS = ("S3", "A4", "A5", "S5", "Z60", "A4xZ5")
SIZES = ("paper", "smoke")
CONTROLS = ("mamba2", "mamba3", "deltanet_negative")  # transitions that decay, that turn, and that reflect


def get_config(preset: str = "") -> ConfigDict:
    group, model, size = choose(preset, group=GROUPS, model=state_tracking.MODELS, size=SIZES)
    fields = state_tracking.LENGTHS | {
        "name": f"word_problem_{group}",
        "metric": "sequence_accuracy",
        "min_length": 0,
        "lengths": (20,),
        "stage_steps": 0,
        "test_length": 20,
        "eval_lengths": (40, 80),
        "scored": "every",
        "test_scored": "every",
    }
    config = state_tracking.base(size, fields, model, depth=1)
    config.batch_size = 512
    config.optimizer.weight_decay = 0.01
    if size == "smoke":
        state_tracking.smoke(config)
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """The controls on the preset's group, or on all of them."""
    chosen, _, size = choose(preset, group=("every", *GROUPS), model=("all",), size=SIZES)
    for group in GROUPS if chosen == "every" else [chosen]:
        for model in CONTROLS:
            add(f"{group},{model},{size}")
