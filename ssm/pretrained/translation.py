"""Between config.json and our models, and between published tensors and our parameters, by the tables of `formats`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ssm.language_model import LanguageModel
from ssm.mixers import mixer
from ssm.naming import unknown
from ssm.pretrained.formats import ENDS, FORMATS, HEAD, MODEL_TYPES, NEUTRAL, TENSORS, WITHOUT_MEANING, Change, Format


def architecture(config: Mapping[str, Any]) -> Format:
    """The format that a config.json names. Raises ValueError where it names none, or an unknown one."""
    if names := config.get("architectures"):
        name = names[0]
    elif "d_model" in config:
        name = _get(config, "ssm_cfg.layer", "Mamba1")
    else:
        raise ValueError("config.json names no architecture: it has neither architectures nor d_model")
    if name not in FORMATS:
        raise unknown("architecture", name, FORMATS)
    return FORMATS[name]


def model_of(config: Mapping[str, Any], dtype: str = "float32") -> LanguageModel:
    """The model that a config.json describes, with activations in `dtype`.

    Raises ValueError naming the field that is of the wrong type, or whose value is not supported.
    """
    format = architecture(config)
    for field, allowed in format.fixed.items():
        if (value := _get(config, field, allowed[0])) not in allowed:
            raise ValueError(f"config.json: {field} is {value!r}; only {allowed[0]!r} is supported")
    ours = format.implied | {name: _read(config, *published) for name, published in format.fields.items()}
    if format.layout == "state-spaces":
        _check_ssm_cfg(config, format)
        ours["vocabulary"] += -ours["vocabulary"] % _read(config, "pad_vocab_size_multiple", 8)
    elif format.mixer == "mamba":  # where transformers heeds this field before expand: Falcon-Mamba-7B has 16 there
        inner = _read(config, "intermediate_size", ours["mixer.expand"] * ours["width"])
        if inner % ours["width"]:
            raise ValueError(f"config.json: intermediate_size is {inner}; it must be a multiple of {ours['width']}")
        ours["mixer.expand"] = inner // ours["width"]
    options = {name[6:]: value for name, value in ours.items() if name.startswith("mixer.")}
    rest = {name: value for name, value in ours.items() if not name.startswith("mixer.")}
    return LanguageModel(pattern=format.mixer, mixers={format.mixer: options}, dtype=dtype, **rest)


def _check_ssm_cfg(config, format):
    known = [field for field in (*format.fixed, *(field for field, _ in format.fields.values())) if "." in field]
    known = [field.split(".")[1] for field in known]
    for field in config.get("ssm_cfg") or {}:
        if field not in (*known, *WITHOUT_MEANING):
            raise unknown("field of ssm_cfg", field, known)


def config_of(model: LanguageModel, layout: str) -> dict[str, Any]:
    """The config.json of a model in a layout, every field that has a meaning here written out.

    Raises ValueError where the layout has no place for what the model computes.
    """
    if layout not in (layouts := {format.layout for format in FORMATS.values()}):
        raise unknown("layout", layout, layouts)
    if len(set(model.pattern.split())) != 1 or (kind := model.pattern.split()[0]) not in TENSORS:
        raise unknown("pattern of a published layout", model.pattern, TENSORS)
    module = mixer(kind, model.width, model.mixers.get(kind, {}), parent=None)
    ours = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    ours |= {f"mixer.{f.name}": getattr(module, f.name) for f in dataclasses.fields(module)}
    plain = {f"mixer.{f.name}": f.default for f in dataclasses.fields(module) if f.name not in NEUTRAL}

    def misfits(name):
        expected = {key: value for key, value in plain.items() if key not in FORMATS[name].fields}
        return [key for key, value in (expected | FORMATS[name].implied).items() if ours[key] != value]

    fitting = [name for name, f in FORMATS.items() if (f.layout, f.mixer) == (layout, kind)]
    if wrong := misfits(name := min(fitting, key=lambda name: len(misfits(name)))):
        raise ValueError(f"{name} of the {layout} layout has no place for {wrong[0]}={ours[wrong[0]]!r}")
    return _written(name, ours)


def _written(name: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    format = FORMATS[name]
    config = {"model_type": MODEL_TYPES[name], "architectures": [name]} if name in MODEL_TYPES else {}
    if format.layout == "state-spaces":
        config["pad_vocab_size_multiple"] = 1
    if name == "Mamba2ForCausalLM":
        config["num_heads"] = ours["width"] * ours["mixer.expand"] // ours["mixer.head_size"]
    pairs = [(field, allowed[0]) for field, allowed in format.fixed.items()]
    pairs += [(field, "auto" if ours[key] is None else ours[key]) for key, (field, _) in format.fields.items()]
    for field, value in pairs:
        if _get(config, field, value) != value:
            raise ValueError(f"{name} has one field {field} for both {_get(config, field, None)!r} and {value!r}")
        outer, _, inner = field.rpartition(".")
        (config.setdefault(outer, {}) if outer else config)[inner] = value
    return config


class Row(NamedTuple):
    """Where a published tensor goes."""

    path: str
    change: Change
    shape: tuple[int, ...]  # as published


def rows(model: LanguageModel, format: Format) -> dict[str, Row]:
    """Every tensor of a model in its published form, by its published name.

    Raises ValueError for a parameter that the layout has no place for.
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    found = {}
    for path, leaf in flatten_dict(variables["params"], sep="/").items():
        block = re.fullmatch(r"block_(\d+)/(.+)", path)
        table, key = (TENSORS[format.mixer], block[2]) if block else (ENDS, path)
        if key not in table:
            raise ValueError(f"the {format.layout} layout of {format.mixer} has no place for {path}")
        name, change = table[key]
        name = f"backbone.layers.{block[1]}.{name}" if block else name.format(embedding=format.embedding)
        found[name] = Row(path, change, change.write(np.broadcast_to(np.float32(0), leaf.shape)).shape)
    if model.tie_embeddings:
        found[HEAD] = found[ENDS["embedding/embedding"][0].format(embedding=format.embedding)]
    return found


# Fields of config.json, where "a.b" is field b of the object a ------------------------------------


def _get(config: Mapping[str, Any], field: str, default: Any) -> Any:
    outer, _, inner = field.rpartition(".")
    place = (config.get(outer) or {}) if outer else config
    value = place.get(inner)
    return default if value is None else value


def _read(config: Mapping[str, Any], field: str, default: Any) -> Any:
    """A field in the type of its default."""
    value = _get(config, field, default)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(float(v["__float__"] if isinstance(v, dict) else v) for v in value)  # as transformers writes inf
    if value == default == "auto":
        return None
    allowed = {float: (float, int), str: int}.get(type(default), type(default))
    if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"config.json: {field} is {value!r}; it must be like {default!r}")
    return value
