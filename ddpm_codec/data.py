"""Pictures in folders, archives and batches, as uint8."""

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
    """(H, W, 3) uint8. Raises DataError that names the file, whatever is wrong with it."""
    try:
        with Image.open(source) as im:
            return np.asarray(im.convert("RGB"))
    except MemoryError:
        raise
    except Exception as e:  # Pillow's plugins raise anything
        name = source if isinstance(source, Path) else source.name
        raise DataError(f"{name}: broken picture ({e})") from None


class Loader:
    """Loads pictures, all but those that are broken."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self._told = 0

    def load(self, source: Path | IO[bytes]) -> NDArray[np.uint8] | None:
        """(H, W, 3) uint8, or None."""
        try:
            return load_rgb(source)
        except DataError as e:
            if str(e) not in self.broken:
                self.broken.append(str(e))
            return None

    def tell(self) -> None:
        """One warning of all that have been skipped, if there are new ones."""
        if len(self.broken) > self._told:
            self._told = len(self.broken)
            text = f"broken pictures skipped: {self._told}, the last {self.broken[-1]}"
            warn(text, DdpmcWarning)


def validation_crops(paths: Sequence[Path], size: int, count: int) -> Tensor:
    """(count, 3, size, size) uint8: fixed crops from the middle of the first pictures."""
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
    loader.tell()
    if not crops:
        raise DataError(f"no validation picture is at least {size} pixels wide and high")
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def small_pictures(paths: Sequence[Path], side: int = 32) -> Tensor:
    """(N, 3, side, side) uint8: all that the files, or the files below the folders, hold.

    Pictures, of which those in folders are skipped if they are broken; ZIP archives of pictures;
    .npz with an array (N, side, side, 3); CIFAR-10's own batches, binary (``data_batch_1.bin``) or
    for Python (``data_batch_1``). Raises DataError for what cannot be read, for pictures of another
    size, and if there are none.
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
    loader.tell()
    if not parts:
        raise DataError(f"no pictures in {', '.join(map(str, paths))}")
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()


def _small(
    file: Path, side: int, load: Callable[[Path | IO[bytes]], NDArray[np.uint8] | None]
) -> NDArray[np.uint8] | None:
    """(N, side, side, 3) of one file; None for one of another kind. Raises ValueError."""
    suffix, cifar = (
        file.suffix.lower(),
        re.fullmatch(r"(data_batch_\d|test_batch)(.bin)?", file.name),
    )
    if suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            found = [a for a in arrays.values() if a.dtype == np.uint8 and a.ndim == 4]
        out = np.concatenate(found)
    elif suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in PICTURES)
            found = [load(archive.open(n)) for n in names]
            out = np.stack([x for x in found if x is not None])
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
    """Records of a label and 3072 bytes; the label is dropped."""
    return np.fromfile(file, np.uint8).reshape(-1, 1 + 3 * 32 * 32)[:, 1:]


def _python_batch(file: Path) -> NDArray[np.uint8]:
    """The one long byte string in it, found by reading the opcodes: nothing is ever executed."""
    for opcode, argument, _ in pickletools.genops(file.read_bytes()):
        # Of Python 2, of its protocol in Python 3, of Python 3.
        if argument and opcode.name in ("BINSTRING", "BINUNICODE", "BINBYTES"):
            raw = argument.encode("latin-1") if isinstance(argument, str) else bytes(argument)
            if len(raw) % (3 * 32 * 32) == 0:
                return np.frombuffer(raw, np.uint8)
    raise ValueError("no CIFAR-10 batch")


def to_unit(x: Tensor) -> Tensor:
    """uint8 0..255 to float32 [-1, 1]."""
    return x.float() / 127.5 - 1.0
