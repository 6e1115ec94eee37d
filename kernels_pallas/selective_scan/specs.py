"""Shapes that tests and benchmarks name: batch, length, channels, states of a channel, and the dtype of x, dt and z."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    length: int
    channels: int
    states: int
    dtype: str

    def __str__(self) -> str:
        return f"B{self.batch} L{self.length} D{self.channels} N{self.states} {self.dtype} gated"


CPU = (Spec(2, 1024, 256, 16, "float32"),)
GPU = (
    Spec(8, 4096, 2048, 16, "bfloat16"),
    Spec(1, 65536, 2048, 16, "bfloat16"),
    Spec(8, 4096, 2048, 64, "bfloat16"),
    Spec(8, 4096, 2048, 16, "float32"),
)
