"""The classes of a message's coefficients, each of one expected variance, and their gains.

The length of a message depends on these numbers, so both ends must find the same ones. They are
made by integer arithmetic and exactly rounded + - * / on doubles only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, Incomplete
from .trellis import information

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

UNIT = 2.0**36  # expected squares are counted in units of 1 / UNIT
UNITY = 22  # index of the gain 1
# A picture's variance over the one that the tables expect, 2^((k - 22) / 2).
GAINS = [math.ldexp((1.0, math.sqrt(2.0))[k % 2], k // 2 - 11) for k in range(32)]
GAIN_SHARE = 80  # bits of information for each gain


class Classes(NamedTuple):
    """The coefficients of a message by their expected variance, the largest first."""

    v: Doubles  # (G,) expected (x_0 - x0_hat)^2 in units of the noise's variance, falling
    n: Ints  # (G,) number of coefficients in each class
    order: Ints  # (sum n,) indices of the coefficients, class by class


def sort(of_coefficient: NDArray[Any], v: Doubles, sent: NDArray[np.bool_]) -> Classes:
    """Classes of the coefficients that are ``sent``; within a class their order is kept.

    of_coefficient: (N,) unsigned integers, the class of each; v: (K,) the classes' variances. Of
    classes of equal variance the one with the lower number comes first.
    """
    indices = np.flatnonzero(sent)
    falling = np.argsort(-v, kind="stable")
    rank = np.empty(len(v), np.uint16)
    rank[falling] = np.arange(len(v))
    ranks = rank[of_coefficient[indices]]
    n = np.bincount(ranks, minlength=len(v))
    occur = n > 0
    return Classes(v[falling][occur], n[occur], indices[np.argsort(ranks, kind="stable")])


def by_error(error: Doubles, position: Ints, sent: NDArray[np.bool_], d: float) -> Classes:
    """Classes that are half an octave of expected squares wide.

    error: (B, P) expected (x_0 - x0_hat)^2 of each band at each position; position: (N,) of each
    block, or P for a block without one, whose expected square is the band's mean; sent: (B,)
    whether a band is sent; d: precision of the observation. A class's variance is its mean,
    computed from an integer sum and so the same on all machines.
    """
    units = whole_units(error)
    units = np.column_stack([units, units.sum(1) // units.shape[1]])
    occur = (np.bincount(position, minlength=units.shape[1]) > 0)[None] & sent[:, None]
    kinds, group = np.unique(-half_octaves(units), return_inverse=True)
    group = group.reshape(units.shape)
    members = [units[occur & (group == g)] for g in range(len(kinds))]
    mean = np.array([int(m.sum()) / max(len(m), 1) for m in members]) / UNIT
    of_coefficient = group[:, position]
    all_sent = np.broadcast_to(sent[:, None], of_coefficient.shape)
    return sort(of_coefficient.reshape(-1), mean * d, all_sent.reshape(-1))


def whole_units(error: Doubles) -> Ints:
    """Expected squares as integers, in units of 1 / UNIT."""
    return np.rint(error * UNIT).astype(np.int64)


def half_octaves(units: Ints) -> Ints:
    """The half octave of each integer: 2 log2, rounded down, plus 2; 0 counts as 1."""
    mantissa, exponent = np.frexp(np.maximum(units, 1).astype(np.float64))  # in [1/2, 1)
    return 2 * exponent.astype(np.int64) + (mantissa >= math.sqrt(0.5))


def shares(classes: Classes, share: int = GAIN_SHARE) -> Ints:
    """(G,) the index of each class's gain: there is one for every ``share`` bits of information."""
    each = information(classes.v) * classes.n
    total = max(int(each.sum()), 1)
    count = min(max(total // (share << 20), 1), max(len(each), 1))
    of_class = np.minimum((np.cumsum(each) - each // 2) * count // total, count - 1)
    return np.cumsum(np.diff(of_class, prepend=of_class[:1]) > 0)  # renumbered without gaps


def fit_gains(classes: Classes, share: Ints, mu: Doubles) -> list[int]:
    """The gains that describe mu best. mu: (sum n,) in the classes' order."""
    squares = np.bincount(np.repeat(share, classes.n), mu * mu)
    expected = np.bincount(share, classes.v * classes.n)
    ratio = np.maximum(squares, 1e-12) / np.maximum(expected, 1e-12)
    gains = np.clip(np.rint(2 * np.log2(ratio)) + UNITY, 0, len(GAINS) - 1)
    return [int(k) for k in gains]


def adjusted(classes: Classes, share: Ints, gains: Sequence[int]) -> Doubles:
    """(G,): ``v`` times the gains."""
    return classes.v * np.array([GAINS[k] for k in gains])[share] if gains else classes.v


def write_gains(gains: Sequence[int], before: int) -> NDArray[np.uint8]:
    """The gains as bits: each one's difference from the gain before it, in unary.

    0, 1, -1, 2, -2, ... are written as 0, 1, 2, 3, 4, ... ones and a zero.
    """
    text = ""
    for last, gain in itertools.pairwise([before, *gains]):
        text += "1" * (2 * (gain - last) - 1 if gain > last else 2 * (last - gain)) + "0"
    return np.array([int(c) for c in text], np.uint8)


def longest(count: int) -> int:
    """The largest number of bits that ``count`` gains can take."""
    return 2 * len(GAINS) * count


def read_gains(bits: NDArray[np.uint8], count: int, before: int) -> tuple[list[int], int]:
    """The gains that :func:`write_gains` wrote, and the number of bits that they take.

    Raises Incomplete where the bits end too early, FormatError for impossible gains.
    """
    gains, at = [before], 0
    zeros = np.flatnonzero(bits == 0)
    if len(zeros) < count and len(bits) < longest(count):
        raise Incomplete
    for end in zeros[:count].tolist():
        u = end - at
        gains.append(gains[-1] + ((u + 1) // 2 if u % 2 else -u // 2))
        at = end + 1
    if len(gains) <= count or not all(0 <= gain < len(GAINS) for gain in gains):
        raise FormatError("impossible gains")
    return gains[1:], at
