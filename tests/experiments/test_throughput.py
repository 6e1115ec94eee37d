"""The time of a training step: every variant of a config, beside the baseline."""

import json

import pytest

from experiments import commandline, throughput

CONFIG = "--config=configs/throughput.py:smoke"


def run(*arguments):
    return commandline.run(throughput.main, ["throughput", CONFIG, *arguments])


def test_every_variant_is_timed_beside_the_baseline(tmp_path, capsys, monkeypatch):
    file = tmp_path / "out.jsonl"
    built = []
    prepare = throughput.setup.prepare
    monkeypatch.setattr(throughput.setup, "prepare", lambda config: built.append(config) or prepare(config))
    assert run("--json", str(file), "--config.task.length=32", "--config.baseline=chunked") == 0
    chunked, fft = (json.loads(line) for line in file.read_text().splitlines())
    assert [config.model.mixers.s4d.form for config in built] == ["chunked", "parallel"]
    assert (chunked["implementation"], fft["implementation"]) == ("chunked", "fft")
    assert chunked["milliseconds"] == chunked["baseline_milliseconds"] == fft["baseline_milliseconds"] > 0
    assert fft["baseline"] == "chunked" and fft["shape"].startswith("B4 L32 ")
    assert fft["tokens_per_second"] == pytest.approx(4 * 32 / (1e-3 * fft["milliseconds"]), rel=1e-2)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("baseline=xla", "the config's baseline must be one of its variants"),
        ("variants.fft=model.mixers.s4d.from=parallel", "did you mean 'form'"),
        ("task.length=0", "task noise: length=0 must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(field, message, capsys):
    assert run(f"--config.{field}") == 2
    assert message in capsys.readouterr().err
