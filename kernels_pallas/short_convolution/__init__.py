r"""The short causal convolution in front of a selective state space model, one filter of k taps a channel.

$y_t = \mathrm{act}(b + \sum_{j<k} w_{k-1-j} x_{t-j})$: the last tap meets the present token. What a later call needs
of this one is its last k - 1 inputs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.dispatch import FUSED, at_least_float32, choose
from kernels_pallas.short_convolution import fused, reference, xla
from kernels_pallas.short_convolution.xla import ACTIVATIONS

__all__ = ["ACTIVATIONS", "IMPLEMENTATIONS", "short_convolution"]

IMPLEMENTATIONS = ("reference", "xla", *FUSED)


def short_convolution(
    x_bld: Float[Array, "b l d"],
    weight_dk: Float[Array, "d k"],
    bias_d: Float[Array, " d"] | None = None,
    initial_state: Float[Array, "b k1 d"] | None = None,
    *,
    reset: Bool[Array, "b l"] | None = None,
    activation: str = "silu",
    implementation: str = "auto",
) -> tuple[Float[Array, "b l d"], Float[Array, "b k1 d"]]:
    """y, and the last k - 1 inputs in float32 or better: the state of the next call.

    initial_state: the k - 1 inputs before the first token, the newest last; zeros by default. reset: True at tokens
    that forget the inputs before them; the state holds zeros for inputs from before the last one.
    activation: silu or none. Computed in float32 or better; y has x's dtype.
    Raises ValueError naming the argument whose shape or value does not fit, or an unknown implementation.
    """
    _check(x_bld, weight_dk, bias_d, initial_state, reset, activation)
    (batch, _, d), k = x_bld.shape, weight_dk.shape[1]
    precise = at_least_float32(x_bld.dtype)
    weight = weight_dk.astype(precise)
    bias = jnp.zeros(d, precise) if bias_d is None else bias_d.astype(precise)
    state = jnp.zeros((batch, k - 1, d), precise) if initial_state is None else initial_state.astype(precise)
    chosen = choose(implementation, IMPLEMENTATIONS, lambda name: fused.refusal(name, x_bld, k), "xla")
    if chosen in FUSED:
        reach = None if reset is None else xla.reach(reset, k)
        y = fused.run(x_bld, weight.T, bias, state, reach, activation, chosen)
        return y, xla.last_inputs(x_bld, state, reach)
    run = reference.run if chosen == "reference" else xla.run
    y, last = run(x_bld.astype(precise), weight, state, reset)
    return ACTIVATIONS[activation](y + bias[None, None]).astype(x_bld.dtype), last


def _check(x, weight, bias, state, reset, activation) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x_bld must be (batch, length, width), none of them 0; it is {x.shape}")
    batch, length, d = x.shape
    if weight.ndim != 2 or weight.shape[0] != d or not weight.shape[1]:
        raise ValueError(f"weight_dk has shape {weight.shape}; x_bld {x.shape} needs ({d}, at least 1 tap)")
    k = weight.shape[1]
    shapes = {
        "bias_d": (bias, (d,)),
        "initial_state": (state, (batch, k - 1, d)),
        "reset": (reset, (batch, length)),
    }
    for name, (value, shape) in shapes.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; x_bld {x.shape} and {k} taps need {shape}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it may be {', '.join(ACTIVATIONS)}")
