"""What a warpgroup does with one tile of tokens: fetch it and the matrices, let states cross it, send outputs back."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.associative_scan.reference import plus, times
from kernels_pallas.long_convolution import gpu_tiles as tile
from kernels_pallas.long_convolution.gpu_tiles import ALL, AT_ONCE, CHUNK, GROUP, PADDED, ROWS, WGMMA

SHARED_BYTES = 226 * 1024


class Plan(NamedTuple):
    """What a kernel is made for."""

    dtype: jnp.dtype  # of tokens
    d: int
    slabs: int  # of STATES states
    parts: int  # of a factor: one of bfloat16 tokens
    tiles: int  # of a row
    reverse: bool
    adjoint: bool  # what is carried has been decayed already
    reads: bool  # outputs too, not the last states alone

    @property
    def narrow(self) -> bool:
        return self.dtype == jnp.bfloat16

    @property
    def columns(self) -> range:
        """Of CHUNK channels."""
        return range(self.d // CHUNK)

    @property
    def matrices(self) -> int:
        """Parts of B, and if outputs are read of C, of all slabs: what passes through the ring for one tile."""
        return self.slabs * self.parts * (1 + self.reads)

    def _fit(self, warpgroups: int) -> int:
        """Stages of the ring beside so many warpgroups."""
        x = 2 * self.parts * CHUNK * self.d + (0 if self.narrow else 2 * 4 * CHUNK * CHUNK)
        h = 2 * self.parts * CHUNK * CHUNK if self.reads else 0
        own = x + h + 4 * math.prod(tile.SUMMARIES.shape)
        free = SHARED_BYTES - warpgroups * own - 2 * (PADDED - CHUNK) * self.d
        fit = min(self.matrices, free // (2 * CHUNK * self.d))
        return fit - fit % self.parts

    @property
    def warpgroups(self) -> int:
        return 2 if self._fit(2) >= min(3, self.matrices) else 1

    @property
    def stages(self) -> int:
        return self._fit(self.warpgroups)

    def scratch(self) -> dict:
        return self.own(self.warpgroups) | {
            "ring": matrix(self.stages * CHUNK + PADDED - CHUNK, self.d),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=self.stages),
            "free": plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=self.stages),
        }

    def own(self, warpgroups: int) -> dict:
        """What each of the warpgroups has for itself."""
        scratch = {
            "x": matrix(warpgroups, self.parts, CHUNK, self.d),
            "x arrived": plgpu.Barrier(num_arrivals=GROUP, num_barriers=warpgroups),
            "summaries": plgpu.SMEM((warpgroups, *tile.SUMMARIES.shape), jnp.float32),
        }
        if not self.narrow:
            stage = tile.matrix(jnp.float32)
            scratch["stage"] = plgpu.SMEM((warpgroups, 2, *stage.shape), jnp.float32, transforms=stage.transforms)
        return scratch | ({"h": matrix(warpgroups, self.parts, CHUNK, CHUNK)} if self.reads else {})


def matrix(*shape: int):
    """Operands of the tensor cores in shared memory."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


class Ring(NamedTuple):
    """The parts of all matrices, in the order of their use, tile after tile, on their way into shared memory."""

    s: dict
    ref: jax.Ref
    plan: Plan
    first: jax.Array  # slab: not all multiprocessors read the same at once

    @property
    def resident(self) -> bool:
        return self.plan.stages == self.plan.matrices

    def start(self) -> None:
        @pl.when(jax.lax.axis_index("warpgroup") == 0)
        def _():
            for k in range(self.plan.stages):
                self._fetch(k)

    def _fetch(self, k) -> None:
        source = self.ref.at[jax.lax.rem(k + self.first * (self.plan.matrices // self.plan.slabs), self.plan.matrices)]
        stage = jax.lax.rem(k, self.plan.stages)
        plgpu.copy_gmem_to_smem(source, self._stage(stage, CHUNK), self.s["full"].at[stage])

    def _stage(self, stage, rows: int):
        """rows of a stage; PADDED ones have some of the next, which no use is made of."""
        return self.s["ring"].at[pl.ds(pl.multiple_of(stage * CHUNK, CHUNK), rows)]

    def use(self, i, j, rows: int, products: Callable) -> None:
        """products(q -> part q of matrix j of tile i); then the next matrices may come."""
        parts, stages, total = self.plan.parts, self.plan.stages, self.plan.tiles * self.plan.matrices
        k = i * self.plan.matrices + j * parts
        for q in range(parts):
            wait = partial(plgpu.barrier_wait, self.s["full"].at[jax.lax.rem(k + q, stages)])
            pl.when(i == 0)(wait) if self.resident else wait()
        products(lambda q: self._stage(jax.lax.rem(k + q, stages), rows))
        plgpu.wgmma_wait(0)
        if self.resident:
            return
        for q in range(parts):
            arrive = partial(plgpu.barrier_arrive, self.s["free"].at[jax.lax.rem(k + q, stages)])
            pl.when(k + q + stages < total)(arrive)
        freed = k - parts * (self.plan.warpgroups - 1)  # the other warpgroup may still be at k

        @pl.when((jax.lax.axis_index("warpgroup") == 0) & (freed >= 0) & (freed + stages < total))
        def _():
            for q in range(parts):
                plgpu.barrier_wait(self.s["free"].at[jax.lax.rem(freed + q, stages)])
                self._fetch(freed + q + stages)


class Tokens(NamedTuple):
    """A tile of tokens in shared memory, and outputs on their way back."""

    s: dict
    ref: jax.Ref
    plan: Plan
    row: jax.Array  # the first of this warpgroup's rows

    def at(self, i):
        """The tile that is visited at step i."""
        return self.plan.tiles - 1 - i if self.plan.reverse else i

    @property
    def operand(self):
        return self.s["x"].at[jax.lax.axis_index("warpgroup")]

    @property
    def _arrived(self):
        return self.s["x arrived"].at[jax.lax.axis_index("warpgroup")]

    def _stage(self, c: int):
        return self.s["stage"].at[jax.lax.axis_index("warpgroup"), c % 2]

    def _blocks(self, ref, i, c: int | None, buffer):
        """For each row its tokens of the tile at step i, or some of their columns, and their place in the buffer."""
        columns = () if c is None else (ALL, pl.ds(c * CHUNK, CHUNK))
        for g in range(GROUP):
            yield ref.at[(self.row + g, self.at(i), *columns)], buffer.at[pl.ds(g * ROWS, ROWS)]

    def start(self, i) -> None:
        """Fetches the tile at step i, or the columns of it that there is a place for."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self._fetch(i, None if self.plan.narrow else 0)

    def _fetch(self, i, c: int | None) -> None:
        for block, place in self._blocks(self.ref, i, c, self.operand.at[0] if c is None else self._stage(c)):
            plgpu.copy_gmem_to_smem(block, place, self._arrived)

    def take(self, i) -> None:
        """The parts of the tile at step i, in `operand`, once it is there."""
        plgpu.barrier_wait(self._arrived)
        for c in () if self.plan.narrow else self.plan.columns:
            more = c + 1 in self.plan.columns
            if more:
                self._fetch(i, c + 1)
            value = plgpu.load(self._stage(c), layout=WGMMA)
            tile.split(self.operand.at[:, :, pl.ds(c * CHUNK, CHUNK)], value)
            if more:
                plgpu.barrier_wait(self._arrived)

    def put(self, i, y, D_ref, y_ref) -> None:
        """y + D x as the outputs of the tile at step i."""
        for c in self.plan.columns:
            columns = pl.ds(c * CHUNK, CHUNK)
            D = plgpu.load(D_ref.at[columns], layout=WGMMA.reduce(0), optimized=False)
            D = jax.lax.broadcast_in_dim(D, (CHUNK, CHUNK), (1,))
            out = y[:, c * CHUNK : (c + 1) * CHUNK]
            for p in range(self.plan.parts):
                x = plgpu.load(self.operand.at[p, :, columns], layout=WGMMA).astype(jnp.float32)
                out = jax.lax.optimization_barrier(out + D * x)
            if self.plan.narrow:
                self.operand[0, :, columns] = out.astype(jnp.bfloat16)
            else:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                self._stage(c)[...] = out
                self._send(i, c, self._stage(c), y_ref)
        if self.plan.narrow:
            self._send(i, None, self.operand.at[0], y_ref)

    def _send(self, i, c: int | None, buffer, y_ref) -> None:
        plgpu.commit_smem()
        for g, (block, place) in enumerate(self._blocks(y_ref, i, c, buffer)):
            plgpu.copy_smem_to_gmem(place, block, commit_group=g == GROUP - 1)


def multiply(parts: int, total, left: Callable, right: Callable) -> None:
    """total += left right of two factors, each the sum of its parts; the products too small to matter are left out.
    In a loop, for fewer addresses in registers."""
    if parts == 1:
        return plgpu.wgmma(total, left(0), right(0))

    def pair(i, _):
        plgpu.wgmma(total, left(i % 2), right(i // 2))
        plgpu.wgmma_wait(0)

    jax.lax.fori_loop(0, 3, pair, None)


def across(summaries, decay: tuple, h: tuple, reverse: bool, adjoint: bool) -> tuple:
    """Leaves the states after every token of a tile in `summaries`, of what enters it; returns what leaves it."""

    def advance(i, h):
        rows = at_once(i, reverse)
        for row, x in zip(rows, [tile.load(summaries, row) for row in rows], strict=True):
            state = plus(h if adjoint else times(decay, h), x)
            tile.store(summaries, row, state)
            h = times(decay, state) if adjoint else state
        return h

    return jax.lax.fori_loop(0, ROWS // AT_ONCE, advance, h)


def at_once(i, reverse: bool) -> list[tuple]:
    """The i-th AT_ONCE tokens of a tile, in the order of the walk."""
    tokens = [AT_ONCE * i + k for k in range(AT_ONCE)]
    return [(ALL, ROWS - 1 - t if reverse else t) for t in tokens]
