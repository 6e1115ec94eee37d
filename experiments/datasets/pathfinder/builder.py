"""Pathfinder as a data set of TensorFlow Datasets, made and read without TensorFlow.

    builder = Pathfinder(config="pathfinder128-seed0", data_dir=DIR)
    builder.download_and_prepare()
    builder.as_data_source("train")[0]  # {"image": uint8 (128, 128, 1), "label": 0 or 1}

Of another seed or size: Pathfinder(config=Config(name="seed1", seed=1), data_dir=DIR). TFDS cannot go on with a
preparation that was stopped; what it copies here is drawn by `files`, which can.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.pathfinder import files
from experiments.datasets.pathfinder.parameters import PARAMETERS


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
    """sizes: images of train, validation and test."""

    resolution: int = 128
    seed: int = 0
    sizes: tuple[int, int, int] = tuple(files.SIZES.values())


class Pathfinder(tfds.core.GeneratorBasedBuilder):
    """Are two discs at the ends of one contour? The images that `experiments.tasks.pathfinder` reads from `files`."""

    VERSION = tfds.core.Version(f"{files.VERSION}.0.0")
    BUILDER_CONFIGS = tuple(Config(name=f"pathfinder{r}-seed0", resolution=r) for r in PARAMETERS)

    def __init__(self, **options):
        super().__init__(**{"file_format": "array_record", **options})

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self.builder_config.resolution, self.builder_config.resolution, 1)
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=2)})
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        config = self.builder_config
        sizes = dict(zip(files.SIZES, config.sizes, strict=True))
        folder = pathlib.Path(dl_manager.download_dir) / files.folder_name(config.resolution, config.seed, sizes)
        splits = files.generate(folder, config.resolution, config.seed, sizes).splits
        return {name: self._generate_examples(split) for name, split in splits.items()}

    def _generate_examples(self, split: files.Split) -> Iterator[tuple[int, dict]]:
        for i, (image, label) in enumerate(zip(*split, strict=True)):
            yield i, {"image": np.asarray(image), "label": int(label)}
