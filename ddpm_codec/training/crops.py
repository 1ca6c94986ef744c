"""Training pictures: random crops of photographs, which are kept in the device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data import Loader
from ..errors import DataError

SCALES = (1.0, 0.7071, 0.5)  # half the crops are shrunk, which reduces compression artefacts
AT_A_TIME = 64  # files read between two checks of the memory


class Crops:
    """An endless supply of augmented crops: random place, scale, flips and transposition.

    Pictures are kept as uint8 on the device and cropped there, so that a GPU never waits for the
    host. At each scale, a picture is drawn with a probability proportional to its area.
    """

    def __init__(
        self, paths: Sequence[Path], size: int, seed: int, device: str, memory: int = 4 * 10**9
    ) -> None:
        """memory: bytes of pixels at most; of a larger collection a random part is kept.

        Raises DataError if no picture is large enough.
        """
        self.size = size
        self.generator = torch.Generator(device=device).manual_seed(seed)
        order = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]
        kept: list[list[NDArray[np.uint8]]] = [[] for _ in SCALES]
        self.loader = Loader()
        with ThreadPoolExecutor() as pool:
            for begin in range(0, len(order), AT_A_TIME):
                for scaled in pool.map(self._load, order[begin : begin + AT_A_TIME]):
                    for pictures, picture in zip(kept, scaled, strict=True):
                        if picture is not None:
                            pictures.append(picture)
                            memory -= picture.nbytes
                if memory < 0:
                    break
        self.loader.report()
        if not kept[0]:
            raise DataError(f"no picture is at least {size} pixels wide and high")
        whole = [p for pictures in kept for p in pictures]
        self.pixels = torch.from_numpy(np.concatenate([p.reshape(-1, 3) for p in whole])).to(device)
        shapes = np.array([p.shape[:2] for p in whole])
        areas = shapes.prod(1)
        shares = (0.5, 0.25, 0.25)
        chance = [
            share * a / a.sum()
            for share, a in zip(
                shares, np.split(areas, np.cumsum([len(k) for k in kept])[:-1]), strict=True
            )
        ]
        self.chance = torch.from_numpy(np.concatenate(chance)).float().to(device)
        self.begin = torch.from_numpy(np.cumsum(areas) - areas).to(device)
        self.shapes = torch.from_numpy(shapes).to(device)

    def _load(self, path: Path) -> list[NDArray[np.uint8] | None]:
        picture = self.loader.load(path)
        if picture is None:
            return [None] * len(SCALES)
        h, w = picture.shape[:2]
        out: list[NDArray[np.uint8] | None] = []
        for scale in SCALES:
            sides = round(h * scale), round(w * scale)
            if min(sides) < self.size:
                out.append(None)
            elif scale == 1.0:
                out.append(picture)
            else:
                image = Image.fromarray(picture).resize(sides[::-1], Image.Resampling.LANCZOS)
                out.append(np.asarray(image))
        return out

    def batch(self, n: int) -> Tensor:
        """(n, 3, size, size) uint8."""
        device, size = self.pixels.device, self.size

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=self.generator)

        k = torch.multinomial(self.chance, n, replacement=True, generator=self.generator)
        free = self.shapes[k] - size + 1
        corner = (uniform(n, 2) * free).long().minimum(free - 1)
        line = torch.arange(size, device=device)
        ahead = (uniform(n, 2, 1) < 0.5).long()
        along = ahead * line + (1 - ahead) * (size - 1 - line)  # (n, 2, size), some of them flipped
        rows, columns = (corner[:, :, None] + along).unbind(1)
        at = rows[:, :, None] * self.shapes[k, 1][:, None, None] + columns[:, None, :]
        at = torch.where(uniform(n, 1, 1) < 0.5, at.transpose(1, 2), at)
        return self.pixels[self.begin[k][:, None, None] + at].permute(0, 3, 1, 2)
