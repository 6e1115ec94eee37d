r"""Mamba-3 on NVIDIA Hopper GPUs: state space duality's walk, whose warpgroups make the keys of their heads themselves.

Of B, C and theta, which heads share, a chunk is fetched once for two heads, and no key of a head reaches memory.
With $u_t = \gamma_t + \beta_{t+1}$, all that later tokens read of token t is $u_t v_t k_t^\top$, decayed, and what it
reads of itself is $\gamma_t v_t k_t^\top$: no token looks ahead, and nothing is subtracted again. Angles are not
reset, as tokens on the two sides of a reset do not read each other; the last state is turned back by their sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.mamba3.gpu_angles import sums
from kernels_pallas.mamba3.gpu_core import fused
from kernels_pallas.mamba3.gpu_tiles import BLOCK
from kernels_pallas.mamba3.reference import outer
from kernels_pallas.mamba3.tokens import State, Tokens
from kernels_pallas.partition import over_batch
from kernels_pallas.rotation import rotate, units
from kernels_pallas.ssd.gpu_tiles import Q

CHANNELS, STATES, RANKS = (32, 64, 128), 128, (1, 2, 4, 8, 16)
PER_TURN = 2.0**32  # units of `rotation`


def refusal(tokens: Tokens, z) -> str:
    """Why these cannot be run here; "" where they can."""
    (*_, rank, _, p), n = tokens.v.shape, tokens.B.shape[-1]
    for name, x in dict(v=tokens.v, z=z).items():
        if x is not None and x.dtype != jnp.bfloat16:
            return f"{name} is {x.dtype}, and its products are of bfloat16"
    if p not in CHANNELS:
        return f"a head has {p} channels, not one of {', '.join(map(str, CHANNELS))}"
    if n > STATES:
        return f"there are {n} states, more than {STATES}"
    if rank not in RANKS:
        return f"the rank is {rank}, not one of {', '.join(map(str, RANKS))}"
    if tokens.theta is not None and tokens.theta.shape[2] > 1:
        return "theta differs by head"
    return ""


def run(tokens: Tokens, state: State, D, z, reset, layout: str) -> tuple:
    """(y (b, l, r, h, p), the last state), of what `refusal` takes; z like v, D (h,), or None."""
    v = tokens.v
    (batch, length, rank, heads, p), n, parts = v.shape, tokens.B.shape[-1], max(1, v.shape[-1] // Q)
    exact = lambda x: x.astype(jnp.float32)  # noqa: E731
    a, previous, current = map(exact, (tokens.log_decay, tokens.previous, tokens.current))
    rate = jnp.ones_like(a) if tokens.rate is None else exact(tokens.rate)
    theta = jnp.zeros((batch, length, 0)) if tokens.theta is None else exact(tokens.theta[:, :, 0])
    planes = ((0, 0), (0, 0), (0, -theta.shape[2] % BLOCK or BLOCK * (not theta.shape[2])))

    def lanes(x):
        x = x.reshape(batch, -1, *x.shape[3:])
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % Q)) + ((0, 0),) * (x.ndim - 2))

    def of_lanes(x, all_lanes):
        others = jnp.broadcast_to((x if all_lanes else jnp.zeros_like(x))[:, :, None], (batch, length, rank - 1, heads))
        return lanes(jnp.concatenate([x[:, :, None], others], 2))

    def bias(x):
        rows = jnp.zeros((heads, 1, n)) if x is None else exact(x)
        return jnp.repeat(jnp.tile(rows, (1, 1 if rank == 1 else Q // rows.shape[1], 1)), parts, 0)

    apart = lambda x: _apart(x, layout)  # noqa: E731
    gate = lambda *x: jnp.repeat(of_lanes(*x), parts, 2)  # noqa: E731
    thetas = lanes(jnp.repeat(jnp.pad(theta, planes)[:, :, None], rank, 2))
    summed = lambda rate: _summed(of_lanes(rate, 0), thetas, rank)[..., : theta.shape[2]]  # noqa: E731
    starts, surplus, angle = _angles(summed, rate, theta, state.angle_bhs, reset)
    of_parts = lambda x: jnp.repeat(jnp.pad(x, planes[:1] * (x.ndim - 1) + planes[2:]), parts, -2)  # noqa: E731
    later = current + jnp.pad(previous[:, 1:], ((0, 0), (0, 1), (0, 0)))
    a = a if reset is None else jnp.where(reset[..., None], -jnp.inf, a)
    started = state.h_bhpn + previous[:, 0, :, None, None] * outer(state.v_brhp, state.k_brhn)
    x, z = (None if u is None else lanes(u.reshape(*u.shape[:3], heads * parts, -1)) for u in (v, z))
    y, h = fused(
        x, (gate(a, 0), gate(later, 1), gate(current, 1), gate(rate, 0)),
        tuple(lanes(apart(u).astype(v.dtype)) for u in (tokens.B, tokens.C)),
        tuple(apart(bias(u)) for u in (tokens.B_bias, tokens.C_bias)),
        thetas, of_parts(state.angle_bhs), of_parts(starts),
        None if reset is None else lanes(jnp.pad(reset[..., None], ((0, 0), (0, 0), (0, rank - 1)))),
        jnp.zeros(heads * parts) if D is None else jnp.repeat(exact(D), parts),
        jnp.swapaxes(apart(started).reshape(batch, heads * parts, -1, _padded(n)), 2, 3), z, rank,
    )  # fmt: skip
    h = _together(jnp.swapaxes(h, 2, 3).reshape(batch, heads, p, -1), n, layout)
    last = tokens._replace(v=v[:, -1:], B=exact(tokens.B[:, -1:]))
    k = last.of_heads("B")[:, 0]
    if theta.shape[2]:
        k = rotate(k, (jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]), layout)
        h = h if reset is None else rotate(h, (jnp.cos(surplus)[:, :, None], -jnp.sin(surplus)[:, :, None]), layout)
    y = y[:, : length * rank].reshape(v.shape)
    return y, State(angle, h, k, exact(v[:, -1]))


def _angles(summed: Callable, rate, theta, start, reset) -> tuple:
    """Of angles that no reset sets to 0 before every chunk (b, c, h, s), and beyond the last; and the last.

    Before chunks in units of 2^-32 turns, the others in radians. Exact sums of integers, as in `rotation`, of
    summed(rate) -> (b, c, h, s): their gradient is that of the same sum of floats, which adds nothing.
    """
    fixed = jax.lax.stop_gradient
    each = summed(fixed(rate))
    total = units(fixed(start))[:, None] + jnp.cumsum(each, 1, dtype=jnp.int32)
    starts, last = total - each, total[:, -1]
    total, kept, fresh = last, jnp.ones(rate.shape[:2]), jnp.ones(len(rate))
    if reset is not None:
        kept = jnp.flip(jnp.cumsum(jnp.flip(jnp.roll(reset, -1, 1).at[:, -1].set(False), 1), 1), 1) == 0
        fresh = ~reset.any(1)
        last = summed(fixed(jnp.where(kept[..., None], rate, 0))).sum(1, dtype=jnp.int32)
        last += jnp.where(fresh[:, None, None], units(fixed(start)), 0)
        kept, fresh = (x.astype(jnp.float32) for x in (kept, fresh))
    linear = jnp.einsum("bl,blh,bls->bhs", kept, rate, theta, precision="highest") + fresh[:, None, None] * start
    radians = lambda x: x.astype(jnp.float32) * np.float32(2 * np.pi / PER_TURN)  # noqa: E731
    return starts, radians(total - last), radians(last) + (linear - jax.lax.stop_gradient(linear))


def _summed(rate, theta, rank: int):
    run = over_batch(lambda *arrays: (sums(*arrays, rank=rank),), "b l h, b l s", "b c h s")
    return run(rate, jax.lax.stop_gradient(theta))[0]


def _padded(n: int) -> int:
    """States in shared memory: two halves, each of whole blocks of planes, and both one width of products, or two."""
    return Q if n <= Q else 2 * Q


def _apart(x, layout: str):
    """States (..., n) as two halves of the same length: plane i is state i of each."""
    n, half = x.shape[-1], _padded(x.shape[-1]) // 2
    still = ((0, 0),) * (x.ndim - 1)
    x = jnp.pad(x, (*still, (0, n % 2)))
    pairs = layout == "pairs"
    halves = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2) if pairs else x.reshape(*x.shape[:-1], 2, -1)
    return jnp.pad(halves, (*still, (0, 0), (0, half - halves.shape[-1]))).reshape(*x.shape[:-1], 2 * half)


def _together(x, n: int, layout: str):
    """The opposite of `_apart`."""
    halves = x.reshape(*x.shape[:-1], 2, -1)[..., : n - n // 2]
    halves = halves if layout == "halves" else jnp.swapaxes(halves, -1, -2)
    return halves.reshape(*x.shape[:-1], -1)[..., :n]
