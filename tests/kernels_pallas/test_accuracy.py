"""The errors that `kernels_pallas.accuracy` prints are errors."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from kernels_pallas import accuracy


def cases(wrong: str | None = None):
    """One case: y = a x whose "xla" form is off by 1 % in what `wrong` names."""

    def tiny(a, x, implementation):
        factor = lambda name: 1.01 if (implementation, name) == ("xla", wrong) else 1.0  # noqa: E731

        @jax.custom_vjp
        def run(a, x):
            return a * x * factor("outputs")

        run.defvjp(lambda a, x: (run(a, x), (a, x)), lambda ax, bar: (bar * ax[1] * factor("a"), bar * ax[0]))
        return run(a, x)

    op = types.ModuleType("kernels_pallas.tiny")
    op.tiny, op.IMPLEMENTATIONS = tiny, ("reference", "xla")

    inputs = dict(a=np.arange(1.0, 4), x=np.array([1.0, -2, 0.3]))
    yield accuracy.Case(op, "N3", "float32", 9, inputs, ())


@pytest.mark.parametrize("wrong", [None, "outputs", "a"])
def test_an_error_is_found_and_named(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accuracy, "OPERATIONS", {"tiny": lambda: cases(wrong)})
    monkeypatch.setattr(sys, "argv", ["accuracy", "--json", str(tmp_path / "out.jsonl")])
    assert accuracy.main() == (wrong is not None)
    record = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    for name in ("outputs", "a", "x"):
        assert record["error"][name] == (pytest.approx(0.01, rel=1e-3) if name == wrong else pytest.approx(0, abs=1e-7))
    assert ("PAST: " + (wrong or "") in capsys.readouterr().out) == (wrong is not None)
