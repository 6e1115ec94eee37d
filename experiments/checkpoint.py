"""Checkpoints that are either whole or refused.

    checkpoints/120/state/         the train state, written by Orbax
    checkpoints/120/manifest.json  written last: shape and dtype of every leaf, a digest of every file
    checkpoints/130.damaged/       refused by its digest and moved aside when an older one was good
    checkpoints/tmp-*              a write or a removal that was cut short; removed by the next save

A checkpoint is written under a temporary name and renamed, so a run killed at any moment leaves whole
ones. Hence the digests: Orbax alone returns wrong numbers when a byte of a data file has changed.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp


class Damaged(ValueError):
    """A checkpoint whose files are not those that were written."""

    def __init__(self, folder: pathlib.Path, what: str):
        super().__init__(f"{folder}: {what}")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state read back, the JSON saved with it, and the checkpoints that had to be passed over."""

    step: int
    state: Any
    extra: dict
    damaged: list[str]


def steps(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in `directory`, ascending."""
    if not directory.exists():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def save(
    directory: pathlib.Path, step: int, state: Any, extra: dict, *, keep: int, protect: Iterable[int] = ()
) -> None:
    """Writes checkpoint `step`, then removes all but the newest `keep` and those in `protect`."""
    directory.mkdir(exist_ok=True)
    for remains in directory.glob("tmp-*"):
        shutil.rmtree(remains)
    temporary = directory.resolve() / f"tmp-{step}"
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(temporary / "state", args=ocp.args.StandardSave(state))
    body = json.dumps({"step": step, "leaves": leaves(state), "files": _digests(temporary), "extra": extra})
    with open(temporary / "manifest.json", "w") as file:
        file.write(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / str(step))
    for old in steps(directory)[:-keep]:
        if old not in protect:
            shutil.rmtree((directory / str(old)).rename(directory / f"tmp-old-{old}"))


def restore(directory: pathlib.Path, step: int, like: Any) -> tuple[Any, dict]:
    """The state of checkpoint `step` and its `extra`.

    like: the state as `jax.ShapeDtypeStruct`s with shardings.
    Raises Damaged when a file is not what was written; ValueError when the state has other leaves.
    """
    manifest = _verified_manifest(directory / str(step))
    check_fit(directory / str(step), manifest["leaves"], leaves(like))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        state = checkpointer.restore((directory / str(step) / "state").resolve(), args=ocp.args.StandardRestore(like))
    return state, manifest["extra"]


def restore_latest(directory: pathlib.Path, like: Any) -> Restored | None:
    """The newest whole checkpoint, or None where there is none at all.

    Raises ValueError when there are checkpoints and all are damaged: starting over is the user's choice.
    """
    damaged: list[str] = []
    for step in reversed(steps(directory)):
        try:
            state, extra = restore(directory, step, like)
            return Restored(step, state, extra, damaged)
        except Damaged as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(
            f"no checkpoint can be read ({'; '.join(damaged)}); nothing was deleted: move the folder away to start over"
        )
    return None


def set_aside(directory: pathlib.Path, newer_than: int) -> None:
    """Renames the checkpoints after step `newer_than`, which were found damaged, out of the way."""
    for step in steps(directory):
        if step > newer_than:
            names = (f"{step}.damaged" + (f".{i}" if i else "") for i in range(1000))
            target = next(directory / name for name in names if not (directory / name).exists())
            (directory / str(step)).rename(target)


def check_fit(file: pathlib.Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ValueError naming a leaf that a checkpoint and the model do not have alike; see `leaves`."""
    if there != here:
        path = next(p for p in here | there if here.get(p) != there.get(p))
        raise ValueError(
            f"checkpoint {file} does not fit this model: {path} is"
            f" {there.get(path, 'absent')} in it and {here.get(path, 'absent')} here"
        )


def leaves(state: Any) -> dict[str, str]:
    """Path -> dtype and shape, as in {"params/D": "float32[64]"}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flat
    }


def _digests(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(p for p in (folder / "state").rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): _digest(p) for p in files}


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified_manifest(folder: pathlib.Path) -> dict:
    path = folder / "manifest.json"
    try:
        body, digest = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise Damaged(folder, "manifest.json is missing or cut short") from error
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise Damaged(folder, "manifest.json was altered")
    manifest = json.loads(body)
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise Damaged(folder, f"{name} is missing")
        if _digest(folder / name) != expected:
            raise Damaged(folder, f"{name} was altered or cut short")
    return manifest
