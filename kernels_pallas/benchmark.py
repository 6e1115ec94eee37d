"""Times every implementation of every operation, forward and forward + backward, on this machine.

    python -m kernels_pallas.benchmark [--op associative_scan] [--shapes layer] [--json FILE]

The shapes are this backend's, or "layer": one of a layer's size, the same on every backend.
Each time is the median of repeated calls, each ratio is to the baseline measured in the same run:
`jax.lax.associative_scan` (the scan's "xla"), and convolution by FFT with the kernel given. The share is of the
bandwidth that a copy reaches in the same run, for the bytes that no implementation can avoid: every input read
once and every output written once, and in the backward pass the cotangents, the states and the gradients too. A step
of one token has no backward pass here; it is timed in a loop on the device, each going on from the state that the one
before left.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from kernels_pallas.cases import OPERATIONS, Case, normal
from kernels_pallas.records import about, append

REPEATS = 7
STEPS = 16  # in one program
SHAPES = {"cpu": lambda specs: specs.CPU, "gpu": lambda specs: specs.GPU, "layer": lambda specs: specs.GPU[:1]}
COPIED = {"cpu": 2**26, "gpu": 2**30, "tpu": 2**28}  # bytes


def milliseconds(function: Callable, *arguments, step: bool = False) -> float:
    """The median time of one call, of several that are queued together where one alone takes no time.

    step: the first argument is given away, and the first output takes its place.
    """
    arguments = [jnp.copy(v) if step and i == 0 else v for i, v in enumerate(arguments)]

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
            if step:
                arguments[0] = out[0]
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    seconds(1)
    alone = seconds(1)
    calls = max(1, min(50, math.ceil(0.02 / alone)))
    return 1e3 * statistics.median(seconds(calls) for _ in range(REPEATS if alone < 1 else 3))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy that fits no cache."""
    x = jnp.ones(COPIED[jax.default_backend()] // 4, jnp.float32)
    return 2 * x.nbytes / (1e-3 * milliseconds(jax.jit(lambda x: x + 1), x))


def both(run: Callable) -> Callable:
    """Outputs and gradients, of the cotangents and the inputs."""

    def outputs_and_gradients(cotangent, *inputs):
        y, pull_back = jax.vjp(run, *inputs)
        return y, pull_back(cotangent)

    return outputs_and_gradients


def steps(run: Callable) -> Callable:
    """STEPS of them, one after another."""

    def loop(state, *inputs):
        start = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(run, state, *inputs))
        return jax.lax.fori_loop(0, STEPS, lambda _, carry: run(carry[0], *inputs), (state, *start[1:]))

    return loop


def measure(case: Case, bandwidth: float) -> Iterator[dict]:
    """One record for every implementation and pass of a case."""
    y = jax.eval_shape(case.function(case.baseline), *case.inputs)
    cotangent = jax.tree.map(lambda y: normal(5, *y.shape).astype(y.dtype), y)
    passes = {
        "forward": (steps if case.step else lambda run: run, case.inputs, case.forward_bytes),
        "forward+backward": (both, (cotangent, *case.inputs), case.forward_bytes + case.backward_bytes),
    }
    if case.step:
        del passes["forward+backward"]
    for name, (what, inputs, needed) in passes.items():
        run = {k: jax.jit(what(case.function(k)), donate_argnums=(0,) * case.step) for k in case.implementations}
        calls = STEPS if case.step else 1
        times = {key: milliseconds(run[key], *inputs, step=case.step) / calls for key in run}
        for key, ms in times.items():
            yield dict(
                op=case.name, shape=case.shape, dtype=case.dtype, implementation=key, milliseconds=round(ms, 4),
                baseline=case.baseline, baseline_milliseconds=round(times[case.baseline], 4),
                share_of_copy_bandwidth=round(needed / (1e-3 * ms) / bandwidth, 3), **{"pass": name},
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPERATIONS, help="only this operation")
    parser.add_argument("--json", metavar="FILE", help="append one line a measurement")
    parser.add_argument("--shapes", choices=SHAPES, help="this backend's if not given")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    head = about("benchmark", arguments.op, arguments.shapes) | {"copy_gigabytes_per_second": round(bandwidth / 1e9)}
    print(f"{head['device']}, jax {jax.__version__}, a copy moves {bandwidth / 1e9:.0f} GB/s")
    shapes = arguments.shapes or ("cpu" if jax.default_backend() == "cpu" else "gpu")
    for op in [arguments.op] if arguments.op else OPERATIONS:
        cases, specs = OPERATIONS[op]
        for case in cases(SHAPES[shapes](specs)):
            for record in measure(case, bandwidth):
                ratio = record["baseline_milliseconds"] / record["milliseconds"]
                print(
                    f"{op:20} {record['shape']:50} {record['pass']:17} {record['implementation']:10}"
                    f"{record['milliseconds']:9.3f} ms {ratio:6.2f} x {record['baseline']:5}"
                    f"{100 * record['share_of_copy_bandwidth']:5.0f} % of a copy's bandwidth",
                    flush=True,
                )
                append(arguments.json, record | head)


if __name__ == "__main__":
    main()
