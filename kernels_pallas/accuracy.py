"""How far every implementation on this machine is from float64, in its outputs and in every gradient.

    python -m kernels_pallas.accuracy [--op associative_scan] [--json FILE]

The errors are ||out - ref|| / ||ref||, with the loop over tokens in float64, on the CPU, as the reference, of the
very numbers that the implementation is given. "checkpointed" is the XLA form inside `jax.checkpoint`. Exit status 1
where one is past its bound: 2e-6 sqrt(length) in float32, 8e-3 in bfloat16, four times that for gradients.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.associative_scan import associative_scan
from kernels_pallas.benchmark import about, here
from kernels_pallas.long_convolution import long_convolution

BOUNDS = {"float32": lambda length: 2e-6 * length**0.5, "bfloat16": lambda length: 8e-3}


class Case(NamedTuple):
    """A call: function(implementation)(arrays by name) -> outputs, and its inputs in float64."""

    op: str
    shape: str
    dtype: str  # of what is `narrow`; the others are float32
    length: int
    function: Callable
    inputs: dict
    narrow: tuple[str, ...]
    implementations: tuple[str, ...]


def draw(random, kind: str, *shape: int):
    x = random.normal(size=shape)
    return x + 1j * random.normal(size=shape) if kind == "complex" else x


def call(op: Callable, options: dict, implementation: str) -> Callable:
    return lambda inputs: op(**inputs, **options, implementation=implementation)


def planes(x):
    return (x.real, x.imag) if np.iscomplexobj(x) else x


def scans() -> Iterator[Case]:
    cases = [
        ("real", True, "float32", 3, 1000, 128),
        ("real", True, "bfloat16", 2, 4096, 256),
        ("real", False, "float32", 1, 16384, 128, "reverse"),
        ("complex", False, "float32", 2, 4096, 128),
        ("complex", True, "float32", 2, 1000, 256, "reverse"),
        ("complex", True, "float32", 1, 2048, 128, "reset"),
    ]
    for kind, per_token, dtype, batch, length, n, *given in cases:
        random = np.random.default_rng(length)
        a = draw(random, kind, *((batch, length, n) if per_token else (n,)))
        a *= np.exp(-np.abs(random.normal(size=a.shape)) / 10) / abs(a)
        a[..., 0] /= abs(a[..., 0])
        a[..., 1] *= np.exp(-300)
        inputs = dict(a=a, b=draw(random, kind, batch, length, n), initial_state=draw(random, kind, batch, n))
        reset = random.uniform(size=(batch, length)) < 0.01 if "reset" in given else None

        options = dict(reverse="reverse" in given, reset=reset)
        function = partial(call, associative_scan, options)
        decay = "per-token" if per_token else "time-invariant"
        shape = " ".join([f"B{batch} L{length} N{n} {dtype} {kind} {decay}", *given])
        inputs = {name: planes(x) for name, x in inputs.items()}
        yield Case(
            "associative_scan", shape, dtype, length, function, inputs, ("a", "b"), tuple(here(("xla", "gpu", "tpu")))
        )


def convolutions() -> Iterator[Case]:
    cases = [
        ("complex", "float32", 4, 2118, 32, False),
        ("complex", "float32", 4, 2048, 16, True),
        ("complex", "bfloat16", 8, 2048, 32, True),
        ("real", "float32", 4, 4096, 16, False),
    ]
    for kind, dtype, batch, length, n, both in cases:
        random, d = np.random.default_rng(length), 16
        a = draw(random, kind, d, n)
        a *= (1 - np.geomspace(1e-3, 0.5, n)) / abs(a)
        inputs = dict(u=random.normal(size=(batch, length, d)), a=a, b=draw(random, kind, d, n))
        inputs |= dict(c=draw(random, kind, d, n), D=random.normal(size=d))
        state = (
            dict(c_reverse=draw(random, kind, d, n)) if both else dict(initial_state=draw(random, kind, batch, d, n))
        )

        function = partial(call, long_convolution, {})
        reading = "bidirectional" if both else "causal"
        shape = f"B{batch} L{length} H{d} N{n} {dtype} {kind} {reading}"
        yield Case(
            "long_convolution",
            shape,
            dtype,
            length,
            function,
            inputs | state,
            ("u",),
            tuple(here(("xla", "gpu", "tpu"))),
        )


OPERATIONS = {"associative_scan": scans, "long_convolution": convolutions}


def rounded(case: Case) -> dict:
    """The inputs as the implementation gets them."""

    def one(name, x):
        complex_ = np.iscomplexobj(x)
        return jnp.asarray(x, jnp.complex64 if complex_ else case.dtype if name in case.narrow else jnp.float32)

    return {name: jax.tree.map(partial(one, name), x) for name, x in case.inputs.items()}


def widened(tree):
    """As float64 and complex128 NumPy arrays."""
    wide = lambda x: np.complex128 if jnp.iscomplexobj(x) else np.float64  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(x).astype(wide(x)), tree)


def outputs_and_gradients(run: Callable, inputs: dict, cotangents):
    outputs, pull_back = jax.vjp(run, inputs)
    return outputs, pull_back(jax.tree.map(lambda bar, y: bar.astype(y.dtype), cotangents, outputs))[0]


def errors(case: Case, implementations: dict[str, Callable]) -> dict[str, dict[str, float]]:
    """By implementation, of the outputs and of the gradient of every input."""
    inputs = rounded(case)
    random = np.random.default_rng(0)
    first = next(iter(implementations.values()))
    shapes = jax.eval_shape(first, inputs)
    bars = jax.tree.map(
        lambda y: jnp.asarray(draw(random, "complex" if jnp.iscomplexobj(y) else "", *y.shape), y.dtype), shapes
    )
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        run = case.function("reference")
        expected = widened(jax.jit(partial(outputs_and_gradients, run))(widened(inputs), widened(bars)))
    found = {}
    for name, run in implementations.items():
        got = widened(jax.jit(partial(outputs_and_gradients, run))(inputs, bars))
        parts = {"outputs": (got[0], expected[0])} | {k: (got[1][k], expected[1][k]) for k in inputs}
        found[name] = {k: relative(*pair) for k, pair in parts.items()}
    return found


def relative(out, ref) -> float:
    """||out - ref|| / ||ref|| over all leaves."""
    norm = lambda tree: sum(np.linalg.norm(x) ** 2 for x in jax.tree.leaves(tree)) ** 0.5  # noqa: E731
    return float(norm(jax.tree.map(np.subtract, out, ref)) / norm(ref))


def functions(case: Case) -> dict[str, Callable]:
    checkpointed = {"checkpointed": jax.checkpoint(case.function("xla"))}
    return {name: case.function(name) for name in case.implementations} | checkpointed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPERATIONS, help="only this operation")
    parser.add_argument("--json", metavar="FILE", help="append one line a measurement")
    arguments = parser.parse_args()
    head, past = about("accuracy", arguments.op), 0
    print(f"{head['device']}, jax {jax.__version__}")
    for op in [arguments.op] if arguments.op else OPERATIONS:
        for case in OPERATIONS[op]():
            for name, found in errors(case, functions(case)).items():
                bound = BOUNDS[case.dtype](case.length)
                wrong = [k for k, e in found.items() if not e <= bound * (1 if k == "outputs" else 4)]
                past += bool(wrong)
                shown = "  ".join(f"{k} {e:.1e}" for k, e in found.items())
                print(
                    f"{op:17} {case.shape:58} {name:12} {shown}{'  PAST: ' if wrong else ''}{' '.join(wrong)}",
                    flush=True,
                )
                if arguments.json:
                    record = dict(op=op, shape=case.shape, dtype=case.dtype, implementation=name, error=found) | head
                    record["pass"] = "accuracy"
                    with open(arguments.json, "a") as file:
                        file.write(json.dumps(record) + "\n")
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())
