"""Kernels and convolutions against direct sums in float64; S4's kernel has its own file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.convolution import convolve, vandermonde
from tests.oracles import assert_close


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 1000])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_vandermonde_is_the_sum_of_powers(length, kind, rng, x64):
    a = rng.uniform(0.5, 1, size=(3, 4)) * np.exp(1j * rng.normal(size=(3, 4)) * (kind == "complex"))
    c = rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4)) * (kind == "complex")
    a, c = (x if kind == "complex" else x.real for x in (a, c))
    a[0] = 1, 0, np.exp(-300), 0.5
    expected = np.einsum("dn,dnl->dl", c, a[..., None] ** np.arange(length)).real
    assert_close(vandermonde(jnp.asarray(a), jnp.asarray(c), length), expected, scale=length)
    grad = jax.grad(lambda a: jnp.sum(vandermonde(a, jnp.asarray(c), length)), holomorphic=False)
    assert np.all(np.isfinite(grad(jnp.asarray(a))))


def test_vandermonde_in_float32_over_1e5_tokens():
    """The slowest modes of a Path-X initialisation: rounding grows with the phase, not with the doubling."""
    rate, frequency = 0.5e-4, np.pi * np.arange(8) * 1e-4
    a = np.exp(-rate + 1j * frequency)[None]
    length = 100_000
    exact = np.exp((-rate + 1j * frequency)[:, None] * np.arange(length)).sum(0).real[None]
    out = vandermonde(jnp.asarray(a, jnp.complex64), jnp.ones((1, 8), jnp.complex64), length)
    assert_close(out, exact, scale=length)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("taps", [1, 5, 65])
@pytest.mark.parametrize("both", [False, True])
def test_convolve_is_the_direct_sum(both, taps, length, rng, x64):
    """A circle one token short would wrap the last tap onto the first token."""
    u, K, R = rng.normal(size=(2, length, 3)), rng.normal(size=(3, taps)), rng.normal(size=(3, taps))
    expected = np.zeros_like(u)
    for t in range(length):
        for j in range(min(taps, t + 1)):
            expected[:, t] += K[:, j] * u[:, t - j]
        for j in range(min(taps, length - t - 1) if both else 0):
            expected[:, t] += R[:, j] * u[:, t + 1 + j]
    out = convolve(jnp.asarray(u), jnp.asarray(K), jnp.asarray(R) if both else None)
    assert_close(out, expected, scale=length * taps)
