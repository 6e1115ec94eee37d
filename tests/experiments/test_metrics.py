import jax.numpy as jnp
import numpy as np

from experiments import metrics


def reference(logits, targets, weights) -> dict[str, float]:
    """Cross entropy and accuracy in float64, written out."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    correct = logits.argmax(-1) == targets
    return {
        "loss": (weights * loss).sum() / weights.sum(),
        "accuracy": 100 * (weights * correct).sum() / weights.sum(),
    }


def sums(*arrays, metric="accuracy") -> metrics.Sums:
    return metrics.total(metrics.rows(*arrays), metric)


def check(logits, targets, weights, parts):
    means = metrics.means(parts, "accuracy")
    expected = reference(logits, targets, weights)
    np.testing.assert_allclose([means[k] for k in expected], list(expected.values()), rtol=2e-6)


def test_classification_over_batches_of_unequal_weight(rng):
    """Fails for a mean of the batches' means, or when an entry of weight 0 counts."""
    logits, targets = rng.normal(size=(12, 10)).astype(np.float32), rng.integers(0, 10, 12)
    targets[:8] = logits[:8].argmax(-1)
    weights = np.array([1] * 6 + [1, 0, 0, 0, 0, 0], np.float32)
    parts = [sums(*(jnp.asarray(x[i : i + 6]) for x in (logits, targets, weights))) for i in (0, 6)]
    check(logits, targets, weights, parts)
    check(logits, targets, weights, [parts[0] + parts[1]])
    assert metrics.means(parts, "accuracy")["accuracy"] == 100


def test_language_model_without_weights_in_bfloat16(rng):
    logits = jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.bfloat16)
    targets = rng.integers(0, 7, (3, 5))
    check(logits, targets, np.ones((3, 5)), [sums(logits, jnp.asarray(targets))])


def test_parts_are_added_in_float64():
    """1e8 + 1 in float32 is 1e8."""
    part = metrics.Sums(jnp.float32(1e8), jnp.float32(0), jnp.float32(1e8))
    one = metrics.Sums(jnp.float32(1), jnp.float32(0), jnp.float32(0))
    assert metrics.means([part] + [one] * 10, "accuracy")["loss"] == (1e8 + 10) / 1e8


def test_scaled_accuracy_is_0_at_chance():
    right = [metrics.Sums(*map(jnp.float32, (0, correct, 40))) for correct in (10, 25, 40)]
    scaled = [metrics.means([part], "scaled_accuracy", classes=4)["scaled_accuracy"] for part in right]
    np.testing.assert_allclose(scaled, [0, 50, 100])


def test_sequence_accuracy_asks_for_all_of_a_sequence(rng):
    """Fails where a position of weight 0 counts, or one row's mistake costs another."""
    targets = rng.integers(0, 7, (8, 5))
    logits = 10 * np.eye(7, dtype=np.float32)[targets]
    logits[0, 2] = logits[3, 4] = 0
    logits[5, :, 6] = 99
    targets[[0, 3]] = 1
    targets[5] = 5
    weights = np.ones((8, 5), np.float32)
    weights[5] = 0
    weights[3, 4] = 0
    logits[3, :4] = 10 * np.eye(7)[1]
    parts = [sums(*map(jnp.asarray, (logits, targets, weights)), metric="sequence_accuracy")]
    assert [float(x) for x in parts[0][1:]] == [5 * 6 - 1, 5 * 7 - 1]
