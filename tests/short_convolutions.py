"""Problems for the kernels of the short convolution, and float64 values and gradients to hold them to."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.short_convolution import short_convolution
from tests.oracles import assert_close

NAMES = ("x", "weight", "bias", "state")


def problem(rng, shape, k, dtype):
    """(x, weight, bias, state), resets of which one row has many, and the cotangents of y and the last inputs."""
    batch, length, d = shape
    shapes = shape, (d, k), (d,), (batch, k - 1, d)
    x, *rest = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    reset = np.zeros((batch, length), bool)
    reset[0, :: length // 3], reset[-1, -2] = True, True
    bars = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=shapes[3]), jnp.float32)
    return (x.astype(dtype), *rest), jnp.asarray(reset), bars


def both(arrays, bars, **options):
    """(y, last), and the gradients of all arrays."""
    outputs, pull = jax.vjp(lambda *a: short_convolution(*a, **options), *arrays)
    return outputs, pull(bars)


def check(implementation, rng, shape, k, dtype, resets, activation):
    """A kernel in a simulator, which the caller enters, against the float64 loop."""
    arrays, reset, bars = problem(rng, shape, k, dtype)
    options = dict(reset=reset if resets else None, activation=activation)
    run = jax.jit(lambda a, b: both(a, b, implementation=implementation, **options))
    outputs, gradients = jax.block_until_ready(run(arrays, bars))
    assert outputs[0].dtype == gradients[0].dtype == dtype
    with jax.enable_x64(True):
        double = lambda v: jnp.asarray(np.asarray(v, np.float64))  # noqa: E731
        wide = jax.tree.map(double, (arrays, bars))
        expected = jax.jit(lambda a, b: both(a, b, implementation="reference", **options))(*wide)
        expected = jax.tree.map(np.asarray, expected)
    for name, out, ref in zip(("y", "last"), outputs, expected[0], strict=True):
        assert_close(out, ref, label=name)
    for name, out, ref in zip(NAMES, gradients, expected[1], strict=True):
        summed = 1 if name in ("x", "state") else np.prod(shape[:2])
        assert_close(out, ref, scale=summed, gradient=name != "x", label=f"gradient of {name}")


def check_mapped(implementation, rng, shape):
    """`jax.vmap` over calls that each have their own filters, against that of the definition."""
    (x, weight, bias, state), reset, bars = problem(rng, shape, 4, jnp.float32)
    fold = lambda v: v.reshape(2, -1, *v.shape[1:])  # noqa: E731
    x, state, reset, bars = jax.tree.map(fold, (x, state, reset, bars))
    weight, bias = (jnp.stack([v, -0.5 * v]) for v in (weight, bias))

    def run(name):
        one = lambda arrays, reset, bars: both(arrays, bars, reset=reset, implementation=name)  # noqa: E731
        return jax.tree.leaves(jax.block_until_ready(jax.jit(jax.vmap(one))((x, weight, bias, state), reset, bars)))

    for out, ref in zip(run(implementation), run("reference"), strict=True):
        assert_close(out, np.asarray(ref, np.float64), scale=shape[1], gradient=True)
