"""The errors that `kernels_pallas.accuracy` prints are errors."""

import json
import sys

import jax
import numpy as np
import pytest

from kernels_pallas import accuracy


def tiny(wrong: str | None = None):
    """One case: y = a x whose "xla" form is off by 1 % in what `wrong` names."""

    def function(implementation):
        factor = lambda name: 1.01 if (implementation, name) == ("xla", wrong) else 1.0  # noqa: E731

        @jax.custom_vjp
        def run(p):
            return p["a"] * p["x"] * factor("outputs")

        run.defvjp(lambda p: (run(p), p), lambda p, bar: ({"a": bar * p["x"] * factor("a"), "x": bar * p["a"]},))
        return run

    inputs = dict(a=np.arange(1.0, 4), x=np.array([1.0, -2, 0.3]))
    yield accuracy.Case("tiny", "N3", "float32", 9, function, inputs, (), ("xla",))


@pytest.mark.parametrize("wrong", [None, "outputs", "a"])
def test_an_error_is_found_and_named(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accuracy, "OPERATIONS", {"tiny": lambda: tiny(wrong)})
    monkeypatch.setattr(sys, "argv", ["accuracy", "--json", str(tmp_path / "out.jsonl")])
    assert accuracy.main() == (wrong is not None)
    record = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    for name in ("outputs", "a", "x"):
        assert record["error"][name] == (pytest.approx(0.01, rel=1e-3) if name == wrong else pytest.approx(0, abs=1e-7))
    assert ("PAST: " + (wrong or "") in capsys.readouterr().out) == (wrong is not None)
