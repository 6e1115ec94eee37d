"""Runs of the training program in this process, with a tiny model."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments import commandline, evaluate, setup, tasks, workdir
from experiments.tasks.base import ArrayTask, Examples
from tests.experiments import tiny
from tests.experiments.conftest import write_mnist
from tests.experiments.test_kill import bits, outcome

EACH = ("log_every_steps=1", "eval_every_steps=2", "checkpoint_every_steps=1")


def lines(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_stopping_after_every_step_changes_no_bit(run, tmp_path, capsys):
    """The time limit is over at once, so each call makes one step. Logging and evaluation intervals, which
    the stops cut, show whether sums, random numbers and data go on as they were."""
    fields = ("train_steps=7", "log_every_steps=3", "eval_every_steps=2")
    assert run(tmp_path / "whole", *fields) == 0
    for step in range(1, 7):
        assert run(tmp_path / "stopped", *fields, "time_limit_minutes=1e-9") == 0
        assert f"stopped at step {step} of 7" in capsys.readouterr().out
    assert run(tmp_path / "stopped", *fields, "time_limit_minutes=0") == 0
    (whole, state), (stopped, stopped_state) = (
        outcome(tmp_path / "whole", 7),
        outcome(tmp_path / "stopped", 7),
    )
    assert stopped == whole and len(whole) == 3 + 4
    seconds = [line["seconds"] for line in lines(tmp_path / "stopped")]
    assert seconds == sorted(seconds), "the clock does not go on after a restart"
    assert bits(stopped_state) == bits(state)


def test_logged_loss_is_the_mean_since_the_last_line(run, tmp_path):
    fields = ("train_steps=5", "eval_every_steps=5")
    assert (
        run(tmp_path / "one", *fields, "log_every_steps=1") == run(tmp_path / "two", *fields, "log_every_steps=2") == 0
    )
    each = {line["step"]: line["loss"] for line in lines(tmp_path / "one") if "loss" in line}
    pairs = {line["step"]: line["loss"] for line in lines(tmp_path / "two") if "loss" in line}
    expected = {2: (each[1] + each[2]) / 2, 4: (each[3] + each[4]) / 2, 5: each[5]}
    assert pairs == pytest.approx(expected, rel=1e-6)


def test_not_finite_stops_with_step_and_parameter(run, tmp_path, capsys):
    """The logits of the seventh step are NaN; lines are logged at 5 and 10."""
    fields = ("train_steps=20", "model.poison_step=6", "log_every_steps=5", "checkpoint_every_steps=4")
    for _ in range(2):
        assert run(tmp_path, *fields) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: step 7: gradient of BatchNorm_0/bias is not finite, nor are ")
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
        assert not (tmp_path / "result.json").exists()


def test_finished_run_started_again_changes_nothing(run, tmp_path, capsys):
    assert run(tmp_path, "train_steps=2") == 0
    figure = capsys.readouterr().out.splitlines()[-3]
    before = contents(tmp_path)
    assert run(tmp_path, "train_steps=2") == 0
    assert capsys.readouterr().out == f"finished already: {figure}\n"
    assert contents(tmp_path) == before


def test_screen_and_files_of_a_run(run, tmp_path, capsys):
    assert run(tmp_path, "train_steps=4", "published.value=99.5", "published.source=a paper") == 0
    out, err = capsys.readouterr()
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"test accuracy {result['value']:.2f} % at step 4; published 99.5 (a paper)" in out
    assert "encoder/kernel     (784, 4)  3,136  ssm              0.001             0" in out
    assert str(tmp_path / "curves.png") in out and "next     python -m experiments.report --add" in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split()[1] for line in err.splitlines()] == ["2/4", "2/4", "4/4", "4/4"]
    assert {"task", "model", "preset", "metric", "seeds", "gpu_seconds", "versions", "date", "commit"} <= set(result)
    assert (result["published"], result["parameters"]) == ({"value": 99.5, "source": "a paper"}, 3198)
    assert result["value"] == lines(tmp_path)[-1]["test/accuracy"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert json.loads((tmp_path / "env.json").read_text())[0]["command"].startswith("python -m experiments.train --c")


def test_another_config_is_refused_or_archived(run, tmp_path, capsys):
    assert run(tmp_path, "train_steps=2") == 0
    before = contents(tmp_path)
    assert run(tmp_path, "train_steps=4") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "made by another config: train_steps is 2 there and 4 here." in error
    assert contents(tmp_path) == before
    assert run(tmp_path, "train_steps=4", flags=("--allow_config_change",)) == 0
    assert "training from step 2 to 4" in capsys.readouterr().out
    after = contents(tmp_path)
    for name in ("config", "result"):
        assert after[f"{name}.1.json"] == before[f"{name}.json"] != after[f"{name}.json"]
    assert run(tmp_path, "train_steps=3", flags=("--allow_config_change",)) == 2
    assert "the run is at step 4 already, past its end at 3" in capsys.readouterr().err


def test_damaged_newest_checkpoint(run, tmp_path, capsys):
    """The run goes on from the one before, says so, and ends as if nothing had happened."""
    fields = ("train_steps=4", *EACH)
    assert run(tmp_path / "whole", *fields) == 0
    for _ in range(3):
        assert run(tmp_path / "hurt", *fields, "time_limit_minutes=1e-9") == 0
    manifest = tmp_path / "hurt" / "checkpoints" / "3" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-9])
    assert run(tmp_path / "hurt", *fields) == 0
    out, err = capsys.readouterr()
    assert f"warning: passed over a damaged checkpoint, {manifest.parent}: manifest.json was altered" in err
    assert "training from step 2 to 4" in out
    (whole, state), (hurt, hurt_state) = outcome(tmp_path / "whole", 4), outcome(tmp_path / "hurt", 4)
    assert hurt == whole and bits(hurt_state) == bits(state)
    assert (tmp_path / "hurt" / "checkpoints" / "3.damaged").exists()


def test_no_readable_checkpoint(run, tmp_path, capsys):
    assert run(tmp_path, "train_steps=4", *EACH, "time_limit_minutes=1e-9") == 0
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "state" / "d")
    before = contents(tmp_path)
    assert run(tmp_path, "train_steps=4", *EACH) == 2
    assert "no checkpoint can be read" in capsys.readouterr().err.splitlines()[-1]
    assert contents(tmp_path) == before


def test_torn_and_spoiled_lines(run, tmp_path, capsys):
    for _ in range(2):
        assert run(tmp_path, "train_steps=3", *EACH, "time_limit_minutes=1e-9") == 0
    metrics = tmp_path / "metrics.jsonl"
    good = metrics.read_text()
    metrics.write_text("{" + good)
    assert run(tmp_path, "train_steps=3", *EACH) == 2
    assert f"{metrics}, line 1 is not JSON" in capsys.readouterr().err
    metrics.write_text(good + '{"step": 3, "loss": 1.0}\n{"step": 3, "lo')
    assert run(tmp_path, "train_steps=3", *EACH) == 0
    assert metrics.read_text().startswith(good)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2, 3, 3]


def test_evaluate_reproduces_the_figure(run, tmp_path, capsys):
    assert run(tmp_path, "train_steps=3") == 0
    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path), "--split", "test"]) == 0
    line = lines(tmp_path)[-1]
    assert f"step 3  test/loss {line['test/loss']:.6g}  test/accuracy {line['test/accuracy']:.6g}" in (
        capsys.readouterr().out
    )


def test_evaluate_with_a_field_set_anew(run, tmp_path, capsys):
    """On other examples, of which there are nine."""
    assert run(tmp_path / "run", "train_steps=3") == 0
    other = write_mnist(tmp_path / "other", test=9)
    capsys.readouterr()
    more = [f"--config.task.data_dir={other}", "--config.eval_batch_size=9"]
    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path / "run"), *more]) == 0
    accuracy = float(capsys.readouterr().out.split("test/accuracy ")[1].split()[0])
    assert accuracy * 9 / 100 == pytest.approx(round(accuracy * 9 / 100), abs=1e-3)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["eval_batch_size"] == 8
    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path / "run"), "--config.task.dir=x"]) == 2
    assert "unknown field of task 'dir'" in capsys.readouterr().err


def test_padding_of_the_last_batch_counts_nothing(run, tmp_path):
    """20 examples in batches of 8 and of 20."""
    figures = []
    for size in (8, 20):
        assert run(tmp_path / str(size), "train_steps=2", f"eval_batch_size={size}") == 0
        figures.append([lines(tmp_path / str(size))[-1][f"test/{name}"] for name in ("loss", "accuracy")])
    np.testing.assert_allclose(figures[0], figures[1], rtol=1e-6)


def test_two_devices_train_as_one(run, tmp_path):
    """Batch statistics are of the whole batch. Without dropout the runs differ by rounding alone."""
    assert jax.local_device_count() == 2
    losses = []
    for devices in (1, 2):
        fields = ("train_steps=3", "log_every_steps=1", "model.dropout=0.0")
        assert run(tmp_path / str(devices), *fields, f"devices={devices}") == 0
        losses.append([line["loss"] for line in lines(tmp_path / str(devices)) if "loss" in line])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def validated_task(options) -> ArrayTask:
    generator = np.random.default_rng(0)
    data = {
        split: Examples(
            generator.integers(0, 256, (n, 2, 2, 1), np.uint8), generator.integers(0, 10, n).astype(np.int32)
        )
        for split, n in (("train", 16), ("validation", 40), ("test", 24))
    }
    return ArrayTask(encoder="image", input_size=1, classes=10, source="made up", data=data)


def test_with_a_validation_split_the_best_checkpoint_counts(run, tmp_path, monkeypatch, capsys):
    """Test is looked at only at a new best, and evaluate finds that checkpoint though others are newer."""
    monkeypatch.setattr(tasks, "load", validated_task)
    fields = ("train_steps=40", "eval_every_steps=2", "checkpoint_every_steps=7", "keep_checkpoints=1")
    assert run(tmp_path, *fields, "optimizer.learning_rate=0.1") == 0
    best, expected = -1.0, []
    for line in (line for line in lines(tmp_path) if "validation/accuracy" in line):
        improved = line["validation/accuracy"] > best
        best = max(best, line["validation/accuracy"])
        assert ("test/accuracy" in line) == improved
        expected = line if improved else expected
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["value"], result["step"]) == (expected["test/accuracy"], expected["step"])
    assert 2 < result["step"] < 40, "the best is first or last: choose another seed"
    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path)]) == 0
    assert f"test/accuracy {result['value']:.6g}" in capsys.readouterr().out


def test_a_second_run_in_the_same_folder_is_refused(run, tmp_path, capsys):
    with workdir.claim(str(tmp_path), tiny.get_config().to_dict()):
        assert run(tmp_path) == 2
    assert capsys.readouterr().err == f"error: --workdir={tmp_path} is in use by another run\n"


def test_a_bug_keeps_its_traceback(run, tmp_path, monkeypatch):
    """A ValueError that another library raises is not wrong input."""
    monkeypatch.setattr(setup, "build_model", lambda options, task: np.zeros(2).reshape(3))
    with pytest.raises(ValueError, match="cannot reshape"):
        run(tmp_path)
