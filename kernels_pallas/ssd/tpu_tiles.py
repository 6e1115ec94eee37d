r"""What a TPU does with a tile of state space duality: the chunk of 128 rows of as many heads as fill the lanes.

A row is a token, or one of the r that a token has; the channels of `together` heads are the 128 lanes. What rows say to
each other is packed alike: in block j of a chunk's rows, of which there are `together` too, lane i is row j p + i mod p
of head i div p, so that the same lanes belong to the same head everywhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Q = LANES = 128  # rows of a chunk, and lanes of a tile


class Gates(NamedTuple):
    """Of a tile's rows, (q, lanes), each head's in its lanes."""

    sums: jax.Array  # log2 decays from the start of the chunk
    dt: jax.Array
    weight: jax.Array  # of what rows write into the state at the end of the chunk: decay, and dt
    packed: list[jax.Array]  # the sums of the rows of every block, (1, lanes)

    def decay(self, j: int) -> jax.Array:
        """What is left at every row, from block j on, of what entered at the rows of block j, as packed."""
        p = Q // len(self.packed)
        same, later = (self.sums[rows] - self.packed[j] for rows in (slice(j * p, (j + 1) * p), slice((j + 1) * p, Q)))
        same = jnp.minimum(same, 0)  # rows that do not see each other have finite numbers too
        return jnp.exp2(same if j + 1 == len(self.packed) else jnp.concatenate([same, later]))

    @property
    def to_here(self) -> jax.Array:
        return jnp.exp2(self.sums)

    @property
    def to_end(self) -> jax.Array:
        return jnp.exp2(self.sums[Q - 1 :] - self.sums)

    @property
    def through(self) -> jax.Array:
        return jnp.exp2(self.sums[Q - 1 :])


class Tile(NamedTuple):
    """The sizes of a tile, and what they make of products."""

    p: int
    n: int
    rank: int
    groups: int  # that its heads read

    @property
    def together(self) -> int:
        """Heads of a tile."""
        return LANES // self.p

    def blocks(self) -> list[tuple[int, slice, slice]]:
        """(j, its rows, all rows that see them) of the blocks of rows that are packed into the lanes."""
        return [(j, slice(j * self.p, (j + 1) * self.p), slice(j * self.p, Q)) for j in range(self.together)]

    def head(self, rows: int) -> jax.Array:
        """Of every lane of a tile."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
        return jax.lax.shift_right_logical(lane, self.p.bit_length() - 1)

    def score(self, ref, B: jax.Array, C: jax.Array) -> None:
        """C B^T, of what rows see, as packed; B and C (q, groups n)."""
        for j, block, below in self.blocks():
            keys = self.copies(B[block])
            ref[j, below] = self.seen(self.by_group(lambda n, C=C[below], B=keys: dot(C[:, n], B[:, n], (1, 1))))

    def inside(self, scores_ref, gate: Gates, x: jax.Array) -> jax.Array:
        """What the rows of a tile read of each other, x (q, lanes) scaled by dt."""
        blocks = [0.0] * self.together
        for j, block, below in self.blocks():
            weight = (scores_ref[j, below] * gate.decay(j)).astype(x.dtype)
            found = dot(weight, self.apart(x[block]))
            for i in range(j, self.together):
                blocks[i] += found[(i - j) * self.p : (i - j + 1) * self.p]
        return jnp.concatenate(blocks)

    def read(self, C: jax.Array, state: jax.Array) -> jax.Array:
        """C's rows (q, groups n) times a tile's state (n, lanes)."""
        return self.by_group(lambda n: dot(C[:, n], state))

    def write(self, keys_ref, gate: Gates, state: jax.Array, x: jax.Array) -> jax.Array:
        """The state after the chunk, of keys (groups n, q) and weighted x (q, lanes)."""
        return state * gate.through + self.by_group(lambda n: dot(keys_ref[n], x))

    def by_group(self, function: Callable) -> jax.Array:
        """function(the states of a group, in a block's lanes), in the lanes of the heads that read it."""
        total = function(slice(0, self.n))
        for g in range(1, self.groups):
            here = self.head(len(total)) >= g * (self.together // self.groups)
            total = jnp.where(here, function(slice(g * self.n, (g + 1) * self.n)), total)
        return total

    def own(self, g: int, v: jax.Array) -> jax.Array:
        """v, and 0 in the lanes of heads that do not read group g."""
        if self.groups == 1:
            return v
        each = self.together // self.groups
        return jnp.where((self.head(len(v)) >= g * each) & (self.head(len(v)) < (g + 1) * each), v, 0)

    def seen(self, v: jax.Array) -> jax.Array:
        """v (rows that see block j, rows of the block as packed), and 0 where a row's token is before."""
        row = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) | (self.rank - 1)
        lane = jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) & (self.p - 1)
        return jnp.where(row >= lane, v, 0)

    def copies(self, v: jax.Array) -> jax.Array:
        """A block's rows once for every head."""
        return jnp.concatenate([v] * self.together)

    def apart(self, v: jax.Array) -> jax.Array:
        """A block's rows (p, lanes) once for every head, each in the lanes of its own: (heads p, lanes)."""
        if self.together == 1:
            return v
        whole = pltpu.bitcast(v, jnp.int32)  # registers of pairs of rows, where rows are of 16 bits
        head = self.head(len(whole))
        kept = [jnp.where(head == i, whole, 0) for i in range(self.together)]
        return jnp.concatenate([pltpu.bitcast(rows, v.dtype) for rows in kept])

    def joined(self, v: jax.Array) -> jax.Array:
        """Of rows (heads p, lanes), each head's in the lanes of its own: (p, lanes)."""
        head, total = self.head(self.p), v[: self.p]
        for i in range(1, self.together):
            total = jnp.where(head == i, v[i * self.p : (i + 1) * self.p], total)
        return total

    def of_heads(self, v: jax.Array) -> jax.Array:
        """Sums over the lanes of every head (q, lanes): (heads, q)."""
        return v.T.reshape(self.together, self.p, Q).sum(1)


def dot(left: jax.Array, right: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """Their product over an axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
