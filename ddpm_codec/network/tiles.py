"""Which part of a picture the network sees at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..diffusion.transform import BLOCK

TILE = 768  # side of the part of a tile that is used, pixels; part of the format
OVERLAP = 64  # pixels that a tile sees beyond it on each side; part of the format
SMALL = 32  # side of a tile, without overlap, for a network with attention; part of the format


class Tile(NamedTuple):
    """A square of blocks that is sent as one message, and what the network sees around it."""

    rows: slice  # of the picture's blocks
    columns: slice
    seen_rows: slice
    seen_columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def inner(self) -> tuple[slice, slice]:
        """The rows and columns of the tile in what is seen."""
        top = self.rows.start - self.seen_rows.start
        left = self.columns.start - self.seen_columns.start
        h, w = self.shape
        return slice(top, top + h), slice(left, left + w)


def tiles(height: int, width: int, small: bool = False) -> list[Tile]:
    """The tiles of a picture of height x width blocks, row by row.

    Fixed by the picture's size, and whether the network is for small pictures, alone, so that both
    ends compute the same.
    """
    tile, overlap = (SMALL // BLOCK, 0) if small else (TILE // BLOCK, OVERLAP // BLOCK)

    def sides(size: int) -> Iterator[tuple[slice, slice]]:
        for a in range(0, size, tile):
            b = min(size, a + tile)
            yield slice(a, b), slice(max(0, a - overlap), min(size, b + overlap))

    return [
        Tile(rows, columns, seen_rows, seen_columns)
        for rows, seen_rows in sides(height)
        for columns, seen_columns in sides(width)
    ]
