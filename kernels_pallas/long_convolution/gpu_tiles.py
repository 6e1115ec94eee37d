"""What a warpgroup does with one tile: fetch it, multiply it by tables, let states cross its chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.associative_scan.reference import plus, times

CHUNK = 64  # tokens
STATES = 32  # complex, of one channel
GROUP = 128 // STATES  # sequences that share a tile: a lane for each of their states
ROWS = CHUNK // GROUP  # chunks of each sequence in a tile
TILE = ROWS * CHUNK  # tokens
AT_ONCE = 4  # chunks whose summaries are loaded before the first is used
PADDED = 2 * STATES + 8  # columns of a tile's states: rows a multiple of 32 words apart would share their banks
WGMMA = plgpu.Layout.WGMMA
LANES = plgpu.Layout.TILED(plgpu.Tiling(((GROUP, STATES), (1,))), (-3,), (-2,), -1)
ALL = slice(None)
AXES = ("channel", "group")
SUMMARIES = plgpu.SMEM((GROUP, ROWS, PADDED), jnp.float32)


class Tokens(NamedTuple):
    """An input on its way into shared memory: the next tile is fetched while the last is worked on."""

    s: dict
    name: str
    ref: jax.Ref
    tiles: int
    reverse: bool = False

    def at(self, i):
        """The tile that is visited at step i."""
        return self.tiles - 1 - i if self.reverse else i

    def slot(self, i):
        slots = self.s[self.name]
        return slots.at[jax.lax.rem(i, slots.shape[0])]

    def start(self, *table_refs) -> list[list]:
        """Fetches the first tile, and this channel's tables: their parts."""
        self.fetch(0)
        loaded, tables = self.s[f"{self.name} loaded"], self.s[f"{self.name} tables"]
        for ref, table in zip(table_refs, tables, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[jax.lax.axis_index("channel")], table, loaded)
        plgpu.barrier_wait(loaded)
        return [each(table) for table in tables]

    def fetch(self, i) -> None:
        for g in range(GROUP):
            source, target = self.ref.at[(*mine(), g, self.at(i))], self.slot(i).at[pl.ds(g * ROWS, ROWS)]
            plgpu.copy_gmem_to_smem(source, target, self.s[f"{self.name} arrived"])

    def take(self, i) -> list:
        """The parts of the tile at step i, once it is there."""
        plgpu.barrier_wait(self.s[f"{self.name} arrived"])
        if self.slot(i).dtype == jnp.float32:
            split(self.s[f"{self.name} parts"], plgpu.load(self.slot(i), layout=WGMMA))

        @pl.when(i + 1 < self.tiles)
        def _():
            self.fetch(i + 1)

        return self.parts(i)

    def parts(self, i) -> list:
        """Tokens in bfloat16 as they came, float32 as `take` split them."""
        return [self.slot(i)] if self.slot(i).dtype == jnp.bfloat16 else each(self.s[f"{self.name} parts"])


def meet(barrier) -> None:
    """Waits for the other warpgroup."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def cross(summaries, summary, decay: tuple, h: tuple, reverse: bool) -> tuple:
    """The state after a tile's last chunk, of every chunk's summary; leaves those before every chunk in `summaries`."""
    write(summaries, summary)
    plgpu.commit_smem()

    def advance(i, h):
        rows = [(ALL, ROWS - 1 - (AT_ONCE * i + k) if reverse else AT_ONCE * i + k) for k in range(AT_ONCE)]
        for row, x in zip(rows, [load(summaries, row) for row in rows], strict=True):
            store(summaries, row, h)
            h = plus(times(decay, h), x)
        return h

    h = jax.lax.fori_loop(0, ROWS // AT_ONCE, advance, h)
    plgpu.commit_smem()
    return h


def write(summaries, summary) -> None:
    """A row for every chunk, in the order of a tile's rows."""
    summaries.reshape(CHUNK, PADDED)[...] = summary


def read(summaries):
    """The states that `cross` left, a row for every chunk."""
    return plgpu.load(summaries.reshape(CHUNK, PADDED), layout=WGMMA, optimized=False)[:, : 2 * STATES]


def split(parts, value) -> None:
    """value as a sum of bfloat16 parts, where products read them."""
    for i in range(parts.shape[0]):
        part = value.astype(jnp.bfloat16)
        parts[i] = part
        value = value - part.astype(jnp.float32)
    plgpu.commit_smem()


def each(parts) -> list:
    """The parts of an operand."""
    return [parts.at[i] for i in range(parts.shape[0])]


def multiply(total, left: list, right: list, over_rows: bool = False) -> None:
    """total += left right^T, or left^T right over the rows, of parts; the products too small to matter are left out."""
    count = max(len(left), len(right))
    for i, a in enumerate(left):
        for b in right[: count - i]:
            plgpu.wgmma(total, *((a.T, b) if over_rows else (a, b.T)))


def product(left: list, right: list):
    """left right^T of parts."""

    def alone(total):
        multiply(total, left, right)
        return value(total)

    return pl.run_scoped(alone, plgpu.ACC((CHUNK, right[0].shape[0]), jnp.float32))


def value(total):
    """What an accumulator holds. The barrier keeps the compiler from moving uses of it before the wait for it."""
    return jax.lax.optimization_barrier(total[...])


def mine() -> tuple:
    """Where this warpgroup's sequences lie in an array (channel, group, ...)."""
    return tuple(map(jax.lax.axis_index, AXES))


def load(ref, index: tuple) -> tuple:
    """Both planes of states, a lane for each."""
    planes = pl.ds(0, STATES), pl.ds(STATES, STATES)
    return tuple(plgpu.load(ref.at[(*index, plane)], layout=LANES, optimized=False) for plane in planes)


def store(ref, index: tuple, states: tuple) -> None:
    """What `load` loads."""
    for i, state in enumerate(states):
        ref[(*index, pl.ds(i * STATES, STATES))] = state


def scratch(name: str, dtype, parts: int, *tables: jax.Array) -> dict:
    """Shared memory of an input and its tables. Products read tokens in bfloat16 from where they arrive, so that the
    next tile needs another place."""
    narrow = dtype == jnp.bfloat16
    scratch = {name: matrix(dtype, 1 + narrow)} | ({} if narrow else {f"{name} parts": matrix(jnp.bfloat16, parts)})
    return scratch | {
        f"{name} tables": [matrix(table.dtype, *table.shape[1:3]) for table in tables],
        f"{name} loaded": plgpu.Barrier(num_arrivals=len(tables)),
        f"{name} arrived": plgpu.Barrier(num_arrivals=GROUP),
    }


def matrix(dtype, count: int | None = None, rows: int = CHUNK):
    """Matrices of 64 columns in shared memory, as the tensor cores and the copy engine want them."""
    shape = (rows, CHUNK) if count is None else (count, rows, CHUNK)
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))
