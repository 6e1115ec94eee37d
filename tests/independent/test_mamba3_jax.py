"""Mamba-3 against mamba3-jax: whole layers on the same random weights, full, packed, and continued from a cache.

Its A is heavy-tailed and its angle pi tanh; SISO turns pairs, MIMO halves, as the published kernels do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mamba3_jax.modeling import Mamba3Config, Mamba3Mixer

from ssm.mixers import mamba3
from tests.oracles import relative

WIDTH = 12
LAYERS = {
    "siso": dict(),
    "siso groups": dict(ngroups=3, rope_fraction=1.0, is_outproj_norm=True),
    "mimo": dict(is_mimo=True, mimo_rank=2),
    "mimo groups": dict(is_mimo=True, mimo_rank=3, ngroups=2, rope_fraction=1.0, is_outproj_norm=True),
}


def both(name, **options):
    """Their layer, and ours bound to its parameters: 6 heads of 4, 8 states."""
    config = LAYERS[name]
    size = dict(hidden_size=WIDTH, state_size=8, head_dim=4, chunk_size=16)
    theirs = Mamba3Mixer(Mamba3Config(**size, **config), 0, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    weights = jax.tree.map(draw, nnx.state(theirs, nnx.Param))
    nnx.update(theirs, weights)
    params = nnx.to_pure_dict(weights)
    params = {k: {"scale": v["weight"]} if k.endswith("norm") else v for k, v in params.items()}
    ours = mamba3.Mamba3(
        WIDTH,
        state_size=8,
        head_size=4,
        groups=config.get("ngroups", 1),
        mimo=config.get("is_mimo", False),
        rank=config.get("mimo_rank", 1),
        rope_fraction=config.get("rope_fraction", 0.5),
        output_norm=config.get("is_outproj_norm", False),
        **options,
    )
    return theirs, ours.bind({"params": params})


def inputs(length, batch=2):
    return jnp.asarray(np.random.default_rng(length).normal(size=(batch, length, WIDTH)), jnp.float32)


def same_state(ours, theirs):
    angle, h, k, v = theirs
    assert np.abs(np.sin((ours.angle_bhs - angle) / 2)).max() < 1e-5
    assert relative(ours.h_bhpn, h) < 1e-5
    assert relative(ours.k_brhn, k) < 1e-5
    if ours.v_brhp.shape[1] == 1:  # theirs is before mimo_x
        assert relative(ours.v_brhp[:, 0], v) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [1, 65])
def test_values_states_and_the_gradient_of_the_input(length, name):
    theirs, _ = both(name)
    x = inputs(length)

    def run(layer):
        loss = lambda x: (lambda y, state: (jnp.sum(jnp.sin(y)), (y, state)))(*layer(x))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(x)

    (_, (expected, cache)), expected_grad = run(theirs)
    for form in ("recurrent", "chunked"):
        (_, (y, state)), grad = run(both(name, form=form)[1])
        assert relative(y, expected) < 1e-5
        assert relative(grad, expected_grad) < 4e-5
        same_state(state, cache)


@pytest.mark.parametrize("name", LAYERS)
def test_steps_continue_a_prompt(name):
    theirs, ours = both(name)
    x = inputs(29)
    (_, cache), (_, state) = (jax.jit(lambda x, layer=layer: layer(x))(x[:, :20]) for layer in (theirs, ours))
    their_step, our_step = jax.jit(lambda x, cache: theirs(x, cache_state=cache)), jax.jit(ours.step)
    for t in range(20, 29):
        expected, cache = their_step(x[:, t : t + 1], cache)
        y, state = our_step(x[:, t], state)
        assert relative(y, expected[:, 0]) < 1e-5
    same_state(state, cache)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents(name):
    """Their documents end by a decay of e^-30, not 0."""
    theirs, ours = both(name)
    x = inputs(40, batch=1)
    expected, cache = jax.jit(lambda x: theirs(x, cu_seqlens=jnp.asarray([0, 17, 18, 40])))(x)
    y, state = jax.jit(lambda x: ours(x, segment_ids=jnp.asarray([[0] * 17 + [1] + [2] * 22])))(x)
    assert relative(y, expected) < 1e-5
    same_state(state, cache)
