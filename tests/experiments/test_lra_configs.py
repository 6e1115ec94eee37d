"""Every preset of Long Range Arena builds its model on data of the right shape, and trains what the papers say how."""

import importlib
import itertools

import numpy as np
import pytest

from configs import lra
from experiments import setup, tasks
from experiments.tasks.base import ArrayTask, Examples, StandardisedTask
from experiments.tasks.retrieval import PairTask
from ssm import mixers

FILES = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")


def files(name: str):
    return importlib.import_module(f"configs.lra.{name}")


def fake(options):
    """A task with the shapes of the real one, and four examples."""
    name = options["name"]
    targets = np.arange(4, dtype=np.int32) % 2
    if name in ("listops", "text", "retrieval"):
        cls, vocabulary = {"listops": (ArrayTask, 16), "text": (ArrayTask, 256), "retrieval": (PairTask, 256)}[name]
        pair = (2,) * (name == "retrieval")
        inputs, lengths = np.zeros((4, *pair, options["length"]), np.uint8), np.ones((4, *pair), np.int32)
        ends = ("token", vocabulary, 10 if name == "listops" else 2)
    else:
        cls, size, lengths = StandardisedTask, options.get("resolution", 32), None
        inputs, ends = np.zeros((4, size, size, 1), np.uint8), ("continuous", 1, 10 if name == "image" else 2)
    return cls(*ends, "made up", {split: Examples(inputs, targets, lengths) for split in ("train", "test")})


def rows(config):
    """The parameter table, of one layer: the others are like it."""
    config.batch_size = 4
    config.model.depth = 1
    return setup.prepare(config).rows


@pytest.mark.parametrize("name", FILES)
def test_every_preset_is_ready_to_run(name, monkeypatch):
    """Every option of every model and mixer is known; one model of each file, and all of one, are made in shape."""
    monkeypatch.setattr(tasks, "load", fake)
    for model, size in itertools.product(lra.MODELS, lra.SIZES):
        config = files(name).get_config(f"{model},{size}")
        assert config.model.dtype == ("bfloat16" if size == "fast" else "float32")
        setup.build_model(config.model.to_dict(), fake(config.task))
        mixers.mixer(model, config.model.width, config.model.mixers[model].to_dict())
        if size == "fast" and (name == "listops" or model == "s5"):
            check(rows(config), config.optimizer.learning_rate)
    assert f"configs/lra/{name}.py:{lra.MODELS[0]},{lra.SIZES[0]}" in files(name).__doc__


def check(table, rate):
    """The dynamics of the SSM do not decay and are no faster than the rest; weights decay."""
    for row in table:
        leaf = row.path.split("/")[-1]
        if leaf in ("A_real", "A_imag", "A_log", "nu_log", "theta_log"):
            assert row.weight_decay == 0 and row.learning_rate <= rate, row
        elif leaf == "kernel":
            assert row.group == "default" and row.weight_decay > 0, row


def rates(name: str, model: str, monkeypatch) -> dict[str, tuple[float, float]]:
    monkeypatch.setattr(tasks, "load", fake)
    table = rows(files(name).get_config(f"{model},paper"))
    return {r.path.removeprefix("block_0/mixer/"): (r.learning_rate, r.weight_decay) for r in table}


def test_groups_are_those_of_the_papers(monkeypatch):
    """Of S5's ways to train: dt with the rest in Text; B slow but decaying in Path-X; B fast in ListOps."""
    text, pathx, listops = (rates(name, "s5", monkeypatch) for name in ("text", "pathx", "listops"))
    assert text["A_real"] == text["B/real"] == (0.001, 0) and text["log_dt"] == text["C/real"] == (0.004, 0.07)
    assert pathx["A_real"] == pathx["log_dt"] == (0.0006, 0) and pathx["B/imag"] == (0.0006, 0.06)
    assert pathx["C_reverse/real"] == pytest.approx((0.0018, 0.06))
    assert listops["B/real"] == listops["C/real"] == (0.003, 0.04) and listops["log_dt"] == (0.001, 0)
    s4, lru = rates("listops", "s4", monkeypatch), rates("pathx", "lru", monkeypatch)
    assert s4["A_log"] == s4["P/real"] == (0.001, 0) and s4["log_dt"] == (0.01, 0) and s4["C/real"] == (0.01, 0.05)
    assert lru["nu_log"] == lru["gamma_log"] == lru["B/real"] == (0.00045, 0) and lru["C/real"] == (0.0018, 0.05)


def test_path_x_starts_with_a_long_memory():
    """In paper and fast alike: dt from 1e-4, or a ring at the edge and phases below pi / 10."""
    for size in ("paper", "fast"):
        for model in lra.MODELS:
            options = files("pathx").get_config(f"{model},{size}").model.mixers[model]
            if model == "lru":
                assert (options.r_min, options.r_max) == (0.999, 0.9999)
                assert options.max_phase == pytest.approx(np.pi / 10)
            else:
                assert options.dt_min == 0.0001


def test_stages_of_path_x(monkeypatch):
    """Each starts from the folder of the one before, with half its step on twice the pixels."""
    monkeypatch.setattr(tasks, "load", fake)
    presets, before = [], None
    files("pathx").sweep(presets.append, "stages")
    for preset in presets:
        config = files("pathx").get_config(preset)
        options = config.model.mixers.s4d
        assert config.task.resolution * options.step_scale == 128 and options.dt_min == 0.0001
        assert config.start_from == (f"../{before.replace(',', '-')}" if before else "")
        before = preset
    assert config.task.resolution == 128 and config.preset == "s4d_stages-fast" and len(presets) == 3
    table = rows(config)
    assert {row.learning_rate for row in table} == {0.001} and {row.group for row in table} == {"default", "ssm", "dt"}
    with pytest.raises(ValueError, match="stage64 is of s4d, not of lru"):
        files("pathx").get_config("lru,stage64")


@pytest.mark.parametrize("name", FILES)
def test_figures_and_sweeps(name):
    """A run stands beside the paper's figure where there is one; the sweep has every model."""
    presets = []
    files(name).sweep(presets.append, "paper")
    assert presets == [f"{model},paper" for model in lra.MODELS]
    for preset in presets:
        published = files(name).get_config(preset).published
        figure = files(name).PUBLISHED.get(preset.split(",")[0], 0.0)
        assert published.value == figure and bool(published.source) == bool(figure)
        assert not figure or str(figure).rstrip("0") in files(name).__doc__
