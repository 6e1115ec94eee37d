# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Mamba: the state chooses what it keeps
#
# All models up to here treat every token alike. Whatever comes in is added to
# the state in the same way, and fades in the same way; the layer is a
# convolution with a fixed kernel. For sound and pictures that is right, since
# a wave is a wave wherever it occurs. For language it is not: some words
# should be kept for a thousand tokens and others forgotten at once, and which
# ones depends on what they are.
#
# Mamba (Gu and Dao 2023) lets the token decide. For a channel with input
# $x_t$ and a state $h_t \in \mathbb{R}^N$,
#
# $$h_t = \bar A_t \circ h_{t-1} + \bar B_t\, x_t, \qquad y_t = C_t^\top h_t + D x_t, \tag{1}$$
#
# where the step $\Delta_t > 0$ of this channel, and the rows $B_t$ and $C_t$,
# which all channels share, are *computed from the token itself* by small
# linear maps. $A$ stays a parameter: $N$ negative numbers for each channel.
# As in notebook 2 the discretisation turns $(A, \Delta_t)$ into decays
# $\bar A_t = e^{\Delta_t A}$ and gains $\bar B_t = \Delta_t B_t$, the rule
# `exponential_euler`, but now there is another decay at every token.
#
# The paper calls it *selection*. `ssm.mixers.mamba` has the pure functions;
# here we set $\Delta$, $B$ and $C$ by hand to see what selection can do,
# before any training.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from experiments import optimizer, steps, tasks
from experiments.figures import knob, lines, matrix, show
from ssm.discretize import discretize
from ssm.language_model import LanguageModel
from ssm.mixers import mamba
from ssm.mixers.mamba import Mamba

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
recurrent, one = jax.jit(mamba.recurrent, static_argnames="rule"), jnp.ones((1, 1))

# %% [markdown]
# ## The step is a gate
#
# Take the smallest case: one channel, one state, $A = -1$, $B_t = C_t = 1$,
# and the exact rule `zoh` of notebook 2, $\bar A_t = e^{-\Delta_t}$ and
# $\bar B_t = 1 - e^{-\Delta_t}$. The two sum to 1: the new state is a
# weighted mean of the old state and the new input. Let
# $\Delta_t = \mathrm{softplus}(s_t) = \ln(1 + e^{s_t})$ for a number $s_t$
# that is read from the token. Then
# $e^{-\Delta_t} = 1 / (1 + e^{s_t}) = 1 - \sigma(s_t)$ with the logistic
# function $\sigma$, and
#
# $$h_t = (1 - g_t)\, h_{t-1} + g_t\, x_t, \qquad g_t = \sigma(s_t) . \tag{2}$$
#
# The formula is worth a second look, since nothing in it was chosen: a linear
# differential equation, a held input, and a step that is kept positive by the
# softplus. The usual gate of recurrent networks comes out.
#
# This is the gate of the LSTM and the GRU, derived and not designed: it is
# the paper's Theorem 1. A large step, $g_t \approx 1$, lets the token in and
# the past out. A step of nearly zero, $g_t \approx 0$, leaves everything as
# it is, and the token passes as if it had not been there. That is what
# $\Delta$, a constant clock in S4, has become: the token says how much time
# it takes.
#
# `exponential_euler`, which the published models use, has the same decay but
# the gain $\Delta_t$ itself, which is not bounded: the picture shows both
# gains. For $s < -2$ they are the same, and in practice $s$ starts out
# between $-7$ and $-2$.

# %%
s = jnp.linspace(-8, 4, 200)
rules = {"zoh": r"zoh: $\sigma(s)$", "exponential_euler": r"exponential Euler: $\Delta$"}
gains = {rule: discretize(rule, -one[0], jax.nn.softplus(s)).current for rule in rules}
curves = {"decay": (s, discretize("zoh", -one[0], jax.nn.softplus(s)).decay)}
curves |= {label: (s, gains[rule]) for rule, label in rules.items()}
show(lines(curves, xlabel="$s$", ylim=(0, 2), legend="upper left"), width=7, height=3.6)
x, s_t = rng.normal(size=(2, 200))
gate, h, gated = 1 / (1 + np.exp(-s_t)), 0.0, []
for g, value in zip(gate, x, strict=True):
    h = (1 - g) * h + g * value
    gated.append(h)
token = lambda values: jnp.asarray(values)[None, :, None]
run = lambda x, dt, rule: recurrent(token(x), token(dt), -one, *2 * [token(np.ones(len(x)))], jnp.zeros(1), rule=rule)
by_mamba = run(x, jax.nn.softplus(s_t), "zoh")[0][0, :, 0]
assert np.allclose(by_mamba, gated, atol=1e-12)
assert np.allclose(gains["zoh"], 1 / (1 + np.exp(-s)))

# %% [markdown]
# ## Remember the last marked one
#
# Here is a task that separates the two kinds of models: numbers go by, a few
# of them carry a mark, and at every moment the answer is the last number that
# was marked. In between pass any number of others.
#
# With selection it takes one state. Let $\Delta_t$ be large at a mark and
# tiny elsewhere; (2) does the rest. The knob is the step $\Delta$ of the
# tokens without a mark. At $10^{-4}$ the answer is held over a hundred
# tokens; as $\Delta$ grows the passing tokens wash it away.
#
# Without selection the model is a convolution, $y_t = \sum_j K_j u_{t-j}$,
# with inputs $u$ that may be the number, the mark and the number times its
# mark, and with any kernel whatever. We do not train it, we compute the best
# kernels of 200 taps by least squares, which no training could beat. They
# fail: a kernel looks a fixed number of tokens back, and the mark was at
# another distance every time. Even the best it can do, on the very sequence
# that it was fitted to, is a blurred mean.

# %%
length, taps = 4000, 200
value, mark = rng.normal(size=length), rng.random(length) < 0.02
mark[0] = True
answer = value[np.maximum.accumulate(np.where(mark, np.arange(length), 0))]
select = lambda dt: run(value, np.where(mark, 12.0, dt), "zoh")[0][0, :, 0]
error = lambda y: float(np.sqrt(np.mean((y - answer) ** 2)))
windows = lambda u: np.lib.stride_tricks.sliding_window_view(np.pad(u, (taps - 1, 0)), taps)
history = np.concatenate([windows(u) for u in (value, 1.0 * mark, value * mark)], 1)
convolved = history @ np.linalg.lstsq(history, answer, rcond=None)[0]
first = lambda y: (np.arange(600), y[:600])
best = {"answer": first(answer), "best convolution": first(convolved)}
curves = lambda dt: best | {rf"selective, $\Delta$ = {dt:.2g}": first(select(dt))}
axes = dict(xlabel="token", legend="outside")
knob(lambda dt: show(lines(curves(dt), **axes), width=12, height=3.6), dt=10.0 ** np.arange(-5, 0.1, 0.5))

print(f"error, selective {error(select(1e-5)):.4f}, convolution {error(convolved):.2f}, of the mean {answer.std():.2f}")
assert error(select(1e-5)) < 2e-3 < 0.5 < error(convolved)

# %% [markdown]
# Look at what the convolution does after a mark: it jumps in the right
# direction, and then drifts towards zero, the mean, since with every token it
# becomes likelier that another mark has come by in the meantime. It cannot
# know that none has. The selective state knows, in the only way in which a
# fixed amount of memory can: it was there when each token came, and did
# nothing.
#
# Two tasks of the paper are of this kind, and in both the difference is as
# stark after training. In *selective copying*, sixteen tokens are scattered
# among four thousand fillers and must be repeated in order: two layers of S4
# reach 18 %, the same two layers with selection 97 %. In *induction heads* a
# model must recall what followed a special token when it was last seen.
# Mamba, trained on 256 tokens, still does so after a million, since a token
# that is skipped costs no memory, however often it is. `configs/recall` has
# both; a small one of the first is trained below.
#
# ## What to write, and what to read
#
# $\Delta_t$ says how much of a token is written; $B_t$ says *where* among the
# $N$ states of the channel, and $C_t$ from where one reads. Suppose that
# tokens come in pairs of a name and a value, with one of $N$ names. Let $B_t$
# be 1 at the name's place and 0 elsewhere; then the value goes to that state
# and touches no other. A later token whose $C_t$ is 1 at the same place reads
# it. With a decay near 1 this is a small dictionary.
#
# It has one flaw, which is worth knowing. To write a name a second time one
# must first erase its old value. But $\Delta_t$ sets the decay of *all* $N$
# states of the channel: there is none for one place alone. So the new value
# is added to the old one. Erasing along $B_t$ is what DeltaNet adds,
# $h_t = h_{t-1} - \beta_t\, (h_{t-1} B_t - x_t) B_t^\top$; see
# `ssm.mixers.gated_deltanet`.
#
# In the picture, each column is a state, red for a positive content and blue
# for a negative one, the upper row after six tokens and the lower one at the
# end.
#
# Below, six values are written under six of eight names and read back; then
# the third of them is written again.

# %%
names, values = np.array([5, 2, 7, 0, 3, 6, 7]), np.array([0.3, -1.2, 0.8, 2.0, -0.4, 1.1, 0.5])
written, asked = np.eye(8)[names], np.eye(8)[[5, 2, 7, 0, 3, 6]]
rows = lambda *parts: jnp.asarray(np.concatenate(parts))[None]
x = token(np.concatenate([values, np.zeros(6)]))
B, C = rows(written, np.zeros((6, 8))), rows(np.zeros((7, 8)), asked)
never, all_time = jnp.full((1, 8), -1e-9), jnp.ones((1, 13, 1))
y, last = recurrent(x, all_time, never, B, C, jnp.zeros(1))
before = recurrent(x[:, :6], all_time[:, :6], never, B[:, :6], C[:, :6], jnp.zeros(1))[1]
show(matrix(jnp.concatenate([before[0], last[0]]), title="the states before and after", yticks=[]), height=2.6)

assert np.allclose(before[0, 0, names[:6]], values[:6], atol=1e-6)
assert np.allclose(y[0, 7:, 0], [0.3, -1.2, 0.8 + 0.5, 2.0, -0.4, 1.1], atol=1e-6)

# %% [markdown]
# ## Memories of many lengths
#
# Where do the decays start? Mamba's $A$ is $-1, -2, \dots, -N$ for every
# channel, the `real` start of notebook 4, and the bias of $\Delta$ is such
# that $\Delta$ begins between $0.001$ and $0.1$, one for each channel. So
# state $n$ of a channel remembers about $1 / (n \Delta)$ tokens: with
# $N = 16$ a layer begins with memories of less than one and of a thousand
# tokens. Real eigenvalues were good enough for text, and they made the kernel
# simple; that they cannot count is a story for notebook 7.
#
# A half life is the number of tokens after which half of what was written is
# left, $\ln 2 / (n \Delta)$. The figure shows those of a few channels of a
# layer as it starts. They are the half lives at the usual steps: once the
# layer is trained, a token may ask for another step, and the whole column
# moves up or down with it.

# %%
layer = Mamba(width=16, state_size=16)
variables = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 2, 16)))
dt = np.sort(jax.nn.softplus(variables["params"]["dt_proj"]["bias"]))
A = -jnp.exp(variables["params"]["A_log"][0])
decays = np.stack([discretize("exponential_euler", A, jnp.full(1, each)).decay for each in dt])
half_life = np.log(2) / -np.log(decays)
curves = {rf"$\Delta$ = {dt[i]:.3g}": (np.arange(1, 17), half_life[i], "o-") for i in (0, 10, 21, -1)}
show(lines(curves, xlabel="state $n$", ylabel="half life (tokens)", yscale="log", legend="outside"), width=8)
assert np.allclose(A, -np.arange(1, 17)) and 1e-3 * 0.99 < dt[0] < dt[-1] < 0.101
assert half_life.min() < 1 and half_life.max() > 300

# %% [markdown]
# How does a token get to set $\Delta_t$ for $2d$ channels (the block below
# has so many)? By a bottleneck: a few numbers, $d/16$ of them, are read from
# the token, and each channel takes its own combination of these plus its
# bias. $B_t$ and $C_t$, of $N$ numbers each, are read once and shared by all
# channels. Selection adds hardly any parameters: at width $d$ the two
# projections in and out have $6 d^2$, all that makes $\Delta$, $B$ and $C$
# some $\frac{d^2}{4} + 4 d N$.
#
# ## The block, and what training makes of it
#
# A kernel exists no more: what token $j$ contributes to token $t$ depends on
# all tokens between them. What is left from notebook 4 is the scan. The map
# $h \mapsto \bar A_t h + \bar B_t x_t$ of each token may be composed in any
# bracketing, and the decays may differ. `mamba.parallel` does that. Its
# problem is memory: written out, the states of all tokens are $N$ times as
# large as the input, 16 times for every layer, and training needs them again
# for the gradient.
#
# Nor can the work be turned into products of matrices, at which accelerators
# are ten times faster than at anything else: each of the $2d \times N$ states
# has decays of its own. That is Mamba's weak side, and where Mamba-2 sets in.
#
# The paper's answer, and its engineering, is not to write them out.
# `mamba.chunked` walks through the sequence in chunks, keeps only the state
# between two chunks, and makes those inside again when the gradient asks for
# them; on a GPU they live in registers and never reach the memory. The
# numbers are the same, and so are the gradients with respect to everything.
#
# Around (1) Mamba builds one kind of block that takes the place of attention
# and of the feed-forward network both. The token, of width $d$, is projected
# to $2d$ channels $x$ and $2d$ channels $z$. A short convolution lets $x$ see
# three tokens back, so that $\Delta$, $B$ and $C$ can depend on a little
# context. Then comes (1), with the state space model running in each of the
# $2d$ channels; the result is multiplied by $\mathrm{silu}(z)$, a second
# gate, and projected back.
#
# The block is the state's whole interface: give it a prompt, then go on token
# by token, and the cost of a token is the same after ten and after a million.
#
# The state that goes from call to call has two parts: $h$, of $2d \times N$
# numbers, and the last three inputs of the short convolution. Nothing in it
# grows. A Transformer of the same size keeps keys and values of every token
# it has read.
#
# It is not linear: doubling the input does not double the output, since the
# steps, the places to write and those to read change with it.
#
# Such a block is trained here on selective copying, if a small one: among 62
# tokens two are letters and the others noise, and at two markers behind them
# the first letter and then the second must be named. There are four letters,
# so that guessing is right in a quarter of all cases. One block of width 16
# learns it in 500 updates.
#
# Its twin has the same start and sees the same tokens, but the weights by
# which $\Delta$ is read from the token are zero and stay zero. Its $\Delta$
# is learned, one number for each channel. $B_t$ and $C_t$ it reads from the
# token, as ever, so that it may refuse to write noise. What it cannot do is
# to stop the clock. (One compiled update serves both: those weights are a
# group of the optimizer of their own, and its rate is 0 for the twin.)
#
# The two markers are the same token: which letter is asked for, the block has
# to know from its convolution or from its state.
#
# The twin is better than guessing, since in 64 tokens a letter may fade and
# still be seen. Then both are tested with more noise than in training. The
# twin falls towards guessing, and selection loses next to nothing: it has not
# learned where letters may be, but to let the rest pass. That the twin's
# channels have steps of many sizes does not help it there. Each forgets by
# the clock, a letter as well as noise, and with every further token more of
# both.

# %%
sizes, small = (64, 128, 256), {"vocabulary": 6, "memorize": 2, "test_examples": 512, "eval_examples": 512}
task = tasks.load({"name": "selective_copying", "length": 64, "eval_lengths": sizes[1:], **small})
mixers = {"mamba": {"state_size": 8, "dt_max": 1.0, "form": "recurrent"}}
model = LanguageModel(task.input_size, width=16, depth=1, pattern="mamba", mixers=mixers, tie_embeddings=False)
groups = lambda rate: {"groups": {"selection": {"match": "dt_proj/kernel", "learning_rate": rate}}}
options = lambda rate: optimizer.options({"learning_rate": 0.01, "clip_norm": 1.0, **groups(rate)})
adam = lambda o, params: optimizer.build(o, optimizer.table(o, params), optimizer.schedule(o, 500, 500))
step = lambda now, batch, rate: steps.train_step(model, task, adam(options(rate), now.params), 0, 500)(now, batch)[0]
step, score, tested = jax.jit(step), jax.jit(steps.eval_step(model, task)), {}
for name, rate in (("fixed step", 0.0), ("selective", 0.01)):
    batches = task.train_batches(32, 2, 0)
    params, _ = steps.init_variables(model, task, next(batches), 2)
    params["block_0"]["mixer"]["dt_proj"]["kernel"] *= rate > 0
    now = steps.new_state(adam(options(rate), params), params, {})
    for _, batch in zip(range(500), batches, strict=False):
        now = step(now, batch, rate)
    read = dict(task=task, batch_size=512, place=dict)
    tested[name] = [steps.evaluate_split(score, now.params, {}, s, **read)["accuracy"] for s in task.splits[1:]]
axes = dict(xlabel="tokens", ylabel="right (%)", xticks=sizes, ylim=(0, 104), legend="outside")
show(lines({name: (sizes, each, "o-") for name, each in tested.items()}, **axes), width=7, height=3)
print({name: [f"{each:.0f} %" for each in values] for name, values in tested.items()})
assert tested["selective"][0] > 95 and tested["selective"][2] > tested["fixed step"][2] + 30
assert tested["fixed step"][0] < 95 and tested["fixed step"][2] < 70

# %% [markdown]
# ## The gates of the trained block
#
# Do the steps open at letters and close at noise? Taken over all channels it
# is here the contrary: the mean $\Delta$ is larger at noise. One has to look
# at channels. On the left is a point for each of the 32: its $\Delta$ at plain
# noise, and the largest at a letter and the three tokens behind it, to which
# the short convolution carries the letter. The channels of the twin would all
# lie on the dashed line.
#
# Far above it are the gates of the theory: hardly open at noise, and at a
# letter more than twenty times as wide. At $\Delta = 0.001$ the slowest of
# their states, with $A$ about $-1$, has a half life of seven hundred tokens
# of noise, which is why the test with 256 is no harder. Below the line are
# channels that noise opens and so clears: they see that a letter is passing,
# and keep nothing of it.
#
# On the right is the slowest state of every channel in one example, sorted by
# how much a letter opens it: the change since before the first letter, red
# and blue, as a share of its largest. In the upper channels a letter leaves a
# trace that stays until the markers, and the second letter adds its own. In
# the lower ones letters flash and are gone.
#
# Seeing a trace in a state does not show that the model reads it. To know,
# one has to interfere. The state is all that goes from one call to the next,
# so let the block read 62 tokens, stop before the markers, and replace the
# states of the gates by their mean over all examples, which tells nothing of
# this one. Then it reads the markers and is back to guessing. Do so with the
# states of all other channels, and it makes no mistakes.

# %%
whole, p = task.preprocess(next(task.eval_batches("test", 512)), jax.random.key(0), False), {"params": now.params}
tokens, answers = np.asarray(whole["inputs"]), np.asarray(whole["targets"])[:, 62:]
watch = dict(capture_intermediates=lambda module, _: module.name == "dt_proj", mutable="intermediates")
seen = jax.jit(lambda p: model.apply(p, tokens, **watch))(p)[1]["intermediates"]["block_0"]["mixer"]["dt_proj"]
dt = np.asarray(jax.nn.softplus(seen["__call__"][0]))
letter = (tokens > 0) & (tokens < 5)
behind = np.stack([np.pad(letter, ((0, 0), (i, 0)))[:, :64] & (tokens < 5) for i in range(4)])
noise, most = dt[(tokens == 0) & ~behind.any(0)].mean(0), np.max([dt[each].mean(0) for each in behind], 0)
gates, order = most > 20 * noise, np.argsort(noise / most)
example = next(i for i, row in enumerate(letter) if row[15:25].any() and row[35:45].any())
advance = lambda state, token: 2 * (model.apply(p, token, state, method="step")[1],)
states = jax.jit(lambda: jax.lax.scan(advance, model.initial_state(1), tokens[example][:, None])[1][0])()
h = states.h_bdn[:, 0, order, 0]
points = {"_": (noise, most, "o"), "letters and noise alike": ([1e-4, 5], [1e-4, 5], "k--", {"lw": 1})}
log = dict(xscale="log", yscale="log", xlabel=r"$\Delta$ at noise", ylabel=r"largest $\Delta$ at a letter")
change = h - h[letter[example].argmax() - 1]
image = (change / jnp.abs(change[5:]).max(0)).T
show(lines(points, **log), matrix(image, limit=1, xlabel="token", ylabel="channel", aspect="auto"), height=4)
state = jax.jit(model.apply)(p, tokens[:, :62])[1][0]
blank = lambda some: state._replace(h_bdn=jnp.where(some[:, None], state.h_bdn.mean(0), state.h_bdn))
named = jax.jit(lambda state: model.apply(p, tokens[:, 62:], (state,))[0].argmax(-1))
right = {name: np.mean(named(blank(some)) == answers) for name, some in (("gates", gates), ("others", ~gates))}
print(f"{gates.sum()} gates of {len(gates)}; right without", {name: f"{each:.0%}" for name, each in right.items()})
assert 3 <= gates.sum() <= 20
assert right["gates"] < 0.6 and right["others"] > 0.9

# %% [markdown]
# ## What to take along
#
# * Selection is time-variance: $\Delta_t$, $B_t$ and $C_t$ come from the
#   token. A large step overwrites, a step of zero skips; in the smallest case
#   it is the gate of a GRU.
# * What is lost is the convolution, and with it the FFT. What remains is the
#   scan, and not writing down the states.
# * All states of a channel share a step. One cannot erase a single fact.
# * A trained block has both, channels that letters open and channels that
#   noise opens, and a mean over them hides it. What it knows is in the former.
#
# Next: what becomes possible if the whole head shares one decay, in notebook
# 6.
