"""Errors that name what was given, what is allowed, and the nearest allowed name."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def unknown(kind: str, given: Any, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not one of `allowed`.

    >>> unknown("rule", "zho", ["zoh", "dirac"])
    ValueError("unknown rule 'zho'; did you mean 'zoh'? Allowed: dirac, zoh")
    """
    allowed = sorted(set(allowed))
    nearest = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return ValueError(f"unknown {kind} {given!r}{hint} Allowed: {', '.join(allowed)}")


def build(kind: str, cls: type, options: Mapping[str, Any], /, **fixed: Any) -> Any:
    """`cls(**options, **fixed)` for a dataclass `cls`, where a misspelt option gets `unknown`'s error.

    `fixed` are the fields that the caller decides; they are not options.
    """
    fields = {f.name for f in dataclasses.fields(cls) if f.init} - {"parent", "name"} - set(fixed)
    for option in options:
        if option not in fields:
            raise unknown(f"option of {kind}", option, fields)
    return cls(**options, **fixed)


def check_state(mixer: str, state: tuple | None, fitting: tuple) -> None:
    """Raises ValueError where a state is given that is another mixer's, or of other shapes than a fitting one."""
    if state is None:
        return
    if type(state) is not type(fitting):
        kind = type(state)
        raise ValueError(f"state is a {kind.__module__}.{kind.__qualname__}; {mixer} takes its own State")
    for name, given, expected in zip(fitting._fields, state, fitting, strict=True):
        if given.shape != expected.shape:
            raise ValueError(f"state.{name} has shape {given.shape}; this layer and batch have {expected.shape}")
