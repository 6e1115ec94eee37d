"""What a language model's matrix products come to, and what devices are published to do: the one's share of the other.

Counted is what no way to compute the model can leave out, a multiplication and an addition as two: of a token, every
matrix of the parameters once, the head's among them; of a recurrence, what each element of the state takes in and
gives out (4 a lane); of attention, scores and sums over the tokens that are seen. Twice as much again backwards.
Chunks do more, and so does `remat`: that counts for nothing here.
"""

from collections.abc import Sequence

import jax
import numpy as np

from experiments.optimizer import Row
from ssm.language_model import LanguageModel
from ssm.mixers import mixer
from ssm.mixers.attention import Attention

# Dense bfloat16 FLOP/s of one device by jax's name for it: NVIDIA's data sheets, and Google's documentation.
PEAK = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
RECURRENCES = ("mamba", "mamba2", "mamba3")


def peak(devices: int) -> float | None:
    """FLOP/s of so many of this process's devices; None where none are published here."""
    one = PEAK.get(jax.local_devices()[0].device_kind)
    return None if one is None else devices * one


def training(model: LanguageModel, rows: Sequence[Row], length: int) -> float | None:
    """FLOP a token, forward and backward, in sequences of `length`; None with a mixer that is not counted here.

    rows: the model's parameters.
    """
    names = model.layers()
    if not set(names) <= {*RECURRENCES, "attention"}:
        return None
    matrices = sum(row.count for row in rows if row.path.endswith("/kernel"))
    head = model.vocabulary * model.width if model.tie_embeddings else 0
    modules = (mixer(name, model.width, model.mixers.get(name, {}), parent=None) for name in names)
    return 3 * (2 * (matrices + head) + sum(_mixing(module, length) for module in modules))


def _mixing(module, length: int) -> float:
    """FLOP a token, forward, between the projections."""
    if isinstance(module, Attention):
        seen = np.minimum(1 + np.arange(length), module.window).mean()
        return 4 * module.heads * (module.head_size or module.width // module.heads) * float(seen)
    state = jax.eval_shape(lambda: module.initial_state(1))
    (h,) = (shape for name, shape in state._asdict().items() if name.startswith("h_"))
    return 4 * getattr(module, "rank", 1) * h.size
