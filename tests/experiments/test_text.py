import itertools

import numpy as np
import pytest

from experiments import tasks

TEXT = bytes(range(100)) * 4


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def load(path, length=7):
    return tasks.load({"name": "language_model", "path": str(path), "length": length})


def test_training_windows_are_pieces_of_the_first_nine_tenths(tmp_path):
    """Every position serves as a start, the last possible one too, and targets are the next bytes."""
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    batches = list(itertools.islice(load(tmp_path / "bytes").train_batches(16, 3, 0), 200))
    inputs = np.concatenate([batch["inputs"] for batch in batches]).astype(int)
    np.testing.assert_array_equal(inputs + 1, np.concatenate([batch["targets"] for batch in batches]))
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(7))
    assert set(inputs[:, 0]) == set(range(230 - 7))


def test_batches_are_a_function_of_seed_and_step(text):
    task = load(text)

    def take(seed, start, count):
        batches = itertools.islice(task.train_batches(4, seed, start), count)
        return [batch["inputs"].tolist() for batch in batches]

    batches = take(1, 0, 6)
    assert take(1, 4, 2) == batches[4:] and take(2, 0, 6) != batches and batches[0] != batches[1]


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("length", [7, 19, 30])
def test_an_evaluation_predicts_every_byte_but_the_first_once(text, length, batch_size):
    """The split has 20 bytes: 19 to predict, with windows that fit and that do not."""
    task = load(text, length)
    predicted, batches = [], list(task.eval_batches("test", batch_size))
    for batch in batches:
        assert batch["inputs"].shape == (batch_size, length)
        kept = batch["weights"] == 1
        predicted += batch["targets"][kept].tolist()
        np.testing.assert_array_equal(batch["inputs"][kept] + 1, batch["targets"][kept])
    assert bytes(predicted) == TEXT[381:]
    assert task.examples("test") == -(-19 // length)


def test_splits_do_not_overlap(text):
    task = load(text)
    assert b"".join(task.data[split].tobytes() for split in ("train", "validation", "test")) == TEXT
    assert [len(task.data[split]) for split in task.splits] == [360, 20, 20]


def test_wrong_options_are_named(text, tmp_path):
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        load(text, 0)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="400 bytes leave 360 to train, too few for length=360"):
        load(text, 360)
    (tmp_path / "short.txt").write_bytes(b"abcdefghij")
    with pytest.raises(ValueError, match="too few"):
        load(tmp_path / "short.txt", 2)
