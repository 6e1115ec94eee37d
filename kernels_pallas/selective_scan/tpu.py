r"""The recurrence on TPUs: 1024 channels a register, tokens one after another, tiles streamed through VMEM.

A register is one number of 8 x 128 channels, of one token: of dt, of dt x, of one of the states. So what every token
takes is a few vector operations a state, none of which crosses lanes; of B and C each number is spread over a row of
lanes, once for all channels of a block. Sixteen states of a channel are walked over at a time, and what is read of them
is added up in VMEM. The states before every tile are kept for the gradient, which makes the others again.
Under shard_map both kernels need check_vma=False.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.partition import over_batch
from kernels_pallas.selective_scan import fused
from kernels_pallas.selective_scan.fused import AXES, LOG_2_E, NEVER, pad
from kernels_pallas.selective_scan.tpu_backward import backward
from kernels_pallas.selective_scan.tpu_forward import Inputs, forward
from kernels_pallas.selective_scan.tpu_tiles import CHANNELS, LANES, STATES, SUBLANES, TILE

MOST_STATES = 64
SAVED = "b c g s m i j"  # tiles, groups of channels, slices, states, sublanes, lanes


def refusal(x, dt, A, z) -> str:
    """Why these arrays cannot be run here; "" where they can."""
    if (n := A.shape[1]) > MOST_STATES:
        return f"there are {n} states; it takes at most {MOST_STATES}"
    return fused.refusal(x, dt, A, z)


def run(x, dt, A, B, C, D, dt_bias, z, reset, h, softplus: bool) -> tuple[jax.Array, jax.Array]:
    """y, and the state after the last token; D, dt_bias, z and reset may be None."""
    return _run(fused.present(x, dt, A, B, C, D, dt_bias, z, reset, softplus), h, softplus)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _run(given: dict, h: jax.Array, softplus: bool):
    return _forward(given, h, softplus, False)[0]


def _forward(given: dict, h: jax.Array, softplus: bool, save: bool = True):
    """(y, the last state), and what `_backward` needs."""

    def local(*arrays):
        *arrays, h = arrays
        mine = dict(zip(given, arrays, strict=True))
        (_, length, d), n, inputs = mine["x"].shape, h.shape[2], in_tiles(mine, softplus)
        y, last, *saved = forward(inputs, in_registers(h), softplus, save)
        return y[:, :length, :d], from_registers(last, d, n), *saved

    results = ["b l d", "b d n", SAVED][: 2 + save]
    y, last, *saved = over_batch(local, _axes(given, "b d n"), ", ".join(results))(*given.values(), h)
    return (y, last), (given, *saved)


def _backward(softplus: bool, residuals: tuple, cotangents: tuple):
    given, saved = residuals
    bars = {name: AXES[name] for name in given if name != "forget"} | {"h": "b d n"}
    by_row = [axes if "b" in axes else f"b {axes}" for axes in bars.values()]

    def local(*arrays):
        *arrays, saved, dy, d_last = arrays
        (_, length, d), n = dy.shape, d_last.shape[2]
        inputs = in_tiles(dict(zip(given, arrays, strict=True)), softplus)
        dy = pad(dy, "b l d", dict(l=inputs.x.shape[1] - length, d=inputs.x.shape[2] - d))
        out = backward(inputs, saved, dy, in_registers(d_last), softplus)
        out |= {name: from_registers(out[name], d, n) for name in "hA"}
        out |= {name: _over_channels(out[name], inputs.A.shape[2])[:, :length, :n] for name in "BC"}
        out |= {name: _over_tokens(out[name])[:, :d] for name in ("D", "dt_bias")}
        return tuple(out[name][:, :length, :d] if name in ("x", "dt", "z") else out[name] for name in bars)

    run = over_batch(local, _axes(given, SAVED, "b l d", "b d n"), ", ".join(by_row))
    out = dict(zip(bars, run(*given.values(), saved, *cotangents), strict=True))
    out |= {name: out[name].sum(0) for name in ("A", "D", "dt_bias")}
    d_h = out.pop("h")
    return out | {name: jnp.zeros_like(v) for name, v in given.items() if name == "forget"}, d_h


_run.defvjp(_forward, _backward)


def _axes(given: dict, *more: str) -> str:
    return ", ".join([*map(AXES.get, given), *more])


def in_tiles(given: dict, softplus: bool) -> Inputs:
    """All of it in whole tiles, groups and slices; what is added leaves the states alone."""
    (_, length, d), n = given["x"].shape, given["A"].shape[1]
    to, still = dict(l=-length % TILE, d=-d % CHANNELS), NEVER if softplus else 0.0
    v = {name: pad(x, AXES[name], to, still if name == "dt" else 0.0) for name, x in given.items()}
    states = min(n, STATES)

    def sliced(x):  # (slices, b, l, states)
        x = pad(x, "b l n", dict(n=-n % states))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, states), 2, 0)

    B, C = sliced(v["B"]), sliced(v["C"])
    if "forget" in v:
        forget = v["forget"][None, ..., None]
        B = jnp.concatenate([B, jnp.broadcast_to(forget, (*B.shape[:3], 1))], 3)
    A = in_registers(v["A"][None] * LOG_2_E)[0]
    return Inputs(v["x"], v["dt"], A, B, C, v["D"][None], v["dt_bias"][None], v.get("z"))


def in_registers(h: jax.Array) -> jax.Array:
    """States (b, d, n) as (b, groups, slices, states, SUBLANES, LANES)."""
    states = min(h.shape[2], STATES)
    h = pad(h, "b d n", dict(d=-h.shape[1] % CHANNELS, n=-h.shape[2] % states))
    return jnp.moveaxis(h.reshape(len(h), -1, SUBLANES, LANES, h.shape[2] // states, states), (4, 5), (2, 3))


def from_registers(h: jax.Array, d: int, n: int) -> jax.Array:
    """What `in_registers` made of."""
    h = jnp.moveaxis(h, (2, 3), (4, 5))
    return h.reshape(len(h), h.shape[1] * CHANNELS, -1)[:, :d, :n]


def _over_channels(sums: jax.Array, states: int) -> jax.Array:
    """(b, groups, tiles, slices, chunks, SUBLANES, tokens x states / SUBLANES) as (b, l, n), of so many states."""
    sums = jnp.swapaxes(sums.sum(1), 4, 5)
    batch, tiles, slices = sums.shape[:3]
    sums = jnp.moveaxis(sums.reshape(batch, tiles, slices, TILE, states), 2, 3)
    return sums.reshape(batch, tiles * TILE, slices * states)


def _over_tokens(sums: jax.Array) -> jax.Array:
    """(b, groups, SUBLANES x parts, LANES) as (b, d)."""
    sums = sums.reshape(*sums.shape[:2], SUBLANES, -1, LANES).sum(3)
    return sums.reshape(len(sums), -1)
