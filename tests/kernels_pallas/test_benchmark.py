"""The benchmark measures what it names, against a baseline of the same run."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import benchmark
from kernels_pallas.cases import (
    OPERATIONS,
    convolution,
    diagonal,
    duality,
    duality_step_specs,
    fft,
    normal,
    scan,
    selective,
    selective_step_specs,
    short,
    trapezoid,
)
from tests.oracles import assert_close

TINY = {
    "associative_scan": (scan.specs.Spec(1, 8, 2, "complex", False), scan.specs.Spec(1, 8, 2, "real", True)),
    "long_convolution": (convolution.specs.Spec(1, 8, 2, 3), convolution.specs.Spec(1, 8, 2, 3, True)),
    "diagonal_system": (diagonal.specs.Spec(1, 8, 2, 3),),
    "selective_scan": (selective.specs.Spec(1, 8, 2, 3, "float32"),),
    "selective_scan_step": (selective_step_specs.Spec(1, 2, 3, "float32"),),
    "ssd_step": (duality_step_specs.Spec(1, 2, 3, 1, 4, 2, 1, "float32"),),
    "short_convolution": (short.specs.Spec(1, 8, 2, 3, "float32"),),
    "mamba3": (trapezoid.specs.Spec(1, 8, 2, 2, 3, 1, 8, "float32"),),
    "ssd": (duality.specs.Spec(1, 8, 2, 3, 1, 4, "float32"),),
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_implementations_compute_the_same(op):
    """A ratio of two times means something only where both make the same numbers."""
    cases, _ = OPERATIONS[op]
    for case in cases(TINY[op]):
        expected = case.function("reference")(*case.inputs)
        for name in {*case.implementations} - {"fft"}:
            for out, ref in zip(*map(jax.tree.leaves, (case.function(name)(*case.inputs), expected)), strict=True):
                assert_close(out, ref, scale=8)


def test_the_fft_baseline_is_a_causal_convolution():
    u, K = normal(0, 2, 8, 3), normal(1, 3, 8)
    expected = [[np.convolve(u[b, :, d], K[d])[:8] for d in range(3)] for b in range(2)]
    assert_close(fft(u, K), np.array(expected).transpose(0, 2, 1), scale=8)
    assert_close(fft(jnp.transpose(u, (2, 0, 1)), K, True), np.array(expected).transpose(1, 0, 2), scale=8)


def test_records(monkeypatch, tmp_path, capsys):
    for op, (_, specs) in OPERATIONS.items():
        monkeypatch.setattr(specs, "CPU", TINY[op])
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(tmp_path / "out.jsonl")])
    benchmark.main()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 2 * (2 * 2 + 2 * 2 + 5) + 2 == len(capsys.readouterr().out.splitlines()) - 1
    for record in records:
        if record["implementation"] == record["baseline"]:
            assert record["milliseconds"] == record["baseline_milliseconds"] > 0
    assert {record["pass"] for record in records} == {"forward", "forward+backward"}
