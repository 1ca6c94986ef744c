"""Relative-entropy coding of Gaussian observations: the law of y, its price, and the message."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_codec.errors import FormatError
from ddpm_codec.rec import gaussian
from ddpm_codec.rec.gaussian import Layout

Floats = NDArray[np.float64]
KEY = (2020, 7)


def layout(v: list[float], n: list[int]) -> Layout:
    return Layout.of(np.array(v), np.array(n, dtype=np.int64))


def expected(of: Layout, seed: int = 0) -> Floats:
    """mu as the decoder expects it, each group's energy to the letter."""
    mu = np.random.default_rng(seed).standard_normal(len(of.last))
    begin = 0
    for v, n in zip(of.v.tolist(), of.n.tolist(), strict=True):
        part = mu[begin : begin + n]
        part *= math.sqrt(v * n / max(float(part @ part), 1e-300))
        begin += n
    return mu


def kolmogorov_smirnov(e: Floats) -> float:
    """sqrt(N) times the distance to the normal distribution function: 1.95 at p = 0.001."""
    x = np.sort(e)
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    i = np.arange(len(x))
    return math.sqrt(len(x)) * float(max((cdf - i / len(x)).max(), ((i + 1) / len(x) - cdf).max()))


# Bits a coefficient, from thousands of coefficients a bit to three bits each.
RATES = [(0.0003, 200_000), (0.01, 80_000), (0.05, 30_000), (0.3, 6000), (1.0, 3000), (3.0, 1000)]


@pytest.mark.parametrize(("bits", "n"), RATES)
def test_noise_is_white_and_as_loud_as_it_says(bits: float, n: int) -> None:
    of = layout([2.0 ** (2 * bits) - 1], [n])
    mu = expected(of)
    _, y = gaussian.encode(mu, of, (1, int(1000 * bits)))
    e = y - mu
    assert abs(e.mean()) < 3.3 / math.sqrt(n)
    assert e.var() == pytest.approx(1, abs=3.3 * math.sqrt(2 / n) + 0.05 * min(bits, 1))
    assert kolmogorov_smirnov(e / e.std()) < 1.95
    for other in (np.abs(mu), np.roll(e, 1), np.roll(e, 64)):
        assert abs(np.corrcoef(e, other)[0, 1]) < 3.3 / math.sqrt(n)
    # All of the information is in the component along mu, and so would a bias be.
    assert y @ mu == pytest.approx(mu @ mu, rel=0.03 if bits * n > 100 else 0.1)


@pytest.mark.parametrize(("bits", "n"), RATES[1:])
def test_price(bits: float, n: int) -> None:
    """Bits sent against those that the squared error left is worth, R = 1/2 log2(v / D)."""
    of = layout([2.0 ** (2 * bits) - 1], [n])
    mu = expected(of)
    message, y = gaussian.encode(mu, of, KEY)
    alpha = of.v[0] / (1 + of.v[0])
    left = float(np.square(mu - alpha * y).mean())
    worth = n * 0.5 * math.log2(of.v[0] / left)
    assert len(message) == of.bits < 1.1 * worth + gaussian.OVERHEAD


def test_outliers_are_observed_as_well() -> None:
    """A group's coefficients share one variance, whoever has the energy: mixing sees to that."""
    rng = np.random.default_rng(3)
    of = layout([0.5], [8192])
    mu = rng.laplace(size=8192) * np.repeat(rng.choice([0.02, 0.3, 1.0], size=128), 64)
    mu *= math.sqrt(0.5 * 8192) / np.linalg.norm(mu)
    _, y = gaussian.encode(mu, of, KEY)
    e, loud = y - mu, np.abs(mu) > 1.5
    assert 100 < loud.sum() < 2000
    assert (y @ mu) / (mu @ mu) == pytest.approx(1, abs=0.03)
    assert (y[loud] @ mu[loud]) / (mu[loud] @ mu[loud]) == pytest.approx(1, abs=0.05)
    for part in (e[loud], e[~loud]):
        assert part.var() == pytest.approx(1, abs=0.03 + 3.3 * math.sqrt(2 / len(part)))


@pytest.mark.parametrize("memory", [12, 3])
def test_the_best_of_all_paths(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Viterbi's choice has the largest log q / p: against every message of ten bits.

    With a memory in which all paths survive, and with one where they do not.
    """
    monkeypatch.setattr(gaussian, "TRELLISES", (gaussian.Trellis(memory, 138),) * 2)
    of = layout([0.7, 0.05], [7, 70])
    assert of.bits == 10
    mu = expected(of, 5)
    v = of.each(of.v)

    def density(y: Floats) -> float:
        # Both are rotated alike, group by group.
        return float(mu @ y - (v / (1 + v)) @ (y * y) / 2)

    message, y = gaussian.encode(mu, of, KEY)
    every = [
        density(gaussian.decode(np.array(bits, np.uint8), of, KEY))
        for bits in itertools.product((0, 1), repeat=of.bits)
    ]
    assert density(y) == pytest.approx(max(every), abs=1e-4)
    assert int("".join(map(str, message)), 2) == int(np.argmax(every))


def test_runs_follow_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that is searched in pieces is a path all the same, and hardly a worse one."""
    of = layout([0.2], [4000])
    mu = expected(of)
    _, whole = gaussian.encode(mu, of, KEY)
    monkeypatch.setattr(gaussian, "RUN", 100 << 12)
    message, y = gaussian.encode(mu, of, KEY)
    assert np.array_equal(gaussian.decode(message, of, KEY), y)
    assert 0.85 * (mu @ whole) < mu @ y < mu @ whole


def test_round_trip_and_prefixes() -> None:
    of = layout([9.0, 0.5, 0.3, 0.01, 0.002], [30, 64, 10, 500, 3000])
    message, y = gaussian.encode(1.1 * expected(of), of, KEY)
    assert len(message) == of.bits and set(message.tolist()) == {0, 1}
    assert np.array_equal(gaussian.decode(message, of, KEY), y)
    assert not np.array_equal(gaussian.decode(message, of, (KEY[0], KEY[1] + 1)), y)
    ends = np.cumsum(of.n)
    for groups in range(6):
        bits = of.prefix(groups)
        known = gaussian.decode(message[:bits], of, KEY)
        assert len(known) == (ends[groups - 1] if groups else 0)
        assert np.array_equal(known, y[: len(known)])
        if bits:
            assert len(gaussian.decode(message[: bits - 1], of, KEY)) < len(known)


def test_layout() -> None:
    rng = np.random.default_rng(6)
    v = rng.exponential(size=12) * rng.choice([0.0, 0.01, 1.0, 1000.0], size=12)
    n = rng.integers(0, 200, size=12)
    of = Layout.of(v, n)
    information = float((np.log2(1 + v) / 2 * n).sum())
    assert of.trellis == gaussian.TRELLISES[0]
    assert of.bits == pytest.approx(information * 135 / 128 + gaussian.OVERHEAD, abs=1.01)
    assert len(of.last) == n.sum() and np.all(np.diff(of.last) >= 0)
    assert of.last[0] >= 0 and of.last[-1] < of.bits
    # Every coefficient waits until its share of the rate has come, and not longer.
    due = np.cumsum(of.each(np.log2(1 + v) / 2)) * of.bits / information
    assert np.all(np.abs(of.last + 0.5 - due) < 1.6)
    draw, column = of.draws()
    assert column.max() < gaussian.WIDTH and np.all(np.diff(draw) == (column[1:] == 0))
    assert np.all(np.diff(of.last)[np.diff(draw) == 0] == 0)


def test_nothing_to_send() -> None:
    for of in (layout([0.0], [6]), layout([1.0], [0]), layout([], [])):
        assert of.bits == gaussian.OVERHEAD
        message, y = gaussian.encode(np.zeros(int(of.n.sum())), of, KEY)
        assert len(message) == of.bits and len(y) == of.n.sum()


def test_information() -> None:
    v = np.concatenate([[0.0], np.geomspace(1e-9, 1e9, 2000)])
    got = gaussian.information(v) / 2**20
    assert np.abs(got - np.log2(1 + v) / 2).max() < 2.0**-20
    assert got[0] == 0 and np.all(np.diff(got) >= 0)


def test_mixing() -> None:
    """Orthonormal, its own inverse, and never across groups."""
    n = np.array([1, 12, 0, 5000])
    x = np.random.default_rng(0).standard_normal((3, int(n.sum())))
    mixed = np.stack([gaussian.mix(row, n) for row in x])
    np.testing.assert_allclose(mixed @ mixed.T, x @ x.T)
    np.testing.assert_allclose([gaussian.mix(row, n) for row in mixed], x)
    alone = np.zeros(int(n.sum()))
    alone[1] = 1.0
    assert np.flatnonzero(gaussian.mix(alone, n)).tolist() == list(range(1, 9))
    assert np.abs(gaussian.mix(alone, n)[1:9]).tolist() == pytest.approx([8**-0.5] * 8)


def test_table_and_layout_are_pinned() -> None:
    """A change of these numbers is a change of the file format."""
    of = layout([3.0, 0.1], [3, 200])
    message = np.unpackbits(np.frombuffer(b"\xc5\x31\x8d\x70", np.uint8))[: of.bits]
    y = gaussian.decode(message, of, KEY)
    assert of.bits == PINNED_BITS
    assert y[[0, 1, 2, 100, 202]].round(6).tolist() == PINNED_Y
    v = np.array([1e-5, 0.3, 2.0, 1e4])
    assert gaussian.information(v).tolist() == PINNED_INFORMATION


PINNED_BITS = 22
PINNED_Y = [-0.138987, -0.677012, -0.037753, -0.787516, -0.943926]
PINNED_INFORMATION = [8, 198449, 830977, 6966664]


def test_malformed() -> None:
    of = layout([0.5], [60])
    with pytest.raises(FormatError, match="more bits"):
        gaussian.decode(np.zeros(of.bits + 1, np.uint8), of, KEY)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_absurd_mu_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not within"):
        gaussian.encode(np.array([0.0, bad]), layout([1.0], [2]), KEY)


def test_plan_is_the_cheapest_of_all() -> None:
    """Against every subset of seven levels."""
    rng = np.random.default_rng(0)
    snr = np.cumsum(np.exp(rng.normal(0, 1, 7)))
    variance = np.array([0.1, 2.0])
    # Of a source that is not Gaussian: smaller errors, sharper priors, with each level.
    error = 1 / (1 / variance + np.concatenate([[0.0], snr])[:, None] ** 1.5)

    def cost(path: tuple[int, ...], n: NDArray[np.float64], level_bits: float) -> float:
        total, at, known = 0.0, 0.0, 0
        for k in path:
            bits = (np.log2(1 + (snr[k] - at) * error[known]) / 2 * n).sum()
            total += bits * gaussian.trellis(int(n.sum())).rate / 128
            total += gaussian.OVERHEAD + level_bits
            at, known = snr[k], k + 1
        return float(total)

    shares = np.array([0.75, 0.25])
    for pixels, level_bits in ((1, 100.0), (50, 20.0), (300, 20.0), (10**6, 100.0)):
        n = shares * pixels
        got = gaussian.plan(snr, error, n, level_bits)
        every = [(*some, 6) for r in range(7) for some in itertools.combinations(range(6), r)]
        best = min(cost(p, n, level_bits) for p in every)
        assert cost(tuple(got), n, level_bits) == pytest.approx(best, rel=1e-12)
    # With nothing to save a single step is best, with much to save all of them.
    assert gaussian.plan(snr, error, shares, 100.0) == [6]
    assert gaussian.plan(snr, error, 10**6 * shares, 100.0) == list(range(7))
