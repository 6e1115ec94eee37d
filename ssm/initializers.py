"""Initialisers that several mixers share, and complex parameters kept as two real ones."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex


def log_uniform(low: float, high: float) -> Callable:
    """log dt with dt log-uniform in [low, high]; the range in units of time per token.

    Raises ValueError naming dt_min and dt_max where 0 < dt_min <= dt_max does not hold.
    """
    if not 0 < low <= high:
        raise ValueError(f"dt_min is {low} and dt_max is {high}; they must satisfy 0 < dt_min <= dt_max")
    return lambda key, shape: jax.random.uniform(key, shape, minval=np.log(low), maxval=np.log(high))


def softplus_inverse_dt(low: float, high: float, floor: float = 1e-4) -> Callable:
    """The x with softplus(x) = max(dt, floor), dt log-uniform in [low, high]: Mamba's dt bias at the start.

    Raises as `log_uniform` does.
    """
    draw = log_uniform(low, high)

    def init(key, shape):
        dt = jnp.maximum(jnp.exp(draw(key, shape)), floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-1, 1) / sqrt(fan_in)


def short_convolution_parameters(channels: int, width: int, bias: bool) -> Callable:
    """weight (channels, width), and bias (channels,) where wanted, of a depthwise convolution; as `uniform_fan_in`."""

    def init(key):
        shapes = {"weight": (channels, width)} | ({"bias": (channels,)} if bias else {})
        keys, bound = jax.random.split(key, len(shapes)), width**-0.5
        draw = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)  # noqa: E731
        return {name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

    return init


def constant(value: np.ndarray | complex) -> Callable:
    """A fixed array, repeated along the axes that `shape` has in front of its own."""
    value = np.asarray(value, np.complex64 if np.iscomplexobj(value) else np.float32)
    return lambda key, shape: jnp.broadcast_to(value.reshape((1,) * (len(shape) - value.ndim) + value.shape), shape)


def complex_normal(variance: float) -> Callable:
    """Real and imaginary part independent, `variance` in all."""
    return lambda key, shape: variance**0.5 * jax.random.normal(key, shape, jnp.complex64)


def complex_parameter(module: nn.Module, name: str, init: Callable, *args) -> Complex[Array, "..."]:
    """The parameter name/real + i name/imag, from a complex initialiser `init(key, *args)`.

    Optimisers see two real arrays: a complex one confuses most of them.
    """

    def planes(key):
        value = jnp.asarray(init(key, *args), jnp.complex64)
        return {"real": value.real, "imag": value.imag}

    kept = module.param(name, planes)
    return jax.lax.complex(kept["real"], kept["imag"])
