"""Folders of published tensors: safetensors or PyTorch files, whole or in shards, and where they come from."""

import json
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

Tensors = Iterator[tuple[str, np.ndarray]]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FETCHED = ("config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json")
FETCHED_OTHERWISE = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def locate(path_or_name: str | os.PathLike) -> pathlib.Path:
    """The folder of a checkpoint: a path, or the copy of a model of the Hugging Face hub, named ORG/NAME.

    Of the hub only config.json, tokenizer.json and the weights are fetched, as safetensors where there are any.
    Raises ValueError where there is neither.
    """
    path = pathlib.Path(path_or_name)
    if path.is_dir():
        return path
    if isinstance(path_or_name, os.PathLike) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path_or_name):
        raise ValueError(f"{path} is neither a folder nor the name ORG/NAME of a model of the Hugging Face hub")
    return _fetch(path_or_name)


def _fetch(name: str) -> pathlib.Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{name} is not a folder; to download it, pip install huggingface_hub") from error
    try:
        folder = pathlib.Path(snapshot_download(name, allow_patterns=FETCHED))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=FETCHED_OTHERWISE)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is not a folder and cannot be downloaded: {_first_line(error)}") from error
    return folder


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError where it is absent or is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; it must hold a JSON object")
    return value


def read(folder: pathlib.Path) -> Tensors:
    """Name and value of every tensor, one at a time, in its own dtype.

    Raises ValueError naming the file that is missing or damaged, or the package that reading it needs.
    """
    for name, reader in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_torch)):
        if (folder / name).is_file():
            yield from reader(folder / name)
            return
        if (index := folder / f"{name}.index.json").is_file():
            yield from _read_shards(index, reader)
            return
    raise ValueError(f"{folder} has no weights: no model.safetensors or pytorch_model.bin, nor the index of either")


def _read_shards(index: pathlib.Path, reader: Callable[[pathlib.Path], Tensors]) -> Tensors:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index} has no weight_map")
    for file in sorted(set(shards.values())):
        if not (path := index.with_name(file)).is_file():
            raise ValueError(f"{path} does not exist, although {index.name} lists it")
        yield from reader(path)


def _read_safetensors(path: pathlib.Path) -> Tensors:
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def _read_torch(path: pathlib.Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path} is a PyTorch file; to read it, pip install torch") from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of many types, for a file that is not what torch.save wrote
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f"{path} cannot be read: it is no table of tensors")
    for name, tensor in tensors.items():
        half = tensor.dtype == torch.bfloat16
        yield name, tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if half else tensor.numpy()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def write(folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """config.json and model.safetensors in a new folder, which appears once both are whole.

    Raises ValueError where the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; nothing was written")
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        safetensors.numpy.save_file(dict(tensors), temporary / "model.safetensors", metadata={"format": "pt"})
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise
