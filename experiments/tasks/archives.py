"""Files of data sets: in a folder or a packed archive, downloaded by TFDS, or kept beside these as arrays."""

import io
import os
import pathlib
import pickle
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np


def download(
    title: str, remedy: str, *, urls: Mapping[str, str] | None = None, data_dir: str = ""
) -> dict[str, pathlib.Path]:
    """The files at urls that TFDS knows of its data set `title`, checked; it needs no TensorFlow for that.

    urls: by any names; None: all that it knows, by themselves. data_dir: TFDS's folder, "" for the usual one.
    Raises ValueError with the remedy where they cannot be had.
    """
    folder = pathlib.Path(data_dir or "~/tensorflow_datasets").expanduser()
    try:
        import tensorflow_datasets as tfds

        known = tfds.builder_cls(title).url_infos
        manager = tfds.download.DownloadManager(download_dir=folder / "downloads", url_infos=known, dataset_name=title)
        urls = {url: url for url in known} if urls is None else dict(urls)
        return {name: pathlib.Path(path) for name, path in manager.download(urls).items()}
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise ValueError(f"{title} cannot be downloaded by TFDS ({reason}); {remedy}") from error


def locate(data_dir: str, names: Iterable[str], remedy: str) -> pathlib.Path:
    """data_dir, a folder or an archive; or the first archive of these names in it. Raises ValueError where none is."""
    path = pathlib.Path(data_dir).expanduser()
    if not path.exists():
        raise ValueError(f"data_dir={data_dir!r} does not exist; {remedy}")
    return next((path / name for name in names if (path / name).is_file()), path)


def contents(path: pathlib.Path, wanted: Callable[[pathlib.PurePosixPath], bool], remedy: str) -> Iterator:
    """Name and bytes of every wanted file of a folder or of a tar archive, packed or not.

    Raises ValueError naming the archive or the file that cannot be read.
    """
    try:
        yield from (_of_folder if path.is_dir() else _of_tar)(path, wanted)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from error


def _of_folder(path, wanted):
    for file in sorted(path.rglob("*")):
        name = pathlib.PurePosixPath(file.relative_to(path))
        if wanted(name) and file.is_file():
            yield name, file.read_bytes()


def _of_tar(path, wanted):
    with tarfile.open(path) as archive:  # as a stream, "r|", a packed file that is cut in a header would end there
        for member in archive:
            name = pathlib.PurePosixPath(member.name)
            if member.isfile() and wanted(name):
                yield name, archive.extractfile(member).read()


def tracked(items: Iterable, title: str, total: int | None = None) -> Iterator:
    """The items, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(items, title, total, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def kept(source: pathlib.Path, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """make()'s arrays, kept as `name` in the source's folder, and made anew where the source is another than then.

    Where they cannot be kept, because the folder is read-only or its disk full, they are made each time.
    """
    folder = source if source.is_dir() else source.parent
    stamp = _stamp(source, name)
    try:
        with np.load(folder / name) as file:
            arrays = dict(file)
        if np.array_equal(arrays.pop("stamp", None), stamp):
            return arrays
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        pass
    arrays = make()
    if folder.stat().st_mode & 0o222:  # root may write everywhere, and should not
        _keep(folder / name, {**arrays, "stamp": stamp})
    return arrays


def _stamp(source, name):
    files = [p.stat() for p in source.rglob("*") if p.is_file() and p.name != name] if source.is_dir() else []
    files = files or [source.stat()]
    return np.asarray([len(files), sum(s.st_size for s in files), max(s.st_mtime_ns for s in files)])


def _keep(path, arrays):
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        print(f"warning: {path} cannot be kept ({error.strerror}); it is made again each time", file=sys.stderr)
        temporary.unlink(missing_ok=True)


class _Arrays(pickle.Unpickler):
    ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode"}

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module, name)


def unpickled(where: str, content: bytes):
    """The arrays and plain values of a pickle of Python 2 or 3; it may run no code. Raises ValueError naming it."""
    try:
        return _Arrays(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:
        raise ValueError(f"{where}: no pickle of arrays ({error})") from error
