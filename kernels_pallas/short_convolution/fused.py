"""What the kernels of all backends share: one rule for the gradients, and what they cannot take.

A kernel module has `refusal(x, k)`, `forward(x, weight_kd, bias_d, state_bkd, reach_bl, silu) -> (y,)`
and `backward(x, dy, weight_kd, bias_d, state_bkd, reach_bl, silu) -> (dx, sums)`, which makes y's values before the
activation again; sums (b, parts, k + 1, d) are parts of the gradients of the taps and the bias, in float32.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.partition import over_batch
from kernels_pallas.short_convolution import xla

WIDTHS = (2, 3, 4)


def refusal(implementation: str, x: jax.Array, k: int) -> str:
    """Why the kernel for "gpu" or "tpu" cannot take these tokens and so many taps; "" where it can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}; it takes float32 and bfloat16"
    if k not in WIDTHS:
        return f"there are {k} taps; it takes {WIDTHS[0]} to {WIDTHS[-1]}"
    return _module(implementation).refusal(x, k)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def run(x_bld, weight_kd, bias_d, state_bkd, reach_bl, activation: str, implementation: str):
    """y, in x's dtype; all but x in float32, reach_bl as in `xla.taps`."""
    return _call("forward", (x_bld,), ("b l d",), weight_kd, bias_d, state_bkd, reach_bl, activation, implementation)[0]


def _forward(x, weight, bias, state, reach, activation, implementation):
    return run(x, weight, bias, state, reach, activation, implementation), (x, weight, bias, state, reach)


def _backward(activation, implementation, saved, dy):
    x, weight, bias, state, reach = saved
    results = "b l d", "b c t d"
    dx, sums = _call("backward", (x, dy), results, weight, bias, state, reach, activation, implementation)
    total, first = sums.sum((0, 1)), slice(None, state.shape[1])  # only the first tokens see the state

    def opening(state):
        seen = None if reach is None else reach[:, first]
        y = xla.taps(x[:, first].astype(jnp.float32), weight, state, seen) + bias[None, None]
        return xla.ACTIVATIONS[activation](y)

    (d_state,) = jax.vjp(opening, state)[1](dy[:, first].astype(jnp.float32))
    return dx, total[:-1], total[-1], d_state, None


run.defvjp(_forward, _backward)


def _call(name, tokens, results, weight, bias, state, reach, activation, implementation) -> tuple:
    """A kernel, on every device for its own part of the batch."""
    kernel, fixed = getattr(_module(implementation), name), len(tokens) + 3
    operands = ["b l d"] * len(tokens) + ["k d", "d", "b s d"] + ["b l"] * (reach is not None)

    def function(*arrays):
        return kernel(*arrays[:fixed], *(arrays[fixed:] or (None,)), activation == "silu")

    arrays = (*tokens, weight, bias, state, *(() if reach is None else (reach,)))
    return over_batch(function, ", ".join(operands), ", ".join(results))(*arrays)


def _module(implementation: str):
    return importlib.import_module(f"kernels_pallas.short_convolution.{implementation}")
