import pathlib
import re

import numpy as np
import pytest

from configs import choose, language_model, lra, smnist
from configs.sequential import psmnist, scifar, speech_commands, spoken_digits
from experiments import setup, tasks
from experiments.tasks.base import Examples, StandardisedTask


@pytest.mark.parametrize("model", smnist.MODELS)
@pytest.mark.parametrize("size", smnist.SIZES)
def test_every_preset_is_ready_to_run(mnist, model, size):
    """The slow group holds the SSM's A, B, dt and nothing else; the rest decays."""
    config = smnist.get_config(f"{model},{size}")
    config.task = {"name": "smnist", "source": "idx", "data_dir": str(mnist)}
    config.batch_size = 8
    rows = setup.prepare(config).rows
    groups = {
        group: {r.path.split("/")[2] for r in rows if "mixer" in r.path and r.group == group}
        for group in ("ssm", "default")
    }
    dynamics = {"nu_log", "theta_log", "gamma_log"} if model == "lru" else {"log_dt", "A_imag"}
    assert groups["ssm"] > dynamics and groups["default"] <= {"C", "D"}
    assert {r.weight_decay for r in rows if r.group == "ssm"} == {0.0}
    assert f"configs/smnist.py:{smnist.MODELS[0]},{smnist.SIZES[0]}" in smnist.__doc__


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(256)) * 40)
    return path


@pytest.mark.parametrize("size", language_model.SIZES)
def test_language_models_are_ready_to_run_and_equal_in_size(text, size):
    """Decayed are the matrices alone; in the table's size all models have the same parameters to 1 %."""
    counts = {}
    for model in language_model.MODELS:
        config = language_model.get_config(f"{model},{size}")
        config.task.path = str(text)
        rows = setup.prepare(config).rows
        counts[model] = sum(row.count for row in rows)
        decayed = {row.path.split("/")[-1] for row in rows if row.weight_decay}
        assert decayed <= {"kernel", "embedding", "weight", *("real", "imag") * (model == "s5")}, model
        assert "kernel" in decayed and {r.path for r in rows if r.path.endswith(("/D", "scale", "dt_bias"))} == {
            r.path for r in rows if r.path.endswith(("/D", "scale", "dt_bias")) and not r.weight_decay
        }
    if size == "shakespeare":
        assert max(counts.values()) < 1.01 * min(counts.values()), counts
    assert f"configs/language_model.py:{language_model.MODELS[0]},{language_model.SIZES[0]}" in language_model.__doc__


SEQUENTIAL = {  # the shape and dtype of the task's examples, which stand in for the data set
    scifar: ((32, 32, 3), np.uint8),
    speech_commands: ((16, 1), np.int16),
    spoken_digits: ((16, 1), np.int16),
}


@pytest.mark.parametrize("module", SEQUENTIAL, ids=lambda module: module.__name__)
def test_sequential_presets_are_ready_to_run(module, monkeypatch):
    """Nothing that a recipe names is unknown, no group is left without parameters, and A and dt do not decay."""
    shape, dtype = SEQUENTIAL[module]
    examples = Examples(np.zeros((300, *shape), dtype), np.zeros(300, np.int32))
    ends = dict(encoder="continuous", input_size=shape[-1], classes=10, source="made up")
    monkeypatch.setattr(tasks, "load", lambda options: StandardisedTask(**ends, data={"train": examples}))
    for size in getattr(module, "SIZES", lra.SIZES):
        presets = []
        module.sweep(presets.append, size)
        assert len(presets) == len(lra.MODELS)
        for preset in presets if size != "fast" else presets[:1]:
            config = module.get_config(preset)
            config.model.depth = 1
            steady = [
                row for row in setup.prepare(config).rows if re.search("A_log|A_imag|log_dt|nu_log|dt_bias", row.path)
            ]
            assert steady and not any(row.weight_decay for row in steady), preset


def test_lengths_of_s4_are_those_of_what_is_read():
    """In the tasks' units: recordings keep `length` samples at the full rate and are read at another."""
    for module, full, kept in ((speech_commands, 16000, 16000), (spoken_digits, 8000, None)):
        for size in getattr(module, "SIZES", lra.SIZES):
            config = module.get_config(f"s4,{size}")
            samples = kept or config.task.length
            assert config.model.mixers.s4.length * full == samples * config.task.rate, (module, size)


def test_permuted_digits_are_those_of_smnist_in_another_order():
    for size in psmnist.SIZES:
        there, here = smnist.get_config(f"s4,{size}"), psmnist.get_config(f"s4,{size}")
        assert (there.task.name, here.task.name) == ("smnist", "psmnist")
        here.task.name, here.published = there.task.name, there.published
        assert here.to_dict() == there.to_dict()
    assert (psmnist.get_config("s5,paper").published.value, psmnist.get_config("lru").published.source) == (98.67, "")


def test_choose():
    choices = {"model": ("s4d", "s5"), "size": ("demo", "paper")}
    assert choose("", **choices) == ["s4d", "demo"]
    assert choose("paper", **choices) == ["s4d", "paper"]
    assert choose("paper,s5", **choices) == choose("s5,paper", **choices) == ["s5", "paper"]
    with pytest.raises(ValueError, match="unknown preset 'papr'; did you mean 'paper'"):
        choose("s5,papr", **choices)
    with pytest.raises(ValueError, match="names two of s4d, s5"):
        choose("s5,s4d", **choices)


def test_configs_import_only_ml_collections():
    """A config can be read where JAX is not installed."""
    for file in pathlib.Path(smnist.__file__).parent.rglob("*.py"):
        imports = [line.split()[1] for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        rooms = {name.partition(".")[0] for name in imports}
        assert rooms <= {"ml_collections", "configs", "difflib", "collections", "typing"}, file
