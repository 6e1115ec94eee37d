# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. S4: one system, two ways to run it
#
# Notebook 1 ended with a state that remembers the past in a good basis,
# notebook 2 with a recurrence that advances it from token to token. S4 (Gu et
# al. 2021) makes a layer of a neural network of them. For each channel of the
# network, a number $u_l$ comes in at token $l$, a number $y_l$ goes out, and
# between them is
#
# $$h_l = \bar A\, h_{l-1} + \bar B\, u_l, \qquad y_l = C\, h_l ,$$
#
# where $\bar A$ and $\bar B$ are the discretised HiPPO matrices,
# $h_l \in \mathbb{R}^N$ is the state, and $C$ is a row of $N$ learned
# numbers. The trouble is the cost. A loop over $L$ tokens with a full
# $N \times N$ matrix takes $L$ steps that cannot be done at once, and $N^2 L$
# multiplications a channel. A layer has hundreds of channels, and on a GPU
# the loop alone would be hopeless.
#
# S4 computes the same numbers as a convolution, without the loop, and finds
# the convolution's kernel without powers of $\bar A$. This notebook follows
# the paper's steps, one check each, from the loop to the four Cauchy products
# at its heart. All functions are the library's, and all of it is in float64.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import knob, lines, matrix, show
from ssm import convolution, hippo
from ssm.discretize import discretize_dense
from ssm.mixers import s4
from ssm.recurrence import dense_recurrence

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
N, L, dt = 16, 256, 0.02

# %% [markdown]
# ## The loop is a convolution
#
# Write the recurrence out from $h_{-1} = 0$:
#
# $$y_l = C \bar B\, u_l + C \bar A \bar B\, u_{l-1} + C \bar A^2 \bar B\, u_{l-2} + \dots
# = \sum_{j=0}^{l} K_j\, u_{l-j}, \qquad K_j = C \bar A^j \bar B . \tag{1}$$
#
# The output is the convolution of the input with a *kernel* $K$ that does not
# depend on the input. Two sequences of length $L$ are convolved by fast
# Fourier transforms in $O(L \log L)$ multiplications, all tokens at once. So
# a trained layer has two faces: in training, when the whole sequence is
# there, it is a convolution; when it writes one token after another, it is a
# recurrence with a small state, whose cost for a token does not depend on how
# many came before.
#
# Here the kernel is made by brute force: it is the loop's answer to a single
# 1 at the first token. The knob is the step $\Delta$. Since $K_j$ samples
# $C e^{tA} B$ at $t = j \Delta$, a larger step shows more of the same curve
# in as many tokens: $\Delta$ is how far a kernel of $L$ taps sees.

# %%
A, B = map(jnp.asarray, hippo.measure("legs", N))
C, u = jnp.asarray(rng.normal(size=N)), jnp.asarray(rng.normal(size=L))
impulse = jnp.zeros(L).at[0].set(1)

bars = lambda dt: discretize_dense("bilinear", A, dt)
loop = lambda u, dt: dense_recurrence(bars(dt).decay, (u[:, None] * (bars(dt).current @ B))[None])[0][0] @ C
taps, dts = np.arange(L), np.geomspace(0.001, 0.1, 21)
curve = lambda dt: {"$K$": (taps, loop(impulse, dt) / dt, ".-")}
knob(lambda dt: show(lines(curve(dt), title=rf"$\Delta$ = {dt:.3g}", xlabel="$j$"), width=7, height=3.4), dt=dts)

K, y = loop(impulse, dt), loop(u, dt)
by_fft = convolution.convolve(u[None, :, None], K[None])[0, :, 0]
assert jnp.allclose(by_fft, y, atol=1e-12)
assert not jnp.allclose(by_fft, loop(u, 2 * dt), atol=1e-2)

# %% [markdown]
# ## Why not simply diagonalise
#
# To get $K$ without the loop we want powers of $\bar A$ to be cheap, and they
# are if $A$ is diagonal: if $A = V \Lambda V^{-1}$, then
# $\bar A^j = V \bar \Lambda^j V^{-1}$, and $V$ may be absorbed by $B$ and
# $C$. Almost every matrix can be diagonalised, the HiPPO matrix too: it is
# triangular, its eigenvalues are its diagonal entries $-1, -2, \dots, -N$.
#
# But its eigenvectors are nearly parallel. To be useful, $V$ and $V^{-1}$
# must be computed and multiplied by; the relative error of that is the
# *condition number* of $V$, the ratio of its largest to its smallest singular
# value, times the precision of the numbers. For `legs` the entries of $V$ are
# products of binomials that grow as $2^{4N/3}$ (S4, Lemma 3.2). Already at
# $N = 24$ not one digit of float64 survives, and S4 uses $N = 64$ in float32.
#
# The right figure is the remedy of the next section: the same matrix after
# adding $P P^\top$. Its eigenvectors are orthogonal, condition number 1, at
# every $N$.

# %%
sizes = np.arange(2, 41, 2)
condition = {"$A$ of legs": [], r"$A + P P^\top$": []}
for n in sizes:
    A_n, P_n, _ = hippo.nplr("legs", n)
    for name, each in zip(condition, (A_n, A_n + P_n @ P_n.T), strict=True):
        condition[name].append(np.linalg.cond(np.linalg.eig(each)[1]))
curves = {name: (sizes, values, "o-") for name, values in condition.items()}
curves["float64 has no digit left"] = (sizes, np.full(len(sizes), 2.0**53), "--")
show(lines(curves, xlabel="$N$", ylabel="condition number of $V$", yscale="log", legend="outside"), width=9)

legs, normal = map(np.array, condition.values())
assert np.all(legs[sizes >= 24] > 2.0**53) and np.all(normal < 1 + 1e-6)

# %% [markdown]
# ## Normal plus low rank
#
# What makes eigenvectors orthogonal? A matrix is *normal*, diagonal in an
# orthonormal (complex) basis, if it commutes with its transpose. Symmetric
# matrices are, and skew-symmetric ones, $S^\top = -S$, whose eigenvalues are
# imaginary pairs $\pm i \omega$; and a skew-symmetric matrix plus a multiple
# of the identity.
#
# Look at `legs` below its diagonal: $-\sqrt{2n+1}\sqrt{2k+1}$, which is a
# product of a column and a row. With $P_n = \sqrt{n + 1/2}$, adding
# $P_n P_k = \frac12 \sqrt{2n+1}\sqrt{2k+1}$ everywhere leaves minus one half
# of that product below the diagonal, plus one half above it, and on the
# diagonal $-(n+1) + (n + \frac12) = -\frac12$:
#
# $$A + P P^\top = -\tfrac12 I + S, \qquad S^\top = -S . \tag{2}$$
#
# One column $P$, a matrix of rank 1, separates HiPPO from a normal matrix. So
# it can be written as
#
# $$A = V\, (\Lambda - P_V P_V^*)\, V^*, \qquad P_V = V^* P, \tag{3}$$
#
# with a *unitary* $V$, that is $V^{-1} = V^*$, the conjugate transpose, and
# $\Lambda_n = -\frac12 + i \omega_n$. In the basis $V$ it is *diagonal plus
# low rank*, DPLR. From now on $P$, $B$ and $C$ are meant in that basis. The
# eigenvalues come in conjugate pairs, of which one is enough: the state of
# the other is its conjugate, and a real result is twice the real part.
# `hippo.dplr` returns the kept halves, 8 numbers each here.

# %%
A_n, P_n, B_n = hippo.nplr("legs", N)
titles = {"$A$": A_n, r"$P P^\top$": P_n @ P_n.T, r"$S = A + P P^\top + I/2$": A_n + P_n @ P_n.T + np.eye(N) / 2}
show(*[matrix(each, title=title, limit=30) for title, each in titles.items()], height=3.6)

S = titles[r"$S = A + P P^\top + I/2$"]
Lambda, P, B_v, V = hippo.dplr("legs", N)
assert np.allclose(S, -S.T)
assert np.allclose(2 * np.real(V * Lambda @ V.conj().T) - P_n @ P_n.T, A_n)
assert np.allclose(V.conj().T @ V, np.eye(N // 2)) and np.allclose(P, V.conj().T @ P_n)

# %% [markdown]
# ## The kernel's generating function
#
# Powers of a DPLR matrix are still a mess: $(\Lambda - P P^*)^j$ mixes both
# parts. *Inverses* are not. So S4 does not ask for $K_0, K_1, \dots$ but for
# the polynomial that has them as coefficients,
#
# $$\hat K(z) = \sum_{j=0}^{L-1} K_j z^j , \tag{4}$$
#
# at $L$ points. At the roots of unity $z_k = e^{-2 \pi i k / L}$ its values
# are the discrete Fourier transform of $K$, and the inverse FFT returns the
# kernel; if we have $\hat K$ anyway, we might even stay there. Why is it
# easier? The sum is geometric:
#
# $$\hat K(z) = \sum_{j=0}^{L-1} C (\bar A z)^j \bar B = C\, (I - \bar A^L z^L)\, (I - \bar A z)^{-1} \bar B
# = \tilde C\, (I - \bar A z)^{-1} \bar B, \qquad \tilde C = C\, (I - \bar A^L) , \tag{5}$$
#
# since $z_k^L = 1$ at every root. The one power that is left, $\bar A^L$,
# sits in $\tilde C$, and there S4 plays a trick: as $C$ is learned anyway,
# let $\tilde C$ be the parameter. Then no power is ever computed in training.
# (It is, once, if $C$ is needed for the recurrence:
# $C = \tilde C (I - \bar A^L)^{-1}$.)
#
# Here is (5) with full matrices and an inverse at every root.

# %%
A_bar, _, B_bar = (np.asarray(x) for x in discretize_dense("bilinear", A, dt))
z = np.exp(-2j * np.pi * np.arange(L) / L)
C_tilde = C @ (np.eye(N) - np.linalg.matrix_power(A_bar, L))
K_hat = np.array([C_tilde @ np.linalg.solve(np.eye(N) - A_bar * z_k, B_bar @ B) for z_k in z])

assert np.allclose(K_hat, np.fft.fft(K)) and np.allclose(np.fft.ifft(K_hat), K, atol=1e-12)
not_truncated = np.array([C @ np.linalg.solve(np.eye(N) - A_bar * z_k, B_bar @ B) for z_k in z])
assert not np.allclose(np.fft.ifft(not_truncated), K, rtol=1e-3)

# %% [markdown]
# What happens without the tilde? Then the sum in (4) does not end at $L$; the
# kernel's tail beyond $L$ wraps around and is added on top, as the last
# assertion shows. The shorter a kernel's memory, the less it matters.
#
# ## The bilinear rule lets $A$ out
#
# In (5) stands $\bar A$, the discretised matrix. Put in the bilinear rule,
# $\bar A = (I - \frac{\Delta}{2} A)^{-1} (I + \frac{\Delta}{2} A)$ and
# $\bar B = (I - \frac{\Delta}{2} A)^{-1} \Delta B$, and multiply through by
# $I - \frac{\Delta}{2} A$, with which everything commutes:
#
# $$(I - \bar A z)^{-1} \bar B
# = \left( I - \tfrac{\Delta}{2} A - z - z \tfrac{\Delta}{2} A \right)^{-1} \Delta B
# = \left( (1 - z)\, I - \tfrac{1 + z}{2}\, \Delta A \right)^{-1} \Delta B . \tag{6}$$
#
# The discretised matrix is gone; what is inverted is the original $A$,
# shifted. In the paper this is divided by $1 + z$, which fails at the root
# $z = -1$; in the form (6) nothing is special there. With $m = 1 - z$ and
# $d = (1+z)/2$ we need
#
# $$\hat K(z) = \tilde C\, (m - d\, \Delta A)^{-1} \Delta B, \qquad A = \Lambda - P P^* .$$
#
# ## Four Cauchy products
#
# If $A$ were $\Lambda$ alone, the inverse would be one of numbers, and
#
# $$\tilde C\, (m - d \Delta \Lambda)^{-1} \Delta B = \sum_n \frac{\tilde C_n\, \Delta B_n}{m - d\, \Delta \lambda_n} ,
# \tag{7}$$
#
# a sum of simple fractions at $L$ points $z$: multiplication by a *Cauchy
# matrix*, for which $O(N)$ operations a point are enough. The low rank term
# is handled by *Woodbury's identity*, which says what a change of rank 1 does
# to an inverse. With $R = (m - d \Delta \Lambda)^{-1}$, and absorbing the
# $\Delta$ into $B$ and, as a root, into $P$,
#
# $$(R^{-1} + d\, P P^*)^{-1} = R - R P\, \frac{d}{1 + d\, P^* R P}\, P^* R .$$
#
# Multiply from the left by $\tilde C$ and from the right by $B$, and four
# products of the kind (7) are left:
#
# $$\hat K = \tilde C R B - \frac{d\; (\tilde C R P)\, (P^* R B)}{1 + d\, P^* R P} . \tag{8}$$
#
# That is all of S4: four sums over $N/2$ fractions at each of $L/2 + 1$ roots
# (the kernel is real, so that half of the roots suffice), a quotient, one
# inverse FFT. `convolution.cauchy` computes sums over conjugate pairs, and
# `convolution.dplr` the whole kernel. Its cost is $O(NL)$ multiplications,
# all independent of each other, where the loop had $N^2 L$ in a chain.

# %%
one_channel = lambda x: jnp.asarray(x)[None]
Lambda_dn, P_drn, B_dn, C_dn = map(one_channel, (Lambda, P.T, B_v, C @ V))
dt_d = jnp.array([dt])
transition = s4.discrete_transition(Lambda_dn, P_drn, B_dn, dt_d)
C_tilde_dkn = s4.truncate(C_dn[:, None], transition, L)

m, d = 1 - z, (1 + z) / 2
rows, columns = [C_tilde_dkn[0, 0], P_drn[0, 0].conj() * dt**0.5], [dt * B_dn[0], P_drn[0, 0] * dt**0.5]
pairs = jnp.stack([row * column for row in rows for column in columns])
CRB, CRP, PRB, PRP = convolution.cauchy(pairs[None], jnp.asarray(m), jnp.asarray(d), dt * Lambda_dn)[0]
by_cauchy = np.fft.ifft(CRB - d * CRP * PRB / (1 + d * PRP))

assert np.allclose(by_cauchy, K, atol=1e-12)
assert np.allclose(convolution.dplr(Lambda_dn, P_drn, B_dn, C_tilde_dkn, dt_d, L)[0, 0], K, atol=1e-12)
assert not np.allclose(np.fft.ifft(CRB), K, rtol=0.1)  # the low rank matters

# %% [markdown]
# The last assertion is a warning. Without $P$ the kernel is another one
# altogether; that one may nevertheless do without it is the subject of
# notebook 4.
#
# ## The recurrence, in O(N) too
#
# A token at a time, the DPLR form pays as well. By Woodbury's identity once
# more, $\bar A$ is again diagonal plus rank 1, and a step costs $O(N)$ and
# not $N^2$. `s4.discrete_transition`, used above, is it: four vectors
# $a, p, q, b$ with
# $h_l = a\, h_{l-1} - p\, \mathrm{Re}(q \cdot h_{l-1}) + b\, u_l$.
#
# `s4.discrete` puts both faces in one system, and `s4.recurrent` and
# `s4.parallel` run it. They must agree with each other and with the loop we
# began with; and a prompt may be read by one and continued by the other, as a
# language model does. The state that `parallel` hands over is the same as the
# loop's.

# %%
system = s4.discrete(Lambda_dn, P_drn, B_dn, C_tilde_dkn[:, 0], jnp.zeros(1), dt_d, L, tokens=L)
x = u[None, :, None]
by_loop, last = s4.recurrent(x, system)
by_kernel, last_of_kernel = s4.parallel(x, system)
prompt, state = s4.parallel(x[:, :200], system)
rest, _ = s4.recurrent(x[:, 200:], system, state)

assert jnp.allclose(by_loop[0, :, 0], y, atol=1e-12) and jnp.allclose(by_kernel, by_loop, atol=1e-11)
assert jnp.allclose(last.h_bdn, last_of_kernel.h_bdn, atol=1e-11)
assert jnp.allclose(jnp.concatenate([prompt, rest], 1), by_loop, atol=1e-11)

# %% [markdown]
# ## What a layer learns to listen to
#
# A channel of S4 begins with the fixed $\Lambda$, $P$ and $B$ of HiPPO, a
# step $\Delta$ drawn between $0.001$ and $0.1$, and a random $C$. All of them
# are trained, $\Lambda$ and $P$ slowly. In `ssm.mixers.s4.S4`,
# $A = \Lambda - P P^*$ has the same $P$ on both sides, which keeps every
# eigenvalue in the left half plane:
# $\mathrm{Re}\, v^* A v = \mathrm{Re}\, v^* \Lambda v - |P^* v|^2 < 0$.
#
# Below is a layer of width 128 as it starts: how much of a kernel's energy,
# $\sum_j K_j^2$, lies in its first taps, for the channels of the longest, the
# middle and the shortest step. One layer hears clicks and trends at once;
# that is what the range of $\Delta$ is for. The eight slowest channels need
# ten times as many taps as the eight fastest. That the fastest are not faster
# still is the bilinear rule's doing: it maps states that should vanish at
# once to decays near $-1$, and those ring on (notebook 2).

# %%
length = 2048
layer = s4.S4(width=128, length=length)
parameters = jax.jit(layer.init)(jax.random.key(1), jnp.zeros((1, 1, 128)))
kernels = jax.jit(lambda p: layer.apply(p, length, method="system").K_dl)(parameters)
order = np.argsort(parameters["params"]["log_dt"])
energy = jnp.cumsum(kernels**2, 1) / jnp.sum(kernels**2, 1, keepdims=True)
dts = jnp.exp(parameters["params"]["log_dt"])
curves = {rf"$\Delta$ = {dts[i]:.3g}": (np.arange(1, length + 1), energy[i]) for i in order[[-1, 64, 0]]}
show(lines(curves, xlabel="taps", ylabel="share of the energy", xscale="log", legend="outside"), width=9)

enough = jnp.argmax(energy > 0.9, 1) + 1
print("taps that hold nine tenths:", *(int(jnp.median(enough[i])) for i in (order[-8:], order[:8])))
assert jnp.median(enough[order[:8]]) > 10 * jnp.median(enough[order[-8:]])

# %% [markdown]
# ## What to take along
#
# * A linear, time-invariant recurrence is a convolution: train it as the one,
#   run it as the other.
# * HiPPO's matrix cannot be diagonalised in practice, but it is one rank away
#   from a matrix that is diagonal in an orthonormal basis.
# * Kernel $\to$ generating function $\to$ resolvent $\to$ Woodbury $\to$ four
#   Cauchy products.
#
# The next notebook asks what would happen if the rank were just left out.
