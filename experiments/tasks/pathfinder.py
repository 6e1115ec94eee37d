"""Pathfinder and Path-X: a picture read pixel by pixel; are two discs at the ends of one dashed contour, or of two?

1,024, 4,096, 16,384 (Path-X) or 65,536 steps, 2 classes: Long Range Arena (arXiv:2011.04006), after Linsley et al.
2018. Sources (`config.task.source`):
    generated    drawn from `seed` by `experiments.datasets.pathfinder`, by the algorithm and with the parameters of the
                 benchmark, into a folder of data_dir that is then mapped into memory; a generation that was stopped
                 goes on where it was. Not the benchmark's own images.
    lra_release  the benchmark's images of contours of 14 paddles, pathfinder32 to pathfinder256 in data_dir, which is
                 the inner of the two folders named lra_release; in the order of their metadata
Labels: 1 for one contour. Splits follow each other, with 80, 10 and 10 % of the images in the benchmark. Pixels are
stored as bytes, and a model reads them from -1 to 1, as in the S4 line: (x / 255 - 0.5) / 0.5.
"""

import dataclasses
import io
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experiments.datasets.pathfinder import files
from experiments.datasets.pathfinder.parameters import parameters
from experiments.tasks.base import Examples, StandardisedTask
from ssm import naming

RESOLUTIONS = {"pathfinder": 32, "pathx": 128}
CONDITION = "curv_contour_length_14"  # the "hard" one
MIDDLE = 127.5  # of a pixel's 255, and half of its range
Data = dict[str, Examples]


@dataclasses.dataclass(frozen=True)
class Options:
    """resolution: 32, 64, 128 or 256 pixels, 0 for the task's usual one; examples: of train, validation and test."""

    name: str
    resolution: int = 0
    source: str = "generated"
    data_dir: str = "data"
    seed: int = 0
    examples: tuple[int, int, int] = tuple(files.SIZES.values())

    def load(self) -> StandardisedTask:
        sources = {"generated": self._generated, "lra_release": self._released}
        if self.source not in sources:
            raise naming.unknown("task source", self.source, sources)
        if len(self.examples) != 3 or min(self.examples) < 1 or not 0 <= self.seed < 2**63:
            raise ValueError(
                f"task {self.name}: examples={self.examples} must be three numbers of at least 1, and seed={self.seed}"
                " a number of at least 0"
            )
        resolution = parameters(self.resolution or RESOLUTIONS[self.name]).resolution
        origin, data = sources[self.source](resolution)
        sizes = ", ".join(f"{len(examples.targets):,} {split}" for split, examples in data.items())
        source = f"Pathfinder {resolution} x {resolution}, {origin} ({sizes})"
        return StandardisedTask("continuous", 1, 2, source, data, mean=(MIDDLE,), std=(MIDDLE,))

    def _generated(self, resolution: int) -> tuple[str, Data]:
        sizes = dict(zip(files.SIZES, self.examples, strict=True))
        folder = pathlib.Path(self.data_dir).expanduser() / files.folder_name(resolution, self.seed, sizes)
        splits = files.generate(folder, resolution, self.seed, sizes).splits
        data = {name: Examples(split.images, split.labels.astype(np.int32)) for name, split in splits.items()}
        return f"seed {self.seed} in {folder}", data

    def _released(self, resolution: int) -> tuple[str, Data]:
        folder = released_folder(pathlib.Path(self.data_dir).expanduser(), resolution)
        rows = metadata(folder)
        if len(rows) < sum(self.examples):
            raise ValueError(f"{folder}: {len(rows):,} images, fewer than examples={self.examples}")
        data, end = {}, 0
        for split, n in zip(files.SIZES, self.examples, strict=True):
            data[split], end = read_images(rows[end : end + n], resolution), end + n
        return str(folder), data


# The benchmark's files -----------------------------------------------------------------------------


def released_folder(data_dir: pathlib.Path, resolution: int) -> pathlib.Path:
    """The images' folder. Raises ValueError where data_dir is not the inner lra_release, or has none."""
    title, inner = f"pathfinder{resolution}", data_dir / "lra_release"
    if inner.is_dir():
        raise ValueError(
            f"data_dir={str(data_dir)!r} is the outer of two folders, whose pathfinder128 is a wrong early version of"
            f" which no model learns anything; use data_dir={str(inner)!r}"
        )
    folder = data_dir / title / CONDITION
    if not (folder / "metadata").is_dir():
        raise ValueError(
            f"{folder / 'metadata'} is not a folder; data_dir is the inner lra_release, which has {title} in it"
        )
    return folder


def metadata(folder: pathlib.Path) -> list[tuple[pathlib.Path, int]]:
    """Image and label of each row of metadata/NUMBER.npy, which are text: folder, file, number, label, ...

    Raises ValueError naming the file and the row that is not such a row, or that there is none.
    """
    rows = []
    for path in sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.name), path.name)):
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as text ({error}); extract the release again") from error
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise ValueError(f"{path}, row {number}: {line[:60]!r} is not folder, file, number and label")
            rows.append((folder / fields[0] / fields[1], int(fields[3])))
    if not rows:
        raise ValueError(f"{folder / 'metadata'} names no images; extract the release again")
    return rows


def read_images(rows: list[tuple[pathlib.Path, int]], resolution: int) -> Examples:
    """Grey pictures, decoded by all cores. Raises ValueError naming one that is damaged or of another size."""
    images = np.empty((len(rows), resolution, resolution, 1), np.uint8)

    def read(i: int) -> None:
        images[i, ..., 0] = _read_image(rows[i][0], resolution)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(read, range(len(rows)), chunksize=1000):
            pass
    return Examples(images, np.array([label for _, label in rows], np.int32))


def _read_image(path: pathlib.Path, resolution: int) -> np.ndarray:
    from PIL import Image

    try:
        picture = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read ({error}); extract the release again") from error
    if picture.shape != (resolution, resolution):
        raise ValueError(
            f"{path}: {picture.shape[1]} x {picture.shape[0]} pixels, expected {resolution} x {resolution}"
        )
    return picture
