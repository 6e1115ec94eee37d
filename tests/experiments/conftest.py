"""A tiny data set in the official MNIST files, and runs of the tiny model in this process."""

import pathlib

import numpy as np
import pytest

from experiments import commandline, setup, train
from tests.experiments import tiny

CONFIG = str(pathlib.Path(tiny.__file__))


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(folder: pathlib.Path, train: int = 40, test: int = 20) -> pathlib.Path:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for prefix, n in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", generator.integers(0, 256, (n, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", generator.integers(0, 10, n))
    return folder


@pytest.fixture(scope="session")
def mnist(tmp_path_factory) -> pathlib.Path:
    return write_mnist(tmp_path_factory.mktemp("data") / "mnist")


@pytest.fixture
def run(mnist, monkeypatch):
    """run(workdir, "train_steps=3", ...) -> exit status of the training program with the tiny model."""
    monkeypatch.setattr(setup, "build_model", tiny.build_model)

    def call(workdir: pathlib.Path, *fields: str, flags: tuple[str, ...] = ()) -> int:
        overrides = [f"--config.{field}" for field in (f"task.data_dir={mnist}", *fields)]
        return commandline.run(train.main, ["train", f"--config={CONFIG}", f"--workdir={workdir}", *overrides, *flags])

    return call
