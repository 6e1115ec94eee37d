r"""The kernels of time-invariant state space models, and convolution with them.

A time-invariant model is the convolution y = K * u with $K_l = C \bar A^l \bar B$. For diagonal A the kernel is a
Vandermonde product; for S4's diagonal plus low rank A it is sampled at the roots of unity, where its
generating function costs four Cauchy products.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact

from kernels_pallas.long_convolution.xla import powers
from ssm.discretize import rational_weight


def vandermonde(a_dn: Inexact[Array, "d n"], c_dn: Inexact[Array, "d n"], length: int) -> Float[Array, "d l"]:
    r"""$K_l = \mathrm{Re} \sum_n c_n a_n^l$ for l < length (S4D, eq. 7, with c the product of C and B).

    The powers are split as a^(iJ) a^j, so that about 2 sqrt(length) of them are made and one matrix product
    a channel makes the rest.
    """
    J = 1 << ((length - 1).bit_length() + 1) // 2
    inner = powers(a_dn, J + 1)
    outer = powers(inner[..., J], -(-length // J)) * c_dn[..., None]
    inner = inner[..., :J]
    kernel = jnp.einsum("dni,dnj->dij", outer.real, inner.real, precision="highest")
    if jnp.iscomplexobj(inner):
        kernel -= jnp.einsum("dni,dnj->dij", outer.imag, inner.imag, precision="highest")
    return kernel.reshape(a_dn.shape[0], -1)[:, :length]


@jax.custom_jvp
def _reciprocal(x):
    """1 / x by real arithmetic: XLA's own complex division takes twice as long."""
    return jax.lax.conj(x) * (1 / (x.real * x.real + x.imag * x.imag)).astype(x.dtype)


@_reciprocal.defjvp
def _(primals, tangents):
    y = _reciprocal(*primals)
    return y, -y * y * tangents[0]


@jax.checkpoint
def cauchy(
    v_dkn: Complex[Array, "d k n"],
    m_l: Complex[Array, " l"],
    d_l: Complex[Array, " l"],
    Lambda_dn: Complex[Array, "d n"],
) -> Complex[Array, "d k l"]:
    r"""$\sum_n v_n / (m_l - d_l \lambda_n) + \bar v_n / (m_l - d_l \bar\lambda_n)$: k Cauchy products of S4 a channel,
    over conjugate pairs of which one is kept.

    A pair's sum is $2 (m \mathrm{Re}\, v - d \mathrm{Re}\, v \bar\lambda) / (m - d \lambda)(m - d \bar\lambda)$.
    All k products share the (d, n, l) quotients, as real matrix products; the backward pass makes them again.
    """
    m, d, Lambda = m_l[None, None], d_l[None, None], Lambda_dn[..., None]
    quotient = _reciprocal((m - d * Lambda) * (m - d * Lambda.conj()))
    real = jnp.concatenate([2 * v_dkn.real, -2 * (v_dkn * Lambda_dn.conj()[:, None]).real], 1)
    planes = (jnp.einsum("dkn,dnl->dkl", real, x, precision="highest") for x in (quotient.real, quotient.imag))
    by_m, by_d = jnp.split(jax.lax.complex(*planes), 2, axis=1)
    return m * by_m + d * by_d


def dplr(
    Lambda_dn: Complex[Array, "d n"],
    P_drn: Complex[Array, "d r n"],
    B_dn: Complex[Array, "d n"],
    C_dkn: Complex[Array, "d k n"],
    dt_d: Float[Array, " d"],
    length: int,
    *,
    rule: str = "bilinear",
    weight: float | None = None,
) -> Float[Array, "d k l"]:
    r"""S4's kernel for $A = \Lambda - P P^*$, by the generating function and Woodbury's identity (S4, Lemma C.3).

    $\hat K(z) = \tilde C (m - d\, dt A)^{-1} dt B$ at the roots of unity, with m = 1 - z and d = w + (1-w) z of the
    rule's weight w, so that no root is a special case; K is its inverse Fourier transform. C_dkn holds k
    truncated rows $\tilde C = C (I - \bar A^L)$ a channel, with L the length; of conjugate pairs one is kept; r is
    the rank. The roots are made on the host, in float64: near z = 1 a float32 loses most digits of 1 - z.
    Raises ValueError for a rule that is not rational in A.
    """
    z = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    m_l, d_l = (jnp.asarray(x, Lambda_dn.dtype) for x in (1 - z, rational_weight(rule, weight) * (1 - z) + z))

    dt, root = (x[:, None, None].astype(Lambda_dn.dtype) for x in (dt_d, jnp.sqrt(dt_d)))
    P_drn = root * P_drn
    rows = jnp.concatenate([C_dkn, P_drn.conj()], 1)
    columns = jnp.concatenate([dt * B_dn[:, None], P_drn], 1)
    pairs = rows[:, :, None] * columns[:, None]
    products = cauchy(pairs.reshape(len(dt), -1, B_dn.shape[-1]), m_l, d_l, dt[:, 0] * Lambda_dn)
    return jnp.fft.irfft(_woodbury(products.reshape(*pairs.shape[:3], -1), d_l, P_drn.shape[1])[:, :, 0], length)


def _woodbury(products, d_l, rank):
    """rows (m - d Lambda + d P P^*)^-1 columns, of the products with Lambda alone: P leaves column by column."""
    d = d_l[None, None, None]
    for _ in range(rank):
        through = d * products[:, :, -1:] * products[:, -1:] / (1 + d * products[:, -1:, -1:])
        products = (products - through)[:, :-1, :-1]
    return products


def convolve(
    u_bld: Float[Array, "b l d"],
    K_dl: Float[Array, "d k"],
    K_reverse_dl: Float[Array, "d k"] | None = None,
) -> Float[Array, "b l d"]:
    """y_t = sum_j K_j u_{t-j} by FFT, and with a reverse kernel also + sum_j K_reverse_j u_{t+1+j}.

    The two directions together are one kernel on a circle that is long enough for neither to wrap. Input and
    kernel are transformed in one call: on a CPU, XLA's transforms wait for threads of the pool that they run
    on, and as many of them at once as the pool has threads never return.
    """
    length = u_bld.shape[1]
    kernel = K_dl[:, :length]
    size = _fft_size(2 * length)
    kernel = jnp.pad(kernel, ((0, 0), (0, size - kernel.shape[1])))
    if K_reverse_dl is not None:
        backwards = jnp.flip(K_reverse_dl[:, : length - 1], 1)
        kernel += jnp.pad(backwards, ((0, 0), (size - backwards.shape[1], 0)))
    u_bdl = jnp.pad(jnp.moveaxis(u_bld, 1, 2), ((0, 0), (0, 0), (0, size - length)))
    spectra = jnp.fft.rfft(jnp.concatenate([kernel[None], u_bdl]))
    y_bdl = jnp.fft.irfft(spectra[1:] * spectra[:1], size)[..., :length]
    return jnp.moveaxis(y_bdl, 2, 1)


def _fft_size(least: int) -> int:
    """The smallest 2^i 3^j 5^k that is even and at least `least`: FFTs of such sizes are fast."""
    best = 1 << (least - 1).bit_length()
    for five in (1, 5, 25):
        for three in (1, 3, 9):
            best = min(best, five * three * (1 << max(1, (-(-least // (five * three)) - 1).bit_length())))
    return best
