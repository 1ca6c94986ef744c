"""Training pictures: random crops of the photographs in some folders, as uint8 batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}


def list_pictures(folders: Sequence[Path]) -> list[Path]:
    """All picture files below ``folders``, sorted. Raises DataError if there are none."""
    paths = sorted(
        p
        for d in folders
        for p in Path(d).rglob("*")
        if p.suffix.lower() in SUFFIXES and p.is_file()
    )
    if not paths:
        raise DataError(f"no pictures below {', '.join(map(str, folders))}")
    return paths


def load_rgb(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8."""
    with Image.open(path) as im:
        return np.asarray(im.convert("RGB"))


class Crops:
    """An endless supply of augmented crops: random place, scale, flips and transposition.

    Decoded pictures are kept in memory up to ``cache_bytes``; of a larger collection a random
    part is kept, and one picture is exchanged for another at every batch.
    """

    def __init__(
        self, paths: Sequence[Path], size: int, seed: int, cache_bytes: int = 2 * 10**9
    ) -> None:
        self.size = size
        self.rng = random.Random(seed)
        self.paths = list(paths)
        self.rng.shuffle(self.paths)
        self.pictures: list[NDArray[np.uint8]] = []
        self.next = 0
        used = 0
        for path in self.paths:
            picture = self._load(path)
            self.next += 1
            if picture is not None:
                self.pictures.append(picture)
                used += picture.nbytes
            if used > cache_bytes:
                break
        if not self.pictures:
            raise DataError(f"no picture is at least {size} pixels wide and high")
        # Large pictures are drawn from more often, in proportion to their area.
        self.exchange = self.next < len(self.paths)
        self.areas = [p.shape[0] * p.shape[1] for p in self.pictures]

    def _load(self, path: Path) -> NDArray[np.uint8] | None:
        picture = load_rgb(path)
        return picture if min(picture.shape[:2]) >= self.size else None

    def crop(self) -> NDArray[np.uint8]:
        """One (size, size, 3) crop."""
        rng, size = self.rng, self.size
        picture = rng.choices(self.pictures, self.areas)[0]
        h, w = picture.shape[:2]
        # Half the crops are shrunk: other scales, and compression artefacts shrink away.
        scale = min(2.0 ** rng.random(), min(h, w) / size) if rng.random() < 0.5 else 1.0
        side = int(size * scale)
        top, left = rng.randint(0, h - side), rng.randint(0, w - side)
        out = picture[top : top + side, left : left + side]
        if side != size:
            resized = Image.fromarray(out).resize((size, size), Image.Resampling.LANCZOS)
            out = np.asarray(resized)
        if rng.random() < 0.5:
            out = out[:, ::-1]
        if rng.random() < 0.5:
            out = out[::-1]
        if rng.random() < 0.5:
            out = out.transpose(1, 0, 2)
        return out

    def batch(self, n: int) -> Tensor:
        """(n, 3, size, size) uint8."""
        if self.exchange:
            fresh = self._load(self.paths[self.next % len(self.paths)])
            self.next += 1
            if fresh is not None:
                k = self.rng.randrange(len(self.pictures))
                self.pictures[k] = fresh
                self.areas[k] = fresh.shape[0] * fresh.shape[1]
        crops = np.stack([self.crop() for _ in range(n)])
        return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()


class Prefetch:
    """Makes the next ``count`` crops in a thread while the network works on these."""

    def __init__(self, crops: Crops, count: int) -> None:
        self.crops, self.count = crops, count
        self.pool = ThreadPoolExecutor(1)
        self.pending = self.pool.submit(crops.batch, count)
        self.ready = torch.empty((0, 3, crops.size, crops.size), dtype=torch.uint8)

    def next(self, n: int) -> Tensor:
        """(n, 3, size, size) uint8."""
        while len(self.ready) < n:
            self.ready = torch.cat([self.ready, self.pending.result()])
            self.pending = self.pool.submit(self.crops.batch, self.count)
        out, self.ready = self.ready[:n], self.ready[n:]
        return out


def validation_crops(paths: Sequence[Path], size: int, count: int) -> Tensor:
    """(count, 3, size, size) uint8: fixed crops from the middle of the first pictures."""
    crops = []
    for path in paths:
        picture = load_rgb(path)
        h, w = picture.shape[:2]
        if min(h, w) >= size:
            top, left = (h - size) // 2, (w - size) // 2
            crops.append(picture[top : top + size, left : left + size])
        if len(crops) == count:
            break
    if not crops:
        raise DataError(f"no validation picture is at least {size} pixels wide and high")
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def to_unit(x: Tensor) -> Tensor:
    """uint8 0..255 to float32 [-1, 1]."""
    return x.float() / 127.5 - 1.0
