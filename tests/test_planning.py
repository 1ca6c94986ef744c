"""Which levels a file has: evenly spaced rungs, or the cheapest timesteps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_codec.codec.planning import cheapest, default_rungs, evenly, plan
from ddpm_codec.diffusion.schedule import Ladder, Schedule
from ddpm_codec.network.modelfile import get_model
from ddpm_codec.network.tables import new_tables


def test_rungs_of_a_photograph(tiny_model: Path) -> None:
    model = get_model(tiny_model)
    assert evenly(model, 1) == (0,)
    assert evenly(model, 2) == (32, 0)
    assert evenly(model, 5) == (32, 24, 16, 8, 0)
    assert evenly(model, 33) == tuple(range(32, -1, -1))
    assert default_rungs(model, 10**6) == default_rungs(model, 1) == tuple(range(32, -1, -2))
    for steps in range(1, 34):
        rungs = evenly(model, steps)
        assert len(set(rungs)) == steps and rungs == tuple(sorted(rungs, reverse=True))
        assert len(set(np.diff(rungs))) <= 2
    for steps in (0, -1, 34):
        with pytest.raises(ValueError, match=r"steps must be in 1 \.\. 33"):
            evenly(model, steps)


def test_a_model_of_few_rungs(tiny_model: Path) -> None:
    ladder = Ladder(5, 40)
    model = replace(get_model(tiny_model), ladder=ladder, tables=new_tables(ladder, True))
    assert default_rungs(model, 1000) == (4, 3, 2, 1, 0)


def test_timesteps_of_the_papers_networks(small_model: Path) -> None:
    model, schedule = get_model(small_model), Schedule()
    finest = schedule.timestep(2560.0)
    for steps in (1, 2, 7, 33):
        ts = evenly(model, steps)
        assert ts == tuple(sorted(set(ts), reverse=True)) and ts[-1] == finest
        assert len(ts) <= steps
    ts = default_rungs(model, 32 * 32)
    assert ts == plan(model, 32 * 32)
    assert ts == tuple(sorted(set(ts), reverse=True)) and ts[-1] == finest and ts[0] < 1000
    # A level has a price: the more there is to send, the more of them are worth it.
    counts = [len(plan(model, 32 * n)) for n in (1, 32, 1024)]
    assert counts == sorted(counts) and counts[0] < counts[2]
    assert plan(model, 32 * 32, last=400)[-1] == 400


def cost(
    path: tuple[int, ...], snr: NDArray[np.float64], error: NDArray[np.float64], n: float
) -> float:
    """Bits of one band's coefficients and of its levels."""
    total, before = 0.0, -1
    for k in path:
        d = snr[k] - (snr[before] if before >= 0 else 0.0)
        total += n * 0.5 * math.log2(1 + d * error[before + 1]) * 267.5 / 256 + 40
        before = k
    return total


@pytest.mark.parametrize("n", [10, 100, 1000, 30000])
def test_the_cheapest_are_the_cheapest(n: int) -> None:
    """Of all subsets that end at the last level."""
    snr = np.array([0.1 * 4.0**k for k in range(9)])
    # Of a source whose fine structure is found out late, unlike a Gaussian one's.
    error = 1 / (2 + np.array([0.0, *snr])) + 0.3 / (1 + np.array([0.0, *snr]) / 50) ** 2
    got = cheapest(snr, error[:, None], np.array([float(n)]))
    assert got == sorted(set(got)) and got[-1] == 8
    best = min(
        cost((*some, 8), snr, error, n)
        for k in range(9)
        for some in itertools.combinations(range(8), k)
    )
    assert cost(tuple(got), snr, error, n) == pytest.approx(best, rel=1e-3)


def test_of_a_gaussian_source_one_level_is_enough() -> None:
    """Its observations cost the same in one step as in many, and each step costs a little."""
    snr = np.array([0.1 * 4.0**k for k in range(6)])
    v = np.array([3.0, 0.2])
    error = 1 / (1 / v + np.array([0.0, *snr])[:, None])
    assert cheapest(snr, error, np.array([500.0, 500.0])) == [5]
