r"""Linear recurrences $h_t = a_t h_{t-1} + b_t$ over time: diagonal by the shared kernel, and dense.

The map h -> a h + b is what tokens do to the state; doing one after another is
(a, b) o (a', b') = (a a', a' b + b'), which is associative, so that any bracketing of the tokens gives the
same states: one by one, in a tree, or block by block.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, Int

from kernels_pallas.associative_scan import associative_scan


def linear_recurrence(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "b l ..."],
    initial_state: Inexact[Array, "b ..."] | None = None,
    *,
    reverse: bool = False,
    reset: Bool[Array, "b l"] | None = None,
    implementation: str = "auto",
) -> tuple[Inexact[Array, "b l ..."], Inexact[Array, "b ..."]]:
    """All states of a diagonal recurrence, real or complex, and the last one reached.

    a: like b, or (*state,) where it is the same at every token. reverse: from the last token to the first.
    reset: True at tokens that forget the states before them (see `segment_starts`).
    implementation: "reference" runs token by token, "xla" as an associative scan; "auto" takes the faster one,
    which on a CPU is the first (`python -m kernels_pallas.benchmark` measures it).
    Raises ValueError naming the argument whose shape or dtype does not fit.
    """
    batch, length, *state = b.shape
    n = math.prod(state)
    per_token = a.ndim == b.ndim
    planes = _planes if jnp.iscomplexobj(a) or jnp.iscomplexobj(b) else lambda x: x
    states, last = associative_scan(
        planes(a.reshape((batch, length, n) if per_token else (n,))),
        planes(b.reshape(batch, length, n)),
        None if initial_state is None else planes(initial_state.reshape(batch, n)),
        reverse=reverse,
        reset=reset,
        implementation=implementation,
    )
    return _number(states).reshape(b.shape), _number(last).reshape(batch, *state)


def _planes(x):
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x, jnp.zeros_like(x))


def _number(x):
    return jax.lax.complex(*x) if isinstance(x, tuple) else x


def dense_recurrence(
    A_nn: Inexact[Array, "n n"],
    b_bln: Inexact[Array, "b l n"],
    initial_state: Inexact[Array, "b n"] | None = None,
) -> tuple[Inexact[Array, "b l n"], Inexact[Array, "b n"]]:
    """All states of h_t = A h_{t-1} + b_t with a dense A, one token after another, and the last."""
    h = jnp.zeros_like(b_bln[:, 0]) if initial_state is None else initial_state

    def advance(h, b_bn):
        h = jnp.einsum("nm,bm->bn", A_nn, h, precision="highest") + b_bn
        return h, h

    last, states = jax.lax.scan(advance, h, jnp.moveaxis(b_bln, 1, 0))
    return jnp.moveaxis(states, 0, 1), last


def segment_starts(segment_ids: Int[Array, "b l"] | None) -> Bool[Array, "b l"] | None:
    """True where a packed row's segment differs from the one before; the first token continues the state."""
    if segment_ids is None:
        return None
    return jnp.concatenate([jnp.zeros_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
