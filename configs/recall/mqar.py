"""Multi-query associative recall (Mamba-2, arXiv:2405.21060, section 9.1, figure 8, appendix D.1).

    python -m experiments.train --config=configs/recall/mqar.py:mamba2,l256 --workdir=runs/mqar
    python -m experiments.sweep --config=configs/recall/mqar.py:l256 --workdir=runs/mqar-l256

Presets are MODEL,SIZE,WIDTH in any order; mamba2,l256,d64 where nothing is said. The second command trains every model
in every width, for the figure of `python -m experiments.report mqar`.
    MODEL  mamba2                 with 64 states
           mamba2_n16 mamba2_n256 with 16 and 256
           mamba mamba3 attention
    SIZE   l256 l512 l1024  sequences of so many tokens, a quarter as many pairs; three learning rates as one program
           fast             ours: 256 tokens, a quarter of the examples and one learning rate, 10^-2.5, after a warm-up
                            of a tenth; gradients clipped at 1; activations in bfloat16: 0.5 of l256's 6.4 10^9 tokens
           smoke            four steps of a tiny model
    WIDTH  d32 d64 d128 d256
Figure 8 has no table, so nothing is published here; it has an accuracy for each width. In it Mamba with 16 states stays
below 50 % on the hard cells, Mamba-2 with 64 is near attention, and with 256 at or above it.
Stated: two layers, a vocabulary of 8,192, stages of length/32, /16, /8 and /4 pairs of 2^18 examples each, eight times
over; batches of 2^18 tokens; learning rates 10^-3.5, 10^-2 and 10^-2.5, falling linearly. Here they fall at every step
and not every epoch, no example comes twice, attention has rotary positions, not learnt ones, and there is one seed.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import choose, synthetic

STATES = {"mamba2_n16": 16, "mamba2_n256": 256}
MODELS = ("mamba2", *STATES, "mamba", "mamba3", "attention")
SIZES = ("l256", "l512", "l1024", "fast", "smoke")
WIDTHS = ("d64", "d32", "d128", "d256")
STAGE_EXAMPLES = 8 * 2**18
BATCH_TOKENS = 2**18


def get_config(preset: str = "") -> ConfigDict:
    model, size, width = choose(preset, model=MODELS, size=SIZES, width=WIDTHS)
    length = int(size[1:]) if size.startswith("l") else 256
    batch = BATCH_TOKENS // length
    task = {
        "name": "mqar",
        "metric": "accuracy",
        "length": length,
        "test_length": 0,
        "vocabulary": 8192,
        "pairs": tuple(length // part for part in (32, 16, 8, 4)),
        "test_pairs": 0,
        "stage_steps": STAGE_EXAMPLES // batch,
        "power": 0.01,
        "random_tokens": True,
        "test_examples": 4096,
        "eval_lengths": (2 * length,),
        "eval_examples": 1024,
    }
    name = size if size == "smoke" else f"{size}_{width}"
    pattern = "mamba2" if model in STATES else model
    config = synthetic.base(f"{model}-{name}" if model in STATES else name, task, pattern, depth=2)
    config.model.width = int(width[1:])
    if model in STATES:
        config.model.mixers.mamba2.state_size = STATES[model]
    config.optimizer.update({"learning_rate": 10**-2.5, "schedule": "linear"})
    config.replicas = {"learning_rates": (10**-3.5, 10**-2.5, 10**-2.0), "seeds": 1}
    config.batch_size, config.eval_batch_size = batch, 64
    config.train_steps = 4 * config.task.stage_steps
    config.eval_every_steps = config.checkpoint_every_steps = config.task.stage_steps // 4
    if size == "fast":
        config.task.stage_steps //= 4
        synthetic.fast(config, learning_rates=(10**-2.5,), seeds=1, steps=4 * config.task.stage_steps)
        config.model.dtype = "bfloat16"
    if size == "smoke":
        synthetic.smoke(config, length=16, vocabulary=16, pairs=(2,), eval_lengths=(24,))
    return config


def sweep(add: Callable[[str], None], preset: str = "") -> None:
    """The figure's models and widths, at the preset's length; the tiny model has one width."""
    _, size = choose(preset, model=("all",), size=SIZES)
    for model in MODELS:
        for width in WIDTHS[:1] if size == "smoke" else WIDTHS:
            add(f"{model},{size},{width}")
