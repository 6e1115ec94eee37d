"""Noise in the shape of a task: nothing to learn, but what a training step costs (`experiments.throughput`)."""

import dataclasses

import numpy as np

from experiments.tasks.base import ArrayTask, Examples


@dataclasses.dataclass(frozen=True)
class Options:
    """Real sequences of `channels`, one of `classes` each."""

    name: str
    length: int
    channels: int = 1
    classes: int = 2
    examples: int = 64
    seed: int = 0

    def load(self) -> ArrayTask:
        for field in ("length", "channels", "classes", "examples"):
            if getattr(self, field) < 1:
                raise ValueError(f"task {self.name}: {field}={getattr(self, field)} must be at least 1")
        random = np.random.default_rng(self.seed)
        inputs = random.standard_normal((self.examples, self.length, self.channels), np.float32)
        targets = random.integers(0, self.classes, self.examples, np.int32)
        data = {split: Examples(inputs, targets) for split in ("train", "test")}
        return ArrayTask("continuous", self.channels, self.classes, f"noise of seed {self.seed}", data)
