"""Wrong input is one line on stderr and exit status 2, and leaves no file behind."""

import pathlib

import pytest

from experiments import commandline, evaluate, report, train
from tests.experiments.conftest import write_mnist

FIELDS = {
    "modle.width=3": "unknown field of config 'modle'; did you mean 'model'?",
    "model.widht=3": "unknown field of model 'widht'; did you mean 'width'?",
    "model.width.x=3": "unknown field of model.width 'x'.",
    "model.width=1.5": "flag --config.model.width=1.5: invalid literal for int() with base 10: '1.5'",
    "model.width=wide": "flag --config.model.width=wide: invalid literal for int()",
    "model=3": "flag --config.model=3: Failed to parse '3' as a ConfigDict",
    "train_steps": "--config.train_steps has no value; write --config.train_steps=VALUE",
    "train_steps=0": "train_steps and train_epochs are both 0: set one of them",
    "train_epochs=1": "train_steps=4 and train_epochs=1.0 are both given: set one of them to 0",
    "eval_every_epochs=1": "eval_every_steps=2 and eval_every_epochs=1.0 are both given",
    "batch_size=0": "batch_size=0: must be at least 1",
    "batch_size=41": "batch_size=41 is larger than the training split (40 examples)",
    "log_every_steps=0": "log_every_steps=0: must be at least 1",
    "devices=3": "devices=3: this machine has 2",
    "devices=0": "devices=0: must be at least 1",
    "task.name=smnits": "unknown task 'smnits'; did you mean 'smnist'?",
    "task.source=idxx": "unknown task source 'idxx'; did you mean 'idx'?",
    "task.data_dir=/nowhere": "task source idx: data_dir='/nowhere' is not a folder",
    "optimizer.name=adam": "unknown optimizer 'adam'; did you mean 'adamw'?",
    "optimizer.schedule=cosin": "unknown schedule 'cosin'; did you mean 'cosine'?",
    "optimizer.groups.ssm.match=log_dt": "optimizer group ssm: match='log_dt' matches no parameter",
    "optimizer.groups={'a':{'match':'bias'},'b':{'match':'encoder'}}": "groups a and b both match parameter encoder/b",
    "optimizer.groups={'a':{'match':'bias','rate':1}}": "unknown option of optimizer group a 'rate'",
    "model={'pattern':'tiny','wdth':3}": "unknown option of model 'wdth'; did you mean 'width'?",
}


def one_line(capsys, workdir: pathlib.Path | None = None) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    assert workdir is None or not workdir.exists() or [p.name for p in workdir.iterdir()] == [".lock"]
    return err


@pytest.mark.parametrize("field", FIELDS)
def test_fields(run, tmp_path, capsys, field):
    fields = (field,) if not field.startswith("devices") else (field, "batch_size=9", "eval_batch_size=9")
    assert run(tmp_path / "run", *fields) == 2
    assert FIELDS[field] in one_line(capsys, tmp_path / "run")


def test_a_corrected_command_may_use_the_same_folder(run, tmp_path, capsys):
    """A failed start leaves no config.json that the next one would contradict."""
    assert run(tmp_path, "batch_size=0") == 2
    assert run(tmp_path, "train_steps=1") == 0


def test_batch_that_devices_cannot_share(run, tmp_path, capsys):
    assert run(tmp_path / "run", "devices=2", "batch_size=9") == 2
    assert "batch_size=9 is not a multiple of devices=2" in one_line(capsys, tmp_path / "run")


FLAGS = {
    (): "--config is missing; usage: --config=FILE.py:PRESET --workdir=DIR",
    ("--config=configs/smnist.py",): "--workdir is missing; usage",
    (
        "--config=configs/smnst.py",
        "--workdir=x",
    ): "unknown config file 'configs/smnst.py'; did you mean 'configs/smnist.py'",
    ("--config=smnist", "--workdir=x"): "unknown config file 'smnist'; did you mean",
    (
        "--config=configs/smnist.py:s44",
        "--workdir=x",
    ): "configs/smnist.py: unknown preset 's44'; did you mean 's4'?",
    ("--config=configs/smnist.py:s4,s5", "--workdir=x"): "preset 's4,s5' names two of s4d, s4,",
    (
        "--config=configs/smnist.py",
        "--workdri=x",
    ): "Unknown command line flag 'workdri'. Did you mean: workdir",
    (
        "--config=configs/smnist.py",
        "--workdir=x",
        "y",
    ): "unexpected argument 'y'; fields are set as --config.FIELD=VALUE",
    ("--config=configs/smnist.py", "--workdir=x", "--seed=3"): "Unknown command line flag 'seed'",
}


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_flags(capsys, monkeypatch, flags):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    assert commandline.run(train.main, ["train", *flags]) == 2
    assert FLAGS[flags] in one_line(capsys)


LACKING = """
from tests.experiments import tiny

def get_config():
    config = tiny.get_config()
    del config.seed
    return config
"""
OWN = {
    "def get_config():\n    raise ValueError('no such thing')": "own.py: no such thing",
    LACKING: "the config has no field 'seed'",
}


@pytest.mark.parametrize("source", OWN)
def test_config_files(tmp_path, capsys, source):
    (tmp_path / "own.py").write_text(source)
    assert commandline.run(train.main, ["train", f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/run"]) == 2
    assert OWN[source] in one_line(capsys, tmp_path / "run")


def test_foreign_folder_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert run(tmp_path) == 2
    assert "is not a run's folder: it holds thesis.tex and no config.json" in one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["/proc/run", "file/run"])
def test_folder_that_cannot_be_written(run, tmp_path, capsys, place):
    (tmp_path / "file").write_text("x")
    assert run(tmp_path / place) == 2
    assert f"cannot write to --workdir={tmp_path / place}: " in one_line(capsys)


def test_spoiled_config_json(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert run(tmp_path) == 2
    assert f"{tmp_path / 'config.json'} is not JSON" in one_line(capsys)


def test_missing_data_file(run, tmp_path, capsys):
    folder = write_mnist(tmp_path / "mnist")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    assert run(tmp_path / "run", f"task.data_dir={folder}") == 2
    assert "t10k-labels-idx1-ubyte.gz is missing; the official files are" in one_line(capsys, tmp_path / "run")


def test_evaluate_and_report(run, tmp_path, capsys):
    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run's folder: it has no config.json" in one_line(capsys)
    assert commandline.run(report.main, ["report", "--add", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run's folder" in one_line(capsys)
    assert run(tmp_path / "run", "train_steps=2", "time_limit_minutes=1e-9") == 0
    capsys.readouterr()
    assert commandline.run(report.main, ["report", "--add", str(tmp_path / "run")]) == 2
    assert "run is not finished: it has no result.json" in one_line(capsys)
    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path / "run"), "--split=tets"]) == 2
    assert "unknown split 'tets'; did you mean 'test'?" in one_line(capsys)
