"""Free Spoken Digits: 3,000 recordings of ten digits by six speakers, raw at 8 kHz (Jackson 2016, CC BY-SA 4.0).

data_dir is the data set's folder or its tar archive, or a folder with that archive in it: DIGIT_SPEAKER_INDEX.wav in
recordings. The official test split is the indices below 5; of the others the last `validation` of a fixed permutation
are held back.
"""

import dataclasses
import re

from experiments.tasks import archives, audio
from experiments.tasks.base import StandardisedTask

RATE = 8000  # Hz
TEST_BELOW = 5
NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")
ARCHIVES = ("free_spoken_digits.tgz", "free-spoken-digit-dataset-master.tar.gz")
REMEDY = "it holds recordings/{digit}_{speaker}_{index}.wav; see github.com/Jakobovski/free-spoken-digit-dataset"


@dataclasses.dataclass(frozen=True)
class Options:
    """rate: 8000, or a divisor of it; length: samples kept at 8 kHz, 0 for all of the longest recording's."""

    name: str
    data_dir: str = ""
    rate: int = RATE
    length: int = 0
    validation: int = 300

    def load(self) -> StandardisedTask:
        if not self.data_dir:
            raise ValueError(f"task {self.name}: name data_dir; {REMEDY}")
        path = archives.locate(self.data_dir, ARCHIVES, REMEDY)
        found = {}
        for name, content in archives.contents(path, lambda name: name.suffix == ".wav", REMEDY):
            if (match := NAME.fullmatch(name.name)) is None:
                raise ValueError(f"{path}: {name} is not named as a recording; {REMEDY}")
            found[name.name] = int(match[3]), (int(match[1]), audio.read_wav(f"{path}: {name}", content, RATE))
        splits = {
            split: [found[name][1] for name in sorted(found) if (found[name][0] < TEST_BELOW) == (split == "test")]
            for split in ("train", "test")
        }
        if not all(splits.values()):
            sizes = ", ".join(f"{len(part)} {split}" for split, part in splits.items())
            raise ValueError(f"{path} has {sizes} recordings; {REMEDY}")
        options = dict(classes=10, full_rate=RATE, rate=self.rate, length=self.length, validation=self.validation)
        return audio.task(f"Free Spoken Digits from {path}", splits, **options)
