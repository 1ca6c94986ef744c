"""Classes of equal variance, and the gains by which a picture differs from the tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ddpm_codec.diffusion import transform
from ddpm_codec.errors import FormatError, Incomplete
from ddpm_codec.rec import classes, trellis
from ddpm_codec.rec.classes import GAINS, UNITY, Classes


def of(v: Any, n: Any) -> Classes:
    n = np.array(n)
    return Classes(np.array(v, np.float64), n, np.arange(n.sum()))


# --- Classes -----------------------------------------------------------------------------------


def test_largest_variance_first() -> None:
    kind = np.array([2, 0, 1, 1, 2, 0, 3], np.uint16)
    v = np.array([0.5, 4.0, 0.5, 9.0])
    got = classes.sort(kind, v, np.ones(7, bool))
    assert got.v.tolist() == [9.0, 4.0, 0.5, 0.5]
    assert got.n.tolist() == [1, 2, 2, 2]
    # Of one class in their order, and of equal classes the lower number first.
    assert got.order.tolist() == [6, 2, 3, 1, 5, 0, 4]


def test_only_what_is_sent() -> None:
    kind = np.array([2, 0, 1, 1, 2, 0, 3], np.uint16)
    sent = np.array([1, 0, 1, 0, 1, 0, 0], bool)
    got = classes.sort(kind, np.array([0.5, 4.0, 0.5, 9.0]), sent)
    assert (got.v.tolist(), got.n.tolist()) == ([4.0, 0.5], [1, 2])
    assert got.order.tolist() == [2, 0, 4]
    nothing = classes.sort(kind, np.ones(4), np.zeros(7, bool))
    assert len(nothing.v) == len(nothing.n) == len(nothing.order) == 0


@pytest.mark.parametrize("blocks", [(8, 4), (9, 6), (3, 3), (1, 1)])
def test_classes_by_error(blocks: tuple[int, int]) -> None:
    """All coefficients of the bands sent, in half octaves of variance, the largest first."""
    rng = np.random.default_rng(0)
    error = np.exp(rng.uniform(-6, 2, (5, 16)))
    place = transform.positions(blocks)
    sent = np.array([True, True, False, True, True])
    d = 3.0
    got = classes.by_error(error, place, sent, d)
    n = blocks[0] * blocks[1]
    expected = np.column_stack([error, error.mean(1)])[:, place] * d
    indices = np.flatnonzero(np.repeat(sent, n))
    np.testing.assert_array_equal(np.sort(got.order), indices)
    assert got.n.sum() == len(indices) and (np.diff(got.v) < 0).all()
    parts = np.split(expected.reshape(-1)[got.order], np.cumsum(got.n)[:-1])
    for v, part in zip(got.v, parts, strict=True):
        assert part.max() < math.sqrt(2) * 1.0001 * part.min()
        # The class's mean, each of its kinds counted once.
        assert part.min() * 0.9999 <= v <= part.max() * 1.0001
    for one, two in zip(parts[:-1], parts[1:], strict=True):
        assert one.min() > two.max()


def test_half_octaves() -> None:
    unit = int(classes.UNIT)
    squares = np.array([int(unit * 2 ** (k / 2)) + 1 for k in range(-9, 9)])
    step = classes.half_octaves(squares)
    assert np.diff(step).tolist() == [1] * 17
    assert np.ptp(classes.half_octaves(np.array([0, 1]))) == 0
    assert classes.whole_units(np.array([1.0, 0.0, 2.0**-36])).tolist() == [1 << 36, 0, 1]


# --- Gains -------------------------------------------------------------------------------------


def test_gains_are_half_octaves() -> None:
    assert GAINS[UNITY] == 1.0 and GAINS[UNITY + 1] == math.sqrt(2.0) and GAINS[UNITY - 2] == 0.5
    assert (GAINS[0], GAINS[31], len(GAINS)) == (2.0**-11, 2.0**4 * math.sqrt(2.0), 32)
    assert np.allclose(np.diff(np.log2(GAINS)), 0.5)


def test_a_gain_for_each_share_of_information() -> None:
    # Of v = 3 each coefficient is worth one bit.
    assert classes.shares(of([3.0], [5000])).tolist() == [0]  # a class is not divided
    assert classes.shares(of([3.0] * 3, [10] * 3)).tolist() == [0, 0, 0]
    assert classes.shares(of([3.0] * 4, [100] * 4)).tolist() == [0, 1, 2, 3]
    assert classes.shares(of([3.0] * 6, [40] * 6)).tolist() == [0, 0, 1, 1, 2, 2]
    assert classes.shares(of([3.0] * 6, [40] * 6), share=240).tolist() == [0] * 6
    # Numbered without gaps, whatever is large.
    uneven = classes.shares(of([15.0, 3.0, 3.0, 0.0], [3000, 1, 1, 9]))
    assert uneven[0] == 0 and set(np.diff(uneven).tolist()) <= {0, 1}
    assert len(classes.shares(of([], []))) == 0
    assert classes.shares(of([0.0], [5])).tolist() == [0]


def test_gains_fit_the_picture() -> None:
    rng = np.random.default_rng(0)
    some = of([16.0, 4.0, 0.3], [4000, 4000, 4000])
    share = np.array([0, 0, 1])
    for factor in ((1.0, 1.0), (4.0, 0.125), (1.0, 8.0)):
        v = some.v * np.array(factor)[share]
        mu = rng.standard_normal(12000) * np.sqrt(np.repeat(v, some.n))
        gains = classes.fit_gains(some, share, mu)
        assert gains == [UNITY + round(2 * math.log2(f)) for f in factor]
        np.testing.assert_allclose(classes.adjusted(some, share, gains), v)
    # Beyond the range of gains, the nearest one.
    assert classes.fit_gains(some, share, np.zeros(12000)) == [0, 0]
    assert classes.fit_gains(some, share, np.full(12000, 1e4)) == [31, 31]
    np.testing.assert_array_equal(classes.adjusted(of([], []), np.zeros(0, int), []), [])


def test_gains_as_bits() -> None:
    """By how much each differs from the one before, in unary: 0, 1, -1, 2, -2."""
    assert classes.write_gains([9, 10, 8], 9).tolist() == [0, 1, 0, 1, 1, 1, 1, 0]
    assert classes.write_gains([7, 9], 9).tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 0]
    assert classes.write_gains([], 9).tolist() == []


def test_gains_round_trip() -> None:
    rng = np.random.default_rng(0)
    for count, before in ((0, 3), (1, 0), (2, 31), (24, UNITY)):
        gains = rng.integers(0, len(GAINS), count).tolist()
        bits = classes.write_gains(gains, before)
        assert len(bits) <= classes.longest(count)
        more = np.append(bits, [1, 1, 0]).astype(np.uint8)
        assert classes.read_gains(more, count, before) == (gains, len(bits))
        for end in range(len(bits)):
            with pytest.raises(Incomplete):
                classes.read_gains(bits[:end], count, before)
    extremes = [31, 0, 31, 0]
    assert len(classes.write_gains(extremes, 0)) <= classes.longest(4)


@pytest.mark.parametrize(
    ("bits", "before"), [("10", 31), ("110", 0), ("1" * 200, 9), ("1" * 63 + "0", 16)]
)
def test_malformed_gains(bits: str, before: int) -> None:
    with pytest.raises(FormatError, match="gains"):
        classes.read_gains(np.array([int(c) for c in bits], np.uint8), 1, before)


def test_gains_that_never_end() -> None:
    """No more is waited for than gains may take."""
    ones = np.ones(classes.longest(3), np.uint8)
    with pytest.raises(Incomplete):
        classes.read_gains(ones[:-1], 3, 9)
    with pytest.raises(FormatError, match="gains"):
        classes.read_gains(ones, 3, 9)


def test_classes_and_gains_make_a_message() -> None:
    """The layout that both ends derive: its bits follow from v, n and gains alone."""
    some = of([16.0, 4.0, 0.3], [40, 40, 4000])
    share = classes.shares(some)
    low, plain, high = (
        trellis.Layout.of(classes.adjusted(some, share, [g] * (int(share[-1]) + 1)), some.n, 8).bits
        for g in (UNITY - 4, UNITY, UNITY + 4)
    )
    assert low < plain < high
