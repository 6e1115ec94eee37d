"""The time of a training step: every variant of a config, beside the baseline."""

import json

import pytest

from configs import throughput as configs
from experiments import commandline, flops, setup, throughput
from ssm.language_model import LanguageModel

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


@pytest.mark.parametrize("model", ["mamba2", "mamba3"])
def test_matrices_head_and_states_are_counted(model):
    """By hand: width 8, four heads of four channels and four states, 16 tokens."""
    ready = setup.prepare(configs.get_config(f"{model}-130m,smoke"))
    inputs = {"mamba2": 2 * 16 + 2 * 4 + 4, "mamba3": 2 * 16 + 2 * 4 + 3 * 4 + 1}[model]
    expected = 3 * (2 * (8 * inputs + 16 * 8 + 16 * 8) + 4 * 4 * 4 * 4)
    assert flops.training(ready.model, ready.rows, 64) == expected


def test_a_language_models_share_of_the_peak(tmp_path, capsys, monkeypatch):
    file = tmp_path / "out.jsonl"
    monkeypatch.setattr(flops, "PEAK", {"cpu": 1e9})
    config = "--config=configs/throughput.py:mamba2-130m,smoke"
    assert commandline.run(throughput.main, ["throughput", config, "--json", str(file)]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["implementation"] for r in records] == ["chunked", "auto"]
    for record in records:
        rate = record["flops_per_token"] * record["tokens_per_second"]
        assert record["share_of_peak"] == pytest.approx(rate / 1e9, rel=1e-2, abs=1e-4)
    assert "% of the peak" in capsys.readouterr().out


def test_what_attention_sees_is_half_of_a_sequence_and_no_more_than_its_window():
    for window, seen in [(99, 4.5), (2, 15 / 8)]:
        model = LanguageModel(16, 8, 2, "attention", {"attention": {"heads": 2, "window": window}}, mlp_size=0)
        assert flops.training(model, [], 8) == 3 * (2 * 16 * 8 + 2 * 4 * 8 * seen)
    assert flops.training(LanguageModel(16, 8, 1, "s5"), [], 8) is None


def test_a_device_that_is_not_known_has_no_peak(monkeypatch):
    monkeypatch.setattr(flops, "PEAK", {"NVIDIA H200": 989e12})
    assert flops.peak(1) is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("baseline=xla", "the config's baseline must be one of its variants"),
        ("variants.fft=model.mixers.s4d.from=parallel", "did you mean 'form'"),
        ("task.vocabulary=-1", "task noise: vocabulary=-1 must be 0"),
        ("task.length=0", "task noise: length=0 must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(field, message, capsys):
    assert run(f"--config.{field}") == 2
    assert message in capsys.readouterr().err
