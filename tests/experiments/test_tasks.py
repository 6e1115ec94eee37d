import itertools

import numpy as np
import pytest

from experiments.tasks.base import ArrayTask, Examples


def task(n: int = 12, *, encoder="continuous", inputs=None, targets=None, lengths=None, **more) -> ArrayTask:
    """Examples that carry their own number."""
    inputs = (
        np.arange(n, dtype=np.float32)[:, None, None] * np.ones((1, 4, 1), np.float32) if inputs is None else inputs
    )
    targets = np.arange(n, dtype=np.int32) if targets is None else targets
    data = {split: Examples(inputs, targets, lengths) for split in ("train", "test")}
    return ArrayTask(encoder=encoder, input_size=1, classes=n, source="made up", data=data, **more)


def taken(batches, count: int) -> list[list[int]]:
    return [batch["targets"].tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("batch_size", [4, 5])
def test_epochs_see_each_example_equally_often_in_new_orders(batch_size):
    """5 does not divide 12: batches span epochs and still nothing is dropped."""
    order = sum(taken(task().train_batches(batch_size, 7, 0), 60 // batch_size), [])
    epochs = [order[i : i + 12] for i in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_batches_are_a_function_of_seed_and_step():
    batches = taken(task().train_batches(5, 7, 0), 9)
    assert taken(task().train_batches(5, 7, 4), 5) == batches[4:]
    assert taken(task().train_batches(5, 8, 0), 9) != batches


def test_inputs_and_lengths_belong_to_their_targets():
    lengths = np.arange(12, dtype=np.int32) % 4 + 1
    batch = next(task(lengths=lengths).train_batches(5, 1, 0))
    np.testing.assert_array_equal(batch["inputs"][:, 0, 0], batch["targets"])
    np.testing.assert_array_equal(batch["lengths"], batch["targets"] % 4 + 1)


@pytest.mark.parametrize("batch_size", [1, 5, 12, 13])
def test_evaluation_counts_each_example_once_in_one_shape(batch_size):
    batches = list(task().eval_batches("test", batch_size))
    assert {batch["inputs"].shape for batch in batches} == {(batch_size, 4, 1)}
    counted = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
    assert sorted(counted) == list(range(12))
    assert set(np.concatenate([batch["weights"] for batch in batches])) <= {0.0, 1.0}


def test_length_of_an_image_counts_pixels():
    images = np.zeros((12, 3, 5, 1), np.uint8)
    assert task(encoder="image", inputs=images).length == 15
    assert task().length == 4


def spoiled(value: float) -> np.ndarray:
    inputs = np.zeros((12, 4, 1), np.float32)
    inputs[7, 2, 0] = value
    return inputs


LONG = np.full(12, 5, np.int32)
SHIFTED = np.arange(1, 13, dtype=np.int32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": spoiled(np.nan)}, "made up, split train: inputs must be finite; example 7 has nan"),
        ({"inputs": spoiled(np.inf)}, "split train: inputs must be finite; example 7 has inf"),
        ({"inputs": np.zeros((12, 4, 2), np.float32)}, "inputs have 2 channels, the task 1"),
        ({"inputs": np.zeros((12, 4, 1), np.int32)}, r"inputs of int32\[12, 4, 1\] are no continuous inputs"),
        ({"inputs": np.zeros((12, 4), np.float32)}, r"inputs of float32\[12, 4\] are no continuous inputs"),
        (
            {"inputs": np.ones((12, 4), np.int32), "encoder": "token"},
            "inputs must be in 0..0; example 0 has 1",
        ),
        ({"targets": SHIFTED}, "targets must be in 0..11; example 11 has 12"),
        ({"targets": np.zeros(11, np.int32)}, r"have \[12, 11\] examples"),
        ({"lengths": LONG}, "lengths must be in 1..4; example 0 has 5"),
        ({"lengths": LONG * 0}, "lengths must be in 1..4; example 0 has 0"),
    ],
)
def test_wrong_data_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        task(**fields)


def test_splits_of_different_shape():
    data = {
        "train": Examples(np.zeros((1, 4, 1), np.float32), np.zeros(1, np.int32)),
        "test": Examples(np.zeros((1, 5, 1), np.float32), np.zeros(1, np.int32)),
    }
    with pytest.raises(ValueError, match=r"the splits' examples differ in shape: .*\(4, 1\).*\(5, 1\)"):
        ArrayTask(encoder="continuous", input_size=1, classes=1, source="made up", data=data)


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match=r"batch_size=13 is larger than the training split \(12 examples\)"):
        task().train_batches(13, 0, 0)
