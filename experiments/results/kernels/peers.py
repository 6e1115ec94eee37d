"""Times other projects' kernels at the shapes of `kernels_pallas.benchmark`, by its method.

    python experiments/results/kernels/peers.py --peer mamba_ssm|jla [--op ssd] [--json FILE]

Needs a Hopper GPU and, for mamba_ssm, the packages torch, triton, einops and mamba-ssm with its CUDA extension
(pip install --no-build-isolation mamba-ssm, with MAMBA_FORCE_BUILD=TRUE); for jla jax[cuda13]==0.11.2 and
jax-linear-attention. One process a peer: JAX takes the GPU's memory for itself. Nothing here is imported by the
project. Each time is the median over repeats of a call queued many times, after a warm-up in which Triton tunes;
the backward pass takes the gradient of every input. A measurement that fails says so in a line, and the next follows.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

BF16, F32 = "bfloat16", "float32"
SCANS = ((8, 4096, 16, BF16), (1, 65536, 16, BF16), (8, 4096, 64, BF16), (8, 4096, 16, F32))
CHANNELS = 2048
LAYER, LONG = (8, 4096), (1, 65536)
HEADS, HEAD_CHANNELS, STATES, ANGLES, RANK = 64, 64, 128, 32, 4
EVERYTHING = f"biases, {ANGLES} angles a head, rotation, trapezoid, D and z included"


class Case(NamedTuple):
    """A function of arrays and what makes them: name, seed or constant, shape and dtype of each."""

    op: str
    shape: str
    dtype: str
    implementation: str
    note: str
    function: Callable
    inputs: tuple[tuple, ...]


def scan_shape(batch: int, length: int, states: int, dtype: str) -> str:
    return f"B{batch} L{length} D{CHANNELS} N{states} {dtype} gated"


def heads_shape(tokens: tuple[int, int], end: str, rank: int = 1) -> str:
    lanes = f" R{rank}" if rank > 1 else ""
    return f"B{tokens[0]} L{tokens[1]}{lanes} H{HEADS} P{HEAD_CHANNELS} G1 N{STATES} {end}"


def scan_inputs(batch: int, length: int, states: int, dtype: str, channels_first: bool) -> tuple:
    """x, dt, A, B, C, D, z and the bias of dt."""

    def tokens(channels):
        return (batch, channels, length) if channels_first else (batch, length, channels)

    wide, narrow = (("normal", tokens(size), dtype) for size in (CHANNELS, states))
    A = ("ramp", (CHANNELS, states), F32)
    return (wide, wide, A, narrow, narrow, (1.0, (CHANNELS,), F32), wide, (-4.0, (CHANNELS,), F32))


def ssd_inputs(tokens: tuple[int, int]) -> tuple:
    """x, dt, A, B, C, D."""
    x, group = ("normal", (*tokens, HEADS, HEAD_CHANNELS), BF16), ("normal", (*tokens, 1, STATES), BF16)
    return (x, ("step", (*tokens, HEADS), F32), (-4.0, (HEADS,), F32), group, group, (1.0, (HEADS,), F32))


def mamba3_inputs(tokens: tuple[int, int], heads_first: bool) -> tuple:
    """C, B, x, A dt, dt, trapezoid logits, biases of C and B, angles, D, z."""
    x, group = ("normal", (*tokens, HEADS, HEAD_CHANNELS), BF16), ("normal", (*tokens, 1, STATES), BF16)
    each = (tokens[0], HEADS, tokens[1]) if heads_first else (*tokens, HEADS)
    gates = (("decay", each, F32), ("step", each, F32), ("normal", each, BF16))
    bias, angles = (1.0, (HEADS, STATES), F32), ("normal", (*tokens, HEADS, ANGLES), BF16)
    return (group, group, x, *gates, bias, bias, angles, (1.0, (HEADS,), F32), x)


def core_inputs(tokens: tuple[int, int], *rank: int) -> tuple:
    """C, B and x of every head, the log decay, the weights of the last token and of this one."""
    each = (*tokens, HEADS)
    key, value = (("normal", (*each, *rank, size), BF16) for size in (STATES, HEAD_CHANNELS))
    return (key, key, value, ("decay", each, F32), ("step", each, F32), ("step", each, F32))


def mamba_ssm_cases(op: str | None) -> Iterator[Case]:
    def selective():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        run = functools.partial(selective_scan_fn, delta_softplus=True)
        note = "softplus, bias, D and z included; arrays given channels first, as the kernel wants them"
        for spec in SCANS:
            yield scan_shape(*spec), spec[3], "CUDA", note, run, scan_inputs(*spec, True)

    def ssd():
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as combined

        for tokens, chunk in ((LAYER, 256), (LONG, 256), (LAYER, 128)):
            run = lambda x, dt, A, B, C, D, chunk=chunk: combined(x, dt, A, B, C, chunk, D=D)  # noqa: E731
            way, note = f"Triton, chunk {chunk}", "dt and D included"
            yield heads_shape(tokens, f"{BF16} dt D"), BF16, way, note, run, ssd_inputs(tokens)

    def mamba3():
        from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined as run

        yield heads_shape(LAYER, f"{BF16} D gated"), BF16, "Triton", EVERYTHING, run, mamba3_inputs(LAYER, True)

    def mamba3_mimo():
        from mamba_ssm.ops.tilelang.mamba3.mamba3_mimo import mamba3_mimo as combined

        options = dict(chunk_size=64 // RANK, rotary_dim_divisor=STATES // ANGLES)
        run = lambda C, B, x, *rest: combined(C, B, x, *rest, dtype=x.dtype, **options)  # noqa: E731
        _, _, x, *gates, _, _, angles, D, z = mamba3_inputs(LAYER, True)
        group = ("normal", (*LAYER, RANK, 1, STATES), BF16)
        bias, mix = (1.0, (HEADS, RANK, STATES), F32), (1 / RANK, (HEADS, RANK, HEAD_CHANNELS), F32)
        inputs = (group, group, x, *gates, bias, bias, mix, mix, mix, angles, D, z)
        yield heads_shape(LAYER, f"{BF16} D gated", RANK), BF16, "TileLang", EVERYTHING, run, inputs

    groups = dict(selective_scan=selective, mamba3=mamba3, ssd=ssd, mamba3_mimo=mamba3_mimo)
    return chosen(op, "mamba_ssm", groups)


def jla_cases(op: str | None) -> Iterator[Case]:
    def selective():
        from jla.ops.mosaic_gpu.mamba1 import mamba1

        def run(x, dt, A, B, C, D, z, bias):
            return mamba1(C, B, x, dt, A, d=D, z=z, dt_bias=bias, dt_softplus=True)[0]

        for spec in SCANS:
            if spec[2] == 16:  # it has no kernel for 64 states
                note = "softplus, bias, D and z included"
                yield scan_shape(*spec), spec[3], "Mosaic GPU", note, run, scan_inputs(*spec, False)

    def ssd():
        from jla.layers.ssm import mamba2_ssd
        from jla.ops.mosaic_gpu.scalar_gate import simple_gla

        def core(x, a, B, C):
            return simple_gla(C, B, x, a, scale=1.0)[0]

        def whole(x, dt, A, B, C, D):
            return mamba2_ssd(x, dt, A, B, C, d=D, impl="mosaic_gpu", grouped_key_grads=True)[0]

        for tokens in (LAYER, LONG):
            shape, inputs = heads_shape(tokens, f"{BF16} dt D"), ssd_inputs(tokens)
            bare = (inputs[0], ("decay", (*tokens, HEADS), F32), inputs[3], inputs[4])
            yield shape, BF16, "Mosaic GPU, simple_gla", "core only: without dt and D", core, bare
            yield shape, BF16, "Mosaic GPU, mamba2_ssd", "dt and D included, by XLA", whole, inputs

    def mamba3():
        from jla.ops.mosaic_gpu.mamba3 import mamba3 as recurrence
        from jla.ops.mosaic_gpu.mamba3_fused import mamba3_siso_fused

        shape = heads_shape(LAYER, f"{BF16} D gated")
        note = "core only: C and B of every head given, without biases, rotation, D and z"
        run = lambda *arrays: recurrence(*arrays)[0]  # noqa: E731
        yield shape, BF16, "Mosaic GPU, mamba3", note, run, core_inputs(LAYER)
        run = lambda *arrays: mamba3_siso_fused(*arrays)[0]  # noqa: E731
        yield shape, BF16, "Mosaic GPU, mamba3_siso_fused", EVERYTHING, run, mamba3_inputs(LAYER, False)

    def mamba3_mimo():
        from jla.ops.mosaic_gpu.mamba3_mimo import mamba3_mimo as recurrence

        note = "core only: C, B and x of every head and rank given, without biases, rotation, D and z"
        run = lambda *arrays: recurrence(*arrays)[0]  # noqa: E731
        yield heads_shape(LAYER, f"{BF16} D gated", RANK), BF16, "Mosaic GPU", note, run, core_inputs(LAYER, RANK)

    groups = dict(selective_scan=selective, ssd=ssd, mamba3=mamba3, mamba3_mimo=mamba3_mimo)
    return chosen(op, "jax-linear-attention", groups)


def chosen(op: str | None, package: str, groups: dict[str, Callable]) -> Iterator[Case]:
    """The cases of one operation or all; what cannot be imported says so."""
    name = f"{package} {importlib.metadata.version(package)}"
    for key in [op] if op else groups:
        try:
            for shape, dtype, way, *rest in groups[key]():
                yield Case(key, shape, dtype, f"{name} ({way})", *rest)
        except ImportError as error:
            print(f"{name}: {key} left out: {error}", flush=True)


class Torch:
    """mamba_ssm's arrays, passes and clock."""

    cases = staticmethod(mamba_ssm_cases)
    device = "cuda"

    def __init__(self):
        import torch
        import triton

        self.torch = torch
        self.versions = dict(python=platform.python_version(), torch=torch.__version__, triton=triton.__version__)

    def name(self) -> str:
        return self.torch.cuda.get_device_name()

    def array(self, seed: int, kind, shape: tuple[int, ...], dtype: str):
        torch = self.torch
        random = torch.Generator(self.device).manual_seed(seed) if self.device == "cuda" else None
        if kind == "normal":
            made = torch.randn(shape, generator=random, device=self.device)
        elif kind in ("step", "decay"):
            made = 0.01 + 0.09 * torch.rand(shape, generator=random, device=self.device)
            made = -4 * made if kind == "decay" else made
        elif kind == "ramp":
            made = -torch.arange(1.0, shape[1] + 1, device=self.device).expand(shape).contiguous()
        else:
            made = torch.full(shape, kind, device=self.device)
        return made.to(getattr(torch, dtype))

    def passes(self, function: Callable, inputs: list) -> Iterator[tuple[str, Callable]]:
        torch = self.torch
        yield "forward", lambda: function(*inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        cotangent = torch.randn_like(function(*inputs))

        def both():
            y = function(*leaves)
            return y, *torch.autograd.grad(y, leaves, cotangent)

        yield "forward+backward", both

    def wait(self, outputs) -> None:
        self.torch.cuda.synchronize()

    def finite(self, outputs) -> bool:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return all(bool(x.isfinite().all()) for x in outputs)


class Jax:
    """jla's arrays, passes and clock."""

    cases = staticmethod(jla_cases)

    def __init__(self):
        import jax

        self.jax = jax
        self.versions = dict(python=platform.python_version(), jax=jax.__version__)

    def name(self) -> str:
        return self.jax.devices()[0].device_kind

    def array(self, seed: int, kind, shape: tuple[int, ...], dtype: str):
        jax, jnp, key = self.jax, self.jax.numpy, self.jax.random.key(seed)
        if kind == "normal":
            made = jax.random.normal(key, shape)
        elif kind in ("step", "decay"):
            made = jax.random.uniform(key, shape, minval=0.01, maxval=0.1) * (-4 if kind == "decay" else 1)
        elif kind == "ramp":
            made = -jnp.broadcast_to(jnp.arange(1.0, shape[1] + 1), shape)
        else:
            made = jnp.full(shape, kind)
        return made.astype(dtype)

    def passes(self, function: Callable, inputs: list) -> Iterator[tuple[str, Callable]]:
        yield "forward", functools.partial(self.jax.jit(function), *inputs)
        y = self.jax.eval_shape(function, *inputs)
        cotangent = self.array(len(inputs), "normal", y.shape, y.dtype)

        def both(cotangent, *inputs):
            y, pull_back = self.jax.vjp(function, *inputs)
            return y, pull_back(cotangent)

        yield "forward+backward", functools.partial(self.jax.jit(both), cotangent, *inputs)

    def wait(self, outputs) -> None:
        self.jax.block_until_ready(outputs)

    def finite(self, outputs) -> bool:
        return all(bool(self.jax.numpy.isfinite(x).all()) for x in self.jax.tree.leaves(outputs))


def milliseconds(call: Callable, wait: Callable) -> float:
    """The median time of one call, of several that are queued together, as `kernels_pallas.benchmark` takes it."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            outputs = call()
        wait(outputs)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = max(1, min(50, math.ceil(0.02 / seconds(1))))
    return 1e3 * statistics.median(seconds(calls) for _ in range(7))


def measure(peer: Torch | Jax, case: Case) -> Iterator[dict]:
    """One record for each pass of a case."""
    inputs = [peer.array(seed, *what) for seed, what in enumerate(case.inputs)]
    what = dict(op=case.op, shape=case.shape, dtype=case.dtype, implementation=case.implementation)
    for name, call in peer.passes(case.function, inputs):
        note = case.note if peer.finite(call()) else f"{case.note}; results not finite"
        ms = milliseconds(call, peer.wait)
        yield what | {"milliseconds": round(ms, 3), "pass": name, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=("mamba_ssm", "jla"), required=True)
    parser.add_argument("--op", choices=("selective_scan", "ssd", "mamba3", "mamba3_mimo"), help="only this operation")
    parser.add_argument("--json", metavar="FILE", help="append one line a measurement")
    arguments = parser.parse_args()
    peer = dict(mamba_ssm=Torch, jla=Jax)[arguments.peer]()
    command = f"python experiments/results/kernels/peers.py --peer {arguments.peer}"
    head = dict(
        device=f"{peer.name()} ({platform.machine()}, {platform.system()})",
        versions=peer.versions,
        date=datetime.date.today().isoformat(),
        command=command + (f" --op {arguments.op}" if arguments.op else ""),
    )
    for case in peer.cases(arguments.op):
        label, start = f"{case.op:15} {case.shape:46} {case.implementation}", time.perf_counter()
        try:
            for record in measure(peer, case):
                print(f"{label} {record['pass']} {record['milliseconds']:.3f} ms ({record['note']})", flush=True)
                if arguments.json:
                    with open(arguments.json, "a") as file:
                        file.write(json.dumps(record | head) + "\n")
        except Exception as error:  # the others are still timed: a GPU's time is dear
            print(f"{label} failed: {type(error).__name__}: {str(error)[:300]!r}", flush=True)
        print(f"  {time.perf_counter() - start:.0f} s with compiling and tuning", flush=True)


if __name__ == "__main__":
    main()
