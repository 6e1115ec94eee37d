"""Examples on the devices give the batches of those in the host's memory, and devices may change between runs."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import program
from experiments.tasks import resident
from experiments.tasks.base import Examples, StandardisedTask
from tests.experiments.synthetic import load
from tests.experiments.test_kill import bits, outcome
from tests.experiments.test_train import lines


class Noisy(StandardisedTask):
    def preprocess(self, batch, key, train):
        batch = super().preprocess(batch, key, train)
        return batch | {"inputs": batch["inputs"] + train * jax.random.normal(key, batch["inputs"].shape)}


def sharding(devices: int) -> NamedSharding:
    return NamedSharding(Mesh(jax.local_devices()[:devices], "data"), PartitionSpec())


def examples(rng, n: int) -> Examples:
    inputs, lengths = rng.integers(-9, 99, (n, 5, 2)).astype(np.int16), rng.integers(1, 6, n).astype(np.int32)
    return Examples(inputs, np.arange(n, dtype=np.int32), lengths)


@pytest.fixture
def task(rng) -> Noisy:
    data = {"train": examples(rng, 12), "test": examples(rng, 7)}
    ends = dict(encoder="continuous", input_size=2, classes=12, source="made up")
    return Noisy(**ends, data=data, mean=(1.0, 2.0), std=(3.0, 5.0))


def seen(task, batches, devices: int, train: bool) -> list[dict[str, np.ndarray]]:
    """What the model gets of six batches at most."""
    split = NamedSharding(sharding(devices).mesh, PartitionSpec("data"))
    make = jax.jit(lambda batch: task.preprocess(batch, jax.random.key(3), train))
    return [jax.device_get(make(program.place(split, batch))) for batch in itertools.islice(batches, 6)]


def content(batch: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (x.dtype, x.tobytes()) for name, x in batch.items()}


@pytest.mark.parametrize("devices", [1, 2])
def test_every_bit_of_every_batch_is_the_same(task, devices):
    """Six batches of 4 are of three epochs, and evaluation fills its last one up; what is sent is indices alone."""
    there = resident.placed(task, "always", sharding(devices))
    for name, arguments in {"train_batches": (4, 7, 2), "eval_batches": ("test", 4)}.items():
        train = name == "train_batches"
        host, device = (seen(t, getattr(t, name)(*arguments), devices, train) for t in (task, there))
        assert len(host) == len(device) == (6 if train else 2)
        for a, b in zip(host, device, strict=True):
            assert content(a) == content(b)
    assert next(there.train_batches(4, 7, 0)).own["index"].dtype == np.int32
    assert there.length == task.length == 5 and resident.size(task) == (12 + 7) * (2 * 5 * 2 + 4 + 4)


def test_what_is_read_is_standardised(task):
    batch = task.data["train"].take(np.arange(3))
    out = np.asarray(task.preprocess(batch, jax.random.key(0), False)["inputs"])
    expected = (batch["inputs"].astype(float) - [1, 2]) / [3, 5]
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


class Memory:
    def __init__(self, *stats):
        self.device_set = [Device(s) for s in stats]


def test_auto_asks_how_much_memory_there_is(task, monkeypatch):
    monkeypatch.setattr(resident, "ResidentTask", lambda task, sharding: "resident")
    need = resident.size(task) / resident.SHARE
    enough, short = {"bytes_limit": int(need) + 1}, {"bytes_limit": int(need) - 1}
    assert resident.placed(task, "auto", Memory(enough, enough)) == "resident"
    assert resident.placed(task, "auto", Memory(enough, short)) is task
    assert resident.placed(task, "auto", Memory(None)) is task, "a device that does not say"
    assert resident.placed(task, "never", Memory(enough)) is task


def test_wrong_choices(task):
    with pytest.raises(ValueError, match="unknown task resident 'alwys'; did you mean 'always'"):
        resident.placed(task, "alwys", sharding(1))
    made = load("parity", min_length=3, lengths=(8,), stage_steps=0, test_length=8)
    with pytest.raises(ValueError, match="is for examples held in memory; this task makes them"):
        resident.placed(made, "always", sharding(1))
    assert resident.placed(made, "auto", sharding(1)) is made


def test_a_run_is_the_same_bit_for_bit(run, tmp_path):
    """Of two replicas on two devices, which read the same rows."""
    fields = ("train_steps=3", "log_every_steps=1", "devices=2", "replicas={'learning_rates': (0.01, 0.1), 'seeds': 1}")
    for where in ("never", "always"):
        assert run(tmp_path / where, *fields, f"task.resident={where}") == 0
    (host, state), (device, device_state) = (outcome(tmp_path / where, 3) for where in ("never", "always"))
    assert host == device and bits(state) == bits(device_state)
    assert all(0 <= line["waiting_percent"] <= 100 for line in lines(tmp_path / "never")[1:] if "loss" in line)


def test_a_run_goes_on_with_another_number_of_devices(run, tmp_path):
    """One step on each: the batches and their order are those of one device, and so is the curve, but for rounding."""
    fields = ("train_steps=3", "log_every_steps=1", "model.dropout=0.0")
    assert run(tmp_path / "one", *fields, "task.resident=never") == 0
    for step, minutes in enumerate((1e-9, 1e-9, 0.0)):
        more = (f"devices={1 + (step + 1) % 2}", f"time_limit_minutes={minutes}", "task.resident=always")
        assert run(tmp_path / "changing", *fields, *more) == 0
    runs = (lines(tmp_path / name) for name in ("one", "changing"))
    one, changing = ([line["loss"] for line in run if "loss" in line] for run in runs)
    assert len(set(one)) == 3
    np.testing.assert_allclose(changing, one, rtol=1e-5)
