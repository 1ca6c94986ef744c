"""The last layer, x_0 itself: the exact residual of the rounded picture (the paper's L_0).

Pixels are sent one colour after the other, each in four interleaved lattices. The scale of a
residual's distribution is estimated from the neighbouring residuals that were sent before.
"""

from __future__ import annotations

import binascii

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..network.tables import LATTICES, RESIDUAL_START, RESIDUAL_STEPS, Tables
from ..rec.rangecoder import Coder, Ints, RangeReader, RangeWriter, escaped_symbols

OFFSETS = np.arange(96, 161)  # candidates for the offset before rounding, in 256ths


def encode(
    pixels: NDArray[np.uint8], estimate: NDArray[np.float32], tables: Tables
) -> tuple[bytes, float]:
    """pixels, estimate: (H, W, C). Returns the layer's bytes and its symbols' ideal length in bits.

    The first byte is an offset, in 256ths of a grey level, that is added to the estimates before
    they are rounded down. It is about half a level, chosen so that no sum is near an integer:
    between machines, the estimates of a floating-point network differ in their last digits.
    """
    fractions = np.sort(estimate.astype(np.float64).reshape(-1) % 1.0)
    thresholds = 1.0 - OFFSETS / 256
    at = np.searchsorted(fractions, thresholds).clip(1, len(fractions) - 1)
    below, above = (np.abs(fractions[k] - thresholds) for k in (at - 1, at))
    offset = int(OFFSETS[np.minimum(below, above).argmax()])
    base = _rounded(estimate, offset)
    coder = RangeWriter()
    _residual(coder, base, tables, pixels.astype(np.int32) - base)
    checksum = binascii.crc_hqx(base.tobytes(), 0).to_bytes(2, "little")
    return bytes([offset]) + checksum + coder.payload(), coder.ideal


def decode(data: bytes, estimate: NDArray[np.float32], tables: Tables) -> NDArray[np.uint8]:
    """(H, W, C) pixels. Raises FormatError, also if this machine's estimate differs."""
    if len(data) < 3:
        raise FormatError("damaged lossless layer")
    coder = RangeReader(data[3:])
    base = _rounded(estimate, data[0])
    if data[1:3] != binascii.crc_hqx(base.tobytes(), 0).to_bytes(2, "little"):
        raise FormatError("lossless layer: this machine's arithmetic differs from the encoder's")
    pixels = base + _residual(coder, base, tables, None)
    if pixels.min() < 0 or pixels.max() > 255:
        raise FormatError("damaged lossless layer")
    return pixels.astype(np.uint8)


def _rounded(estimate: NDArray[np.float32], offset: int) -> Ints:
    return np.floor(estimate.astype(np.float64) + offset / 256).clip(0, 255).astype("<i4")


def _residual(coder: Coder, base: Ints, tables: Tables, truth: Ints | None) -> Ints:
    """(H, W, C) residuals, written if ``truth`` is given, else read."""
    h, w, colours = base.shape
    out = np.zeros(base.shape, np.int32)
    magnitude = np.zeros((h + 2, w + 2), np.int64)  # |residual| of one colour, with a border
    for k in range(colours):
        before = magnitude[1:-1, 1:-1].copy()
        magnitude, sent = np.zeros_like(magnitude), np.zeros_like(magnitude)
        for y, x in LATTICES:
            lattice = (slice(y, h, 2), slice(x, w, 2))
            total, count = _sum3(magnitude)[lattice], _sum3(sent)[lattice]
            if k:  # the residual of the colour before counts like two neighbours
                total, count = total + 2 * before[y::2, x::2], count + 2
            rows = np.searchsorted(RESIDUAL_STEPS, 16 * total // np.maximum(count, 1), side="right")
            rows = np.where(count == 0, RESIDUAL_START, rows)
            target = None if truth is None else truth[y::2, x::2, k].reshape(-1)
            r = escaped_symbols(coder, tables.residual, rows.reshape(-1), target)
            out[y::2, x::2, k] = r.reshape(rows.shape)
            magnitude[1:-1, 1:-1][lattice] = np.abs(out[y::2, x::2, k])
            sent[1:-1, 1:-1][lattice] = 1
    return out


def _sum3(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums over the 3x3 neighbourhood; the border of one is dropped."""
    rows = x[:-2] + x[1:-1] + x[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
