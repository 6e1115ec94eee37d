"""h_t = a_t h_{t-1} + b_t by the associative operator (a, b) o (a', b') = (a a', a' b + b')."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.associative_scan.reference import adjoint_by, plus, times


def compose(first: tuple, second: tuple) -> tuple:
    """First h -> a h + b, then h -> a' h + b', as one map; of planes."""
    (a, b), (a_next, b_next) = first, second
    return times(a, a_next), plus(times(a_next, b), b_next)


def scan(a: tuple, b: tuple, h: tuple, reverse: bool) -> tuple[tuple, tuple]:
    """All states, in logarithmic depth, and the last; as `reference.scan`."""
    dtypes, first = [x.dtype for x in b], -1 if reverse else 0
    a, b = jax.tree.map(lambda x: x.astype(h[0].dtype), (a, b))
    a = tuple(jnp.broadcast_to(x, b[0].shape) for x in a) if a[0].ndim == 1 else a
    entering = times(tuple(x[:, first] for x in a), h)
    b = tuple(x.at[:, first].add(e) for x, e in zip(b, entering, strict=True))
    states = jax.lax.associative_scan(compose, (a, b), reverse=reverse, axis=1)[1]
    last = tuple(x[:, 0 if reverse else -1] for x in states)
    return tuple(x.astype(dtype) for x, dtype in zip(states, dtypes, strict=True)), last


adjoint = partial(adjoint_by, scan)
