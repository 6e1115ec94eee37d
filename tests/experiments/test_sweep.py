"""The models of a table, trained by one command on a real text."""

import json
import pathlib

import numpy as np
import pytest

from configs import language_model, state_tracking
from experiments import commandline, sweep, tasks
from tests.oracles import assert_close

CONFIG = language_model.__file__
TWO = """
from configs.language_model import get_config

def sweep(add, preset=""):
    for model in ("attention", "s5"):
        add(f"{model},{preset}")
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """One word over and over: its entropy is 0."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"lineage " * 400)
    return path


def call(config, text, workdir, *fields: str) -> int:
    overrides = [f"--config.{field}" for field in (f"task.path={text}", *fields)]
    return commandline.run(sweep.main, ["sweep", f"--config={config}:smoke", f"--workdir={workdir}", *overrides])


def test_a_sweep_trains_its_table_and_continues(text, tmp_path, capsys):
    """A run for each model, with its own command and a sample; the same command again trains nothing."""
    config = tmp_path / "two.py"
    config.write_text(TWO)
    assert call(config, text, tmp_path, "train_steps=3") == 0
    *table, _, following = capsys.readouterr().out.splitlines()[-6:]
    assert following.endswith(f"experiments.report --add {tmp_path}/attention-smoke {tmp_path}/s5-smoke")
    assert [row.split("|")[2].strip() for row in table[2:]] == ["attention (smoke)", "s5 (smoke)"]
    for model, row in zip(("attention", "s5"), table[2:], strict=True):
        folder = tmp_path / f"{model}-smoke"
        result = json.loads((folder / "result.json").read_text())
        assert f"{config}:{model},smoke" in result["command"] and "experiments.train" in result["command"]
        assert f"{result['value']:.3f} bits/byte" in row and result["metric"] == "bits_per_byte"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "test/loss" in line][-1]
        assert_close(np.float64(last["test/bits_per_byte"]), last["test/loss"] / np.log(2))
        opening = tasks.load({"name": "language_model", "path": str(text)}).data["validation"][:32].tobytes().decode()
        assert last["sample"].startswith(opening) and len(last["sample"]) > len(opening)
    assert call(config, text, tmp_path, "train_steps=3") == 0
    again = capsys.readouterr().out
    assert again.count("finished already") == 2 and again.splitlines()[-6:-2] == table
    assert call(config, text, tmp_path, "train_steps=x") == 2


def test_a_folder_is_swept_as_its_table_says(tmp_path):
    """Each file's runs in a folder of its own; the published table of state tracking is one command."""

    def parse(config):
        return commandline.parse_sweep(["sweep", f"--config={config}", "--workdir=runs"], "").configs

    folder = pathlib.Path(state_tracking.__file__).parent
    table = parse(f"{folder}:fast")
    assert len(table) == 5 + 10
    assert table["arithmetic/plain-mamba3-fast"] == f"{folder}/arithmetic.py:plain,mamba3,fast"
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(TWO)
    (tmp_path / "none.py").write_text("def get_config(): pass")
    assert list(parse(f"{tmp_path}:smoke")) == [f"{a}/{b}-smoke" for a in ("one", "two") for b in ("attention", "s5")]
    (tmp_path / "__init__.py").write_text('TABLE = ("two",)')
    assert list(parse(f"{tmp_path}:smoke").values()) == [
        f"{tmp_path}/two.py:{name},smoke" for name in ("attention", "s5")
    ]


def test_a_config_without_a_sweep_is_named(tmp_path, capsys):
    from configs import smnist

    arguments = ["sweep", f"--config={smnist.__file__}:smoke", f"--workdir={tmp_path}"]
    assert commandline.run(sweep.main, arguments) == 2
    assert capsys.readouterr().err == f"error: {smnist.__file__} has no sweep\n"
    arguments[1] = f"--config={CONFIG}:smok"
    assert commandline.run(sweep.main, arguments) == 2
    assert "unknown preset 'smok'; did you mean 'smoke'" in capsys.readouterr().err
    assert not list(pathlib.Path(tmp_path).iterdir())
