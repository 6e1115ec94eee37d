"""A needle in a haystack: the values of a key, read anywhere before.

    python -m experiments.train --config=configs/recall/needle.py:mamba3,paper --workdir=runs/needle

Presets are MODEL,SIZE in any order; mamba3,paper where nothing is said.
    MODEL  mamba3 mamba2 mamba attention
    SIZE   paper  two layers of width 64, trained at length 1,024, tested at 1,024 to 8,192; three seeds of each of
                  three learning rates as one program
           smoke  four steps of a tiny model
The tokens are the task's own (`experiments/tasks/recall.py`), so no paper has figures for it; Mamba-3's retrieval
(arXiv:2603.15569, table 4) is that of language models of 1.5 billion parameters. One depth alone, as in the usual
chart: --config.task.depth=0.5. More needles than the one that is asked for: --config.task.needles=4.
"""

from ml_collections import ConfigDict

from configs import choose, synthetic

MODELS = ("mamba3", "mamba2", "mamba", "attention")
SIZES = ("paper", "smoke")


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=MODELS, size=SIZES)
    task = {
        "name": "needle",
        "metric": "sequence_accuracy",
        "length": 1024,
        "test_length": 0,
        "vocabulary": 64,
        "keys": 8,
        "values": 16,
        "needles": 1,
        "value_size": 4,
        "depth": -1.0,
        "test_examples": 1024,
        "eval_lengths": (2048, 4096, 8192),
        "eval_examples": 256,
    }
    config = synthetic.base(size, task, model, depth=2)
    config.batch_size = config.eval_batch_size = 64
    config.train_steps = 20000
    config.eval_piece_tokens = 4096
    config.replicas = {"learning_rates": (0.0003, 0.001, 0.003), "seeds": 3}
    if size == "smoke":
        synthetic.smoke(config, length=16, eval_lengths=(24,))
    return config
