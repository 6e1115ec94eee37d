"""Copying and recall against their definitions in plain Python."""

import itertools

import numpy as np
import pytest

from tests.experiments.synthetic import batch, load, rows


@pytest.mark.parametrize("name", ["copying", "selective_copying"])
def test_copying(name):
    """What is not noise before the markers, in order; selective copying has it anywhere, copying at the start."""
    task = load(name, length=40, memorize=6, vocabulary=9)
    places, symbols = set(), set()
    for tokens, targets, weights in rows(task, 64):
        assert weights.tolist() == [0] * 34 + [1] * 6 and tokens[34:].tolist() == [8] * 6
        kept = np.flatnonzero(tokens[:34])
        assert targets.tolist() == [0] * 34 + tokens[kept].tolist()
        places |= {*kept.tolist()}
        symbols |= {*tokens[kept].tolist()}
    assert places == set(range(6 if name == "copying" else 34)) and symbols == set(range(1, 8))


@pytest.mark.parametrize("length", [3, 20])
def test_induction_heads(length):
    task = load("induction_heads", length=length, vocabulary=5)
    places, answers = set(), set()
    for tokens, targets, weights in rows(task, 128):
        first, last = np.flatnonzero(tokens == 0)
        assert last == length - 1 and weights.tolist() == [0] * last + [1]
        assert targets.tolist() == [0] * last + [tokens[first + 1]]
        places.add(first)
        answers.add(targets[-1])
    assert places == set(range(length - 2)) and answers == {1, 2, 3, 4} and task.classes == 4


@pytest.mark.parametrize("random_tokens", [True, False])
def test_mqar(random_tokens):
    """Every pair is asked for once, after the pairs, at an even distance from their end; values are the keys' own."""
    task = load("mqar", length=48, vocabulary=64, pairs=(3, 6), stage_steps=10, random_tokens=random_tokens)
    for step, pairs in ((9, 3), (10, 6)):
        made = {name: np.asarray(x) for name, x in batch(task, 64, "train", 0, step).items()}
        for tokens, targets, weights in zip(made["inputs"], made["targets"], made["weights"], strict=True):
            values = dict(zip(tokens[: 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist(), strict=True))
            assert len(values) == len(set(values.values())) == pairs
            assert set(values) <= set(range(1, 32)) and set(values.values()) <= set(range(32, 64))
            asked = np.flatnonzero(weights)
            assert sorted(tokens[asked].tolist()) == sorted(values) and asked.min() >= 2 * pairs
            assert not (asked % 2).any() and not targets[weights == 0].any()
            assert [values[token] for token in tokens[asked].tolist()] == targets[asked].tolist()
            rest = np.delete(tokens, [*range(2 * pairs), *asked])
            assert rest.any() == random_tokens


def test_mqar_asks_by_a_power_law():
    """How often a place is taken, against NumPy's draws without replacement from the same law."""
    task = load("mqar", length=44, vocabulary=64, pairs=(4,), power=0.01)
    taken = np.asarray(batch(task, 4096)["weights"])[:, 8::2].mean(0)
    law = np.arange(1, 19) ** -0.99
    random = np.random.default_rng(0)
    expected = np.zeros(18)
    for _ in range(4096):
        expected[random.choice(18, 4, replace=False, p=law / law.sum())] += 1 / 4096
    np.testing.assert_allclose(taken, expected, atol=0.045)
    assert taken[0] > 4 * taken[-1]


@pytest.mark.parametrize(("needles", "depth"), [(1, -1.0), (3, -1.0), (3, 0.0), (2, 1.0), (1, 0.5)])
def test_needle(needles, depth):
    """The values that follow the mark and the key that the question has, anywhere or at the depth that is set."""
    task = load("needle", length=65, needles=needles, depth=depth, value_size=3, keys=4, values=5, vocabulary=20)
    places = set()
    for tokens, targets, weights in rows(task, 64):
        assert weights.tolist() == [0] * 62 + [1] * 3
        *marks, question = np.flatnonzero(tokens == 0)
        assert question == 61 and len(marks) == needles and min(np.diff([*marks, question])) >= 5 - (len(marks) == 0)
        found = {tokens[mark + 1]: tokens[mark + 2 : mark + 5].tolist() for mark in marks}
        assert len(found) == needles and set(found) <= {1, 2, 3, 4}
        assert all(5 <= value <= 9 for value in itertools.chain(*found.values()))
        assert found[tokens[62]] == targets[62:].tolist() and tokens[63:].tolist() == targets[62:64].tolist()
        hay = np.delete(tokens, [mark + i for mark in marks for i in range(5)] + list(range(61, 65)))
        assert (hay >= 10).all()
        places.add(next(mark for mark in marks if tokens[mark + 1] == tokens[62]))
    fixed = {0.0: {1}, 1.0: {56}, 0.5: {1 + 5 * 6}}
    assert places == fixed[depth] if depth >= 0 else len(places) == 12
