"""Replicas against the ordinary runs that they stand for, and what only they have."""

import dataclasses
import functools
import json
import math
import statistics
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.state_tracking import parity
from experiments import commandline, evaluate, memory, plots, replicas, report, setup, steps, tasks, trained
from experiments.workdir import Workdir
from tests.experiments import tiny
from tests.experiments.test_kill import bits, outcome
from tests.experiments.test_train import lines, validated_task


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
    """The last of four on two devices: parameters, moments, losses, and so examples and dropout."""
    single = config(seed=4)
    single.optimizer.learning_rate = 0.03
    expected, expected_losses = after_three_steps(single)
    four, losses = after_three_steps(config(replicas={"learning_rates": (0.002, 0.03), "seeds": 2}, seed=3, devices=2))
    assert len(np.unique(losses[-1])) == 4
    np.testing.assert_allclose(losses[:, 3], expected_losses, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), replicas.take(four, 3), expected)


def asked(rates, seeds: int) -> str:
    return f"replicas={{'learning_rates': {rates}, 'seeds': {seeds}}}"


def with_another_length(options):
    task = validated_task(options)
    splits = {"train": task.data["train"], "test": task.data["test"], "test_far": task.data["validation"]}
    return dataclasses.replace(task, data=splits)


SIX = (
    asked((0.1, 1e38, 0.2), 2),
    "task.resident=always",
    "devices=2",
    "train_steps=6",
    "eval_every_steps=3",
    "log_every_steps=1",
)


def test_a_run_stopped_after_a_step(run, tmp_path, monkeypatch, capsys):
    """On two devices, with two replicas whose numbers overflow: bit for bit the same, and the record is the best's."""
    monkeypatch.setattr(tasks, "load", with_another_length)
    assert run(tmp_path / "whole", *SIX) == 0
    assert run(tmp_path / "stopped", *SIX, "time_limit_minutes=1e-9") == 0
    assert run(tmp_path / "stopped", *SIX) == 0
    (whole, state), (stopped, stopped_state) = (outcome(tmp_path / name, 6) for name in ("whole", "stopped"))
    assert stopped == whole and bits(stopped_state) == bits(state)

    result, last = json.loads((tmp_path / "whole" / "result.json").read_text()), whole[-1]
    entries, best = result["replicas"], last["replica"]
    assert [(e["learning_rate"], e["seed"]) for e in entries] == [(r, s) for r in (0.1, 1e38, 0.2) for s in (0, 1)]
    values = [entry["value"] for entry in entries]
    assert values == last["replicas/test/accuracy"] and values[2:4] == [None, None]
    for line in whole[3:]:
        lists = [value for name, value in line.items() if name.startswith("replicas/")]
        assert lists and all([x is None for x in each] == [False, False, True, True, False, False] for each in lists)
        assert line["replica"] not in (2, 3)
    assert result["value"] == values[best] == max(value for value in values if value is not None)
    assert result["further"] == entries[best]["further"] == {"test_far": last["test_far/accuracy"]}
    assert result["median"] == max(statistics.median(values[i : i + 2]) for i in (0, 4))
    assert result["seeds"] == [0, 1] and (tmp_path / "whole" / "curves.png").exists()

    capsys.readouterr()
    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path / "whole"), "--split=test_far"]) == 0
    out = capsys.readouterr().out
    figures = dict(zip(*[iter(out.splitlines()[0].split())] * 2, strict=True))
    assert float(figures["test_far/accuracy"]) == result["further"]["test_far"]
    assert float(figures["test_far/loss"]) == pytest.approx(last["test_far/loss"], rel=1e-5)

    folder, lack = report.add(Workdir.opened(tmp_path / "whole"), tmp_path / "results")
    assert not lack and commandline.run(evaluate.main, ["evaluate", str(folder), "--split=test_far"]) == 0
    assert capsys.readouterr().out == out
    kernel = trained.load(folder)[1]["params"]["decoder"]["kernel"]
    assert [bool((kernel == each).all()) for each in state["params"]["decoder"]["kernel"]].index(True) == best

    monkeypatch.setattr(memory, "limit", lambda devices: 10_000)
    assert run(tmp_path / "large", *SIX) == 2
    assert (err := capsys.readouterr().err).startswith("error: 6 replicas need ") and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "large").iterdir()] == [".lock"]


def test_no_replica_left():
    """The last one's step and parameter are named."""
    names, figures = ["a", "b", "c"], {"": {"loss": [1.0, 2.0], "accuracy": [10.0, 20.0]}}
    health = steps.Health(np.array([3, 5]), np.array([[True, False, False], [False, True, False]]))
    for judge in (replicas.check, functools.partial(replicas.line, 9, figures, metric="accuracy")):
        with pytest.raises(FloatingPointError, match="^step 5: b is not finite; checkpoints"):
            judge(health, names=names)
    health = health._replace(step=np.array([3, -1]))
    replicas.check(health, names)
    assert replicas.line(9, figures, health, "accuracy", names)["replicas/train/loss"] == [None, 2.0]
    with pytest.raises(FloatingPointError, match="^step 9: no replica is left"):
        replicas.line(9, {"test/": {"loss": [1.0, np.inf], "accuracy": [10.0, 20.0]}}, health, "accuracy", names)


def test_arrays_are_shared_and_validation_decides(run, tmp_path, monkeypatch):
    """The first of four, and one alone, are the ordinary run; test is looked at when validation's best is new."""
    monkeypatch.setattr(tasks, "load", validated_task)
    tiny_config = tiny.get_config()
    tiny_config.optimizer.learning_rate = 0.01
    expected, expected_losses = after_three_steps(tiny_config)
    for rates, seeds in (((0.01,), 1), ((0.01, 0.1), 2)):
        tiny_config.replicas = {"learning_rates": rates, "seeds": seeds}
        state, losses = after_three_steps(tiny_config)
        np.testing.assert_allclose(losses[:, 0], expected_losses, rtol=1e-5)
        decoders = (one.params["decoder"]["kernel"] for one in (replicas.take(state, 0), expected))
        np.testing.assert_allclose(*decoders, rtol=1e-4, atol=1e-6)

    assert run(tmp_path, "optimizer.learning_rate=0.01", "train_steps=8", asked((0.01, 0.1), 2)) == 0
    best = -1.0
    for line in (line for line in lines(tmp_path) if "validation/loss" in line):
        assert line["validation/accuracy"] == max(line["replicas/validation/accuracy"])
        assert ("test/accuracy" in line) == (line["validation/accuracy"] > best)
        best = max(best, line["validation/accuracy"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert max(entry["validation"] for entry in result["replicas"]) == best
    assert result["value"] in [e["value"] for e in result["replicas"] if e["validation"] == best]


def test_as_many_as_an_error_says_fit():
    """And one more does not."""
    step = jax.jit(jax.vmap(lambda x: jnp.sin(x) @ x))
    arguments = lambda count: (jnp.ones((count, 64, 64)),)  # noqa: E731
    fitting = lambda count, limit, step=step: memory.fitting(step, arguments, count, 1, limit)  # noqa: E731
    limit = 5 * memory.bytes_needed(fitting(1, math.inf))
    with pytest.raises(ValueError, match="^12 replicas need .* GiB of a device's .*: ([45]) would fit") as error:
        fitting(12, limit)
    fit = int(str(error.value).split(": ")[1].split()[0])
    fitting(fit, limit)
    with pytest.raises(ValueError):
        fitting(fit + 1, limit)

    def lower(x):
        """A compiler that refuses what has no room."""
        if len(x) > 5:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")
        return step.lower(x)

    with pytest.raises(ValueError, match=": 5 would fit"):
        fitting(12, limit, types.SimpleNamespace(lower=lower))


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
def test_wrong_fields_are_one_line(run, tmp_path, capsys, field):
    assert run(tmp_path / "run", field) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {WRONG[field]}") and err.count("\n") == 1 and not out


def test_devices_that_do_not_divide_the_replicas(run, tmp_path, capsys):
    assert run(tmp_path / "run", asked((0.1,), 3), "devices=2") == 2
    assert capsys.readouterr().err == "error: 3 replicas are not a multiple of devices=2\n"


def test_curves_follow_the_best_replica_of_the_last_figure(monkeypatch):
    """Not the best of each line; what is not finite is a gap."""
    figures, each = [], {1: [3.0, 2.0, None], 2: [1.0, 2.0, None]}
    lines = [
        {"step": step, "replica": replica, "test/loss": losses[replica], "replicas/test/loss": losses}
        | {"test/accuracy": 50.0, "replicas/test/accuracy": [50.0, 50.0, None]}
        for (step, losses), replica in zip(each.items(), (1, 0), strict=True)
    ]
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.curves(None, lines, "title", "accuracy", {"source": ""})
    drawn = [(line.get_linewidth() > 1, *line.get_ydata()) for line in figures[0].axes[0].lines]
    np.testing.assert_equal(drawn, [(0, 3, 1), (0, 2, 2), (0, np.nan, np.nan), (1, 3, 1)])


def test_median_of_seeds_at_the_best_rate():
    """Validation chooses the rate; what is not finite is the worst."""
    entry = lambda rate, value, validation: {"learning_rate": rate, "value": value, "validation": validation}  # noqa: E731
    entries = [entry(1, 50, 60), entry(1, 70, 60), entry(1, 90, 60), entry(2, 80, 90), entry(2, None, 10)]
    assert replicas.median(entries, True) == 70
    assert replicas.median([*entries, entry(2, 40, 90)], True) == 40
    assert replicas.median([entry(1, 2.0, None), entry(1, None, None)], False) is None
