# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Diagonal is enough: DSS, S4D, S5, LRU
#
# S4 keeps HiPPO's matrix as $A = \Lambda - P P^*$, diagonal plus a rank of
# one, and most of its mathematics is there to cope with that rank (notebook
# 3). In 2022 Gupta, Gu and Berant tried what happens if it is just left out:
# DSS, a diagonal state space model, worked as well. Within a year this had
# led to S4D, which explains why and is two lines of code; to S5, which puts
# all channels into one system and runs it by a parallel scan; and to the LRU,
# which drops continuous time as well.
#
# A diagonal system is a set of numbers that do not talk to each other:
#
# $$h_{l} = \bar A\, h_{l-1} + \bar B\, u_l \quad \text{with} \quad \bar A = \mathrm{diag}(\bar a_1, \dots, \bar a_N),
# \qquad y_l = 2\, \mathrm{Re} \sum_n C_n\, h_{l,n} .$$
#
# Each $h_{l,n}$ is a complex number that is turned and shrunk by $\bar a_n$
# and has the new input added. Complex, since a real one can only fade; the
# factor $2\, \mathrm{Re}$ stands for the conjugate partners, which are not
# kept.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from experiments import optimizer
from experiments.figures import knob, lines, plane, show, tree
from ssm import hippo
from ssm.convolution import vandermonde
from ssm.discretize import discretize, discretize_dense
from ssm.mixers import s4d, s5
from ssm.mixers.lru import LRU
from ssm.recurrence import dense_recurrence, linear_recurrence

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)

# %% [markdown]
# ## Leaving out the rank
#
# Recall from notebook 1 that the state's response to a pulse is the basis:
# $e^{tA} B = p_n(t)\, e^{-t}$ for `legs`. And from notebook 3 that
# $A + P P^\top$ is normal, and so diagonal in an orthonormal basis. If we
# keep only that normal part, what becomes of the responses? There is no
# reason for them to stay what they were: the entries of $P P^\top$ are as
# large as those of $A$.
#
# The S4D paper has a surprising theorem: *with $B / 2$ in place of $B$*, the
# responses of the normal part converge to those of `legs` as $N$ grows. For
# finite $N$ there is a ripple on top of them, which gets finer and weaker.
# Below are the first responses for three sizes, to an input that is held for
# one step of $\Delta = 1/16$, as a layer receives it; in black, those of
# `legs`.
#
# What this buys: the diagonal system *begins* as a HiPPO memory, nearly. For
# a model that is trained after its start, nearly is enough. It does not hold
# for just any term of low rank that one might leave out; it is a gift of
# `legs`.

# %%
dt, steps, responses = 1 / 16, jnp.zeros((1, 64, 1)), {}
for N in (16, 64, 256):
    A, P, B = hippo.nplr("legs", N)
    for name, each, b in (("legs", A, B), (f"$N = {N}$", A + P @ P.T, B / 2)):
        decay, _, current = discretize_dense("zoh", jnp.asarray(each), dt)
        responses[name] = dense_recurrence(decay, steps + jnp.zeros(N), (current @ b / dt)[None])[0][0, :, :3]
exact, ages = responses.pop("legs"), np.arange(1, 65) * dt
black = {f"_{n}": (ages, exact[:, n], {"color": "black", "lw": 1}) for n in range(3)}
curves = lambda x: {f"$n = {n}$": (ages, x[:, n]) for n in range(3)} | black
panel = lambda name: lines(curves(responses[name]), title=name, xlabel="time since the pulse", ylim=(-1.1, 1.9))
show(*map(panel, responses), width=13, height=3.4)

off = lambda x: jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)
error = [*map(off, responses.values())]
assert error[2] < error[1] / 2 < error[0] / 4 and error[2] < 0.1 < 0.9 < off(2 * responses["$N = 256$"])

# %% [markdown]
# ## The kernel is a Vandermonde product
#
# With $\bar A$ diagonal, the kernel needs no generating function. Its powers
# are powers of numbers:
#
# $$K_l = 2\, \mathrm{Re} \sum_n C_n \bar B_n\, \bar a_n^{\,l} . \tag{1}$$
#
# The matrix of all $\bar a_n^l$ is called a *Vandermonde matrix*, and $K$ is
# a row times it. It costs $O(N L)$ like S4's Cauchy products, but it is one
# line in any language, and it lets one take any rule of notebook 2; S4's
# derivation needed the bilinear one or another rational one.
# `ssm.convolution.vandermonde` computes only about $2\sqrt L$ powers and
# makes the others as products of two.
#
# So here is all of S4D: discretise, then (1), then an FFT; or the loop; or,
# in chunks of the sequence, matrix products within a chunk and the state
# between chunks. They are the same function, tested here with four channels
# of different steps, and with the state handed from one form to another.

# %%
H, N, L = 4, 16, 1000
A = jnp.tile(jnp.asarray(hippo.diagonal("lin", N)), (H, 1))
C, D = jnp.asarray(rng.normal(size=(H, N // 2)) + 1j * rng.normal(size=(H, N // 2))), jnp.ones(H)
dt_d, x = jnp.geomspace(0.001, 0.1, H), jnp.asarray(rng.normal(size=(2, L, H)))
system = s4d.discrete(A, jnp.ones_like(A), C, D, dt_d, rule="zoh")
y, last = jax.jit(s4d.recurrent)(x, system)

by_hand = np.real(np.einsum("dn,dnl->dl", system.c_dn * system.b_dn, system.a_dn[..., None] ** np.arange(L)))
assert np.allclose(vandermonde(system.a_dn, system.c_dn * system.b_dn, L), by_hand)
for form in map(jax.jit, (s4d.parallel, s4d.chunked)):
    assert np.allclose(form(x, system)[0], y) and np.allclose(form(x, system)[1].h_bdn, last.h_bdn)
first, state = jax.jit(s4d.chunked)(x[:, :300], system)
assert np.allclose(jax.jit(s4d.parallel)(x[:, 300:], system, state)[0], y[:, 300:])

# %% [markdown]
# ## Where the eigenvalues start
#
# If $A$ is just $N/2$ complex numbers, one may choose them freely. The real
# part sets how fast a state fades, $e^{t \mathrm{Re}\, a}$; the imaginary
# part how fast it turns, its frequency. S4D offers, with $n = 0, 1, \dots$:
#
# | name | eigenvalues | what the states see |
# |---|---|---|
# | `legs` | those of the normal part of `legs` | HiPPO's memory, nearly |
# | `inv` | $-\frac12 + i\, \frac{N}{\pi} \left( \frac{N}{2n+1} - 1 \right)$ | the same, as a formula |
# | `lin` | $-\frac12 + i \pi n$ | a Fourier series of the fading past |
# | `real` | $-(n+1)$ | fading averages; what Mamba uses |
#
# The frequencies of `legs` are far from evenly spaced: many slow ones and a
# few very fast ones, the fastest growing as $N^2 / \pi$, which is checked
# below. `inv` was guessed from a plot of them. `lin` spreads its effort
# evenly over all frequencies up to $\pi N / 2$. In the experiments of the
# paper all three complex ones are good, `legs` and `inv` on the longest
# sequences, and `real` falls behind: without turning there is no way to
# single out one moment of the past.
#
# A state of eigenvalue $a$ answers a pulse by $e^{ta}$, whose real part is a
# fading wave. The kernel (1) is any combination of such waves; with `lin`,
# whose waves all have period 2, it is a Fourier series, seen through a fading
# window and repeated ever more weakly. Turn the knob to see what a channel
# can say with more and more of them: the least-squares fit to "what happened
# between 0.5 and 0.8 units of time ago?", a box, by $n$ waves with complex
# coefficients.
#
# Real states manage a similar curve, on paper. But fading averages are so
# much alike that only differences of huge multiples of them tell two moments
# apart: the coefficients are millions of times larger than the result, and
# nothing that is trained in float32 will find or keep them. Waves are nearly
# orthogonal and need coefficients of the result's own size.

# %%
t = np.arange(1, 513) / 256
box = np.where((t > 0.5) & (t < 0.8), 1.0, 0.0)
waves = lambda name, n: np.exp(np.outer(t, hippo.diagonal(name, 128)[:n]))
columns = lambda name, n: np.concatenate([waves(name, n).real, waves(name, n).imag], 1)
weights = lambda name, n: np.linalg.lstsq(columns(name, n), box, rcond=1e-12)[0]
curve = lambda name, n: (t, columns(name, n) @ weights(name, n))
curves = lambda n: {"box": (t, box), f"{n} waves": curve("lin", n), f"{n} real states": curve("real", n)}
axes = dict(xlabel="age", ylim=(-0.3, 1.6), legend="upper right")
knob(lambda n: show(lines(curves(n), **axes), width=8, height=3.4), n=[2, 4, 8, 12, 16, 24, 32, 48, 64])

size = {name: np.abs(weights(name, 16)).max() for name in ("lin", "real")}
assert size["lin"] < 2 and size["real"] > 1e6
assert all(abs(hippo.diagonal("legs", n).imag.max() / (n**2 / np.pi) - 1) < 0.01 for n in (16, 64, 256))
assert np.linalg.norm(curve("lin", 64)[1] - box) < 0.2 * np.linalg.norm(box) < np.linalg.norm(curve("lin", 4)[1] - box)

# %% [markdown]
# DSS, which came before S4D, had no such start and no such theorem; it took
# the frequencies of `legs` and learned the product of $B$ and $C$ as one row
# of numbers, as there is nothing that could tell the two apart in (1). Its
# first version divided every wave by its sum over the $L$ tokens of the
# training sequences, a softmax, so that no state could grow however
# $\mathrm{Re}\, a$ was trained. S4D keeps $\mathrm{Re}\, a$ negative instead,
# as $-e^{(\cdot)}$, and needs no length.
#
# What else is chosen at the start? $B = 1$, as only the product $C \bar B$
# counts; $C$ random, of variance 1; and $\Delta$ log-uniform between $0.001$
# and $0.1$, one for each channel, as in S4. The real part is $-1/2$ for all,
# because it is for `legs`. So all states of a channel fade alike, within
# $2 / \Delta$ tokens, and differ in their frequencies alone: a channel is a
# memory of one length, and the layer has channels of many. Mamba, with its
# real eigenvalues, will do the opposite.
#
# ## S5: one system for all channels
#
# S4 and S4D give every channel its own $N$ states and mix channels
# afterwards. S5 (Smith, Warrington and Linderman 2022) turns this around: one
# state $h \in \mathbb{C}^P$ for the whole layer, with all $H$ channels going
# in through a matrix $B \in \mathbb{C}^{P \times H}$, and coming out through
# $C \in \mathbb{C}^{H \times P}$,
#
# $$h_l = \bar A\, h_{l-1} + \bar B\, u_l, \qquad y_l = 2\, \mathrm{Re}\, C h_l + D \circ u_l, \qquad u_l, y_l \in
# \mathbb{R}^H .$$
#
# Is that less than S4D, or more? It is both. A bank of $H$ systems of S4D
# *is* an S5 with $P = HN$ states whose $B$ and $C$ are block-diagonal; that
# is checked below, number by number. In practice S5 uses far fewer states,
# $P \approx H$, and lets the full $B$ and $C$ do the mixing.

# %%
n = A.shape[1]
blocks = jnp.repeat(jnp.eye(H), n, axis=0)
B_nd, C_dn = blocks.astype(complex), (blocks * C.reshape(-1, 1)).T
wide = s5.discrete(A.reshape(-1), B_nd, C_dn, D, jnp.repeat(dt_d, n), rule="zoh")
parallel = jax.jit(s5.parallel)
y_s5, last_s5 = parallel(x, wide)

assert np.allclose(y_s5, y) and np.allclose(last_s5.h_bn, last.h_bdn.reshape(2, -1))
mixed = s5.discrete(A.reshape(-1), jnp.ones_like(B_nd), C_dn, D, jnp.repeat(dt_d, n), rule="zoh")
assert not np.allclose(parallel(x, mixed)[0], y, rtol=0.1)

# %% [markdown]
# ## The scan
#
# Both can begin as HiPPO memories: S5's $A$ is made of the same eigenvalues
# as S4D's `legs`, or of several smaller sets of them side by side, which are
# called blocks.
#
# The kernel of an S5 would be a matrix of $H \times H$ kernels: a convolution
# is out of the question. S5 runs the recurrence itself, in parallel. Each
# token does to the state the map $h \mapsto a h + b$, with $a = \bar a$ and
# $b = (\bar B u_l)$. One token after another is a map of the same kind:
#
# $$a' (a h + b) + b' = (a' a)\, h + (a' b + b'), \qquad\text{so}\qquad (a, b) \circ (a', b') = (a a',\; a' b + b') .
# \tag{2}$$
#
# And to compose maps is *associative*:
# $(f \circ g) \circ h = f \circ (g \circ h)$. Brackets may be set as we like,
# for example in pairs, then pairs of pairs. Eight tokens take three rounds
# and not eight steps; a million take twenty. That needs nothing of $\bar A$
# but that products are cheap, which for a diagonal they are. It does not even
# need $\bar A$ to be the same at every token: what looks like a detail here
# is what makes Mamba possible (notebook 5).
#
# (The library's scan on a GPU sets its brackets in another way: one by one
# within a block of tokens, since work is what costs there, and in pairs
# across blocks.)
#
# The code composes 1024 random maps by ten rounds of pairs, with decays that
# differ from token to token, and compares with the loop.

# %%
a, b = jnp.exp(-rng.exponential(size=(1024, 3))), jnp.asarray(rng.normal(size=(1024, 3)))
composed, rounds = (a, b), 0
while len(composed[0]) > 1:
    (a1, b1), (a2, b2) = ([part[i::2] for part in composed] for i in (0, 1))
    composed, rounds = (a1 * a2, a2 * b1 + b2), rounds + 1

run = jax.jit(linear_recurrence, static_argnames="implementation")
loop, last = run(a[None], b[None], implementation="reference")
assert rounds == 10 and jnp.allclose(composed[1], last)
assert jnp.allclose(run(a[None], b[None], implementation="xla")[0], loop)

# %% [markdown]
# That gave the last state alone, and a layer needs all of them. They cost as
# many rounds again, less one. Below are eight tokens, at the bottom, and each
# node is a composed map, with the tokens that it covers; two lines come up to
# it from the two maps of which it is made. Upwards, pairs of
# neighbours become pairs of pairs, until 1-8 stands at the top of the last
# column. On the way some *prefixes* have come out, the dark nodes, which
# begin at token 1 and so hold a state: those of tokens 2, 4 and 8. The others
# are a prefix and a piece that is there already: 1-6 is 1-4 and 5-6, and then
# 1-3, 1-5 and 1-7 need one more token each. Five rounds, eleven compositions:
# for $L$ tokens $2 \log_2 L - 1$ and fewer than $2 L$.
#
# There is a quicker way, in which every token is composed with the one
# before it, then with the result two before, then four before: three rounds
# for eight tokens. But it takes $L \log_2 L$ compositions, 17 for eight
# tokens and ten times as many as the tree for a million. A processor with
# thousands of lanes and millions of maps to compose is short of lanes, not of
# rounds, and so the tree is what `jax.lax.associative_scan` does.
#
# The code does just this with the first eight of the maps above. The numbers
# of the tokens are carried along and composed like the rest, so that the
# labels are results too, and each state is checked against the loop's.

# %%
at, place = [(a[l], b[l], l + 1, l + 1) for l in range(8)], [(l + 1, 0) for l in range(8)]
nodes, edges = {spot: f"{spot[0]}" for spot in place}, []
for height, (stride, start) in enumerate([(1, 1), (2, 3), (4, 7), (2, 5), (1, 2)], 1):
    for i in range(start, 8, 2 * stride):
        (a1, b1, first, _), (a2, b2, _, end) = at[i - stride], at[i]
        at[i], spot = (a1 * a2, a2 * b1 + b2, first, end), (i + 1, height)
        edges += [(place[i - stride], spot), (place[i], spot)]
        place[i], nodes[spot] = spot, f"{first}-{end}"
prefixes = [spot for spot, name in nodes.items() if name.split("-")[0] == "1"]
show(tree(nodes, edges, dark=prefixes, xlabel="token", ylabel="round"), width=8, height=4.4)

assert [each[2:] for each in at] == [(1, l + 1) for l in range(8)] and len(edges) == 2 * 11
assert np.allclose([each[1] for each in at], loop[0, :8])

# %% [markdown]
# ## LRU: no continuous time at all
#
# Orvieto et al. (2023) asked which parts of this are needed. Not HiPPO, and
# not $\Delta$: learn the eigenvalue of the recurrence itself,
# $\lambda = \bar a$, and start it at random on a ring in the unit disc. What
# is needed is
#
# * that $|\lambda| < 1$ at all times of training: hence
#   $\lambda = \exp(-e^{\nu} + i e^{\theta})$, whose modulus $\exp(-e^\nu)$
#   cannot reach 1, whatever $\nu$ becomes;
# * eigenvalues near the circle if memory is to be long: a ring from
#   $r_{\min}$ to $r_{\max}$, uniform in area;
# * and a normalisation. Feed noise of variance 1 into
#   $h_l = \lambda h_{l-1} + u_l$ and the variance of $h$ grows to
#   $1 + |\lambda|^2 + |\lambda|^4 + \dots = 1 / (1 - |\lambda|^2)$: a
#   thousand for $|\lambda| = 0.9995$. Multiplying the input by
#   $\gamma = \sqrt{1 - |\lambda|^2}$ brings every state to variance 1. In S4
#   and S4D the small factor $\Delta$ in $\bar B$ did that, unnoticed.
#
# For a ring that is uniform in area the mean of $1/(1 - |\lambda|^2)$ is
# $\ln \frac{1 - r_{\min}^2}{1 - r_{\max}^2} / (r_{\max}^2 - r_{\min}^2)$, the
# dashed line below. On very long sequences it also helps to begin with small
# angles: a state that turns by $\theta$ a token cannot tell apart what is
# $2\pi/\theta$ tokens away.

# %%
r_min, r_max, tokens = 0.9, 0.995, 2000
nu_log, theta_log = hippo.ring(jax.random.key(0), 400, r_min, r_max)
A = (-jnp.exp(nu_log) + 1j * jnp.exp(theta_log)).astype(complex)
decay = discretize("dirac", A, jnp.ones_like(A.real)).decay
gamma = jnp.sqrt(1 - jnp.abs(decay) ** 2)
u = jnp.asarray(rng.normal(size=(1, tokens, 400))) + 0j
variance = lambda gain: jnp.mean(jnp.abs(linear_recurrence(decay, gain * u)[0][0]) ** 2, 1)
plain, normalised = variance(1.0), variance(gamma)
expected = np.log((1 - r_min**2) / (1 - r_max**2)) / (r_max**2 - r_min**2)
curves = {"plain": (np.arange(tokens), plain), r"with $\gamma$": (np.arange(tokens), normalised)}
curves |= {"_": ([0, tokens], [expected, expected], "--", {"color": "black", "lw": 1})}
axes = dict(xlabel="tokens", ylabel="variance of a state", yscale="log", ylim=(0.05, 100), legend="upper right")
show(plane({"eigenvalues": decay}, ".", legend=None, title=r"$\lambda$ at the start"), lines(curves, **axes))

assert jnp.all((jnp.abs(decay) > r_min) & (jnp.abs(decay) < r_max))
assert abs(jnp.mean(plain[-1000:]) / expected - 1) < 0.1 and abs(jnp.mean(normalised[-1000:]) - 1) < 0.05

# %% [markdown]
# ## Where the eigenvalues go
#
# Training moves eigenvalues. To see it one needs a task in which it is known
# where they ought to go. Take a plate with three resonances, three poles
# $\lambda$ close to the circle; noise goes in, its ring comes out. An LRU of
# six states is given the noise and learns to give the answer, by the squared
# error alone; nobody tells it how many poles there are. A pole $re^{i\theta}$
# rings, once struck, at $\theta$ radians a token, and fades to a third within
# $1/(1-r)$ tokens: 20, 10 and 25 for these.
#
# The noise is new at every step, so that nothing can be learned by heart. And
# as every step is done to what the last one left, parameters and Adam's
# averages, training is a recurrence like any other here, if not a linear one:
# the code writes it as a scan.
#
# It begins with random eigenvalues well inside the circle, of short memory.
# In the left figure the thin lines are their ways, over a thousand steps of
# Adam. Three go out to the poles and stop there. The other three are not
# needed, and end well inside, where a state fades within a few tokens and has
# hardly a say. On the right is the same in frequencies, the Fourier transform
# of the kernel: a pole near the circle at the angle $\theta$ is a peak at
# $\theta$, the sharper the nearer.
#
# It does not always end so well. An eigenvalue feels a resonance only from
# nearby, and in places where it helps a little with two it may stay for good.
# Of five random starts with six states one missed a pole; with three states,
# as many as there are poles, both of two starts did. Hence more states than
# the task seems to need, and a start that covers the disc.
#
# There is another reason why eigenvalues are delicate. A tap of the kernel is
# $\lambda^j$, and its derivative $j \lambda^{j-1}$. Near the circle, where
# the powers fade slowly, it grows up to a tap of about
# $1 / (1 - |\lambda|)$ before it falls: the longer the memory, the further a
# small step of $\lambda$ throws the output. LRU's parameters are logarithms, so that a step
# of a given size moves $1 - |\lambda|$ by a share of itself, and becomes
# smaller where it must. And the published models train eigenvalues and
# $\Delta$ at a smaller rate than all else, without weight decay; the groups
# of `config.optimizer` are there for that.

# %%
poles = jnp.array([0.95, 0.9, 0.96]) * jnp.exp(1j * jnp.array([0.35, 1.1, 2.0]))
gain, C_dn = jnp.sqrt(1 - jnp.abs(poles) ** 2) + 0j, jnp.array([[1, -1j, 1]])
plate = s5.System(poles, gain, None, jnp.ones((3, 1)) + 0j, C_dn, jnp.zeros(1))
layer, steps = LRU(width=1, state_size=6, r_min=0.5, r_max=0.8, max_phase=np.pi, form="parallel"), 1000
before = jax.tree.map(jnp.float64, layer.init(jax.random.key(4), jnp.zeros((1, 1, 1)))["params"])
options = optimizer.options({"learning_rate": 0.02, "schedule": "cosine"})
adam = optimizer.build(options, optimizer.table(options, before), optimizer.schedule(options, steps, steps))
ring = lambda p, u: layer.apply({"params": p}, u)[0]
loss = lambda p, u: jnp.mean((ring(p, u) - s5.parallel(u, plate)[0]) ** 2)
eigenvalues = lambda p: jnp.exp(-jnp.exp(p["nu_log"]) + 1j * jnp.exp(p["theta_log"]))
noise = lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (8, 128, 1))
moved = lambda p, update, state: ((jax.tree.map(jnp.add, p, update), state), eigenvalues(p))
step = lambda now, i: moved(now[0], *adam.update(jax.grad(loss)(now[0], noise(i)), now[1], now[0]))
(after, _), ways = jax.jit(lambda now: jax.lax.scan(step, now, jnp.arange(steps)))((before, adam.init(before)))
spot, circle = lambda z, *looks: (z.real, np.abs(z.imag), *looks), np.exp(1j * np.linspace(0, np.pi, 100))
curves = {f"_{n}": spot(z, {"color": "grey", "lw": 0.9}) for n, z in enumerate([circle, *ways.T])}
curves |= {"before": spot(eigenvalues(before), "o", {"mfc": "white"}), "after": spot(eigenvalues(after), "o")}
curves |= {"poles": spot(poles, "k+", {"ms": 14, "mew": 1.5})}
axes = dict(xlabel="real part", ylabel="imaginary part", aspect="equal", ylim=(-0.4, 1.05), columns=3)
pulse, angles = jnp.zeros((1, 512, 1)).at[0, 0].set(1), np.linspace(0, np.pi, 257)
answers = {"before": ring(before, pulse), "after": ring(after, pulse), "plate": s5.parallel(pulse, plate)[0]}
gain = lambda name: (angles, np.abs(np.fft.rfft(answers[name][0, :, 0])), "k:" if name == "plate" else "-")
right = lines({name: gain(name) for name in answers}, xlabel=r"$\theta$", ylabel="gain", yscale="log")
show(lines(curves, legend="lower center", **axes), right, width=12, height=4.2)

nearest = lambda p: np.abs(eigenvalues(p)[:, None] - poles).min(0)
assert np.all(nearest(before) > 0.2) and np.all(nearest(after) < 0.02)
assert np.all(np.sort(np.abs(eigenvalues(after)))[:3] < 0.75)

# %% [markdown]
# ## Side by side
#
# For $L$ tokens and $H$ channels, with $N$ states a channel or $P$ in all:
#
# | | states | training | one more token |
# |---|---|---|---|
# | S4 | $H N$, normal plus low rank | $O(H(N L + L \log L))$: kernel, FFT | $O(HN)$ |
# | S4D, DSS | $H N$, diagonal | the same, with a simpler kernel | $O(HN)$ |
# | S5, LRU | $P$, diagonal | $O(PL + PHL)$: scan, and products with $B$, $C$ | $O(PH)$ |
#
# The product with $P \approx H$ makes S5 and LRU look dearer, but S4 and S4D
# mix their channels too, by a matrix of $H \times H$ after each layer, and
# the matrix product is what hardware does best. What differs in practice is
# memory: the scan writes down all $P$ states of all tokens, the convolution
# never makes a state at all.
#
# None of the four looks at the content of a token before it decides what to
# keep. That is the subject of the next notebook.
#
# ## What to take along
#
# * The low rank of HiPPO may be left out: with $B/2$, the diagonal part alone
#   is nearly the same memory.
# * A diagonal system has a one-line kernel, any rule, and a scan; the scan
#   does not care whether decays change with time.
# * What counts at the start is where the eigenvalues lie and that states have
#   a sensible size. HiPPO, a Fourier series, and a random ring are three ways
#   to get there.
# * Training moves eigenvalues to the resonances of what is to be learned, if
#   one starts within reach. More states than needed, and small steps, are how
#   that is made likely.
#
# All four are mixers of this library and learn the same task by changing a
# word: `python -m experiments.train --config=configs/smnist.py:lru,demo
# --workdir=runs/lru`.
