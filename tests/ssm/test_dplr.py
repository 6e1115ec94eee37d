"""S4's kernel by generating function against powers of the dense transition, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm import hippo
from ssm.convolution import cauchy, dplr

IMPLICIT = {"bilinear": 0.5, "generalized_bilinear": 0.3, "forward_euler": 0.0, "backward_euler": 1.0}
MEASURES = ("legs", "legt", "lagt", "fout")
CASES = [("bilinear", length) for length in (1, 2, 63, 64, 65)] + [(rule, 64) for rule in list(IMPLICIT)[1:]]

kernel = jax.jit(dplr, static_argnames=("length", "rule", "weight"))


def error(out, reference):
    return np.linalg.norm(np.asarray(out) - np.asarray(reference)) / np.linalg.norm(np.asarray(reference))


def parameters(rng, measure, N, dt=(0.02, 0.1)):
    """Lambda, P, B, C of two read-outs, dt: near a measure's, without what is special in it, such as a real B."""
    Lambda, P, B, _ = hippo.dplr(measure, N)
    noise = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)  # noqa: E731
    d, n = len(dt), N // 2
    Lambda = np.minimum(Lambda.real, -0.001) + 1j * Lambda.imag
    P = P.T * (1 + 0.1 * noise(d, P.shape[1], n))
    return np.tile(Lambda, (d, 1)), P, B + 0.1 * noise(d, n), noise(d, 2, n), np.array(dt)


def both_halves(kept):
    return jnp.concatenate([kept, kept.conj()], -1)


@functools.partial(jax.jit, static_argnames="length")
def dense_kernel(Lambda, P, B, C, dt, length, weight):
    """(truncated C, kernel) by powers of the dense transition of all N states, for every channel."""

    def channel(Lambda, P, B, C, dt):
        Lambda, P, B, C = map(both_halves, (Lambda, P, B, C))
        A, eye, dt = jnp.diag(Lambda) - P.T @ P.conj(), jnp.eye(len(B), dtype=B.dtype), dt.astype(B.dtype)
        implicit = eye - weight * dt * A
        A_bar = jnp.linalg.solve(implicit, eye + (1 - weight) * dt * A)
        last, states = jax.lax.scan(lambda x, _: (A_bar @ x, x), jnp.linalg.solve(implicit, dt * B), length=length)
        power = jnp.linalg.matrix_power(A_bar, length)
        return (C - C @ power)[:, : len(B) // 2], jnp.einsum("kn,ln->kl", C, states).real

    return jax.vmap(channel)(Lambda, P, B, C, dt)


def as_jax(*arrays):
    return tuple(jnp.asarray(x) for x in arrays)


def options(rule):
    return dict(rule=rule, weight=0.3 if rule == "generalized_bilinear" else None)


def test_cauchy_is_the_sum_over_both_of_every_pair(x64, rng):
    """Fails for a lost factor 2, and for the conjugate of v or of Lambda left out."""
    v, Lambda = (rng.normal(size=s) + 1j * rng.normal(size=s) for s in ((2, 3, 4), (2, 4)))
    m, d = (rng.normal(size=5) + 1j * rng.normal(size=5) for _ in range(2))

    def naive(v, Lambda):
        each = m[None, None, :, None] - d[None, None, :, None] * both_halves(Lambda)[:, None, None]
        return (both_halves(v)[:, :, None] / each).sum(-1)

    weights = rng.normal(size=(2, 3, 5))
    scalar = lambda f: lambda *args: (weights * f(*args).real + weights[::-1] * f(*args).imag).sum()  # noqa: E731
    args = as_jax(v, Lambda)
    shared = lambda v, Lambda: cauchy(v, *as_jax(m, d), Lambda)  # noqa: E731
    assert error(shared(*args), naive(*args)) < 1e-14
    for got, wanted in zip(*(jax.grad(scalar(f), (0, 1))(*args) for f in (shared, naive)), strict=True):
        assert error(got, wanted) < 1e-13


@pytest.mark.parametrize("measure", MEASURES)
def test_kernel_equals_dense_powers(x64, rng, measure):
    """Ranks 1 and 2; odd lengths have no root z = -1, even ones do. Fails for one wrong sign of Woodbury's.

    At z = 1 the quotient of fout's slowest mode is 1000, of which Woodbury leaves about 1: that costs digits.
    """
    bound = 1e-11 if measure == "fout" else 1e-12
    Lambda, P, B, C, dt = as_jax(*parameters(rng, measure, 8))
    for rule, length in CASES:
        tilde, K = dense_kernel(Lambda, P, B, C, dt, length, IMPLICIT[rule])
        assert error(kernel(Lambda, P, B, tilde, dt, length, **options(rule)), K) < bound, (rule, length)


@pytest.mark.parametrize("measure, rule", [("legt", "generalized_bilinear"), *(("legs", rule) for rule in IMPLICIT)])
def test_gradients_equal_those_of_dense_powers(x64, rng, measure, rule):
    """With respect to everything, through the truncation of C, the singular-looking root z = -1 included."""
    length = 16
    arguments = as_jax(*parameters(rng, measure, 6))
    weights = rng.normal(size=(2, 2, length))

    def truncated(*arguments):
        tilde, _ = dense_kernel(*arguments, length, IMPLICIT[rule])
        Lambda, P, B, _, dt = arguments
        return (weights * dplr(Lambda, P, B, tilde, dt, length, **options(rule))).sum()

    dense = lambda *arguments: (weights * dense_kernel(*arguments, length, IMPLICIT[rule])[1]).sum()  # noqa: E731
    got, wanted = (jax.jit(jax.grad(f, range(5)))(*arguments) for f in (truncated, dense))
    for x, y in zip(got, wanted, strict=True):
        assert error(x, y) < 4e-12


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [784, 16384])
def test_float32_keeps_its_digits_near_z_1(rng, measure, length):
    """Fails, by 1e-4 at length 16384, where 1 - z is made in float32.

    The bound is that of a sum over N = 64 states, doubled: what Woodbury subtracts is, of LegS, as large as what
    it subtracts from.
    """
    arguments = parameters(rng, measure, 64, dt=(0.001, 0.01))
    single = [x.astype(np.complex64 if np.iscomplexobj(x) else np.float32) for x in arguments]
    out = kernel(*as_jax(*single), length)
    with jax.enable_x64(True):
        double = [x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in single]
        reference = kernel(*as_jax(*double), length)
    assert error(out, reference) < 2 * 2e-6 * 64**0.5


def test_strong_decays_and_slow_modes(rng):
    """dt A from -300 to -1e-7 in float32, whose range the square of a product of quotients would leave.

    At z = 1 the kernel of a given row does not depend on dt: the terms of that gradient cancel, so it is only finite.
    """
    dt = np.array([1e-4, 1e-3])
    Lambda = np.array([[-3e6 + 1j, -1e-3, -1 + 1e4j], [-3e5 + 1j, -1e-3, -1 + 1e3j]])
    P, B, C = np.full((2, 1, 3), 1 + 0.5j), np.ones((2, 3)) + 0j, np.ones((2, 1, 3)) + 0j
    both = jax.jit(jax.value_and_grad(lambda *args: (dplr(*args, 64) ** 2).sum(), range(5)))
    single = both(*as_jax(*(x.astype(np.complex64) for x in (Lambda, P, B, C)), dt.astype(np.float32)))
    with jax.enable_x64(True):
        double = both(*as_jax(Lambda, P, B, C, dt))
    *single, dt_single = jax.tree.leaves(single)
    assert np.isfinite(dt_single).all()
    for x, y in zip(single, jax.tree.leaves(double)[:-1], strict=True):
        assert error(x, y) < 2e-6


def test_only_rational_rules(rng):
    with pytest.raises(
        ValueError, match="rule 'zoh' is not one that Woodbury's identity can take. Allowed: bilinear, "
    ):
        dplr(*as_jax(*parameters(rng, "legs", 4)), 8, rule="zoh")
