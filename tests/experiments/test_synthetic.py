"""Synthetic tasks against their definitions in plain Python, and what they share: draws, stages, splits, errors."""

import itertools

import jax
import numpy as np
import pytest

from experiments import setup, tasks
from tests.experiments.synthetic import batch, load, rows


def answer(name: str, tokens: list[int]) -> int:
    """The token that answers a string."""
    if name == "parity":
        return 1 + tokens.count(2) % 2
    if name == "even_pairs":
        return 1 + sum(pair in ((1, 2), (2, 1)) for pair in itertools.pairwise(tokens)) % 2
    if name == "cycle":
        place = 0
        for token in tokens:
            place = {1: place, 2: (place + 1) % 5, 3: (place - 1) % 5}[token]
        return 4 + place
    return 1 + sum(token - 1 for token in tokens) % 5


AUTOMATA = ("parity", "even_pairs", "cycle", "modular_addition")


@pytest.mark.parametrize("name", AUTOMATA)
def test_automata(name):
    """The string, its one answer where it ends, and nothing after it; every length, letter and answer comes up."""
    task = load(name, lengths=(12,), min_length=3)
    letters, sizes, answers = set(), set(), []
    for tokens, targets, weights in rows(task, 256):
        size = int(weights.argmax()) + 1
        assert weights.sum() == 1 and not tokens[size:].any() and not np.delete(targets, size - 1).any()
        assert targets[size - 1] == answer(name, tokens[:size].tolist())
        letters |= set(tokens[:size])
        sizes.add(size)
        answers.append(targets[size - 1])
    expected = {"cycle": {1, 2, 3}, "modular_addition": {1, 2, 3, 4, 5}}.get(name, {1, 2})
    assert letters == expected and sizes == set(range(3, 13)) and max(letters | set(answers)) == task.input_size - 1
    balanced(answers, task.classes)


def balanced(answers: list[int], classes: int) -> None:
    """All classes come up, each within 5 standard deviations of its share."""
    counts = np.unique(answers, return_counts=True)[1]
    share = 1 / classes
    assert len(counts) == classes
    assert abs(counts / len(answers) - share).max() < 5 * (share * (1 - share) / len(answers)) ** 0.5


@pytest.mark.parametrize("name", [*AUTOMATA, "word_problem_S3"])
def test_every_position_can_be_scored(name):
    """The target of a position is the answer of the string that ends there; a test may score the last one alone."""
    task = load(name, lengths=(6,), min_length=0, scored="every", test_scored="last", test_length=9)
    for tokens, targets, weights in rows(task, 8):
        assert weights.tolist() == [1] * 6
        for i in range(6 if name in AUTOMATA else 0):
            assert targets[i] == answer(name, tokens[: i + 1].tolist())
    assert batch(task, 8, "test")["weights"].tolist() == [[0] * 8 + [1]] * 8


EXPRESSIONS = {
    "modular_arithmetic": ("?+-*=01234", {}),
    "modular_arithmetic_brackets": ("?+-*=()01234", {}),
    "with *": ("?+-*=()01234", {"multiply": True}),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_arithmetic(name):
    """Python's own value of the expression, whose length is the one drawn, less one where that cannot be."""
    symbols, options = EXPRESSIONS[name]
    task = load(name if name in tasks.TASKS else "modular_arithmetic_brackets", lengths=(20,), min_length=2, **options)
    sizes, seen, answers = set(), set(), []
    for tokens, targets, weights in rows(task, 512):
        size = int(weights.argmax()) + 1
        text = "".join(symbols[token] for token in tokens[:size])
        assert text.endswith("=") and not tokens[size:].any() and weights.sum() == 1
        assert targets[size - 1] == task.input_size - 5 + eval(text[:-1]) % 5, text
        sizes.add(size)
        seen |= set(text)
        answers.append(targets[size - 1])
    assert sizes == set(range(2, 21, 2 if name == "modular_arithmetic" else 1))
    assert seen == set(symbols) - set("?") - (set("*") if name == "modular_arithmetic_brackets" else set())
    if name == "modular_arithmetic_brackets":
        balanced(answers, 5)
    assert len(set(answers)) == 5


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_parts_of_an_expression(name):
    """In training Python's value of what is before an operator; with brackets up to a digit or ")", all closed there,

    and at "(" or an operator what the next digit counts by.
    """
    symbols, options = EXPRESSIONS[name]
    kind = name if name in tasks.TASKS else "modular_arithmetic_brackets"
    task = load(kind, lengths=(20,), min_length=2, test_length=20, scored="every", **options)
    checked = 0
    for tokens, targets, weights in rows(task, 128):
        text = "".join(symbols[token] for token in tokens).rstrip("?")
        asks = "+-*=" + "()01234" * (kind == "modular_arithmetic_brackets")
        assert np.flatnonzero(weights).tolist() == [i for i, symbol in enumerate(text) if symbol in asks]
        for i in np.flatnonzero(weights):
            part = text[:i] if kind == "modular_arithmetic" or text[i] == "=" else text[: i + 1]
            ends = ")" * (part.count("(") - part.count(")"))
            value = eval(part + "1" + ends) - eval(part + "0" + ends) if part[-1] in "(+-*" else eval(part + ends)
            assert targets[i] == task.input_size - 5 + value % 5, (text, i)
            checked += text[i] != "="
    assert checked > 128
    assert (np.asarray(batch(task, 8, "test")["weights"]).sum(1) == 1).all()


def test_brackets_nest_as_deep_as_the_length_allows():
    depths = []
    for tokens, _, _ in rows(load("modular_arithmetic_brackets", lengths=(100,), min_length=0), 64):
        depth = np.cumsum((tokens == 5).astype(int) - (tokens == 6))
        assert depth[-1] == 0 and depth.min() >= 0
        depths.append(depth.max())
    assert max(depths) > 8 and len(set(depths)) > 4


def permutations(group: str) -> list[tuple[int, ...]]:
    """The group's elements as the tasks number them, by sorting closed sets of permutations."""
    if group == "Z60":
        return [tuple((x + i) % 60 for x in range(60)) for i in range(60)]
    if "x" in group:
        turns = [tuple((x + i) % 5 + 4 for x in range(5)) for i in range(5)]
        return [g + h for g in permutations("A4") for h in turns]
    points = int(group[1:])
    everything = itertools.permutations(range(points))
    return [g for g in everything if group[0] == "S" or np.linalg.det(np.eye(points)[list(g)]) > 0]


ORDERS = {"S3": 6, "A4": 12, "A5": 60, "S5": 120, "Z60": 60, "A4xZ5": 60}


@pytest.mark.parametrize("group", ORDERS)
def test_word_problems(group):
    """Point after point through the permutations of the prefix, the last one first."""
    elements = permutations(group)
    task = load(f"word_problem_{group}", lengths=(9,))
    assert len(elements) == ORDERS[group] == task.classes == task.input_size - 1
    for tokens, targets, weights in rows(task, 16):
        assert weights.all()
        for i in range(9):
            image = list(range(len(elements[0])))
            for token in reversed(tokens[: i + 1]):
                image = [elements[token - 1][x] for x in image]
            assert elements[targets[i] - 1] == tuple(image)


# What all of them share ---------------------------------------------------------------------------------

KINDS = {
    "even_pairs": {"lengths": (24,)},
    "modular_arithmetic_brackets": {"lengths": (24,)},
    "word_problem_S3": {"lengths": (24,)},
    "selective_copying": {"length": 24, "memorize": 5},
    "induction_heads": {"length": 24},
    "mqar": {"length": 24, "pairs": (3,), "vocabulary": 40},
    "needle": {"length": 24},
}


@pytest.mark.parametrize("name", KINDS)
def test_an_example_is_a_function_of_seed_step_and_row(name):
    """Not of the batch size, nor of where a run was continued; other steps, seeds and splits have others."""
    task = load(name, **KINDS[name])
    make = jax.jit(lambda origin: task.preprocess(origin, jax.random.key(0), True))
    found = [make(part) for part in itertools.islice(task.train_batches(4, 7, 0), 3)]
    alike, other, fewer = (make(next(task.train_batches(*origin))) for origin in ((4, 7, 2), (4, 8, 2), (2, 7, 2)))
    jax.tree.map(np.testing.assert_array_equal, alike, found[2])
    jax.tree.map(np.testing.assert_array_equal, fewer, {name: x[:2] for name, x in alike.items()})
    assert len({str(row) for part in (*found, other) for row in part["inputs"].tolist()}) > 8
    assert {(x.shape, str(x.dtype)) for x in alike.values()} == {((4, 24), "int32"), ((4, 24), "float32")}
    assert 0 <= alike["inputs"].min() and alike["inputs"].max() < task.input_size


def test_devices_share_a_batch():
    """Each makes its own rows, and they are those that one device makes."""
    task = load("parity", lengths=(24,))
    _, split = setup.shardings(jax.local_devices()[:2])
    origin = next(task.train_batches(4, 0, 0))
    placed = jax.device_put(origin, split)
    one, two = (jax.jit(lambda part: task.preprocess(part, jax.random.key(0), True))(x) for x in (origin, placed))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert [shard.data.shape for shard in two["inputs"].addressable_shards] == [(2, 24)] * 2


def test_a_test_counts_each_example_once_and_is_always_the_same():
    task = load("parity", test_examples=5, test_length=8, eval_lengths=(16, 32), eval_examples=3)
    assert task.splits == ("train", "test", "test_16", "test_32")
    found = {}
    for size in (2, 4, 5):
        parts = [task.preprocess(part, jax.random.key(size), False) for part in task.eval_batches("test", size)]
        inputs, weights = (np.concatenate([part[name] for part in parts]) for name in ("inputs", "weights"))
        found[size] = inputs[weights.sum(1) == 1].tolist()
    assert found[2] == found[4] == found[5] and len(found[2]) == 5 == task.examples("test")
    shapes = [task.preprocess(next(task.eval_batches(s, 4)), None, False)["weights"] for s in task.splits[2:]]
    assert [(x.shape, float(x.sum())) for x in shapes] == [((4, 16), 3), ((4, 32), 3)]


def test_stages_of_training_grow():
    """One shape for all, so that the step is compiled once; lengths of the stage alone."""
    task = load("parity", lengths=(4, 8, 16), stage_steps=10, min_length=3)
    for step, longest in ((0, 4), (9, 4), (10, 8), (19, 8), (20, 16), (1000, 16)):
        weights = np.asarray(batch(task, 128, "train", 0, step)["weights"])
        assert weights.shape == (128, 16) and set(weights.argmax(1) + 1) == set(range(3, longest + 1))


def test_the_test_may_draw_lengths_too():
    task = load("parity", test_min_length=4, test_length=10)
    assert set(np.asarray(batch(task, 128, "test")["weights"]).argmax(1) + 1) == set(range(4, 11))


ERRORS = {
    "modulus=1 must be between 2 and 1024": ("cycle", {"modulus": 1}),
    "task modular_arithmetic: modulus=2000 must be between 2": ("modular_arithmetic", {"modulus": 2000}),
    "multiply is for modular_arithmetic_brackets": ("modular_arithmetic", {"multiply": True}),
    "lengths=\\(1,\\) must be at least 2": ("modular_arithmetic", {"lengths": (1,)}),
    "lengths is empty": ("parity", {"lengths": ()}),
    "stage_steps=0 with 2 stages": ("parity", {"lengths": (4, 8)}),
    "min_length=9 must be 0, or between 1 and 8": ("parity", {"lengths": (8,), "min_length": 9}),
    "test_min_length=300 must be 0, or between": ("parity", {"test_min_length": 300}),
    "eval_lengths=\\(64, 0\\) must be at least 1": ("parity", {"eval_lengths": (64, 0)}),
    "test_examples=0 must be at least 1": ("mqar", {"test_examples": 0}),
    "unknown scored 'evry'; did you mean 'every'": ("parity", {"scored": "evry"}),
    "unknown metric of task parity 'acuracy'; did you mean 'accuracy'": ("parity", {"metric": "acuracy"}),
    "unknown option of task parity 'lenghts'; did you mean 'lengths'": ("parity", {"lenghts": (8,)}),
    "unknown task 'word_problem_A6'; did you mean 'word_problem_A": ("word_problem_A6", {}),
    "vocabulary=3 must be at least 4": ("copying", {"vocabulary": 3}),
    "length=31 must be at least 32: memorize=16 tokens": ("copying", {"length": 31}),
    "eval_lengths=\\(64, 2\\) must be at least 3: the special": ("induction_heads", {"eval_lengths": (64, 2)}),
    "pairs=\\(64,\\) are more than the 31 keys of vocabulary=64": ("mqar", {"vocabulary": 64}),
    "length=255 must be at least 256: 64 pairs take two tokens each": ("mqar", {"length": 255}),
    "power=0.0 must be above 0": ("mqar", {"power": 0.0}),
    "vocabulary=25 must be at least 26: the mark, keys=8, values=16": ("needle", {"vocabulary": 25}),
    "needles=9 need different keys, of which keys=8": ("needle", {"needles": 9}),
    "depth=1.5 must be between 0 and 1": ("needle", {"depth": 1.5}),
    "test_length=10 must be at least 11: needles=1 of 6 tokens": ("needle", {"test_length": 10}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_fields_are_named(message):
    name, fields = ERRORS[message]
    with pytest.raises(ValueError, match=message):
        tasks.load({"name": name, **fields})
