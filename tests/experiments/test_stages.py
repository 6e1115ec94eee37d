"""A run that starts from another's parameters, and then needs it no more."""

import json
import shutil

import jax
import numpy as np

from tests.experiments.test_kill import outcome
from tests.experiments.test_train import lines

FIELDS = ("log_every_steps=1", "eval_every_steps=2", "checkpoint_every_steps=1")


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_a_stage_goes_on_from_the_one_before(run, tmp_path, capsys):
    """The second stage stands still, and has what the first ended with; its schedule and steps are its own.

    The third is stopped after a step, and goes on without the ones before.
    """
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert run(first, *FIELDS, "train_steps=2") == 0
    still = ("optimizer.learning_rate=0.0", "optimizer.groups.ssm.learning_rate=0.0", "train_steps=1")
    assert run(second, *FIELDS, *still, "start_from=../first") == 0
    before, after = (outcome(folder, step)[1] for folder, step in ((first, 2), (second, 1)))
    for a, b in zip(jax.tree.leaves(before["params"]), jax.tree.leaves(after["params"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert lines(second)[0]["seconds"] > result(first)["wall_seconds"], "the clock goes on"
    assert "stages" not in result(first)

    assert run(tmp_path / "wide", "train_steps=2", "start_from=../first", "model.width=5") == 2
    assert "does not fit this model" in capsys.readouterr().err
    for minutes in (1e-9, 0.0):
        assert run(third, *FIELDS, "train_steps=2", "start_from=../second", f"time_limit_minutes={minutes}") == 0
        shutil.rmtree(second, ignore_errors=True)
    assert len(result(third)["stages"]) == 2 and result(third)["stages"][0] == result(first)["command"]
    assert run(tmp_path / "a", "train_steps=2", "start_from=../second") == 2
    assert "second has no result.json; that run is to be finished first" in capsys.readouterr().err
