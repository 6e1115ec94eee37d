"""What a training step costs, on noise in the shape of a task: no result, and nothing is learnt.

    python -m experiments.throughput --config=configs/throughput.py:pathx --json=FILE

Presets; pathx where nothing is said.
    pathx  the classifier that reads Path-X, 16,384 pixels: six bidirectional S4D layers of width 256 with 64
           states, batch norm, gated units (the sizes of S4, arXiv:2111.00396, table 11), bfloat16 activations
    smoke  the same, tiny
`variants` names what is timed, each with fields set anew (FIELD=VALUE, spaces between); `baseline` is the one to
compare with.
"""

from ml_collections import ConfigDict

from configs import choose, smnist

SIZES = ("pathx", "smoke")


def get_config(preset: str = "") -> ConfigDict:
    (size,) = choose(preset, size=SIZES)
    config = smnist.get_config("s4d,paper")
    config.preset = size
    config.task = {"name": "noise", "length": 16384, "examples": 64}
    config.model.update({"width": 256, "depth": 6, "bidirectional": True, "dtype": "bfloat16", "dropout": 0.0})
    config.batch_size = config.eval_batch_size = 32
    config.baseline = "fft"
    config.variants = {
        "fft": "model.mixers.s4d.form=parallel",
        "chunked": "model.mixers.s4d.form=chunked",
    }
    config.model.mixers.s4d.form = "auto"
    config.timed_steps = 20
    if size == "smoke":
        config.task.update({"length": 64, "examples": 4})
        config.model.update({"width": 8, "depth": 1})
        config.model.mixers.s4d.state_size = 4
        config.batch_size = config.eval_batch_size = 4
        config.timed_steps = 2
    return config
