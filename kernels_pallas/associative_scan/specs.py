"""Shapes that tests and benchmarks name: batch, length, channels; complex or real; a per token or per channel."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    length: int
    channels: int
    number: str  # "real" | "complex"
    per_token: bool
    dtype: str = "float32"  # of a and b; states in registers are float32

    def __str__(self) -> str:
        decay = "per-token" if self.per_token else "time-invariant"
        return f"B{self.batch} L{self.length} N{self.channels} {self.dtype} {self.number} {decay}"


CPU = (
    Spec(50, 784, 32, "complex", False),
    Spec(1, 16384, 64, "complex", False),
    Spec(8, 1024, 128, "real", True),
)
GPU = (
    Spec(16, 16384, 128, "complex", False),
    Spec(8, 4096, 2048, "real", True, "bfloat16"),
    *(Spec(2**20 // length, length, 128, "complex", False) for length in (2**10, 2**13, 2**16, 2**20)),
)
