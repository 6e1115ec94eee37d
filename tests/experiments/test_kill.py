"""A run that is killed again and again ends as one that was left alone, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 10
STEPS = 150
TIMES = ("seconds", "tokens_per_second", "waiting_percent")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(workdir: pathlib.Path, mnist: pathlib.Path, environment: dict[str, str], steps=STEPS) -> subprocess.Popen:
    """A checkpoint at every third step: the run spends most of its time in writing them."""
    fields = {"task.source": "idx", "batch_size": 8, "model.width": 4, "train_steps": steps}
    fields |= {"checkpoint_every_steps": 3, "eval_every_steps": 10, "log_every_steps": 4}
    fields["task.data_dir"] = mnist
    command = [sys.executable, "-m", "experiments.train", "--config=configs/smnist.py:s4d,smoke"]
    command += [f"--workdir={workdir}"] + [f"--config.{name}={value}" for name, value in fields.items()]
    with open(workdir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)


def outcome(workdir: pathlib.Path, step: int) -> tuple[list[dict], dict]:
    """metrics.jsonl without times, and the arrays of the last checkpoint."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return lines, checkpointer.restore(workdir / "checkpoints" / str(step) / "state")


def bits(tree: dict) -> dict[str, bytes]:
    flat = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        nested = bits(value) if isinstance(value, dict | list | tuple) else {"": np.asarray(value).tobytes()}
        flat |= {f"{key}/{k}": v for k, v in nested.items()}
    return flat


def newest(workdir: pathlib.Path) -> int:
    return max((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_run_equals_uninterrupted_run(tmp_path, mnist, environment):
    """Fails when state, data order, random numbers or the files are not restored exactly."""
    assert start(tmp_path / "whole", mnist, environment).wait() == 0
    generator = np.random.default_rng(0)
    workdir, reached, cut_short = tmp_path / "killed", [0], 0
    for kill in range(KILLS):
        process = start(workdir, mnist, environment)
        if kill % 5:  # let it come past what the last one reached, then kill within some steps
            wait_until(lambda process=process: process.poll() is not None or newest(workdir) > reached[-1])
            time.sleep(generator.uniform(0, 0.12))
        else:
            time.sleep(generator.uniform(0, 3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "finished before it could be killed: raise STEPS"
        reached.append(newest(workdir))
        cut_short += any((workdir / "checkpoints").glob("tmp-*"))
    assert start(workdir, mnist, environment).wait() == 0, workdir.with_suffix(".log").read_text()
    assert len(set(reached)) > KILLS / 2 and cut_short, "the kills missed the loop or the checkpoints"
    lines, state = outcome(tmp_path / "whole", STEPS)
    killed_lines, killed_state = outcome(workdir, STEPS)
    assert killed_lines == lines
    assert bits(killed_state) == bits(state)


def test_sigterm_saves_and_the_same_command_continues(tmp_path, mnist, environment):
    process = start(tmp_path / "run", mnist, environment, steps=60)
    wait_until(lambda: newest(tmp_path / "run") > 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    stopped = newest(tmp_path / "run")
    assert f"stopped at step {stopped} of 60" in (tmp_path / "run.log").read_text()
    assert start(tmp_path / "run", mnist, environment, steps=60).wait() == 0
    assert f"training from step {stopped} to 60" in (tmp_path / "run.log").read_text()
