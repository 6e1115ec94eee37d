"""The language model: an embedding, residual blocks described by a pattern of mixers, and a head."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import at_least_float32
from ssm.blocks import ResidualBlock, RMSNorm
from ssm.cross_entropy import cross_entropy
from ssm.mixers import mixer
from ssm.models import DTYPES, checked_layers

ROUNDED = ("in_proj", "x_proj", "out_proj", "gate", "up", "down", "head")  # the layers that multiply activations


def check_tokens(name: str, tokens: np.ndarray, vocabulary: int) -> None:
    """Raises ValueError naming a token that is not one of 0 to vocabulary - 1."""
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if wrong.size:
        raise ValueError(f"{name}: {wrong[0]} is outside the vocabulary, whose {vocabulary} tokens count from 0")


def _through(blocks, x, states, segment_ids, train: bool, *, remat: bool):
    """(x, states) after one block after another; states None: every block starts from nothing."""

    def run(block, x, state):
        return block(x, state, segment_ids, train)

    ends = []
    for block, state in zip(blocks, states or [None] * len(blocks), strict=True):
        x, state = (nn.remat(run) if remat else run)(block, x, state)
        ends.append(state)
    return x, tuple(ends)


class Repeat(nn.Module):
    """One run through the pattern: what `LanguageModel` scans over where `scan_layers` is on."""

    mixers: tuple[tuple[str, Mapping[str, Any]], ...]
    block: Callable[..., ResidualBlock]

    def setup(self):
        for i, (name, options) in enumerate(self.mixers):
            setattr(self, f"block_{i}", self.block(name, options))

    def __call__(self, x, states, segment_ids, train: bool, *, remat: bool):
        blocks = [getattr(self, f"block_{i}") for i in range(len(self.mixers))]
        return _through(blocks, x, states, segment_ids, train, remat=remat)


class LanguageModel(nn.Module):
    """The logits of each token's successor: embedding, residual blocks, norm, head.

    vocabulary: how many tokens. pattern, depth: see `layers`; mixers: options by the mixer's name.
    tie_embeddings: the head is the embedding, transposed. mlp_size, norm_eps, dropout: see `ResidualBlock`.
    scan_layers: one compiled copy of the pattern, its parameters stacked under `blocks` (see `stack_blocks`);
    depth is then a multiple of the pattern's length. remat: blocks are computed again in the backward pass.
    dtype: of activations; parameters, residuals, states and logits are float32.
    Initialised as GPT-2 and Mamba are: embedding N(0, 0.02); see `ResidualBlock` for what writes to the residual.
    """

    vocabulary: int
    width: int = 256
    depth: int = 4
    pattern: str = "s4d"
    mixers: Mapping[str, Mapping[str, Any]] = FrozenDict()
    tie_embeddings: bool = True
    mlp_size: int | None = 0
    norm_eps: float = 1e-5
    dropout: float = 0.0
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        # Hashable, so that a compiled function can belong to a model.
        self.mixers = FrozenDict({name: FrozenDict(options) for name, options in self.mixers.items()})
        super().__post_init__()

    def setup(self):
        mixers = [(name, self.mixers.get(name, {})) for name in self.layers()]
        normal = nn.initializers.normal(0.02)
        self.embedding = nn.Embed(self.vocabulary, self.width, embedding_init=normal)
        block = partial(
            ResidualBlock,
            mlp_size=self.mlp_size,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            writes=self.depth * (1 if self.mlp_size == 0 else 2),
            dtype=DTYPES[self.dtype],
        )
        if self.scan_layers:
            self.blocks = Repeat(tuple(mixers[: len(self.pattern.split())]), block)
        else:
            for i, (name, options) in enumerate(mixers):
                setattr(self, f"block_{i}", block(name, options))
        self.norm = RMSNorm(self.norm_eps)
        if not self.tie_embeddings:
            dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
            options = dict(use_bias=False, dtype=DTYPES[self.dtype], kernel_init=normal, dot_general=dot)
            self.head = nn.Dense(self.vocabulary, **options)

    def layers(self) -> list[str]:
        """The mixer of every layer. Raises ValueError naming the field that does not fit."""
        names, period = checked_layers(self), len(self.pattern.split())
        if self.vocabulary < 1:
            raise ValueError(f"vocabulary is {self.vocabulary}; it must be at least 1")
        if self.mlp_size is not None and self.mlp_size < 0:
            raise ValueError(f"mlp_size is {self.mlp_size}; it must be None, 0 for no MLP, or its hidden size")
        if self.scan_layers and self.depth % period:
            raise ValueError(f"depth is {self.depth}; scan_layers takes a multiple of the pattern's {period} layers")
        return names

    def __call__(
        self,
        tokens: Int[Array, "b l"],
        state: tuple | None = None,
        *,
        segment_ids: Int[Array, "b l"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b l v"], tuple]:
        """Logits of the next token at every token, and the state after the last.

        segment_ids: a token whose id differs from the one before it sees nothing from before it: packed documents.
        train: dropout is on. Raises ValueError for a state of another model or batch size and, outside jit,
        for a token outside the vocabulary (inside jit its row of logits is NaN).
        """
        x, state = self.hidden(tokens, state, segment_ids=segment_ids, train=train)
        return self.logits(x), state

    def step(self, tokens: Int[Array, " b"], state: tuple) -> tuple[Float[Array, "b v"], tuple]:
        """Logits after one more token of each row. Raises as `__call__` does."""
        x, state = self.hidden(tokens, state)
        return self.logits(x), state

    def initial_state(self, batch_size: int) -> tuple:
        """One mixer state a layer, batch first."""
        options = [(name, self.width, self.mixers.get(name, {})) for name in self.layers()]
        return tuple(mixer(*each, parent=None).initial_state(batch_size) for each in options)

    def cross_entropy(
        self,
        tokens: Int[Array, "b l"],
        targets: Int[Array, "b l"],
        weights: Float[Array, "b l"] | None = None,
        *,
        segment_ids: Int[Array, "b l"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, ""], Float[Array, " b"]]:
        """The sums of `ssm.cross_entropy`, of every token's logits: what to train by. Raises as `__call__` does."""
        x, _ = self.hidden(tokens, segment_ids=segment_ids, train=train)
        if self.tie_embeddings:
            return cross_entropy(x, self.embedding.embedding, targets, weights)
        return cross_entropy(x, self.head.variables["params"]["kernel"].T, targets, weights)

    def logits(self, x: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """What the head says of `hidden`."""
        if not self.tie_embeddings:
            return self.head(x)
        kernel = self.embedding.embedding.astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, kernel, preferred_element_type=jnp.float32)

    def hidden(
        self,
        tokens: Int[Array, "b ..."],
        state: tuple | None = None,
        *,
        segment_ids: Int[Array, "b l"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b ... d"], tuple]:
        """What the head reads, (b, l, d) or, for one token a row, (b, d); and the state. Raises as `__call__` does."""
        self._check(tokens, state)
        x = self.embedding(tokens)
        x = x.astype(at_least_float32(x.dtype))
        run = self._scanned if self.scan_layers else self._unrolled
        x, state = run(x, state, segment_ids, train)
        return self.norm(x).astype(DTYPES[self.dtype]), state

    def _unrolled(self, x, state, segment_ids, train):
        blocks = [getattr(self, f"block_{i}") for i in range(self.depth)]
        return _through(blocks, x, state, segment_ids, train, remat=self.remat)

    def _scanned(self, x, state, segment_ids, train):
        period = len(self.pattern.split())
        scan = nn.scan(
            lambda repeat, x, states: repeat(x, states, segment_ids, train, remat=self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth // period,
        )
        if state is not None:
            state = tuple(jax.tree.map(lambda *s: jnp.stack(s), *state[i::period]) for i in range(period))
        x, ends = scan(self.blocks, x, state)
        return x, tuple(jax.tree.map(lambda s: s[i // period], ends[i % period]) for i in range(self.depth))  # noqa: B023

    def _check(self, tokens, state):
        if not isinstance(tokens, jax.core.Tracer):
            check_tokens("tokens", np.asarray(tokens), self.vocabulary)
        if state is None:
            return
        expected = jax.eval_shape(lambda: self.initial_state(len(tokens)))
        if len(state) != self.depth:
            raise ValueError(f"state has {len(state)} layers; this model has {self.depth}")
        for i, (given, wanted) in enumerate(zip(state, expected, strict=True)):
            shapes = [jax.tree.map(jnp.shape, each) for each in (given, wanted)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"state of layer {i} is {shapes[0]}; this model and batch size have {shapes[1]}")


def stack_blocks(params: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The parameters of a model without `scan_layers` as those of one with it; period: the pattern's length."""
    depth = sum(name.startswith("block_") for name in params)
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    runs = {
        f"block_{i}": jax.tree.map(lambda *p: jnp.stack(p), *(params[f"block_{j}"] for j in range(i, depth, period)))
        for i in range(period)
    }
    return rest | {"blocks": runs}


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """`stack_blocks` undone."""
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    period = len(params["blocks"])
    depth = period * len(jax.tree.leaves(params["blocks"])[0])
    return rest | {
        f"block_{j}": jax.tree.map(lambda p: p[j // period], params["blocks"][f"block_{j % period}"])  # noqa: B023
        for j in range(depth)
    }


def for_steps(model: LanguageModel, variables: Mapping[str, Any]) -> tuple[LanguageModel, dict[str, Any]]:
    """The same model for one token after another, with the same numbers, and its variables.

    Without `scan_layers`, which moves every layer's state and weights to a place of its own at every token; and the
    weights of products in the activations' dtype, to which they are rounded at every token else. The embedding, which
    is read in its own precision, then has a rounded copy for a head.
    """
    dtype, params = DTYPES[model.dtype], dict(variables["params"])
    params = unstack_blocks(params) if model.scan_layers else params
    tied = model.tie_embeddings and params["embedding"]["embedding"].dtype == dtype
    if model.tie_embeddings and not tied:
        params["head"] = {"kernel": params["embedding"]["embedding"].T}

    def rounded(path, leaf):
        *_, module, name = ("", *(key.key for key in path))
        return leaf.astype(dtype) if name == "kernel" and module in ROUNDED else leaf

    params = jax.tree_util.tree_map_with_path(rounded, params)
    return model.clone(scan_layers=False, tie_embeddings=tied), dict(variables) | {"params": params}
