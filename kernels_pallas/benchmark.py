"""Times every implementation of every operation, forward and forward + backward, on this machine.

    python -m kernels_pallas.benchmark [--op associative_scan] [--json FILE]

Each time is the median of repeated calls, each ratio is to the baseline measured in the same run:
`jax.lax.associative_scan` (the scan's "xla"), and convolution by FFT with the kernel given. The share is of the
bandwidth that a copy reaches in the same run, for the bytes that no implementation can avoid: every input read
once and every output written once, and in the backward pass the cotangents, the states and the gradients too.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.associative_scan import IMPLEMENTATIONS as SCANS
from kernels_pallas.associative_scan import associative_scan
from kernels_pallas.associative_scan import specs as scan_specs
from kernels_pallas.long_convolution import IMPLEMENTATIONS as CONVOLUTIONS
from kernels_pallas.long_convolution import long_convolution
from kernels_pallas.long_convolution import specs as convolution_specs

REPEATS = 7
COPIED = {"cpu": 2**26, "gpu": 2**30, "tpu": 2**28}  # bytes


class Case(NamedTuple):
    """What is timed: functions of the same inputs by implementation, and the name of the one to compare with."""

    op: str
    shape: str
    dtype: str
    baseline: str
    functions: dict[str, Callable]
    inputs: tuple
    forward_bytes: int
    backward_bytes: int


def milliseconds(function: Callable, *arguments) -> float:
    """The median time of one call, of several that are queued together where one alone takes no time."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    seconds(2)
    calls = max(1, min(50, math.ceil(0.02 / seconds(1))))
    return 1e3 * statistics.median(seconds(calls) for _ in range(REPEATS))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy that fits no cache."""
    x = jnp.ones(COPIED[jax.default_backend()] // 4, jnp.float32)
    return 2 * x.nbytes / (1e-3 * milliseconds(jax.jit(lambda x: x + 1), x))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def first(op: Callable, implementation: str) -> Callable:
    """The op's first output as a function of its arrays."""
    return lambda *arrays: op(*arrays, implementation=implementation)[0]


def size(*arrays) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(arrays))


def here(implementations: tuple[str, ...]) -> list[str]:
    """Those of an operation's implementations that are timed on this backend."""
    backend = jax.default_backend()
    timed = ("reference", "xla") if backend == "cpu" else ("xla", backend)
    return [name for name in timed if name in implementations]


def scans(specs) -> Iterator[Case]:
    for spec in specs:
        shape = (spec.batch, spec.length, spec.channels)
        modulus = jnp.exp(-jax.random.uniform(jax.random.key(0), shape if spec.per_token else shape[-1:]) / 10)
        complex_ = spec.number == "complex"
        a = (0.8 * modulus, 0.6 * modulus) if complex_ else modulus
        b = (normal(1, *shape), normal(2, *shape)) if complex_ else normal(1, *shape)
        a, b = jax.tree.map(lambda x: x.astype(spec.dtype), (a, b))  # noqa: B023
        functions = {name: first(associative_scan, name) for name in here(SCANS)}
        forward, backward = size(a, b, b), size(a, b, b, b) + size(a) * spec.per_token
        yield Case("associative_scan", str(spec), spec.dtype, "xla", functions, (a, b), forward, backward)


def fft(u, kernel):
    """The convolution with a kernel (d, l) that is given, by FFT."""
    length = u.shape[1]
    both = jnp.concatenate([kernel[None], jnp.moveaxis(u, 1, 2)])
    spectra = jnp.fft.rfft(both, 2 * length)
    return jnp.moveaxis(jnp.fft.irfft(spectra[1:] * spectra[:1], 2 * length)[..., :length], 1, 2)


def convolutions(specs) -> Iterator[Case]:
    for spec in specs:
        d, n = spec.channels, spec.states
        z = np.geomspace(0.001, 0.1, d)[:, None] * (-0.5 + 1j * np.pi * np.arange(n))
        a, b, D = jnp.exp(z.astype(np.complex64)), jnp.ones((d, n), jnp.complex64), jnp.ones(d)
        u, c = normal(0, spec.batch, spec.length, d), jax.lax.complex(normal(1, d, n), normal(2, d, n))
        functions = {name: first(long_convolution, name) for name in here(CONVOLUTIONS)}
        kernel = normal(3, d, spec.length)
        functions["fft"] = lambda u, a, b, c, D, kernel=kernel: fft(u, kernel)
        inputs = (u, a, b, c, D)
        yield Case("long_convolution", str(spec), "float32", "fft", functions, inputs, size(u, u), size(u, u, u))


def measure(case: Case, bandwidth: float) -> Iterator[dict]:
    """One record for every implementation and pass of a case."""
    y = jax.eval_shape(case.functions[case.baseline], *case.inputs)
    cotangent = jax.tree.map(lambda y: normal(5, *y.shape).astype(y.dtype), y)

    def both(run):
        def outputs_and_gradients(cotangent, *inputs):
            y, pull_back = jax.vjp(run, *inputs)
            return y, pull_back(cotangent)

        return outputs_and_gradients

    passes = {
        "forward": (lambda run: run, case.inputs, case.forward_bytes),
        "forward+backward": (both, (cotangent, *case.inputs), case.forward_bytes + case.backward_bytes),
    }
    for name, (what, inputs, needed) in passes.items():
        times = {key: milliseconds(jax.jit(what(run)), *inputs) for key, run in case.functions.items()}
        for key, ms in times.items():
            yield dict(
                op=case.op, shape=case.shape, dtype=case.dtype, implementation=key, milliseconds=round(ms, 3),
                baseline=case.baseline, baseline_milliseconds=round(times[case.baseline], 3),
                share_of_copy_bandwidth=round(needed / (1e-3 * ms) / bandwidth, 3), **{"pass": name},
            )  # fmt: skip


OPERATIONS = {"associative_scan": (scans, scan_specs), "long_convolution": (convolutions, convolution_specs)}


def about(module: str, op: str | None) -> dict:
    """What every record says: the device, versions, date and command."""
    return dict(
        device=f"{jax.devices()[0].device_kind} ({platform.machine()}, {platform.system()})",
        versions=dict(python=platform.python_version(), jax=jax.__version__),
        date=datetime.date.today().isoformat(),
        command=f"python -m kernels_pallas.{module}" + (f" --op {op}" if op else ""),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPERATIONS, help="only this operation")
    parser.add_argument("--json", metavar="FILE", help="append one line a measurement")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    head = about("benchmark", arguments.op) | {"copy_gigabytes_per_second": round(bandwidth / 1e9)}
    print(f"{head['device']}, jax {jax.__version__}, a copy moves {bandwidth / 1e9:.0f} GB/s")
    for op in [arguments.op] if arguments.op else OPERATIONS:
        cases, specs = OPERATIONS[op]
        for case in cases(specs.CPU if jax.default_backend() == "cpu" else specs.GPU):
            for record in measure(case, bandwidth):
                ratio = record["baseline_milliseconds"] / record["milliseconds"]
                print(
                    f"{op:17} {record['shape']:50} {record['pass']:17} {record['implementation']:10}"
                    f"{record['milliseconds']:9.3f} ms {ratio:6.2f} x {record['baseline']:5}"
                    f"{100 * record['share_of_copy_bandwidth']:5.0f} % of a copy's bandwidth",
                    flush=True,
                )
                if arguments.json:
                    with open(arguments.json, "a") as file:
                        file.write(json.dumps(record | head) + "\n")


if __name__ == "__main__":
    main()
