"""Flags of the programs here, and one clear line for wrong input.

--config=configs/smnist.py:s4d,demo names a file and a preset; --config.optimizer.learning_rate=1e-3 sets
one field, which must exist and keeps its type.
"""

import contextlib
import importlib.util
import logging
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from ssm import naming

ROOT = pathlib.Path(__file__).parent.parent
OURS = tuple(ROOT / package for package in ("experiments", "ssm", "kernels_pallas", "configs"))


class Arguments(NamedTuple):
    config: ConfigDict
    workdir: str
    allow_config_change: bool
    command: str


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Exit status of `main`: wrong input is one line and 2, a number that is not finite one line and 1.

    Wrong input is a ValueError that our own code raised; any other exception is a bug and passes.
    """
    for noisy in ("jax", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        return main(sys.argv if argv is None else argv)
    except ValueError as error:
        if not raised_here(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def raised_here(error: ValueError) -> bool:
    """Whether our own code raised it: then it is wrong input, not a bug."""
    file = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(file.is_relative_to(folder) for folder in OURS)


class Sweep(NamedTuple):
    configs: dict[str, str]  # of each run the folder in workdir, and FILE.py:PRESET
    workdir: str
    rest: list[str]  # flags for every run


def parse(argv: Sequence[str], usage: str) -> Arguments:
    """Reads the command line. Raises ValueError with one line for anything that is wrong in it."""
    values, overrides = _read(argv, usage)
    config = override(load_config(values.config), overrides)
    command = " ".join(["python -m experiments.train", *argv[1:]])
    return Arguments(config, values.workdir, values.allow_config_change, command)


def parse_sweep(argv: Sequence[str], usage: str) -> Sweep:
    """The presets that `sweep(add, PRESET)` of a config's file adds, or of all those files in a folder.

    A folder's __init__.py may name them, without .py: TABLE = ("parity", "arithmetic").
    Raises as `parse`, and where there is no sweep.
    """
    values, overrides = _read(argv, usage)
    name, colon, preset = values.config.partition(":")
    folder, configs = pathlib.Path(name), {}
    if folder.is_dir():
        for file in _table(folder):
            for run in _presets(f"{file}{colon}{preset}"):
                configs[f"{file.stem}/{run.replace(',', '-')}"] = f"{file}:{run}"
    else:
        configs = {run.replace(",", "-"): f"{name}:{run}" for run in _presets(values.config)}
    if not configs:
        raise ValueError(f"{name} has no sweep")
    allow = ["--allow_config_change"] if values.allow_config_change else []
    return Sweep(configs, values.workdir, [*overrides, *allow])


def _table(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder whose sweeps are its table, in their order."""
    package = folder / "__init__.py"
    if package.is_file() and (table := getattr(config_module(str(package))[0], "TABLE", ())):
        return [folder / f"{stem}.py" for stem in table]
    return [file for file in sorted(folder.glob("*.py")) if file != package]


def _presets(config: str) -> list[str]:
    """What the sweep of a config adds; [] where it has none."""
    module, file, preset = config_module(config)
    presets: list[str] = []
    if hasattr(module, "sweep"):
        with _named(file):
            module.sweep(presets.append, *preset)
    return presets


def _read(argv: Sequence[str], usage: str) -> tuple[flags.FlagValues, list[str]]:
    if {"-h", "--help"} & set(argv):
        print(usage)
        raise SystemExit(0)
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "FILE.py or FILE.py:PRESET", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_boolean("allow_config_change", False, "continue a run that another config made", flag_values=values)
    overrides = [a for a in argv[1:] if re.match(r"--?(no)?config\.", a)]
    rest = _parse(values, [argv[0], *(a for a in argv[1:] if a not in overrides)])
    for name in ("config", "workdir"):
        if not values[name].value:
            raise ValueError(f"--{name} is missing; usage: --config=FILE.py:PRESET --workdir=DIR")
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; fields are set as --config.FIELD=VALUE")
    return values, overrides


def load_config(name: str) -> ConfigDict:
    """`get_config(PRESET)` of "FILE.py:PRESET", or `get_config()` of "FILE.py"."""
    module, file, preset = config_module(name)
    with _named(file):
        return module.get_config(*preset)


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def config_module(name: str) -> tuple[types.ModuleType, str, list[str]]:
    """The module of "FILE.py:PRESET", FILE.py, and [PRESET], or [] of "FILE.py"."""
    file, *preset = name.split(":", 1)
    path = pathlib.Path(file)
    if path.suffix != ".py" or not path.is_file():
        found = [*path.parent.glob("*.py"), *pathlib.Path("configs").glob("*.py")]
        files = [str(p) for p in found if "def get_config" in p.read_text()]
        raise naming.unknown("config file", file, files)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, file, preset


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """Sets the fields that `--config.a.b=value` arguments name, and locks the config."""
    for argument in arguments:
        _check_field(config, re.sub(r"^--?(no)?config\.", "", argument).split("=")[0])
        if "=" not in argument and not argument.startswith(("--no", "-no")):
            raise ValueError(f"{argument} has no value; write {argument}=VALUE")
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *arguments])
    _parse(values, ["", *arguments])
    return values.config


def _check_field(config: ConfigDict, field: str) -> None:
    node = config
    for i, part in enumerate(parts := field.split(".")):
        if not isinstance(node, ConfigDict) or part not in node:
            place = ".".join(parts[:i]) or "config"
            raise naming.unknown(f"field of {place}", part, node if isinstance(node, ConfigDict) else ["none"])
        node = node[part]


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    try:
        return values(argv)[1:]
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from error
