"""Multi-query associative recall (Mamba-2, arXiv:2405.21060, section 9.1, figure 8, appendix D.1).

    python -m experiments.train --config=configs/recall/mqar.py:mamba2,l256 --workdir=runs/mqar

Presets are MODEL,SIZE in any order; mamba2,l256 where nothing is said.
    MODEL  mamba2 mamba mamba3 attention
    SIZE   l256 l512 l1024  sequences of so many tokens, a quarter as many pairs; three learning rates as one program
           smoke            four steps of a tiny model
Figure 8 has no table, so nothing is published here; it has an accuracy for each width of 32, 64, 128 and 256
(--config.model.width) and of Mamba-2 for 16, 64 and 256 states (--config.model.mixers.mamba2.state_size). In it Mamba
with 16 states stays below 50 % on the hard cells, Mamba-2 with 64 is near attention, and with 256 at or above it.
Stated: two layers, a vocabulary of 8,192, stages of length/32, /16, /8 and /4 pairs of 2^18 examples each, eight times
over; batches of 2^18 tokens; learning rates 10^-3.5, 10^-2 and 10^-2.5, falling linearly. Here they fall at every step
and not every epoch, no example comes twice, attention has rotary positions, not learnt ones, and there is one seed.
"""

from ml_collections import ConfigDict

from configs import choose, synthetic

MODELS = ("mamba2", "mamba", "mamba3", "attention")
SIZES = ("l256", "l512", "l1024", "smoke")
STAGE_EXAMPLES = 8 * 2**18
BATCH_TOKENS = 2**18


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=MODELS, size=SIZES)
    length = int(size[1:]) if size != "smoke" else 256
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
    config = synthetic.base(size, task, model, depth=2)
    config.optimizer.update({"learning_rate": 10**-2.5, "schedule": "linear"})
    config.replicas = {"learning_rates": (10**-3.5, 10**-2.5, 10**-2.0), "seeds": 1}
    config.batch_size, config.eval_batch_size = batch, 64
    config.train_steps = 4 * config.task.stage_steps
    config.eval_every_steps = config.checkpoint_every_steps = config.task.stage_steps // 4
    if size == "smoke":
        synthetic.smoke(config, length=16, vocabulary=16, pairs=(2,), eval_lengths=(24,))
    return config
