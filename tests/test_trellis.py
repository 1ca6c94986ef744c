"""Relative-entropy coding of Gaussian observations: distribution of y, rate and message."""

from __future__ import annotations

import itertools
import math
from threading import Thread

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddpm_codec.errors import FormatError
from ddpm_codec.rec import search, trellis
from ddpm_codec.rec.trellis import Layout

Floats = NDArray[np.float64]
KEY = (2020, 7)


def layout(v: list[float], n: list[int], memory: int = 10) -> Layout:
    return Layout.of(np.array(v), np.array(n, dtype=np.int64), memory)


def expected(of: Layout, seed: int = 0) -> Floats:
    """mu as the decoder expects it, each class's energy to the letter."""
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


def density(y: Floats, mu: Floats, of: Layout) -> float:
    """log q(y | mu) / p(y), less its constant: the same of y and mu as they are when mixed."""
    v = np.repeat(of.v, of.n)
    return float(mu @ y - (v / (1 + v)) @ (y * y) / 2)


# Bits a coefficient, from thousands of coefficients a bit to three bits each.
RATES = [(0.0003, 60_000), (0.01, 40_000), (0.05, 30_000), (0.3, 6000), (1.0, 3000), (3.0, 1000)]


@pytest.mark.parametrize(("bits", "n"), RATES)
def test_noise_is_white_and_of_unit_variance(bits: float, n: int) -> None:
    of = layout([2.0 ** (2 * bits) - 1], [n], 12)
    mu = expected(of)
    _, y = search.encode(mu, of, (1, int(1000 * bits)))
    e = y - mu
    assert abs(e.mean()) < 3.3 / math.sqrt(n)
    assert e.var() == pytest.approx(1, abs=3.3 * math.sqrt(2 / n) + 0.05 * min(bits, 1))
    assert kolmogorov_smirnov(e / e.std()) < 1.95
    for other in (np.abs(mu), np.roll(e, 1), np.roll(e, 64)):
        assert abs(np.corrcoef(e, other)[0, 1]) < 3.3 / math.sqrt(n)
    # All of the information is in the component along mu, and so would a bias be.
    assert y @ mu == pytest.approx(mu @ mu, rel=0.03 if bits * n > 100 else 0.1)


@pytest.mark.parametrize("memory", [8, 10, 12, 14])
def test_rate_is_what_the_memory_takes(memory: int) -> None:
    """The constants RATE: E y.mu = |mu|^2 over a mixture, to less than a step of memory."""
    v = np.geomspace(1.0, 0.1, 6)
    of = Layout.of(v, (2500 / np.log2(1 + v)).astype(np.int64), memory)
    mu = expected(of)
    _, y = search.encode(mu, of, KEY)
    assert (y @ mu) / (mu @ mu) == pytest.approx(1, abs=0.006)
    assert (y - mu).var() == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize(("bits", "n"), RATES[1:])
def test_price(bits: float, n: int) -> None:
    """Bits sent against those that the squared error left is worth, R = 1/2 log2(v / D)."""
    of = layout([2.0 ** (2 * bits) - 1], [n], 12)
    mu = expected(of)
    message, y = search.encode(mu, of, KEY)
    alpha = of.v[0] / (1 + of.v[0])
    left = float(np.square(mu - alpha * y).mean())
    worth = n * 0.5 * math.log2(of.v[0] / left)
    assert len(message) == of.bits < 1.08 * worth + trellis.OVERHEAD


def test_outliers_are_observed_as_well() -> None:
    """A class's coefficients share one variance, whoever has the energy: mixing sees to that."""
    rng = np.random.default_rng(3)
    of = layout([0.5], [8192])
    mu = rng.laplace(size=8192) * np.repeat(rng.choice([0.02, 0.3, 1.0], size=128), 64)
    mu *= math.sqrt(0.5 * 8192) / np.linalg.norm(mu)
    _, y = search.encode(mu, of, KEY)
    e, large = y - mu, np.abs(mu) > 1.5
    assert 100 < large.sum() < 2000
    assert (y @ mu) / (mu @ mu) == pytest.approx(1, abs=0.03)
    assert (y[large] @ mu[large]) / (mu[large] @ mu[large]) == pytest.approx(1, abs=0.05)
    for part in (e[large], e[~large]):
        assert part.var() == pytest.approx(1, abs=0.03 + 3.3 * math.sqrt(2 / len(part)))


@pytest.mark.parametrize("memory", [12, 8, 4])
@pytest.mark.parametrize("v", [[0.7, 0.05], [2.5, 0.2], [40.0, 0.001]])
def test_the_best_of_all_paths(
    memory: int, v: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Viterbi's choice has the largest log q / p: against every message.

    With a memory in which all paths survive, and with one where they do not; of signs and of
    normals, some both in one bit, and more columns in one than the table has.
    """
    monkeypatch.setitem(trellis.RATE, memory, 271)
    n = {0.05: [8, 60], 0.2: [3, 25], 0.001: [2, 300]}[v[1]]
    of = layout(v, n, memory)
    assert 9 <= of.bits <= 11
    mu = expected(of, 5)
    _, y = search.encode(mu, of, KEY)
    every = [
        density(trellis.decode(np.array(bits, np.uint8), of, KEY), mu, of)
        for bits in itertools.product((0, 1), repeat=of.bits)
    ]
    # Metrics are truncated to a 256th of a nat or so.
    assert density(y, mu, of) == pytest.approx(max(every), abs=0.03)


def test_integers_do_as_well_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    of = layout([1.5, 0.3], [800, 4000])
    mu = expected(of)
    assert search.Search(mu.astype(np.float32), of, KEY).kind is np.int16
    _, whole = search.encode(mu, of, KEY)
    monkeypatch.setattr(search.Search, "COARSEST", 1e9)
    _, real = search.encode(mu, of, KEY)
    assert density(whole, mu, of) == pytest.approx(density(real, mu, of), rel=0.002)


def test_outliers_do_not_overflow() -> None:
    """A mu far from what was expected is heard in full."""
    of = layout([0.5], [3000])
    mu = 100.0 * expected(of)
    _, y = search.encode(mu, of, KEY)
    assert search.Search(mu.astype(np.float32), of, KEY).kind is np.float32
    assert np.corrcoef(y, mu)[0, 1] > 0.55


@pytest.mark.parametrize("memory", [8, 13])
def test_stretches_follow_on(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that is searched in pieces is a path all the same, and hardly a worse one."""
    of = layout([0.3], [25_000], memory)
    mu = expected(of)
    monkeypatch.setattr(search.Search, "LEAST", 1 << 20)
    monkeypatch.setattr(search.Search, "MOST", 1 << 20)
    best = density(search.encode(mu, of, KEY)[1], mu, of)
    for least, most, loss in ((512, 2048, 0.008), (512, 700, 0.008)):
        monkeypatch.setattr(search.Search, "LEAST", least)
        monkeypatch.setattr(search.Search, "MOST", most)
        message, y = search.encode(mu, of, KEY)
        assert np.array_equal(trellis.decode(message, of, KEY), y)
        assert (1 - loss) * best < density(y, mu, of) < best + 1


def test_round_trip_and_prefixes() -> None:
    of = layout([9.0, 0.5, 0.3, 0.01, 0.002], [30, 64, 10, 13_000, 3000])
    message, y = search.encode(1.1 * expected(of), of, KEY)
    assert len(message) == of.bits and set(message.tolist()) == {0, 1}
    assert np.array_equal(trellis.decode(message, of, KEY), y)
    assert not np.array_equal(trellis.decode(message, of, (KEY[0], KEY[1] + 1)), y)
    assert not np.array_equal(trellis.decode(message, of, (KEY[0] + 1, KEY[1])), y)
    lengths = []
    for bits in range(of.bits + 1):
        known = trellis.decode(message[:bits], of, KEY)
        assert len(known) == of.arrived(bits)
        assert np.array_equal(known, y[: len(known)])
        lengths.append(len(known))
    assert lengths == sorted(lengths)
    # Whole classes, and of a large one whole runs; as soon as their last bit is there.
    ends = [30, 94, 104, 104 + 4096, 104 + 8192, 13_104, 16_104]
    assert sorted({0, *ends}) == sorted(set(lengths))
    for end in ends:
        assert lengths.index(end) == of.last[end - 1] + 1


def test_layout() -> None:
    rng = np.random.default_rng(6)
    v = rng.exponential(size=12) * rng.choice([0.0, 0.01, 1.0, 1000.0], size=12)
    n = rng.integers(0, 200, size=12)
    of = Layout.of(v, n, 12)
    information = float((np.log2(1 + v) / 2 * n).sum())
    assert of.bits == pytest.approx(information * 271 / 256 + trellis.OVERHEAD, abs=1.01)
    assert len(of.last) == n.sum() and np.all(np.diff(of.last) >= 0)
    assert of.last[0] >= 0 and of.last[-1] < of.bits
    # Every coefficient waits until its share of the rate has come, and not longer.
    due = np.cumsum(np.repeat(np.log2(1 + v) / 2, n)) * of.bits / information
    assert np.all(np.abs(of.last + 0.5 - due) < 1.6)
    first, column = of.columns()
    assert len(first) == of.bits + 1 and first[-1] == n.sum()
    assert np.array_equal(first[of.last] + column, np.arange(n.sum()))


def test_nothing_to_send() -> None:
    for of in (layout([0.0], [6]), layout([1.0], [0]), layout([], [])):
        assert of.bits == trellis.OVERHEAD
        message, y = search.encode(np.zeros(int(of.n.sum())), of, KEY)
        assert len(message) == of.bits and len(y) == of.n.sum()


def test_information() -> None:
    v = np.concatenate([[0.0], np.geomspace(1e-9, 1e9, 2000)])
    got = trellis.information(v) / 2**20
    assert np.abs(got - np.log2(1 + v) / 2).max() < 2.0**-20
    assert got[0] == 0 and np.all(np.diff(got) >= 0)


def test_mixing() -> None:
    """Orthonormal, within a run and all over it, and undone."""
    n = np.array([1, 12, 0, 9000])
    x = np.random.default_rng(0).standard_normal((3, int(n.sum())))
    mixed = np.stack([trellis.mix(row, n, KEY) for row in x])
    np.testing.assert_allclose(mixed @ mixed.T, x @ x.T, rtol=1e-4, atol=0.1)
    back = np.stack([trellis.mix(row, n, KEY, inverse=True) for row in mixed])
    np.testing.assert_allclose(back, x, atol=6 / 4096)  # each is rounded three times
    for at, begin, end in ((0, 0, 1), (1, 1, 13), (13, 13, 13 + 4096), (5000, 13 + 4096, 9013)):
        alone = np.zeros(int(n.sum()))
        alone[at] = 1.0
        touched = np.flatnonzero(np.abs(trellis.mix(alone, n, KEY)) > 1e-6)
        assert touched[0] >= begin and touched[-1] < end
        assert len(touched) > 0.4 * (end - begin)


def hadamard(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums and differences, in integers."""
    step = 1
    while step < len(x):
        pairs = x.reshape(-1, 2, step)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(-1)
        step *= 2
    return x


def mixed_in_integers(x: Floats, n: list[int], key: tuple[int, int]) -> Floats:
    """trellis.mix(inverse=True) of numbers on the grid, by its description."""
    octets = np.random.Philox(
        key=np.array(key, np.uint64), counter=np.array([0, trellis.SIGNS, 0, 0], np.uint64)
    ).random_raw(-(-len(x) // 64))
    bits = np.unpackbits(octets.astype("<u8").view(np.uint8), count=len(x))
    signs = 1 - 2 * bits.astype(np.int64)
    out = np.rint(x * 4096).astype(np.int64)

    def transform(part: slice, size: int) -> None:
        sums = hadamard(out[part]).astype(np.float64)
        out[part] = np.rint(sums * (1 / math.sqrt(size)) if size > 1 else sums).astype(np.int64)

    begin = 0
    for size in n:
        last, end = begin, begin + size
        while (end - last > 4096 and end - last >= 8192) or end - last == 4096:
            transform(slice(last, last + 4096), 4096)
            last += 4096
        left = end - last
        if left:
            power = min(4096, 2 ** (left.bit_length() - 1))
            if power == left:
                transform(slice(last, end), power)
            else:
                transform(slice(end - power, end), power)
                out[last:end] *= signs[last:end][::-1]
                transform(slice(last, last + power), power)
        begin = end
    return out * signs / 4096


def test_mixing_is_the_same_in_integers() -> None:
    """So no order of summation matters; all values are on the grid."""
    n = [1, 2, 3, 12, 0, 4096, 5000, 9000, 12_288]
    x = np.rint(np.random.default_rng(0).standard_normal(sum(n)) * 4096) / 4096
    got = trellis.mix(x, np.array(n), KEY, inverse=True)
    np.testing.assert_array_equal(got, mixed_in_integers(x, n, KEY))
    assert np.array_equal(got * 4096, np.rint(got * 4096))


@pytest.mark.parametrize("threads", [1, 2])
def test_y_is_the_same_bits(threads: int) -> None:
    """Whatever the number of threads: integers, mixed, and one rounding each for its deviation."""
    v, n = [9.0, 0.5, 0.3, 0.01], [30, 64, 10, 30_000]
    of = layout(v, n)
    message = np.random.default_rng(5).integers(0, 2, of.bits).astype(np.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = trellis.decode(message, of, KEY)
    finally:
        torch.set_num_threads(before)
    row, flip = trellis.branches(message, of.memory)
    table, period = trellis._table(KEY[0], of.memory), of.memory // 3
    label = np.empty(len(of.last), np.float32)
    for j, (bit, c) in enumerate(zip(of.last.tolist(), of.columns()[1].tolist(), strict=True)):
        at = (c + bit % period * (64 // period)) % 64
        label[j] = table[row[bit] ^ c // 64 % len(table), at]
    normal = np.repeat(of.normal, n)
    assert normal.any() and not normal.all()
    # Of a normal that was rounded to 0 the sign is that from before.
    label = np.where(normal, label, np.copysign(np.float32(1), label)) * (1 - 2.0 * flip[of.last])
    mixed = mixed_in_integers(label, n, KEY)
    np.testing.assert_array_equal(y, mixed * np.repeat(np.sqrt(1 + np.array(v)), n))


def test_table_and_layout_are_pinned() -> None:
    """A change of these numbers is a change of the file format."""
    of = layout([3.0, 0.1], [3, 200], 12)
    message = np.unpackbits(np.frombuffer(b"\xc5\x31\x8d\x70", np.uint8))[: of.bits]
    y = trellis.decode(message, of, KEY)
    assert of.bits == PINNED_BITS
    assert y[[0, 1, 2, 100, 202]].tolist() == PINNED_Y
    v = np.array([1e-5, 0.3, 2.0, 1e4])
    assert trellis.information(v).tolist() == PINNED_INFORMATION


PINNED_BITS = 22
PINNED_Y = [-1.2373046875, 0.11083984375, 2.10107421875, -0.5579478711334864, -0.9269257886660032]
PINNED_INFORMATION = [8, 198449, 830977, 6966664]


def test_in_plain_words() -> None:
    """The rows and signs of a message, bit by bit."""
    rng = np.random.default_rng(1)
    for memory in (8, 11, 12, 16):
        bits = rng.integers(0, 2, 100).astype(np.uint8)
        row, flip = trellis.branches(bits, memory)
        before = [0] * memory + bits.tolist()  # bit t is before[memory + t]
        for t in range(len(bits)):
            begin = t - t % (memory // 3)
            of = [*range(begin, t), *range(t - memory + 1, begin)]
            assert row[t] == int("".join(str(before[memory + s]) for s in of), 2)
            assert flip[t] == before[memory + t] ^ before[t]


def test_malformed() -> None:
    of = layout([0.5], [60])
    with pytest.raises(FormatError, match="more bits"):
        trellis.decode(np.zeros(of.bits + 1, np.uint8), of, KEY)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_absurd_mu_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not within"):
        search.encode(np.array([0.0, bad]), layout([1.0], [2]), KEY)


def test_searching_threads_leave_torch_its_threads() -> None:
    """However they overlap: the first to come takes them, the last to go gives them back."""
    of = [layout([0.5], [n], 8) for n in (4000, 500, 2000)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        work = [Thread(target=search.encode, args=(expected(one), one, KEY)) for one in of]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
