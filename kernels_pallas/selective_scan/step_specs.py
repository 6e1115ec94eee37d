"""Shapes of one token that tests and benchmarks name: batch, channels, states of a channel, dtype of x and z."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    channels: int
    states: int
    dtype: str

    def __str__(self) -> str:
        return f"B{self.batch} D{self.channels} N{self.states} {self.dtype} gated"


CPU = (Spec(8, 2048, 16, "float32"),)
GPU = (
    Spec(128, 4096, 16, "bfloat16"),
    Spec(512, 4096, 16, "bfloat16"),
    Spec(1, 4096, 16, "bfloat16"),
)
