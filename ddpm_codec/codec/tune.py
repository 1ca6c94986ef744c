"""Tunes: how a file's bits are distributed over the bands, by a weight of each band's precision.

Band k is observed with precision W_k SNR(t), W_k <= 1. *even* has W_k = 1, as DDPM does, and leads
to the highest quality. *visual* has smaller weights for colours and high frequencies. Eyes see
errors there less, and a band of few large coefficients takes fewer bits than a Gaussian one of its
variance. Its numbers were found by trials on five photographs. It is better by SSIMULACRA2, by
MS-SSIM and, below some 39 dB, by PSNR.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..diffusion.transform import BANDS, zigzag
from .header import MAX_TUNE

QUARTER_POWERS = (1.0, 0.8408964152537145, 0.7071067811865476, 0.5946035575013605)  # 2^-(j / 4)


class Tune(NamedTuple):
    """Reductions of precision, in quarters of an octave, 0 .. MAX_TUNE."""

    red_blue: int  # of the second component, relative to luminance
    green_magenta: int  # of the third component
    slope: int  # of a frequency of 8 half periods a block, relative to frequency 0

    @property
    def possible(self) -> bool:
        return all(0 <= n <= MAX_TUNE for n in self)


TUNES = {"visual": Tune(8, 6, 12), "even": Tune(0, 0, 0)}
GOOD = 38.0  # dB; for a higher PSNR *even* is the better choice


def default(path: str, psnr: float | None = None, lossless: bool = False) -> Tune:
    """The tune for a path and a target quality, given as a PSNR in dB or as lossless."""
    even = path == "isotropic" or lossless or (psnr or 0.0) > GOOD
    return TUNES["even" if even else "visual"]


@cache
def weights(tune: Tune) -> NDArray[np.float64]:
    """(192,) W_k: the same doubles on every machine.

    W_k = 2^-(n / 4), where n is the component's reduction plus slope F // 128, and F = floor(16
    |(v, u)|) for the band with v and u half periods down and across a block.
    """
    f = [math.isqrt(256 * (v * v + u * u)) for v, u in zigzag().tolist()]
    n = [c + tune.slope * k // 128 for c in (0, tune.red_blue, tune.green_magenta) for k in f]
    out = np.array([math.ldexp(QUARTER_POWERS[k % 4], -(k // 4)) for k in n])
    assert len(out) == BANDS
    return out
