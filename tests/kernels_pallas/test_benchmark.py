"""The benchmark measures what it names, against a baseline of the same run."""

import json
import sys

import numpy as np
import pytest

from kernels_pallas import benchmark
from kernels_pallas.associative_scan import specs as scan_specs
from kernels_pallas.long_convolution import specs as convolution_specs
from tests.oracles import assert_close

TINY = {
    "associative_scan": (scan_specs.Spec(1, 8, 2, "complex", False), scan_specs.Spec(1, 8, 2, "real", True)),
    "long_convolution": (convolution_specs.Spec(1, 8, 2, 3),),
}


@pytest.mark.parametrize("op", benchmark.OPERATIONS)
def test_implementations_compute_the_same(op):
    """A ratio of two times means something only where both make the same numbers."""
    cases, _ = benchmark.OPERATIONS[op]
    for case in cases(TINY[op]):
        for planes in zip(
            *(np.atleast_1d(case.functions[name](*case.inputs)) for name in ("reference", "xla")), strict=True
        ):
            assert_close(planes[1], planes[0], scale=8)


def test_the_fft_baseline_is_a_causal_convolution():
    u, K = benchmark.normal(0, 2, 8, 3), benchmark.normal(1, 3, 8)
    expected = [[np.convolve(u[b, :, d], K[d])[:8] for d in range(3)] for b in range(2)]
    assert_close(benchmark.fft(u, K), np.array(expected).transpose(0, 2, 1), scale=8)


def test_records(monkeypatch, tmp_path, capsys):
    for op, (_, specs) in benchmark.OPERATIONS.items():
        monkeypatch.setattr(specs, "CPU", TINY[op])
    monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(tmp_path / "out.jsonl")])
    benchmark.main()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 2 * 2 + 2 * 3 == len(capsys.readouterr().out.splitlines()) - 1
    for record in records:
        if record["implementation"] == record["baseline"]:
            assert record["milliseconds"] == record["baseline_milliseconds"] > 0
    assert {record["pass"] for record in records} == {"forward", "forward+backward"}
