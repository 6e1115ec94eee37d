"""ListOps as a data set of TensorFlow Datasets, made and read without TensorFlow.

    builder = ListOps(data_dir=DIR)
    builder.download_and_prepare()
    builder.as_data_source("train")[0]  # {"tokens": uint8 (l,), "value": int32}

Of another seed or size: ListOps(config=Config(name="seed1", seed=1), data_dir=DIR).
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.listops import files
from experiments.datasets.listops.expressions import SIZES, Expressions, Limits


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
    """sizes: expressions of train, validation and test."""

    seed: int = 0
    sizes: tuple[int, int, int] = tuple(SIZES.values())
    limits: Limits = Limits()


class ListOps(tfds.core.GeneratorBasedBuilder):
    """Nested expressions and their values, as `experiments.tasks.listops` reads them from the same files."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (Config(name="seed0"),)

    def __init__(self, **options):
        super().__init__(**{"file_format": "array_record", **options})

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(None,), dtype=np.uint8)
        features = tfds.features.FeaturesDict({"tokens": tokens, "value": np.int32})
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("tokens", "value"))

    def _split_generators(self, dl_manager):
        config = self.builder_config
        folder = pathlib.Path(dl_manager.download_dir) / files.folder_name(config.seed, config.limits)
        pool = files.generate(folder, config.seed, config.limits, sum(config.sizes))
        parts = zip(SIZES, files.split(pool, config.sizes), strict=True)
        return {name: self._generate_examples(part) for name, part in parts}

    def _generate_examples(self, part: Expressions) -> Iterator[tuple[int, dict]]:
        for i, tokens in enumerate(np.split(part.tokens, np.cumsum(part.lengths)[:-1])):
            yield i, {"tokens": tokens, "value": int(part.values[i])}
