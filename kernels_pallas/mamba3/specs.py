"""Shapes that tests and benchmarks name: batch, length, lanes, heads, their channels, groups, states."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    length: int
    rank: int
    heads: int
    channels: int
    groups: int
    states: int
    dtype: str

    @property
    def planes(self) -> int:
        """A half of the states turns, as in the published models."""
        return self.states // 4

    def __str__(self) -> str:
        batch, length, rank, heads, channels, groups, states, dtype = self
        lanes = f" R{rank}" if rank > 1 else ""
        return f"B{batch} L{length}{lanes} H{heads} P{channels} G{groups} N{states} {dtype} D gated"


CPU = (Spec(2, 1024, 1, 8, 64, 1, 64, "float32"), Spec(2, 1024, 4, 4, 64, 1, 64, "float32"))
GPU = (
    Spec(8, 4096, 1, 64, 64, 1, 128, "bfloat16"),
    Spec(8, 4096, 4, 32, 64, 1, 128, "bfloat16"),
    Spec(1, 65536, 1, 64, 64, 1, 128, "bfloat16"),
)
