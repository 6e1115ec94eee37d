"""h_t = a_t h_{t-1} + b_t, one token after another: the definition, and the fastest form on a CPU."""

import jax
import jax.numpy as jnp


def times(x: tuple, y: tuple) -> tuple:
    """The product of two numbers given as planes: (real,) or (real, imaginary)."""
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def plus(x: tuple, y: tuple) -> tuple:
    """The sum of two numbers given as planes."""
    return tuple(p + q for p, q in zip(x, y, strict=True))


def conjugate(x: tuple) -> tuple:
    """The conjugate of a number given as planes."""
    return (x[0], *(-y for y in x[1:]))


def scan(a: tuple, b: tuple, h: tuple, reverse: bool) -> tuple[tuple, tuple]:
    """All states, in b's dtype, and the last one in h's: planes of a (b, l, n) or (n,), of b (b, l, n), of the state
    h (b, n) before the first, which has the precision that all is computed in."""
    per_token = a[0].ndim == 3
    in_time = lambda planes: tuple(jnp.moveaxis(x, 1, 0) for x in planes)  # noqa: E731
    precise = lambda planes: tuple(x.astype(h[0].dtype) for x in planes)  # noqa: E731

    def advance(state, xs):
        a_t, b_t = map(precise, xs if per_token else (a, xs))
        state = plus(times(tuple(jnp.broadcast_to(x, h[0].shape) for x in a_t), state), b_t)
        return state, tuple(x.astype(y.dtype) for x, y in zip(state, b, strict=True))

    xs = (in_time(a), in_time(b)) if per_token else in_time(b)
    last, states = jax.lax.scan(advance, h, xs, reverse=reverse)
    return tuple(jnp.moveaxis(x, 0, 1) for x in states), last


def adjoint(a: tuple, h: tuple, states: tuple, d_states: tuple, d_last: tuple, reverse: bool) -> tuple:
    """The cotangents of a, b and h, from those of the states and of the last one; of an a (n,) for each row, (b, n)."""
    return adjoint_by(scan, a, h, states, d_states, d_last, reverse)


def adjoint_by(scan, a: tuple, h: tuple, states: tuple, d_states: tuple, d_last: tuple, reverse: bool) -> tuple:
    """`adjoint` as a scan in the other direction, with a shifted by a token."""
    first, last, per_token = (-1, 0, a[0].ndim == 3) if reverse else (0, -1, a[0].ndim == 3)
    precise = lambda planes: tuple(x.astype(h[0].dtype) for x in planes)  # noqa: E731
    a_conj, zero = conjugate(precise(a)), tuple(jnp.zeros_like(x) for x in h)
    a_next = tuple(_shift(x, z, not reverse) for x, z in zip(a_conj, zero, strict=True)) if per_token else a_conj
    d_all = tuple(x.at[:, last].add(y) for x, y in zip(precise(d_states), d_last, strict=True))
    g, _ = scan(a_next, d_all, zero, not reverse)
    before = tuple(_shift(x, y, reverse) for x, y in zip(precise(states), h, strict=True))
    a_bar = times(g, conjugate(before))
    if not per_token:
        a_bar = tuple(x.sum(1) for x in a_bar)
    entry = tuple(x[:, first] if per_token else jnp.broadcast_to(x, h[0].shape) for x in a_conj)
    h_bar = times(entry, tuple(x[:, first] for x in g))
    return a_bar, tuple(x.astype(y.dtype) for x, y in zip(g, d_states, strict=True)), h_bar


def _shift(x, entering, backwards):
    """x_{t-1} with `entering` at the first token; or x_{t+1} with it at the last, if backwards."""
    entering = entering[:, None]
    return jnp.concatenate([x[:, 1:], entering] if backwards else [entering, x[:, :-1]], 1)
