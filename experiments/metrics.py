"""What tasks are judged by, from weighted sums that are added on the device and divided on the host."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Sums(NamedTuple):
    """Sums over examples (classification) or tokens (language models), float32 scalars; or one of each row, (b,)."""

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array

    @classmethod
    def zero(cls, *shape: int) -> "Sums":
        return cls(*(jnp.zeros(shape, jnp.float32) for _ in cls._fields))

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)


def rows(logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> Sums:
    """Each row's sums of w * cross entropy (nats), w * [argmax is the target], and w.

    logits: (b, ..., classes); targets: (b, ...) int; weights: (b, ...) or None for ones.
    """
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    within = tuple(range(1, targets.ndim))
    return Sums(*(jnp.sum(x, within) for x in (weights * loss, weights * correct, weights)))


def total(parts: Sums, metric: str) -> Sums:
    """The sums over rows. With "sequence_accuracy" a row's entries are right where all of them are (weights 0 or 1)."""
    if metric == "sequence_accuracy":
        parts = parts._replace(correct=jnp.where(parts.correct == parts.weight, parts.weight, 0))
    return jax.tree.map(jnp.sum, parts)


def means(parts: Sequence[Sums], metric: str, classes: int = 1) -> dict[str, Any]:
    """Mean loss in nats, and the metric; the parts are added in float64. classes: of which chance hits one.

    parts: of scalars, or of arrays of one shape, whose entries are averaged each by itself.
    """
    loss, correct, weight = np.sum(np.array(jax.device_get(parts), np.float64), axis=0)
    accuracy = 100 * correct / weight
    if metric == "scaled_accuracy":
        value = (classes * accuracy - 100) / (classes - 1)
    else:
        value = loss / weight / math.log(2) if metric == "bits_per_byte" else accuracy
    return {"loss": loss / weight, metric: value}


class Metric(NamedTuple):
    """How a task's figure is shown, and which of two is better."""

    unit: str
    digits: int  # behind the point
    higher_is_better: bool

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f} {self.unit}"


METRICS = {
    "accuracy": Metric("%", 2, True),
    "scaled_accuracy": Metric("%", 2, True),  # (accuracy - chance) / (1 - chance)
    "sequence_accuracy": Metric("%", 2, True),  # of sequences that are right at every scored position
    "bits_per_byte": Metric("bits/byte", 3, False),
}


def improves(metric: str, split: str, figures: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether the split's figure is the first, or better than the best so far."""
    key, sign = f"{split}/{metric}", 1 if METRICS[metric].higher_is_better else -1
    return key not in best or sign * figures[key] > sign * best[key]
