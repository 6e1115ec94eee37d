# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. From continuous time to tokens
#
# Every model of this lineage begins as a linear differential equation,
#
# $$x'(t) = A\,x(t) + B\,u(t), \qquad y(t) = C\,x(t),$$
#
# in which $u(t)$ is the signal that is read, $x(t) \in \mathbb{R}^N$ the
# *state* that remembers it, and $y(t)$ what is said about it. A computer has
# no continuous time. It has samples $u_0, u_1, u_2, \dots$, one for each
# token, which stand $\Delta$ units of time apart, and it needs a recurrence
# from the state $h_{t-1}$ at one token to the state $h_t$ at the next.
#
# A *discretisation rule* makes that recurrence from $(A, \Delta)$. In this
# library each rule is three coefficients,
#
# $$h_t = \text{decay}\; h_{t-1} + \text{previous}\; (B u)_{t-1} + \text{current}\; (B u)_t ,$$
#
# and `ssm.discretize` is the only place that computes them. From S4 to
# Mamba-3 the papers differ in the rule that they chose; here we see what such
# a choice changes: what is exact, what stays bounded, and how fast the error
# falls.
#
# We compute in float64, so that what should be equal is equal to twelve
# digits or more.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import knob, lines, plane, show
from ssm.discretize import RULES, discretize, discretize_dense, phi1
from ssm.mixers import s4d
from ssm.recurrence import dense_recurrence, linear_recurrence

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## One state, solved exactly
#
# Take a single state with a number $a$ for $A$ and with $B = 1$:
# $x' = a x + u$. Multiplying by $e^{-at}$ and integrating over one step gives
# the solution without any approximation:
#
# $$x(t + \Delta) = e^{\Delta a} x(t) + \int_0^{\Delta} e^{(\Delta - s) a}\, u(t + s)\, ds .$$
#
# The first term needs no choice: *the state decays by $e^{\Delta a}$*. The
# integral does, since of $u$ we only have samples. Suppose that $u$ keeps one
# value during the step, as if each token were held until the next one comes.
# Then $u$ leaves the integral, and what remains is
#
# $$\int_0^\Delta e^{(\Delta - s)a}\, ds = \frac{e^{\Delta a} - 1}{a} = \Delta\, \varphi_1(\Delta a),
# \qquad \varphi_1(z) = \frac{e^z - 1}{z} .$$
#
# This is the *zero-order hold*, `zoh`: decay $e^{\Delta a}$, previous $0$,
# current $\Delta \varphi_1(\Delta a)$. For an input that is really held it
# makes no error, however large $\Delta$ is. So one step of $\Delta = 1$ must
# lead to the same state as a thousand steps of $\Delta = 1/1000$ with the
# same input. No polynomial or rational rule can do that; the simplest one,
# `forward_euler`, which follows the slope at the start of the step,
# $h_t = h_{t-1} + \Delta (a h_{t-1} + u_t)$, comes near it only with small
# steps.

# %%
a, u = jnp.array([-3.0]), jnp.ones((1, 1000, 1))
one_step, thousand_steps = {}, {}
for rule in ("zoh", "forward_euler"):
    one_step[rule] = discretize(rule, a, jnp.array([1.0])).current
    decay, _, current = discretize(rule, a, jnp.array([0.001]))
    thousand_steps[rule] = linear_recurrence(decay, current * u)[1][0]
    print(f"{rule:14} one step {one_step[rule][0]:.6f}   a thousand {thousand_steps[rule][0]:.6f}")

assert jnp.allclose(one_step["zoh"], thousand_steps["zoh"], rtol=1e-12)
assert not jnp.allclose(one_step["forward_euler"], thousand_steps["forward_euler"], rtol=1)

# %% [markdown]
# ## What stays bounded
#
# With no input, $n$ steps multiply the state by $\text{decay}^n$. A true
# solution with $\mathrm{Re}\, a < 0$ fades, so a rule should give
# $|\text{decay}| < 1$ there. Everything depends on the product $z = \Delta a$
# alone:
#
# | rule | decay |
# |---|---|
# | `zoh`, `exponential_euler`, `exponential_trapezoidal` | $e^z$ |
# | `bilinear` | $(1 + z/2) / (1 - z/2)$ |
# | `forward_euler` | $1 + z$ |
# | `backward_euler` | $1 / (1 - z)$ |
#
# The last three are approximations of $e^z$ by quotients of polynomials:
# `forward_euler` asks for the slope at the start of the step,
# `backward_euler` for the slope at its end, and `bilinear` for the mean of
# both.
#
# All three are one family, with a share $w$ of the slope taken at the end of
# the step and $1 - w$ at its start:
# $h_t - h_{t-1} = \Delta\, ((1 - w)\, a h_{t-1} + w\, a h_t + u_t)$. Solve
# for $h_t$, and
#
# $$\text{decay} = \frac{1 + (1 - w)\, z}{1 - w\, z}, \qquad \text{current} =
# \frac{\Delta}{1 - w\, z}$$
#
# with $w = 0$, $1$ and $1/2$; `generalized_bilinear` takes any $w$.
#
# On the left below, $z$ is real and negative: a state that fades without
# turning. `forward_euler` leaves the band from $-1$ to $1$ at $z = -2$: a
# state that should fade fast explodes. `bilinear` stays inside but tends to
# $-1$: a very fast state alternates in sign. `backward_euler` and $e^z$ tend
# to $0$, as they should.
#
# On the right, $z = i\theta$ is imaginary: a state that turns by $\theta$ a
# step and should neither grow nor fade. Its decay belongs on the unit circle.
# $e^{i\theta}$ runs around it, again and again: the angles $\theta$ and
# $\theta + 2\pi$ are the same to it, which is *aliasing*, the price of
# sampling. `bilinear` maps the whole imaginary axis onto one turn of the
# circle, without aliases but with compressed angles: $\theta$ becomes
# $2 \arctan(\theta / 2)$. `backward_euler` lets every turning state fade, and
# `forward_euler` makes every one of them grow.

# %%
shown = {"zoh": "exact: $e^z$", "bilinear": "bilinear", "backward_euler": "backward", "forward_euler": "forward"}
z, theta, one = jnp.linspace(-5, 0, 501), jnp.linspace(0, 6, 601), jnp.ones(1)
real = {rule: discretize(rule, z, one).decay for rule in shown}
turning = {rule: discretize(rule, 1j * theta, one).decay for rule in shown}
curves = {label: (z, real[rule]) for rule, label in shown.items()}
show(
    lines(curves, title="real $z$", xlabel="$z$", ylabel="decay", ylim=(-2.2, 1.2)),
    plane(turning, "-", legend=None, title=r"$z = i\theta$", xlim=(-1.3, 2.2), ylim=(-1.3, 2.2)),
)

assert all(jnp.all(jnp.abs(real[rule]) <= 1) for rule in ("zoh", "bilinear", "backward_euler"))
assert jnp.all(jnp.abs(real["forward_euler"][z < -2.01]) > 1)
assert jnp.allclose(jnp.abs(turning["bilinear"]), 1)
assert jnp.allclose(jnp.angle(turning["bilinear"]), 2 * jnp.arctan(theta / 2))
assert jnp.allclose(discretize("zoh", 1j * (theta + 2 * jnp.pi), one).decay, turning["zoh"])

# %% [markdown]
# The eigenvalues that S4D starts from are $a_n = -1/2 + i\pi n$. Where a rule
# puts them in the unit disc decides what a layer can hear: near the rim a
# state rings on for many tokens, near the centre it forgets at once, and its
# angle is the frequency it answers to, in radians a token. Turn the knob: at
# a small step all of them crowd at $1$, slow and long; at a large one the
# exact images of the fast states go around the circle and meet those of slow
# ones.

# %%
A, dts = -0.5 + 1j * jnp.pi * jnp.arange(32), np.geomspace(0.001, 1, 25)
images = lambda dt: {rule: discretize(rule, A, jnp.array([dt])).decay for rule in ("zoh", "bilinear")}
knob(lambda dt: show(plane(images(dt), legend="center", title=rf"$\Delta$ = {dt:.3g}"), width=5, height=5), dt=dts)

assert jnp.all(jnp.abs(images(0.001)["zoh"]) > 0.999) and jnp.all(jnp.abs(images(1.0)["zoh"]) < 0.61)
assert all(jnp.all(jnp.abs(image) < 1) for dt in dts for image in images(dt).values())

# %% [markdown]
# ## How fast the error falls
#
# Now let the input change, $u(t) = \cos \omega t$, and compare with the exact
# state, which for $x(0) = 0$ is
#
# $$x(T) = \mathrm{Re}\, \frac{e^{i\omega T} - e^{aT}}{i\omega - a} .$$
#
# Halve $\Delta$ again and again: a rule of *order* $p$ has an error that
# shrinks as $\Delta^p$, a line of slope $p$ between logarithmic axes. Two
# more rules come in here. Mamba replaces the integral of the zero-order hold
# by its crudest estimate, $\Delta$ times the newest input
# (`exponential_euler`: decay $e^z$, previous $0$, current $\Delta$). Mamba-3
# weighs both ends of the step by the trapezoidal rule, the older one faded by
# the decay:
#
# $$\text{previous} = (1 - \lambda)\, \Delta\, e^{z}, \qquad \text{current} = \lambda\, \Delta ,$$
#
# with $\lambda = 1/2$ unless it is said to be otherwise; $\lambda = 1$ is
# Mamba's rule.
#
# The left figure has no input and shows the decay alone: the Euler rules are
# of order 1, `bilinear` is of order 2, and the exponentials are exact and
# cannot be drawn. The right one has the input, and there the picture is
# another. *Every* rule that reads only the newest sample is of order 1, the
# exact hold and `bilinear` too, because the input was not held. Only the
# trapezoidal rule with $\lambda = 1/2$ reaches order 2.

# %%
a, omega, T, steps = jnp.array([-1.0]), 3.0, 4.0, 2 ** np.arange(5, 11)
exact = ((jnp.exp(1j * omega * T) - jnp.exp(a * T)) / (1j * omega - a)).real
rules = ["zoh", "bilinear", "backward_euler", "forward_euler", "exponential_euler", "exponential_trapezoidal"]
fading, driven = np.zeros((2, len(steps), len(rules)))
for i, k in enumerate(steps):
    u = jnp.cos(omega * jnp.linspace(0, T, k + 1))[:, None]
    each = [discretize(rule, a, jnp.array([T / k])) for rule in rules]
    decay, previous, current = map(jnp.concatenate, zip(*each, strict=True))
    x = linear_recurrence(decay, (previous * u[:-1] + current * u[1:])[None])[1][0]
    fading[i], driven[i] = abs(decay**k - jnp.exp(a * T)), abs(x - exact)

curves = lambda errors: {rule: (T / steps, errors[:, i], "o-") for i, rule in enumerate(rules)}
axes = dict(xscale="log", yscale="log", xlabel=r"step $\Delta$", ylim=(1e-8, 1))
show(
    lines(curves(fading), title="no input", ylabel="error of the state", legend=None, **axes),
    lines(curves(driven), title=r"$u = \cos \omega t$", legend="outside", **axes),
    width=12,
)
order = lambda errors: np.polyfit(np.log(T / steps), np.log(errors), 1)[0]
assert np.all(fading[:, [0, 4, 5]] < 1e-14) and np.allclose(order(fading[:, 1:4]), [2, 1, 1], atol=0.1)
assert np.allclose(order(driven), [1, 1, 1, 1, 1, 2], atol=0.1)

# %% [markdown]
# One rule of the library is not drawn. With `dirac` the input is a train of
# sharp pulses and not a sampled curve: each adds $B u_t$ at once, and in
# between the state decays, current $= 1$. It suits events, such as the spikes
# of a camera that reports only changes, and it is what a model does that has
# no $\Delta$ at all, such as the LRU (notebook 4). As an approximation of the
# integral it is off by $1 / \Delta$, and no small step helps.
#
# Why then did models with a rule of order 1 do so well? Because tokens are
# not samples of a smooth curve: $B$ and $\Delta$ are learned, and a factor
# that the rule leaves out of the input is one that they can learn. What a
# rule gives the model is where its decays lie, and, with *previous*, which
# inputs it may combine.
#
# ## Matrices, and why they may be diagonal
#
# The same rules take a matrix: $e^{\Delta A}$ becomes a matrix exponential, a
# quotient becomes a linear solve, and `discretize_dense` returns matrices. A
# mass on a spring is the classic example: position $p$ and velocity $v$,
# pushed by a force $u$, with stiffness $k$ and friction $c$,
#
# $$\begin{pmatrix} p \\ v \end{pmatrix}' = \begin{pmatrix} 0 & 1 \\ -k & -c \end{pmatrix}
# \begin{pmatrix} p \\ v \end{pmatrix} + \begin{pmatrix} 0 \\ 1 \end{pmatrix} u .$$
#
# Nobody would simulate a spring with as few as twelve samples a swing, yet
# that is what a network does whose $\Delta$ is large. The exact hold still
# passes through the right points, `bilinear` swings a little too slowly,
# `backward_euler` comes to rest far too early, and `forward_euler` tears the
# spring apart.

# %%
A, B, T = jnp.array([[0.0, 1.0], [-36.0, -0.6]]), jnp.array([0.0, 1.0]), 4.8
position = {}
for rule, k in (("fine", 5600), *((rule, 56) for rule in shown)):
    u = jnp.where(jnp.arange(k) < k // 8, 36.0, 0.0)
    decay, _, current = discretize_dense("zoh" if rule == "fine" else rule, A, T / k)
    position[rule] = dense_recurrence(decay, (u[:, None] * (current @ B))[None])[0][0, :, 0]
times = {k: np.linspace(T / k, T, k) for k in (56, 5600)}
curves = {shown.get(rule, "true"): (times[len(each)], each) for rule, each in position.items()}
show(lines(curves, legend="outside", xlabel="time", ylabel="position", ylim=(-2, 3)), width=12)

true, off = position["fine"][99::100], lambda rule: jnp.max(jnp.abs(position[rule] - true))
assert off("zoh") < 1e-10 and off("bilinear") < off("backward_euler") < off("forward_euler")
assert jnp.max(jnp.abs(position["backward_euler"][-10:])) < 0.1 < 10 < off("forward_euler")

# %% [markdown]
# A change of basis does not disturb a rule. If $A = V \Lambda V^{-1}$ with a
# diagonal $\Lambda$, then each rule, being a function of $A$ that is a power
# series or a quotient of polynomials, has
# $\bar A = V\, \overline{\Lambda}\, V^{-1}$: to discretise and then to
# diagonalise is the same as to diagonalise and then to discretise. A model
# may therefore keep $\Lambda$ alone, $N$ complex numbers, and let $V$
# disappear in $B$ and $C$. From S4D on, the whole lineage does. The spring's
# eigenvalues are a pair of complex conjugates, $-0.3 \pm 5.99i$: fading at
# $0.3$, turning at $5.99$.

# %%
Lambda, V = np.linalg.eig(A)
print("eigenvalues", Lambda)
for rule in RULES:
    dense, diagonal = discretize_dense(rule, A, 0.1), discretize(rule, jnp.asarray(Lambda), jnp.array([0.1]))
    for matrix, numbers in zip(dense, diagonal, strict=True):
        assert jnp.allclose(matrix, (V * numbers) @ np.linalg.inv(V), atol=1e-13), rule

# %% [markdown]
# Now the picture above can be read off four numbers. With
# $\Delta = 4.8 / 56$, $z = -0.03 \pm 0.51 i$. `forward_euler` has
# $|1 + z| = 1.10$: the swing grows by a tenth with every step.
# `backward_euler` has $1 / |1 - z| = 0.87$ where $e^{-0.03} = 0.97$ would be
# right. `bilinear` has nearly the right modulus, and turns by $0.50$ a step
# in place of $0.51$: two hundredths too slowly, one swing in fifty.
#
# ## What each model chose, and one layer under all of them
#
# | model | rule |
# |---|---|
# | HiPPO | `generalized_bilinear`, with $w = 0$ and $1$ the two Euler rules |
# | LSSL, S4, Liquid-S4 | `bilinear` |
# | DSS, S4D, S5 | `zoh` |
# | LRU | `dirac` |
# | Mamba, Mamba-2 | `exponential_euler` |
# | Mamba-3 | `exponential_trapezoidal` |
#
# The reasons were seldom the ones of this notebook. S4's algebra (notebook 3)
# needs a rule that is a quotient of polynomials in $A$. Once $A$ is diagonal,
# the exact hold costs nothing. Mamba computes a gain for every token, channel
# and state, and takes the cheapest one.
#
# As a rule is nothing but three coefficients, one layer can be run under all
# eight. Here it is S4D with sixteen pairs of states, $\Delta = 0.02$, whose
# true output is had from the same signal sampled sixty-four times as finely.
# The fastest states have $z = -0.01 + 0.94 i$, and under `forward_euler`
# these grow by a third with each token: no layer can start there. `zoh` and
# `bilinear` miss the truth by four or five percent, `backward_euler` and
# `exponential_euler` by a fifth, and `exponential_trapezoidal`, which is of
# order 2, by one percent. `generalized_bilinear` with its usual $w = 1/2$ is
# `bilinear`. And `dirac` is `exponential_euler` without the factor $\Delta$:
# fifty times as large, and otherwise the same curve. A model that learns $C$
# does not notice.
#
# The errors are not alike. That of `exponential_euler` is as smooth as the
# signal, a little of the input that is added or left out everywhere, and
# training may mend it. That of `backward_euler` is rough: states that should
# ring have gone silent.

# %%
dt, rng, A = 0.02, np.random.default_rng(0), -0.5 + 1j * jnp.pi * jnp.arange(16)[None]
C = jnp.asarray(rng.normal(size=(2, 1, 16)))
heard = lambda t: jnp.asarray(np.sin(2 * t + np.sin(0.7 * t)) + 0.5 * np.sin(5.1 * t))[None, :, None]
system = lambda rule, dt: s4d.discrete(A, jnp.ones_like(A), C[0] + 1j * C[1], jnp.zeros(1), jnp.array([dt]), rule=rule)
fine = s4d.parallel(heard(np.arange(1, 512 * 64 + 1) * dt / 64), system("zoh", dt / 64))[0][0, 63::64, 0]
t, y = np.arange(1, 513) * dt, {}
for rule in RULES:
    y[rule], by_loop = (form(heard(t), system(rule, dt))[0][0, :, 0] for form in (s4d.parallel, s4d.recurrent))
    assert jnp.linalg.norm(y[rule] - by_loop) < 1e-9 * jnp.linalg.norm(by_loop)
missed = {rule: float(jnp.linalg.norm(each - fine) / jnp.linalg.norm(fine)) for rule, each in y.items()}
hidden = "forward_euler", "dirac", "generalized_bilinear"
curves = {rule: (t, each - fine) for rule, each in y.items() if rule not in hidden}
show(lines(curves, legend="outside", xlabel="time", ylabel="error of $y$"), width=12, height=3.5)

print("relative errors:", {rule: f"{each:.2g}" for rule, each in missed.items()})
assert jnp.allclose(dt * y["dirac"], y["exponential_euler"]) and missed["forward_euler"] > 1e6
assert 2 * missed["exponential_trapezoidal"] < missed["zoh"] < missed["bilinear"] < 0.1 < missed["backward_euler"]

# %% [markdown]
# ## The step is a clock
#
# $\Delta$ and $A$ enter as a product, but they mean different things. $A$
# says how the state evolves in its own time; $\Delta$ says how much of that
# time passes with each token. A state with decay rate $r = -\mathrm{Re}\, a$
# keeps $e^{-r \Delta}$ a token, and so it remembers about $1 / (r\Delta)$
# tokens. S4's layers start with $\Delta$ between $0.001$ and $0.1$, spread
# over the channels: with $r = 1/2$ these are memories of 20 to 2000 tokens.
#
# A signal that is sampled at half the rate has twice as much time between its
# samples. Nothing has to be trained again: double $\Delta$, and the layer
# does to the halved signal what it did to the whole. That is how S5 is tested
# on speech at 8 kHz after training at 16 kHz. A model in discrete time
# without $\Delta$ cannot do it, and hears everything an octave too high.
# Below, the same S4D layer listens to the same signal, to
# every second sample of it with $2\Delta$, and to every second sample with
# $\Delta$ as it was.

# %%
t = np.arange(2048) * dt
u = heard(t)
rates = {"whole signal": (dt, u), r"half, $2\Delta$": (2 * dt, u[:, 1::2]), r"half, $\Delta$": (dt, u[:, 1::2])}
y = {}
for name, (step, signal) in rates.items():
    system = s4d.discrete(A, jnp.ones_like(A), C[0] + 1j * C[1], jnp.zeros(1), jnp.array([step]))
    y[name] = jax.jit(s4d.parallel)(signal, system)[0][0, :, 0]
looks = {"whole signal": (t, "-"), r"half, $2\Delta$": (t[1::2], "--"), r"half, $\Delta$": (t[1::2], ":")}
curves = {name: (times, y[name], style) for name, (times, style) in looks.items()}
show(lines(curves, legend="outside", xlabel="time", ylabel="$y$", xlim=(0, 20)), width=12, height=3.5)

whole, doubled, unchanged = y["whole signal"][1::2], *list(y.values())[1:]
relative = [jnp.linalg.norm(other - whole) / jnp.linalg.norm(whole) for other in (doubled, unchanged)]
assert relative[0] < 0.1 < 0.5 < relative[1]

# %% [markdown]
# ## Near zero
#
# A slow state, or a small step, has $z$ near $0$, and there $(e^z - 1)/z$ is
# $0/0$. Written down as it is, it loses digits in the value, and all of them
# in the gradient, by which $A$ and $\Delta$ are trained. The series
#
# $$\varphi_1(z) = 1 + \frac{z}{2} + \frac{z^2}{6} + \dots$$
#
# has no such trouble: $\varphi_1(0) = 1$ and $\varphi_1'(0) = 1/2$.
# `ssm.discretize.phi1` sums it for $|z| < 1/2$.

# %%
naive = lambda z: (jnp.exp(z) - 1) / z
z = 10.0 ** -jnp.arange(1, 13)
slope = {f: jax.vmap(jax.grad(f))(z) for f in (naive, phi1)}
print("gradient at z = 1e-12, where it is 1/2: as written", slope[naive][-1], ", phi1", slope[phi1][-1])

assert jnp.isnan(jax.grad(naive)(0.0)) and jax.grad(phi1)(0.0) == 0.5
assert abs(slope[naive][-1]) > 1 and jnp.allclose(slope[phi1], 0.5 + z / 3 + z**2 / 8, atol=1e-4, rtol=0)

# %% [markdown]
# The difference is not academic. The fastest states of S4 have $\Delta |a|$
# near 100, the slowest below $10^{-3}$, in one and the same array. In float32
# the gradient as written, whose error grows as $10^{-7} / z^2$, has one digit
# left there, and it belongs to just those states that are meant to remember
# longest.
#
# ## What to take along
#
# * A rule is three coefficients; all else in a model is independent of it.
#   Try `python -m experiments.train --config=configs/smnist.py:s4d,demo
#   --config.model.mixers.s4d.rule=bilinear --workdir=runs/bilinear`.
# * The decay $e^{\Delta A}$ is exact; the input's coefficient is where rules
#   differ, and only *previous* buys an order.
# * $\Delta$ is a clock. Here it was a constant. When a model reads it from
#   the input, as in notebook 5, it becomes a gate: a large step lets a token
#   in and the past out, a step of zero lets a token pass unseen.
