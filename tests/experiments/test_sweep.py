"""The models of a table, trained by one command on a real text."""

import json
import os
import pathlib
import signal
import sys

import numpy as np
import pytest

from configs import language_model, state_tracking
from experiments import commandline, jobs, sweep, tasks
from tests.conftest import CACHE
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


MANY = """
from configs.state_tracking import parity

def get_config(preset):
    config = parity.get_config("attention,smoke")
    config.train_steps, config.task.eval_lengths = 1, ()
    config.model.pattern = "attention" if preset != "wrong" else "nothing"
    return config

def sweep(add, preset=""):
    for name in ("wrong", "first", "last"):
        add(name)
"""


@pytest.fixture
def many(tmp_path):
    """many("--jobs=2", ...) -> exit status of a sweep of three runs, the first of which no model can be built for."""
    (tmp_path / "many.py").write_text(MANY)
    flags = [f"--config={tmp_path}/many.py", f"--workdir={tmp_path}/runs"]
    return lambda *more: commandline.run(sweep.main, ["sweep", *flags, *more])


def test_runs_at_once(many, tmp_path, monkeypatch, capsys):
    """The one that fails is named, and stops no other."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    assert many("--jobs=2") == 1
    out, err = capsys.readouterr()
    log = tmp_path / "runs" / "wrong" / "log.txt"
    assert err.startswith("failed   wrong: error: ") and err.endswith(f"(exit status 2, see {log})\n")
    assert err.count("\n") == 1 and "'nothing'" in err and err.split("error: ")[1].split(" (exit")[0] in log.read_text()
    lines = out.splitlines()
    assert lines[:2] == ["started  wrong, 1 of 3", "started  first, 2 of 3"]
    for name in ("first", "last"):
        (line,) = (line for line in lines if line.startswith(f"finished {name}: test scaled accuracy "))
        assert line.split(": ")[1] in (tmp_path / "runs" / name / "log.txt").read_text()
        assert json.loads((tmp_path / "runs" / name / "result.json").read_text())["step"] == 1
    assert lines.count("not finished: wrong; the same command goes on") == 1
    assert lines[-1].endswith(f"--add {tmp_path}/runs/first {tmp_path}/runs/last")


def test_a_signal_stops_them_all(many, tmp_path, monkeypatch, capsys):
    """Each may still save what it has; none is started any more."""
    program = tmp_path / "program"
    both = f"while ! [ -e {tmp_path}/runs/first/log.txt ]; do sleep 0.02; done"
    asks = f'case "$*" in *many.py:wrong*) {both}; kill -TERM {os.getpid()};; esac'
    stops = "trap 'echo stopped at step 3 of 9; exit 143' TERM"
    program.write_text(f"#!/bin/sh\n{stops}\n{asks}\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert many("--jobs=2") == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, old)
    out, err = capsys.readouterr()
    assert "stopped  wrong: at step 3 of 9\n" in out and "stopped  first: " in out and "last" not in out and not err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["first", "wrong"]


def test_wrong_input_starts_none(many, tmp_path, capsys):
    (tmp_path / "runs" / "last").mkdir(parents=True)
    (tmp_path / "runs" / "last" / "thesis.tex").write_text("")
    for flags, message in (
        (["--jobs=0"], "error: flag --jobs=0: 0 is not a positive integer"),
        (["--jobs=some"], "error: flag --jobs=some: "),
        (["--jobs=2", "--config.batch_sise=2"], "error: unknown field of config 'batch_sise'"),
        (["--jobs=2"], f"error: --workdir={tmp_path}/runs/last is not a run's folder: it holds thesis.tex"),
    ):
        assert many(*flags) == 2
        out, err = capsys.readouterr()
        assert err.startswith(message) and err.count("\n") == 1 and not out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["last"]


def test_gpus_are_shared():
    """Dealt out in turn; of memory a part for each run on the same GPU, unless the environment says otherwise."""
    gpus, memory = "CUDA_VISIBLE_DEVICES", "XLA_CLIENT_MEM_FRACTION"
    assert jobs.share({}, 0, 4, [], 1) == {}
    assert [jobs.share({}, slot, 3, ["4"], 1) for slot in range(3)] == [{gpus: "4", memory: "0.300"}] * 3
    assert [jobs.share({}, slot, 4, ["0", "1"], 1)[gpus] for slot in range(4)] == ["0", "1", "0", "1"]
    assert jobs.share({}, 3, 4, ["0", "1"], 1)[memory] == "0.450" == jobs.share({}, 0, 2, ["0", "1"], 2)[memory]
    assert [jobs.share({}, slot, 2, list("0123"), 2) for slot in (0, 1)] == [{gpus: "0,1"}, {gpus: "2,3"}]
    for name in jobs.MEMORY:
        assert jobs.share({name: "0.2"}, 1, 3, ["0", "1"], 1) == {gpus: "1"}
    assert jobs.local_gpus({gpus: "3, 5"}) == ["3", "5"] and jobs.local_gpus({gpus: ""}) == []
