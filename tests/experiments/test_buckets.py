"""Batches of about one length: every example once an epoch, in an order of its seed, cut to what its batch needs."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments import setup
from experiments.tasks import buckets, resident
from experiments.tasks.base import ArrayTask, Examples
from tests.experiments.synthetic import load
from tests.experiments.test_resident import content, seen, sharding

BOUNDS = (3, 6, 9)


def examples(rng, n: int) -> Examples:
    """Tokens are 1 + the number of the example; zeros behind."""
    lengths = rng.integers(1, 10, n).astype(np.int32)
    tokens = np.where(np.arange(9) < lengths[:, None], 1 + np.arange(n)[:, None], 0)
    return Examples(tokens.astype(np.uint8), np.arange(n, dtype=np.int32) % 2, lengths)


@pytest.fixture
def task(rng) -> ArrayTask:
    data = {"train": examples(rng, 50), "test": examples(rng, 21)}
    return ArrayTask("token", 64, 2, "made up", data, buckets=BOUNDS)


def test_an_epoch_is_dealt_out(task):
    """12 batches of 4 of 50: all but two, and other two in the next epoch; little of them is padding."""
    lengths = task.data["train"].lengths
    for epoch in range(2):
        batches = buckets.plan(BOUNDS, lengths, 4, 7, epoch)
        assert batches.shape == (12, 4) and len(np.unique(batches)) == 48
        longest = lengths[batches].max(1)
        assert sum(longest > 6) < 12, "no batch is of one bucket"
        mixed = [np.unique(np.searchsorted(BOUNDS, row)).size > 1 for row in lengths[batches]]
        assert sum(mixed) < len(BOUNDS), "what is left over goes on, and nothing else"
        assert list(longest) != sorted(longest)
    first, again, other = (buckets.plan(BOUNDS, lengths, 4, seed, 0) for seed in (7, 7, 8))
    assert (first == again).all() and not (first == other).all() and not (first == batches).all()


def test_batches_are_cut_and_go_on_anywhere(task):
    batches = list(itertools.islice(task.train_batches(4, 7, 0), 30))
    for batch in batches:
        length = batch["inputs"].shape[1]
        assert length == min(b for b in BOUNDS if b >= batch["lengths"].max())
        assert ((batch["inputs"] > 0).sum(1) == batch["lengths"]).all(), "no token is lost"
    assert {batch["inputs"].shape[1] for batch in batches} == set(BOUNDS)
    for start in (5, 13):
        for a, b in zip(task.train_batches(4, 7, start), batches[start:], strict=False):
            assert content(a) == content(b)
    assert task.length == round(np.mean([min(b for b in BOUNDS if b >= n) for n in task.data["train"].lengths]))


def test_an_evaluation_has_every_example_once(task):
    found = []
    for batch in task.eval_batches("test", 4):
        assert ((batch["inputs"] > 0).sum(1) == batch["lengths"]).all()
        found += list(batch["inputs"][batch["weights"] > 0, 0] - 1)
    assert sorted(found) == list(range(21))


def test_on_the_device_it_is_the_same(task):
    there = resident.placed(task, "always", sharding(1))
    for name, arguments in {"train_batches": (4, 7, 2), "eval_batches": ("test", 4)}.items():
        host, device = (seen(t, getattr(t, name)(*arguments), 1, True) for t in (task, there))
        assert [content(a) for a in host] == [content(b) for b in device] and len(host) == 6


@pytest.mark.parametrize(
    "bounds, message",
    [
        ((3, 6), r"buckets=\(3, 6\) must ascend from at least 1 to the examples' 9"),
        ((6, 3, 9), "must ascend"),
        ((0, 9), "must ascend"),
    ],
)
def test_wrong_lengths(task, bounds, message):
    with pytest.raises(ValueError, match=message):
        setup.bucketed(task, bounds, several=False)


def test_tasks_without_lengths(task):
    pictures = dataclasses.replace(
        task, buckets=(), data={split: dataclasses.replace(x, lengths=None) for split, x in task.data.items()}
    )
    with pytest.raises(ValueError, match="are for examples with one length each"):
        setup.bucketed(pictures, (9,), several=False)
    made = load("parity", min_length=3, lengths=(8,), stage_steps=0, test_length=8)
    for one, several in ((made, False), (task, True)):
        with pytest.raises(ValueError, match="are for a single model of a task whose examples lie in memory"):
            setup.bucketed(one, BOUNDS, several)
