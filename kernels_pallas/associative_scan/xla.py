"""h_t = a_t h_{t-1} + b_t by the associative operator (a, b) o (a', b') = (a a', a' b + b')."""

import jax
import jax.numpy as jnp

from kernels_pallas.associative_scan.reference import plus, times


def compose(first: tuple, second: tuple) -> tuple:
    """First h -> a h + b, then h -> a' h + b', as one map; of planes."""
    (a, b), (a_next, b_next) = first, second
    return times(a, a_next), plus(times(a_next, b), b_next)


def scan(a: tuple, b: tuple, h: tuple, reverse: bool) -> tuple:
    """All states, in logarithmic depth; arguments as in `reference.scan`."""
    a = tuple(jnp.broadcast_to(x, b[0].shape) for x in a) if a[0].ndim == 1 else a
    first = -1 if reverse else 0
    entering = times(tuple(x[:, first] for x in a), h)
    b = tuple(x.at[:, first].add(e) for x, e in zip(b, entering, strict=True))
    return jax.lax.associative_scan(compose, (a, b), reverse=reverse, axis=1)[1]
