import json

from experiments import commandline, records, report


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
    assert commandline.run(report.main, ["report", "smnits"]) == 2
    assert "unknown report 'smnits'; did you mean 'smnist'?" in capsys.readouterr().err


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
