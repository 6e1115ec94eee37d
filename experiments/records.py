"""Records: what was measured, on what, with which command and versions."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

from experiments.metrics import METRICS

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
ROOT = pathlib.Path(__file__).parent.parent


def environment(command: str, devices: int) -> dict:
    """Versions, devices, commit and command of this process."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": command,
        "commit": commit(),
        "hardware": hardware(devices),
        "versions": {"python": platform.python_version(), **versions},
    }


def measured(program: str, argv: Sequence[str], devices: int) -> dict:
    """What every line of measurements says of its command, device, versions, commit and date."""
    about = environment(" ".join([f"python -m {program}", *argv[1:]]), devices)
    return about | {"device": about.pop("hardware"), "date": datetime.date.today().isoformat()}


def commit() -> str:
    """The commit of the source, with "-dirty" for uncommitted changes; "" outside a repository."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def hardware(devices: int) -> str:
    """As in "2 x NVIDIA H100 80GB HBM3" or "CPU, 2 cores, AMD EPYC"."""
    if jax.default_backend() != "cpu":
        return f"{devices} x {jax.local_devices()[0].device_kind}"
    try:
        found = re.search(r"^model name\s*: (.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"CPU, {os.cpu_count()} cores, {found[1] if found else platform.machine()}"


def result(config: dict, environment: dict, *, wall_seconds: float, device_seconds: float, **measured: Any) -> dict:
    """result.json of a finished run; accuracies are in percent, device_seconds the wall time of all devices."""
    published = config["published"]
    return {
        "task": config["task"]["name"],
        "model": config["model"]["pattern"],
        "preset": config["preset"],
        "metric": published["metric"],
        "published": {k: published[k] for k in ("value", "source")} if published["source"] else None,
        "seeds": [config["seed"]],
        "wall_seconds": wall_seconds,
        "gpu_seconds": device_seconds * (not environment["hardware"].startswith("CPU")),
        "date": datetime.date.today().isoformat(),
        **environment,
        **measured,
    }


def sentence(result: dict) -> str:
    """The figure of a record beside the published one."""
    paper = result["published"]
    beside = f"published {paper['value']:g} ({paper['source']})" if paper else "no published figure"
    figure = METRICS[result["metric"]].show(result["value"])
    name = f"{result['metric'].replace('_', ' ')} " if "accuracy" in result["metric"] else ""  # bits/byte say it
    return f"test {name}{figure} at step {result['step']}; {beside}"
