"""Selective copying: 16 tokens among 4,080 of noise, written down in order (Mamba, arXiv:2312.00752, table 1).

    python -m experiments.train --config=configs/recall/selective_copying.py:mamba,paper --workdir=runs/copying

Presets are MODEL,SIZE in any order; mamba,paper where nothing is said.
    MODEL  mamba mamba2 mamba3 attention
    SIZE   paper  two layers of width 64, length 4,096, 400,000 steps of batches of 64
           smoke  four steps of a tiny model
Published, in percent: Mamba 99.8; of the other three none (Mamba's blocks around S4 56.4, around Hyena 28.4). The
paper states all of the above, a vocabulary of 16 and a constant learning rate of 1e-4; that it is Adam's, without
weight decay, is assumed, and so is what `experiments/tasks/copying.py` says of the sequences. Copying itself, where the
tokens are the first: --config.task.name=copying. A median of three seeds: --config.replicas.seeds=3.
"""

from ml_collections import ConfigDict

from configs import choose, synthetic

MODELS = ("mamba", "mamba2", "mamba3", "attention")
SIZES = ("paper", "smoke")
PUBLISHED = {"mamba": 99.8}


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
    if size == "smoke":
        synthetic.smoke(config, length=16, memorize=4, eval_lengths=(24,))
    else:
        synthetic.publish(config, PUBLISHED, model, "Gu and Dao 2023")
    return config
