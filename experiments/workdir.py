"""A run's folder: one run at a time, one config, and files that survive a kill at any moment.

config.json is the whole config, env.json the machines and versions the run has seen, metrics.jsonl one
JSON object per line with its `step`, result.json the record of a finished run.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What may differ when a run is continued: it does not change the result, or by rounding alone.
UNCHECKED = ("time_limit_minutes", "devices", "task.resident")
LOG = "log.txt"  # what a run of a sweep printed


def write(path: pathlib.Path, text: str) -> None:
    """Replaces `path` in one move: a reader sees the old file or the new one."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def first(changes: Sequence[str]) -> str:
    """Three of them, and how many more there are."""
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


class Workdir:
    """An opened run folder; make it with `claim`."""

    def __init__(self, path: pathlib.Path, config: Mapping):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = json.loads(json.dumps(config))
        self._metrics = path / "metrics.jsonl"

    @classmethod
    def opened(cls, path: pathlib.Path) -> "Workdir":
        """A run's folder to read from, with the config it holds."""
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is not a run's folder: it has no config.json")
        run = cls(path.absolute(), {})
        run.config = run.read("config.json")
        return run

    def read(self, name: str) -> Any:
        """The JSON file `name`, or None if there is none."""
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error

    def write(self, name: str, value: Any) -> None:
        write(self.path / name, json.dumps(value, indent=2) + "\n")

    def changes(self) -> list[str]:
        """What differs between the folder's config.json and this run's config, one phrase per field.

        A field that is absent is as one that is empty or 0: an older run knows not of it.
        """
        there, here = flatten(self.read("config.json") or self.config), flatten(self.config)
        return [
            f"{field} is {there.get(field, 'absent')} there and {here.get(field, 'absent')} here"
            for field in sorted(there | here)
            if field not in UNCHECKED and (there.get(field) or None) != (here.get(field) or None)
        ]

    def begin(self, environment: dict) -> None:
        """Writes config.json and env.json; what another config left is kept as config.<n>.json."""
        if self.changes():
            n = next(n for n in range(1, 1000) if not (self.path / f"config.{n}.json").exists())
            self.write(f"config.{n}.json", self.read("config.json"))
            with contextlib.suppress(FileNotFoundError):
                (self.path / "result.json").rename(self.path / f"result.{n}.json")
        if self.read("config.json") != self.config:
            self.write("config.json", self.config)
        environments = self.read("env.json") or []
        if environment not in environments:
            self.write("env.json", [*environments, environment])

    # metrics.jsonl ---------------------------------------------------------------------------------

    def lines(self) -> list[dict]:
        """All lines of metrics.jsonl; a last line that a kill cut short is left out."""
        if not self._metrics.exists():
            return []
        lines = []
        *whole, torn = self._metrics.read_text().split("\n")
        for number, line in enumerate(whole, 1):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{self._metrics}, line {number} is not JSON") from error
        return lines

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`, and a torn last line."""
        kept = "".join(json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step)
        if self._metrics.exists() and self._metrics.read_text() != kept:
            write(self._metrics, kept)

    def log(self, line: dict) -> None:
        """Appends one line; NaN is not JSON and raises."""
        with open(self._metrics, "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Puts the lines on disk: a checkpoint must never outlive the lines before it."""
        if self._metrics.exists():
            with open(self._metrics) as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def claim(path: str, config: Mapping, *, allow_config_change: bool = False) -> Iterator[Workdir]:
    """Opens or makes the run folder for one process at a time.

    Raises ValueError when it cannot be written, holds something else, was made by another config
    (unless `allow_config_change`), or is in use.
    """
    folder = pathlib.Path(path).absolute()
    refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise ValueError(f"cannot write to --workdir={path}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--workdir={path} is in use by another run") from error
        run = Workdir(folder, config)
        if (changes := run.changes()) and not allow_config_change:
            raise ValueError(
                f"--workdir={path} was made by another config: {first(changes)}."
                " Name another --workdir, or continue it with --allow_config_change"
            )
        yield run


def refuse_foreign(folder: pathlib.Path) -> None:
    """Raises ValueError where the folder holds something that is no run's."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return
    strangers = [p.name for p in folder.iterdir() if not p.name.startswith((".lock", ".tmp-", LOG))]
    if strangers:
        raise ValueError(f"--workdir={folder} is not a run's folder: it holds {strangers[0]} and no config.json")
