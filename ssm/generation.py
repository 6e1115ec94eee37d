"""Reading a prompt, and writing on: prefill, sampling, generation.

A state is a pytree of plain arrays with the batch first, and holds all that a model knows of what it read. Saving it is
saving its leaves; another continuation of one text is its row repeated; going back is going on from an older state.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ssm.language_model import LanguageModel, check_tokens, for_steps

TOGETHER = 64  # tokens written by one program, unless they are streamed
DRAW = ("temperature", "top_k", "top_p", "stop")
Prompts = Sequence[Any] | Int[Array, "b l"] | Int[np.ndarray, "b l"]


class Generation(NamedTuple):
    """What was written: row i's tokens are tokens_bl[i, :lengths_b[i]], its stop token included and repeated after it.

    state: after each row's last token.
    """

    tokens_bl: Int[np.ndarray, "b l"]
    lengths_b: Int[np.ndarray, " b"]
    state: tuple


def candidates(
    logits_bv: Float[Array, "b v"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Log probabilities, not normalised, and tokens, the likeliest first, that `sample` draws from.

    Logits are divided by the temperature; the top_k largest stay (0: all); of those, the fewest whose probability
    is at least top_p. Equal logits are taken in the order of the vocabulary.
    """
    scaled = (logits_bv - logits_bv.max(-1, keepdims=True)) / temperature
    log_p, tokens = jax.lax.top_k(scaled, min(top_k, logits_bv.shape[-1]) or logits_bv.shape[-1])
    if top_p < 1:
        p = jax.nn.softmax(log_p)
        log_p = jnp.where(jnp.cumsum(p, -1) - p < top_p, log_p, -jnp.inf)
    return log_p, tokens


def sample(
    logits_bv: Float[Array, "b v"],
    key: PRNGKeyArray | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, " b"]:
    """A token for each row: the likeliest at temperature 0, else one of `candidates` by its probability.

    Raises ValueError naming the argument that does not fit.
    """
    check_sampling(key, temperature, top_k, top_p)
    if temperature == 0:
        return jnp.argmax(logits_bv, -1).astype(jnp.int32)
    log_p, tokens = candidates(logits_bv, temperature, top_k, top_p)
    drawn = jax.random.categorical(key, log_p)
    return jnp.take_along_axis(tokens, drawn[:, None], 1)[:, 0].astype(jnp.int32)


def check_sampling(key: PRNGKeyArray | None, temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError naming what `sample` cannot take."""
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (the likeliest token) or above")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be 0 (all tokens) or how many to draw from")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1 (all tokens)")
    if temperature > 0 and key is None:
        raise ValueError(f"key is None; temperature {temperature} draws: pass jax.random.key(seed)")


def padded(prompts: Prompts, vocabulary: int) -> tuple[Int[np.ndarray, "b l"], Int[np.ndarray, " b"]]:
    """Prompts of unequal length as one array, zeros after their tokens, and their lengths.

    Raises ValueError where there is no prompt, an empty one, one that is not of integers, or an unknown token.
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows:
        raise ValueError("prompts is empty; there must be at least one")
    for i, row in enumerate(rows):
        if row.size == 0:
            raise ValueError(f"prompt {i} is empty; a model needs a token to go on from")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompt {i} is {row.dtype} of shape {row.shape}; a prompt is a list of integers")
        check_tokens(f"prompt {i}", row, vocabulary)
    lengths = np.array([row.size for row in rows])
    tokens = np.stack([np.pad(row, (0, lengths.max() - row.size)) for row in rows])
    return tokens.astype(np.int32), lengths


def prefill(
    model: LanguageModel,
    variables: Mapping[str, Any],
    prompts: Prompts,
    *,
    state: tuple | None = None,
    piece: int | None = None,
) -> tuple[Float[Array, "b v"], tuple]:
    """Logits of what follows each prompt, and the state after it: as of each prompt alone.

    Rows are aligned at their last token; what stands before the first is a segment of its own, whose state a row
    never takes. state: what the prompts continue. piece: read so many tokens at a time, which bounds the memory
    (None: all at once). Raises ValueError for prompts (see `padded`), a piece or a state that does not fit.
    """
    if piece is not None and piece < 1:
        raise ValueError(f"piece is {piece}; it must be None or at least one token")
    tokens, lengths = padded(prompts, model.vocabulary)
    longest = tokens.shape[1]
    starts = longest - lengths
    tokens = np.stack([np.roll(row, start) for row, start in zip(tokens, starts, strict=True)])
    # A segment begins from nothing, so that a row that has a state must begin with a piece.
    cuts = {0, longest, *range(0, longest, piece or longest)} | (set() if state is None else {*starts.tolist()})
    logits = None
    for start, end in pairwise(sorted(cuts)):
        text = np.arange(start, end)[None] >= starts[:, None]
        mixed = (text[:, 0] != text[:, -1]).any()
        ids = jnp.asarray(text, int) if mixed else None
        logits, state = _read(model, variables, jnp.asarray(tokens[:, start:end]), state, ids, jnp.asarray(text[:, -1]))
    return logits, state


def generate(
    model: LanguageModel,
    variables: Mapping[str, Any],
    prompts: Prompts,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    key: PRNGKeyArray | None = None,
    state: tuple | None = None,
    piece: int | None = None,
) -> Generation:
    """What the model writes after each prompt, until every row has drawn one of `stop`, or max_tokens.

    temperature, top_k, top_p, key: see `sample`; state, piece: see `prefill`. The state that comes back has read the
    prompts and all that was written: prompts that go on from it go on from there. Raises ValueError as these do.
    """
    draw = dict(temperature=temperature, top_k=top_k, top_p=top_p, stop=tuple(stop))
    logits, state = _start(model, variables, prompts, max_tokens, draw, key, state, piece)
    model, variables = for_steps(model, variables)
    kept = jax.tree.map(jnp.copy, state) if stop else None
    written = Written(jnp.int32(0), *_nothing(logits), jnp.zeros(len(logits), jnp.int32), logits, state, kept)
    tokens = []
    for first in range(0, max_tokens, TOGETHER):
        count = min(TOGETHER, max_tokens - first)
        some, written = _write(model, variables, written, key, first + count, **draw)
        tokens.append(np.asarray(some)[:, : int(written.count) - first])
        if stop and not written.active.any():
            break
    state = _choose(written.active, written.state, written.kept) if stop else written.state
    return Generation(np.concatenate(tokens, 1), np.asarray(written.lengths), state)


def stream(
    model: LanguageModel,
    variables: Mapping[str, Any],
    prompts: Prompts,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    key: PRNGKeyArray | None = None,
    state: tuple | None = None,
    piece: int | None = None,
) -> Iterator[Int[Array, " b"]]:
    """`generate`, one token of each row at a time, as soon as it is drawn."""
    draw = dict(temperature=temperature, top_k=top_k, top_p=top_p, stop=tuple(stop))
    logits, state = _start(model, variables, prompts, max_tokens, draw, key, state, piece)
    return _one_by_one(*for_steps(model, variables), logits, state, max_tokens, draw, key)


def _start(model, variables, prompts, max_tokens, draw, key, state, piece):
    """Checks, and reads the prompts."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    check_sampling(key, draw["temperature"], draw["top_k"], draw["top_p"])
    check_tokens("stop", np.asarray(draw["stop"], int), model.vocabulary)
    return prefill(model, variables, prompts, state=state, piece=piece)


def _one_by_one(model, variables, logits, state, max_tokens, draw, key):
    token, active = _nothing(logits)
    for i in range(max_tokens):
        token, active = _draw(logits, key, i, token, active, **draw)
        if i + 1 < max_tokens:
            logits, state = _step(model, variables, token, state)
        yield token
        if draw["stop"] and not active.any():
            return


def _nothing(logits):
    """(token, rows that have not stopped) before the first token."""
    return jnp.zeros(len(logits), jnp.int32), jnp.ones(len(logits), bool)


class Written(NamedTuple):
    """What a text goes on from: `count` tokens are written; kept: the states of rows that have stopped."""

    count: Int[Array, ""]
    token: Int[Array, " b"]
    active: Bool[Array, " b"]
    lengths: Int[Array, " b"]
    logits: Float[Array, "b v"]
    state: tuple
    kept: tuple | None


@partial(jax.jit, static_argnums=0, static_argnames=DRAW, donate_argnums=2)
def _write(model, variables, written, key, end, **draw):
    """(up to TOGETHER tokens, what is written then), token `end` the last: one program for all of them.

    A row that has stopped reads on, and its state is put aside before that: no step moves a state that it has not to.
    """
    first = written.count

    def more(tokens_and_written):
        _, written = tokens_and_written
        return (written.count < end) & (written.active.any() if draw["stop"] else True)

    def write(tokens_and_written):
        tokens_bl, (count, token, active, lengths, logits, state, kept) = tokens_and_written
        token, unfinished = _draw(logits, key, count, token, active, **draw)
        tokens_bl = jax.lax.dynamic_update_index_in_dim(tokens_bl, token, count - first, 1)
        logits, state = _step(model, variables, token, state)
        if draw["stop"]:
            stopped = active & ~unfinished
            kept = jax.lax.cond(stopped.any(), lambda kept: _choose(stopped, state, kept), lambda kept: kept, kept)
        return tokens_bl, Written(count + 1, token, unfinished, lengths + active.astype(jnp.int32), logits, state, kept)

    tokens_bl = jnp.zeros((len(written.token), TOGETHER), jnp.int32)
    return jax.lax.while_loop(more, write, (tokens_bl, written))


@partial(jax.jit, static_argnums=0)
def _read(model, variables, tokens, state, segment_ids, rows):
    """(logits after the last token, state), the state as it was where not `rows`."""

    def last(model):
        x, state_after = model.hidden(tokens, state, segment_ids=segment_ids)
        return model.logits(x[:, -1]), state_after

    logits, after = nn.apply(last, model)(variables)
    return logits, _choose(rows, after, model.initial_state(len(tokens)) if state is None else state)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(model, variables, token, state):
    return model.apply(variables, token, state, method="step")


@jax.jit
def _choose(rows, yes, no):
    """The state `yes` in `rows`, else `no`."""
    where = lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(where, yes, no)


@partial(jax.jit, static_argnames=DRAW)
def _draw(logits, key, i, token, active, *, temperature, top_k, top_p, stop):
    """(tokens, rows that have not stopped); a row that has stopped repeats its last token."""
    drawn = sample(logits, None if key is None else jax.random.fold_in(key, i), temperature, top_k, top_p)
    token = jnp.where(active, drawn, token)
    return token, active & ~jnp.isin(token, jnp.array(stop, jnp.int32))
