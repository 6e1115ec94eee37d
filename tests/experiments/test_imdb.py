import tarfile

import numpy as np
import pytest

from experiments import tasks
from experiments.tasks import imdb


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three reviews of a label and split, the number of each in its bytes; and one without a label."""
    monkeypatch.setattr(imdb, "REVIEWS", 3)
    for s, split in enumerate(("train", "test")):
        for y, label in enumerate(("neg", "pos", "unsup")):
            path = tmp_path / "data" / "aclImdb" / split / label
            path.mkdir(parents=True)
            for i in range(3):
                (path / f"{i}_{1 + 9 * y}.txt").write_bytes(bytes([1 + s, 100 + y, 200 + i]) * (1 + i))
    return tmp_path / "data" / "aclImdb"


@pytest.fixture
def packed(folder):
    path = folder.parent.parent / "copy" / "aclImdb_v1.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "aclImdb")
    return path


def load(data_dir, **options):
    return tasks.load({"name": "text", "data_dir": str(data_dir), "length": 7, **options})


def test_every_form_is_the_same_data(folder, packed):
    for data_dir in (folder, folder.parent, packed, packed.parent):
        task = load(data_dir)
        assert task.splits == ("train", "test") and (task.length, task.input_size, task.classes) == (7, 256, 2)
        for split, first in (("train", 1), ("test", 2)):
            part = task.data[split]
            assert part.targets.tolist() == [0, 0, 0, 1, 1, 1] and part.lengths.tolist() == [3, 6, 7] * 2
            for row, label, i in zip(part.inputs, part.targets, (0, 1, 2) * 2, strict=True):
                text = [first, 100 + label, 200 + i] * (1 + i)
                assert row.tolist() == (text + [0] * 7)[:7], "text, then zeros, cut off at 7 bytes"


def test_the_archive_is_downloaded_by_tfds(packed, monkeypatch):
    import tensorflow_datasets as tfds

    def download(self, urls):
        assert all(url in self._url_infos for url in urls.values()), "TFDS knows no checksum of this file"
        return dict.fromkeys(urls, packed)

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    assert load("").examples("train") == 6


def test_validation_is_cut_from_training_and_fixed(folder):
    whole, task = load(folder), load(folder, validation=2)
    assert {split: task.examples(split) for split in task.splits} == {"train": 4, "validation": 2, "test": 6}
    rows = {split: {row.tobytes() for row in task.data[split].inputs} for split in task.splits}
    assert not rows["train"] & rows["validation"]
    assert rows["train"] | rows["validation"] == {row.tobytes() for row in whole.data["train"].inputs}
    again = load(folder, validation=2).data["validation"]
    np.testing.assert_array_equal(again.inputs, task.data["validation"].inputs)


def test_an_archive_cut_anywhere_cannot_be_read(packed):
    whole = packed.read_bytes()
    for size in (*range(5, len(whole) // 2, 23), len(whole) - 200):  # through a file's bytes, or through its header
        packed.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"^{packed} cannot be read"):
            load(packed)


def test_wrong_data_is_named(folder):
    with pytest.raises(ValueError, match="data_dir='nowhere' does not exist; the data set is aclImdb_v1.tar.gz"):
        load("nowhere")
    with pytest.raises(ValueError, match=f"{folder / 'train'}: 0 reviews in train/neg, expected 3"):
        load(folder / "train")
    (folder / "test" / "pos" / "0_10.txt").unlink()
    with pytest.raises(ValueError, match="2 reviews in test/pos, expected 3; the data set is"):
        load(folder)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        load(folder, length=0)
