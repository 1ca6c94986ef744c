"""Integer tables that turn agreed integers into probabilities; fitted by ``calibrate``.

Everything the entropy coder sees comes from here: 16-bit frequencies, indexed by level, by a
context made of what is already decoded, by the network's scale for the coefficient, and by where
its estimate lies relative to the grid of cells.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..diffusion.transform import BANDS, POSITIONS
from ..errors import ModelError

MAX_ERROR = 4096.0  # of a coefficient, squared; a picture's are within 16 * 192
TOTAL = 1 << 16  # frequencies of a row add up to this
SUB = 8  # positions of the estimate inside a cell
WINDOW = 12  # sub-cells beside the known cell in which the estimate is told apart
ESCAPE = 6  # first symbols run from -ESCAPE to ESCAPE; beyond, an escape and a plain number
FIRST = 2 * ESCAPE + 2  # their alphabet, escape included
RESIDUAL_ESCAPE = 31  # the same for the lossless layer
RESIDUAL = 2 * RESIDUAL_ESCAPE + 2
SCALES = 32  # scale indices
SCALE_STEP = 0.25  # nats of log-scale per index
SCALE_MIN = -5.0  # log-scale of the lower edge of index 0
MARGIN = (5e-5, 5e-5)  # agreement margins of eps and of lam before any fit
NEAR = 6  # bands of each component, in zigzag order, that lean on the neighbouring blocks
LAWS = 2 * SCALES  # laws that symbols are coded under: a scale index, adjusted by half steps
ENERGIES = 10  # classes of how large the coefficients around are, see Surroundings
SURPRISES = 10  # classes of how surprising they were


@dataclass(frozen=True)
class Ladder:
    """The levels: SNR of the last one, and how cells divide."""

    levels: int = 9
    ratio: int = 2
    finest: int = 2560

    def check(self) -> None:
        """Raises ModelError for a ladder that the format does not hold."""
        numbers = (self.levels, self.ratio, self.finest)
        ok = all(isinstance(n, int) for n in numbers) and 1 <= self.levels <= 40
        if not (ok and 2 <= self.ratio <= 16 and 1 <= self.finest < 1 << 31):
            raise ModelError("impossible levels")
        if self.ratio**self.levels > 1 << 31:
            raise ModelError("impossible levels")

    @property
    def snrs(self) -> list[float]:
        return [self.finest / self.ratio ** (2 * (self.levels - 1 - i)) for i in range(self.levels)]


@dataclass
class Tables:
    """Shapes: L levels, S scales, W laws, P = WINDOW + SUB * ratio / 2 positions.

    Left and right are alike, so the positions of an estimate are those left of a cell's middle;
    beyond it the mirrored symbol is coded under the mirrored position.
    """

    mean: NDArray[np.float64]  # (192,) of the coefficients
    prior: NDArray[np.uint8]  # (192,) scale index before anything is known
    # (L + 1, 192, POSITIONS) E(x_0 - x0_hat)^2 before level i, isotropic path; see transform.across
    error: NDArray[np.float32]
    on: NDArray[np.uint8]  # (L,) least scale index at which a coefficient is first sent
    first: NDArray[np.uint16]  # (L, W, SUB / 2, FIRST)
    refine: NDArray[np.uint16]  # (L, W, P, ratio)
    adjust: NDArray[np.int8]  # (2, S, ENERGIES, SURPRISES) of new, of known coefficients, see law
    near: NDArray[np.int16]  # (L, 3, NEAR, 4, 5) for each lattice, see Neighbours
    residual: NDArray[np.uint16]  # (SCALES, RESIDUAL) of the lossless layer
    weight: NDArray[
        np.uint16
    ]  # (S,) 2^8 / expected distance of cell and estimate, see Surroundings
    margin: NDArray[np.float64]  # (L, 2) agreement margins of eps and lam, as given after level i

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def law(
        self, known: NDArray[Any], scale: NDArray[Any], energy: NDArray[Any], surprise: NDArray[Any]
    ) -> NDArray[np.int64]:
        """The law of each coefficient's symbol; all of one shape, ``known`` 0 or 1."""
        law = 2 * scale + self.adjust[known, scale, energy, surprise].astype(np.int64)
        return law.clip(0, LAWS - 1)

    def error_at(self, ladder: Ladder, snr: float) -> NDArray[np.float64]:
        """(192, POSITIONS): E(x_0 - x0_hat)^2 where all is known with precision ``snr`` (or 0).

        Between two levels 1 / error is linear in SNR, as it is for a Gaussian source; beyond the
        last it stays. Only + - x / on doubles: both ends get the same.
        """
        snrs = [0.0, *ladder.snrs]
        a = min(sum(s <= snr for s in snrs) - 1, len(snrs) - 2)
        share = min(1.0, (snr - snrs[a]) / (snrs[a + 1] - snrs[a]))
        low, high = np.maximum(self.error[a : a + 2].astype(np.float64), 1e-9)
        return 1.0 / ((1.0 - share) / low + share / high)

    def check(self, ladder: Ladder) -> None:
        """Raises ModelError unless shapes, types and sums are right."""
        ladder.check()
        expected = {k: (v.shape, v.dtype) for k, v in laplace_tables(ladder).arrays().items()}
        for name, array in self.arrays().items():
            if (array.shape, array.dtype) != expected[name]:
                raise ModelError(f"table {name!r} has the wrong shape or type")
            if name in ("first", "refine", "residual") and (
                int(array.min()) < 1 or np.any(array.sum(-1, dtype=np.int64) != TOTAL)
            ):
                raise ModelError(f"table {name!r} does not hold frequencies")
        finite = np.isfinite(self.mean).all() and np.isfinite(self.error).all()
        if (
            not finite
            or float(np.abs(self.mean).max()) > 100
            or not 0 <= float(self.error.min()) <= float(self.error.max()) <= MAX_ERROR
            or not np.all((self.margin > 0) & (self.margin < 0.01))
        ):
            raise ModelError("impossible numbers in the tables")
        if int(self.prior.max()) >= SCALES or int(self.on.min()) < 1:
            raise ModelError("impossible prior or thresholds")


def log_scale(law: NDArray[Any] | int) -> NDArray[np.float64]:
    """ln(b / sigma) of a law; law 2 s is the middle of scale index s."""
    return SCALE_MIN + SCALE_STEP / 2 * (np.asarray(law, dtype=np.float64) + 1)


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


def laplace_cdf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = 0.5 * np.exp(-np.abs(x))
    return np.where(x < 0, e, 1 - e)


def laplace_first(ratio: int) -> NDArray[np.float64]:
    """(W, SUB / 2, FIRST): P(cell - cell of the estimate) under Laplace(m, b).

    Slot 0 is the escape. b is expressed in cells: the scale is relative to sigma of the level
    before, ratio times this level's, and a cell is sqrt(12) sigma wide.
    """
    b = np.exp(log_scale(np.arange(LAWS))) * ratio / np.sqrt(12)
    at = (np.arange(SUB // 2) + 0.5) / SUB
    edges = np.arange(-ESCAPE, ESCAPE + 2)
    cdf = laplace_cdf((edges - at[:, None]) / b[:, None, None])
    p = np.diff(cdf, axis=-1)
    return np.concatenate([1 - (cdf[..., -1:] - cdf[..., :1]), p], axis=-1) + 1e-7


def laplace_refine(ratio: int) -> NDArray[np.float64]:
    """(W, P, ratio): P(part | known cell) under Laplace(m, b) restricted to the cell."""
    b = np.exp(log_scale(np.arange(LAWS))) * ratio / np.sqrt(12)
    at = (np.arange(WINDOW + SUB * ratio // 2) - WINDOW + 0.5) / SUB
    cdf = laplace_cdf((np.arange(ratio + 1) - at[:, None]) / b[:, None, None])
    p = np.diff(cdf, axis=-1) + 1e-4 * b.clip(max=1)[:, None, None]
    return p / p.sum(-1, keepdims=True)


def laplace_tables(ladder: Ladder, tau: float = 1.0) -> Tables:
    """Tables straight from the Laplace distribution, before any fit."""
    levels, ratio = ladder.levels, ladder.ratio

    def per_level(p: NDArray[np.float64]) -> NDArray[np.uint16]:
        return np.broadcast_to(quantize(p), (levels, *p.shape)).copy()

    lam = 0.5 * np.log(tau / (2 * ratio**2))  # 2 b^2 SNR > tau
    on = int(np.clip(np.ceil((lam - SCALE_MIN) / SCALE_STEP), 1, SCALES))
    return Tables(
        mean=np.zeros(BANDS),
        prior=np.full(BANDS, on, np.uint8),
        error=np.repeat(
            0.25 / np.array([0.04, *ladder.snrs], np.float32), BANDS * POSITIONS
        ).reshape(-1, BANDS, POSITIONS),
        on=np.full(levels, on, np.uint8),
        first=per_level(laplace_first(ratio)),
        refine=per_level(laplace_refine(ratio)),
        adjust=np.zeros((2, SCALES, ENERGIES, SURPRISES), np.int8),
        near=np.zeros((levels, 3, NEAR, 4, 5), np.int16),
        residual=quantize(laplace_residual()),
        # The cell's centre stands for c, which adds about a quarter of a cell to the distance.
        weight=np.rint(
            256 / (SUB * (np.exp(log_scale(2 * np.arange(SCALES))) * ratio / 12**0.5 + 0.25))
        ).astype(np.uint16),
        margin=np.tile(MARGIN, (levels, 1)),
    )


def laplace_residual() -> NDArray[np.float64]:
    """(SCALES, RESIDUAL): P(pixel - rounded estimate) for Laplace scales 0.1 to 60 grey levels.

    Slot 0 is the escape, slot k the residual k - RESIDUAL_ESCAPE - 1.
    """
    b = 0.1 * 600 ** (np.arange(SCALES) / (SCALES - 1))
    edges = np.arange(-RESIDUAL_ESCAPE, RESIDUAL_ESCAPE + 2) - 0.5
    cdf = laplace_cdf(edges / b[:, None])
    escape = 1 - (cdf[:, -1:] - cdf[:, :1])
    return np.concatenate([escape, np.diff(cdf, axis=-1)], axis=-1) + 1e-7
