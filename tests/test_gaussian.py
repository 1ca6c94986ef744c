"""Relative-entropy coding of Gaussian observations: the law of z, its price, and agreement."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from constriction import stream
from numpy.typing import NDArray

from ddpm_codec import gaussian
from ddpm_codec.errors import FormatError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
KEY = (2020, 7)


def chunks_of(n_chunks: int, n: int, kl_bits: float, seed: int = 0) -> tuple[Floats, Ints]:
    """mu of n_chunks chunks, in random directions, each worth exactly kl_bits."""
    mu = np.random.default_rng(seed).standard_normal((n_chunks, n))
    mu *= math.sqrt(2 * kl_bits * math.log(2)) / np.linalg.norm(mu, axis=1, keepdims=True)
    return mu.ravel(), np.arange(n_chunks + 1, dtype=np.int64) * n


def along(x: Floats, mu: Floats, n: int) -> Floats:
    """Component of each chunk of x along its mu."""
    x, mu = x.reshape(-1, n), mu.reshape(-1, n)
    dots: Floats = (x * mu).sum(axis=1) / np.linalg.norm(mu, axis=1)
    return dots


def kolmogorov_smirnov(e: Floats) -> float:
    """sqrt(N) times the distance to the normal distribution function: 1.95 at p = 0.001."""
    x = np.sort(e)
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    i = np.arange(len(x))
    return math.sqrt(len(x)) * float(max((cdf - i / len(x)).max(), ((i + 1) / len(x) - cdf).max()))


# At efforts this low, a quarter or more of the chunks of 8 and 12 bits are halved.
@pytest.mark.parametrize(
    ("kl_bits", "effort", "n_chunks"), [(1, 8, 8000), (4, 9, 6000), (8, 10, 2500), (12, 11, 1000)]
)
def test_noise_is_standard_normal(kl_bits: float, effort: int, n_chunks: int) -> None:
    n = 3
    mu, bounds = chunks_of(n_chunks, n, kl_bits)
    _, z = gaussian.encode(mu, bounds, (1, int(kl_bits)), effort)
    e = z - mu
    # All of the information is in the component along mu, and so would a bias be.
    for x in (along(e, mu, n), e):
        assert abs(x.mean()) < 3.3 / math.sqrt(len(x))
        assert abs(x.var() - 1) < 3.3 * math.sqrt(2 / len(x))
        assert kolmogorov_smirnov(x) < 1.95


@pytest.mark.parametrize(("r", "c"), [(1.5, 100.0), (3.3, 8192.0), (4.5, 8192.0), (6.0, 1e5)])
def test_first_half_of_the_tail(r: float, c: float) -> None:
    """E[(w - c)+ | s_1] has a closed form, Black and Scholes's."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    a, grid = r / math.sqrt(2), gaussian.GRID
    exact = []
    for s in grid.tolist():
        d = (a * s - r * r / 2 - math.log(c)) / a
        exact.append(math.exp(a * s - a * a / 2) * phi(d + a) - c * phi(d))
    law, true = (
        gaussian.MASS * w / (gaussian.MASS @ w)
        for w in (
            gaussian._first_half(lambda s: np.maximum(np.exp(r * s - r * r / 2) - c, 0))(grid),
            np.array(exact),
        )
    )
    assert np.abs(law - true).sum() / 2 < 1e-3  # times the tail's own probability
    assert abs((law - true) @ grid) < 3e-4


def test_noise_does_not_know_mu() -> None:
    """Over coefficients of any size, e is uncorrelated with mu and with its neighbours."""
    rng = np.random.default_rng(3)
    mu = rng.laplace(size=8000) * rng.choice([0.02, 0.3, 1.0], size=8000)
    kl = np.full(8000, float(np.square(mu).mean()) / 2 / math.log(2))
    bounds = gaussian.partition(kl, 6.0)
    _, z = gaussian.encode(mu, bounds, KEY, 11)
    e = z - mu
    for other in (mu, np.abs(mu), np.roll(e, 1)):
        assert abs(np.corrcoef(e, other)[0, 1]) < 3.3 / math.sqrt(len(e))
    assert abs(e.var() - 1) < 3.3 * math.sqrt(2 / len(e))


def test_outlier_is_halved_and_unbiased() -> None:
    mu = np.tile([0.1, 20.0], 40)
    indices, z = gaussian.encode(mu, np.arange(0, 81, 2), KEY, 10)
    assert (indices[:40] == gaussian.SPLIT).all()
    e = (z - mu)[1::2]
    assert abs(e.mean()) < 3.3 / math.sqrt(40) and abs(e.var() - 1) < 3.3 * math.sqrt(2 / 40)
    # Worth 289 bits each: the price stays in proportion.
    expected = gaussian.expectations(np.full(80, 4.0), np.arange(0, 81, 2))
    assert gaussian.ideal_bits(indices, expected) / 40 < 2.3 * 289


@pytest.mark.parametrize(
    ("kl_bits", "expected_bits", "price"),
    [
        (0.5, 0.5, 2.6),
        (2, 2, 4.9),
        (4, 4, 7.0),
        (6, 6, 9.4),
        (8, 8, 12.2),
        (11, 11, 16.4),
        (4, 8, 7.7),
        (8, 4, 13.0),
    ],
)
def test_price(kl_bits: float, expected_bits: float, price: float) -> None:
    """Bytes written against the KL, also where the tables are wrong by a factor of two."""
    n_chunks, n = 400, 3
    mu, bounds = chunks_of(n_chunks, n, kl_bits)
    indices, _ = gaussian.encode(mu, bounds, KEY)
    expected = gaussian.expectations(np.full(n_chunks * n, expected_bits / n), bounds)
    encoder = stream.queue.RangeEncoder()
    gaussian.write_indices(encoder, indices, expected)
    written = 32 * len(encoder.get_compressed())
    assert written <= 1.01 * gaussian.ideal_bits(indices, expected) + 64
    assert kl_bits * n_chunks < written < price * n_chunks


def test_round_trip_of_bytes() -> None:
    rng = np.random.default_rng(5)
    kl = rng.choice([0.0, 0.01, 0.5, 9.0], size=600)
    mu = rng.standard_normal(600) * np.sqrt(2 * math.log(2) * kl) * 1.2
    bounds = gaussian.partition(kl, 8.0)
    expected = gaussian.expectations(kl, bounds)
    indices, z = gaussian.encode(mu, bounds, KEY, 9)
    assert (indices == gaussian.SPLIT).any()
    encoder = stream.queue.RangeEncoder()
    gaussian.write_indices(encoder, indices, expected)
    decoder = stream.queue.RangeDecoder(encoder.get_compressed())
    again = gaussian.read_indices(decoder, expected)
    assert np.array_equal(again, indices)
    assert np.array_equal(gaussian.decode(again, bounds, KEY), z)
    assert not np.array_equal(gaussian.decode(again, bounds, (KEY[0], KEY[1] + 1)), z)


def test_every_index_survives() -> None:
    indices = np.array([2**i + d for i in range(32) for d in (0, 2**i - 1)], dtype=np.int64)
    expected = np.full(len(indices), 5 << 20, dtype=np.int64)
    encoder = stream.queue.RangeEncoder()
    gaussian.write_indices(encoder, indices, expected)
    decoder = stream.queue.RangeDecoder(encoder.get_compressed())
    assert np.array_equal(gaussian.read_indices(decoder, expected), indices)


def test_partition() -> None:
    rng = np.random.default_rng(6)
    kl = rng.exponential(size=1000) * rng.choice([0.0, 0.01, 1.0], size=1000)
    kl[500] = 40.0
    bounds = gaussian.partition(kl, 8.0)
    assert bounds[0] == 0 and bounds[-1] == 1000 and (np.diff(bounds) > 0).all()
    expected = gaussian.expectations(kl, bounds) / 2**20
    assert expected.sum() == pytest.approx(kl.sum(), abs=1e-3)
    usual = np.delete(expected, np.searchsorted(bounds, 500, side="right") - 1)
    assert usual.max() < 8 + 2 * np.delete(kl, 500).max() and np.median(usual) > 6
    assert gaussian.partition(kl[:0], 8.0).tolist() == [0]
    assert gaussian.partition(np.zeros(5), 8.0).tolist() == [0, 5]
    assert gaussian.partition(np.full(4, 100.0), 8.0).tolist() == [0, 1, 2, 3, 4]


def test_nothing_to_send() -> None:
    """mu = 0 takes the first candidate; no coefficients, no indices."""
    indices, _ = gaussian.encode(np.zeros(6), np.array([0, 3, 6]), KEY)
    assert indices.tolist() == [1, 1]
    none = np.zeros(1, dtype=np.int64)
    indices, z = gaussian.encode(np.zeros(0), none, KEY)
    assert len(indices) == len(z) == 0
    decoder = stream.queue.RangeDecoder(np.zeros(0, dtype=np.uint32))
    assert len(gaussian.read_indices(decoder, none[:0])) == 0


def test_candidates_and_tables_are_pinned() -> None:
    """A change of these numbers is a change of the file format."""
    z = gaussian.decode(np.array([1, 0, 70000, 3]), np.array([0, 2, 3]), KEY)
    assert z.round(9).tolist() == PINNED_Z
    laws = gaussian._laws() * gaussian.SPAN
    assert np.array_equal(laws, laws.round()) and (laws.sum(axis=1) == gaussian.SPAN).all()
    assert laws.min() >= 1
    assert laws[32, :19].astype(int).tolist() == PINNED_LAW
    weights = np.arange(1, 1 + laws.size).reshape(laws.shape)
    assert int((laws * weights).sum()) == PINNED_SUM


def test_malformed() -> None:
    bounds = np.array([0, 2, 4])
    with pytest.raises(FormatError, match="too few"):
        gaussian.decode(np.array([1, 0, 5]), bounds, KEY)
    with pytest.raises(FormatError, match="too many"):
        gaussian.decode(np.array([1, 1, 5]), bounds, KEY)
    # Zero words decode as the first symbol, SPLIT, for ever.
    with pytest.raises(FormatError, match="without end"):
        gaussian.read_indices(
            stream.queue.RangeDecoder(np.zeros(4, dtype=np.uint32)), np.full(3, 8 << 20)
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_absurd_mu_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="mu"):
        gaussian.encode(np.array([0.0, bad]), np.array([0, 2]), KEY)


PINNED_Z = [0.383594142, 0.19610754, -0.898361136]
PINNED_LAW = [
    3191, 5427, 3274, 3836, 4350, 4764, 5034, 5127, 5034, 4764, 4350, 3836, 3274, 2708, 2176, 1703,
    1302, 974, 286,
]  # fmt: skip
PINNED_SUM = 4528529148


def test_plan_is_the_cheapest_of_all() -> None:
    """Against every subset of seven levels."""
    rng = np.random.default_rng(0)
    snr = np.cumsum(np.exp(rng.normal(0, 1, 7)))
    variance = np.array([0.1, 2.0])
    error = 1 / (1 / variance + np.concatenate([[0.0], snr])[:, None])

    def cost(path: tuple[int, ...], n: NDArray[np.float64], level_bits: float) -> float:
        total, at, known = 0.0, 0.0, 0
        for k in path:
            nats = (np.sqrt(1 + (snr[k] - at) * error[known]) - 1) * n
            total += nats.sum() / math.log(2) * (1 + gaussian.OVERHEAD / 8)
            total += gaussian.OVERHEAD + level_bits
            at, known = snr[k], k + 1
        return total

    shares = np.array([0.75, 0.25])
    for pixels, level_bits in ((1, 100.0), (50, 20.0), (300, 20.0), (10**6, 100.0)):
        n = shares * pixels
        got = gaussian.plan(snr, error, n, level_bits, 8)
        every = [(*some, 6) for r in range(7) for some in itertools.combinations(range(6), r)]
        assert cost(tuple(got), n, level_bits) == min(cost(p, n, level_bits) for p in every)
    # With nothing to save a single step is best, with much to save all of them.
    assert gaussian.plan(snr, error, shares, 100.0, 8) == [6]
    assert gaussian.plan(snr, error, 10**6 * shares, 100.0, 8) == list(range(7))


def test_split() -> None:
    """Steps add up; their KL is below that of one, above that of infinitely many; none is small."""
    error = np.array([0.5, 0.02, 0.0])
    for d in (0.01, 1.0, 30.0):
        for n in (1, 10, 1000):
            steps = gaussian.split(d, error, n, 11.0)
            assert len(steps) in (1, 2, 4, 8)
            assert sum(s.precision for s in steps) == pytest.approx(d)
            before = np.cumsum([0.0, *(s.precision for s in steps)])[:-1]
            np.testing.assert_allclose([s.before for s in steps], before)
            got = np.sum([s.kl_bits for s in steps], 0)
            one = 0.5 * d * error / math.log(2)
            assert np.all(got <= one + 1e-12)
            assert np.all(got >= 0.5 * np.log2(1 + d * error) - 1e-12)
            if len(steps) > 1:
                assert n * got.sum() >= len(steps) * 11
                assert got[0] < 0.99 * one[0]
    assert len(gaussian.split(30.0, error, 1000, 11.0)) == 8
    assert len(gaussian.split(30.0, np.zeros(3), 1000, 11.0)) == 1
    assert len(gaussian.split(0.01, error, 1, 11.0)) == 1


def test_moved_is_the_conditional_mean() -> None:
    """What is left is uncorrelated with the observation, its variance e / (1 + e s)."""
    rng, e, s = np.random.default_rng(0), 0.7, 3.0
    x_0 = 0.2 + math.sqrt(e) * rng.standard_normal(200_000)
    y = x_0 + rng.standard_normal(len(x_0)) / math.sqrt(s)
    left = x_0 - gaussian.moved(np.full_like(y, 0.2), np.full_like(y, e), y, s)
    assert abs(np.corrcoef(left, y)[0, 1]) < 0.01
    assert left.var() == pytest.approx(e / (1 + e * s), rel=0.02)
