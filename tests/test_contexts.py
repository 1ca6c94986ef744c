"""What a level's own symbols say about the others: against the definition, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_codec.codec.contexts import (
    LATTICES,
    LOWER,
    Neighbours,
    Setup,
    Surroundings,
    lattices,
    mirror,
)
from ddpm_codec.codec.nested import band_groups
from ddpm_codec.diffusion.transform import zigzag
from ddpm_codec.network.tables import NEAR, Ladder, laplace_tables

SHAPES = [(5, 6), (1, 4), (3, 1), (1, 1)]


def setup_of(shape: tuple[int, int]) -> Setup:
    return Setup(laplace_tables(Ladder()), Ladder(), 1, shape, False)


@pytest.mark.parametrize("shape", SHAPES)
def test_lattices_partition_the_blocks(shape: tuple[int, int]) -> None:
    parts = lattices(shape)
    assert sorted(np.concatenate(parts).tolist()) == list(range(shape[0] * shape[1]))


@pytest.mark.parametrize("width", [8, 16, 24])
def test_mirror(width: int) -> None:
    p = np.arange(-12, width + 12)
    right, seen = mirror(p, width)
    np.testing.assert_array_equal(right, p > (width - 1) / 2)
    np.testing.assert_array_equal(seen, seen[::-1])
    assert seen.min() == -12 and seen.max() == width // 2 - 1


def test_lower_frequencies() -> None:
    order = [tuple(p) for p in zigzag().tolist()]
    assert LOWER[0] == LOWER[1] == LOWER[2] == []
    assert [(order[z], w) for z, w in LOWER[order.index((2, 1))]] == [
        ((1, 1), 2), ((2, 0), 2), ((1, 0), 2), ((0, 1), 1),
    ]  # fmt: skip
    assert all(k < z for z, lower in enumerate(LOWER) for k, _ in lower)


@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    setup = setup_of(shape)
    setup.tables.near[3] = rng.integers(-99, 99, setup.tables.near[3].shape)
    neighbours, parts = Neighbours(setup, 3), lattices(shape)
    error: dict[tuple[int, int], NDArray[Any]] = {}  # of a band and block

    def at(band: int, y: int, x: int) -> int:
        inside = 0 <= y < shape[0] and 0 <= x < shape[1]
        return int(error.get((band, y * shape[1] + x), 0)) if inside else 0

    for bands in band_groups()[:NEAR]:
        for lattice, blocks in enumerate(parts):
            n = len(blocks)
            row, block = np.repeat(np.arange(len(bands)), n), np.tile(blocks, len(bands))
            got = neighbours.predict(bands, lattice, row, block)
            move, narrower = (x.reshape(len(bands), n) for x in got)
            for b, band in enumerate(bands):
                component, z = divmod(int(band), 64)
                w = setup.tables.near[3, component, z, lattice].tolist()
                assert (narrower[b] == w[4]).all()
                for m, place in enumerate(blocks):
                    y, x = divmod(int(place), shape[1])
                    h = at(band, y, x - 1) + at(band, y, x + 1)
                    v = at(band, y - 1, x) + at(band, y + 1, x)
                    d = sum(at(band, y + i, x + j) for i in (-1, 1) for j in (-1, 1))
                    luma = at(z, y, x) if component else 0
                    expected = (w[0] * h + w[1] * v + w[2] * d + w[3] * luma + 128) >> 8
                    assert move[b, m] == expected
            new = rng.integers(-50, 50, len(row))
            neighbours.add(bands[row], block, new)
            error |= {(int(bands[r]), int(k)): e for r, k, e in zip(row, block, new, strict=True)}


@pytest.mark.parametrize("shape", SHAPES)
def test_surroundings(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    setup, n = setup_of(shape), shape[0] * shape[1]
    size = np.floor(np.exp(rng.uniform(0, 7, (192, n)))).astype(np.uint16)
    s = Surroundings(setup, size.copy())
    surprise = np.full((192, n), -1)
    groups = band_groups()
    for bands in groups[:9]:
        row, block = np.nonzero(rng.random((len(bands), n)) < 0.6)
        off, scale, new = rng.integers(0, 90, (3, len(row)))
        scale, new, at = scale % 32, new * 2000, (bands[row], block)
        s.add(*at, off, scale, new)
        size[at] = np.minimum(new, 65535)
        surprise[at] = np.minimum(1024, off * setup.tables.weight[scale].astype(int))

    def around(a: NDArray[Any], y: int, x: int, steps: list[tuple[int, int]]) -> int:
        grid, places = a.reshape(shape), [(y + i, x + j) for i, j in steps]
        return sum(int(grid[p]) for p in places if 0 <= p[0] < shape[0] and 0 <= p[1] < shape[1])

    eight = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    four = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    total = np.where(surprise >= 0, surprise, 0).sum(0)
    count = (surprise >= 0).sum(0)
    for band in (0, 1, 64, 7, 70, 133, 20, 63, 191):
        component, z = divmod(band, 64)
        energies, surprises = (f(np.array([band]))[0] for f in (s.energies, s.surprises))
        for block in range(n):
            y, x = divmod(block, shape[1])
            mass, weights = 4 * around(size[band], y, x, eight), 32
            sums = np.array([3 * a[block] + around(a, y, x, eight) for a in (total, count)])
            near = [(64 * component + k, w) for k, w in LOWER[z]]
            for k, w in near:
                mass += 4 * w * int(size[k, block]) + w * around(size[k], y, x, four)
                weights += 8 * w
            for k in [k for k, _ in near] + ([z] if component else []):
                if surprise[k, block] >= 0:
                    sums += 3 * np.array([surprise[k, block], 1])
            if component:
                mass, weights = mass + 12 * int(size[z, block]), weights + 12
            expected = sum(2**k <= 4 * mass // weights for k in range(9))
            assert energies[block] == expected
            ratio = sums[0] // max(sums[1], 1)
            steps = (90, 128, 166, 205, 256, 320, 410, 538)
            expected = 0 if sums[1] < 3 else 1 + sum(t <= ratio for t in steps)
            assert surprises[block] == expected


def test_lattices_see_neighbours() -> None:
    """Each lattice after the first has finished blocks on at least two sides."""
    done: set[tuple[int, int]] = set()
    for y, x in LATTICES:
        sides = {((y + i) % 2, (x + j) % 2) for i in (-1, 0, 1) for j in (-1, 0, 1)}
        assert not done or sides & done
        done.add((y, x))
    assert len(done) == 4
