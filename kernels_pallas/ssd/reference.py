"""State space duality one token after another: the definition."""

import jax
import jax.numpy as jnp


def run(x_blrhp, a_blh, B_blrgn, C_blrgn, h_bhpn):
    """(y_blrhp, last state) from log decays a, with head i reading group i // (h / g)."""
    each_head = lambda v: jnp.repeat(v, x_blrhp.shape[3] // v.shape[3], 3)  # noqa: E731
    in_time = lambda v: jnp.moveaxis(v, 1, 0)  # noqa: E731

    def advance(h, token):
        x_brhp, a_bh, B_brhn, C_brhn = token
        h = jnp.exp(a_bh)[:, :, None, None] * h + jnp.einsum("brhp,brhn->bhpn", x_brhp, B_brhn, precision="highest")
        return h, jnp.einsum("bhpn,brhn->brhp", h, C_brhn, precision="highest")

    tokens = map(in_time, (x_blrhp, a_blh, each_head(B_blrgn), each_head(C_blrgn)))
    last, y_lbrhp = jax.lax.scan(advance, h_bhpn, tuple(tokens))
    return jnp.moveaxis(y_lbrhp, 0, 1), last
