"""Tiles: each block in one of them, and what it sees around it."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_codec.network import tiles as module
from ddpm_codec.network.tiles import tiles


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (9, 13), (96, 97), (128, 300)])
def test_tiles_cover_once(size: tuple[int, int], small: bool) -> None:
    count = np.zeros(size, int)
    for tile in tiles(*size, small):
        count[tile.rows, tile.columns] += 1
        seen = np.zeros(size, int)
        seen[tile.input_rows, tile.input_columns][tile.inner] += 1
        expected = np.zeros(size, int)
        expected[tile.rows, tile.columns] += 1
        np.testing.assert_array_equal(seen, expected)
        assert tile.shape == seen[tile.rows, tile.columns].shape
    assert (count == 1).all()


def test_sizes_of_tiles() -> None:
    """768 pixels, and 64 more on each side; of a network with attention its 32, and no more."""
    assert len(tiles(96, 96)) == 1 and len(tiles(97, 193)) == 6
    middle = tiles(300, 300)[5]
    assert (middle.rows, middle.columns) == (slice(96, 192), slice(96, 192))
    assert (middle.input_rows, middle.input_columns) == (slice(88, 200), slice(88, 200))
    corner = tiles(300, 300)[0]
    assert corner.input_rows == slice(0, 104) and corner.inner[0] == slice(0, 96)
    second = tiles(8, 9, small=True)[1]
    assert (second.rows, second.columns) == (slice(0, 4), slice(4, 8))
    assert (second.input_rows, second.input_columns) == (second.rows, second.columns)


def test_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "OVERLAP", 8)
    starts = [(tile.rows.start, tile.columns.start) for tile in tiles(4, 5)]
    assert starts == [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]
