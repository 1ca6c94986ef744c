"""The choice of a file's levels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..diffusion.schedule import Schedule
from ..diffusion.transform import BITS, POSITIONS
from ..network.modelfile import Model
from ..rec import trellis
from ..rec.classes import half_octaves, whole_units

STEPS = 17  # levels of a photograph
FEW = 1 << 13  # coefficients of a small picture, of about 48x48 pixels
LEVEL_BITS = 36.0  # about the bits of a level's record and gains


def default_rungs(model: Model, pixels: int) -> tuple[int, ...]:
    """The levels of a picture of so many pixels: rungs, or timesteps."""
    if model.exact:
        return evenly(model, min(STEPS, model.ladder.rungs))
    return plan(model, pixels)


def evenly(model: Model, steps: int) -> tuple[int, ...]:
    """``steps`` evenly spaced rungs of the model's ladder, falling to 0.

    For a network of the paper's kind, the nearest timesteps. Raises ValueError for more steps than
    rungs.
    """
    ladder = model.ladder
    if not 1 <= steps <= ladder.rungs:
        raise ValueError(f"steps must be in 1 .. {ladder.rungs}")
    coarsest = ladder.rungs - 1 if steps > 1 else 0
    rungs = np.rint(np.linspace(coarsest, 0, steps)).astype(int).tolist()
    if model.exact:
        return tuple(rungs)
    ts = {Schedule().timestep(ladder.snr(j)) for j in rungs}
    return tuple(sorted(ts, reverse=True))


def plan(model: Model, pixels: int, last: int | None = None) -> tuple[int, ...]:
    """The timesteps at which a picture of so many pixels costs least, for the paper's networks.

    They end at ``last``, by default where the model's ladder ends. The first level includes x_T.
    """
    schedule = Schedule()
    if last is None:
        last = schedule.timestep(model.ladder.snrs[-1])
    ts = list(range(schedule.T, last - 1, -1))
    snr = schedule.snr[ts]
    # Bands and positions of similar error before the first level are taken together at all levels.
    errors = [model.tables.error_at(model.ladder, s).reshape(-1) for s in (0.0, *snr)]
    _, group, cells = np.unique(
        half_octaves(whole_units(errors[0])), return_inverse=True, return_counts=True
    )
    error = np.stack([np.bincount(group, e) / cells for e in errors])
    n = cells.astype(np.float64) * (pixels / (BITS * POSITIONS))
    return tuple(ts[k] for k in cheapest(snr, error, n))


def cheapest(
    snr: NDArray[np.float64], error: NDArray[np.float64], n: NDArray[np.float64]
) -> list[int]:
    """The levels, out of K, for which all coefficients cost least in total. The last is required.

    snr: (K,) precisions, rising; error: (K + 1, B) mean E(x_0 - x0_hat)^2 of groups of bands,
    before anything is known and after each level; n: (B,) coefficients of each group. A level costs
    the bits of its message and of its record; more levels have sharper predictions. Found by
    dynamic programming. Returns indices into ``snr``, rising, the last being K - 1.
    """
    precision = np.concatenate([[0.0], snr])
    rate = trellis.RATE[15] / 256
    best, before = np.zeros(len(precision)), np.zeros(len(precision), dtype=np.int64)
    for j in range(1, len(precision)):
        nats = np.log1p((precision[j] - precision[:j])[:, None] * error[:j]) @ n / 2
        cost = best[:j] + nats / np.log(2.0) * rate + trellis.OVERHEAD + LEVEL_BITS
        before[j] = int(cost.argmin())
        best[j] = cost[before[j]]
    path, j = [], len(precision) - 1
    while j:
        path.append(j - 1)
        j = int(before[j])
    return path[::-1]
