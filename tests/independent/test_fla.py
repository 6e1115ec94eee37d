"""State space duality and Gated DeltaNet against flash-linear-attention's plain PyTorch references, which differentiate
by PyTorch.

Simple gated linear attention is state space duality with q = C, k = B, v = dt x, g = dt A and a scale of 1. The files
are loaded by path: their package would import kernels that need Triton.
"""

import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels_pallas.ssd import ssd
from ssm.mixers import gated_deltanet, mamba2
from tests.oracles import assert_close

HEADS, P, N = 3, 4, 5


def naive(file: str):
    path = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{file}")
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GLA, DELTA = naive("simple_gla/naive.py"), naive("gated_delta_rule/naive.py")


def problem(length):
    rng = np.random.default_rng(length)
    shape = (2, length, HEADS)
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1), size=shape))
    arrays = (
        rng.normal(size=(*shape, P)), dt, -rng.uniform(1, 16, size=HEADS),
        rng.normal(size=(*shape, N)), rng.normal(size=(*shape, N)), rng.normal(size=(2, HEADS, P, N)),
    )  # fmt: skip
    return tuple(v.astype(np.float32) for v in arrays)


def theirs(arrays, reference):
    """(y, last), and the gradients of sum(sin) of both."""
    x, dt, A, B, C, h = leaves = [torch.tensor(v, requires_grad=True) for v in arrays]
    options = dict(scale=1.0, initial_state=h.transpose(-1, -2), output_final_state=True)
    y, last = getattr(GLA, reference)(C, B, x * dt[..., None], dt * A, **options)
    last = last.transpose(-1, -2)
    (y.sin().sum() + last.sin().sum()).backward()
    return [v.detach().numpy() for v in (y, last)], [v.grad.numpy() for v in leaves]


def by_ssd(implementation):
    return lambda x, dt, A, B, C, h: ssd(x * dt[..., None], dt * A[None, None], B, C, h, implementation=implementation)


def quadratic(x, dt, A, B, C, h):
    return mamba2.quadratic(x, dt, A, B, C, jnp.zeros(HEADS), h)


FORMS = {name: by_ssd(name) for name in ("reference", "xla")} | {"quadratic": quadratic}


@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize("reference", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, reference, length):
    arrays = problem(length)
    values, grads = theirs(arrays, reference)

    def total(arrays):
        y, last = FORMS[form](*arrays)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last)), (y, last)

    (_, outs), ours = jax.jit(jax.value_and_grad(total, has_aux=True))(tuple(map(jnp.asarray, arrays)))
    for out, ref in zip(outs, values, strict=True):
        assert_close(out, ref, scale=length * N)
    for out, ref, name in zip(ours, grads, ("x", "dt", "A", "B", "C", "h"), strict=True):
        assert_close(out, ref, scale=length * N, gradient=True, label=f"gradient of {name}")


@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize("reference", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_the_gated_delta_rule(form, reference, length):
    """beta in (0, 2), keys of length 1, decays from e^-16 to e^-1e-3."""
    x, dt, A, k, q, h = problem(length)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = np.random.default_rng(length).uniform(0, 2, size=dt.shape).astype(np.float32)
    arrays = q, k, x, beta, dt * A, h

    leaves = [torch.tensor(v, requires_grad=True) for v in arrays]
    gates = dict(beta=leaves[3], g=leaves[4], initial_state=leaves[5].transpose(-1, -2))
    y, last = getattr(DELTA, reference)(*leaves[:3], **gates, scale=1.0, output_final_state=True)
    (y.sin().sum() + last.sin().sum()).backward()
    values = y.detach().numpy(), last.detach().transpose(-1, -2).numpy()

    def total(arrays):
        y, last = getattr(gated_deltanet, form)(*arrays)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last)), (y, last)

    (_, outs), ours = jax.jit(jax.value_and_grad(total, has_aux=True))(tuple(map(jnp.asarray, arrays)))
    for out, ref in zip(outs, values, strict=True):
        assert_close(out, ref, scale=length * N)
    for out, ref, name in zip(ours, leaves, ("q", "k", "v", "beta", "log decay", "h"), strict=True):
        assert_close(out, ref.grad.numpy(), scale=length * N, gradient=True, label=f"gradient of {name}")
