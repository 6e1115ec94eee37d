"""Selective copying: 16 tokens among 4,080 of noise, written down in order (Mamba, arXiv:2312.00752, table 1).

    python -m experiments.train --config=configs/recall/selective_copying.py:mamba,paper --workdir=runs/copying
    python -m experiments.sweep --config=configs/recall/selective_copying.py:fast --workdir=runs/copying-fast

Presets are MODEL,SIZE in any order; mamba,paper where nothing is said. The second command trains every model.
    MODEL  mamba mamba2 mamba3 attention
           s4     64 states, not selective; an MLP of twice the width follows it, in place of its own output map
    SIZE   paper  two layers of width 64, length 4,096, 400,000 steps of batches of 64
           fast   ours: 20,000 steps of batches of 32 at three learning rates from 5e-4 to 2e-3 after a warm-up, then a
                  cosine; gradients clipped at 1; activations in bfloat16, states in float32
           smoke  four steps of a tiny model
Published, in percent: Mamba 99.8, S4 without a gate 18.3; of the other three none (Mamba's blocks around S4 56.4,
around Hyena 28.4: Mamba's block has no recurrence but its own here).
The paper states paper's set-up, a vocabulary of 16 and a constant learning rate of 1e-4; that it is Adam's, without
weight decay, is assumed, and so is what `experiments/tasks/copying.py` says of the sequences. It is 105 10^9 tokens, an
hour and a half at 20 million a second; fast has 8 10^9 in all. Copying itself, where the tokens are the first:
--config.task.name=copying. A median of three seeds: --config.replicas.seeds=3.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose, synthetic

MODELS = ("mamba", "mamba2", "mamba3", "attention", "s4")
SIZES = ("paper", "fast", "smoke")
PUBLISHED = {"mamba": 99.8, "s4": 18.3}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=MODELS, size=SIZES)
    task = {
        "name": "selective_copying",
        "metric": "accuracy",
        "length": 4096,
        "test_length": 0,
        "vocabulary": 16,
        "memorize": 16,
        "test_examples": 1024,
        "eval_lengths": (8192, 16384),
        "eval_examples": 256,
    }
    config = synthetic.base(size, task, model, depth=2)
    config.optimizer.learning_rate = 0.0001
    config.batch_size = config.eval_batch_size = 64
    config.train_steps, config.eval_every_steps = 400000, 20000
    config.eval_piece_tokens = 4096
    config.replicas = {"learning_rates": (0.0001,), "seeds": 1}
    if model == "s4":
        config.model.mlp_size = 128
        config.model.mixers.s4.length = config.task.length
    if size == "fast":
        synthetic.fast(config, learning_rates=(0.0005, 0.001, 0.002), seeds=1, steps=20000)
        config.batch_size, config.model.dtype = 32, "bfloat16"
    if size == "smoke":
        synthetic.smoke(config, length=16, memorize=4, eval_lengths=(24,))
    else:
        synthetic.publish(config, PUBLISHED, model, "Gu and Dao 2023")
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """Every model in the preset's size."""
    _, size = choose(preset, model=("all",), size=SIZES)
    for model in MODELS:
        add(f"{model},{size}")
