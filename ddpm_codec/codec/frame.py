"""The conversion between pixels and coefficients, for pictures of any size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ..diffusion import transform
from ..diffusion.transform import BANDS, BLOCK

STRIP = 16  # rows of blocks transformed at a time

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


def padded(size: int, multiple: int) -> int:
    """The least multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


class Frame:
    """A picture's size in pixels and in blocks, and the transform between them."""

    def __init__(self, height: int, width: int, multiple: int, grey: bool) -> None:
        """multiple: the picture is extended to multiples of so many pixels; grey: R = G = B."""
        self.height, self.width = height, width
        size = padded(height, multiple), padded(width, multiple)
        self.blocks = size[0] // BLOCK, size[1] // BLOCK
        self.n = self.blocks[0] * self.blocks[1]
        self.components = 1 if grey else 3

    def strips(self, c: Floats) -> Iterator[Floats]:
        """The picture of (192, N) coefficients in strips (h, W, 3), 0 .. 255, not rounded."""
        h, w = self.height, self.width
        c = c.reshape(BANDS, *self.blocks)
        for top in range(0, self.blocks[0], STRIP):
            strip = torch.from_numpy(c[None, :, top : top + STRIP]).double()
            x = transform.inverse(strip)[0].permute(1, 2, 0).numpy()
            if self.components == 1:
                x = np.repeat(x.mean(2, keepdims=True), 3, 2)
            yield ((x[: h - top * BLOCK, :w] + 1.0) * 127.5).astype(np.float32)

    def pixels(self, c: Floats) -> Floats:
        """(H, W, 3) pixels of (192, N) coefficients, 0 .. 255, not rounded."""
        return np.concatenate(list(self.strips(c)))

    def picture(self, c: Floats) -> Pixels:
        """(H, W, 3) pixels of (192, N) coefficients, rounded."""
        # Strip by strip, because memory may not hold a large picture twice.
        rounded = (np.rint(x, out=x).clip(0, 255).astype(np.uint8) for x in self.strips(c))
        return np.concatenate(list(rounded))

    def coefficients(self, pixels: Pixels) -> Floats:
        """(192, N) coefficients of (H, W, 3) pixels, extended by their last row and column."""
        out = np.empty((BANDS, *self.blocks), np.float32)
        every = slice(0, self.blocks[1])
        for top in range(0, self.blocks[0], STRIP):
            rows = slice(top, min(top + STRIP, self.blocks[0]))
            out[:, rows] = self.part(pixels, rows, every)
        return out.reshape(BANDS, -1)

    def part(self, pixels: Pixels, rows: slice, columns: slice) -> Floats:
        """(192, h, w) coefficients of some rows and columns of blocks."""
        sides = [slice(BLOCK * s.start, BLOCK * s.stop) for s in (rows, columns)]
        some = pixels[sides[0], sides[1]]
        missing = [s.stop - s.start - n for s, n in zip(sides, some.shape[:2], strict=True)]
        whole = np.pad(some, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge")
        # 255 x_0: integers, so that the transform is exact.
        x = 2.0 * torch.from_numpy(whole).permute(2, 0, 1)[None].double() - 255.0
        return (transform.forward(x)[0] / 255.0).float().numpy()
