"""How far every implementation on this machine is from float64, in its outputs and in every gradient.

    python -m kernels_pallas.accuracy [--op associative_scan] [--json FILE]

The errors are ||out - ref|| / ||ref||, with the loop over tokens in float64, on the CPU, as the reference, of the
very numbers that the implementation is given. "checkpointed" is `lax.associative_scan` inside `jax.checkpoint`. Exit
status 1 where one is past its bound: 2e-6 sqrt(length) in float32 (of one token, sqrt(states)), 8e-3 in bfloat16, four
times that for gradients.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import (
    called,
    convolution,
    diagonal,
    duality,
    duality_step,
    here,
    scan,
    selective,
    selective_step,
    short,
    trapezoid,
)
from kernels_pallas.records import about, append

BOUNDS = {"float32": lambda length: 2e-6 * length**0.5, "bfloat16": lambda length: 8e-3}


class Case(NamedTuple):
    """A call of an operation with options, its inputs by name in float64, and which of them `dtype` is the dtype of."""

    op: ModuleType
    shape: str
    dtype: str  # of what is in `narrow`; the others are float32
    length: int
    inputs: dict
    narrow: tuple[str, ...]
    options: dict = {}

    @property
    def name(self) -> str:
        return called(self.op)

    def function(self, implementation: str) -> Callable:
        return lambda inputs: getattr(self.op, self.name)(**inputs, **self.options, implementation=implementation)


def draw(random, kind: str, *shape: int):
    x = random.normal(size=shape)
    return x + 1j * random.normal(size=shape) if kind == "complex" else x


def planes(x):
    return (x.real, x.imag) if np.iscomplexobj(x) else x


def scans() -> Iterator[Case]:
    for kind, per_token, dtype, batch, length, n, *given in [
        ("real", True, "float32", 3, 1000, 128),
        ("real", True, "bfloat16", 2, 4096, 256),
        ("real", False, "float32", 1, 16384, 128, "reverse"),
        ("complex", False, "float32", 2, 4096, 128),
        ("complex", True, "float32", 2, 1000, 256, "reverse"),
        ("complex", True, "float32", 1, 2048, 128, "reset"),
    ]:
        random = np.random.default_rng(length)
        a = draw(random, kind, *((batch, length, n) if per_token else (n,)))
        a *= np.exp(-np.abs(random.normal(size=a.shape)) / 10) / abs(a)
        a[..., 0] /= abs(a[..., 0])
        a[..., 1] *= np.exp(-300)
        inputs = dict(a=a, b=draw(random, kind, batch, length, n), initial_state=draw(random, kind, batch, n))
        inputs = {name: planes(x) for name, x in inputs.items()}
        reset = random.uniform(size=(batch, length)) < 0.01 if "reset" in given else None
        decay = "per-token" if per_token else "time-invariant"
        shape = " ".join([f"B{batch} L{length} N{n} {dtype} {kind} {decay}", *given])
        yield Case(scan, shape, dtype, length, inputs, ("a", "b"), dict(reverse="reverse" in given, reset=reset))


def convolutions() -> Iterator[Case]:
    for kind, dtype, batch, length, n, both in [
        ("complex", "float32", 4, 2118, 32, False),
        ("complex", "float32", 4, 2048, 16, True),
        ("complex", "bfloat16", 8, 2048, 32, True),
        ("real", "float32", 4, 4096, 16, False),
    ]:
        random, d = np.random.default_rng(length), 16
        a = draw(random, kind, d, n)
        a *= (1 - np.geomspace(1e-3, 0.5, n)) / abs(a)
        inputs = dict(u=random.normal(size=(batch, length, d)), a=a, b=draw(random, kind, d, n))
        inputs |= dict(c=draw(random, kind, d, n), D=random.normal(size=d))
        inputs |= (
            {"c_reverse": draw(random, kind, d, n)} if both else {"initial_state": draw(random, kind, batch, d, n)}
        )
        shape = f"B{batch} L{length} H{d} N{n} {dtype} {kind} {'bidirectional' if both else 'causal'}"
        yield Case(convolution, shape, dtype, length, inputs, ("u",))


def diagonal_systems() -> Iterator[Case]:
    for dtype, batch, length, d, n, reverse in [
        ("bfloat16", 2, 2048, 128, 128, False),
        ("float32", 2, 1024, 64, 64, True),
    ]:
        random = np.random.default_rng(length)
        a = draw(random, "complex", n)
        inputs = dict(u_bld=random.normal(size=(batch, length, d)), a_n=a * (1 - np.geomspace(1e-3, 0.5, n)) / abs(a))
        inputs |= dict(B_nd=draw(random, "complex", n, d) / d**0.5, C_dn=draw(random, "complex", d, n) / n**0.5)
        inputs |= dict(D_d=random.normal(size=d), initial_state_bn=draw(random, "complex", batch, n))
        shape = f"B{batch} L{length} H{d} P{n} {dtype}" + " reverse" * reverse
        yield Case(diagonal, shape, dtype, length, inputs, ("u_bld",), dict(reverse=reverse))


def selective_scans() -> Iterator[Case]:
    for dtype, batch, length, d, n, reset in [
        ("float32", 2, 1000, 128, 16, True),
        ("bfloat16", 1, 2048, 200, 16, False),
        ("float32", 1, 512, 128, 64, False),
    ]:
        random = np.random.default_rng(length)
        inputs = {name: random.normal(size=(batch, length, d)) for name in ("x_bld", "dt_bld", "z_bld")}
        inputs |= {name: random.normal(size=(batch, length, n)) for name in ("B_bln", "C_bln")}
        inputs |= dict(A_dn=-np.exp(random.normal(size=(d, n))), D_d=random.normal(size=d))
        inputs["A_dn"][:, 0] = 0  # no decay, and e^-300 or so
        inputs["A_dn"][:, 1] = -400
        inputs |= dict(initial_state_bdn=random.normal(size=(batch, d, n)), dt_bias_d=random.normal(size=d))
        starts = random.uniform(size=(batch, length)) < 0.01 if reset else None
        shape = f"B{batch} L{length} D{d} N{n} {dtype} gated" + " reset" * reset
        narrow = ("x_bld", "dt_bld", "z_bld", "B_bln", "C_bln")
        yield Case(selective, shape, dtype, length, inputs, narrow, dict(softplus=True, reset=starts))


def dualities() -> Iterator[Case]:
    for batch, length, heads, p, groups, n, reset in [
        (2, 1000, 4, 64, 1, 128, False),
        (1, 2048, 4, 64, 2, 64, True),
        (1, 65, 2, 128, 1, 16, False),
        (1, 321, 2, 64, 1, 256, True),
    ]:
        random = np.random.default_rng(length)
        inputs = {name: random.normal(size=(batch, length, heads, p)) for name in ("x", "z")}
        inputs |= {name: random.normal(size=(batch, length, groups, n)) for name in ("B", "C")}
        dt = random.uniform(0.001, 1, (batch, length, heads))
        decay = -dt * np.geomspace(1e-3, 300, heads)
        inputs |= dict(log_decay_blh=decay, dt_blh=dt, D_h=random.normal(size=heads))
        inputs |= dict(initial_state=random.normal(size=(batch, heads, p, n)))
        starts = random.uniform(size=(batch, length)) < 0.01 if reset else None
        shape = f"B{batch} L{length} H{heads} P{p} N{n} G{groups} bfloat16 gated" + " reset" * reset
        yield Case(duality, shape, "bfloat16", length, inputs, ("x", "z", "B", "C"), dict(reset=starts))


def selective_steps() -> Iterator[Case]:
    for dtype, batch, d, n in [("bfloat16", 4, 256, 16), ("float32", 1, 96, 64)]:
        random = np.random.default_rng(d)
        inputs = {name: random.normal(size=(batch, d)) for name in ("x_bd", "dt_bd", "z_bd")}
        inputs |= {name: random.normal(size=(batch, n)) for name in ("B_bn", "C_bn")}
        inputs |= dict(A_dn=-np.exp(random.normal(size=(d, n))), D_d=random.normal(size=d))
        inputs["A_dn"][:, 0] = 0  # no decay, and e^-300 or so
        inputs["A_dn"][:, 1] = -400
        inputs |= dict(state_bdn=random.normal(size=(batch, d, n)), dt_bias_d=random.normal(size=d))
        narrow = ("x_bd", "dt_bd", "z_bd", "B_bn", "C_bn")
        yield Case(selective_step, f"B{batch} D{d} N{n} {dtype} gated", dtype, n, inputs, narrow, dict(softplus=True))


def duality_steps() -> Iterator[Case]:
    for dtype, batch, heads, p, groups, n, written, read in [
        ("bfloat16", 4, 8, 64, 1, 128, 1, 1),
        ("float32", 2, 4, 64, 4, 128, 2, 1),
        ("float32", 1, 4, 64, 4, 64, 8, 4),
    ]:
        random = np.random.default_rng(heads * n)
        draws = dict(x=(written, heads, p), B=(written, groups, n), C=(read, groups, n), z=(read, heads, p))
        inputs = {name: random.normal(size=(batch, *shape)) for name, shape in draws.items()}
        dt = random.uniform(0.001, 1, (batch, heads))
        inputs |= dict(log_decay_bh=-dt * np.geomspace(1e-3, 300, heads), dt_bh=dt)
        inputs |= dict(state_bhpn=random.normal(size=(batch, heads, p, n)))
        shape = f"B{batch} H{heads} P{p} G{groups} N{n} r{written} s{read} {dtype} gated"
        yield Case(duality_step, shape, dtype, n, inputs, ("x", "B", "C", "z"))


def trapezoids() -> Iterator[Case]:
    for dtype, batch, length, rank, heads, p, groups, n, planes, reset in [
        ("bfloat16", 2, 1000, 1, 4, 64, 1, 128, 32, False),
        ("bfloat16", 1, 2048, 4, 4, 64, 2, 64, 32, True),
        ("bfloat16", 1, 1000, 2, 2, 32, 1, 16, 4, True),
    ]:
        random, h = np.random.default_rng(length), heads
        lanes, gates = (batch, length, rank) if rank > 1 else (batch, length), (batch, length, heads)
        inputs = {name: random.normal(size=(*lanes, heads, p)) for name in ("v", "z")}
        inputs |= {name: random.normal(size=(*lanes, groups, n)) for name in ("B", "C")}
        dt, weight = random.uniform(0.001, 1, gates), random.uniform(size=gates)
        inputs |= dict(log_decay_blh=-dt * np.geomspace(1e-3, 300, heads), rate_blh=dt)
        inputs |= dict(previous_blh=(1 - weight) * dt, current_blh=weight * dt)
        inputs |= dict(theta_blhs=np.pi * np.tanh(random.normal(size=(batch, length, 1, planes))))
        inputs |= {f"{name}_bias_hrn": random.normal(size=(heads, rank, n)) for name in "BC"}
        ends = (h, planes), (h, p, n), (rank, h, n), (rank, h, p)
        state = trapezoid.State(*(random.normal(size=(batch, *shape)) for shape in ends))
        inputs |= dict(D_h=random.normal(size=heads), initial_state=state)
        starts = random.uniform(size=(batch, length)) < 0.01 if reset else None
        shape = f"B{batch} L{length} R{rank} H{heads} P{p} N{n} G{groups} {dtype} gated" + " reset" * reset
        yield Case(trapezoid, shape, dtype, length, inputs, ("v", "z", "B", "C"), dict(reset=starts))


def short_convolutions() -> Iterator[Case]:
    for dtype, batch, length, d, k, reset in [
        ("bfloat16", 2, 1000, 256, 4, True),
        ("float32", 3, 520, 128, 3, False),
    ]:
        random = np.random.default_rng(length)
        inputs = dict(x_bld=random.normal(size=(batch, length, d)), weight_dk=random.normal(size=(d, k)))
        inputs |= dict(bias_d=random.normal(size=d), initial_state=random.normal(size=(batch, k - 1, d)))
        starts = random.uniform(size=(batch, length)) < 0.1 if reset else None
        shape = f"B{batch} L{length} D{d} k{k} {dtype} silu" + " reset" * reset
        yield Case(short, shape, dtype, length, inputs, ("x_bld",), dict(reset=starts))


OPERATIONS = {
    "associative_scan": scans,
    "long_convolution": convolutions,
    "diagonal_system": diagonal_systems,
    "selective_scan": selective_scans,
    "selective_scan_step": selective_steps,
    "ssd": dualities,
    "ssd_step": duality_steps,
    "mamba3": trapezoids,
    "short_convolution": short_convolutions,
}


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
    checkpointed = {"checkpointed": jax.checkpoint(case.function("xla"))} if case.op is scan else {}
    return {name: case.function(name) for name in here(case.op)} | checkpointed


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
                    f"{op:20} {case.shape:58} {name:12} {shown}{'  PAST: ' if wrong else ''}{' '.join(wrong)}",
                    flush=True,
                )
                record = dict(op=op, shape=case.shape, dtype=case.dtype, implementation=name, error=found) | head
                append(arguments.json, record | {"pass": "accuracy"})
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())
