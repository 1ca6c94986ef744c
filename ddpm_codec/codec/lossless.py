"""The last layer, x_0 itself: the exact residual of the rounded picture (the paper's L_0).

Pixels are sent in four interleaved lattices and one colour after the other; each residual's scale
is judged by the residuals around it that are already there.
"""

from __future__ import annotations

import binascii

import numpy as np
from numpy.typing import NDArray

from ..errors import AgreementError, FormatError
from ..network.tables import LATTICES, RESIDUAL_START, RESIDUAL_STEPS, Tables
from ..rec.agree import Coder, Ints, Reader, Writer, agree, escaped_symbols


def encode(
    pixels: NDArray[np.uint8], estimate: NDArray[np.float32], margin: float, tables: Tables
) -> tuple[bytes, float]:
    """pixels, estimate: (H, W, C). Returns the layer's bytes and its symbols' ideal length in bits.

    margin: how far two machines' estimates may be apart, in grey levels.
    """
    coder = Writer()
    base = _agree(coder, estimate, margin)
    agreement = coder.ideal
    _residual(coder, base, tables, pixels.astype(np.int32) - base)
    checksum = binascii.crc_hqx(base.tobytes(), 0).to_bytes(2, "little")
    return checksum + coder.payload(), coder.ideal - agreement


def decode(
    data: bytes, estimate: NDArray[np.float32], margin: float, tables: Tables
) -> NDArray[np.uint8]:
    """(H, W, C) pixels. Raises AgreementError if this machine's estimate is too far off."""
    coder = Reader(data[2:])
    base = _agree(coder, estimate, margin)
    if data[:2] != binascii.crc_hqx(base.tobytes(), 0).to_bytes(2, "little"):
        raise AgreementError("lossless layer: this machine's arithmetic differs from the encoder's")
    pixels = base + _residual(coder, base, tables, None)
    if pixels.min() < 0 or pixels.max() > 255:
        raise FormatError("damaged lossless layer")
    return pixels.astype(np.uint8)


def _agree(coder: Coder, estimate: NDArray[np.float32], margin: float) -> Ints:
    x = estimate.astype(np.float64).reshape(-1) + 0.5
    return agree(coder, x, margin, 0, 256).reshape(estimate.shape).astype("<i4")


def _residual(coder: Coder, base: Ints, tables: Tables, truth: Ints | None) -> Ints:
    h, w, colours = base.shape
    out = np.zeros(base.shape, np.int32)
    size = np.zeros((h + 2, w + 2), np.int64)  # |residual| of this colour, with a border
    for k in range(colours):
        before = size[1:-1, 1:-1].copy()
        size, have = np.zeros_like(size), np.zeros_like(size)
        for y, x in LATTICES:
            lattice = (slice(y, h, 2), slice(x, w, 2))
            total, count = _sum3(size)[lattice], _sum3(have)[lattice]
            if k:  # the same place in the colour before counts like two neighbours
                total, count = total + 2 * before[y::2, x::2], count + 2
            rows = np.searchsorted(RESIDUAL_STEPS, 16 * total // np.maximum(count, 1), side="right")
            rows = np.where(count == 0, RESIDUAL_START, rows)
            target = None if truth is None else truth[y::2, x::2, k].reshape(-1)
            r = escaped_symbols(coder, tables.residual, rows.reshape(-1), target)
            out[y::2, x::2, k] = r.reshape(rows.shape)
            size[1:-1, 1:-1][lattice] = np.abs(out[y::2, x::2, k])
            have[1:-1, 1:-1][lattice] = 1
    return out


def _sum3(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums over the 3x3 neighbourhood; the border of one is dropped."""
    rows = x[:-2] + x[1:-1] + x[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
