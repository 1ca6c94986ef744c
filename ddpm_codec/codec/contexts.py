"""What a level's own symbols say about those still to come, in integers on both ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..diffusion.transform import BANDS, BITS, zigzag
from ..network.tables import ENERGIES, NEAR, SURPRISES, Ladder, Tables

LATTICES = ((0, 0), (1, 1), (0, 1), (1, 0))  # blocks or pixels in an order that gives neighbours
LARGEST = (1 << 16) - 1  # larger magnitudes are not told apart


@dataclass(frozen=True)
class Setup:
    """What stays the same from level to level."""

    tables: Tables
    ladder: Ladder
    seed: int
    shape: tuple[int, int]  # blocks, vertically and horizontally
    isotropic: bool


class Surroundings:
    """How large and how surprising the coefficients around one have been, as two small integers.

    The network has seen the level before, and no more of this one than a decoder has. What of this
    level is already there says whether its scales are too large or too small here.
    """

    def __init__(self, setup: Setup, magnitude: NDArray[np.uint16]) -> None:
        """magnitude: (192, N) of cells known from the level before, SUB-ths of this level's."""
        self.weight = setup.tables.weight.astype(np.int64)
        self.shape = setup.shape
        self.magnitude = magnitude.reshape(BANDS, *setup.shape)
        # Of the coefficients of finished groups |cell - estimate| over its expectation, times 256.
        self.surprise = np.full(self.magnitude.shape, -1, np.int16)
        # 32 bits hold every sum: below 4 * 108 * 2^16 of magnitudes, 13 * 192 * 2^10 of surprises.
        self.total, self.count = np.zeros((2, *setup.shape), np.int32)

    def add(
        self, band: NDArray[np.int64], block: NDArray[np.int64], off: NDArray[np.int64],
        scale: NDArray[np.int64], magnitude: NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Coefficients were sent: (n,) each; off: |cell's centre - estimate|, SUB-ths of a cell."""
        n = self.total.size
        surprise = np.minimum(off * self.weight[scale], 1024)
        self.surprise.reshape(BANDS, n)[band, block] = surprise
        self.magnitude.reshape(BANDS, n)[band, block] = magnitude.clip(max=LARGEST)
        # Sums of integers below 2^53: exact.
        total = np.bincount(block, surprise, n).astype(np.int32)
        self.total += total.reshape(self.shape)
        self.count += np.bincount(block, minlength=n).astype(np.int32).reshape(self.shape)

    def energies(self, bands: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(b, N) class 0 .. ENERGIES - 1 of the mean magnitude around, doubling each time.

        Of the lower frequencies in the block and, at a quarter of the weight, beside it; of the
        same band in the blocks around; of the luminance. What is not there yet is as it was.
        """
        return np.stack([self._energies(k) for k in bands.tolist()])

    def _energies(self, band: int) -> NDArray[np.uint8]:
        component, z = divmod(band, BITS)
        around = _eight(self.magnitude[band])
        total, weights = 4 * around, 32
        for lower, w in LOWER[z]:
            m = self.magnitude[component * BITS + lower]
            total += w * (4 * m.astype(np.int32) + _four(m))
            weights += 8 * w
        if component:
            total += 12 * self.magnitude[z].astype(np.int32)
            weights += 12
        return _ENERGY[np.minimum(4 * total // weights, len(_ENERGY) - 1)].reshape(-1)

    def surprises(self, bands: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(b, N) class 0 .. SURPRISES - 1 of the mean surprise around; 0 where there is too little.

        Of all bands in the block (thrice) and the blocks around it, and once more (thrice) of the
        nearest lower frequencies and the luminance.
        """
        around = [3 * x + _eight(x) for x in (self.total, self.count)]
        return np.stack([self._surprises(k, *around) for k in bands.tolist()])

    def _surprises(
        self, band: int, total: NDArray[np.int32], count: NDArray[np.int32]
    ) -> NDArray[np.uint8]:
        component, z = divmod(band, BITS)
        nearest = [component * BITS + lower for lower, _ in LOWER[z]] + ([z] if component else [])
        for k in nearest:
            total = total + 3 * self.surprise[k].clip(min=0).astype(np.int32)
            count = count + np.int32(3) * (self.surprise[k] >= 0)
        out = _SURPRISE[total // np.maximum(count, 1)]
        out[count < 3] = 0
        return out.reshape(-1)


def _classes(thresholds: list[int], largest: int) -> NDArray[np.uint8]:
    """How many of the thresholds each of 0 .. largest has reached."""
    return np.searchsorted(thresholds, np.arange(largest + 1), side="right").astype(np.uint8)


_ENERGY = _classes([1 << k for k in range(ENERGIES - 1)], 1 << ENERGIES - 2)  # 32nds of a cell
_SURPRISE = 1 + _classes([90, 128, 166, 205, 256, 320, 410, 538], 1024)
assert _SURPRISE.max() == SURPRISES - 1


def _lower() -> list[list[tuple[int, int]]]:
    """For each zigzag position the next lower frequencies and their weights, the mean apart."""
    order = [tuple(p) for p in zigzag().tolist()]
    steps = ((1, 0, 2), (0, 1, 2), (1, 1, 2), (2, 0, 1), (0, 2, 1))
    return [
        [
            (order.index((v - dv, u - du)), w)
            for dv, du, w in steps
            if v >= dv and u >= du and (v - dv, u - du) != (0, 0)
        ]
        for v, u in order
    ]


LOWER = _lower()


def _padded(x: NDArray[Any]) -> NDArray[np.int32]:
    out = np.zeros((x.shape[0] + 2, x.shape[1] + 2), np.int32)  # np.pad takes several times as long
    out[1:-1, 1:-1] = x
    return out


def _four(x: NDArray[Any]) -> NDArray[np.int32]:
    """The sum of the neighbours beside, above and below; 0 beyond the picture."""
    p = _padded(x)
    return p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]


def _eight(x: NDArray[Any]) -> NDArray[np.int32]:
    """The sum of all eight neighbours."""
    p = _padded(x)
    rows = p[:-2] + p[1:-1] + p[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] - p[1:-1, 1:-1]


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
        self,
        bands: NDArray[np.int64],
        lattice: int,
        row: NDArray[np.int64],
        block: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What to add to positions and to scale indices of coefficients of a lattice, (n,) each.

        row: which of ``bands``.
        """
        weights = np.stack([self.table[k // BITS, k % BITS, lattice] for k in bands])
        move = np.zeros((len(bands), self.error[0, 0].size), np.int64)
        blocks = lattices(self.error.shape[2:])[lattice]
        for out, w, k in zip(move, weights, bands, strict=True):
            out[blocks] = (w[:4] @ self.features(k, lattice) + 128) >> 8
        return move[row, block], weights[row, 4]

    def add(
        self, band: NDArray[np.int64], block: NDArray[np.int64], error: NDArray[np.int64]
    ) -> None:
        """error: (n,) cell's centre - estimate, before any prediction, of what was sent."""
        whole = self.error.reshape(3, NEAR, -1)
        whole[band // BITS, band % BITS, block] = error


def lattices(shape: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """The blocks of each lattice, by number."""
    number = np.arange(shape[0] * shape[1]).reshape(shape)
    return [number[y::2, x::2].reshape(-1) for y, x in LATTICES]


def mirror(position: NDArray[np.int64], width: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether positions are right of the middle of a cell, and what they are seen from that end."""
    right = 2 * position >= width
    return right, np.where(right, width - 1 - position, position)
