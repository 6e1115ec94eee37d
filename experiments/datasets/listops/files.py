"""The expressions of a seed in a folder of packed arrays, which a generation that was stopped goes on to fill."""

import itertools
import os
import pathlib
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experiments.datasets.listops.expressions import Expressions, Limits, expressions

ATTEMPTS = 2**15  # in one file: about 2,600 expressions of the benchmark's lengths


def folder_name(seed: int, limits: Limits) -> str:
    own = "" if limits == Limits() else "-".join(map(str, ("", *limits)))
    return f"listops-v1-seed{seed}{own}"


def generate(folder: pathlib.Path, seed: int, limits: Limits, total: int) -> Expressions:
    """The seed's first `total` expressions, from the folder's files; those that are missing or damaged are made.

    File i holds what attempts i ATTEMPTS, ... of the seed gave. Raises ValueError where the disk is too full, or no
    expression is within the limits.
    """
    from rich.console import Console
    from rich.progress import Progress

    workers = os.cpu_count() or 1
    parts, count = [], 0
    _check_space(folder, total * (limits.min_length + limits.max_length) // 2)
    display = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with ThreadPoolExecutor(workers) as pool, display:
        bar = display.add_task(f"ListOps of seed {seed}", total=total)
        for first in itertools.count(step=workers):
            if count >= total:
                break
            for part in pool.map(lambda i: _file(folder, i, seed, limits), range(first, first + workers)):
                parts.append(part)
                count += len(part.lengths)
                display.update(bar, completed=count)
            if not count:
                raise ValueError(f"listops: {workers * ATTEMPTS:,} attempts gave no expression within {limits}")
    return taken(Expressions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))), 0, total)


def taken(part: Expressions, start: int, end: int) -> Expressions:
    ends = np.cumsum(part.lengths)
    first, last = (int(ends[i - 1]) if i else 0 for i in (start, end))
    return Expressions(part.tokens[first:last], part.lengths[start:end], part.values[start:end])


def split(pool: Expressions, sizes: tuple[int, ...]) -> list[Expressions]:
    """One part after another."""
    ends = np.cumsum(sizes).tolist()
    return [taken(pool, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _file(folder: pathlib.Path, i: int, seed: int, limits: Limits) -> Expressions:
    path = folder / f"{i:05d}.npz"
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return Expressions(**arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        part = expressions(seed, i * ATTEMPTS, ATTEMPTS, limits)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        np.savez(file, **part._asdict())
    unfinished.replace(path)
    return part


def _check_space(folder: pathlib.Path, size: int) -> None:
    """Raises ValueError where the folder cannot be made, or its disk has no room for `size` bytes in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"listops: {folder} cannot be made: {error.strerror}") from error
    missing = size - sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ValueError(f"listops: {folder} needs {missing / 1e6:,.0f} MB more, its disk has {free / 1e6:,.0f}")
