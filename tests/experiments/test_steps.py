import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import optimizer, steps
from experiments.tasks.base import ArrayTask, Examples
from tests.experiments.tiny import Tiny


class Brighter(ArrayTask):
    """Augmentation by key in training alone."""

    def preprocess(self, batch, key, train):
        noise = jax.random.randint(key, batch["inputs"].shape, 0, 50).astype(jnp.uint8)
        return {**batch, "inputs": batch["inputs"] + noise} if train else batch


def prepared(kind=ArrayTask, *, dropout=0.0, rate=0.0, seed=0):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 200, (16, 2, 3, 1), np.uint8), generator.integers(0, 4, 16)
    data = {"train": Examples(images, labels.astype(np.int32))}
    task = kind(encoder="image", input_size=1, classes=4, source="made up", data=data)
    model = Tiny(width=5, pattern="tiny", encoder="image", input_size=1, classes=4, dropout=dropout)
    batch = data["train"].take(np.arange(16))
    init = functools.partial(steps.init_variables, model, task, batch, seed)
    variables = jax.eval_shape(init)
    options = optimizer.Options(rate, schedule="constant")
    tx = optimizer.build(options, optimizer.table(options, variables[0]), optimizer.schedule(options, 9, 1.0))
    step = jax.jit(steps.train_step(model, task, tx, seed, log_every=1))
    return step, jax.jit(lambda: steps.new_state(tx, *init()))(), batch, task, model


def losses(step, state, batch) -> list[float]:
    found = []
    for _ in range(2):
        state, summary = step(state, batch)
        found.append(float(summary.sums.loss))
    return found


@pytest.mark.parametrize(
    ("options", "alike"),
    [({}, True), ({"dropout": 0.5}, False), ({"kind": Brighter}, False)],
    ids=["none", "dropout", "data"],
)
def test_every_step_has_its_own_random_numbers(options, alike):
    """With a learning rate of 0 two steps on one batch differ by their random numbers alone."""
    first, second = losses(*prepared(**options)[:3])
    assert (first == second) == alike


def test_the_seed_decides():
    assert losses(*prepared(seed=1)[:3]) == losses(*prepared(seed=1)[:3]) != losses(*prepared(seed=2)[:3])


def test_evaluation_neither_augments_nor_drops_and_uses_running_statistics():
    step, state, batch, task, model = prepared(Brighter, dropout=0.5)
    state, _ = step(state, batch)
    evaluate = jax.jit(steps.eval_step(model, task))
    parts = [evaluate(state.params, state.batch_stats, batch, jax.random.key(i)) for i in (1, 2)]
    assert parts[0] == parts[1]
    halves = [{k: v[i : i + 8] for k, v in batch.items()} for i in (0, 8)]
    parts[1:] = [evaluate(state.params, state.batch_stats, half, jax.random.key(1)) for half in halves]
    np.testing.assert_allclose(parts[0].loss, parts[1].loss + parts[2].loss, rtol=1e-6)


def test_summary_of_a_step():
    """Loss and norm of the gradient against the same written out."""
    step, state, batch, task, model = prepared()
    _, summary = step(state, batch)

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = model.apply(variables, batch["inputs"], train=True, mutable=["batch_stats"])
        return jnp.mean(-jax.nn.log_softmax(logits)[jnp.arange(16), batch["targets"]])

    gradient = jax.grad(loss)(state.params)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(summary.gradient_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(summary.sums.loss / 16, loss(state.params), rtol=1e-6)


@pytest.mark.parametrize("place", ["gradient of decoder/kernel", "value of encoder/bias", "loss"])
def test_health_names_the_first_bad_step_and_leaf(place):
    _, state, *_ = prepared()
    names = steps.watched_names(state)
    watched = list(steps.watch(state.params, state.params, state.batch_stats, state.opt_state, jnp.float32(0)))
    bad_tree = {"gradient": 0, "value": 1, "loss": 4}[place.split()[0]]
    spoil = functools.partial(_spoil, place.rpartition(" ")[2])
    watched[bad_tree] = jax.tree_util.tree_map_with_path(spoil, watched[bad_tree]) if bad_tree < 4 else jnp.nan
    state = state._replace(step=jnp.int32(6), health=steps.examine(state._replace(step=jnp.int32(6)), tuple(watched)))
    later = steps.examine(state._replace(step=jnp.int32(9)), (*watched[:4], jnp.nan))
    with pytest.raises(FloatingPointError, match=f"^step 7: {place} is not finite; checkpoints"):
        steps.check(later, names)


def _spoil(path, where, leaf):
    return (
        leaf.at[(0,) * leaf.ndim].set(jnp.inf)
        if jax.tree_util.keystr(where, simple=True, separator="/") == path
        else leaf
    )
