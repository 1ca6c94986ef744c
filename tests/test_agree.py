"""Integers that both ends agree upon, and the range coder under them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_codec.network import tables
from ddpm_codec.rec import agree as module
from ddpm_codec.rec.agree import TOTAL, Reader, Writer, agree, escaped_symbols

# --- Agreement ---------------------------------------------------------------------------------

MARGIN = 1e-3
LOW, HIGH = -5, 9


def planted() -> NDArray[np.float64]:
    """Values on, around and far from the margin, at every integer near and beyond the limits."""
    offsets = np.array([0, 1e-9, 0.5, 0.999, 1.001, 1.5, 20, 400]) * MARGIN
    offsets = np.concatenate([offsets, -offsets])
    return (np.arange(LOW - 3, HIGH + 4)[:, None] + offsets).ravel()


def both(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[Any, Any, Writer]:
    writer = Writer()
    ours = agree(writer, x, MARGIN, LOW, HIGH)
    theirs = agree(Reader(writer.payload()), y, MARGIN, LOW, HIGH)
    return ours, theirs, writer


@pytest.fixture
def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks stay where they are."""
    monkeypatch.setattr(module, "MOVE_BITS", 0)


def test_agreed_integers_are_floors(unmoved: None) -> None:
    x = planted()
    ours, theirs, _ = both(x, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, np.floor(x).clip(LOW, HIGH - 1))
    assert ours.min() == LOW and ours.max() == HIGH - 1


def test_moved_integers_are_floors() -> None:
    """Of x and the least even number of margins under which fewest are near."""
    x = np.random.default_rng(0).uniform(LOW - 1, HIGH + 1, 3000)
    x = np.concatenate([x, planted()])
    ours, theirs, _ = both(x, x)
    np.testing.assert_array_equal(ours, theirs)
    moved = x + 2 * MARGIN * np.arange(32)[:, None]
    integer = np.rint(moved)
    near = (np.abs(moved - integer) < MARGIN) & (integer > LOW) & (integer < HIGH)
    best = near.sum(1).argmin()
    assert best > 0 and near[best].sum() < near[0].sum() / 4
    np.testing.assert_array_equal(ours, np.floor(moved[best]).clip(LOW, HIGH - 1))


@pytest.mark.parametrize("seed", range(4))
def test_noise_below_the_margin_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for x in (planted(), np.tile(planted(), 20) + 2 * MARGIN * rng.integers(0, 32, 20 * 336)):
        noise = rng.choice([-1.0, 1.0], x.shape)
        ours, theirs, _ = both(x, x + 0.999 * MARGIN * noise)
        np.testing.assert_array_equal(ours, theirs)


def test_noise_above_the_margin_changes_something(unmoved: None) -> None:
    x = planted()
    for sign in (-1, 1):
        ours, theirs, _ = both(x, x + 1.002 * MARGIN * sign)
        differ = ours != theirs
        assert differ.any()
        # Only where the value is just outside the margin: the others are agreed upon or far.
        outside = np.abs(np.abs(x - np.rint(x)) - 1.001 * MARGIN) < 1e-9
        assert not differ[~outside].any()
        limits = np.rint(x)
        np.testing.assert_array_equal(
            differ, outside & (limits > LOW) & (limits < HIGH) & (sign * (x - limits) < 0)
        )


def test_price_of_agreement() -> None:
    """Of what it costs to list all that are near."""
    rng = np.random.default_rng(0)
    for margin, n, share in ((1e-4, 40_000, 0.6), (4.6e-4, 40_000, 0.2), (4.6e-4, 700, 0.8)):
        writer, p = Writer(), 2 * margin
        for _ in range(40_000 // n):
            agree(writer, rng.uniform(-100, 100, n), margin, -100, 100)
        listed = 40_000 * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) + 40_000 * p
        assert writer.ideal < share * listed


def test_limits_need_no_agreement() -> None:
    """What is clipped is not on any boundary that matters."""
    x = np.array([LOW, LOW - 1.0, LOW - 7, HIGH, HIGH + 1.0, 1e6, -1e6])
    quiet = np.full(7, 0.5)
    assert both(x, x)[2].ideal == both(quiet, quiet)[2].ideal
    ours, theirs, _ = both(x, x + 0.4)
    np.testing.assert_array_equal(ours, theirs)
    loud = both(np.zeros(7), np.zeros(7))[2].ideal
    assert loud > both(quiet, quiet)[2].ideal + 7 * 6


def test_price_where_most_does_not_matter() -> None:
    """Whoever says what share of numbers is near an integer that matters pays less, if so."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random(4000) < 0.05, rng.uniform(0, 9, 4000), rng.uniform(-90, 0, 4000))
    prices, margin = [], 1e-4
    for share in (1.0, 0.05):
        writer = Writer()
        ours = agree(writer, x, margin, 0, 9, share)
        noise = margin * rng.uniform(-1, 1, x.shape)
        theirs = agree(Reader(writer.payload()), x + noise, margin, 0, 9, share)
        np.testing.assert_array_equal(ours, theirs)
        prices.append(writer.ideal)
    assert prices[1] < prices[0]


def test_without_a_coder_there_is_nobody_to_agree_with() -> None:
    x = planted()
    got = agree(None, x, MARGIN, LOW, HIGH)
    np.testing.assert_array_equal(got, np.floor(x).clip(LOW, HIGH - 1))


# --- The coder ---------------------------------------------------------------------------------


def test_coder_round_trip() -> None:
    rng = np.random.default_rng(6)
    table = tables.quantize(rng.gamma(0.3, size=(5, 16)))
    rows = rng.integers(0, 5, 3000)
    symbols = rng.integers(0, 16, 3000).astype(np.int32)
    bits = (rng.random(1000) < 0.01).astype(np.int32)
    writer = Writer()
    writer.binary(600, 1000, bits)
    writer.symbols(table, rows, symbols)
    writer.binary(TOTAL // 2, 0, bits[:0])
    writer.symbols(table, rows[:0], symbols[:0])
    reader = Reader(writer.payload())
    np.testing.assert_array_equal(reader.binary(600, 1000), bits)
    np.testing.assert_array_equal(reader.symbols(table, rows), symbols)
    p = table[rows, symbols] / TOTAL
    ideal = -np.log2(p).sum() - 1000 * np.log2(1 - 600 / 65536)
    ideal += bits.sum() * np.log2(65536 / 600 - 1)
    assert writer.ideal == pytest.approx(ideal, rel=1e-9)
    assert ideal - 32 <= 8 * len(writer.payload()) <= 1.001 * ideal + 64


def test_numbers_round_trip() -> None:
    values = np.array([0, 1, 2, 3, 7, 8, 255, 65535, 65536, 2**30, 2**31 - 2, 2**31 - 1], np.int32)
    writer = Writer()
    writer.numbers(values, len(values))
    writer.numbers(values[:0], 0)
    got = Reader(writer.payload()).numbers(None, len(values))
    np.testing.assert_array_equal(got, values)
    assert got.dtype == np.int32
    # Elias: 2 floor(log2(n + 1)) + 1 bits each.
    assert writer.ideal == sum(2 * ((int(v) + 1).bit_length() - 1) + 1 for v in values)


def test_escapes_round_trip() -> None:
    """Symbol 0 stands for what the table does not hold: here beyond -31 .. 31."""
    table = tables.quantize(tables.laplace_residual())
    wild = [-(2**30), -100_000, -33, -32, -31, -30, -1, 0, 1, 30, 31, 32, 33, 300, 100_000, 2**30]
    j = np.array(wild * 3, np.int32)
    rows = np.arange(len(j)) % len(table)
    writer = Writer()
    np.testing.assert_array_equal(escaped_symbols(writer, table, rows, j), j)
    reader = Reader(writer.payload())
    np.testing.assert_array_equal(escaped_symbols(reader, table, rows, None), j)
    reader = Reader(writer.payload())
    symbols = reader.symbols(table, rows)
    assert symbols[:16].tolist() == [0, 0, 0, 0, 1, 2, 31, 32, 33, 62, 63, 0, 0, 0, 0, 0]
