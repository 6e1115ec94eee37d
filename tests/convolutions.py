"""What every kernel of the long convolution is held to: the loop over tokens in float64, and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.long_convolution import long_convolution
from tests.oracles import relative


def problem(rng, dtype: str, batch: int, length: int, d: int, n: int, is_complex: bool, both: bool) -> tuple:
    """Arguments and cotangents of the outputs; a from 1 to e^-300, a state that enters or, `both`, tokens to come."""
    draw = lambda *shape: rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0)  # noqa: E731
    a = draw(d, n)
    a *= (1 - np.geomspace(0.01, 0.5, n)) / abs(a)
    a[0, :3] = 1, 0, np.exp(-300)
    p = dict(u=rng.normal(size=(batch, length, d)), a=a, b=draw(d, n), c=draw(d, n), D=rng.normal(size=d))
    state = draw(batch, d, n)
    p |= dict(c_reverse=p["c"][::-1].copy()) if both else dict(initial_state=state)
    bars = rng.normal(size=p["u"].shape) + p["u"], state * (not both)
    p, bars = jax.tree.map(lambda x: x.astype(np.complex64 if np.iscomplexobj(x) else np.float32), (p, bars))
    narrow = lambda x: np.asarray(jnp.asarray(x, dtype))  # noqa: E731
    return p | dict(u=narrow(p["u"])), (narrow(bars[0]), bars[1])


def outputs_and_gradients(p: dict, bars: tuple, **options) -> tuple:
    @jax.jit
    def both(p, bars):
        outputs, pull = jax.vjp(lambda p: long_convolution(**p, **options), p)
        return outputs, pull(bars)[0]

    return jax.block_until_ready(both(p, bars))


def check(out: tuple, p: dict, bars: tuple, bound: float, looser: float) -> None:
    """bound: of the outputs and u's gradient. looser: of the other gradients, which are sums over all tokens."""
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)  # noqa: E731
        ref = outputs_and_gradients(*jax.tree.map(wide, (p, bars)), implementation="reference")
    (y, last), gradients = jax.tree.map(wide, out)
    assert relative(y, ref[0][0]) < bound and relative(last, ref[0][1]) < bound
    for name, value in gradients.items():
        error = relative(value, ref[1][name])
        assert error < (bound if name == "u" else looser), f"gradient of {name}: {error:.1e}"
