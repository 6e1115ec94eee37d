"""S5 against s5-pytorch, which keeps all P states, has no doubled C and differentiates by PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from s5 import S5 as TorchS5

from ssm.mixers import s5
from tests.oracles import assert_close

WIDTH, STATE = 6, 8


def both(bidir, rule, seed=0):
    torch.manual_seed(seed)
    theirs = TorchS5(WIDTH, STATE, block_count=2, bidir=bidir, bcInit="dense").seq
    theirs.discretize = {"zoh": theirs.discretize, "bilinear": s5_bilinear()}[rule]
    value = lambda x: jnp.asarray(x.detach().numpy())  # noqa: E731
    B = value(theirs.B)
    B = jax.lax.complex(B[..., 0], B[..., 1]) if not jnp.iscomplexobj(B) else B
    C = value(theirs.C) / 2
    reverse = C[:, STATE:] if bidir else None
    dt = jnp.exp(value(theirs.log_step)).reshape(-1)
    ours = s5.discrete(value(theirs.Lambda), B, C[:, :STATE], value(theirs.D), dt, rule=rule, C_reverse_dn=reverse)
    return theirs, ours


def s5_bilinear():
    from s5.s5_model import discretize_bilinear

    return discretize_bilinear


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize("form", [s5.recurrent, s5.parallel])
def test_values_and_the_gradient_of_the_input(form, length, bidir, rule):
    theirs, ours = both(bidir, rule)
    x = np.random.default_rng(length).normal(size=(length, WIDTH)).astype(np.float32)
    theirs_x = torch.tensor(x, requires_grad=True)
    y = theirs(theirs_x)
    y.sin().sum().backward()
    run = lambda x: form(x[None], ours)[0][0]  # noqa: E731
    assert_close(run(jnp.asarray(x)), y.detach().numpy(), scale=length)
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(run(x))))(jnp.asarray(x))
    assert_close(grad, theirs_x.grad.numpy(), scale=length, gradient=True)


def test_steps_and_state():
    theirs, ours = both(False, "zoh")
    x = np.random.default_rng(0).normal(size=(30, WIDTH)).astype(np.float32)
    state, h = s5.State(jnp.zeros((1, STATE), jnp.complex64)), torch.zeros(STATE, dtype=torch.complex64)
    for t in range(len(x)):
        y, state = s5.step(jnp.asarray(x[t : t + 1]), ours, state)
        expected, h = theirs.forward_rnn(torch.tensor(x[t]), h)
        assert_close(y[0], expected.detach().numpy(), scale=30)
        assert_close(state.h_bn[0], h.detach().numpy(), scale=30)
