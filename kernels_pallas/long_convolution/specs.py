"""Shapes that tests and benchmarks name: batch, length, channels, complex states."""

from typing import NamedTuple


class Spec(NamedTuple):
    batch: int
    length: int
    channels: int
    states: int
    channels_first: bool = False

    def __str__(self) -> str:
        shape = f"B{self.batch} L{self.length} H{self.channels} N{2 * self.states} float32 causal"
        return shape + " channels first" * self.channels_first


CPU = (Spec(50, 784, 64, 16), Spec(50, 784, 64, 32), Spec(4, 4096, 64, 32))
GPU = (Spec(16, 16384, 256, 32), Spec(16, 16384, 256, 32, True))
