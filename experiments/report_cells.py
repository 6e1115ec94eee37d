"""The cells of the reports' tables: what the configs plan, with the published figures, and the records of what was run.

A cell is a task, a model and a size. A config's file plans those that its `sweep(add, size)` adds, or, where it has
none, every model of its MODELS, in every size of SIZES, its own or its folder's, but "demo" and "smoke". A record fills
the cell of its task, model and preset, or is one of its own.
"""

import json
import pathlib
import types
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from experiments import commandline, tasks
from experiments.metrics import METRICS
from experiments.records import ROOT
from ssm import naming

CONFIGS = ROOT / "configs"
RESULTS = ROOT / "experiments" / "results"
UNPLANNED = ("demo", "smoke")  # sizes that no paper's table has


class Cell(NamedTuple):
    task: str
    pattern: str  # of mixers
    preset: str  # "SIZE", or "VARIANT-SIZE" of a variant of the pattern
    metric: str
    published: dict | None  # value and source
    config: dict
    result: dict | None = None  # result.json, where it was run
    file: str = ""  # the config's, beside `configs`
    group: str = ""  # the file's folder, or the file's own name in `configs` itself
    about: str = ""  # the first line of its docstring

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.pattern, self.preset

    @property
    def names(self) -> tuple[str, str, str]:
        """What a report that holds it may be called."""
        return self.group, pathlib.Path(self.file).stem, self.task

    @property
    def model(self) -> str:
        """The variant's name, or the pattern's where the preset has none."""
        return self.preset.rpartition("-")[0] or self.pattern

    @property
    def size(self) -> str:
        return self.preset.rpartition("-")[2]

    @property
    def measure(self) -> str:
        return f"{self.metric.replace('_', ' ')} ({METRICS[self.metric].unit})"

    @property
    def classes(self) -> int:
        """The answers that its task has. Loads the task: for those whose examples are made on the device."""
        return tasks.load(self.config["task"]).classes


def recorded(results: pathlib.Path) -> list[Cell]:
    """A cell for each result.json of `results`, by task, model and preset."""
    return [
        record(*(json.loads((file.parent / name).read_text()) for name in ("result.json", "config.json")))
        for file in sorted(results.glob("*/*/result.json"))
    ]


def record(result: dict, config: dict) -> Cell:
    """The cell of a run."""
    names = ("task", "model", "preset", "metric", "published")
    return Cell(*(result[name] for name in names), config, result, group=result["task"])


def planned(configs: pathlib.Path) -> list[Cell]:
    """The cells of all configs in a folder, those in its folders first."""
    files = sorted(configs.rglob("*.py"), key=lambda file: (file.parent == configs, file))
    return [cell for file in files if "def get_config" in file.read_text() for cell in _plan(configs, file)]


def _plan(configs: pathlib.Path, file: pathlib.Path) -> list[Cell]:
    place = {"file": str(file.relative_to(configs.parent))}
    place["group"] = file.stem if file.parent == configs else file.parent.name
    module, *_ = commandline.config_module(str(file))
    place["about"] = module.__doc__.splitlines()[0]
    cells = []
    for config in map(module.get_config, _presets(module, _sizes(module, file.with_name("__init__.py")))):
        published = config.published.to_dict()
        names = config.task.name, config.model.pattern, config.preset, published.pop("metric")
        cells.append(Cell(*names, published if published["source"] else None, config.to_dict(), **place))
    return cells


def _sizes(module: types.ModuleType, package: pathlib.Path) -> list[str]:
    """Those of the file, or of its folder's __init__.py; [""], the default, where neither has any."""
    if not hasattr(module, "SIZES") and package.exists():
        module, *_ = commandline.config_module(str(package))
    return [size for size in getattr(module, "SIZES", ("",)) if size not in UNPLANNED]


def _presets(module: types.ModuleType, sizes: Sequence[str]) -> Iterable[str]:
    presets: list[str] = []
    for size in sizes:
        if hasattr(module, "sweep"):
            module.sweep(presets.append, size)
        else:
            presets += [f"{model},{size}" for model in getattr(module, "MODELS", ())]
    return dict.fromkeys(presets)


def cells(configs: pathlib.Path = CONFIGS, results: pathlib.Path = RESULTS) -> list[Cell]:
    """Every cell, by group and task: the planned ones in their order, then what else was run."""
    found: dict[tuple, Cell] = {}
    home: dict[str, dict[str, str]] = {}
    for cell in planned(configs):
        found.setdefault(cell.key, cell)
        home.setdefault(cell.task, {name: getattr(cell, name) for name in ("file", "group", "about")})
    for run in recorded(results):
        cell = found.get(run.key, run._replace(**home.get(run.task, {})))
        found[run.key] = cell._replace(result=run.result, config=run.config)
    order = list(dict.fromkeys((cell.group, cell.task) for cell in found.values()))
    return sorted(found.values(), key=lambda cell: order.index((cell.group, cell.task)))


def chosen(cells: Sequence[Cell], name: str) -> list[Cell]:
    """The cells of a group, a config's file or a task. Raises ValueError for another name."""
    found = [cell for cell in cells if name in cell.names]
    if not found:
        raise naming.unknown("report", name, [name for cell in cells for name in cell.names if name])
    return found
