"""Measurements as lines of JSON: what each of them says, and how it is kept."""

import datetime
import json
import platform

import jax


def about(module: str, op: str | None, shapes: str | None = None) -> dict:
    """What every record says: the device, versions, date and command."""
    return dict(
        device=f"{jax.devices()[0].device_kind} ({platform.machine()}, {platform.system()})",
        versions=dict(python=platform.python_version(), jax=jax.__version__),
        date=datetime.date.today().isoformat(),
        command=f"python -m kernels_pallas.{module}"
        + (f" --op {op}" if op else "")
        + (f" --shapes {shapes}" if shapes else ""),
    )


def append(path: str | None, record: dict) -> None:
    """Adds a line to the file, where one is given."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
