import pathlib

import pytest

from configs import choose, language_model, smnist
from experiments import setup


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
        assert set(imports) <= {"ml_collections", "configs", "difflib", "collections.abc", "typing"}, file
