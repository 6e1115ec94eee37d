"""CIFAR-10 in every form in which it is found, and what the model reads of it."""

import io
import pathlib
import pickle
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import tasks
from experiments.tasks import archives, cifar

TRAIN, TEST = 20, 10


@pytest.fixture(scope="module")
def pictures() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Smooth ones, which survive JPEG."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (TRAIN + TEST, 2, 2, 3), np.uint8)
    images = np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BILINEAR)) for x in small])
    labels = np.arange(TRAIN + TEST) % 10
    return {"train": (images[:TRAIN], labels[:TRAIN]), "test": (images[TRAIN:], labels[TRAIN:])}


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    monkeypatch.setattr(cifar, "SIZES", {"train": TRAIN, "test": TEST})


def records(images, labels) -> tuple[np.ndarray, np.ndarray]:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1), labels


def files(pictures, form: str) -> dict[str, bytes]:
    found = {}
    for split, (images, labels) in pictures.items():
        if form in ("jpg", "png"):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, {"jpg": "JPEG", "png": "PNG"}[form])
                found[f"x/{split}/{cifar.CLASSES[label]}/{i:04}.{form}"] = stream.getvalue()
            continue
        names = cifar.BATCHES[split]
        parts = zip(*(np.array_split(x, len(names)) for x in records(images, labels)), strict=True)
        for name, (data, part) in zip(names, parts, strict=True):
            if form == "binary":
                rows = np.concatenate([part[:, None].astype(np.uint8), data], 1)
                found[f"cifar-10-batches-bin/{name}.bin"] = rows.tobytes()
            else:
                table = {"data": data, "labels": part.tolist(), "batch_label": name}
                found[f"cifar-10-batches-py/{name}"] = pickle.dumps(table, protocol=2)
    return found


def write(path: pathlib.Path, content: dict[str, bytes]) -> pathlib.Path:
    if path.suffix:
        with tarfile.open(path, "w:gz") as archive:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in content.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def load(path, name="scifar", **fields) -> cifar.CifarTask:
    return tasks.load({"name": name, "data_dir": str(path), "validation": 0, **fields})


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("form", ["binary", "python", "png", "jpg"])
def test_every_form_gives_the_same_pictures(tmp_path, pictures, form, packed):
    content = files(pictures, form)
    load(write(tmp_path / ("x.tgz" if packed else "x"), dict(reversed(content.items()))))
    task = load(tmp_path / ("x.tgz" if packed else "x"))  # the second time as they were kept
    assert ("(JPEG)" in task.source) == (form == "jpg")
    for split, (images, labels) in pictures.items():
        order = np.argsort(np.asarray(cifar.CLASSES)[labels], kind="stable") if form in ("jpg", "png") else slice(None)
        difference = task.data[split].inputs - images[order].astype(float)
        assert np.abs(difference).max() == 0 or (form == "jpg" and np.abs(difference).mean() < 3)
        np.testing.assert_array_equal(task.data[split].targets, labels[order])


def test_arrays_are_kept_until_the_source_changes(tmp_path, pictures, monkeypatch):
    path = write(tmp_path / "x.tgz", files(pictures, "binary"))
    first = load(path)
    monkeypatch.setattr(cifar, "read", lambda path: pytest.fail("read again"))
    np.testing.assert_array_equal(load(path).data["train"].inputs, first.data["train"].inputs)
    monkeypatch.undo()
    monkeypatch.setattr(cifar, "SIZES", {"train": TRAIN, "test": TEST})
    changed = {"train": (255 - pictures["train"][0], pictures["train"][1]), "test": pictures["test"]}
    write(path, files(changed, "binary"))
    np.testing.assert_array_equal(load(path).data["train"].inputs, changed["train"][0])
    (tmp_path / cifar.KEPT).write_bytes(b"PK torn")
    np.testing.assert_array_equal(load(path).data["train"].inputs, changed["train"][0])
    (tmp_path / cifar.KEPT).unlink()
    tmp_path.chmod(0o555)
    load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.tgz"]
    tmp_path.chmod(0o755)


def test_grey_is_that_of_pil(rng):
    images = rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    expected = [np.asarray(Image.fromarray(x).convert("L")) for x in images]
    np.testing.assert_array_equal(cifar.grey(images)[..., 0], expected)


def test_validation_is_held_back_once_and_for_all(tmp_path, pictures):
    path = write(tmp_path / "x", files(pictures, "binary"))
    whole, cut = load(path), load(path, validation=5)
    assert [cut.examples(split) for split in ("train", "validation", "test")] == [15, 5, 10]
    rows = np.concatenate([cut.data[split].inputs for split in ("train", "validation")]).reshape(TRAIN, -1)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, whole.data["train"].inputs.reshape(TRAIN, -1)))
    np.testing.assert_array_equal(cut.data["validation"].inputs, load(path, validation=5).data["validation"].inputs)
    np.testing.assert_array_equal(cut.data["test"].inputs, whole.data["test"].inputs)


def test_what_the_model_reads(tmp_path, pictures):
    """Row after row, standardised as the papers' code has it: torchvision's ToTensor and Normalize."""
    path, (images, _) = write(tmp_path / "x", files(pictures, "binary")), pictures["train"]
    colour, grey = load(path), load(path, "image")
    batch = {name: task.data["train"].take(np.arange(4)) for name, task in (("colour", colour), ("grey", grey))}
    seen = {
        n: t.preprocess(batch[n], jax.random.key(0), True)["inputs"] for n, t in (("colour", colour), ("grey", grey))
    }
    expected = (images[:4] / 255 - [0.4914, 0.4822, 0.4465]) / [0.247, 0.243, 0.261]
    np.testing.assert_allclose(seen["colour"], expected.reshape(4, 1024, 3), atol=1e-5)
    expected = (cifar.grey(images[:4]) / 255 - 122.6 / 255) / (61.0 / 255)
    np.testing.assert_allclose(seen["grey"], expected.reshape(4, 1024, 1), atol=1e-5)
    assert (colour.length, colour.input_size, grey.input_size, colour.encoder) == (1024, 3, 1, "continuous")


def test_augmentation_moves_whole_pictures_and_only_in_training(tmp_path, pictures):
    images = jax.numpy.asarray(pictures["train"][0])
    flipped = np.asarray(cifar.augmented(images, jax.random.key(0), True, 0))
    kinds = [("same", images), ("mirrored", images[:, :, ::-1])]
    found = [next(name for name, x in kinds if (x[i] == flipped[i]).all()) for i in range(TRAIN)]
    assert 4 <= found.count("mirrored") <= 16
    moved = np.asarray(cifar.augmented(images, jax.random.key(1), False, 2))
    wide = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = [
        next((a, b) for a in range(5) for b in range(5) if (wide[i, a : a + 32, b : b + 32] == moved[i]).all())
        for i in range(TRAIN)
    ]
    assert len(set(places)) > 8
    task = load(write(tmp_path / "x", files(pictures, "binary")), flip=True, crop=4)
    batch = task.data["test"].take(np.arange(8))
    plain, train, other = (
        task.preprocess(batch, jax.random.key(k), t)["inputs"] for k, t in ((0, False), (0, True), (1, True))
    )
    assert (plain == task.preprocess(batch, jax.random.key(1), False)["inputs"]).all()
    assert not (plain == train).all() and not (train == other).all()


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


WRONG = {
    "missing batch": ("binary", "data_batch_3.bin", None, "has no data_batch_3"),
    "cut batch": ("binary", "data_batch_3.bin", lambda x: x[:-1], r"data_batch_3.bin: 12291 bytes are no whole number"),
    "short batch": ("binary", "test_batch.bin", lambda x: x[3073:], "has 9 test images, CIFAR-10 10"),
    "label": ("binary", "test_batch.bin", lambda x: b"\x0a" + x[1:], "test: targets must be in 0..9; example 0 has 10"),
    "cut pickle": ("python", "data_batch_3", lambda x: x[:-9], "data_batch_3: no pickle of arrays"),
    "evil pickle": (
        "python",
        "data_batch_3",
        lambda x: pickle.dumps(Evil()),
        "data_batch_3: no pickle of arrays .it hol",
    ),
    "odd pickle": ("python", "data_batch_3", lambda x: pickle.dumps([1]), "data_batch_3: no pickle of data, uint8"),
    "cut image": ("png", "x/train/ship/0008.png", lambda x: x[:80], "ship/0008.png cannot be decoded"),
    "no image": ("jpg", "x/train/ship/0008.jpg", lambda x: b"", "ship/0008.jpg cannot be decoded"),
    "missing image": ("jpg", "x/train/ship/0008.jpg", None, "has 19 train images, CIFAR-10 20"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(tmp_path, pictures, case, capfd):
    form, name, change, message = WRONG[case]
    content = files(pictures, form)
    (name,) = (x for x in content if x.endswith(name))
    content[name] = content[name] if change is None else change(content[name])
    if change is None:
        del content[name]
    path = write(tmp_path / "x.tgz", content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value) and "code ran" not in "".join(capfd.readouterr())


def test_an_image_of_another_size(tmp_path, pictures):
    content, stream = files(pictures, "png"), io.BytesIO()
    Image.new("RGB", (33, 32)).save(stream, "PNG")
    content["x/train/cat/0003.png"] = stream.getvalue()
    with pytest.raises(ValueError, match="cat/0003.png: an image of 33 x 32, not 32 x 32"):
        load(write(tmp_path / "x", content))


def test_a_cut_archive(tmp_path, pictures):
    path = write(tmp_path / "x.tgz", files(pictures, "binary"))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="x.tgz cannot be read .*; the official files are"):
        load(path)


def test_wrong_options(tmp_path, pictures):
    for fields, message in (
        ({"data_dir": "nowhere"}, "data_dir='nowhere' does not exist; the official files are"),
        ({"data_dir": str(tmp_path)}, "has 0 train images"),
        ({"crop": -1}, "crop=-1 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.load({"name": "image", "data_dir": str(tmp_path), **fields})
    with pytest.raises(ValueError, match="validation=20 must be at least 0 and below the 20 training examples"):
        load(write(tmp_path / "x", files(pictures, "binary")), validation=20)


def test_tfds_downloads_the_official_archive(tmp_path, pictures, monkeypatch):
    import tensorflow_datasets as tfds

    path = write(tmp_path / "cifar.tgz", files(pictures, "binary"))

    def download(self, urls):
        assert all(url in self._url_infos for url in urls.values()), "TFDS knows no checksum of this file"
        return {name: path for name in urls}

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    assert load("").examples("train") == TRAIN
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda self, urls: 1 / 0)
    with pytest.raises(ValueError, match="cifar10 cannot be downloaded by TFDS .ZeroDivisionError: .*; name data_dir"):
        load("")


def test_a_full_disk_costs_time_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    arrays = archives.kept(tmp_path, "x.npz", lambda: {"a": np.arange(3)})
    assert arrays["a"].tolist() == [0, 1, 2] and not list(tmp_path.iterdir())
    assert "x.npz cannot be kept (No space left on device); it is made again each time" in capsys.readouterr().err
