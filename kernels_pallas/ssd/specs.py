"""Shapes that tests and benchmarks name: batch, length, heads, their channels, groups, states."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    length: int
    heads: int
    channels: int
    groups: int
    states: int
    dtype: str

    def __str__(self) -> str:
        batch, length, heads, channels, groups, states, dtype = self
        return f"B{batch} L{length} H{heads} P{channels} G{groups} N{states} {dtype} dt D"


CPU = (Spec(2, 1024, 8, 64, 1, 64, "float32"),)
GPU = (
    Spec(8, 4096, 64, 64, 1, 128, "bfloat16"),
    Spec(1, 65536, 64, 64, 1, 128, "bfloat16"),
    Spec(8, 4096, 16, 128, 1, 128, "bfloat16"),
)
