"""Noise in the shape of a task: nothing to learn, but what a training step costs (`experiments.throughput`)."""

import dataclasses

import numpy as np

from experiments.tasks.base import ArrayTask, Examples


@dataclasses.dataclass(frozen=True)
class Options:
    """Real sequences of `channels`, one of `classes` each; or, where `vocabulary` is not 0, so many kinds of tokens."""

    name: str
    length: int
    channels: int = 1
    classes: int = 2
    vocabulary: int = 0
    examples: int = 64
    seed: int = 0

    def load(self) -> ArrayTask:
        for field in ("length", "channels", "classes", "examples"):
            if getattr(self, field) < 1:
                raise ValueError(f"task {self.name}: {field}={getattr(self, field)} must be at least 1")
        if self.vocabulary < 0:
            raise ValueError(f"task {self.name}: vocabulary={self.vocabulary} must be 0, or how many tokens there are")
        source, random = f"noise of seed {self.seed}", np.random.default_rng(self.seed)
        if self.vocabulary:
            shape = 2, self.examples, self.length
            data = self._splits(*random.integers(0, self.vocabulary, shape, np.int32))
            options = dict(kind="language_model", metric="bits_per_byte")
            return ArrayTask("token", self.vocabulary, self.vocabulary, source, data, **options)
        inputs = random.standard_normal((self.examples, self.length, self.channels), np.float32)
        data = self._splits(inputs, random.integers(0, self.classes, self.examples, np.int32))
        return ArrayTask("continuous", self.channels, self.classes, source, data)

    def _splits(self, inputs, targets) -> dict[str, Examples]:
        return {split: Examples(inputs, targets) for split in ("train", "test")}
