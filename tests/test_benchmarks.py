"""What the benchmarks compute, against cases done by hand."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def load(name: str) -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rd = load("rate_distortion")


def curve(rate: float, slope: float = 6.0) -> list[object]:
    """PSNR = 30 + slope log2(bpp / rate)."""
    points = []
    for k in range(-4, 5):
        db = 30 + slope * k / 2
        points.append(rd.Point(str(k), rate * 2 ** (k / 2), db, db, 1 - 10 ** (-db / 10), 0.0, 0.0))
    return points


@pytest.mark.parametrize("metric", ["PSNR", "PSNR-Y", "MS-SSIM"])
def test_bd_rate_of_a_constant_ratio(metric: str) -> None:
    """Half the rate at every quality is -50 %, by definition."""
    assert rd.bd_rate(curve(1.0), curve(0.5), metric) == pytest.approx(-50, abs=0.01)
    assert rd.bd_rate(curve(1.0), curve(1.25), metric) == pytest.approx(25, abs=0.01)


def test_bd_rate_by_hand() -> None:
    """Two straight lines of log2 rate: r_a = d / 6, r_t = d / 5 - 1 over the shared d = -10 .. 10.

    The mean of r_t - r_a over it is -1 (the slopes' difference cancels), so 2^-1: -50 %; over a
    range that is not symmetric it is not.
    """
    a, t = curve(1.0, 6.0), curve(0.5, 5.0)
    assert rd.bd_rate(a, t) == pytest.approx(-50, abs=0.05)
    upper = [p for p in t if p.psnr >= 30]  # d = 0 .. 10: mean of d / 30 is 1/6
    expected = 100 * (2 ** (1 / 6 - 1) - 1)
    assert rd.bd_rate(a, upper) == pytest.approx(expected, abs=0.05)


def test_quality() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(20, 230, (176, 180, 3), dtype=np.uint8)
    rgb, y, ms = rd.quality(x, x)
    assert rgb == y == math.inf and ms == pytest.approx(1)
    # One step of green is 0.587 of luma.
    x2 = x.copy()
    x2[..., 1] += 1
    rgb, y, ms = rd.quality(x2, x)
    assert rgb == pytest.approx(20 * math.log10(255) + 10 * math.log10(3))
    assert y == pytest.approx(20 * math.log10(255 / 0.587))
    assert 0.99 < ms < 1
    assert math.isnan(rd.quality(x2[:160], x[:160])[2])
