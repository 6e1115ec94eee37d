"""Times every implementation of every operation, forward and forward + backward, on this machine.

    python -m kernels_pallas.benchmark [--op associative_scan] [--json FILE]

Each time is the median of repeated calls after two that are not counted; each ratio is to the baseline measured
in the same run: `jax.lax.associative_scan` (the scan's "xla"), and convolution by FFT with the kernel given.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator

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


def milliseconds(function: Callable, *arguments) -> float:
    """The median time of one call."""
    times = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def first(op: Callable, implementation: str) -> Callable:
    """The op's first output as a function of its arrays."""
    return lambda *arrays: op(*arrays, implementation=implementation)[0]


def scans(specs) -> Iterator[tuple]:
    """(op, shape, baseline's name, {implementation: function of the inputs}, inputs)."""
    for spec in specs:
        shape = (spec.batch, spec.length, spec.channels)
        modulus = jnp.exp(-jax.random.uniform(jax.random.key(0), shape if spec.per_token else shape[-1:]))
        complex_ = spec.number == "complex"
        a = (0.8 * modulus, 0.6 * modulus) if complex_ else modulus
        b = (normal(1, *shape), normal(2, *shape)) if complex_ else normal(1, *shape)
        yield "associative_scan", str(spec), "xla", {name: first(associative_scan, name) for name in SCANS}, (a, b)


def fft(u, kernel):
    """The convolution with a kernel (d, l) that is given, by FFT."""
    length = u.shape[1]
    both = jnp.concatenate([kernel[None], jnp.moveaxis(u, 1, 2)])
    spectra = jnp.fft.rfft(both, 2 * length)
    return jnp.fft.irfft(spectra[1:] * spectra[:1], 2 * length)[..., :length]


def convolutions(specs) -> Iterator[tuple]:
    """As `scans`."""
    for spec in specs:
        d, n = spec.channels, spec.states
        z = np.geomspace(0.001, 0.1, d)[:, None] * (-0.5 + 1j * np.pi * np.arange(n))
        a, b, D = jnp.exp(z.astype(np.complex64)), jnp.ones((d, n), jnp.complex64), jnp.ones(d)
        u, c = normal(0, spec.batch, spec.length, d), jax.lax.complex(normal(1, d, n), normal(2, d, n))
        functions = {name: first(long_convolution, name) for name in CONVOLUTIONS}
        kernel = normal(3, d, spec.length)
        functions["fft"] = lambda u, a, b, c, D, kernel=kernel: fft(u, kernel)
        yield "long_convolution", str(spec), "fft", functions, (u, a, b, c, D)


def measure(case: tuple) -> Iterator[dict]:
    """One record for every implementation and pass of a case."""
    op, shape, baseline, functions, inputs = case
    total = lambda run: lambda *xs: sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(run(*xs)))  # noqa: E731
    passes = {
        "forward": lambda run: jax.jit(run),
        "forward+backward": lambda run: jax.jit(jax.value_and_grad(total(run), argnums=tuple(range(len(inputs))))),
    }
    for name, compiled in passes.items():
        times = {key: milliseconds(compiled(run), *inputs) for key, run in functions.items()}
        for key, ms in times.items():
            yield dict(
                op=op, shape=shape, dtype="float32", implementation=key, milliseconds=round(ms, 3), baseline=baseline,
                baseline_milliseconds=round(times[baseline], 3), **{"pass": name},
            )  # fmt: skip


OPERATIONS = {"associative_scan": (scans, scan_specs), "long_convolution": (convolutions, convolution_specs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPERATIONS, help="only this operation")
    parser.add_argument("--json", metavar="FILE", help="append one line a measurement")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    about = dict(
        device=f"{device.device_kind} ({platform.machine()}, {platform.system()})",
        versions=dict(python=platform.python_version(), jax=jax.__version__),
        date=datetime.date.today().isoformat(),
        command=" ".join(["python -m kernels_pallas.benchmark", *sys.argv[1:]]),
    )
    print(f"{about['device']}, jax {jax.__version__}")
    for op in [arguments.op] if arguments.op else OPERATIONS:
        cases, specs = OPERATIONS[op]
        for case in cases(specs.CPU if device.platform == "cpu" else specs.GPU):
            for record in measure(case):
                ratio = record["baseline_milliseconds"] / record["milliseconds"]
                print(
                    f"{op:17} {record['shape']:46} {record['pass']:17} {record['implementation']:10}"
                    f"{record['milliseconds']:9.1f} ms {ratio:6.2f} x {record['baseline']}",
                    flush=True,
                )
                if arguments.json:
                    with open(arguments.json, "a") as file:
                        file.write(json.dumps(record | about) + "\n")


if __name__ == "__main__":
    main()
