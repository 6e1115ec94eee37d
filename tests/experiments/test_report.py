import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import commandline, evaluate, records, report, tasks, trained
from tests.experiments.test_kill import outcome


def test_a_finished_run_becomes_a_record_and_a_row(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "TRAIN_LINES", 3)
    fields = ("train_steps=9", "log_every_steps=1", "eval_every_steps=4")
    assert run(tmp_path / "run", *fields, "published.value=99.6", "published.source=a paper") == 0
    assert commandline.run(report.main, ["report", "--add", str(tmp_path / "run")]) == 0
    record = tmp_path / "results" / "smnist" / "tiny-smoke"
    assert capsys.readouterr().out.splitlines()[-1] == f"added {record}"
    for name in ("config.json", "result.json"):
        assert (record / name).read_text() == (tmp_path / "run" / name).read_text()
    lines = [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 4, 7, 9]
    assert [line["step"] for line in lines if "loss" not in line] == [4, 8, 9]

    assert commandline.run(report.main, ["report", "smnist"]) == 0
    head, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    result = json.loads((record / "result.json").read_text())
    columns, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, rows[-1]))
    row = dict(zip(columns, cells, strict=True))
    assert (row["task"], row["model"], row["seeds"]) == ("smnist", "tiny (smoke)", "0")
    assert (row["ours"], row["paper"]) == (f"{result['value']:.2f} %", "99.60 %, a paper")
    assert (row["parameters"], row["tokens/s"]) == tuple(f"{result[k]:,}" for k in ("parameters", "tokens_per_second"))
    assert row["command"] == f"`{result['command']}`" and row["time"].startswith("0:00:")
    assert row["hardware"] == result["hardware"] == records.hardware(1)
    there = json.loads((record / "config.json").read_text())
    for field, value, status in (("devices", 2, 0), ("since_gone", {}, 0), ("seed", 7, 2)):
        (record / "config.json").write_text(json.dumps(there | {field: value}))
        assert commandline.run(report.main, ["report", "--add", str(tmp_path / "run")]) == status
    error = capsys.readouterr().err
    assert error.startswith(f"error: {record} is of another config: seed is 7 there and 0 here. Remove it, or train")
    assert json.loads((record / "config.json").read_text())["seed"] == 7, "it is left as it was"

    assert commandline.run(report.main, ["report", "smnits"]) == 2
    assert "unknown report 'smnits'; did you mean 'smnist'?" in capsys.readouterr().err


@pytest.fixture
def record(run, tmp_path, monkeypatch, capsys):
    """That of a run of three steps, whose folder is beside it."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert run(tmp_path / "run", "train_steps=3") == 0
    assert commandline.run(report.main, ["report", "--add", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "results" / "smnist" / "tiny-smoke"


def test_a_record_gives_its_figure_again(record, tmp_path, capsys):
    """From its own file, alone, to the last digit of loss and accuracy."""
    printed = []
    for folder in (tmp_path / "run", record):
        assert commandline.run(evaluate.main, ["evaluate", str(folder)]) == 0
        printed.append(capsys.readouterr().out)
        figures = evaluate.evaluate(evaluate.Workdir.opened(folder), "test")
        line = json.loads((record / "metrics.jsonl").read_text().splitlines()[-1])
        assert figures == {name: line[name] for name in ("step", "test/loss", "test/accuracy")}
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    result = json.loads((record / "result.json").read_text())
    assert printed[0] == printed[1] and printed[1].endswith(f"recorded: {records.sentence(result)}\n")
    assert f"step 3  test/loss {line['test/loss']:.6g}  test/accuracy {result['value']:.6g}\n" in printed[1]
    assert commandline.run(evaluate.main, ["evaluate", str(record), "--config.eval_batch_size=20"]) == 0
    assert f"test/accuracy {result['value']:.6g}\n" in capsys.readouterr().out


def test_the_file_of_a_record(record, tmp_path, monkeypatch):
    """Parameters and batch statistics in their dtypes and no more; the model is made of it without the task's data."""
    _, state = outcome(tmp_path / "run", 3)
    flat, _ = jax.tree_util.tree_flatten_with_path({name: state[name] for name in ("params", "batch_stats")})
    expected = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in flat}
    found = safetensors.numpy.load_file(record / trained.FILE)
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in expected.items()}
    assert found["batch_stats/count"] == 3 and found["batch_stats/count"].dtype == np.int32
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x)

    images = np.random.default_rng(1).integers(0, 256, (2, 28, 28, 1), np.uint8)
    of_run, of_record = tmp_path / "run", record
    logits = [model.apply(variables, images) for model, variables in map(trained.load, (of_run, of_record))]
    np.testing.assert_array_equal(*logits)
    monkeypatch.setattr(tasks, "load", None)
    model, variables = trained.load(str(record))
    np.testing.assert_array_equal(model.apply(variables, images), logits[0])


def test_records_without_a_checkpoint_that_can_be_used(record, capsys):
    def refused(*fields: str) -> str:
        assert commandline.run(evaluate.main, ["evaluate", str(record), *fields]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1
        return err

    file = record / trained.FILE
    whole = file.read_bytes()
    unfit = refused("--config.model.width=5")
    assert f"{file} does not fit this model: batch_stats/BatchNorm_0/mean is float32[4] in it and float32[5] h" in unfit
    for size in (0, 5, 60, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert f"{file} is damaged: " in refused()
    safetensors.numpy.save_file({"x": np.zeros(3)}, file)
    assert f"{file} is not of a record: its metadata have no 'kind'" in refused()
    file.unlink()
    assert f"{record} has no checkpoint: neither a run's checkpoints/ nor a record's {trained.FILE}" in refused()
    file.write_bytes(whole)
    (record / "result.json").unlink()
    assert "no result.json, which says of which step it is" in refused()


def test_checkpoints_that_are_not_kept(record, tmp_path, monkeypatch, capsys):
    """That of an earlier record goes with it."""

    def add() -> str:
        (record / trained.FILE).touch()
        assert commandline.run(report.main, ["report", "--add", str(tmp_path / "run")]) == 0
        assert not (record / trained.FILE).exists()
        (line,) = capsys.readouterr().out.splitlines()
        return line.removeprefix(f"added {record}; its checkpoint is not kept: ")

    with monkeypatch.context() as patch:
        patch.setattr(trained, "PARAMETERS", 3197)
        assert add() == "its 3,198 parameters are more than 3,197"
        patch.setattr(trained, "PARAMETERS", 3198)
        assert commandline.run(report.main, ["report", "--add", str(tmp_path / "run")]) == 0
        assert (record / trained.FILE).stat().st_size < 16_000 and "not kept" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert add().startswith(f"{tmp_path / 'run'} has no checkpoint: ")


def test_gpu_seconds_count_devices():
    config = {
        "task": {"name": "listops"},
        "model": {"pattern": "mamba attention"},
        "preset": "paper",
        "seed": 3,
        "devices": 4,
        "published": {"metric": "accuracy", "value": 0.0, "source": ""},
    }
    environment = {"hardware": "4 x NVIDIA H100 80GB HBM3", "command": "c", "versions": {}, "commit": ""}
    result = records.result(config, environment, wall_seconds=60.0, device_seconds=240.0, value=61.234, step=5)
    assert (result["gpu_seconds"], result["published"], result["seeds"]) == (240.0, None, [3])
    assert records.sentence(result) == "test accuracy 61.23 % at step 5; no published figure"
    bits = result | {"metric": "bits_per_byte", "value": 2.0123}
    assert records.sentence(bits) == "test 2.012 bits/byte at step 5; no published figure"
    on_cpu = records.result(config, environment | {"hardware": "CPU x"}, wall_seconds=60.0, device_seconds=240.0)
    assert on_cpu["gpu_seconds"] == 0
