"""Splits of images in a folder, drawn on all cores; a generation that was stopped goes on where it was.

A split is two arrays, images uint8 (n, r, r, 1) and labels uint8 (n,), in .npy files that have their full size from the
start on and are mapped into memory. They are filled part by part, and a part that is on the disk has its line in the
file `done`.
"""

import fcntl
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple, TextIO

import numpy as np

SIZES = {"train": 160_000, "validation": 20_000, "test": 20_000}  # Long Range Arena's
PART = 500  # images
VERSION = 1  # of the generator: to be raised where it makes other images of the same seed


class Split(NamedTuple):
    images: np.ndarray
    labels: np.ndarray


class Part(NamedTuple):
    split: str
    first: int
    count: int

    @property
    def line(self) -> str:
        return f"{self.split} {self.first} {self.count}\n"


class Generated(NamedTuple):
    """All splits; drawn: how many of their images were missing, and how long it took to make them."""

    splits: dict[str, Split]
    drawn: int
    seconds: float


def folder_name(resolution: int, seed: int, sizes: Mapping[str, int]) -> str:
    own = "" if dict(sizes) == SIZES else "-" + "-".join(map(str, sizes.values()))
    return f"pathfinder{resolution}-v{VERSION}-seed{seed}{own}"


def generate(folder: pathlib.Path, resolution: int, seed: int, sizes: Mapping[str, int], threads: int = 0) -> Generated:
    """The splits in the folder, once what is missing of them is made by so many threads (0: one per core).

    Raises ValueError where the disk is too full, or a file in the folder is not the one that this makes.
    """
    parts = [Part(s, i, min(PART, n - i)) for s, n in sizes.items() for i in range(0, n, PART)]
    drawn, start = 0, time.monotonic()
    if not _is_done(folder, parts):
        drawn = _fill(folder, parts, resolution, seed, sizes, threads)
    splits = {split: _open(folder, split, n, resolution, "r") for split, n in sizes.items()}
    return Generated(splits, drawn, time.monotonic() - start)


def _is_done(folder: pathlib.Path, parts: list[Part]) -> bool:
    path = folder / "done"
    return path.is_file() and {part.line for part in parts} <= set(path.read_text().splitlines(keepends=True))


def _fill(
    folder: pathlib.Path, parts: list[Part], resolution: int, seed: int, sizes: Mapping[str, int], threads: int
) -> int:
    """Makes the parts that are not done, and returns how many images these have."""
    with _journal(folder) as journal:
        done = set(journal.readlines())
        missing = [part for part in parts if part.line not in done]
        _check_space(folder, sum(sizes.values()) * (resolution**2 + 1))
        mode = "r+" if done else "w+"
        splits = {split: _open(folder, split, n, resolution, mode) for split, n in sizes.items()}
        title = f"{resolution} x {resolution} pixels into {folder}"
        journal.write("\n")  # what was killed may have left half a line
        for part in _made(missing, _maker(splits, resolution, seed), threads, title):
            for array in splits[part.split]:
                array.flush()
            journal.write(part.line)
            journal.flush()
    return sum(part.count for part in missing)


def _maker(splits: Mapping[str, Split], resolution: int, seed: int) -> Callable[[Part], Part]:
    def make(part: Part) -> Part:
        from experiments.datasets.pathfinder.images import generate

        images, labels = splits[part.split]
        rows = slice(part.first, part.first + part.count)
        drawn, labels[rows] = generate(resolution, seed, *part)
        images[rows, ..., 0] = drawn
        return part

    return make


def _made(missing: list[Part], make: Callable[[Part], Part], threads: int, title: str) -> Iterator[Part]:
    """The parts as they are finished; what is left when the caller stops is not begun."""
    if not missing:
        return
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise ValueError("Pathfinder images are drawn by numba, which is missing; run: pip install numba") from error
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    try:
        with _bar(title, sum(part.count for part in missing)) as advance:
            for future in as_completed([pool.submit(make, part) for part in missing]):
                yield future.result()
                advance(future.result().count)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """On a terminal a bar; elsewhere one line."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    if not sys.stderr.isatty():
        print(f"drawing {total:,} images of {title}", file=sys.stderr, flush=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda count: progress.advance(bar, count)


@contextmanager
def _journal(folder: pathlib.Path) -> Iterator[TextIO]:
    """The file `done`, to read and to add to; only one process has it at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = (folder / "done").open("a+")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    with journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        journal.seek(0)
        yield journal


def _open(folder: pathlib.Path, split: str, n: int, resolution: int, mode: str) -> Split:
    return Split(
        _mapped(folder / f"{split}-images.npy", (n, resolution, resolution, 1), mode),
        _mapped(folder / f"{split}-labels.npy", (n,), mode),
    )


def _mapped(path: pathlib.Path, shape: tuple[int, ...], mode: str) -> np.memmap:
    remedy = f"delete {path.parent}, and it is made again"
    try:
        if mode != "w+":
            array = np.lib.format.open_memmap(path, "r")  # "r+" would fill up a file that was cut short
        if mode != "r":
            array = np.lib.format.open_memmap(path, mode, np.uint8, shape)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); {remedy}") from error
    if (array.shape, array.dtype) != (shape, np.uint8):
        raise ValueError(f"{path}: {array.dtype}{list(array.shape)}, expected uint8{list(shape)}; {remedy}")
    return array


def _check_space(folder: pathlib.Path, size: int) -> None:
    missing = size - sum(512 * file.stat().st_blocks for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ValueError(f"{folder} needs {missing / 1e6:,.0f} MB more, and its disk has {free / 1e6:,.0f} MB left")
