"""The calls that `kernels_pallas.benchmark` times, of every operation, by the shapes in its specs."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import associative_scan as scan
from kernels_pallas import diagonal_system as diagonal
from kernels_pallas import long_convolution as convolution
from kernels_pallas import mamba3 as trapezoid
from kernels_pallas import selective_scan as selective
from kernels_pallas import short_convolution as short
from kernels_pallas import ssd as duality
from kernels_pallas.associative_scan import specs as scan_specs
from kernels_pallas.diagonal_system import specs as diagonal_specs
from kernels_pallas.long_convolution import specs as convolution_specs
from kernels_pallas.mamba3 import specs as trapezoid_specs
from kernels_pallas.selective_scan import specs as selective_specs
from kernels_pallas.selective_scan import step as selective_step
from kernels_pallas.selective_scan import step_specs as selective_step_specs
from kernels_pallas.short_convolution import specs as short_specs
from kernels_pallas.ssd import specs as duality_specs
from kernels_pallas.ssd import step as duality_step
from kernels_pallas.ssd import step_specs as duality_step_specs


class Case(NamedTuple):
    """What is timed: a function of the same inputs by implementation, and the implementation to compare with.

    A step has no backward pass, and returns its first input anew: a state, which the next call goes on from.
    """

    op: ModuleType
    shape: str
    dtype: str
    baseline: str
    function: Callable[[str], Callable]
    inputs: tuple
    forward_bytes: int
    backward_bytes: int = 0
    step: bool = False

    @property
    def name(self) -> str:
        return called(self.op)

    @property
    def implementations(self) -> list[str]:
        """Those that are timed on this backend."""
        return list(dict.fromkeys([*here(self.op), self.baseline]))


def called(op: ModuleType) -> str:
    """The name of an operation and of its function."""
    return "_".join(op.__name__.split(".")[1:])


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def first(op: Callable) -> Callable:
    """The op's first output as a function of its arrays, by implementation."""
    return lambda implementation: lambda *arrays: op(*arrays, implementation=implementation)[0]


def size(*arrays) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(arrays))


def here(op: ModuleType) -> list[str]:
    """An operation's implementations that are timed on this backend: on a CPU its loop is the faster scan."""
    backend = jax.default_backend()
    names = ("reference", "xla") if backend == "cpu" and op is scan else ("xla", backend)
    return [name for name in names if name in op.IMPLEMENTATIONS]


def scans(specs) -> Iterator[Case]:
    for spec in specs:
        shape = (spec.batch, spec.length, spec.channels)
        modulus = jnp.exp(-jax.random.uniform(jax.random.key(0), shape if spec.per_token else shape[-1:]) / 10)
        complex_ = spec.number == "complex"
        a = (0.8 * modulus, 0.6 * modulus) if complex_ else modulus
        b = (normal(1, *shape), normal(2, *shape)) if complex_ else normal(1, *shape)
        a, b = jax.tree.map(lambda x: x.astype(spec.dtype), (a, b))  # noqa: B023
        forward, backward = size(a, b, b), size(a, b, b, b) + size(a) * spec.per_token
        yield Case(scan, str(spec), spec.dtype, "xla", first(scan.associative_scan), (a, b), forward, backward)


def fft(u, kernel, channels_first: bool = False):
    """The convolution with a kernel (d, l) that is given, by FFT; u (b, l, d) or (d, b, l)."""
    u_dbl = u if channels_first else jnp.transpose(u, (2, 0, 1))
    length = u_dbl.shape[2]
    spectra = jnp.fft.rfft(jnp.concatenate([kernel[:, None], u_dbl], 1), 2 * length)
    y_dbl = jnp.fft.irfft(spectra[:, 1:] * spectra[:, :1], 2 * length)[..., :length]
    return y_dbl if channels_first else jnp.transpose(y_dbl, (1, 2, 0))


def convolutions(specs) -> Iterator[Case]:
    for spec in specs:
        d, n, batch, length = spec.channels, spec.states, spec.batch, spec.length
        z = np.geomspace(0.001, 0.1, d)[:, None] * (-0.5 + 1j * np.pi * np.arange(n))
        a, b, D = jnp.exp(z.astype(np.complex64)), jnp.ones((d, n), jnp.complex64), jnp.ones(d)
        u = normal(0, *((d, batch, length) if spec.channels_first else (batch, length, d)))
        c, kernel = jax.lax.complex(normal(1, d, n), normal(2, d, n)), normal(3, d, length)
        options = dict(channels_first=spec.channels_first)
        by_fft = partial(lambda kernel, options, u, a, b, c, D: fft(u, kernel, **options), kernel, options)
        chunks = first(partial(convolution.long_convolution, **options))
        function = partial(lambda by_fft, chunks, name: by_fft if name == "fft" else chunks(name), by_fft, chunks)
        inputs = (u, a, b, c, D)
        yield Case(convolution, str(spec), "float32", "fft", function, inputs, size(u, u), size(u, u, u))


def diagonal_systems(specs) -> Iterator[Case]:
    for spec in specs:
        d, n = spec.channels, spec.states
        a = jnp.exp(jax.lax.complex(-jnp.geomspace(0.001, 0.1, n), jnp.linspace(0, 3, n)))
        B = jax.lax.complex(normal(1, n, d), normal(2, n, d)) / d
        C = jax.lax.complex(normal(3, d, n), normal(4, d, n)) / n
        u = normal(0, spec.batch, spec.length, d).astype(spec.dtype)
        inputs = (u, a, B, C, jnp.ones(d))
        function = first(diagonal.diagonal_system)
        yield Case(diagonal, str(spec), spec.dtype, "xla", function, inputs, size(u, u), size(u, u, u))


def selective_scans(specs) -> Iterator[Case]:
    def gated(name):
        op = selective.selective_scan
        return lambda x, dt, A, B, C, D, z, bias: op(
            x, dt, A, B, C, D, z_bld=z, dt_bias_d=bias, softplus=True, implementation=name
        )[0]

    for spec in specs:
        d, n, tokens = spec.channels, spec.states, (spec.batch, spec.length)
        x, dt, z = (normal(i, *tokens, d).astype(spec.dtype) for i in range(3))
        B, C = (normal(i, *tokens, n).astype(spec.dtype) for i in (3, 4))
        A = -jnp.broadcast_to(jnp.arange(1.0, n + 1), (d, n))
        inputs = (x, dt, A, B, C, jnp.ones(d), z, jnp.full(d, -4.0))
        moved = size(x, dt, z, B, C, x)
        yield Case(selective, str(spec), spec.dtype, "xla", gated, inputs, moved, 2 * moved - size(x))


def dualities(specs) -> Iterator[Case]:
    def scaled(name):
        return lambda x, a, B, C, dt, D: duality.ssd(x, a, B, C, dt_blh=dt, D_h=D, implementation=name)[0]

    for spec in specs:
        tokens, heads = (spec.batch, spec.length), spec.heads
        x = normal(0, *tokens, heads, spec.channels).astype(spec.dtype)
        B, C = (normal(i, *tokens, spec.groups, spec.states).astype(spec.dtype) for i in (1, 2))
        dt = jax.random.uniform(jax.random.key(3), (*tokens, heads), minval=0.01, maxval=0.1)
        inputs = (x, -4 * dt, B, C, dt, jnp.ones(heads))
        moved = size(x, B, C, dt, dt, x)
        yield Case(duality, str(spec), spec.dtype, "xla", scaled, inputs, moved, 2 * moved - size(x))


def trapezoids(specs) -> Iterator[Case]:
    names = "v B C log_decay_blh previous_blh current_blh theta_blhs rate_blh B_bias_hrn C_bias_hrn D_h z".split()

    def given(name):
        def run(*inputs):
            arguments = dict(zip(names, inputs, strict=True))
            return trapezoid.mamba3(**arguments, layout="pairs", implementation=name)[0]

        return run

    for spec in specs:
        tokens, heads, n = (spec.batch, spec.length), spec.heads, spec.states
        lanes, biases = (*tokens, spec.rank) if spec.rank > 1 else tokens, (heads, spec.rank, n)
        v, z = (normal(i, *lanes, heads, spec.channels).astype(spec.dtype) for i in (0, 1))
        B, C = (normal(i, *lanes, spec.groups, n).astype(spec.dtype) for i in (2, 3))
        dt = jax.random.uniform(jax.random.key(4), (*tokens, heads), minval=0.01, maxval=0.1)
        theta = jnp.pi * jnp.tanh(normal(5, *tokens, 1, spec.planes))
        inputs = (v, B, C, -4 * dt, dt / 2, dt / 2, theta, dt, normal(6, *biases), normal(7, *biases))
        inputs += (jnp.ones(heads), z)
        moved = size(v, z, v, B, C, theta, dt, dt, dt, dt)
        yield Case(trapezoid, str(spec), spec.dtype, "xla", given, inputs, moved, 2 * moved - size(v))


def short_convolutions(specs) -> Iterator[Case]:
    for spec in specs:
        x = normal(0, spec.batch, spec.length, spec.channels).astype(spec.dtype)
        inputs = (x, normal(1, spec.channels, spec.taps), normal(2, spec.channels))
        function = first(short.short_convolution)
        yield Case(short, str(spec), spec.dtype, "xla", function, inputs, size(x, x), size(x, x, x))


def selective_steps(specs) -> Iterator[Case]:
    def gated(name):
        op = selective_step.selective_scan_step
        return lambda h, x, dt, A, B, C, D, z, bias: op(
            x, dt, A, B, C, D, h, z_bd=z, dt_bias_d=bias, softplus=True, implementation=name
        )[::-1]

    for spec in specs:
        batch, d, n = spec.batch, spec.channels, spec.states
        x, z = (normal(i, batch, d).astype(spec.dtype) for i in range(2))
        dt, h, B, C = (normal(2 + i, batch, *shape) for i, shape in enumerate([(d,), (d, n), (n,), (n,)]))
        A = -jnp.broadcast_to(jnp.arange(1.0, n + 1), (d, n))
        inputs = (h, x, dt, A, B, C, jnp.ones(d), z, jnp.full(d, -4.0))
        yield Case(selective_step, str(spec), spec.dtype, "xla", gated, inputs, size(h, inputs, x), step=True)


def duality_steps(specs) -> Iterator[Case]:
    def scaled(name):
        op = duality_step.ssd_step
        return lambda h, x, a, B, C, dt: op(x, a, B, C, h, dt_bh=dt, implementation=name)[::-1]

    for spec in specs:
        batch, heads, p = spec.batch, spec.heads, spec.channels
        x, y = (normal(i, batch, lanes, heads, p).astype(spec.dtype) for i, lanes in enumerate(spec[5:7]))
        shape = spec.groups, spec.states
        B, C = (normal(2 + i, batch, lanes, *shape).astype(spec.dtype) for i, lanes in enumerate(spec[5:7]))
        dt = jax.random.uniform(jax.random.key(3), (batch, heads), minval=0.01, maxval=0.1)
        inputs = (normal(4, batch, heads, p, spec.states), x, -4 * dt, B, C, dt)
        yield Case(duality_step, str(spec), spec.dtype, "xla", scaled, inputs, size(inputs[0], inputs, y), step=True)


OPERATIONS = {
    "associative_scan": (scans, scan_specs),
    "long_convolution": (convolutions, convolution_specs),
    "diagonal_system": (diagonal_systems, diagonal_specs),
    "selective_scan": (selective_scans, selective_specs),
    "selective_scan_step": (selective_steps, selective_step_specs),
    "ssd": (dualities, duality_specs),
    "ssd_step": (duality_steps, duality_step_specs),
    "mamba3": (trapezoids, trapezoid_specs),
    "short_convolution": (short_convolutions, short_specs),
}
