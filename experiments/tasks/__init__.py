"""Tasks by name. Each module has a dataclass `Options` (the fields of `config.task`) with `load`."""

import importlib
from collections.abc import Mapping
from typing import Any

from experiments.tasks.base import Task
from ssm import naming

MODULES = {"smnist": "smnist", "psmnist": "smnist", "fashion": "smnist", "language_model": "text", "noise": "noise"}


def load(options: Mapping[str, Any]) -> Task:
    """The task that `config.task` names. Raises ValueError with one line for wrong options or data."""
    options = dict(options)
    name = options.pop("name")
    if name not in MODULES:
        raise naming.unknown("task", name, MODULES)
    module = importlib.import_module(f"experiments.tasks.{MODULES[name]}")
    return naming.build(f"task {name}", module.Options, options, name=name).load()
