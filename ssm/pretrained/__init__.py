"""Published Mamba checkpoints in and out, as mamba_ssm (state-spaces) and transformers (Hugging Face) lay them out.

    model, variables, *_ = pretrained.load("state-spaces/mamba-130m")  # or a folder
    logits, state = model.apply(variables, tokens_bl)

What is loaded is computed in float32 and saved in the dtypes that it came in: the same bytes, tensor by tensor.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ssm.language_model import LanguageModel, unstack_blocks
from ssm.naming import unknown
from ssm.pretrained import files, translation
from ssm.pretrained.files import locate
from ssm.pretrained.formats import HEAD

__all__ = ["Pretrained", "export", "load", "locate", "save"]


class Pretrained(NamedTuple):
    """A model and what its files say.

    config: all of config.json. dtypes: of each tensor in the files, by its published name.
    """

    model: LanguageModel
    variables: dict[str, Any]
    config: dict[str, Any]
    dtypes: dict[str, str]

    @property
    def layout(self) -> str:
        """ "huggingface" or "state-spaces"."""
        return translation.architecture(self.config).layout


def load(path_or_name: str | os.PathLike, *, dtype: str = "float32") -> Pretrained:
    """The checkpoint in a folder, or that of the model ORG/NAME of the Hugging Face hub. dtype: of activations.

    Raises ValueError naming the file, field or tensor that is missing, damaged, unknown or of another shape.
    """
    folder = locate(path_or_name)
    config = files.read_json(folder / "config.json")
    model = translation.model_of(config, dtype)
    rows = translation.rows(model, translation.architecture(config))
    params, dtypes = {}, {}
    for name, value in files.read(folder):
        if name not in rows:
            raise ValueError(f"{folder}: tensor {name} has no place in the model that config.json describes")
        if value.shape != rows[name].shape:
            raise ValueError(f"{folder}: tensor {name} has shape {value.shape}; expected {rows[name].shape}")
        if value.dtype.name not in files.DTYPES:
            raise ValueError(f"{folder}: tensor {name} is {value.dtype}; supported: {', '.join(files.DTYPES)}")
        dtypes[name] = value.dtype.name
        ours = rows[name].change.read(value).astype(np.float32)
        if (path := rows[name].path) in params and not np.array_equal(params[path], ours, equal_nan=True):
            raise ValueError(f"{folder}: tensor {HEAD} differs from the embedding, although config.json ties them")
        params[path] = jnp.array(ours)
    if missing := sorted(name for name, row in rows.items() if row.path not in params):
        name, more = missing[0], f", with {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"{folder}: tensor {name} of shape {rows[name].shape} is missing{more}")
    return Pretrained(model, {"params": unflatten_dict(params, sep="/")}, config, dtypes)


def save(directory: str | os.PathLike, pretrained: Pretrained) -> None:
    """Writes config.json and model.safetensors to a new folder, which appears once both are whole.

    Raises ValueError where the folder exists and is not empty, or a parameter does not fit the model.
    """
    model, variables, config, dtypes = pretrained
    rows = translation.rows(model, translation.architecture(config))
    params = flatten_dict(variables["params"], sep="/")
    tensors = {}
    for name, dtype in dtypes.items():
        path, change, shape = rows[name]
        value = change.write(np.asarray(params[path]))
        if value.shape != shape:
            raise ValueError(f"parameter {path} as {name} has shape {value.shape}; expected {shape}")
        tensors[name] = np.ascontiguousarray(value, files.DTYPES[dtype])
    files.write(pathlib.Path(directory), config, tensors)


def export(
    model: LanguageModel, variables: Mapping[str, Any], layout: str = "huggingface", *, dtype: str = "float32"
) -> Pretrained:
    """A model of ours, or one from another layout, as it is to be saved in `layout`, "huggingface" or "state-spaces".

    Raises ValueError for what the layout has no place for.
    """
    if dtype not in files.DTYPES:
        raise unknown("dtype", dtype, files.DTYPES)
    params = variables["params"]
    if model.scan_layers:
        model, params = model.clone(scan_layers=False), unstack_blocks(params)
    config = translation.config_of(model, layout)
    names = list(translation.rows(model, translation.architecture(config)))
    if model.tie_embeddings and layout == "huggingface":
        names.remove(HEAD)
    return Pretrained(model, {"params": params}, config, dict.fromkeys(names, dtype))
