import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import optimizer
from experiments.optimizer import Options

PARAMS = {
    "block": {"log_dt": jnp.array([-3.0, 0.5])},
    "head": {"bias": jnp.array([0.3]), "kernel": jnp.ones((1, 2))},
}
SSM = {"match": "log_dt$", "learning_rate": 1e-3, "weight_decay": 0.0}


def adamw(path: str, rates, rate: float, decay: float, gradients) -> np.ndarray:
    """Loshchilov and Hutter 2019, Algorithm 2, in float64."""
    p = np.asarray(PARAMS[path.split("/")[0]][path.split("/")[1]], np.float64)
    m = v = np.zeros_like(p)
    for t, (factor, g) in enumerate(zip(rates, gradients, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        p = p - factor * rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + decay * p)
    return p


def test_three_steps_by_hand():
    """Fails when a group has another's rate or decay, or when the decay is not scaled by the rate."""
    options = Options(0.1, weight_decay=0.2, b2=0.99, warmup_steps=2, groups={"ssm": SSM})
    rows = optimizer.table(options, PARAMS)
    tx = optimizer.build(options, rows, optimizer.schedule(options, 6, 1.0))
    gradients = [jax.tree.map(lambda p, s=s: s * jnp.cos(p), PARAMS) for s in (1.0, -0.5, 3.0)]
    params, state = PARAMS, tx.init(PARAMS)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    factors = (0, 0.5, 1)  # warm-up of 2 steps from 0
    for path, rate, decay in (("block/log_dt", 1e-3, 0), ("head/bias", 0.1, 0.2), ("head/kernel", 0.1, 0.2)):
        one, two = path.split("/")
        expected = adamw(path, factors, rate, decay, [np.asarray(g[one][two], np.float64) for g in gradients])
        np.testing.assert_allclose(params[one][two], expected, rtol=2e-6)


def test_clip_norm_bounds_the_whole_gradient():
    options = Options(1.0, name="sgd", b1=0.0, schedule="constant", clip_norm=2.0)
    tx = optimizer.build(options, optimizer.table(options, PARAMS), optimizer.schedule(options, 5, 1.0))
    updates, _ = tx.update(jax.tree.map(lambda p: jnp.full(p.shape, 3.0), PARAMS), tx.init(PARAMS), PARAMS)
    norm = np.sqrt(sum((np.asarray(u) ** 2).sum() for u in jax.tree.leaves(updates)))
    np.testing.assert_allclose(norm, 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["bias"], -2 / np.sqrt(5), rtol=1e-6)


def test_factors_of_cosine_and_constant():
    steps = np.arange(101)
    cosine = optimizer.schedule(Options(1.0, warmup_percent=20), 100, 1.0)
    expected = np.where(steps < 20, steps / 20, 0.5 * (1 + np.cos(np.pi * (steps - 20) / 80)))
    np.testing.assert_allclose([cosine(jnp.asarray(s)) for s in steps], expected, atol=1e-6)
    linear = optimizer.schedule(Options(1.0, schedule="linear", warmup_percent=20), 100, 1.0)
    expected = np.where(steps < 20, steps / 20, np.maximum(100 - steps, 0) / 80)
    np.testing.assert_allclose([linear(jnp.asarray(s)) for s in steps], expected, atol=1e-6)
    constant = optimizer.schedule(Options(1.0, schedule="constant", warmup_epochs=0.5), 100, 40.0)
    np.testing.assert_allclose([constant(jnp.asarray(s)) for s in steps], np.minimum(steps / 20, 1), atol=1e-6)


def test_table_and_its_text():
    factor = {"match": "^head/", "learning_rate_factor": 0.25}
    rows = optimizer.table(Options(0.4, weight_decay=0.2, groups={"ssm": SSM, "head": factor}), PARAMS)
    assert rows == [
        ("block/log_dt", (2,), 2, "ssm", 1e-3, 0.0),
        ("head/bias", (1,), 1, "head", 0.1, 0.2),
        ("head/kernel", (1, 2), 2, "head", 0.1, 0.2),
    ]
    lines = optimizer.show(rows).splitlines()
    assert lines[1].split() == ["block/log_dt", "(2,)", "2", "ssm", "0.001", "0"]
    assert lines[-1].split() == ["total", "5"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": {"match": "log_td"}}, "optimizer group a: match='log_td' matches no parameter"),
        ({"a": {"match": "bias"}, "b": {"match": "head"}}, "groups a and b both match parameter head/bias"),
        ({"a": {"match": "("}}, r"group a: match='\(' is no regular expression"),
        (
            {"a": {"match": "bias", "learning_rat": 1}},
            "option of optimizer group a 'learning_rat'; .*'learning_rate'",
        ),
        ({"a": {"match": "bias", "learning_rate": 1.0, "learning_rate_factor": 2.0}}, "group a: .*not both"),
    ],
)
def test_wrong_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        optimizer.table(Options(0.1, groups=groups), PARAMS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam_w"}, "unknown optimizer 'adam_w'; did you mean 'adamw'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"warmup_steps": 50}, "a warm-up of 50 steps is not shorter than the run"),
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, "warmup_steps=5 and warmup_epochs=1.0 are both given"),
        ({"weight_dcay": 0.1}, "option of optimizer 'weight_dcay'; did you mean 'weight_decay'"),
    ],
)
def test_wrong_options(fields, message):
    with pytest.raises(ValueError, match=message):
        options = optimizer.options({"learning_rate": 0.1, **fields})
        optimizer.build(options, optimizer.table(options, PARAMS), optimizer.schedule(options, 50, 1.0))


def test_durations():
    def duration(**fields):
        return optimizer.duration(fields, "train", per_epoch=12.5, total=200)

    assert (duration(train_steps=7), duration(train_epochs=2.0, train_steps=0)) == (7, 25)
    assert (duration(train_percent=10.0), duration(train_epochs=0.001), duration(train_steps=0)) == (20, 1, 0)
    assert optimizer.duration({"warmup_percent": 10.0}, "warmup", 1.0, total=4) == 0
    with pytest.raises(ValueError, match="train_steps=7 and train_epochs=2 are both given"):
        duration(train_steps=7, train_epochs=2)
    with pytest.raises(ValueError, match="train_steps=-7: must not be negative"):
        duration(train_steps=-7)
