"""What bounds the kernels for TPUs, without one: an estimate from what the compiler schedules, and no measurement.

    python -m kernels_pallas.tpu_estimate [--json FILE]

A bundle is an instruction word of a TPU's TensorCore: what its scalar, vector, load, store and matrix slots begin in
one cycle; the compiler fixes their order, and waits are words too. The bundles of a kernel's inner loop are thus its
cycles, but for waits that only the hardware knows: for the memory, and for matrix units that take products slower than
they are issued. So beside them stand the time of one iteration's products at the published peak, and that of the bytes
that it streams at the published bandwidth; the longest of the three bounds the loop. A token is one of one channel, or
in state space duality of one head. Where the innermost loop is run a few times by the one around it, an iteration is
one of the latter. What comes once a tile, as the start of its transfers, is not counted. It needs libtpu, and no TPU.
"""

import argparse
import datetime
import itertools
import os
import pathlib
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import jax
from jax.experimental import topologies

from kernels_pallas.associative_scan import specs as scan_specs
from kernels_pallas.associative_scan import tpu as scan
from kernels_pallas.long_convolution import specs as convolution_specs
from kernels_pallas.long_convolution import tpu as convolution
from kernels_pallas.long_convolution.xla import Tables
from kernels_pallas.records import append
from kernels_pallas.selective_scan import specs as selective_specs
from kernels_pallas.selective_scan import tpu as selective
from kernels_pallas.selective_scan import tpu_backward, tpu_forward
from kernels_pallas.selective_scan.tpu_tiles import AT_ONCE, CHANNELS, CHUNK, TILE
from kernels_pallas.ssd import specs as duality_specs
from kernels_pallas.ssd import tpu as duality
from kernels_pallas.ssd import tpu_backward as duality_backward
from kernels_pallas.ssd import tpu_walk as duality_walk


class Generation(NamedTuple):
    """Of a chip; bandwidth and bfloat16 peak as in Google's documentation (docs.cloud.google.com/tpu/docs/v5e, ...)."""

    topology: str
    cores: int
    gigabytes_per_second: float
    teraflops: float
    units: int  # for matrices, in a core
    columns: int  # of a unit, and its rows

    @property
    def gigahertz(self) -> float:
        """The peak over what the units do in a cycle: only v4's clock is published, as 1.05 (Jouppi et al. 2023)."""
        rows = self.columns // 128  # a cycle; in units of 256 columns an assumption: with one, v6e would need 3.5 GHz
        return 1e3 * self.teraflops / (2 * self.cores * self.units * self.columns**2 * rows)


GENERATIONS = {
    "v4": Generation("v4:2x2x1", 2, 1200, 275, 4, 128),
    "v5e": Generation("v5e:2x2", 1, 819, 197, 4, 128),
    "v5p": Generation("v5p:2x2x1", 2, 2765, 459, 4, 128),
    "v6e": Generation("v6e:2x2", 1, 1640, 918, 2, 256),
    "7x": Generation("tpu7x:2x2x1", 2, 7370, 2307, 2, 256),
}


class Loop(NamedTuple):
    """A kernel, and what one iteration of its inner loop takes."""

    op: str
    shape: str
    dtype: str
    which: str
    function: Callable
    arrays: tuple
    tokens: int
    bytes: int
    multiplied: tuple[int, int] = (0, 0)  # pairs of numbers, in products of 128 and of 256 columns
    trips: int = 0  # of the innermost loop, in an iteration of the one around it


def like(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def scans() -> Iterator[Loop]:
    for spec in (*scan_specs.GPU[:2], scan_specs.Spec(8, 4096, 2048, "real", True)):
        p, shape = (2 if spec.number == "complex" else 1), (spec.batch, spec.length, spec.channels)
        b, h = (like(*shape, dtype=spec.dtype),) * p, (like(spec.batch, spec.channels),) * p
        a = b if spec.per_token else (like(spec.channels, dtype=spec.dtype),) * p
        streamed = a if spec.per_token else ()
        for which, function, arrays, moved in (
            ("forward", scan.scan, (a, b, h), (*streamed, *b, *b)),
            ("adjoint", scan.adjoint, (a, h, b, b, h), (*streamed, *streamed, *b, *b, *b)),
        ):
            walk = scan.Walk.of(moved, which == "adjoint")
            tokens = walk.group * walk.rows * walk.lanes
            size = tokens * sum(x.dtype.itemsize for x in moved)
            run = lambda *arrays, function=function: function(*arrays, False)  # noqa: E731
            yield Loop("associative_scan", str(spec), spec.dtype, which, run, arrays, tokens, size)


def convolutions() -> Iterator[Loop]:
    for dtype, precision in (("bfloat16", "default"), ("float32", "high"), ("float32", "highest")):
        yield from passes(convolution_specs.GPU[0], dtype, precision)


def passes(spec, dtype: str, precision: str) -> Iterator[Loop]:
    d, n, q = spec.channels, spec.states, convolution.CHUNK
    x = like(d, spec.batch, spec.length, dtype=dtype)
    walk = convolution.Walk.of(x, n, False)
    tables = Tables(like(d, q, q), like(d, 2 * n, q), like(d, q, 2 * n), (like(d, n), like(d, n)))
    h, states = like(d, spec.batch, 2 * n), like(d // walk.group, walk.grid[2], spec.batch, convolution.LANES)
    tokens = walk.at_once * walk.group * walk.rows * walk.chunks * q
    entering = 4 * walk.at_once * walk.rows * convolution.LANES  # bytes of the states before a tile
    shape = f"{str(spec).replace('float32', dtype)}, precision {precision}"
    sweep, gradients = (x, tables, h), (x, x, tables, states, states)
    for which, function, arrays, reverse, products, count in (
        ("forward", convolution.sweep, sweep, False, (3, 0), convolution.PARTS[precision]),
        ("adjoint", convolution.sweep, sweep, True, (3, 0), convolution.PARTS[precision]),
        ("gradients", convolution.gradients, gradients, False, (2, 3), min(convolution.PARTS[precision], 2)),
    ):
        run = lambda *x, function=function, reverse=reverse: function(*x, reverse, precision)  # noqa: E731
        moved = 2 * tokens * x.dtype.itemsize + entering * (2 if which == "gradients" else 1)
        multiplied = tuple(k * count * (count + 1) // 2 * tokens * q for k in products)
        yield Loop("long_convolution", shape, dtype, which, run, arrays, tokens, moved, multiplied)


def selective_scans() -> Iterator[Loop]:
    """A chunk of tokens of one slice of states an iteration; what every slice is a part of counts as its share."""
    for spec in (selective_specs.GPU[0], *selective_specs.GPU[2:]):
        n, tokens = spec.states, (spec.batch, spec.length, spec.channels)
        x, states, d = like(*tokens, dtype=spec.dtype), like(*tokens[:2], n), like(spec.channels)
        given = dict(x=x, dt=x, A=like(spec.channels, n), B=states, C=states, D=d, dt_bias=d, z=x)
        inputs = jax.eval_shape(lambda given: selective.in_tiles(given, True), given)
        h = jax.eval_shape(selective.in_registers, like(spec.batch, spec.channels, n))
        saved, size, slices = like(spec.batch, spec.length // TILE, *h.shape[1:]), x.dtype.itemsize, h.shape[2]
        forward = lambda *arrays: tpu_forward.forward(*arrays, True, False)  # noqa: E731
        backward = lambda *arrays: tpu_backward.backward(*arrays, True)  # noqa: E731
        for which, function, arrays, groups, streams, kept in (
            ("forward", forward, (inputs, h), tpu_forward.GROUPS, 4, 0),
            ("backward", backward, (inputs, saved, x, h), 1, 7, 4 * n / TILE),
        ):
            count = CHUNK * groups * CHANNELS // slices
            spread = (2 if which == "forward" else 4) * 4 * n * CHUNK // slices  # B and C, and their cotangents
            moved = round(count * (streams * size + kept)) + spread
            trips = CHUNK // AT_ONCE
            yield Loop("selective_scan", str(spec), spec.dtype, which, function, arrays, count, moved, trips=trips)


def dualities() -> Iterator[Loop]:
    """A span of chunks of a block of heads an iteration."""
    for spec in (duality_specs.GPU[0], duality_specs.GPU[2]):
        batch, length, heads, p, groups, n, dtype = spec
        x, B = like(batch, length, heads, p, dtype=dtype), like(batch, length, groups, n, dtype=dtype)
        walk, q = duality_walk.Walk.of(x, B, None, 1), duality_walk.Q
        gates, D, h = (
            like(batch, walk.grid[1], length // q, 3 * walk.heads, q),
            like(heads, p),
            like(batch, n, heads, p),
        )
        states = like(batch, walk.grid[2], n, heads * p, dtype=dtype)
        lanes, size, per_head = walk.tiles * q, x.dtype.itemsize, 4 * q * walk.heads
        square, seen, across = walk.tile.together, (walk.tile.together + 1) / 2, n / q  # products of 128 x 128 x 128
        for which, function, arrays, moved, count in (
            (
                "forward", partial(duality.forward, rank=1, keep=False), (x, gates, B, B, D, h),
                2 * q * (lanes + n) * size + 3 * per_head,
                walk.tiles * (seen + 2 * across) + seen * across,
            ),
            (
                "gradients", partial(duality_backward.gradients, rank=1), (x, gates, B, B, D, x, states, h),
                q * (3 * lanes + 2 * n) * size + n * lanes * size // walk.chunks + 8 * q * n + 5 * per_head,
                walk.tiles * (seen + square + (6 - 1 / walk.chunks) * across) + (2 * seen + square) * across,
            ),
        ):  # fmt: skip
            trips, tokens = walk.chunks, walk.chunks * q * walk.heads
            multiplied = int(trips * count * q**3), 0
            yield Loop("ssd", str(spec), dtype, which, function, arrays, tokens, trips * moved, multiplied, trips)


def bundles(function: Callable, arrays: tuple, topology: str, folder: str, trips: int = 0) -> int:
    """Those of the inner loop of the one kernel in a function; libtpu leaves what it compiles in the folder."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    one = jax.sharding.SingleDeviceSharding(described.devices[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arrays)
    jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
    schedules, kernels = {}, []
    for file in pathlib.Path(folder).iterdir():
        of_what, text = re.match(r"(.*)-\d+-(schedule-analysis_)?final_bundles", file.name), file.read_text()
        file.unlink()
        if of_what and not of_what[2]:
            schedules[of_what[1]] = text
        elif of_what and not of_what[1].endswith("-TLP") and '"tpu_custom_call"' in text:  # TLP: all of a program
            kernels.append(of_what[1])
    (kernel,) = kernels
    return count(schedules[kernel], trips)


def count(schedule: str, trips: int = 0) -> int:
    """The bundles of the innermost loop: each on a line, with an address and a > for every loop around it.

    With trips, those of the loop around it, which runs it so often.
    """
    depths = [len(x) for x in re.findall(r"^ *(?:0|0x[0-9a-f]+) +(?:[A-Z]{2})? *: +(>*) *\{", schedule, re.MULTILINE)]
    inner = depths.count(max(depths))
    return depths.count(max(depths) - 1) + trips * inner if trips else inner


def estimate(loop: Loop, name: str, folder: str) -> dict:
    generation = GENERATIONS[name]
    words = bundles(loop.function, loop.arrays, generation.topology, folder, loop.trips)
    flops = 2 * (loop.multiplied[0] * generation.columns // 128 + loop.multiplied[1])  # some columns may be idle
    times = {
        "bundles": words / generation.gigahertz,
        "matrix units": flops / (1e3 * generation.teraflops / generation.cores),
        "memory": loop.bytes / (generation.gigabytes_per_second / generation.cores),
    }
    return dict(
        op=loop.op, implementation="tpu", shape=loop.shape, dtype=loop.dtype, device=name,
        bundles=words, tokens_per_iteration=loop.tokens,
        nanoseconds_compute=round(max(times["bundles"], times["matrix units"]), 1),
        nanoseconds_bundles=round(times["bundles"], 1), nanoseconds_matrix_units=round(times["matrix units"], 1),
        nanoseconds_memory=round(times["memory"], 1), bound=max(times, key=times.get), estimate=True,
        **{"pass": loop.which},
    )  # fmt: skip


def start(folder: str) -> None:
    """Before libtpu is loaded: it compiles for TPUs that are only described, and leaves schedules in the folder."""
    described = dict(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    os.environ.update(described, TPU_SKIP_MDS_QUERY="1", LIBTPU_INIT_ARGS=dump)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled leaves no schedule


TEXT = "{bundles:6} bundles{tokens_per_iteration:8} tokens, ns: compute{nanoseconds_compute:8.1f}"
TEXT += " memory{nanoseconds_memory:8.1f}, bound by {bound}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="append one line an estimate")
    arguments = parser.parse_args()
    about = dict(
        versions={"python": platform.python_version()} | {x: version(x) for x in ("jax", "libtpu")},
        date=datetime.date.today().isoformat(),
        command="python -m kernels_pallas.tpu_estimate",
    )
    with tempfile.TemporaryDirectory() as folder:
        start(folder)
        for loop, name in itertools.product((*scans(), *convolutions(), *selective_scans(), *dualities()), GENERATIONS):
            record = estimate(loop, name, folder)
            print(f"{loop.op:17}{loop.shape:64}{loop.which:10}{name:4}{TEXT.format(**record)}", flush=True)
            append(arguments.json, record | about)


if __name__ == "__main__":
    main()
