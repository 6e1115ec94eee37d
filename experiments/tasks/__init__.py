"""Tasks by name. Each has a dataclass of options (the fields of `config.task`) with `load`."""

import importlib
from collections.abc import Mapping
from typing import Any

from experiments.tasks.base import Task
from ssm import naming

GROUPS = ("S3", "A4", "A5", "S5", "Z60", "A4xZ5")
TASKS = {
    **dict.fromkeys(("smnist", "psmnist", "fashion"), ("smnist", "Options")),
    "listops": ("listops", "Options"),
    "text": ("imdb", "Options"),
    "retrieval": ("retrieval", "Options"),
    **dict.fromkeys(("image", "scifar"), ("cifar", "Options")),
    "spoken_digits": ("spoken_digits", "Options"),
    "speech_commands": ("speech_commands", "Options"),
    "language_model": ("text", "Options"),
    "noise": ("noise", "Options"),
    **dict.fromkeys(("pathfinder", "pathx"), ("pathfinder", "Options")),
    **dict.fromkeys(("parity", "even_pairs", "cycle", "modular_addition"), ("automata", "Options")),
    **dict.fromkeys(("modular_arithmetic", "modular_arithmetic_brackets"), ("arithmetic", "Options")),
    **{f"word_problem_{group}": ("groups", "Options") for group in GROUPS},
    **dict.fromkeys(("copying", "selective_copying"), ("copying", "Options")),
    "induction_heads": ("recall", "Induction"),
    "mqar": ("recall", "MQAR"),
    "needle": ("recall", "Needle"),
}  # name -> module and dataclass


def load(options: Mapping[str, Any]) -> Task:
    """The task that `config.task` names. Raises ValueError with one line for wrong options or data."""
    options = dict(options)
    name = options.pop("name")
    if name not in TASKS:
        raise naming.unknown("task", name, TASKS)
    module, cls = TASKS[name]
    cls = getattr(importlib.import_module(f"experiments.tasks.{module}"), cls)
    return naming.build(f"task {name}", cls, options, name=name).load()
