"""What a level's own symbols say about those still to come, in integers on both ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .tables import BITS, NEAR, Ladder, Tables

LATTICES = ((0, 0), (1, 1), (0, 1), (1, 0))  # blocks or pixels in an order that gives neighbours


@dataclass(frozen=True)
class Setup:
    """What stays the same from level to level."""

    tables: Tables
    ladder: Ladder
    seed: int
    shape: tuple[int, int]  # blocks, vertically and horizontally
    isotropic: bool


class Activity:
    """How surprising this level has been so far around each block: a class 0 .. CONTEXTS - 1.

    Sums of |cell - estimate| in units of the predicted scale, in integers, over the coefficients
    of finished band groups in the block (counted thrice) and its eight neighbours (once).
    """

    def __init__(self, setup: Setup) -> None:
        self.weight = setup.tables.weight.astype(np.int64)
        self.shape = setup.shape
        self.total = np.zeros(setup.shape, np.int64)
        self.count = np.zeros(setup.shape, np.int64)

    def add(
        self, off: NDArray[np.int64], scale: NDArray[np.int64], sent: NDArray[np.bool_]
    ) -> None:
        """off: (g, N) |cell's centre - estimate| in SUB-ths of a cell, where ``sent``."""
        surprise = np.minimum(off * self.weight[scale], 4 * 256) * sent
        self.total += surprise.sum(0).reshape(self.shape)
        self.count += sent.sum(0).reshape(self.shape)

    def classes(self) -> NDArray[np.int64]:
        """(N,)"""
        total, count = _around(self.total), _around(self.count)
        ratio = 16 * total // np.maximum(256 * count, 1)
        out = 1 + (ratio >= 10).astype(np.int64) + (ratio >= 16)
        return np.where(count < 6, 0, out).reshape(-1)


def _around(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """2 x + the sum over the 3x3 neighbourhood."""
    p = np.pad(x, 1)
    rows = p[:-2] + p[1:-1] + p[2:]
    return 2 * x + rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


class Neighbours:
    """What this level's errors around a block say about the next: a linear prediction.

    The network sees the level before; of what this level tells, it knows nothing. Neighbouring
    blocks' lowest bands err alike, so these are sent in four lattices of blocks, and estimates move
    by a weighted sum of the errors already known: of the same band in the eight blocks around, and
    of the luminance for the colours. All in integers: weights are 2^-8, errors SUB-ths of a cell.
    """

    def __init__(self, setup: Setup, i: int) -> None:
        self.table = setup.tables.near[i].astype(np.int64)  # (3, NEAR, 4, 5)
        self.error = np.zeros((3, NEAR, *setup.shape), np.int64)

    def features(self, band: int, lattice: int) -> NDArray[np.int64]:
        """(4, n): errors beside, above and below, at the corners, in luminance; 0 if unknown."""
        component, z = divmod(band, BITS)
        p = np.pad(self.error[component, z], 1)
        beside = p[1:-1, :-2] + p[1:-1, 2:]
        above = p[:-2, 1:-1] + p[2:, 1:-1]
        corners = p[:-2, :-2] + p[:-2, 2:] + p[2:, :-2] + p[2:, 2:]
        luma = self.error[0, z] if component else np.zeros_like(beside)
        y, x = LATTICES[lattice]
        out = np.stack([f[y::2, x::2].reshape(-1) for f in (beside, above, corners, luma)])
        return out.clip(-(1 << 30), 1 << 30)

    def predict(
        self, bands: NDArray[np.int64], lattice: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(b, n) what to add to positions, (b, 1) what to add to scale indices."""
        rows = [self.table[k // BITS, k % BITS, lattice] for k in bands]
        moves = [
            (row[:4] @ self.features(k, lattice) + 128) >> 8
            for k, row in zip(bands, rows, strict=True)
        ]
        return np.stack(moves), np.stack([row[4:] for row in rows])

    def add(self, bands: NDArray[np.int64], lattice: int, error: NDArray[np.int64]) -> None:
        """error: (b, n) cell's centre - estimate, before any prediction; 0 where not sent."""
        y, x = LATTICES[lattice]
        for k, e in zip(bands, error, strict=True):
            part = self.error[k // BITS, k % BITS, y::2, x::2]
            part[:] = e.reshape(part.shape)


def lattices(shape: tuple[int, int]) -> list[NDArray[np.int64]]:
    """The blocks of each lattice, by number."""
    number = np.arange(shape[0] * shape[1]).reshape(shape)
    return [number[y::2, x::2].reshape(-1) for y, x in LATTICES]


def mirror(position: NDArray[np.int64], width: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether positions are right of the middle of a cell, and what they are seen from that end."""
    right = 2 * position >= width
    return right, np.where(right, width - 1 - position, position)
