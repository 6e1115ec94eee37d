r"""The recurrence on NVIDIA Hopper GPUs: states in registers, tokens streamed through shared memory.

A warpgroup owns a block of channels of one batch row and one segment of the sequence, and a lane some of the states of
one channel, so that the lanes of a channel add up what it reads of them. Where batch and channels alone leave
multiprocessors idle, the sequence is cut into segments: a first pass finds what each leaves of no state, a short
recurrence the states that enter each, and then all of them run at once, exactly. The states before every tile are kept
for the gradient, which makes the others again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.partition import over_batch
from kernels_pallas.selective_scan import fused
from kernels_pallas.selective_scan.fused import AXES, LOG_2_E, NEVER, pad
from kernels_pallas.selective_scan.gpu_backward import backward
from kernels_pallas.selective_scan.gpu_forward import Inputs, forward, summaries
from kernels_pallas.selective_scan.gpu_tiles import TILE, multiples

STATES = (16, 32)  # that a kernel takes; of more, several do
refusal = fused.refusal


def run(x, dt, A, B, C, D, dt_bias, z, reset, h, softplus: bool) -> tuple[jax.Array, jax.Array]:
    """y, and the state after the last token; D, dt_bias, z and reset may be None."""
    d, most = x.shape[2], STATES[-1]
    inputs = Inputs(**fused.present(x, dt, A, B, C, D, dt_bias, z, reset, softplus))
    if A.shape[1] <= most:
        return _run(inputs, h, softplus)
    y, ends = jnp.zeros(x.shape, jnp.float32), []
    for start in range(0, A.shape[1], most):
        part = lambda v: v[..., start : start + most]  # noqa: B023,E731
        some = inputs._replace(
            A=part(A), B=part(inputs.B), C=part(inputs.C), D=jnp.zeros(d) if start else inputs.D, z=None
        )
        read, end = _run(some, part(h), softplus)
        y += read.astype(jnp.float32)
        ends.append(end)
    y = y if z is None else y * jax.nn.silu(z.astype(jnp.float32))
    return y.astype(x.dtype), jnp.concatenate(ends, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _run(inputs: Inputs, h: jax.Array, softplus: bool):
    return _forward(inputs, h, softplus, False)[0]


def _forward(inputs: Inputs, h: jax.Array, softplus: bool, save: bool = True):
    """(y, the last state), and what `_backward` needs. Devices that share the batch each pad their own part."""
    present = inputs.present()

    def local(*arrays):
        (_, length, d), n = arrays[0].shape, arrays[-1].shape[2]
        inputs, h = _whole(dict(zip(present, arrays, strict=False)), arrays[-1], softplus)
        y, ends, *states = forward(inputs, _entering(inputs, h, softplus), softplus, save)
        return y[:, :length, :d], ends[:, -1, :d, :n], *(v[:, : pl.cdiv(length, TILE), :d, :n] for v in states)

    results = ["b l d", "b d n", "b c d n"][: 2 + save]
    run = over_batch(local, ", ".join([*map(AXES.get, present), "b d n"]), ", ".join(results))
    y, last, *states = run(*present.values(), h)
    return (y, last), (inputs, *states)


def _backward(softplus: bool, residuals: tuple, cotangents: tuple):
    inputs, states = residuals
    present = inputs.present()

    def local(*arrays):
        (batch, length, d), n = arrays[0].shape, arrays[-1].shape[2]
        states, dy, d_last = arrays[len(present) :]
        inputs, d_last = _whole(dict(zip(present, arrays, strict=False)), d_last, softplus)
        to = {axis: new - old for axis, new, old in zip("bld", inputs.x.shape, dy.shape, strict=True)}
        to |= dict(c=inputs.x.shape[1] // TILE - states.shape[1], n=inputs.A.shape[1] - n)
        dy, states = pad(dy, "b l d", to), pad(states, "b c d n", to)
        out = backward(inputs, states, dy, _entering(inputs, d_last, softplus, dy), softplus)
        out |= {name: out[name].sum(1).reshape(batch, -1, inputs.A.shape[1]) for name in "BC"}
        out |= {name: out[name].sum(1) for name in ("A", "D", "dt_bias")} | {"h": out["h"][:, 0]}
        cuts = {"d": d, "n": n, "l": length}
        return tuple(out[name][tuple(slice(cuts.get(axis)) for axis in axes.split())] for name, axes in bars.items())

    bars = {name: AXES[name] if "b" in AXES[name] else f"b {AXES[name]}" for name in present if name != "forget"}
    bars |= {"h": "b d n"}
    arrays = *present.values(), states, *cotangents
    operands = [*map(AXES.get, present), "b c d n", "b l d", "b d n"]
    out = dict(zip(bars, over_batch(local, ", ".join(operands), ", ".join(bars.values()))(*arrays), strict=True))
    out |= {name: out[name].sum(0) for name in ("A", "D", "dt_bias")}
    d_h = out.pop("h")
    return Inputs(**out, forget=None if inputs.forget is None else jnp.zeros_like(inputs.forget)), d_h


_run.defvjp(_forward, _backward)


def _whole(present: dict, h: jax.Array, softplus: bool) -> tuple[Inputs, jax.Array]:
    """All of it for whole warpgroups and their tiles, and A for powers of 2; what is added leaves the states alone."""
    (batch, length, d), few = present["x"].shape, present["A"].shape[1]
    n = next(n for n in STATES if n >= few)
    tokens, channels = multiples(batch, length, d, n)
    to, still = dict(l=-length % tokens, d=-d % channels, n=n - few), NEVER if softplus else 0.0
    padded = {name: pad(v, AXES[name], to, still if name == "dt" else 0.0) for name, v in present.items()}
    return Inputs(**padded | {"A": padded["A"] * LOG_2_E}), pad(h, "b d n", to)


def _entering(inputs: Inputs, h: jax.Array, softplus: bool, dy: jax.Array | None = None) -> jax.Array:
    """The state before every segment, (b, segments, d, n), of that before the first.

    With dy, the cotangent of that after every segment, of that after the last.
    """
    segments = inputs.plan().segments
    if segments == 1:
        return h[:, None]
    ends, decays = summaries(inputs, dy, softplus), _decays(inputs, segments, softplus)
    entering = {}
    for s in range(segments)[:: 1 if dy is None else -1]:
        entering[s] = h
        h = decays[:, s] * h + ends[:, s]
    return jnp.stack([entering[s] for s in range(segments)], 1)


def _decays(inputs: Inputs, segments: int, softplus: bool) -> jax.Array:
    """What is left of a state after every segment."""
    dt = inputs.dt.astype(jnp.float32) + inputs.dt_bias[None, None]
    dt = jax.nn.softplus(dt) if softplus else dt
    elapsed = dt.reshape(len(dt), segments, -1, dt.shape[2]).sum(2)
    exponent = elapsed[..., None] * inputs.A[None, None]
    if inputs.forget is not None:
        exponent += inputs.forget.reshape(len(dt), segments, -1).min(2)[:, :, None, None]
    return jnp.exp2(exponent)
