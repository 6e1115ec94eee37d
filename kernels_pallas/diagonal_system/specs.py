"""Shapes that tests and benchmarks name: batch, length, channels, complex states."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    length: int
    channels: int
    states: int
    dtype: str = "float32"  # of tokens

    def __str__(self) -> str:
        return f"B{self.batch} L{self.length} H{self.channels} P{self.states} {self.dtype}"


CPU = (Spec(50, 784, 96, 64), Spec(1, 16384, 128, 64))
GPU = (
    Spec(16, 16384, 256, 128),
    Spec(16, 16384, 256, 128, "bfloat16"),
    Spec(16, 16384, 128, 64, "bfloat16"),
    Spec(64, 1024, 256, 256, "bfloat16"),
)
