"""What a training step costs, on noise in the shape of a task: no result, and nothing is learnt.

    python -m experiments.throughput --config=configs/throughput.py:mamba2-130m --json=FILE

Presets are MODEL,SIZE in any order; pathx,full where nothing is said.
    MODEL  pathx        the classifier that reads Path-X, 16,384 pixels: six bidirectional S4D layers of width 256 with
                        64 states, batch norm, gated units (the sizes of S4, arXiv:2111.00396, table 11)
           mamba2-130m  the language model of Mamba-2's smallest checkpoint (arXiv:2405.21060): 24 layers of width 768,
                        50,277 tokens filled up to 50,288; 16 sequences of 2,048
           mamba3-130m  the same with Mamba-3's layers in place of Mamba-2's
           replicas     the model that learns parity in the demo, alone, and 3 seeds of 8 learning rates as one program
    SIZE   full         bfloat16 activations, AdamW, no dropout
           smoke        the same, tiny
    python -m experiments.throughput --config=configs/throughput.py:replicas
is what replicas save. On an H200 a step of 24 takes 1.36 ms and of one alone 0.55: as long as 2.5. On two cores of a
CPU that other programs used too, the shortest step of 24 took 420 ms, of one alone 12.9 ms: as long as 33, for the
arrays of 24 outgrow the caches; what is saved there is 23 compilations.
`variants` names what is timed, each with fields set anew (FIELD=VALUE, spaces between); `baseline` is the one to
compare with.
"""

from ml_collections import ConfigDict

from configs import choose, language_model, smnist
from configs.state_tracking import REPLICAS, parity

MODELS = ("pathx", "mamba2-130m", "mamba3-130m", "replicas")
SIZES = ("full", "smoke")


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=MODELS, size=SIZES)
    if model == "replicas":
        return _replicas(size)
    config = _pathx() if model == "pathx" else _language_model(model.split("-")[0])
    config.preset = model if size == "full" else size
    config.timed_steps = 20 if model == "pathx" else 10
    if size == "smoke":
        config.task.update({"length": 64, "examples": 4})
        config.model.update({"width": 8, "depth": 1})
        (options,) = config.model.mixers.values()
        options.state_size = 4
        if model != "pathx":
            options.head_size = 4
            config.task.vocabulary = 16
        config.batch_size = config.eval_batch_size = 4
        config.timed_steps = 2
    return config


def _pathx() -> ConfigDict:
    config = smnist.get_config("s4d,paper")
    config.task = {"name": "noise", "length": 16384, "examples": 64, "vocabulary": 0}
    config.model.update({"width": 256, "depth": 6, "bidirectional": True, "dtype": "bfloat16", "dropout": 0.0})
    config.batch_size = config.eval_batch_size = 32
    config.baseline = "fft"
    config.variants = {
        "fft": "model.mixers.s4d.form=parallel",
        "chunked": "model.mixers.s4d.form=chunked",
    }
    config.model.mixers.s4d.form = "auto"
    return config


def _replicas(size: str) -> ConfigDict:
    config = parity.get_config("mamba3,demo" if size == "full" else "mamba3,smoke")
    config.preset = "parity" if size == "full" else size
    config.replicas = REPLICAS
    config.baseline = "alone"
    config.variants = {"alone": "replicas={}", "24": "replicas.seeds=3"}
    config.timed_steps = 100 if size == "full" else 2
    return config


def _language_model(mixer: str) -> ConfigDict:
    config = language_model.get_config(f"{mixer},shakespeare")
    config.task = {"name": "noise", "length": 2048, "examples": 32, "vocabulary": 50288}
    config.model.update({"width": 768, "depth": 24, "mlp_size": 0, "dropout": 0.0})
    config.model.mixers[mixer].update({"state_size": 128, "form": "auto"})
    config.batch_size = config.eval_batch_size = 16
    config.baseline = "chunked"
    config.variants = {form: f"model.mixers.{mixer}.form={form}" for form in ("auto", "chunked")}
    return config
