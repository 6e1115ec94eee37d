"""The kernels for Hopper GPUs: values in the simulator of shared memory and barriers, and what ptxas says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.mamba3 as op

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the kernel needs jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels_pallas.ssd import gpu_tiles  # noqa: E402


def simulate(monkeypatch):
    """The kernel in the simulator, whose products take no start: it is added."""

    def accumulate(*terms):
        products = gpu_tiles.products(*(term[1:] for term in terms))
        return tuple(start + product for (start, *_), product in zip(terms, products, strict=True))

    monkeypatch.setattr(gpu_tiles, "accumulate", accumulate)
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def problem(rng, batch, length, rank, heads, p, groups, n, planes, also):
    """Moderate decays, but the first head's go from 1 to e^-300; angles of up to some turns a token."""
    lanes = (batch, length) if rank is None else (batch, length, rank)
    a = -np.exp(rng.uniform(np.log(1e-12), np.log(300), size=(batch, length, heads)))
    a = np.where(rng.random(a.shape) < 0.2, 0, np.where(rng.random(a.shape) < 0.1, -300, a))
    a[..., 1:] = -rng.uniform(0, 0.5, size=a[..., 1:].shape)
    exact = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    rounded = lambda *shape: exact(*shape).astype(jnp.bfloat16)  # noqa: E731
    arrays = dict(v=rounded(*lanes, heads, p), B=rounded(*lanes, groups, n), C=rounded(*lanes, groups, n))
    gates = {f"{name}_blh": rng.uniform(0.1, 1, size=a.shape).astype(np.float32) for name in ("previous", "current")}
    arrays |= dict(log_decay_blh=a.astype(np.float32)) | gates
    state = exact(batch, heads, planes), exact(batch, heads, p, n), exact(batch, rank or 1, heads, n)
    arrays |= dict(initial_state=op.State(*state, exact(batch, rank or 1, heads, p)))
    more = dict(theta_blhs=exact(batch, length, 1, planes), rate_blh=3 * rng.uniform(size=a.shape).astype(np.float32))
    more |= dict(B_bias_hrn=exact(heads, rank or 1, n), C_bias_hrn=exact(heads, rank or 1, n))
    more |= dict(D_h=exact(heads), z=rounded(*lanes, heads, p))
    return arrays | {k: v for k, v in more.items() if planes or k[0] not in "tr"} if also else arrays


def outputs_and_gradients(p, bars, reset, layout, implementation):
    def run(p):
        return op.mamba3(**p, reset=reset, layout=layout, implementation=implementation)

    @jax.jit
    def both(p, bars):
        outputs, pull = jax.vjp(run, p)
        return outputs, pull(bars)[0]

    return both(p, bars)


CASES = {  # batch, length, rank, heads, channels, groups, states, planes; whether all else is given; the layout
    "two heads of a group, a state between chunks": (1, 128, None, 2, 64, 1, 128, 32, True, "pairs"),
    "ragged, padded, two blocks of channels, two lanes": (1, 33, 2, 1, 128, 1, 16, 3, True, "halves"),
    "a group a head, all planes turn": (1, 65, None, 2, 32, 2, 128, 64, True, "pairs"),
}
