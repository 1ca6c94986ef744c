"""The tables that calibration measures of a trained network at each rung of its SNR ladder.

The variances decide how long a message is, so both ends must hold the same: they are in the model
file, and its digest covers them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..diffusion.schedule import Ladder
from ..diffusion.transform import BANDS, POSITIONS
from ..errors import ModelError
from ..rec.rangecoder import TOTAL

MAX_ERROR = 4096.0  # of a coefficient, squared; a picture's are within 16 * 192
RESIDUAL_ESCAPE = 31  # larger residuals of the lossless layer are coded with an escape symbol
RESIDUAL = 2 * RESIDUAL_ESCAPE + 2  # number of symbols, escape included
RESIDUAL_SCALES = 32  # rows of the table
RESIDUAL_START = 12  # the row of a residual without known neighbours
# Mean absolute residual times 16 at which the next row begins: geometric, 0.1 to 60 grey levels.
RESIDUAL_STEPS = [
    2, 2, 3, 3, 4, 5, 6, 8, 9, 11, 14, 17, 21, 26, 32, 39, 48, 59, 73, 89, 110, 135, 166, 204, 251,
    309, 379, 466, 573, 704, 866,
]  # fmt: skip
# (row, column) offsets of four lattices of pixels, in an order in which the later have neighbours.
LATTICES = ((0, 0), (1, 1), (0, 1), (1, 0))
SCALES = 32  # scale indices
SCALE_STEP = 0.25  # nats of log-scale per index
SCALE_MIN = -5.0  # log-scale of the lower edge of index 0


@dataclass
class Tables:
    """Shapes: K rungs of the ladder, S scale indices."""

    mean: NDArray[np.float64]  # (192,) of the coefficients
    # (1 or K + 1, 192, POSITIONS) E(x_0 - x0_hat)^2 before anything is known and, for a network
    # without log-scales, where all is known with the precision of each rung; see transform.across
    error: NDArray[np.float32]
    # (K or 0, 2, S) E(x_0 - x0_hat)^2 at each rung, of known (0) and of new coefficients (1), by
    # scale index, in units of the rung's noise variance 1 / SNR
    variance: NDArray[np.float32]
    residual: NDArray[np.uint16]  # (RESIDUAL_SCALES, RESIDUAL) frequencies of the lossless layer

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def error_at(self, ladder: Ladder, snr: float) -> NDArray[np.float64]:
        """(192, POSITIONS): E(x_0 - x0_hat)^2 where all is known with precision ``snr`` (or 0).

        Between two rungs 1 / error is linear in SNR, as it is for a Gaussian source; beyond the
        last it is constant. Only + - x / on doubles: both ends get the same.
        """
        if snr == 0.0:
            return self.error[0].astype(np.float64)
        snrs = [0.0, *ladder.snrs]
        a = min(sum(s <= snr for s in snrs) - 1, len(snrs) - 2)
        share = min(1.0, (snr - snrs[a]) / (snrs[a + 1] - snrs[a]))
        low, high = np.maximum(self.error[a : a + 2].astype(np.float64), 1e-9)
        return 1.0 / ((1.0 - share) / low + share / high)

    def check(self, ladder: Ladder, scales: bool) -> None:
        """Raises ModelError unless shapes, types and numbers are right.

        scales: whether the network predicts log-scales.
        """
        ladder.check()
        expected = {k: (v.shape, v.dtype) for k, v in new_tables(ladder, scales).arrays().items()}
        for name, array in self.arrays().items():
            if (array.shape, array.dtype) != expected[name]:
                raise ModelError(f"table {name!r} has the wrong shape or type")
        sums = self.residual.sum(-1, dtype=np.int64)
        if int(self.residual.min()) < 1 or np.any(sums != TOTAL):
            raise ModelError("table 'residual' does not hold frequencies")
        finite = all(np.isfinite(a).all() for a in (self.mean, self.error, self.variance))
        if (
            not finite
            or float(np.abs(self.mean).max()) > 100
            or not 0 <= float(self.error.min()) <= float(self.error.max()) <= MAX_ERROR
            or not np.all((self.variance > 0) & (self.variance <= 1e9))
            or np.any(np.diff(self.variance, axis=-1) < 0)
        ):
            raise ModelError("impossible numbers in the tables")


def log_scale(index: NDArray[Any]) -> NDArray[np.float64]:
    """ln(b / sigma) in the middle of a scale index."""
    return SCALE_MIN + SCALE_STEP * (np.asarray(index, dtype=np.float64) + 0.5)


def new_tables(ladder: Ladder, scales: bool) -> Tables:
    """Tables before any fit: the error has the Laplace distribution that the network predicts."""
    k = ladder.rungs
    rungs = 1 if scales else k + 1
    laplace = 2.0 * np.exp(2.0 * log_scale(np.arange(SCALES)))
    return Tables(
        mean=np.zeros(BANDS),
        error=np.repeat(
            0.25 / np.array([0.04, *ladder.snrs], np.float32)[:rungs], BANDS * POSITIONS
        ).reshape(rungs, BANDS, POSITIONS),
        variance=np.tile(laplace.astype(np.float32), (k if scales else 0, 2, 1)),
        residual=quantize(laplace_residual()),
    )


def quantize(p: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Probabilities along the last axis to frequencies >= 1 that add up to TOTAL exactly."""
    n = p.shape[-1]
    p = p / p.sum(-1, keepdims=True)
    f = 1 + np.floor(p * (TOTAL - n)).astype(np.int64)
    rest = TOTAL - f.sum(-1)
    np.put_along_axis(
        f, f.argmax(-1)[..., None], f.max(-1, keepdims=True) + rest[..., None], axis=-1
    )
    return f.astype(np.uint16)


def laplace_residual() -> NDArray[np.float64]:
    """P(pixel - rounded estimate) for Laplace scales 0.1 to 60 grey levels.

    (RESIDUAL_SCALES, RESIDUAL): symbol 0 is the escape, symbol k the residual k - RESIDUAL_ESCAPE -
    1.
    """
    b = 0.1 * 600 ** (np.arange(RESIDUAL_SCALES) / (RESIDUAL_SCALES - 1))
    x = (np.arange(-RESIDUAL_ESCAPE, RESIDUAL_ESCAPE + 2) - 0.5) / b[:, None]
    tail = 0.5 * np.exp(-np.abs(x))
    cdf = np.where(x < 0, tail, 1 - tail)
    escape = 1 - (cdf[:, -1:] - cdf[:, :1])
    return np.concatenate([escape, np.diff(cdf, axis=-1)], axis=-1) + 1e-7
