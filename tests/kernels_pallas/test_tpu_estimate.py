"""The estimates count what they say: the bundles of one iteration, and the bytes and products of its tokens."""

import json
import sys

import pytest

from kernels_pallas import tpu_estimate
from tests import tpus

SCHEDULE = """
= control target key start
LH: loop header
     0   :  { %s1 = inlined_call_operand.hbm [shape: f32[8,128]] }
   0x1   :  { %2 = vsyncpa [#allocation4], 0 }
   0x2 LB: > { %s3 = sadd.s32 1, %s3  /* a comment
second_minor_factor: 1 */ }
   0x3 LB: >> { %v4 = vld [vmem:[%s1] sm:$0xff] }
   0x4   : >> {}
   0x5   : >> { %v5 = vadd.f32 %v4, %v4  ;;  %9 = sbr.rel (!%p1) target = $region3 }
   0x6   : > { %10 = sbr.rel (!%p2) target = $region2 }
   0x7   :  {}
"""
COUNT = """
import json, sys, tempfile
from kernels_pallas import tpu_estimate as tool

with tempfile.TemporaryDirectory() as folder:
    tool.start(folder)
    import jax
    from jax.experimental import pallas as pl

    def chain(length, after, trips):
        def kernel(x_ref, y_ref):
            def body(_, x):
                for _ in range(length):
                    x = x * x + 1
                return x

            x = jax.lax.fori_loop(0, trips, body, x_ref[...])
            for _ in range(after):
                x = x * x - 1
            y_ref[...] = x

        x = tool.like(8, 128)
        run = lambda x: pl.pallas_call(kernel, out_shape=x)(x)
        loop = tool.Loop("chain", "one register", "float32", "forward", run, (x,), 1024, 8192, (3 * 10**6, 0))
        return tool.estimate(loop, sys.argv[1], folder)

    print(json.dumps([chain(*x) for x in ((4, 0, 100), (64, 0, 100), (64, 40, 200))]))
"""


def test_the_innermost_loop_is_counted():
    """Empty bundles are waits, and count; what is around the loop does not."""
    assert tpu_estimate.count(SCHEDULE) == 3
    assert tpu_estimate.count(SCHEDULE, trips=4) == 2 + 4 * 3


@pytest.mark.parametrize("name", ["v5e", "7x"])
def test_a_longer_body_has_more_bundles_and_nothing_else_has(name):
    """120 more operations, each of which waits for the one before."""
    short, long, beside = json.loads(tpus.run(COUNT, name))
    assert long["bundles"] - short["bundles"] >= 120 and short["bundles"] < 60
    assert beside["bundles"] == long["bundles"]
    clock, share = {"v5e": (1.5, 819), "7x": (2.2, 7370 / 2)}[name]
    assert long["nanoseconds_bundles"] == pytest.approx(long["bundles"] / clock, rel=0.003)
    assert long["nanoseconds_memory"] == pytest.approx(8192 / share, abs=0.06)
    flops = {"v5e": 6e6, "7x": 12e6}[name]  # half of a unit's columns idle in the second
    assert long["nanoseconds_matrix_units"] == pytest.approx(flops / {"v5e": 197e3, "7x": 1153.5e3}[name], abs=0.06)
    assert long["bound"] == "bundles"


def test_bytes_and_products_of_a_token():
    """Of scans the decay where it streams, the inputs and the states, and with gradients two more and a's; of the
    convolution tokens in and out and a share of states, and of products 128 numbers for each of its tables."""
    scans = [x.bytes / x.tokens for x in tpu_estimate.scans()]
    assert scans == [16, 24, 6, 10, 12, 20]
    loops = list(tpu_estimate.convolutions())
    expected = [(3, 0), (3, 0), (2, 3), (9, 0), (9, 0), (6, 9), (18, 0), (18, 0), (6, 9)]
    assert [tuple(k // x.tokens // 128 for k in x.multiplied) for x in loops] == expected
    for loop in loops:
        states = 4 * 64 / 2048 * (2 if loop.which == "gradients" else 1)
        assert loop.bytes / loop.tokens == 2 * {"bfloat16": 2, "float32": 4}[loop.dtype] + states
    for loop in tpu_estimate.selective_scans():
        width, n = {"bfloat16": 2, "float32": 4}[loop.dtype], 64 if "N64" in loop.shape else 16
        shared = {"forward": 2 * 4 * n / 2048, "backward": 4 * n / 64 + 4 * 4 * n / 1024}[loop.which]
        assert loop.bytes / loop.tokens == {"forward": 4, "backward": 7}[loop.which] * width + shared


def test_bytes_and_products_of_a_chunk_of_heads():
    """Forward: x and y, B and C for all heads of a block, three gates; triangles of 128 x 128, and twice the states."""
    first, _, _, last = tpu_estimate.dualities()
    assert first.trips == last.trips == 2
    assert first.tokens == 2 * 128 * 16 and first.bytes == 2 * 128 * (16 * 64 * 4 + 128 * 4 + 16 * 12)
    assert first.multiplied == (int(2 * 128**3 * (8 * (1.5 + 2) + 1.5)), 0)
    assert last.tokens == 2 * 128 * 8 and last.multiplied == (2 * 128**3 * (8 * (2 + 5.5) + 3), 0)


def test_a_record_for_every_loop_and_generation(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tpu_estimate, "start", lambda folder: None)
    monkeypatch.setattr(tpu_estimate, "bundles", lambda function, arrays, topology, folder, trips: len(topology))
    monkeypatch.setattr(tpu_estimate, "version", lambda name: "1")
    monkeypatch.setattr(sys, "argv", ["tpu_estimate", "--json", str(tmp_path / "out.jsonl")])
    tpu_estimate.main()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 5 * (6 + 9 + 6 + 4) == len(capsys.readouterr().out.splitlines())
    assert len({(x["op"], x["shape"], x["pass"], x["device"]) for x in records}) == len(records)
    for x in records:
        assert x["estimate"] and x["bundles"] == len(tpu_estimate.GENERATIONS[x["device"]].topology)
