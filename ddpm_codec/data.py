"""Pictures from folders, ZIP archives, .npz files and CIFAR-10's batches, as uint8 arrays."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .errors import DataError, DdpmcWarning, warn
from .files import PICTURES

CIFAR_BYTES = 3 * 32 * 32  # of one picture in CIFAR-10's batches


def list_pictures(folders: Sequence[Path]) -> list[Path]:
    """All picture files below ``folders``, sorted. Raises DataError if there are none."""
    paths = sorted(
        p
        for d in folders
        for p in Path(d).rglob("*")
        if p.suffix.lower() in PICTURES and p.is_file()
    )
    if not paths:
        raise DataError(f"no pictures below {', '.join(map(str, folders))}")
    return paths


def load_rgb(source: Path | IO[bytes]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8. Raises DataError, which names the file, if it is not a sound picture."""
    try:
        with Image.open(source) as im:
            return np.asarray(im.convert("RGB"))
    except MemoryError:
        raise
    except Exception as e:  # Pillow's plugins raise errors of any kind
        name = source if isinstance(source, Path) else source.name
        raise DataError(f"{name}: broken picture ({e})") from None


class Loader:
    """Loads pictures, skips broken ones and remembers which they were."""

    def __init__(self) -> None:
        self.broken: list[str] = []  # an error message for each
        self._reported = 0  # how many of them a warning has counted

    def load(self, source: Path | IO[bytes]) -> NDArray[np.uint8] | None:
        """(H, W, 3) uint8, or None for a broken picture."""
        try:
            return load_rgb(source)
        except DataError as e:
            if str(e) not in self.broken:
                self.broken.append(str(e))
            return None

    def report(self) -> None:
        """Warn once of all broken pictures so far, unless no new ones were found."""
        if len(self.broken) > self._reported:
            self._reported = len(self.broken)
            text = f"broken pictures skipped: {self._reported}, the last {self.broken[-1]}"
            warn(text, DdpmcWarning)


def validation_crops(paths: Sequence[Path], size: int, count: int) -> Tensor:
    """(N, 3, size, size) uint8: the middle of the first ``count`` pictures that are large enough.

    Fewer if there are fewer. Raises DataError if there is none.
    """
    crops, loader = [], Loader()
    for path in paths:
        if (picture := loader.load(path)) is None:
            continue
        h, w = picture.shape[:2]
        if min(h, w) >= size:
            top, left = (h - size) // 2, (w - size) // 2
            crops.append(picture[top : top + size, left : left + size])
        if len(crops) == count:
            break
    loader.report()
    if not crops:
        raise DataError(f"no validation picture is at least {size} pixels wide and high")
    return _channels_first(np.stack(crops))


def small_pictures(paths: Sequence[Path], side: int = 32) -> Tensor:
    """(N, 3, side, side) uint8: all pictures in the files, and in the files below the folders.

    A file is a picture, a ZIP archive of pictures, an .npz with an array (N, side, side, 3), or a
    batch of CIFAR-10, binary (``data_batch_1.bin``) or for Python (``data_batch_1``). Broken
    pictures below a folder are skipped with a warning. Raises DataError for any other file that
    cannot be read, for pictures of another size, and if there are no pictures.
    """
    parts, loader = [], Loader()
    for path in paths:
        load = loader.load if path.is_dir() else load_rgb
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                part = _small(file, side, load)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
                raise DataError(f"{file}: no pictures of {side}x{side} ({e})") from None
            if part is not None:
                parts.append(part)
    loader.report()
    if not parts:
        raise DataError(f"no pictures in {', '.join(map(str, paths))}")
    return _channels_first(np.concatenate(parts))


def _channels_first(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, 3, H, W) from (N, H, W, 3)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _small(
    file: Path, side: int, load: Callable[[Path | IO[bytes]], NDArray[np.uint8] | None]
) -> NDArray[np.uint8] | None:
    """(N, side, side, 3): one file's pictures; None for a broken picture and for other files.

    Raises ValueError for pictures of another size.
    """
    suffix = file.suffix.lower()
    cifar = re.fullmatch(r"(data_batch_\d|test_batch)(.bin)?", file.name)
    if suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            batches = [a for a in arrays.values() if a.dtype == np.uint8 and a.ndim == 4]
        out = np.concatenate(batches)
    elif suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in PICTURES)
            loaded = [load(archive.open(n)) for n in names]
            out = np.stack([x for x in loaded if x is not None])
    elif suffix in PICTURES:
        if (picture := load(file)) is None:
            return None
        out = picture[None]
    elif cifar:
        planes = _binary_batch(file) if cifar[2] else _python_batch(file)
        out = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    else:
        return None
    if out.shape[1:] != (side, side, 3):
        raise ValueError(f"{out.shape[2]}x{out.shape[1]} pixels")
    return out


def _binary_batch(file: Path) -> NDArray[np.uint8]:
    """(N, 3072): a record is a label, which is dropped, and 3072 bytes."""
    return np.fromfile(file, np.uint8).reshape(-1, 1 + CIFAR_BYTES)[:, 1:]


def _python_batch(file: Path) -> NDArray[np.uint8]:
    """The pixels in a pickle, found by listing its opcodes: nothing is unpickled or executed."""
    for opcode, argument, _ in pickletools.genops(file.read_bytes()):
        # Python 2 writes byte strings as the first, Python 3 as the second (protocol 2) or third.
        if argument and opcode.name in ("BINSTRING", "BINUNICODE", "BINBYTES"):
            raw = argument.encode("latin-1") if isinstance(argument, str) else bytes(argument)
            if len(raw) % CIFAR_BYTES == 0:
                return np.frombuffer(raw, np.uint8)
    raise ValueError("no CIFAR-10 batch")


def to_unit(x: Tensor) -> Tensor:
    """Map uint8 0 .. 255 to float32 in [-1, 1]."""
    return x.float() / 127.5 - 1.0
