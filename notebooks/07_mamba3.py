# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Mamba-3: two inputs a step, states that turn, several lanes
#
# Mamba-2 made states large by letting a whole head share one decay (notebook
# 6). In doing so it gave up things that its ancestors had. Mamba-3 (2026,
# arXiv:2603.15569) brings three of them back, without giving up the matrix
# products:
#
# * a rule of order 2 (notebook 2), which reads the previous input as well as
#   the current one;
# * complex eigenvalues (notebook 4), states that turn and not only fade: with
#   them a layer can *count*;
# * several inputs and outputs for one state, as S5 had (notebook 4), which
#   cost almost no time when text is written.
#
# The symbols are those of notebook 6. For one head, at token $t$: an input
# $x_t \in \mathbb{R}^P$, rows $B_t, C_t \in \mathbb{R}^N$, a step
# $\Delta_t > 0$, all of them computed from the token, and now also
# $A_t \le 0$ is. The state $h_t$ is a table of $P \times N$ numbers, the
# output $y_t = h_t C_t$, and $\alpha_t = e^{\Delta_t A_t}$ the decay.
#
# `ssm.mixers.mamba3` has `recurrent`, the definition, and `chunked`, by
# matrix products.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from experiments import plots, report, trained
from experiments.figures import knob, lines, matrix, plane, show
from experiments.workdir import Workdir
from ssm.mixers import mamba2, mamba3
from ssm.norms import rms_norm
from ssm.recurrence import linear_recurrence

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
T, P, N = 48, 4, 8
recurrent, chunked, recurrent2 = map(jax.jit, (mamba3.recurrent, mamba3.chunked, mamba2.recurrent))
draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
x, B, C = draw(1, T, 1, P), draw(1, T, 1, N), draw(1, T, 1, N)
dt, A = jnp.asarray(rng.uniform(0.02, 0.2, (1, T, 1))), -jnp.ones((1, T, 1))

# %% [markdown]
# ## Both ends of the step
#
# Between two tokens the input goes from $B_{t-1} x_{t-1}$ to $B_t x_t$.
# Mamba's rule takes the second of them for the whole step. Mamba-3 takes a
# weighted mean, with a weight $\lambda_t \in (0, 1)$ that is read from the
# token too, and lets the older one decay for the time it has been there:
#
# $$h_t = \alpha_t\, h_{t-1} + \underbrace{(1 - \lambda_t)\, \Delta_t\, \alpha_t}_{\beta_t}\, x_{t-1} B_{t-1}^\top +
# \underbrace{\lambda_t\, \Delta_t}_{\gamma_t}\, x_t B_t^\top . \tag{1}$$
#
# With $\lambda = 1/2$ this is the trapezoidal rule, of order 2 (notebook 2);
# with $\lambda = 1$ it is Mamba-2. As a matrix (notebook 6), it is the mask
# $L$ of decays times a matrix with two bands: $\gamma_t$ on the diagonal and
# $\beta_t$ beside it. In other words: the inputs $x_t B_t^\top$ first pass a
# convolution of two taps, whose taps are read from the tokens. Mamba and
# Mamba-2 needed a convolution of four fixed taps in front of the recurrence
# to work well; with (1), and with a bias added to $B$ and $C$, Mamba-3 does
# without.
#
# The two bands fold into one pass: what token $t$ adds in the next step,
# $\beta_{t+1} x_t B_t^\top$, equals $\alpha_{t+1}$ times
# $(1 - \lambda_{t+1}) \Delta_{t+1}\, x_t B_t^\top$, as if that had been added
# *just before* the next decay. So all but the newest token are read with the
# weight $\gamma_t + (1 - \lambda_{t+1}) \Delta_{t+1}$, and the chunks of
# notebook 6 are used as they are.

# %%
weight = jnp.asarray(rng.uniform(0, 1, (1, T, 1)))
identity, log_decay = jnp.eye(T)[None, :, None], (dt * A)[0, :, 0]
M = recurrent(identity, B, C, dt, A, weight)[0][0, :, 0]
gamma, later = (weight * dt)[0, :, 0], jnp.append(((1 - weight) * dt)[0, 1:, 0], 0)
bands = jnp.diag(gamma) + jnp.diag((later[:-1] * jnp.exp(log_decay[1:])), -1)
decays = jnp.exp(mamba2.segsum(log_decay))
titles = {"decays": decays, r"two bands, $\gamma$ and $\beta$": bands, "their product": decays @ bands}
show(*[matrix(each, title=title) for title, each in titles.items()], height=3.8)

scores = C[0, :, 0] @ B[0, :, 0].T
assert jnp.allclose(M, (decays @ bands) * scores)
one_pass = decays * scores * (gamma + later) - jnp.diag(jnp.diag(scores) * later)
assert jnp.allclose(M, one_pass)
mamba2_again = recurrent2(x, dt, A[0, 0], B, C, jnp.zeros(1))[0]
assert jnp.allclose(recurrent(x, B, C, dt, A, jnp.ones_like(dt))[0], mamba2_again)

# %% [markdown]
# ## States that turn
#
# A complex eigenvalue $A_t + i \theta_t$ makes a state fade at the rate of
# its real part and turn at the rate of its imaginary part, by the angle
# $\Delta_t \theta_t$ in a step. Written in real numbers, a complex state is a
# pair, a plane, and turning it is a product with a $2 \times 2$ rotation
# $\mathcal{R}_t$. So cut the $N$ states into $N/2$ planes; each has its own
# $\theta_t$, read from the token; all share the decay:
#
# $$h_t = \alpha_t\, h_{t-1} \mathcal{R}_t^\top + \Delta_t\, x_t B_t^\top . \tag{2}$$
#
# In the mask of notebook 6 there would now stand products of rotations and
# not numbers, and the matrix form would be lost. But rotations of one plane
# commute. What came in at token $s$ has, at token $t$, been turned by the sum
# of the angles between them, $\phi_t - \phi_s$ with
# $\phi_t = \sum_{k \le t} \Delta_k \theta_k$. It makes no difference whether
# one turns the state, or turns each $B_s$ by $\phi_s$ when it is written and
# each $C_t$ by $\phi_t$ when it is read: only the difference shows. Then (2)
# is Mamba-2 once more, with turned rows.
#
# Readers of Transformers know this trick. It is the rotary embedding of
# positions, RoPE, in which queries and keys are turned by an angle that is
# proportional to their position. There the angles are fixed numbers; here
# they are summed up from what the tokens say. A position is a count of
# tokens; $\phi_t$ can count *what matters*.
#
# The code runs the complex recurrence as it stands, by the scan of notebook
# 4, and compares with Mamba-3's form. (The library turns $B$ and $C$ by
# $+\phi$, as the published code does, so that its states turn by $-\phi$.)

# %%
angle = draw(1, T, 1, N // 2)  # of each plane at each token, in radians
y = recurrent(x, B, C, dt, A, None, angle)[0][0, :, 0]

pairs = lambda rows: rows[0, :, 0, 0::2] + 1j * rows[0, :, 0, 1::2]
decay = jnp.exp((dt * A)[0] - 1j * angle[0, :, 0])[:, None]
added = (dt[0] * x[0, :, 0])[:, :, None] * pairs(B)[:, None]
h = linear_recurrence(jnp.broadcast_to(decay, added.shape)[None], added[None])[0][0]
assert jnp.allclose(jnp.einsum("tpn,tn->tp", h, pairs(C).conj()).real, y)
assert jnp.allclose(chunked(x, B, C, dt, A, None, angle)[0][0, :, 0], y)
assert not jnp.allclose(recurrent(x, B, C, dt, A)[0][0, :, 0], y, rtol=0.1)

# %% [markdown]
# The last line is the control: without angles the same rows give another
# output. Note what has *not* changed from Mamba-2. The mask still holds
# numbers, the chunks still are matrix products, and the state still is a
# table of $P \times N$; turning $B$ and $C$ costs $N$ operations a token,
# which is nothing beside $P N$.
#
# ## Parity
#
# Bits go by; after each, say whether the number of ones so far is odd. A
# child can do it with one finger. Mamba and Mamba-2 cannot, with any weights,
# and the reason takes three lines. Give a layer the same token 1 again and
# again: its $\Delta$, $B$, $C$ and $x$ are then always the same, and each
# state follows $h \mapsto a h + b$ with $0 < a < 1$. Such a map moves
# steadily towards its fixed point, from one side. What is read from it
# becomes constant, while the parity goes on alternating. Stacking layers does
# not help: what the next one is given settles, and so does what it makes of
# it.
#
# A state that turns by half a circle at each 1, and not at all at each 0,
# does it: let the first token write a 1 into a plane, let nothing fade
# ($A = 0$), and read along the direction in which it was written. The answer
# is $+1$ for even and $-1$ for odd. In (2) that takes one plane and
# $\Delta_t \theta_t = \pi\, \text{bit}_t$.

# %%
length, bits = 5000, rng.integers(0, 2, 5000)
bits[0] = 0  # the token that writes
start, ones = jnp.zeros((1, length, 1, 1)).at[0, 0].set(1), jnp.ones((1, length, 1))
along = jnp.tile(jnp.array([1.0, 0.0]), (1, length, 1, 1))
given = start, along, ones, 0 * ones
count = lambda angles, C=along: recurrent(*given[:2], C, *given[2:], None, angles[None, :, None, None])[0][0, :, 0, 0]
counter, odd = count(jnp.pi * bits), np.cumsum(bits) % 2
only_ones = [jnp.repeat(each[:, :1], 40, 1) for each in (x, dt, B, C)]
steady = recurrent2(*only_ones[:2], -jnp.ones(1), *only_ones[2:], jnp.zeros(1))[0][0, :, 0]
curves = {"turning state": (np.arange(40), counter[:40], "o-"), "parity": (np.arange(40), 1 - 2 * odd[:40], ".")}
show(
    lines(curves, title="random bits", xlabel="token", ylim=(-1.2, 1.8), columns=2),
    lines({"_": (np.arange(40), steady, "o-")}, title="Mamba-2, only ones", xlabel="token", legend=None),
)
assert np.allclose(counter, 1 - 2 * odd, atol=1e-9)
assert jnp.all(jnp.abs(jnp.sum(jnp.sign(jnp.diff(steady, axis=0)), 0)) == 39)  # always up, or always down

# %% [markdown]
# ## Counting, and what cannot be counted
#
# Half a circle is not special. A state that turns by $2\pi d_t / m$ for a
# digit $d_t$ holds the sum of all digits modulo $m$, and is on one of $m$
# places of the circle: read it along $m$ directions and take the largest. The
# knob is $m$. In exact arithmetic any $m$ would do; the library sums angles
# as integers, of which a full turn is the overflow, so that no digits are
# lost however long the sequence is. What limits $m$ in a trained model is how
# precisely it learns the angle. An error of $\varepsilon$ a token adds up,
# and after $\pi / (m \varepsilon)$ tokens the count is wrong.
#
# And there is a limit of principle. Rotations of a plane commute: it does not
# matter in which order the digits came. So a layer can hold sums, but not the
# result of shuffling three cups, where the order matters: swap left and
# middle, then middle and right, and the pea is elsewhere than the other way
# round. Of such things, the permutation groups, a layer of DeltaNet can do
# the smallest, $S_3$, by reflections (`ssm.mixers.gated_deltanet`), while a
# layer whose states turn is limited to those that commute;
# `configs/state_tracking` has both kinds as tasks. The last check below makes
# the point: with its digits shuffled, the sequence ends in the same state.

# %%
digits = rng.integers(0, 60, length)
digits[0] = 0
across = jnp.tile(jnp.array([0.0, -1.0]), (1, length, 1, 1))
turned = lambda m, d: count(2 * jnp.pi * (d % m) / m) + 1j * count(2 * jnp.pi * (d % m) / m, across)
points = lambda m: plane(
    {f"{m} places": turned(m, digits)}, legend="center", xlabel="$C = (1, 0)$", ylabel="$C = (0, -1)$"
)
knob(lambda m: show(points(m), width=4.6, height=4.6), m=[2, 3, 4, 5, 7, 12, 24, 60])

shuffled = np.append(0, rng.permutation(digits[1:]))
for m in (5, 60):
    assert np.allclose(turned(m, digits), np.exp(2j * np.pi * np.cumsum(digits) / m), atol=1e-9)
    assert np.isclose(turned(m, shuffled)[-1], turned(m, digits)[-1], atol=1e-9)
    assert not np.allclose(turned(m, shuffled), turned(m, digits), atol=0.1)

# %% [markdown]
# ## What training finds
#
# That a solution exists does not mean that gradients find it. To turn by
# $\pi$, a layer of which $\Delta$ starts below $0.1$ and whose $\theta$ is
# bounded by $\pi$ (the published code has $\theta = \pi \tanh(\cdot)$) must
# raise $\Delta$ above 1, tenfold; and so that nothing fades meanwhile, $A$
# must shrink towards 0 as it does. Long strings give no gradient at all until
# the short ones are right. The papers train with lengths that grow, and so
# does `configs/state_tracking`.
#
# The record in `experiments/results` is the demo of the README: a single
# layer of each model, trained for a minute and a half on two CPU cores with
# strings of up to 8, then 16, then 32 bits, and tested on 64. Scaled accuracy
# is 0 for guessing and 100 for no mistake.
#
# Both curves drop at steps 300 and 600, when the strings get longer. Mamba-3
# is back at once, as its angle only needs to be a little more exact. Mamba-2
# has no rule to carry over. It seems to have learned the first few positions
# by heart, as a fading state can, and they are a smaller share of a longer
# string; on strings of a length that it never saw it guesses. A curve that
# rises in training can mean either, and only the test at another length tells
# them apart.
#
# Mamba-3's own limit shows there too. Its record has tests at 128 and 256
# bits, and the same weights that are right at 64 are mostly wrong at 128 and
# guess at 256: what was learned is nearly right, and notebook 8 shows how
# little is missing. The paper's models train with longer strings and come
# further.

# %%
runs = {name: Workdir.opened(report.RESULTS / "parity" / f"{name}-demo").lines() for name in ("mamba3", "mamba2")}
points = {
    name: [(line["step"], line["scaled_accuracy"]) for line in run if "loss" in line] for name, run in runs.items()
}
curves = {name: (*np.transpose(each), {"color": plots.colour(name), "lw": 1.2}) for name, each in points.items()}
show(lines(curves, xlabel="step", ylabel="scaled accuracy (%)", legend="center right"), width=8, height=3.6)

tested = {name: run[-1]["test/scaled_accuracy"] for name, run in runs.items()}
print("on strings of 64 bits:", {name: f"{value:.1f} %" for name, value in tested.items()})
assert tested["mamba3"] > 99 and abs(tested["mamba2"]) < 5

# %% [markdown]
# ## The finger of the trained model
#
# The record keeps its weights. Has training found the construction from
# above, half a circle at each 1, or something else that happens to work? The
# layer has four heads, whose planes share four $\theta$; with the heads' own
# $\Delta$ these are sixteen angles $\Delta_t \theta_t$ for a 0 and sixteen
# for a 1. They can be read off without running anything: there are only two
# letters, and all that the layer knows of a letter is its row of the
# embedding, normed, times the columns of `in_proj` for $\Delta$ and $\theta$.
#
# (This is easy because there is one layer. In the second layer of a deeper
# model a letter's row would have been mixed with those before it, and of each
# angle there would be as many values as there are contexts.)
#
# On the left are all of them. At a 0 nothing turns. At a 1 the planes of head
# 2 stay too, and those of the others turn by large angles, of which one is
# half a circle nearly to the digit: the third plane of head 1, with
# $1.0085\,\pi$. The construction is there. At a 0 that plane turns by
# $0.0037\,\pi$.
#
# Two more are close to it, the first plane of head 3 with $1.026\,\pi$ and
# the third one of head 4 with $0.974\,\pi$. They share their $\theta$ with
# planes of head 1 and have a $\Delta$ of their own. Nothing asks that they be
# right, as long as one is.
#
# On the right is the state in the third plane of head 1, turned as in (2), in
# two hundred strings of 64 bits. Each of its $P$ rows is a complex number;
# shown is their sum along the direction in which the two parities differ
# most. It is found with one half of the strings and checked with the other.
# There they are, the two places, for every string and every moment from the
# ninth bit on, opposite to each other.
#
# They are clouds and not points, and they come closer to the middle from bit
# to bit, for the trained layer differs from the construction in two ways. It
# goes on writing, at every token, which blurs the places. And it lets the
# state fade, by two percent at a 0 and by five at a 1. On which side of the
# middle the state is was settled by the first token and has been turned over
# by every 1 since, but of what that token wrote a tenth or so is left after
# 64 bits. After 256 there is nothing: that is one reason why the record
# guesses there. It was never asked for more than 32 bits in training, and a
# state that fades slowly enough for these is as good as one that stays.
#
# Seeing the parity in a state does not show that the model reads it there.
# Networks hold much that can be read out and is of no use to them. To know,
# one has to interfere, and look whether the answer changes.
#
# So stop one plane in all heads, by setting its column for $\theta$ to zero,
# and leave all other weights alone. Without the third plane the model is right
# about every second bit, which is guessing. Without the fourth it makes no
# mistakes. The second and the first are between, so that the layer is less
# tidy than the construction: it found half a circle, and then used whatever
# else was of help.

# %%
model, variables = trained.load(report.RESULTS / "parity" / "mamba3-demo")
params, block = variables["params"], variables["params"]["block_0"]
layer, weights = mamba3.Mamba3(model.width, **model.mixers["mamba3"]), block["mixer"]
letters = rms_norm(params["embedding"]["embedding"], block["norm"]["scale"], eps=model.norm_eps)[1:]  # of 0 and of 1
_, dt_, _, _, theta = np.split(np.asarray(letters @ weights["in_proj"]["kernel"]), [-16, -12, -8, -4], 1)
turns = np.asarray(jax.nn.softplus(dt_ + weights["dt_bias"])[:, :, None] * theta[:, None])  # bit, head, plane
strings = rng.integers(0, 2, (200, 64))
odds, inputs = np.cumsum(strings, 1) % 2, letters[strings.T]
advance = lambda state, x: 2 * (layer.apply({"params": weights}, x, state, method="step")[1],)
states = jax.jit(lambda x: jax.lax.scan(advance, layer.initial_state(200), x)[1])(inputs)
first = (states.h_bhpn[..., 4] + 1j * states.h_bhpn[..., 5])[:, :, 0]  # of the third plane, before its turns
h = np.swapaxes(first * np.exp(-1j * states.angle_bhs[:, :, 0, 2])[..., None], 0, 1)[:, 8:]
even, odd = (h[:100][odds[:100, 8:] == parity].mean(0) for parity in (0, 1))
place = (h - (even + odd) / 2) @ ((even - odd) / np.linalg.norm(even - odd)).conj()
angles = {f"at a {bit}": (np.arange(1, 17), turns[bit].ravel() / np.pi, "o") for bit in (0, 1)}
axes = dict(title=r"angles, in $\pi$", xlabel="planes of head 1, 2, 3 and 4, in turn", ylim=(-2, 2.4))
left = lines(angles, legend="upper center", columns=2, **axes)
clouds = {name: place[odds[:, 8:] == parity] for parity, name in enumerate(("even", "odd"))}
show(left, plane(clouds, ".", circle=False, title="states of the third plane of head 1"), width=11)
kernel = lambda s: {"in_proj": {"kernel": weights["in_proj"]["kernel"].at[:, s - 4].set(0)}}
changed = lambda s: {"params": params | {"block_0": block | {"mixer": weights | kernel(s)}}}
right = [float(np.mean(model.apply(changed(s), 1 + strings)[0].argmax(-1) == 1 + odds)) for s in range(4)]
by_place = np.mean((place[100:].real < 0) == odds[100:, 8:])
far = np.abs(place.real).mean(0)
print(f"parity by the place: {by_place:.1%}; from the middle: {far[0]:.1f} at the ninth bit, {far[-1]:.1f} at the last")
print("right, with the first to fourth plane stopped:", [f"{each:.0%}" for each in right])
assert abs(turns[1, 0, 2] / np.pi - 1) < 0.02 and np.abs(turns[0]).max() < 0.1 * np.pi
assert by_place > 0.9 and right[2] < 0.65 and far[-1] < 0.4 * far[0]

# %% [markdown]
# ## Several lanes for one state
#
# When a model writes text, one token at a time, nearly all of the time goes
# into reading its weights and states from memory and writing the states back.
# For a state of $P N$ numbers of four bytes, $8 P N$ bytes are moved, and
# about $5 P N$ operations are done with them: fade, add a product, multiply
# and sum to read. A GPU could do hundreds of operations in the time of a
# byte.
#
# So let one state serve more. With $R$ *lanes*, a token has $R$ inputs
# $x_{t,r}$ and $R$ rows $B_{t,r}$ and $C_{t,r}$, and
#
# $$h_t = \alpha_t\, h_{t-1} \mathcal{R}_t^\top + \Delta_t \sum_{r=1}^{R} x_{t,r}\, B_{t,r}^\top,
# \qquad y_{t,r} = h_t\, C_{t,r} . \tag{3}$$
#
# The vector-valued product has become a product of matrices, $(4 R + 1) P N$
# operations for the same $8 P N$ bytes: the layer can do more, for nothing.
# (In training, where operations do count, $R = 4$ makes the state space part
# about twice as slow.) This is the multi-input, multi-output form, MIMO, and
# S5 had it in 2022: there all channels shared one state.
#
# Whatever goes in by one lane can be read by every other. So (3) is the sum,
# over all pairs of lanes, of systems with one lane each; that is the check.
# The state is as large as before.

# %%
R = 3
x_r, B_r, C_r = draw(1, T, R, 1, P), draw(1, T, R, 1, N), draw(1, T, R, 1, N)
y_r, last = recurrent(x_r, B_r, C_r, dt, A, weight, angle)
pair = lambda r, s: recurrent(x_r[:, :, s], B_r[:, :, s], C_r[:, :, r], dt, A, weight, angle)[0]
by_pairs = jnp.stack([sum(pair(r, s) for s in range(R)) for r in range(R)], 2)

assert jnp.allclose(y_r, by_pairs) and last.h_bhpn.shape == (1, 1, P, N)
assert jnp.allclose(chunked(x_r, B_r, C_r, dt, A, weight, angle)[0], y_r)
assert not jnp.allclose(y_r, jnp.stack([pair(r, r) for r in range(R)], 2), rtol=0.1)

# %% [markdown]
# ## What to take along
#
# * The trapezoidal rule reads two inputs a step: order 2, and the short
#   convolution can go.
# * Turning states are complex eigenvalues, are RoPE with angles that the
#   tokens set. With real positive decays no layer can tell odd from even;
#   with turning ones, one layer counts modulo any number, but only what may
#   be added in any order.
# * Lanes use a state that has to be moved anyway.
#
# Here the lineage stands in 2026. From HiPPO to this it has been one
# equation,
#
# $$h_t = \text{decay}_t\; h_{t-1} + \text{previous}_t\; (B x)_{t-1} + \text{current}_t\; (B x)_t ,$$
#
# and the question who sets its coefficients: a measure, a fixed step,
# training, the token. Two questions are left for the last notebooks: what such
# a layer can count (8), and how far it remembers (9).
