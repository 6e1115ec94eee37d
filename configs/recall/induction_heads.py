"""Induction heads: the token that followed the special one, up to 2^20 tokens away (Mamba, arXiv:2312.00752, table 2).

    python -m experiments.train --config=configs/recall/induction_heads.py:mamba,paper --workdir=runs/induction

Presets are MODEL,SIZE in any order; mamba,paper where nothing is said.
    MODEL  mamba mamba2 mamba3 attention
    SIZE   paper  two layers, trained at length 256; the figure is that at 512, the first beyond it; three seeds of both
                  learning rates as one program
           smoke  four steps of a tiny model
Published at 512, in percent: Mamba 100 (and so at every length to 2^20), attention with rotary positions 83.6 (31.3 at
1,024), H3 80.9, Hyena 100 (44.1 at 1,024). Stated: a vocabulary of 16; batches of 8, in "epochs" of 8,192 steps, 25 for
Mamba and 50 for attention with rotary positions; Adam without weight decay at a constant rate of 1e-3 or 2e-4, of which
the first was Mamba's and the second the others'; width 64 for Mamba and 128 for the others, 8 heads. Assumed: what
`experiments/tasks/recall.py` says of the sequences, three seeds, and that Mamba-2 and Mamba-3 train as Mamba does.
Attention is tested up to 2^14, beyond which it had no memory left; the others read longer sequences in pieces, and
carry the state.
"""

from ml_collections import ConfigDict

from configs import choose, synthetic

MODELS = ("mamba", "mamba2", "mamba3", "attention")
SIZES = ("paper", "smoke")
PUBLISHED = {"mamba": 100.0, "attention": 83.6}
EPOCH = 8192  # steps


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=MODELS, size=SIZES)
    longest = 14 if model == "attention" else 20
    task = {
        "name": "induction_heads",
        "metric": "accuracy",
        "length": 256,
        "test_length": 512,
        "vocabulary": 16,
        "test_examples": 1024,
        "eval_lengths": tuple(2**i for i in range(6, longest + 1)),
        "eval_examples": 64,
    }
    config = synthetic.base(size, task, model, depth=2)
    config.batch_size = config.eval_batch_size = 8
    config.train_steps, config.eval_every_steps = 25 * EPOCH, EPOCH
    config.eval_piece_tokens = 2**14
    config.replicas = {"learning_rates": (0.0002, 0.001), "seeds": 3}
    if model == "attention":
        config.model.update({"width": 128})
        config.model.mixers.attention.update({"heads": 8, "window": 2**14})
        config.optimizer.learning_rate = 0.0002
        config.train_steps = 50 * EPOCH
    if size == "smoke":
        synthetic.smoke(config, length=16, test_length=16, eval_lengths=(32,))
        config.eval_piece_tokens = 8
    else:
        synthetic.publish(config, PUBLISHED, model, "Gu and Dao 2023")
    return config
