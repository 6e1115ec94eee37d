"""State space duality against a float64 loop; the loop's gradients by finite differences, the rest by the loop's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels_pallas.ssd import segsum, ssd
from tests.oracles import assert_close

IMPLEMENTATIONS = ("reference", "xla")  # what runs on any backend
HEADS, P, N = 4, 3, 5
ARGUMENTS = ("x", "log_decay_blh", "B", "C", "initial_state")


def problem(rng, length, groups=1, rank=None, batch=2):
    """A head that never decays, one at e^-300 a token, one with both and everything between, one moderate."""
    lanes = (batch, length) if rank is None else (batch, length, rank)
    a = -np.exp(rng.uniform(np.log(1e-12), np.log(300), size=(batch, length, HEADS)))
    a = np.where(rng.random(a.shape) < 0.2, 0, np.where(rng.random(a.shape) < 0.1, -300, a))
    a[..., 0], a[..., 1], a[..., 3] = 0, -300, -rng.uniform(0, 0.5, size=(batch, length))
    arrays = (
        rng.normal(size=(*lanes, HEADS, P)), a, rng.normal(size=(*lanes, groups, N)),
        rng.normal(size=(*lanes, groups, N)), rng.normal(size=(batch, HEADS, P, N)),
    )  # fmt: skip
    return dict(zip(ARGUMENTS, arrays, strict=True))


def loop(x, log_decay_blh, B, C, initial_state):
    """(y, last state), head after head, token after token, lane after lane."""
    with_rank = lambda v: v.reshape(*v.shape[:2], -1, *v.shape[-2:])  # noqa: E731
    lanes, Bs, Cs = with_rank(x), with_rank(B), with_rank(C)
    y, last = np.zeros(lanes.shape), np.zeros(initial_state.shape)
    for b, i in np.ndindex(initial_state.shape[:2]):
        h, group = initial_state[b, i], i // (HEADS // B.shape[-2])
        for t in range(lanes.shape[1]):
            h = np.exp(log_decay_blh[b, t, i]) * h
            h = h + lanes[b, t, :, i].T @ Bs[b, t, :, group]
            y[b, t, :, i] = Cs[b, t, :, group] @ h.T
        last[b, i] = h
    return y.reshape(x.shape), last


def as_arrays(p, dtype=None):
    return {k: jnp.asarray(v, dtype) for k, v in p.items()}


def loss_and_gradients(p, y_bar, h_bar, **options):
    """((loss, (y, last)), gradients); the cotangents in the inputs' dtype, so that float32 stays float32."""

    def total(p):
        y, last = ssd(**p, **options)
        return jnp.sum(y * y_bar.astype(y.dtype)) + jnp.sum(last * h_bar.astype(last.dtype)), (y, last)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(p)


CASES = [
    *((length, groups, rank) for length in (1, 65) for groups, rank in ((1, None), (2, 2), (HEADS, 1))),
    *((63, 2, 2), (64, 1, None), (1000, 2, None), (1000, 2, 2)),
]


@pytest.mark.parametrize(("length", "groups", "rank"), CASES)
def test_values_and_gradients(length, groups, rank, rng, x64):
    p = problem(rng, length, groups, rank)
    bars = rng.normal(size=p["x"].shape), rng.normal(size=p["initial_state"].shape)
    (_, reference), expected = loss_and_gradients(as_arrays(p), *bars, implementation="reference")
    for out, ref in zip(reference, loop(**p), strict=True):
        assert_close(out, ref, scale=length * N)
    for dtype in (jnp.float64, jnp.float32):
        (_, values), grads = loss_and_gradients(as_arrays(p, dtype), *bars, implementation="xla")
        for out, ref, label in zip(values, reference, ("y", "last"), strict=True):
            assert out.dtype == dtype
            assert_close(out, ref, scale=length * N, label=label)
        for k in ARGUMENTS:
            assert_close(grads[k], expected[k], scale=length * N, gradient=True, label=f"gradient of {k}")


@pytest.mark.parametrize("rank", [None, 2])
def test_the_loops_gradient_is_its_finite_difference(rank, rng, x64):
    p = problem(rng, 9, 2, rank)
    bars = rng.normal(size=p["x"].shape), rng.normal(size=p["initial_state"].shape)
    direction = {k: rng.normal(size=v.shape) for k, v in p.items()}

    def total(eps):
        y, last = loop(**{k: p[k] + eps * direction[k] for k in p})
        return np.sum(y * bars[0]) + np.sum(last * bars[1])

    _, grads = loss_and_gradients(as_arrays(p), *bars, implementation="reference")
    along = sum(np.sum(np.asarray(grads[k]) * direction[k]) for k in p)
    np.testing.assert_allclose(along, (total(1e-5) - total(-1e-5)) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize(("rank", "each_channel"), [(None, False), (2, True)])
def test_scaled_skipped_and_gated(rank, each_channel, rng, x64):
    """Against the loop with its input scaled and its output gated by hand; the gradients by one finite difference."""
    p = problem(rng, 9, 2, rank)
    p |= dict(dt_blh=rng.uniform(0.1, 1, size=(2, 9, HEADS)), z=rng.normal(size=p["x"].shape))
    p |= dict(D_h=rng.normal(size=(HEADS, P) if each_channel else (HEADS,)))
    y_bar, h_bar = rng.normal(size=p["x"].shape), rng.normal(size=p["initial_state"].shape)
    direction = {k: rng.normal(size=v.shape) for k, v in p.items()}

    def by_hand(x, dt_blh, D_h, z, **others):
        dt = dt_blh[..., None] if rank is None else dt_blh[:, :, None, :, None]
        y, last = loop(dt * x, **others)
        return (y + D_h.reshape(HEADS, -1) * x) * z / (1 + np.exp(-z)), last

    def total(eps):
        y, last = by_hand(**{k: p[k] + eps * direction[k] for k in p})
        return np.sum(y * y_bar) + np.sum(last * h_bar)

    for implementation in IMPLEMENTATIONS:
        (_, out), grads = loss_and_gradients(as_arrays(p), y_bar, h_bar, implementation=implementation)
        for value, expected in zip(out, by_hand(**p), strict=True):
            assert_close(value, expected, scale=9 * N)
        along = sum(np.sum(np.asarray(grads[k]) * direction[k]) for k in p)
        np.testing.assert_allclose(along, (total(1e-5) - total(-1e-5)) / 2e-5, rtol=1e-7)


def test_segsum_is_every_sum_by_itself(rng):
    """A difference of two cumulative sums loses what follows -3e4; a product with zeros makes a -inf nan."""
    a = -np.exp(rng.uniform(-20, 3, size=(3, 17))).astype(np.float32)
    a[:, 5], a[1, 9], a[2, 0] = -3e4, -np.inf, -np.inf
    out = np.asarray(segsum(jnp.asarray(a)))
    for i, j in np.ndindex(17, 17):
        expected = a[:, j + 1 : i + 1].astype(np.float64).sum(1) if i >= j else np.full(3, -np.inf)
        np.testing.assert_allclose(out[:, i, j], expected, rtol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("by", ["reset", "decay"])
def test_packed_is_separate(by, implementation, rng, x64):
    """Values; and gradients, finite everywhere, exactly zero across the documents' ends: in float64 e^-300 is not."""
    p = as_arrays(problem(rng, 40, 2))
    starts = np.isin(np.arange(40), [0, 11, 12])
    options = dict(implementation=implementation, chunk_size=16)

    @jax.jit
    def packed(p):
        if by == "reset":
            return ssd(**p, reset=jnp.broadcast_to(jnp.asarray(starts), (2, 40)), **options)
        forgets = jnp.where(starts[None, :, None], -jnp.inf, p["log_decay_blh"])
        return ssd(**p | dict(log_decay_blh=forgets), **options)

    y, last = packed(p)
    tokens = {k: v for k, v in p.items() if k != "initial_state"}
    alone = jax.jit(lambda p: ssd(**p, **options))
    parts = [
        alone({k: v[:, piece] for k, v in tokens.items()}) for piece in (slice(11), slice(11, 12), slice(12, None))
    ]
    assert_close(y, jnp.concatenate([part for part, _ in parts], 1), scale=40)
    assert_close(last, parts[-1][1], scale=40)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(packed(p)[0][:, 12:] ** 2) + jnp.sum(packed(p)[1])))(p)
    for k, g in grads.items():
        assert np.isfinite(g).all(), k
        assert not np.asarray(g if k == "initial_state" else g[:, :12]).any(), k
        assert k == "initial_state" or np.asarray(g[:, 12:]).any()
    assert not np.asarray(grads["log_decay_blh"][:, 12]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_pieces_vmap_bfloat16_and_nothing_from_the_future(implementation, rng):
    p = as_arrays(problem(rng, 50, 2, 2), jnp.float32)
    state = p.pop("initial_state")
    run = jax.jit(lambda p, state: ssd(**p, initial_state=state, chunk_size=16, implementation=implementation))
    y, last = run(p, state)
    first, middle = run({k: v[:, :21] for k, v in p.items()}, state)
    second, end = run({k: v[:, 21:] for k, v in p.items()}, middle)
    assert_close(jnp.concatenate([first, second], 1), y, scale=50)
    assert_close(end, last, scale=50)
    mapped, states = jax.vmap(lambda p, s: run(jax.tree.map(lambda v: v[None], p), s[None]))(p, state)
    assert_close(mapped[:, 0], y, scale=50)
    assert_close(states[:, 0], last, scale=50)
    half = {k: v if k == "log_decay_blh" else v.astype(jnp.bfloat16) for k, v in p.items()}
    y, last = run(half, state)
    precise, expected = run({k: v.astype(jnp.float32) for k, v in half.items()}, state)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(y, precise)
    assert_close(last, expected)
    grads = jax.grad(lambda p: jnp.sum(run(p, state)[0][:, 20] ** 2))(p)
    assert not any(np.asarray(g[:, 21:]).any() for g in grads.values())
    assert np.asarray(grads["x"][:, 20, :]).any(axis=(-1, -2)).all()


def test_a_batch_split_over_devices(rng):
    """A carry that is not marked as different on every device is refused."""
    p = as_arrays(problem(rng, 9), jnp.float32)
    del p["initial_state"]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for implementation in IMPLEMENTATIONS:
        run = lambda p: ssd(**p, implementation=implementation)  # noqa: B023, E731
        split = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
        for out, ref in zip(jax.jit(split)(p), run(p), strict=True):
            assert_close(out, ref, scale=9)


def test_the_backward_pass_keeps_no_matrix_of_a_chunk(rng):
    p = as_arrays(problem(rng, 128), jnp.float32)
    _, pull = jax.vjp(lambda p: ssd(**p, implementation="xla"), p)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) < 2 * 128 * 64 * HEADS


def test_wrong_input_is_named(rng, untyped):
    p = as_arrays(problem(rng, 5, 2), jnp.float32)
    ranked = as_arrays(problem(rng, 5, 2, 2), jnp.float32)
    for arrays, change, message in [
        (p, dict(B=p["B"][:, :, [0, 1, 1]]), "B has 3 groups; they must divide the 4 heads of x"),
        (p, dict(B=p["B"][:, :4]), r"B has shape \(2, 4, 2, 5\); x \(2, 5, 4, 3\) needs \(2, 5, groups, states\)"),
        (ranked, dict(B=p["B"]), r"B has shape \(2, 5, 2, 5\).*needs \(2, 5, 2, groups, states\)"),
        (p, dict(C=p["C"][..., :4]), r"C has shape \(2, 5, 2, 4\)"),
        (p, dict(log_decay_blh=p["log_decay_blh"][..., :2]), r"log_decay_blh has shape \(2, 5, 2\).*need \(2, 5, 4\)"),
        (p, dict(initial_state=p["initial_state"][:1]), r"initial_state has shape \(1, 4, 3, 5\)"),
        (p, dict(reset=jnp.zeros((2, 4), bool)), r"reset has shape \(2, 4\).*need \(2, 5\)"),
        (p, dict(x=p["x"][0]), r"x must be \(batch, length, \[rank,\] heads, channels\)"),
        (p, dict(dt_blh=p["log_decay_blh"][:, 1:]), r"dt_blh has shape \(2, 4, 4\).*need \(2, 5, 4\)"),
        (p, dict(z=p["x"][..., :2]), r"z has shape \(2, 5, 4, 2\).*need \(2, 5, 4, 3\)"),
        (p, dict(D_h=jnp.ones(3)), r"D_h has shape \(3,\); x \(2, 5, 4, 3\) needs \(4,\) or \(4, 3\)"),
        (p, dict(chunk_size=-1), "chunk_size is -1; it must be at least 1"),
        (p, dict(implementation="cuda"), "implementation is 'cuda'; it may be auto, reference, xla, gpu"),
        (p, dict(implementation="gpu"), "implementation 'gpu' cannot run this: the backend is cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            ssd(**(arrays | change))
