"""The table and the figure of what kernels cost are their records, and nothing else."""

import json

from experiments import costs, plots


def record(**fields):
    scan = dict(
        op="associative_scan", shape="B1024 L1024 N2 float32", device="GPU", implementation="gpu", baseline="xla"
    )
    return scan | {"milliseconds": 1.0, "baseline_milliseconds": 2.0, "pass": "forward"} | fields


def test_the_fastest_implementation_beside_its_baseline(tmp_path):
    """Fastest with its gradient, though another is forward alone; a measurement made again replaces the first."""
    both = {"pass": "forward+backward", "baseline_milliseconds": 9.0}
    lines = [
        record(milliseconds=77.0),
        record(),
        record(milliseconds=3.0, **both),
        record(implementation="xla", milliseconds=0.5),
        record(implementation="xla", milliseconds=9.0, **both),
        {key: value for key, value in record(**{"pass": "accuracy"}).items() if key != "milliseconds"},
    ]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = costs.table(costs.read(tmp_path)).splitlines()[2:]
    assert row == ["| associative_scan | B1024 L1024 N2 float32 | GPU | gpu | 1 ms (2.0 x) | 3 ms (3.0 x) | xla |"]


def test_one_layer_on_every_backend():
    """The CPU's run says which shapes; a kernel's estimate is its iterations, each as long as what bounds it.

    A whole training step is no layer.
    """
    layer = {"command": "benchmark --shapes layer", "device": "cpu", "implementation": "xla", "shape": "B2 L8 H4 x"}
    both = {"pass": "forward+backward", "milliseconds": 5.0}
    loop = dict(device="v5e", shape="B2 L8 H4 x, precision high", tokens_per_iteration=16, nanoseconds_compute=3e6)
    loop |= {"nanoseconds_memory": 2e6, "estimate": True, "implementation": "tpu"}
    estimates = [
        {k: v for k, v in record(**loop, **{"pass": p}).items() if "milliseconds" not in k}
        for p in ("forward", "adjoint")
    ]
    gpu = [record(device="NVIDIA H200 (x)", shape="B2 L8 H4 x"), record(device="NVIDIA H200", shape="B2 L9 H4 x")]
    step = record(op="training_step", device="1 x NVIDIA H200", shape="B1 L2 step", **both)
    records = [record(**layer), record(**layer | both), *gpu, *estimates, step]
    assert costs.layers([{"command": "benchmark"} | r for r in records]).splitlines()[2:] == [
        "| associative_scan | B2 L8 H4 x | 1 / 5 ms (xla) | 1 / - ms (gpu) | 12 / 24 ms |",
    ]


def test_other_projects_beside_ours():
    """Only where another project was timed, and of ours the kernel."""
    theirs = {k: v for k, v in record(implementation="other 1.0", milliseconds=2.5).items() if "baseline" not in k}
    both = {"pass": "forward+backward", "milliseconds": 7.0}
    records = [theirs, theirs | both | {"note": "core only"}, record(), record(implementation="xla")]
    records += [record(shape="B1 L2 N3")]
    assert costs.peers(records).splitlines()[2:] == [
        "| associative_scan | B1024 L1024 N2 float32 | **ours** | 1 ms |  |  |",
        "| associative_scan | B1024 L1024 N2 float32 | other 1.0 | 2.5 ms | 7 ms |  |",
    ]
    assert "other" not in costs.table(records)


def test_training_steps_beside_their_baseline():
    both = {"pass": "forward+backward", "op": "training_step", "device": "H200", "baseline": "chunked"}
    records = [
        record(
            **both, milliseconds=200.0, baseline_milliseconds=200.0, implementation="chunked", tokens_per_second=500
        ),
        record(**both, milliseconds=80.0, baseline_milliseconds=200.0, tokens_per_second=1250, share_of_peak=0.347),
        record(),
    ]
    assert costs.training(records).splitlines()[2:] == [
        "| B1024 L1024 N2 float32 | H200 | gpu | 80 ms (2.5 x chunked) | 1,250 | 35 % |",
        "| B1024 L1024 N2 float32 | H200 | chunked | 200 ms (1.0 x chunked) | 500 |  |",
    ]


def test_the_figure_has_one_amount_of_tokens():
    lengths = [record(shape=f"B{2**20 // n} L{n} N2", milliseconds=float(n)) for n in (2**20, 2**10)]
    other = [record(shape="B1 L64 N2"), record(op="long_convolution", shape="B1 L1048576 H2")]
    assert costs.by_length(lengths + other) == {"gpu, forward": [(2**10, 2.0**10), (2**20, 2.0**20)]}


def test_the_figure_is_drawn(tmp_path):
    plots.cost(tmp_path / "length.svg", {"gpu, forward": [(1, 2.0), (2, 4.0)], "xla, forward": [(1, 3.0)]}, "a title")
    assert "a title" in (tmp_path / "length.svg").read_text() and len(list(tmp_path.iterdir())) == 1
