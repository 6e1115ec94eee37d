# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. HiPPO: memory as projection
#
# A signal $u(t)$ goes by, one value at a time, for ever. You may keep $N$
# numbers. Which ones, if you want to be able to say at any moment what the
# past looked like?
#
# HiPPO (Gu et al. 2020) answers: keep the first $N$ coefficients of the past
# in a basis of orthogonal functions, as one keeps the first Fourier
# coefficients of a sound. That is the best that $N$ numbers can do, in the
# sense of least squares. And it found that these coefficients need no access
# to the past to be kept up to date: they follow a linear differential
# equation,
#
# $$x'(t) = A\, x(t) + B\, u(t), \qquad x(t) \in \mathbb{R}^N,$$
#
# with fixed matrices $A$ and $B$ that can be written down. This equation is
# the root of every model in this repository: S4 is this memory with a learned
# way to read it, and what came later changed $A$, the reading, and who sets
# the pace.
#
# You need linear algebra and integrals; nothing else. `ssm.hippo` has the
# matrices and `ssm.online` the memory.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import knob, lines, matrix, show
from ssm import hippo
from ssm.discretize import discretize_dense
from ssm.online import basis, project, reconstruct
from ssm.recurrence import dense_recurrence

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## What matters, and in which terms
#
# Call the *age* $\tau$ of a value how long ago it was: $u(t - \tau)$, with
# $\tau = 0$ now. A memory has to say how much each age matters. That is a
# *measure*: a weight $w(\tau) \ge 0$ whose integral is 1 (or, for Laguerre,
# is not). It defines an inner product of functions of age,
#
# $$\langle f, g \rangle = \int_0^\infty f(\tau)\, g(\tau)\, w(\tau)\, d\tau ,$$
#
# and functions $p_0, p_1, p_2, \dots$ with $\langle p_n, p_k \rangle = 1$ for
# $n = k$ and $0$ otherwise, made by orthogonalising $1, \tau, \tau^2, \dots$
# or the like. The library has four:
#
# | name | weight $w(\tau)$ | functions $p_n(\tau)$ |
# |---|---|---|
# | `legs` | $e^{-\tau}$: the past fades | Legendre polynomials of $2 e^{-\tau} - 1$ |
# | `legt` | $1/2$ on $[0, 2]$: a sliding window | Legendre polynomials of $1 - \tau$ |
# | `fout` | $1/2$ on $[0, 2]$ | cosines and sines of $\pi k \tau$ |
# | `lagt` | $1$ on $[0, \infty)$ | $e^{-\tau/2}$ times Laguerre polynomials |
#
# The $n$-th coefficient of the past is its inner product with $p_n$, and the
# past is recovered as a sum:
#
# $$x_n(t) = \int_0^\infty u(t - \tau)\, p_n(\tau)\, w(\tau)\, d\tau, \qquad
# u(t - \tau) \approx \sum_{n < N} x_n(t)\, p_n(\tau) . \tag{1}$$
#
# Below are the first four functions of each. All are fine for young ages and
# coarse for old ones in `legs`, whose clock slows down with age; the others
# treat all ages in their window alike. The check computes all inner products
# by Gaussian quadrature, in the variable $s = e^{-\tau}$ for `legs`, in which
# its weight is uniform on $[0, 1]$.

# %%
ages, names = np.linspace(0, 4, 401), ("legs", "legt", "fout", "lagt")
first = {name: basis(name, 6, ages)[:, [0, 2, 3, 4] if name == "fout" else [0, 1, 2, 3]] for name in names}
curves = {name: {f"$p_{n}$": (ages, p[:, n]) for n in range(4)} for name, p in first.items()}
axes = dict(xlabel=r"age $\tau$", ylim=(-2.9, 2.9))
legends = (None, None, None, "outside")
show(
    *[lines(curves[each], legend=place, title=each, **axes) for each, place in zip(names, legends, strict=True)],
    width=13,
    height=3.2,
)

x, weight = np.polynomial.legendre.leggauss(64)
s, weight = (1 + x) / 2, weight / 2
for name, nodes in {"legs": -np.log(s), "legt": 2 * s, "fout": 2 * s}.items():
    p = basis(name, 16, nodes)
    p = p[:, p.any(0)]  # fout's second function is sin(0)
    assert np.allclose(p.T * weight @ p, np.eye(p.shape[1]), atol=1e-10), name

# %% [markdown]
# ## The coefficients follow a differential equation
#
# Differentiate (1) in time. As $u(t - \tau)$ depends on $t - \tau$ alone, its
# derivative in $t$ is minus that in $\tau$; integrate by parts, with
# $w(\infty) = 0$:
#
# $$x_n'(t) = -\int_0^\infty \frac{\partial}{\partial \tau} u(t - \tau)\; p_n(\tau) w(\tau)\, d\tau
# = u(t)\, p_n(0) w(0) + \int_0^\infty u(t - \tau)\, (p_n w)'(\tau)\, d\tau .$$
#
# The first term is the newest value coming in: $B_n = p_n(0)\, w(0)$. In the
# second, suppose that $(p_n w)' / w$ is a combination of the functions
# themselves, $\sum_k A_{nk}\, p_k$. Then the integral is
# $\sum_k A_{nk} x_k(t)$, by (1) once more, and we have $x' = A x + B u$ with
#
# $$A_{nk} = \int_0^\infty (p_n w)'(\tau)\, p_k(\tau)\, d\tau . \tag{2}$$
#
# For `legs` the supposition is true: in terms of $s = e^{-\tau}$, $p_n$ is a
# polynomial of degree $n$, and $(p_n w)'/w = -\frac{d}{ds} (s\, p_n)$ is
# again one of degree $n$, so that only $k \le n$ occur: $A$ is *lower
# triangular*. Working out (2) gives the matrix that S4 made famous,
#
# $$A_{nk} = -\begin{cases} \sqrt{(2n+1)(2k+1)} & n > k \\ n + 1 & n = k \\ 0 & n < k \end{cases}
# \qquad B_n = \sqrt{2n+1} .$$
#
# A sliding window has one more term. At its far end the value $u(t - 2)$
# leaves, and it is no longer known. HiPPO reads it off the coefficients,
# $u(t-2) \approx \sum_k x_k\, p_k(2)$, which puts $-p_n(2)\, p_k(2)\, w(2)$
# into $A_{nk}$. The window is forgotten by way of its own approximation,
# which is exact only where $N$ coefficients hold the signal.
#
# We do not take the formulas on trust: below, (2) is computed from the
# functions alone, with a numerical derivative and the quadrature from above,
# and compared with `hippo.measure`. Colours show signs and sizes: red for
# positive entries, blue for negative ones.

# %%
show(*[matrix(hippo.measure(name, 16)[0], title=f"$A$ of {name}") for name in names], width=13, height=3.6)

N, step = 8, 1e-5
weights = {"legs": lambda age: np.exp(-age)[:, None], "legt": lambda age: np.full((len(age), 1), 0.5)}
for name, nodes, d_age in (("legs", -np.log(s), 1 / s), ("legt", 2 * s, 2 + 0 * s)):
    pw = lambda age, name=name: basis(name, N, age) * weights[name](age)
    slope = (pw(nodes + step) - pw(nodes - step)) / (2 * step)
    A = slope.T * (weight * d_age) @ basis(name, N, nodes)
    if name == "legt":
        A -= basis(name, N, [2.0]).T @ pw(np.array([2.0]))
    B = pw(np.zeros(1))[0]
    assert np.allclose(A, hippo.measure(name, N)[0], atol=1e-6) and np.allclose(B, hippo.measure(name, N)[1])

# %% [markdown]
# ## A memory at work
#
# Now let a signal go by in small steps of time `dt`, and after each step
# advance $x$ by the equation (how a step is made is the subject of notebook
# 2; here it is the rule called bilinear). `project` returns the coefficients
# after every step, `reconstruct` the past that they stand for.
#
# The signal is six units of time long. With $N = 32$ the windows of `legt`
# and `fout` hold its last two units and know nothing of what was before,
# while `legs` sees the whole of it, ever more blurred with age. `lagt`, whose
# functions all fade together, is a poor memory here, and no later model chose
# it. `fout` overshoots at the ends of the window, where the signal does not
# continue as a periodic one would: there is a jump to describe, and smooth
# waves cannot.

# %%
dt, T = 1 / 512, 6
t = np.arange(1, T * 512 + 1) * dt
u = jnp.asarray(np.sin(2.2 * t) * np.cos(0.9 * t + 1) + 0.4 * np.sin(7.1 * t) + 0.3 * np.sin(12.3 * t + 2))
ages = np.arange(len(t)) * dt
past = {name: reconstruct(name, project(name, u, 32, dt)[-1], ages) for name in names}
curves = lambda name: {"signal": (t, u), f"memory, {name}": (t[::-1], past[name])}
axes = dict(xlabel="time", ylim=(-1.9, 3.0), legend="upper center")
show(*[lines(curves(name), **axes) for name in names], width=13, height=3.4)

inside = ages < 1.9
error = {name: jnp.linalg.norm((past[name] - u[::-1])[inside]) / jnp.linalg.norm(u[::-1][inside]) for name in names}
print({name: f"{value:.1e}" for name, value in error.items()}, "in the last 1.9 units of time")
assert error["legt"] < 0.01 < error["fout"] < error["legs"] < 0.1 < error["lagt"]

# %% [markdown]
# Nothing in this loop looks back. A step costs one product of $A$ with $x$,
# and what is kept between steps is $x$, no matter how long the signal has
# been. That is the property for which recurrent models are wanted at all, and
# the next notebooks hold on to it; what a plain recurrent network lacks is
# the other half, a guarantee about what the state contains.
#
# ## What the state has seen: kernels
#
# There is a second way to read (1), and it leads to S4. Start with $x = 0$
# and let $u$ be a single sharp pulse at time 0. The equation's solution from
# then on is $x(t) = e^{tA} B$, a matrix exponential. But (1), with nothing
# else in the past than a pulse of age $t$, says that
# $x_n(t) = p_n(t)\, w(t)$. Hence
#
# $$(e^{tA} B)_n = p_n(t)\, w(t) . \tag{3}$$
#
# The state's response to a pulse *is* the weighted basis. And since the
# equation is linear, the state at any time is the sum of the responses to all
# that came before, which is a convolution: $x_n = u * (p_n w)$. A layer that
# reads the state by a row $C$ of learned numbers convolves its input with the
# kernel $\sum_n C_n\, p_n w$. It has the whole history at its disposal,
# expressed in a good basis, and learns only which combination of it to look
# at.
#
# For `legs` (3) holds exactly. For `legt` it holds in the window, up to the
# approximation made when $u(t-2)$ was read off the coefficients: with a
# finite $N$ the window's edge is not sharp, and the response echoes beyond
# it.

# %%
N, dt, length = 32, 1 / 128, 512
ages, responses = np.arange(1, length + 1) * dt, {}
for name in ("legs", "legt"):
    A, B = map(jnp.asarray, hippo.measure(name, N))
    decay = discretize_dense("zoh", A, dt).decay
    responses[name] = dense_recurrence(decay, jnp.zeros((1, length, N)), B[None])[0][0]
curves = lambda name: {f"$n = {n}$": (ages, responses[name][:, n]) for n in (0, 1, 2, 5)}
axes = dict(xlabel="time since the pulse", ylim=(-3.5, 3.5), columns=2)
show(*[lines(curves(name), title=rf"$e^{{tA}}B$ of {name}", **axes) for name in responses])

assert np.allclose(responses["legs"], basis("legs", N, ages) * np.exp(-ages)[:, None], atol=1e-9)
inside = (ages > 0.3) & (ages < 1.7)
assert np.allclose(responses["legt"][inside, :6], basis("legt", N, ages)[inside, :6] / 2, atol=0.2)

# %% [markdown]
# The small ripples on the right are the same thing: the response is a sum of
# what 32 functions can make of a window with sharp edges. They get finer as
# $N$ grows, as the ripples of a Fourier series do beside a jump, and the
# average over them is right, but at no $N$ do they vanish. A model that reads
# `legt` hears them; `legs`, whose measure has no edge, has none. That is one
# reason for its success.
#
# ## No timescale at all
#
# Every measure so far has a clock: windows of two units, a fading within one.
# Played at twice the speed, a signal would need other memories. The first
# LegS of the HiPPO paper has none. Its measure is uniform on the *whole* past
# $[0, t]$, however long that has become, and because the window grows with
# $t$ the equation gets a factor:
#
# $$x'(t) = \frac{1}{t} \left( A\, x(t) + B\, u(t) \right)$$
#
# with the very same $A$ and $B$ of `legs`. (In logarithmic time $\ln t$ it is
# the equation from before. S4 dropped the factor $1/t$ to have a system that
# does not change with time; its $e^{-\tau}$ is what became of the uniform
# measure.) Only the ratio $dt / t = 1/k$ enters at step $k$, so that no step
# size has to be given: `project` needs none.
#
# The price is paid in the eigenvalues. Those of `legs` are
# $-1, -2, \dots, -N$, and in the first steps $1/k$ is not small: a rule that
# follows the slope at the start of a step (`forward_euler`) overflows, which
# is why `project` uses another. Notebook 2 explains the difference.
#
# Below, the memory describes all that it has seen after a third, two thirds
# and the end of the signal, with 48 numbers each time. The same signal
# sampled half as finely, that is played at twice the speed, ends with the
# same numbers.

# %%
c = project("scaled_legs", u, 48)
shares = np.linspace(0, 1, 600)
memory = lambda k: (t[k - 1] * (1 - shares), reconstruct("scaled_legs", c[k - 1], shares))
curves = lambda k: {"signal": (t, u), f"memory at {t[k - 1]:.0f}": memory(k)}
axes = dict(xlabel="time", ylim=(-1.9, 3.0), legend="upper center")
show(*[lines(curves(k), **axes) for k in (1024, 2048, 3072)], width=13, height=3.4)

twice_as_fast = project("scaled_legs", u[1::2], 48)[-1]
assert jnp.linalg.norm(twice_as_fast - c[-1]) / jnp.linalg.norm(c[-1]) < 0.02
with_clock, as_fast = (project("legt", each, 48, 1 / 512)[-1] for each in (u, u[1::2]))
assert jnp.linalg.norm(as_fast - with_clock) / jnp.linalg.norm(with_clock) > 0.5

# %% [markdown]
# ## How many numbers
#
# That $A$ is lower triangular has a pleasant consequence: $x_0$ depends on
# itself alone, $x_1$ on $x_0$ and itself, and so on. The first sixteen
# coefficients of a memory of 64 are the same as those of a memory of 16. More
# states refine, they do not rearrange.
#
# Turn the knob to see the past sharpen. A smooth signal is held to the last
# detail once $N$ exceeds what its fastest wave needs, and from there on the
# error falls off a cliff, down to what the size of the time steps allows. A
# jump is never held: the best $N$ smooth functions overshoot beside it, and
# the error falls like $1/\sqrt{N}$ only.

# %%
jump = jnp.where((t > 2.0) & (t < 4.5), 1.0, -0.5)
signals = {"smooth": u, "jumps": jump}
c = {name: project("scaled_legs", signal, 64)[-1] for name, signal in signals.items()}
recall = lambda name, n: reconstruct("scaled_legs", c[name][:n], np.arange(len(t)) / len(t))[::-1]
curves = lambda name, n: {"signal": (t, signals[name]), f"$N = {n}$": (t, recall(name, n))}
axes = dict(xlabel="time", ylim=(-1.9, 2.8), legend="upper center", columns=2)
knob(lambda N: show(*[lines(curves(name, N), title=name, **axes) for name in signals], height=3.4), N=range(4, 65, 4))

# %%
sizes = np.arange(4, 65, 4)
off = lambda name, n: jnp.sqrt(jnp.mean((recall(name, n) - signals[name]) ** 2))
rms = {name: [off(name, n) for n in sizes] for name in signals}
curves = {name: (sizes, errors, "o-") for name, errors in rms.items()}
show(lines(curves, xlabel="$N$", ylabel="error (root mean square)", yscale="log"), width=6.5, height=3.6)

assert jnp.allclose(project("scaled_legs", u, 16)[-1], c["smooth"][:16], atol=1e-10)
assert rms["smooth"][-1] < 0.02 * rms["smooth"][3] and rms["jumps"][-1] > 0.2 * rms["jumps"][3]

# %% [markdown]
# ## What to take along
#
# * A memory of $N$ numbers is a choice of what matters (a measure) and of
#   functions that are orthogonal under it; $A$ and $B$ follow.
# * The state's response to a pulse is the basis, weighted:
#   $e^{tA} B = p_n w$. A linear read-out of the state is a convolution of the
#   past with a kernel in that basis.
# * `legs` is the one that lasted: lower triangular, long-sighted, and, with
#   $1/t$, without any timescale.
#
# Next: from continuous time to tokens, in notebook 2; then what it takes to
# compute with these matrices, in notebook 3.
