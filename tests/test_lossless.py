"""The last layer: exact pixels from any estimate, at what the tables say that costs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_codec.codec import lossless
from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import FormatError
from ddpm_codec.network.tables import Tables, new_tables


@pytest.fixture(scope="module")
def tables() -> Tables:
    return new_tables(Ladder(), scales=True)


def scene(
    height: int, width: int, colours: int, off: float
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pixels, and an estimate that is off by so much."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    clean = np.stack([90 + 3 * x - y, 200 - 2 * x + y, 120 + 60 * np.sin(x)][:colours], -1)
    pixels = (clean + rng.laplace(0, 2, clean.shape)).clip(0, 255).astype(np.uint8)
    return pixels, (pixels + rng.laplace(0, off, pixels.shape)).astype(np.float32)


@pytest.mark.parametrize("off", [0.0, 0.3, 4.0, 200.0])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 2), (23, 30)])
def test_round_trip(tables: Tables, size: tuple[int, int], colours: int, off: float) -> None:
    pixels, estimate = scene(*size, colours, off)
    data, _ = lossless.encode(pixels, estimate, tables)
    out = lossless.decode(data, estimate, tables)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, pixels)


def test_extreme_pixels(tables: Tables) -> None:
    """Where the estimate is at the other end of the range, and beyond it."""
    pixels = np.array([0, 255, 0, 255], np.uint8).reshape(2, 2, 1)
    estimate = np.array([255, 0, 900, -900], np.float32).reshape(2, 2, 1)
    data, _ = lossless.encode(pixels, estimate, tables)
    np.testing.assert_array_equal(lossless.decode(data, estimate, tables), pixels)


def test_length(tables: Tables) -> None:
    """Bits written are the symbols' own; the better the estimate, the fewer."""
    sizes = []
    for off in (0.2, 1.0, 5.0, 30.0):
        pixels, estimate = scene(40, 50, 3, off)
        data, ideal = lossless.encode(pixels, estimate, tables)
        assert ideal - 32 <= 8 * (len(data) - 3) <= 1.01 * ideal + 100
        sizes.append(ideal / pixels.size)
    assert sizes == sorted(sizes)
    # Of errors rounded to grey levels, Laplacian of scale 5, the entropy is log2(2 e 5) bits;
    # their scale has to be guessed from a few neighbours.
    assert 1 < sizes[2] / np.log2(2 * np.e * 5) < 1.15
    assert sizes[0] < 0.9


def test_the_last_digits_of_an_estimate_do_not_matter(tables: Tables) -> None:
    """Estimates are moved to where none is near a whole number: of few, far away."""
    pixels, estimate = scene(6, 5, 3, 2.0)
    data, _ = lossless.encode(pixels, estimate, tables)
    rng = np.random.default_rng(1)
    for _ in range(4):
        other = estimate + (1e-4 * rng.choice([-1, 1], estimate.shape)).astype(np.float32)
        np.testing.assert_array_equal(lossless.decode(data, other, tables), pixels)
    moved = (estimate.astype(np.float64) + data[0] / 256) % 1
    assert min(moved.min(), 1 - moved.max()) > 1e-3


def test_the_move_is_the_best_there_is(tables: Tables) -> None:
    pixels, estimate = scene(9, 9, 3, 2.0)
    data, _ = lossless.encode(pixels, estimate, tables)

    def distance(move: int) -> float:
        moved = (estimate.astype(np.float64) + move / 256) % 1.0
        return float(np.minimum(moved, 1 - moved).min())

    assert data[0] in lossless.OFFSETS
    assert distance(data[0]) == max(distance(int(k)) for k in lossless.OFFSETS)


def test_another_estimate_is_noticed(tables: Tables) -> None:
    pixels, estimate = scene(40, 50, 3, 2.0)
    data, _ = lossless.encode(pixels, estimate, tables)
    for far in (-0.05, 0.05, 1.0):
        with pytest.raises(FormatError, match="lossless layer: this machine's arithmetic"):
            lossless.decode(data, estimate + np.float32(far), tables)
    for short in (b"", data[:1], data[:2]):
        with pytest.raises(FormatError, match="damaged lossless layer"):
            lossless.decode(short, estimate, tables)


def test_impossible_pixels_are_damage(tables: Tables) -> None:
    """Residuals that lead out of the range, behind a checksum that is right."""
    pixels, estimate = scene(8, 8, 1, 0.0)
    bright = np.full_like(estimate, 255)
    high, _ = lossless.encode(np.full_like(pixels, 255), bright, tables)
    data, _ = lossless.encode(np.full_like(pixels, 30), np.zeros_like(estimate), tables)
    with pytest.raises(FormatError, match="damaged lossless layer"):
        lossless.decode(high[:3] + data[3:], bright, tables)
