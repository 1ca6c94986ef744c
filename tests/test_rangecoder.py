"""The range coder under integer tables, and numbers beyond what they hold."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_codec.errors import FormatError
from ddpm_codec.network import tables
from ddpm_codec.rec.rangecoder import TOTAL, RangeReader, RangeWriter, escaped_symbols


def test_coder_round_trip() -> None:
    rng = np.random.default_rng(6)
    table = tables.quantize(rng.gamma(0.3, size=(5, 16)))
    rows = rng.integers(0, 5, 3000)
    symbols = rng.integers(0, 16, 3000).astype(np.int32)
    bits = (rng.random(1000) < 0.01).astype(np.int32)
    writer = RangeWriter()
    writer.binary(600, 1000, bits)
    writer.symbols(table, rows, symbols)
    writer.binary(TOTAL // 2, 0, bits[:0])
    writer.symbols(table, rows[:0], symbols[:0])
    reader = RangeReader(writer.payload())
    np.testing.assert_array_equal(reader.binary(600, 1000), bits)
    np.testing.assert_array_equal(reader.symbols(table, rows), symbols)
    p = table[rows, symbols] / TOTAL
    ideal = -np.log2(p).sum() - 1000 * np.log2(1 - 600 / 65536)
    ideal += bits.sum() * np.log2(65536 / 600 - 1)
    assert writer.ideal == pytest.approx(ideal, rel=1e-9)
    assert ideal - 32 <= 8 * len(writer.payload()) <= 1.001 * ideal + 64


def test_numbers_round_trip() -> None:
    values = np.array([0, 1, 2, 3, 7, 8, 255, 65535, 65536, 2**30, 2**31 - 2, 2**31 - 1], np.int32)
    writer = RangeWriter()
    writer.numbers(values, len(values))
    writer.numbers(values[:0], 0)
    got = RangeReader(writer.payload()).numbers(None, len(values))
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
    writer = RangeWriter()
    np.testing.assert_array_equal(escaped_symbols(writer, table, rows, j), j)
    reader = RangeReader(writer.payload())
    np.testing.assert_array_equal(escaped_symbols(reader, table, rows, None), j)
    reader = RangeReader(writer.payload())
    symbols = reader.symbols(table, rows)
    assert symbols[:16].tolist() == [0, 0, 0, 0, 1, 2, 31, 32, 33, 62, 63, 0, 0, 0, 0, 0]


def test_damaged_words() -> None:
    """They give other symbols, or FormatError, and nothing else."""
    table = tables.quantize(tables.laplace_residual())
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 32, 500)
    for payload in (b"", b"abc", bytes(40), b"\xff" * 40, *(rng.bytes(60) for _ in range(40))):
        try:
            got = escaped_symbols(RangeReader(payload), table, rows, None)
        except FormatError:
            continue
        assert got.shape == (500,) and got.dtype == np.int32


def test_pieces_of_a_large_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbols are coded some millions of probabilities at a time: the same bytes."""
    table = tables.quantize(np.random.default_rng(0).gamma(0.3, size=(3, 1 << 16)))
    rows = np.arange(150) % 3
    symbols = np.random.default_rng(1).integers(0, 1 << 16, 150).astype(np.int32)
    writer, once = RangeWriter(), RangeWriter()
    writer.symbols(table, rows, symbols)
    once._piece(table[rows], symbols)
    assert writer.payload() == once.payload()
    np.testing.assert_array_equal(RangeReader(writer.payload()).symbols(table, rows), symbols)
