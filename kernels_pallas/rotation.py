"""Planes that turn: rotary angles and their sum over time, exact at any length."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kernels_pallas.associative_scan import associative_scan

LAYOUTS = ("pairs", "halves")


def rotate(
    x: Float[Array, "... n"], turn: tuple[Float[Array, "... s"], Float[Array, "... s"]], layout: str
) -> Float[Array, "... n"]:
    """x with its plane i turned by the angle whose (cos, sin) is turn i; planes without one stay. The rest broadcasts.

    Plane i holds elements 2 i and 2 i + 1 where layout is "pairs" (the published code's SISO Mamba-3), i and i + n / 2
    where it is "halves" (its MIMO, and attention). Raises ValueError for another layout, or more angles than planes.
    """
    n, s = x.shape[-1], turn[0].shape[-1]
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it may be {' or '.join(LAYOUTS)}")
    if n % 2 or s > n // 2:
        raise ValueError(f"{s} angles for {n} states: the states must be even, with an angle for at most each two")
    shape, axis = ((n // 2, 2), -1) if layout == "pairs" else ((2, n // 2), -2)
    planes, still = x.reshape(*x.shape[:-1], *shape), ((0, 0),) * (turn[0].ndim - 1) + ((0, n // 2 - s),)
    cos, sin = (jnp.pad(each, still, constant_values=value) for each, value in zip(turn, (1, 0), strict=True))
    cos, sin = (jnp.expand_dims(each, axis) for each in (cos, sin))
    sign = np.array([-1, 1], x.dtype).reshape((1,) * (sin.ndim - 2) + ((1, 2) if axis == -1 else (2, 1)))
    return (planes * cos + jnp.flip(planes, axis) * (sign * sin)).reshape(x.shape)


@jax.custom_vjp
def summed_angle(
    angle_blhs: Float[Array, "b l h s"], start_bhs: Float[Array, "b h s"], reset: Bool[Array, "b l"] | None
) -> Float[Array, "b l h s"]:
    """The sum of the angles up to each token, in radians within [-pi, pi], anew from 0 where reset.

    Summed as integers of 2^-32 turns (2^-64 for float64), whose overflow is the full turn: the sum itself has no
    rounding, in any order, at any length. reset: False at the first token, which continues from `start_bhs`.
    """
    each = units(angle_blhs).at[:, 0].add(units(start_bhs))
    total = jnp.cumsum(each, 1)
    if reset is not None:
        origin = jax.lax.cummax(jnp.where(reset, jnp.arange(reset.shape[1])[None], 0), axis=1)
        total -= jnp.take_along_axis(total - each, origin[..., None, None], 1)
    return total.astype(angle_blhs.dtype) * (2 * np.pi / 2.0 ** jnp.finfo(angle_blhs.dtype).bits)


def units(radians):
    """Radians modulo 2 pi as signed integers, of which 2^bits are a turn.

    1 / (2 pi) comes in two parts, as one rounds. Half a turn is the one number without room above 0: it is minus half.
    """
    bits = jnp.finfo(radians.dtype).bits
    per_radian = np.asarray(1 / (2 * np.pi), radians.dtype)
    turns = radians * per_radian
    near = jnp.round((turns - jnp.round(turns)) * 2.0**bits)
    near = jnp.where(near < 2.0 ** (bits - 1), near, -(2.0 ** (bits - 1)))
    rest = jnp.round(radians * ((1 / (2 * np.pi) - float(per_radian)) * 2.0**bits))
    return near.astype(f"int{bits}") + rest.astype(f"int{bits}")


def _summed_angle_bar(reset, bar):
    ends = None if reset is None else jnp.roll(reset, -1, 1)
    flat = bar.reshape(*bar.shape[:2], -1)
    total, _ = associative_scan(jnp.ones_like(flat[0, 0]), flat, reverse=True, reset=ends)
    total = total.reshape(bar.shape)
    return total, total[:, 0], None


summed_angle.defvjp(lambda *arguments: (summed_angle(*arguments), arguments[2]), _summed_angle_bar)
