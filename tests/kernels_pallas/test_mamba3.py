"""Mamba-3's operation against a float64 loop; the loop's gradients by finite differences, the rest by the loop's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.mamba3 import State, mamba3
from tests.oracles import assert_close

IMPLEMENTATIONS = ("reference", "xla")  # what runs on any backend
HEADS, P, N, PLANES = 4, 3, 6, 2


def problem(rng, length, groups=1, rank=None, shared=True, batch=2):
    """A head that never decays, one at e^-300 a token, one with both and everything between, one moderate."""
    lanes, r = (batch, length) if rank is None else (batch, length, rank), rank or 1
    a = -np.exp(rng.uniform(np.log(1e-12), np.log(300), size=(batch, length, HEADS)))
    a = np.where(rng.random(a.shape) < 0.2, 0, np.where(rng.random(a.shape) < 0.1, -300, a))
    a[..., 0], a[..., 1], a[..., 3] = 0, -300, -rng.uniform(0, 0.5, size=(batch, length))
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    p = dict(v=normal(*lanes, HEADS, P), B=normal(*lanes, groups, N), C=normal(*lanes, groups, N), log_decay_blh=a)
    p |= {f"{name}_blh": rng.uniform(0.1, 1, size=a.shape) for name in ("previous", "current", "rate")}
    p |= dict(theta_blhs=3 * normal(batch, length, 1 if shared else HEADS, PLANES), D_h=normal(HEADS))
    p |= dict(B_bias_hrn=normal(HEADS, r, N), C_bias_hrn=normal(HEADS, r, N), z=normal(*lanes, HEADS, P))
    ends = (HEADS, PLANES), (HEADS, P, N), (r, HEADS, N), (r, HEADS, P)
    return p | dict(initial_state=State(*(normal(batch, *shape) for shape in ends)))


def turned(x, angles, layout):
    """States (n,) with plane i, of states 2 i and 2 i + 1 or i and i + n / 2, turned by angle i."""
    out = x.copy()
    for i, angle in enumerate(angles):
        one, two = (2 * i, 2 * i + 1) if layout == "pairs" else (i, i + N // 2)
        out[one] = np.cos(angle) * x[one] - np.sin(angle) * x[two]
        out[two] = np.sin(angle) * x[one] + np.cos(angle) * x[two]
    return out


def loop(p, reset, layout):
    """(y, last state), head after head, token after token, lane after lane."""
    with_rank = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[-2:])  # noqa: E731
    v, B, C, z = (with_rank(p[name]) for name in ("v", "B", "C", "z"))
    y, state = np.zeros(v.shape), [np.array(x) for x in p["initial_state"]]
    theta = np.broadcast_to(p["theta_blhs"], (*v.shape[:2], HEADS, PLANES))
    for b, i in np.ndindex(len(v), HEADS):
        angle, h, k, before = (x[b, :, i] if j > 1 else x[b, i] for j, x in enumerate(state))
        for t in range(v.shape[1]):
            if reset[b, t]:
                angle, h, k, before = 0 * angle, 0 * h, 0 * k, 0 * before
            angle = angle + p["rate_blh"][b, t, i] * theta[b, t, i]
            group, bias = i // (HEADS // B.shape[3]), (p["B_bias_hrn"][i], p["C_bias_hrn"][i])
            h = np.exp(p["log_decay_blh"][b, t, i]) * (h + p["previous_blh"][b, t, i] * before.T @ k)
            k, q = (
                np.stack([turned(x[b, t, r, group] + of[r], angle, layout) for r in range(v.shape[2])])
                for x, of in zip((B, C), bias, strict=True)
            )
            before = v[b, t, :, i]
            h = h + p["current_blh"][b, t, i] * before.T @ k
            read = q @ h.T + p["D_h"][i] * before
            y[b, t, :, i] = read * z[b, t, :, i] / (1 + np.exp(-z[b, t, :, i]))
        for x, last, lanes in zip(state, (angle, h, k, before), (0, 0, 1, 1), strict=True):
            x[(b, slice(None), i) if lanes else (b, i)] = last
    return y.reshape(p["v"].shape), State(*state)


def outputs_and_gradients(p, bars, reset, layout, **options):
    """In p's dtype: (outputs, the gradient of every argument)."""
    run = lambda p: mamba3(**p, reset=jnp.asarray(reset), layout=layout, **options)  # noqa: E731

    @jax.jit
    def both(p, bars):
        outputs, pull = jax.vjp(run, p)
        return outputs, pull(jax.tree.map(lambda bar, y: bar.astype(y.dtype), bars, outputs))[0]

    return both(jax.tree.map(jnp.asarray, p), bars)


def cotangents(rng, p):
    return jax.tree.map(lambda x: rng.normal(size=x.shape), (p["v"], p["initial_state"]))


def assert_outputs_close(out, ref, scale=1.0):
    angle, expected = (np.asarray(x[1].angle_bhs, np.float64) for x in (out, ref))
    assert np.abs(np.sin((angle - expected) / 2)).max() < 4 * scale**0.5 * np.finfo(out[0].dtype).eps
    for value, other in zip((out[0], *out[1][1:]), (ref[0], *ref[1][1:]), strict=True):
        assert_close(value, other, scale=scale)


CASES = [(1, 1, None, "pairs"), (63, 2, 2, "halves"), (65, HEADS, None, "pairs"), (1000, 2, 1, "pairs")]


@pytest.mark.parametrize(("length", "groups", "rank", "layout"), CASES)
def test_values_and_gradients(length, groups, rank, layout, rng, x64):
    p = problem(rng, length, groups, rank, shared=length != 65)
    bars, reset = cotangents(rng, p), rng.random((2, length)) < 0.03
    expected, gradients = outputs_and_gradients(p, bars, reset, layout, implementation="reference")
    assert_outputs_close(expected, loop(p, reset, layout), scale=length * N)
    for dtype in (np.float64, np.float32):
        cast = jax.tree.map(lambda x: x.astype(dtype), p)  # noqa: B023
        out, grads = outputs_and_gradients(cast, bars, reset, layout, implementation="xla")
        assert out[0].dtype == dtype
        assert_outputs_close(out, expected, scale=length * N)
        for (path, g), ref in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(gradients), strict=True):
            assert_close(g, ref, scale=length * N, gradient=True, label=jax.tree_util.keystr(path))


@pytest.mark.parametrize("rank", [None, 2])
def test_the_loops_gradient_is_its_finite_difference(rank, rng, x64):
    p = problem(rng, 9, 2, rank)
    reset, bars = np.arange(9)[None].repeat(2, 0) == 4, cotangents(rng, p)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), p)

    def total(eps):
        outputs = loop(jax.tree.map(lambda x, d: x + eps * d, p, direction), reset, "pairs")
        return sum(np.sum(x * bar) for x, bar in zip(jax.tree.leaves(outputs), jax.tree.leaves(bars), strict=True))

    _, grads = outputs_and_gradients(p, bars, reset, "pairs", implementation="reference")
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.asarray(g) * d), grads, direction)))
    np.testing.assert_allclose(along, (total(1e-5) - total(-1e-5)) / 2e-5, rtol=1e-7)


def test_what_is_left_out_is_nothing(rng, x64):
    """No theta, rate, bias, D, gate or state: zeros of them; rate is then 1, and the gate a factor."""
    p = problem(rng, 9)
    zeros = jax.tree.map(np.zeros_like, {k: p.pop(k) for k in ("theta_blhs", "B_bias_hrn", "C_bias_hrn", "D_h")})
    zeros |= dict(initial_state=jax.tree.map(np.zeros_like, p.pop("initial_state")))
    z = jnp.asarray(p.pop("z"))
    del p["rate_blh"]
    p, zeros = jax.tree.map(jnp.asarray, (p, zeros))
    for implementation in IMPLEMENTATIONS:
        y, state = mamba3(**p, implementation=implementation)
        full, last = mamba3(**p, **zeros, z=z, implementation=implementation)
        assert_close(y * jax.nn.silu(z), full)
        assert state.angle_bhs.shape == (2, HEADS, 0)
        for out, ref in zip(state[1:], last[1:], strict=True):
            assert_close(out, ref)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_pieces_vmap_bfloat16_and_a_reset_at_the_first_token(implementation, rng):
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem(rng, 50, 2, 2))
    state, constants = p.pop("initial_state"), {k: p.pop(k) for k in ("B_bias_hrn", "C_bias_hrn", "D_h")}
    options = dict(chunk_size=16, implementation=implementation)
    run = jax.jit(lambda p, state, reset=None: mamba3(**p, **constants, initial_state=state, reset=reset, **options))
    whole = run(p, state)
    first, middle = run({k: x[:, :21] for k, x in p.items()}, state)
    second, end = run({k: x[:, 21:] for k, x in p.items()}, middle)
    assert_outputs_close((jnp.concatenate([first, second], 1), end), whole, scale=50)
    each = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    mapped = jax.vmap(lambda p, s: run(each(p), each(s)))(p, state)
    assert_outputs_close(jax.tree.map(lambda x: x[:, 0], mapped), whole, scale=50)
    narrow = {k: x.astype(jnp.bfloat16) if k in ("v", "B", "C", "z") else x for k, x in p.items()}
    y, last = run(narrow, state)
    assert (y.dtype, last.h_bhpn.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(y, run(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), state)[0])
    starts = jnp.zeros((2, 50), bool).at[:, 0].set(True)
    assert_outputs_close(run(p, state, starts), run(p, jax.tree.map(jnp.zeros_like, state)), scale=50)


def test_wrong_input_is_named(rng, untyped):
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem(rng, 5, 2))
    state = p["initial_state"]
    for change, message in [
        (dict(v=p["v"][0]), r"v must be \(batch, length, \[rank,\] heads, channels\)"),
        (dict(B=p["B"][:, :, [0, 1, 1]]), "B has 3 groups; they must divide the 4 heads of v"),
        (dict(C=p["C"][..., :4]), r"C has shape \(2, 5, 2, 4\).*need \(2, 5, 2, 6\)"),
        (dict(theta_blhs=p["theta_blhs"][:, :, [0, 0]]), r"theta_blhs has shape \(2, 5, 2, 2\).*1 or 4, planes"),
        (dict(theta_blhs=jnp.zeros((2, 5, 1, 4))), "4 angles for 6 states"),
        (dict(B_bias_hrn=p["B_bias_hrn"][:1]), r"B_bias_hrn has shape \(1, 1, 6\).*need \(4, 1, 6\)"),
        (dict(rate_blh=p["rate_blh"][:, 1:]), r"rate_blh has shape \(2, 4, 4\).*need \(2, 5, 4\)"),
        (dict(initial_state=state._replace(k_brhn=state.v_brhp)), r"initial_state.k_brhn has shape \(2, 1, 4, 3\)"),
        (dict(layout="pair"), "layout is 'pair'; it may be pairs or halves"),
        (dict(chunk_size=0), "chunk_size is 0; it must be at least 1"),
        (dict(implementation="cuda"), "implementation is 'cuda'; it may be auto, reference, xla, gpu"),
        (dict(implementation="gpu"), "implementation 'gpu' cannot run this: the backend is cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            mamba3(**(p | change))
