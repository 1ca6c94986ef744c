"""The tiles of a picture: the network is given one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..diffusion.transform import BLOCK

# All three are part of the format.
TILE = 768  # side of a tile, pixels
OVERLAP = 64  # width of the margin that the network is given around a tile, pixels
SMALL = 32  # side of a tile of the paper's kind of network, which has no margin, pixels


class Tile(NamedTuple):
    """A square of blocks that is sent as one message, and its surroundings, in blocks."""

    rows: slice
    columns: slice
    input_rows: slice  # with the margin: what the network is given
    input_columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def inner(self) -> tuple[slice, slice]:
        """The rows and columns of the tile within the network's input."""
        top = self.rows.start - self.input_rows.start
        left = self.columns.start - self.input_columns.start
        h, w = self.shape
        return slice(top, top + h), slice(left, left + w)


def tiles(height: int, width: int, small: bool = False) -> list[Tile]:
    """The tiles of a picture of height x width blocks, row by row.

    They depend on the picture's size and the kind of network alone, so both ends use the same.
    """
    tile, overlap = (SMALL // BLOCK, 0) if small else (TILE // BLOCK, OVERLAP // BLOCK)

    def sides(size: int) -> Iterator[tuple[slice, slice]]:
        for a in range(0, size, tile):
            b = min(size, a + tile)
            yield slice(a, b), slice(max(0, a - overlap), min(size, b + overlap))

    return [
        Tile(rows, columns, input_rows, input_columns)
        for rows, input_rows in sides(height)
        for columns, input_columns in sides(width)
    ]
