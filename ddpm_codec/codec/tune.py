"""What a file's bits are spent on: precision need not be the same in all bands.

Band k is observed with precision W_k SNR(t), W_k <= 1. *even*, W_k = 1, is DDPM to the letter, and
leads to the highest quality. Eyes see less of an error in colours and in high frequencies, and a
band of few large coefficients needs fewer bits than Gaussian ones of its variance would: *visual*,
found by trying on five photographs, serves SSIMULACRA2, MS-SSIM and, below some 39 dB, PSNR, too.
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
    """In quarters of an octave of precision, 0 .. MAX_TUNE."""

    red_blue: int  # by how much less the second component is known than luminance is
    green_magenta: int  # ... and the third
    slope: int  # by how much less high frequencies are, at 8 half periods a block

    @property
    def possible(self) -> bool:
        return all(0 <= n <= MAX_TUNE for n in self)


TUNES = {"visual": Tune(8, 6, 12), "even": Tune(0, 0, 0)}
GOOD = 38.0  # dB, beyond which only *even* is sure to lead


def default(path: str, psnr: float | None = None, lossless: bool = False) -> Tune:
    """What serves a target best."""
    even = path == "isotropic" or lossless or (psnr or 0.0) > GOOD
    return TUNES["even" if even else "visual"]


@cache
def weights(tune: Tune) -> NDArray[np.float64]:
    """(192,) W_k: the same doubles on every machine.

    W_k = 2^-(n / 4), n = that of the component + slope F // 128, F = floor(16 |(v, u)|) of the band
    with v and u half periods down and across a block.
    """
    f = [math.isqrt(256 * (v * v + u * u)) for v, u in zigzag().tolist()]
    n = [c + tune.slope * k // 128 for c in (0, tune.red_blue, tune.green_magenta) for k in f]
    out = np.array([math.ldexp(QUARTER_POWERS[k % 4], -(k // 4)) for k in n])
    assert len(out) == BANDS
    return out
