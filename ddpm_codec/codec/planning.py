"""Which levels a file has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..diffusion.schedule import Schedule
from ..diffusion.transform import BITS, POSITIONS
from ..network.modelfile import Model
from ..rec import trellis
from ..rec.classes import loudness, whole_units

STEPS = 17  # levels of a photograph
FEW = 1 << 13  # coefficients of a small picture, 48x48 or so
LEVEL_BITS = 36.0  # that a level takes beside its message, about: a record, gains
OVERHEAD = 4.0  # bits of a message beyond its rate


def default_rungs(model: Model, pixels: int) -> tuple[int, ...]:
    """The levels of a picture of so many pixels."""
    if model.exact:
        return evenly(model, min(STEPS, model.ladder.rungs))
    return plan(model, pixels)


def evenly(model: Model, steps: int) -> tuple[int, ...]:
    """``steps`` rungs of the model's ladder, evenly apart, falling to 0; their timesteps, of a
    network of the paper's kind.

    Raises ValueError for more than there are.
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
    """Timesteps of a network of the paper's kind that cost a picture of this many pixels least.

    Down to ``last``, by default to where the model's ladder ends. x_T, never skipped, is part of
    the first step.
    """
    schedule = Schedule()
    if last is None:
        last = schedule.timestep(model.ladder.snrs[-1])
    ts = list(range(schedule.T, last - 1, -1))
    snr = schedule.snr[ts]
    # What is alike before anything is known stays alike enough.
    known = [model.tables.error_at(model.ladder, s).reshape(-1) for s in (0.0, *snr)]
    _, kind, cells = np.unique(
        loudness(whole_units(known[0])), return_inverse=True, return_counts=True
    )
    error = np.stack([np.bincount(kind, e) / cells for e in known])
    n = cells.astype(np.float64) * (pixels / (BITS * POSITIONS))
    return tuple(ts[k] for k in cheapest(snr, error, n))


def cheapest(
    snr: NDArray[np.float64], error: NDArray[np.float64], n: NDArray[np.float64]
) -> list[int]:
    """Which of K levels to visit on the way to the last, so that all coefficients cost least.

    snr: (K,) precisions, rising; error: (K + 1, B) mean E(x_0 - x0_hat)^2 of the bands before
    anything is known and after each; n: (B,) coefficients of each band. A level costs its
    information, a message's overhead and its record; many small ones have the sharper priors.
    Dynamic programming over the last. Returns indices into ``snr``, rising, the last being K - 1.
    """
    at = np.concatenate([[0.0], snr])
    rate = trellis.RATE[15] / 256
    best, come = np.zeros(len(at)), np.zeros(len(at), dtype=np.int64)
    for j in range(1, len(at)):
        nats = np.log1p((at[j] - at[:j])[:, None] * error[:j]) @ n / 2
        cost = best[:j] + nats / np.log(2.0) * rate + OVERHEAD + LEVEL_BITS
        come[j] = int(cost.argmin())
        best[j] = cost[come[j]]
    path, j = [], len(at) - 1
    while j:
        path.append(j - 1)
        j = int(come[j])
    return path[::-1]
