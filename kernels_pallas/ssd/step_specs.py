"""Shapes of one token that tests and benchmarks name: batch, heads, channels, groups, states, lanes in and out."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    heads: int
    channels: int
    groups: int
    states: int
    written: int
    read: int
    dtype: str

    def __str__(self) -> str:
        batch, heads, channels, groups, states, written, read, dtype = self
        return f"B{batch} H{heads} P{channels} G{groups} N{states} r{written} s{read} {dtype}"


CPU = (Spec(8, 16, 64, 1, 64, 1, 1, "float32"),)
GPU = (
    Spec(128, 64, 64, 1, 128, 1, 1, "bfloat16"),
    Spec(128, 64, 64, 64, 128, 2, 1, "float32"),
    Spec(128, 64, 64, 64, 128, 8, 4, "float32"),
    Spec(1, 64, 64, 1, 128, 1, 1, "bfloat16"),
)
