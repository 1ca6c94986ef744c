"""What a file's bits are spent on: precision need not be the same in all bands.

White noise of one size everywhere is best for PSNR over RGB. Eyes see less of an error in colours
and in high frequencies: with --tune visual band k is observed with precision W_k SNR(t), W_k <= 1.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..diffusion.transform import BANDS, zigzag
from .container import MAX_TUNE

QUARTER_POWERS = (1.0, 0.8408964152537145, 0.7071067811865476, 0.5946035575013605)  # 2^-(j / 4)


class Tune(NamedTuple):
    """In quarters of an octave of precision, 0 .. MAX_TUNE."""

    red_blue: int  # by how much less the second component is known than luminance is
    green_magenta: int  # ... and the third
    slope: int  # by how much less high frequencies are, at 8 half periods a block

    @property
    def possible(self) -> bool:
        return all(0 <= n <= MAX_TUNE for n in self)


TUNES = {"psnr": Tune(0, 0, 0), "visual": Tune(6, 4, 6)}


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
