"""Tables: what is refused, and what is expected between the rungs they were measured at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import ModelError
from ddpm_codec.network import tables
from ddpm_codec.network.tables import TOTAL, new_tables

LADDER = Ladder(rungs=9, finest=160)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("ladder", [LADDER, Ladder(), Ladder(1, 5)], ids=str)
def test_new_tables_pass(ladder: Ladder, scales: bool) -> None:
    new_tables(ladder, scales).check(ladder, scales)


@pytest.mark.parametrize("scales", [True, False])
def test_tables_of_another_network_are_refused(scales: bool) -> None:
    t = new_tables(LADDER, scales)
    with pytest.raises(ModelError, match="wrong shape"):
        t.check(LADDER, not scales)
    with pytest.raises(ModelError, match="wrong shape"):
        t.check(Ladder(rungs=10, finest=160), scales)
    with pytest.raises(ModelError, match="impossible levels"):
        t.check(Ladder(rungs=0), scales)


def test_new_variances_are_laplacian() -> None:
    """Twice the square of the scale, in units of the noise: index 20 is where ln b is 1/8."""
    t = new_tables(LADDER, scales=True)
    assert t.variance.shape == (9, 2, 32) and t.error.shape == (1, 192, 16)
    np.testing.assert_allclose(t.variance[..., 20], 2 * math.exp(2 * 0.125), rtol=1e-6)
    assert tables.log_scale(np.array([0, 31])).tolist() == [-4.875, 2.875]
    assert new_tables(LADDER, scales=False).variance.shape == (0, 2, 32)


# --- What is expected --------------------------------------------------------------------------


def test_expected_errors_between_rungs() -> None:
    """Exact for a Gaussian source, whose error is 1 / (1 / v + SNR)."""
    t = new_tables(LADDER, scales=False)
    v = np.geomspace(1e-3, 10, 192 * 16).reshape(192, 16)
    t.error[:] = 1 / (1 / v + np.array([0.0, *LADDER.snrs])[:, None, None])
    for snr in (0.0, 0.01, 5.0, 10.0, 77.7, 160.0):
        np.testing.assert_allclose(t.error_at(LADDER, snr), 1 / (1 / v + snr), rtol=1e-5)
    np.testing.assert_allclose(t.error_at(LADDER, 1e6), t.error[-1])
    rungs = [t.error_at(LADDER, snr) for snr in LADDER.snrs]
    np.testing.assert_allclose(rungs, t.error[1:], rtol=1e-12)


def test_nothing_is_expected_where_nothing_was_measured() -> None:
    """An error of 0 is no division by zero."""
    t = new_tables(LADDER, scales=False)
    t.error[:] = 0
    assert (t.error_at(LADDER, 33.0) == pytest.approx(1e-9)) and not t.error_at(LADDER, 0.0).any()


# --- What is refused ---------------------------------------------------------------------------


def _less(t: tables.Tables, name: str) -> None:
    getattr(t, name)[0, 40] -= 1


def _zero(t: tables.Tables, name: str) -> None:
    row = getattr(t, name)[-1]
    row[1] += row[0]
    row[0] = 0


def _shorter(t: tables.Tables, name: str) -> None:
    setattr(t, name, getattr(t, name)[:-1])


def _other(t: tables.Tables, name: str) -> None:
    setattr(t, name, getattr(t, name).astype(np.float16))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("residual", _less),
        ("residual", _zero),
        *[(n, f) for n in ("mean", "error", "variance", "residual") for f in (_shorter, _other)],
    ],
)
def test_wrong_tables_are_refused(name: str, change: Any) -> None:
    t = new_tables(LADDER, scales=True)
    change(t, name)
    with pytest.raises(ModelError, match=name):
        t.check(LADDER, scales=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", math.nan), ("mean", math.inf), ("mean", 1e12), ("error", -1.0), ("error", 4097.0),
     ("error", math.inf), ("error", math.nan), ("variance", 0.0), ("variance", -1.0),
     ("variance", math.inf), ("variance", math.nan), ("variance", 2e9)],
)  # fmt: skip
def test_impossible_numbers_are_refused(name: str, value: float) -> None:
    t = new_tables(LADDER, scales=True)
    getattr(t, name)[..., -1] = value
    with pytest.raises(ModelError, match="impossible"):
        t.check(LADDER, scales=True)


def test_variances_must_rise_with_the_scale() -> None:
    """Or "from which scale on new coefficients are sent" would mean nothing."""
    t = new_tables(LADDER, scales=True)
    t.variance[3, 1, 7] = t.variance[3, 1, 8]
    t.check(LADDER, scales=True)
    t.variance[3, 1, 7] *= 1.01
    with pytest.raises(ModelError, match="impossible"):
        t.check(LADDER, scales=True)


# --- Frequencies -------------------------------------------------------------------------------


def test_quantized_probabilities() -> None:
    p = np.random.default_rng(7).gamma(0.05, size=(100, 16)) + 1e-300
    f = tables.quantize(p)
    assert f.dtype == np.uint16 and f.min() >= 1
    assert (f.sum(-1, dtype=np.int64) == TOTAL).all()
    np.testing.assert_allclose(f / TOTAL, p / p.sum(-1, keepdims=True), atol=17 / 65536)


def test_residuals_are_laplacian() -> None:
    p = tables.laplace_residual()
    assert p.shape == (32, 64)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    middle = p[:, 32]  # residual 0
    assert (np.diff(middle) < 0).all() and (np.diff(p[:, 0]) >= 0).all()
    np.testing.assert_allclose(p[:, 1:32], p[:, :32:-1], atol=1e-7)
    # Scales from 0.1 to 60: P(0) = 1 - exp(-1 / 2b).
    assert middle[0] == pytest.approx(1 - math.exp(-5), abs=1e-6)
    assert middle[-1] == pytest.approx(1 - math.exp(-1 / 120), abs=1e-6)
