"""The head's cross entropy in pieces, against float64 log softmax and its gradient by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm.cross_entropy import cross_entropy
from ssm.language_model import LanguageModel
from tests.oracles import assert_close

VOCABULARY, WIDTH = 37, 6


def draw(rng, length, batch=3):
    x, kernel = rng.normal(size=(batch, length, WIDTH)), 2 * rng.normal(size=(VOCABULARY, WIDTH))
    return x, kernel, rng.integers(0, VOCABULARY, (batch, length)), rng.uniform(size=(batch, length)) * 2


def by_hand(x, kernel, targets, weights):
    """The sums, and the gradients of the first with respect to x, kernel and weights."""
    z = x @ kernel.T
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    own = np.eye(VOCABULARY)[targets]
    losses = -np.log((p * own).sum(-1))
    z_bar = weights[..., None] * (p - own)
    correct = (weights * (z.argmax(-1) == targets)).sum(1)
    gradients = z_bar @ kernel, np.einsum("blv,bld->vd", z_bar, x), losses
    return ((weights * losses).sum(), correct), gradients


@pytest.mark.parametrize(("length", "at_once"), [(1, 1), (8, 10**6), (8, 3 * 4 * VOCABULARY), (13, 3 * 4 * VOCABULARY)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_are_the_whole(length, at_once, dtype, rng):
    """Padding that counts, a piece left out, a cotangent forgotten, one piece's gradient for all: each fails."""
    x, kernel, targets, weights = draw(rng, length)
    x, kernel = (np.asarray(jnp.asarray(v, dtype), np.float64) for v in (x, kernel))

    @jax.jit
    def run(x, kernel, weights):
        def total(x, kernel, weights):
            loss, correct = cross_entropy(x, kernel, jnp.asarray(targets), weights, logits_at_once=at_once)
            return 0.5 * loss, (loss, correct)

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(x, kernel, weights)

    given = jnp.asarray(x, dtype), jnp.asarray(kernel, jnp.float32), jnp.asarray(weights, jnp.float32)
    (_, sums), gradients = run(*given)
    expected, expected_gradients = by_hand(x, kernel, targets, weights)
    for out, ref in zip(sums, expected, strict=True):
        assert out.dtype == jnp.float32
        assert_close(out, ref, scale=10)
    assert [g.dtype for g in gradients] == [dtype, jnp.float32, jnp.float32]
    for out, ref in zip(gradients, expected_gradients, strict=True):
        assert_close(out.astype(dtype), 0.5 * ref, gradient=True, scale=10)
    alone = jax.jit(lambda *v: cross_entropy(*v, logits_at_once=at_once))
    ones = alone(*given[:2], jnp.asarray(targets))
    assert_close(ones[0], by_hand(x, kernel, targets, np.ones_like(weights))[0][0], scale=10)


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_cross_entropy_is_of_its_logits(tied, rng):
    model = LanguageModel(VOCABULARY, 8, 1, "lru", {"lru": {"state_size": 4}}, tie_embeddings=tied)
    tokens, targets = (jnp.asarray(rng.integers(0, VOCABULARY, (2, 9))) for _ in range(2))
    ids = jnp.asarray([[0] * 9, [0] * 4 + [1] * 5])
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    grown = jax.tree.map(lambda p: 20 * p, variables)

    def direct(variables):
        logits, _ = model.apply(variables, tokens, segment_ids=ids)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1))

    def ours(variables):
        return model.apply(variables, tokens, targets, segment_ids=ids, method="cross_entropy")[0]

    (value, gradient), (expected, gradients) = (jax.jit(jax.value_and_grad(f))(grown) for f in (ours, direct))
    assert_close(value, expected, scale=10)
    for out, ref in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients), strict=True):
        assert_close(out, ref, gradient=True, scale=100)


SHAPES = [((2, 512, 16), "float32"), ((999, 16), "float32"), ((2, 512), "int32")]


def test_no_temporary_holds_all_logits():
    """Of 16 times as many tokens as at once, forward and backward."""
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in SHAPES]
    loss = jax.value_and_grad(lambda *v: cross_entropy(*v, logits_at_once=64 * 999)[0], argnums=(0, 1))
    used = jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert used < 0.3 * 4 * 1024 * 999
