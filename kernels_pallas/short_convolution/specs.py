"""Shapes that tests and benchmarks name: batch, length, channels, taps, and the dtype of the tokens."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    length: int
    channels: int
    taps: int
    dtype: str

    def __str__(self) -> str:
        return f"B{self.batch} L{self.length} D{self.channels} k{self.taps} {self.dtype} silu"


CPU = (Spec(2, 1024, 256, 4, "float32"),)
GPU = (
    Spec(8, 4096, 2048, 4, "bfloat16"),
    Spec(8, 4096, 2304, 4, "bfloat16"),
    Spec(1, 65536, 2048, 4, "bfloat16"),
    Spec(8, 4096, 2048, 4, "float32"),
)
