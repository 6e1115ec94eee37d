"""Draws Pathfinder images ahead of a training, or a sheet of them to look at.

    python -m experiments.datasets.pathfinder generate --resolution=128 --data-dir=DIR [--images=200000] [--threads=16]
    python -m experiments.datasets.pathfinder sheet --resolution=128 --output=FILE.png

`generate` fills the folder of data_dir that the tasks pathfinder and pathx read (config.task.data_dir), 8 : 1 : 1 for
train, validation and test, and goes on where an earlier one was stopped. On the sheet the left half has label 1, the
discs on one contour, and the right half label 0.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from experiments import commandline
from experiments.datasets.pathfinder import files
from experiments.datasets.pathfinder.parameters import PARAMETERS

ROWS, COLUMNS = 4, 4  # of either label


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv[1:])
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.datasets.pathfinder", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True)
    generating, drawing = commands.add_parser("generate"), commands.add_parser("sheet")
    for command, run in ((generating, generate), (drawing, sheet)):
        command.add_argument("--resolution", type=int, choices=PARAMETERS, required=True)
        command.add_argument("--seed", type=int, default=0)
        command.set_defaults(run=run)
    generating.add_argument("--data-dir", type=pathlib.Path, required=True)
    generating.add_argument("--images", type=int, default=sum(files.SIZES.values()), help="of all splits")
    generating.add_argument("--threads", type=int, default=0, help="0: one per core")
    drawing.add_argument("--output", type=pathlib.Path, required=True, help="a .png file")
    return parser


def generate(arguments: argparse.Namespace) -> int:
    held_out = arguments.images // 10
    if held_out < 1:
        raise ValueError(f"--images={arguments.images} must be at least 10")
    sizes = dict(zip(files.SIZES, (arguments.images - 2 * held_out, held_out, held_out), strict=True))
    folder = arguments.data_dir / files.folder_name(arguments.resolution, arguments.seed, sizes)
    made = files.generate(folder, arguments.resolution, arguments.seed, sizes, arguments.threads)
    speed = f" in {made.seconds:.1f} s, {made.drawn / made.seconds:,.0f} a second" if made.drawn else ""
    print(f"{folder}: {arguments.images:,} images, of which {made.drawn:,} were drawn now{speed}")
    return 0


def sheet(arguments: argparse.Namespace) -> int:
    from PIL import Image

    from experiments.datasets.pathfinder.images import generate

    images, labels = generate(arguments.resolution, arguments.seed, "train", 0, 8 * ROWS * COLUMNS)
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=96)
    halves = [_mosaic(framed[labels == label][: ROWS * COLUMNS]) for label in (1, 0)]
    gap = np.full((len(halves[0]), 8), 255, np.uint8)
    Image.fromarray(np.concatenate([halves[0], gap, halves[1]], 1)).save(arguments.output)
    print(f"{arguments.output}: {ROWS * COLUMNS} images of label 1, and {ROWS * COLUMNS} of label 0 right of the bar")
    return 0


def _mosaic(images: np.ndarray) -> np.ndarray:
    n = images.shape[1]
    return images.reshape(ROWS, COLUMNS, n, n).swapaxes(1, 2).reshape(ROWS * n, COLUMNS * n)


if __name__ == "__main__":
    sys.exit(commandline.run(main))
