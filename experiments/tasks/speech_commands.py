"""Speech Commands: 35 words, 105,829 recordings of a second at most, raw at 16 kHz (Warden 2018, arXiv:1804.03209).

data_dir is the data set's folder or its tar archive, version 0.02, or a folder with that archive in it, or "" to have
TensorFlow Datasets download and check it. The official lists, validation_list.txt and testing_list.txt, say which
recordings validate and test; all others train.
"""

import dataclasses
import pathlib

from experiments.tasks import archives, audio
from experiments.tasks.base import StandardisedTask

RATE = 16000  # Hz
LENGTH = 16000  # samples
WORDS = tuple(
    "backward bed bird cat dog down eight five follow forward four go happy house learn left marvin nine no off on one"
    " right seven sheila six stop three tree two up visual wow yes zero".split()
)
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
ARCHIVES = ("speech_commands_v0.02.tar.gz",)
URL = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
REMEDY = "the data set is speech_commands_v0.02.tar.gz, packed or not"


@dataclasses.dataclass(frozen=True)
class Options:
    """rate: 16000, or a divisor of it."""

    name: str
    data_dir: str = ""
    rate: int = RATE

    def load(self) -> StandardisedTask:
        if self.data_dir:
            path = archives.locate(self.data_dir, ARCHIVES, REMEDY)
        else:
            urls = {"archive": URL}
            path = archives.download("speech_commands", f"name data_dir: {REMEDY}", urls=urls)["archive"]
        title, splits = f"Speech Commands from {path}", read(path)
        return audio.task(title, splits, classes=len(WORDS), full_rate=RATE, rate=self.rate, length=LENGTH)


def read(path: pathlib.Path) -> dict[str, list]:
    """Labels and waveforms of each split, in the order of the files' names.

    Raises ValueError naming a recording that is damaged or listed and not there, a list or a word that is missing.
    """
    lists, recordings = {}, {}
    for name, content in archives.tracked(archives.contents(path, _wanted, REMEDY), "reading Speech Commands"):
        if name.suffix == ".txt":
            lists[name.name] = content.decode().split()
        else:
            samples = audio.read_wav(f"{path}: {name}", content, RATE)
            recordings["/".join(name.parts[-2:])] = WORDS.index(name.parts[-2]), samples
    listed = {}
    for split, file in LISTS.items():
        if file not in lists:
            raise ValueError(f"{path} has no {file}; {REMEDY}")
        if absent := [name for name in lists[file] if name not in recordings]:
            raise ValueError(
                f"{path} has no {absent[0]}, which its {file} names, nor {len(absent) - 1} others; {REMEDY}"
            )
        listed |= dict.fromkeys(lists[file], split)
    if absent := set(range(len(WORDS))) - {label for label, _ in recordings.values()}:
        raise ValueError(f"{path} has no recording of {WORDS[min(absent)]!r}; {REMEDY}")
    splits = {split: [] for split in ("train", *LISTS)}
    for name in sorted(recordings):
        splits[listed.get(name, "train")].append(recordings[name])
    return splits


def _wanted(name: pathlib.PurePosixPath) -> bool:
    if name.name in LISTS.values():
        return True
    return name.suffix == ".wav" and len(name.parts) >= 2 and name.parts[-2] in WORDS
