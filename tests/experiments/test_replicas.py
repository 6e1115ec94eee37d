"""Replicas against the ordinary runs that they stand for, and what only they have."""

import functools
import json
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.state_tracking import parity
from experiments import commandline, evaluate, replicas, setup, tasks, train
from tests.experiments.test_kill import bits, outcome
from tests.experiments.test_train import lines, validated_task

CONFIG = f"--config={parity.__file__}:attention,smoke"
RATES = (0.002, 0.03)


def config(**fields):
    """Dropout, a group whose learning rate follows and one whose does not."""
    config = parity.get_config("attention,smoke")
    config.model.dropout = 0.2
    config.optimizer.groups = {
        "half": {"match": "head", "learning_rate_factor": 0.5},
        "own": {"match": "embedding", "learning_rate": 0.01},
    }
    config.update(fields)
    return config


def after_three_steps(config):
    """The state, and each step's loss; of replicas all."""
    program = setup.prepare(config).program
    step, state, batches, losses = program.make_train_step(), program.new_state(), program.batches(0), []
    for _ in range(3):
        state, summary = step(state, next(batches))
        losses.append(np.asarray(summary.sums.loss))
    return state, np.array(losses)


def test_a_replica_is_the_run_of_its_rate_and_seed():
    """The last of four on two devices, and one alone: parameters, moments, losses, and so examples and dropout."""
    single = config(seed=4)
    single.optimizer.learning_rate = RATES[1]
    expected, expected_losses = after_three_steps(single)
    four, losses = after_three_steps(config(replicas={"learning_rates": RATES, "seeds": 2}, seed=3, devices=2))
    one, loss = after_three_steps(config(replicas={"learning_rates": RATES[1:], "seeds": 1}, seed=4))
    assert len(np.unique(losses[-1])) == 4
    np.testing.assert_allclose(losses[:, 3], expected_losses, rtol=1e-5)
    np.testing.assert_allclose(loss[:, 0], expected_losses, rtol=1e-5)
    for state in (replicas.take(four, 3), replicas.take(one, 0)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state, expected)


def call(folder, *fields: str) -> int:
    overrides = [f"--config.{field}" for field in fields]
    return commandline.run(train.main, ["train", CONFIG, f"--workdir={folder}", *overrides])


def asked(rates, seeds: int) -> str:
    return f"replicas={{'learning_rates': {rates}, 'seeds': {seeds}}}"


SIX = (asked((0.01, 1e38, 0.02), 2), "devices=2", "eval_batch_size=8", "log_every_steps=1")


def test_a_run_stopped_after_a_step(tmp_path, capsys):
    """On two devices, with two replicas whose numbers overflow: bit for bit the same, and the record is the best's."""
    assert call(tmp_path / "whole", *SIX) == 0
    assert call(tmp_path / "stopped", *SIX, "time_limit_minutes=1e-9") == 0
    assert call(tmp_path / "stopped", *SIX) == 0
    (whole, state), (stopped, stopped_state) = (outcome(tmp_path / name, 4) for name in ("whole", "stopped"))
    assert stopped == whole and bits(stopped_state) == bits(state)
    capsys.readouterr()

    *_, last = (line for line in whole if "test/loss" in line)
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    entries, best = result["replicas"], last["replica"]
    assert [(e["learning_rate"], e["seed"]) for e in entries] == [(r, s) for r in (0.01, 1e38, 0.02) for s in (0, 1)]
    values = [entry["value"] for entry in entries]
    assert values[2:4] == [None, None] == last["replicas/train/loss" if "loss" in last else "replicas/test/loss"][2:4]
    assert all(line["replica"] not in (2, 3) for line in whole[2:])
    assert result["value"] == values[best] == max(value for value in values if value is not None)
    assert result["further"] == entries[best]["further"] == {"test_16": last["test_16/scaled_accuracy"]}
    assert result["median"] == max(statistics.median(values[i : i + 2]) for i in (0, 4))
    assert result["seeds"] == [0, 1] and (tmp_path / "whole" / "curves.png").exists()

    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path / "whole"), "--split=test_16"]) == 0
    figures = dict(zip(*[iter(capsys.readouterr().out.splitlines()[0].split())] * 2, strict=True))
    assert float(figures["test_16/scaled_accuracy"]) == result["further"]["test_16"]
    assert float(figures["test_16/loss"]) == pytest.approx(last["test_16/loss"], rel=1e-5)


def test_no_replica_left(tmp_path, capsys):
    assert call(tmp_path, asked((1e38,), 2)) == 1
    assert ": gradient of " in (error := capsys.readouterr().err.splitlines()[-1]) and "is not finite" in error
    assert not (tmp_path / "result.json").exists()


def test_arrays_are_shared_and_validation_decides(run, tmp_path, monkeypatch):
    """The first of four is the ordinary run, step by step; test is looked at when the best of validation is new."""
    monkeypatch.setattr(tasks, "load", validated_task)
    fields = ("train_steps=8", "eval_every_steps=2", "optimizer.learning_rate=0.01")
    config = "replicas={'learning_rates': (0.01, 0.1), 'seeds': 2}"
    assert run(tmp_path / "one", *fields) == run(tmp_path / "four", *fields, "eval_batch_size=4", config) == 0
    key = "replicas/validation/"
    one, four = (lines(tmp_path / name) for name in ("one", "four"))
    single = [line["validation/loss"] for line in one if "validation/loss" in line]
    np.testing.assert_allclose([line[f"{key}loss"][0] for line in four if f"{key}loss" in line], single, rtol=1e-4)
    best = -1.0
    for line in (line for line in four if f"{key}loss" in line):
        assert line["validation/accuracy"] == max(line[f"{key}accuracy"])
        assert ("test/accuracy" in line) == (line["validation/accuracy"] > best)
        best = max(best, line["validation/accuracy"])
    result = json.loads((tmp_path / "four" / "result.json").read_text())
    chosen = max(result["replicas"], key=lambda entry: entry["validation"])
    assert chosen["validation"] == best and "further" not in chosen
    assert result["value"] in [e["value"] for e in result["replicas"] if e["validation"] == best]


def test_memory(tmp_path, monkeypatch, capsys):
    """As many as an error says fit do so, and one more does not."""
    step = jax.jit(jax.vmap(lambda x: jnp.sin(x) @ x))
    fitting = lambda count, limit: replicas.fitting(step, (jnp.ones((count, 64, 64)),), count, 1, limit)  # noqa: E731
    limit = 5 * replicas.bytes_needed(fitting(1, math.inf))
    with pytest.raises(ValueError, match="^12 replicas need .* GiB of a device's .*: ([45]) would fit") as error:
        fitting(12, limit)
    fit = int(str(error.value).split(": ")[1].split()[0])
    fitting(fit, limit)
    with pytest.raises(ValueError):
        fitting(fit + 1, limit)
    monkeypatch.setattr(replicas, "memory", lambda devices: 10_000)
    assert call(tmp_path / "run", *SIX) == 2
    assert (err := capsys.readouterr().err).startswith("error: 6 replicas need ") and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


WRONG = {
    asked((), 1): "replicas: learning_rates is empty",
    "replicas={'seeds': 2}": "replicas: learning_rates is empty",
    asked((0.1, 0.01, 0.1), 1): "replicas: learning_rates has 0.1 twice",
    asked((0.1, -0.1), 1): "replicas: learning_rates=(0.1, -0.1) must be positive numbers",
    asked(0.1, 1): "replicas: learning_rates=0.1 must be positive numbers",
    asked((0.1,), 0): "replicas: seeds=0 must be at least 1",
    "replicas={'learning_rate': (0.1,)}": "unknown option of replicas 'learning_rate'; did you mean 'learning_rates'",
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_fields_are_one_line(tmp_path, capsys, field):
    assert call(tmp_path / "run", field) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {WRONG[field]}") and err.count("\n") == 1 and not out


def test_devices_that_do_not_divide_the_replicas(tmp_path, capsys):
    assert call(tmp_path / "run", asked((0.1,), 3), "devices=2") == 2
    assert capsys.readouterr().err == "error: 3 replicas are not a multiple of devices=2\n"


def test_median_of_seeds_at_the_best_rate():
    """Validation chooses the rate; what is not finite is the worst."""
    entry = lambda rate, value, validation: {"learning_rate": rate, "value": value, "validation": validation}  # noqa: E731
    entries = [entry(1, 50, 60), entry(1, 70, 60), entry(1, 90, 60), entry(2, 80, 90), entry(2, None, 10)]
    assert replicas.median(entries, True) == 70
    assert replicas.median([*entries, entry(2, 40, 90)], True) == 40
    assert replicas.median([entry(1, 2.0, None), entry(1, None, None)], False) is None
