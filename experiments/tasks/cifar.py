"""CIFAR-10 read pixel by pixel, 1,024 steps, 10 classes: in grey ("image", of Long Range Arena) or colour ("scifar").

data_dir is a folder or a tar archive that holds one of these forms, a folder with such an archive in it, or "" for the
official binary archive, downloaded and checked by TensorFlow Datasets:
    binary  data_batch_1.bin to data_batch_5.bin and test_batch.bin     (cifar-10-binary.tar.gz)
    python  data_batch_1 to data_batch_5 and test_batch, pickled arrays  (cifar-10-python.tar.gz)
    images  train/CLASS/NAME and test/CLASS/NAME, .png or .jpg. JPEG is lossy: it is another data set, and is named so.
Decoded images are kept as arrays beside their source. Of the 50,000 training images the last `validation` of a fixed
permutation are held back, 5,000 in the S4 line. Grey is ITU-R 601's, as in PIL, and so in torchvision.
"""

import dataclasses
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks import archives
from experiments.tasks.base import Batch, Examples, StandardisedTask, held_back

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"train": 50_000, "test": 10_000}
VALIDATION_SEED = 42
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "cifar10_jpg_q75.tgz")
KEPT = "cifar10-arrays.npz"
REMEDY = "the official files are cifar-10-binary.tar.gz and cifar-10-python.tar.gz, packed or not"
STANDARD = {  # of pixels from 0 to 1, mean and standard deviation of each channel, as the S4 line has them
    "image": ((122.6 / 255,), (61.0 / 255,)),
    "scifar": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """validation: images held back. flip, crop: of training images, see `augmented`."""

    name: str
    data_dir: str = ""
    validation: int = 5000
    flip: bool = False
    crop: int = 0

    def load(self) -> "CifarTask":
        if self.crop < 0:
            raise ValueError(f"task {self.name}: crop={self.crop} must not be negative")
        if self.data_dir:
            path = archives.locate(self.data_dir, ARCHIVES, REMEDY)
        else:
            (path,) = archives.download("cifar10", f"name data_dir: {REMEDY}").values()
        arrays = archives.kept(path, KEPT, lambda: read(path))
        form = str(arrays.pop("form"))
        images = {split: grey(x) if self.name == "image" else x for split, x in arrays.items() if split in SIZES}
        data = {split: Examples(x, arrays[f"{split}_labels"].astype(np.int32)) for split, x in images.items()}
        data = held_back(data, self.validation, VALIDATION_SEED)
        sizes = ", ".join(f"{len(examples.targets):,} {split}" for split, examples in data.items())
        title = f"CIFAR-10{' (JPEG)' * (form == 'jpeg')} in {'grey' if self.name == 'image' else 'colour'}"
        mean, std = (tuple(255 * x for x in values) for values in STANDARD[self.name])
        return CifarTask(
            encoder="continuous", input_size=len(mean), classes=10, source=f"{title} from {path} ({sizes})", data=data,
            mean=mean, std=std, flip=self.flip, crop=self.crop,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CifarTask(StandardisedTask):
    flip: bool = False
    crop: int = 0

    def preprocess(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        if train:
            batch = batch | {"inputs": augmented(jnp.asarray(batch["inputs"]), key, self.flip, self.crop)}
        return super().preprocess(batch, key, train)


def augmented(images: jax.Array, key: jax.Array, flip: bool, crop: int) -> jax.Array:
    """Half of the images mirrored where `flip`, and each moved by at most `crop` pixels each way, zeros coming in."""
    flip_key, crop_key = jax.random.split(key)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if crop:
        shape = images.shape[1:]
        wide = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
        corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * crop + 1)
        cut = lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), shape)  # noqa: E731
        images = jax.vmap(cut)(wide, corners)
    return images


def grey(images: np.ndarray) -> np.ndarray:
    """Luma of uint8 (n, 32, 32, 3) as PIL rounds it, uint8 (n, 32, 32, 1)."""
    weights = np.asarray([19595, 38470, 7471], np.uint32)  # of 2^16: 0.299, 0.587, 0.114
    luma = sum(weights[c] * images[..., c, None] for c in range(3))
    return ((luma + np.uint32(1 << 15)) >> 16).astype(np.uint8)


# Reading -------------------------------------------------------------------------------------------

BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
SPLIT_OF = {name: split for split, names in BATCHES.items() for name in names}
RECORD = 1 + 3 * 32 * 32
Image = tuple[str, str, int, np.ndarray]  # split, name, label, uint8 (32, 32, 3)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """ "train", "test" uint8 (n, 32, 32, 3), "train_labels", "test_labels" uint8, and "form": jpeg or lossless.

    Raises ValueError naming the file that is not what it should be, or the number of images.
    """
    batches, images, forms = {}, [], set()
    for name, content in archives.tracked(archives.contents(path, _wanted, REMEDY), "reading CIFAR-10"):
        if name.stem in SPLIT_OF and name.suffix in ("", ".bin"):
            where = f"{path}: {name}"
            batches[name.stem] = read_binary(where, content) if name.suffix else read_pickle(where, content)
        else:
            split, label = name.parts[-3:-1]
            images.append((split, str(name), CLASSES.index(label), decode(f"{path}: {name}", content)))
            forms.add("png" if name.suffix == ".png" else "jpeg")
    arrays = _of_batches(path, batches) if batches else _of_images(images)
    for split, size in SIZES.items():
        if len(arrays[split]) != size:
            raise ValueError(f"{path} has {len(arrays[split]):,} {split} images, CIFAR-10 {size:,}; {REMEDY}")
    return arrays | {"form": np.asarray("jpeg" if "jpeg" in forms and not batches else "lossless")}


def _wanted(name: pathlib.PurePosixPath) -> bool:
    if name.stem in SPLIT_OF and name.suffix in ("", ".bin"):
        return True
    picture = name.suffix in (".jpg", ".jpeg", ".png") and len(name.parts) >= 3
    return picture and name.parts[-3] in SIZES and name.parts[-2] in CLASSES


def _of_batches(path, batches):
    missing = [name for name in SPLIT_OF if name not in batches]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}; {REMEDY}")
    parts = {split: [batches[name] for name in names] for split, names in BATCHES.items()}
    joined = {split: tuple(np.concatenate(x) for x in zip(*part, strict=True)) for split, part in parts.items()}
    return {s: x for s, (x, _) in joined.items()} | {f"{s}_labels": y for s, (_, y) in joined.items()}


def _of_images(images: list[Image]) -> dict[str, np.ndarray]:
    arrays = {}
    for split in SIZES:
        rows = sorted((row for row in images if row[0] == split), key=lambda row: row[1])
        pixels = [pixels for *_, pixels in rows]
        arrays[split] = np.stack(pixels) if pixels else np.zeros((0, 32, 32, 3), np.uint8)
        arrays[f"{split}_labels"] = np.asarray([label for _, _, label, _ in rows], np.uint8)
    return arrays


def _pixels(planes: np.ndarray) -> np.ndarray:
    return planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def read_binary(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of records of a label and three planes."""
    if not content or len(content) % RECORD:
        raise ValueError(f"{where}: {len(content)} bytes are no whole number of records of {RECORD}; {REMEDY}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return _pixels(rows[:, 1:]), rows[:, 0]


def read_pickle(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a pickled {"data": uint8 (n, 3072), "labels": list}."""
    table = archives.unpickled(where, content)
    data, labels = (table.get(key, ()) if isinstance(table, dict) else () for key in ("data", "labels"))
    if not isinstance(data, np.ndarray) or data.shape != (len(labels), RECORD - 1) or data.dtype != np.uint8:
        raise ValueError(f"{where}: no pickle of data, uint8 (n, {RECORD - 1}), and as many labels; {REMEDY}")
    return _pixels(data), np.asarray(labels, np.uint8)


def decode(where: str, content: bytes) -> np.ndarray:
    """Pixels of a PNG or JPEG file, uint8 (32, 32, 3)."""
    from PIL import Image

    try:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where} cannot be decoded ({error})") from error
    if pixels.shape != (32, 32, 3):
        raise ValueError(f"{where}: an image of {pixels.shape[1]} x {pixels.shape[0]}, not 32 x 32")
    return pixels
