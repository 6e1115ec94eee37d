# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. Duality: a recurrence is a matrix is an attention
#
# Two kinds of layers read sequences. A *recurrence* carries a state from
# token to token: its cost grows with the length as $T$, and what it knows of
# the past has a fixed size. *Attention* compares every token with every
# earlier one: its cost grows as $T^2$, and it forgets nothing. Mamba-2 (Dao
# and Gu 2024) is built on the observation that for a large family of models
# these are two ways to compute *the same function*, and that a third way, in
# between, is faster than both on hardware that is good at multiplying
# matrices. The paper calls this state space duality, SSD.
#
# The model, for one head, at token $t$: a number $\Delta_t > 0$, an input
# $x_t \in \mathbb{R}^P$, rows $B_t, C_t \in \mathbb{R}^N$, all computed from
# the token; and one number $A < 0$ for the head. With $a_t = e^{\Delta_t A}$,
# a single decay between 0 and 1,
#
# $$h_t = a_t\, h_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = h_t\, C_t, \qquad h_t \in \mathbb{R}^{P \times N} .
# \tag{1}$$
#
# The state is a table of $P \times N$ numbers. Compared with the models
# before, the whole table fades at one rate. That is the price of what
# follows; what is bought with it are large states, $N = 128$ where Mamba has
# 16.
#
# `ssm.mixers.mamba2` has the three ways: `recurrent`, `quadratic` and
# `chunked`.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import knob, lines, matrix, show, timed
from ssm.mixers import mamba2

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
T, P, N, A_h, D_h = 64, 8, 4, jnp.array([-1.0]), jnp.zeros(1)
dt = jnp.asarray(rng.uniform(0.01, 0.15, size=(1, T, 1)))
x = jnp.asarray(rng.normal(size=(1, T, 1, P)))
B, C = jnp.asarray(rng.normal(size=(2, 1, T, 1, N)))
recurrent, chunked = jax.jit(mamba2.recurrent), jax.jit(mamba2.chunked, static_argnames="chunk_size")

# %% [markdown]
# ## The matrix of a recurrence
#
# For given $\Delta$, $B$ and $C$, (1) is linear in $x$. So there is a matrix
# that takes all inputs to all outputs, $y = M x$, the same for each of the
# $P$ channels. Unroll (1): what token $j$ put into the state has decayed by
# $a_{j+1} \cdots a_i$ when token $i$ reads it. Hence
#
# $$M_{ij} = \begin{cases} a_i\, a_{i-1} \cdots a_{j+1}\; (C_i^\top B_j)\; \Delta_j & i \ge j \\ 0 & i < j . \end{cases}
# \tag{2}$$
#
# This is a product, entry by entry, of three things. $C B^\top$ is the matrix
# of all inner products of a $C$ with a $B$. $\Delta_j$ scales the columns.
# And $L_{ij} = a_i \cdots a_{j+1}$, zero above the diagonal, is the *mask*:
# with $\circ$ for the product entry by entry,
#
# $$M = L \circ (C B^\top)\, \mathrm{diag}(\Delta) . \tag{3}$$
#
# In the pictures, red is positive, blue negative, white zero. The mask is all
# red, dark where little time has passed; where its staircase is steep, a
# token with a large $\Delta$ came by. $M$ is what remains of the scores under
# it.
#
# We get $M$ out of the recurrence, without knowing (2), by feeding it the
# columns of the identity: $x_t$ is a 1 in channel $t$ and zeros elsewhere, so
# that channel $j$ of the output is column $j$ of $M$.

# %%
identity = jnp.eye(T)[None, :, None]
M = recurrent(identity, dt, A_h, B, C, D_h)[0][0, :, 0]
mask = jnp.exp(mamba2.segsum(dt[0, :, 0] * A_h))
products = C[0, :, 0] @ B[0, :, 0].T
show(matrix(mask, title="mask $L$"), matrix(products, title=r"$C B^\top$"), matrix(M, title="$M$"), height=3.8)

assert jnp.allclose(M, mask * products * dt[0, :, 0])
assert jnp.allclose(M @ x[0, :, 0], recurrent(x, dt, A_h, B, C, D_h)[0][0, :, 0])

# %% [markdown]
# ## Attention, minus the softmax
#
# Read (3) again with other names: $C_i$ is a *query*, $B_j$ a *key*, $x_j$ a
# *value*. $C B^\top$ are the scores of all queries with all keys, a mask
# forbids looking ahead, and $y = M x$ sums the values by their scores. That
# is attention, but for two differences. The scores are used as they are,
# without a softmax; this is *linear attention*, of which Katharopoulos et al.
# showed in 2020 that it is a recurrence. And the mask does not have ones
# below its diagonal but decays: how much token $j$ counts at token $i$
# depends on what happened between them. A token with a large $\Delta$ puts a
# veil before all that was earlier.
#
# A Transformer has to be told where a token stands, by adding positions or by
# turning queries and keys. Here the mask does it: it says how long ago
# something was, in a time that the tokens themselves set.
#
# With $A = 0$ nothing decays and the mask is the usual causal one. Then (3)
# is exactly causal linear attention.

# %%
y, last = mamba2.quadratic(x, dt, A_h, B, C, D_h)
no_decay = mamba2.quadratic(x, jnp.ones_like(dt), jnp.zeros(1), B, C, D_h)[0][0, :, 0]
queries, keys, values = C[0, :, 0], B[0, :, 0], x[0, :, 0]

assert jnp.allclose(no_decay, jnp.tril(queries @ keys.T) @ values)
assert not jnp.allclose(no_decay, y[0, :, 0], rtol=0.1)
assert jnp.allclose(y, recurrent(x, dt, A_h, B, C, D_h)[0])
assert jnp.allclose(last, recurrent(x, dt, A_h, B, C, D_h)[1])

# %% [markdown]
# ## The mask in floating point
#
# A product of decays from $j + 1$ to $i$ looks like a quotient of two
# cumulative products, $L_{ij} = (a_1 \cdots a_i) / (a_1 \cdots a_j)$, which
# would be cheap. It is a trap. After a few thousand tokens both products are
# below the smallest number that can be written, and $0/0$ is not a number.
# Taking the exponential of a difference of two sums is better, but the sums
# grow large and their difference loses digits.
#
# `segsum` computes each sum $\sum_{k=j+1}^{i} \Delta_k A$ from its own terms,
# by a cumulative sum down each column that starts at its own $j$. No exponent
# is ever positive, nothing overflows, and where nothing is left, the entry is
# 0.

# %%
log_decay = jnp.full(4096, -1.0, jnp.float32).at[2000].set(-300.0)
total = jnp.cumsum(log_decay)
i, j = 4000, 3995  # five tokens apart: the decay is e^-5
by_quotient = jnp.exp(total[i]) / jnp.exp(total[j])
by_segsum = jnp.exp(mamba2.segsum(log_decay[3990:4010]))[i - 3990, j - 3990]
print("e^-5 =", np.exp(-5.0), " by a quotient:", by_quotient, " by segsum:", by_segsum)

assert jnp.isnan(by_quotient) and abs(by_segsum / np.exp(-5) - 1) < 1e-6
assert jnp.exp(mamba2.segsum(log_decay[1990:2010]))[19, 0] == 0.0

# %% [markdown]
# ## Low rank below the diagonal
#
# What is special about $M$, that a product with it can be done in $O(T)$? Cut
# the tokens at some place into earlier and later ones. The block of $M$ that
# takes earlier inputs to later outputs is, by (2),
#
# $$M_{\text{later}, \text{earlier}} = \underbrace{\begin{pmatrix} a_{s} C_s^\top \\ a_{s+1} a_s C_{s+1}^\top \\ \vdots
# \end{pmatrix}}_{\text{later} \times N} \underbrace{\begin{pmatrix} \cdots & a_{s-1} B_{s-2} \Delta_{s-2} & B_{s-1}
# \Delta_{s-1} \end{pmatrix}}_{N \times \text{earlier}} , \tag{4}$$
#
# where $s$ is the first of the later tokens: a product of a tall and a wide
# matrix. All that passes from earlier to later passes through the $N$ numbers
# between them, the state. So the block has rank $N$ at most, however large it
# is, and so has *every* block that lies on or below the diagonal. Such a
# matrix is called *semiseparable*, and the converse is true as well: every
# semiseparable matrix is a state space model. Softmax attention has no such
# structure: its blocks have full rank, which is why it cannot be run with a
# state of fixed size.

# %%
spectra = {"this model, $N = 4$": M[32:, :32]}
scores = jnp.where(jnp.tril(jnp.ones((T, T))) > 0, products, -jnp.inf)
spectra["softmax attention"] = jax.nn.softmax(scores, 1)[32:, :32]
curves = {name: (np.arange(1, 33), np.linalg.svd(block)[1], "o-") for name, block in spectra.items()}
axes = dict(
    xlabel="number", ylabel="singular value of the block", yscale="log", ylim=(1e-18, 100), legend="center right"
)
show(lines(curves, **axes), width=7, height=3.6)

for cut in (8, 20, 32, 50):
    assert np.linalg.matrix_rank(M[cut:, :cut]) == N
assert np.linalg.matrix_rank(spectra["softmax attention"]) > 3 * N

# %% [markdown]
# ## Chunks
#
# Now the two ways can be combined. Cut the tokens into chunks of $Q$. The
# blocks of $M$ on the diagonal, one for each chunk, are small: multiply by
# them as attention does. The blocks below have rank $N$: multiply by their
# factors (4). In four steps,
#
# 1. within each chunk, attention with the decaying mask: $Q \times Q$
#    matrices;
# 2. of each chunk, the state that it would leave if it had begun with none:
#    its right factor in (4), times its $x$;
# 3. from chunk to chunk, the recurrence (1) with these states: $T/Q$ steps,
#    not $T$;
# 4. what the state that enters a chunk says to each of its tokens: the left
#    factor.
#
# Steps 1, 2 and 4 are matrix products for all chunks at once, which is what
# GPUs and TPUs are made for; only step 3 is sequential, and it is short. With
# chunks of 1 this is the recurrence, with one chunk of $T$ it is attention.
# The right picture below shows the part of $M$ that step 1 covers, and the
# left one the rest, for a knob that sets $Q$.

# %%
inside = lambda Q: (np.arange(T)[:, None] // Q) == (np.arange(T)[None] // Q)
parts = lambda Q: [(M * ~inside(Q), f"by states, {T // Q - 1} steps"), (M * inside(Q), f"as attention, $Q = {Q}$")]
knob(lambda Q: show(*[matrix(part, title=title, limit=1) for part, title in parts(Q)], width=8), Q=[4, 8, 16, 32])

for Q in (1, 8, 16, 24, 64):  # 24 does not divide 64: the last chunk is shorter
    y_chunked, last_chunked = chunked(x, dt, A_h, B, C, D_h, chunk_size=Q)
    assert jnp.allclose(y_chunked, y) and jnp.allclose(last_chunked, last)
first, state = chunked(x[:, :40], dt[:, :40], A_h, B[:, :40], C[:, :40], D_h, chunk_size=16)
rest, _ = chunked(x[:, 40:], dt[:, 40:], A_h, B[:, 40:], C[:, 40:], D_h, state, chunk_size=16)
assert jnp.allclose(jnp.concatenate([first, rest], 1), y)

# %% [markdown]
# ## What it costs
#
# Count multiplications for one head. The recurrence needs about $3 P N$ a
# token: fade the state, add to it, read it. The quadratic form needs
# $(N + P)\, T / 2$ a token, for scores and sums, half of them saved by the
# mask at best. The chunked form needs $(N + P)\, Q / 2 + 2 P N$ a token: it
# is linear in $T$ like the recurrence, but nearly all of its multiplications
# are in matrix products of size $Q$, $N$ and $P$. A GPU does these some ten
# to thirty times faster than the element by element work of the recurrence.
# With $N = P = Q = 128$ all terms are of one order.
#
# XLA counts the multiplications and additions of a program, and we let it
# count the quadratic and the chunked form of one head of Mamba-2's own size,
# $P = 64$ and $N = 128$, as the length doubles. The first grows four-fold
# each time, the second doubles. (Of a loop it counts one turn. That leaves
# out a small part of the chunked form, and nearly all of the recurrence,
# which therefore is not on the left.)
#
# A count is not a time, and so on the right is a clock: the same three
# programs on the machine on which this notebook runs, compiled before. Where
# the lines stand depends on the machine; three things do not.
#
# * The recurrence and the chunks are straight lines of slope 1. The quadratic
#   form bends up to slope 2, and beyond where its matrices no longer fit into
#   the cache.
# * Short sequences are best served by the quadratic form. Up to one chunk of
#   64 tokens the chunked form is little else.
# * Chunks beat the recurrence, though they do as many operations or more. On
#   a processor as on a GPU, what a matrix product reads it uses many times,
#   while the recurrence takes up the whole state, $P N = 8192$ numbers, to do
#   a few operations with each, and puts it down again, token after token.

# %%
shapes = lambda T: [(1, T, 1, 64), (1, T, 1), (1,), (1, T, 1, 128), (1, T, 1, 128), (1,)]
arguments = lambda T: [jnp.full(shape, -0.01 if i == 2 else 0.01, "float32") for i, shape in enumerate(shapes(T))]
count = lambda form, T: jax.jit(form).lower(*arguments(T)).compile().cost_analysis()["flops"]
lengths, forms = 2 ** np.arange(5, 12), {name: getattr(mamba2, name) for name in ("quadratic", "chunked", "recurrent")}
flops = {name: np.array([count(forms[name], int(T)) for T in lengths]) for name in ("quadratic", "chunked")}
ms = {name: timed(form, arguments, lengths) for name, form in forms.items()}
axes = dict(xlabel="length $T$", xscale="log", yscale="log")
counted = lines({name: (lengths, each, "o-") for name, each in flops.items()}, title="operations, counted", **axes)
measured = {name: (lengths, each, "o-") for name, each in ms.items()}
show(counted, lines(measured, title="milliseconds, measured", **axes))

print("growth from 256 to 2048 tokens:", {name: f"{each[-1] / each[3]:.0f}-fold" for name, each in ms.items()})
assert 3.5 < flops["quadratic"][-1] / flops["quadratic"][-2] < 4.1
assert 1.9 < flops["chunked"][-1] / flops["chunked"][-2] < 2.1
assert ms["quadratic"][-1] > 20 * ms["quadratic"][3] and ms["chunked"][-1] < ms["recurrent"][-1]

# %% [markdown]
# ## How much fits into a state
#
# The duality holds for linear attention, and it shows what softmax attention
# has that no recurrence has. Use (1) as a dictionary: with $A = 0$ write $m$
# pairs, each a key $B_j$ and a value $x_j$, then ask with a key as the query.
# The answer is
#
# $$y = \sum_{j} x_j\, (B_j^\top C) = x_i + \sum_{j \ne i} x_j\, (B_j^\top B_i)
# \qquad \text{for } C = B_i, \; |B_i| = 1 .$$
#
# If the keys are orthogonal the sum vanishes and the answer is exact. But
# there are only $N$ orthogonal keys in $\mathbb{R}^N$. Beyond that answers
# interfere, whatever the keys are. Random keys of unit length interfere from
# the start: each of the $m - 1$ other pairs adds noise of variance $1/N$, and
# the error is $\sqrt{(m - 1) / N}$.
#
# Attention keeps all pairs, and its softmax can be made as sharp as it needs
# to be: it finds the right one among any number. This is why the state of
# Mamba-2 was made eight times larger than Mamba's, and why models for text
# mix a few layers of attention in. (`configs/recall` trains models on this
# task.)
#
# The code writes the first $m$ of 256 pairs, by giving the others
# $\Delta = 0$: a token without time leaves no trace. The last check stores 64
# pairs under the 64 orthogonal keys of $\mathbb{R}^{64}$ and gets all of them
# back.

# %%
pairs, errors, write = 2 ** np.arange(3, 9), {16: [], 64: []}, jax.jit(mamba2.recurrent)
state = lambda m, K, V: write(V[None, :, None], m[None, :, None], jnp.zeros(1), *2 * [K[None, :, None]], D_h)[1][0, 0]
for N in errors:
    keys, stored = rng.normal(size=(256, N)), jnp.asarray(rng.normal(size=(256, 32)))
    keys = jnp.asarray(keys / np.linalg.norm(keys, axis=1, keepdims=True))
    for m in pairs:
        recalled = keys @ state((jnp.arange(256) < m).astype(float), keys, stored).T
        errors[N].append(jnp.sqrt(jnp.mean((recalled - stored)[:m] ** 2)))
curves = {f"$N = {N}$": (pairs, each, "o-") for N, each in errors.items()}
axes = dict(xlabel="pairs $m$", ylabel="error of what is recalled", xscale="log", yscale="log", ylim=(0.1, 10))
show(lines(curves, **axes), width=7, height=3.6)

assert jnp.allclose(state(jnp.ones(64), jnp.eye(64), stored[:64]).T, stored[:64])  # orthogonal keys
assert all(np.allclose(each[1:], np.sqrt((pairs[1:] - 1) / N), rtol=0.2) for N, each in errors.items())

# %% [markdown]
# ## What to take along
#
# * With one decay a head, a selective state space model is attention without
#   softmax, masked by decays.
# * Its matrix has rank $N$ below the diagonal: that is the state, seen from
#   outside. Chunks use both views, and cost $O(T)$ in matrix products.
# * Masks are exponentials of sums of their own terms, never quotients of
#   products.
# * A state of $N$ columns holds about $N$ facts.
#
# `ssm.mixers.mamba2.Mamba2` wraps this in a layer; `kernels_pallas.ssd` is
# the chunked form for GPUs and TPUs.
