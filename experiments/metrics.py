"""What tasks are judged by, from weighted sums that are added on the device and divided on the host."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Sums(NamedTuple):
    """Sums over examples (classification) or tokens (language models), float32 scalars."""

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array

    @classmethod
    def zero(cls) -> "Sums":
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)


def sums(logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> Sums:
    """Sums of w * cross entropy (nats), w * [argmax is the target], and w.

    logits: (..., classes); targets: (...) int; weights: (...) or None for ones.
    """
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return Sums(jnp.sum(weights * loss), jnp.sum(weights * correct), jnp.sum(weights))


def means(parts: Sequence[Sums], metric: str) -> dict[str, float]:
    """Mean loss in nats, and the metric; the parts are added in float64."""
    loss, correct, weight = np.sum([[float(x) for x in part] for part in jax.device_get(parts)], axis=0)
    values = {"accuracy": 100 * correct / weight, "bits_per_byte": loss / weight / math.log(2)}
    return {"loss": loss / weight, metric: values[metric]}


class Metric(NamedTuple):
    """How a task's figure is shown, and which of two is better."""

    unit: str
    digits: int  # behind the point
    higher_is_better: bool

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f} {self.unit}"


METRICS = {"accuracy": Metric("%", 2, True), "bits_per_byte": Metric("bits/byte", 3, False)}


def improves(metric: str, split: str, figures: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether the split's figure is the first, or better than the best so far."""
    key, sign = f"{split}/{metric}", 1 if METRICS[metric].higher_is_better else -1
    return key not in best or sign * figures[key] > sign * best[key]
