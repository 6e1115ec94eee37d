"""The configs of synthetic tasks, long sequences in pieces, and a run of a synthetic task from start to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.recall import induction_heads, mqar, needle, selective_copying
from configs.state_tracking import arithmetic, parity, word_problem
from experiments import commandline, evaluate, setup, steps, train
from ssm.language_model import LanguageModel
from tests.experiments.synthetic import load

PRESETS = [
    *((parity, f"{model},{size}") for model in parity.state_tracking.MODELS for size in parity.SIZES),
    *((arithmetic, f"{task},mamba3,{size}") for task in arithmetic.TASKS for size in arithmetic.SIZES),
    *((word_problem, f"{group},mamba2") for group in word_problem.GROUPS),
    (word_problem, "smoke"),
    *((module, f"{model},smoke") for module in (selective_copying, needle) for model in ("mamba", "attention")),
    *((module, size) for module in (selective_copying, needle) for size in module.SIZES),
    *((induction_heads, f"{model},paper") for model in induction_heads.MODELS),
    (induction_heads, "smoke"),
    *((mqar, f"mamba2,{size}") for size in mqar.SIZES),
    *((mqar, f"{model},l256,{width}") for model in ("attention", "mamba2_n16") for width in ("d32", "d256")),
]


@pytest.mark.parametrize(("module", "preset"), PRESETS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_every_preset_is_ready_to_run(module, preset):
    config = module.get_config(preset)
    ready = setup.prepare(config)
    assert ready.task.metric == config.published.metric
    assert {row.path.split("/")[-1] for row in ready.rows if row.weight_decay} <= {"kernel", "weight"}
    folder, name = module.__name__.split(".")[1:]
    assert f"python -m experiments.train --config=configs/{folder}/{name}.py:" in module.__doc__


def test_the_published_set_up():
    config = parity.get_config("mamba3,paper")
    assert (config.published.value, config.model.depth, config.batch_size) == (100.0, 1, 256)
    assert arithmetic.get_config("brackets,mamba2").published.value == 0.88
    assert arithmetic.get_config("mamba").published.source == ""
    fixed = parity.get_config("mamba3_fixed,paper")
    assert fixed.model.pattern == "mamba3" and fixed.model.mixers.mamba3.rotation == "fixed"
    assert fixed.preset == "mamba3_fixed-paper", "a record's folder is its model's and its preset's"


@pytest.mark.parametrize(("pattern", "metric"), [("mamba3 attention", "sequence_accuracy"), ("mamba2", "accuracy")])
def test_pieces_say_what_the_whole_says(pattern, metric):
    """21 positions in pieces of 8; fails where the state is not carried, or a row's pieces are judged one by one."""
    task = load("parity", metric=metric, test_length=21, test_scored="every", test_examples=3)
    mixers = {"attention": {"window": 16}, **dict.fromkeys(("mamba2", "mamba3"), {"head_size": 4, "state_size": 8})}
    names = pattern.split()
    model = LanguageModel(
        3, width=8, depth=len(names), pattern=pattern, mixers={name: mixers[name] for name in names}, mlp_size=0
    )
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    (batch,) = task.eval_batches("test", 4)
    whole, pieces = (
        jax.jit(steps.eval_step(model, task, piece))(params, {}, batch, jax.random.key(0)) for piece in (0, 8)
    )
    np.testing.assert_allclose(pieces.loss, whole.loss, rtol=2e-5)
    assert (float(pieces.correct), float(pieces.weight)) == (float(whole.correct), 3 * 21)


def call(folder, *fields: str) -> int:
    overrides = [f"--config.{field}" for field in fields]
    return commandline.run(
        train.main, ["train", f"--config={parity.__file__}:attention,smoke", f"--workdir={folder}", *overrides]
    )


def test_a_run_and_its_lengths(tmp_path, capsys):
    """The further lengths are read at the end alone, and are in the record; an evaluation of one says the same."""
    assert call(tmp_path / "run") == 0
    assert "test scaled accuracy " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    further = [sorted(key for key in line if "test_16" in key) for line in lines if "test/loss" in line]
    assert further == [[], ["test_16/loss", "test_16/scaled_accuracy"]]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["further"] == {"test_16": lines[-1]["test_16/scaled_accuracy"]}
    assert (result["task"], result["metric"]) == ("parity", "scaled_accuracy")
    capsys.readouterr()
    assert commandline.run(evaluate.main, ["evaluate", str(tmp_path / "run"), "--split=test_16"]) == 0
    assert f"test_16/scaled_accuracy {result['further']['test_16']:.6g}" in capsys.readouterr().out


def test_wrong_fields_are_one_line(tmp_path, capsys):
    for field, message in (
        ("task.lengths=(0,)", "task parity: lengths=(0,) must be at least 1"),
        ("task.test_scored=all", "unknown test_scored 'all'. Allowed: every, last"),
        ("task.name=mqar", "unknown option of task mqar"),
        ("task.name=paritty", "unknown task 'paritty'; did you mean 'parity'?"),
    ):
        assert call(tmp_path / "run", field) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {message}") and err.count("\n") == 1 and not out
