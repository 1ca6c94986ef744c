"""What is expected of the coefficients of a message: classes of equal variance, and their gains.

Both ends must hold the same integers here, or they would not agree on the message's length: only
integers and exactly rounded + - * / on doubles.
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

UNIT = 2.0**36  # in how many steps expected squares are counted
UNITY = 22  # the gain 1
# Times what the tables expect: this picture's variance, 2^((k - 22) / 2).
GAINS = [math.ldexp((1.0, math.sqrt(2.0))[k % 2], k // 2 - 11) for k in range(32)]
GAIN_SHARE = 80  # bits of information that are worth one more


class Classes(NamedTuple):
    """The coefficients of a message by what is expected of them, the loudest class first."""

    v: Doubles  # (G,) expected (x_0 - x0_hat)^2 in units of the noise's variance, falling
    n: Ints  # (G,) coefficients of each
    order: Ints  # (sum n,) where they are, class by class


def sort(of_coefficient: NDArray[Any], v: Doubles, sent: NDArray[np.bool_]) -> Classes:
    """Classes of the coefficients that are ``sent``; of one class they stay in their order.

    of_coefficient: (N,) unsigned integers, the class of each, with ``v`` (K,) expected of them. Of
    equal ones the class of the lower number comes first.
    """
    here = np.flatnonzero(sent)
    loudest = np.argsort(-v, kind="stable")
    rank = np.empty(len(v), np.uint16)
    rank[loudest] = np.arange(len(v))
    of_here = rank[of_coefficient[here]]
    n = np.bincount(of_here, minlength=len(v))
    there = n > 0
    return Classes(v[loudest][there], n[there], here[np.argsort(of_here, kind="stable")])


def by_error(error: Doubles, position: Ints, sent: NDArray[np.bool_], d: float) -> Classes:
    """Classes of half an octave of expected squares, counted in whole units.

    error: (B, P) expected (x_0 - x0_hat)^2 of each band at each position; position: (N,) of each
    block, P where it has none and the band's mean is expected; sent: (B,) bands; d: precision of
    the observation. The mean of a class is one of exactly rounded sums, the same on all machines.
    """
    units = whole_units(error)
    units = np.column_stack([units, units.sum(1) // units.shape[1]])
    here = (np.bincount(position, minlength=units.shape[1]) > 0)[None] & sent[:, None]
    kinds, group = np.unique(-loudness(units), return_inverse=True)
    group = group.reshape(units.shape)
    cells = [units[here & (group == g)] for g in range(len(kinds))]
    mean = np.array([int(of.sum()) / max(len(of), 1) for of in cells]) / UNIT
    of_coefficient = group[:, position]
    all_sent = np.broadcast_to(sent[:, None], of_coefficient.shape)
    return sort(of_coefficient.reshape(-1), mean * d, all_sent.reshape(-1))


def whole_units(error: Doubles) -> Ints:
    return np.rint(error * UNIT).astype(np.int64)


def loudness(units: Ints) -> Ints:
    """Half octaves of squares that are counted in whole units, 0 and 1 being alike."""
    mantissa, exponent = np.frexp(np.maximum(units, 1).astype(np.float64))  # in [1/2, 1)
    return 2 * exponent.astype(np.int64) + (mantissa >= math.sqrt(0.5))


def shares(classes: Classes, share: int = GAIN_SHARE) -> Ints:
    """(G,) which gain counts for each class: one for every ``share`` bits of information."""
    each = information(classes.v) * classes.n
    total = max(int(each.sum()), 1)
    count = min(max(total // (share << 20), 1), max(len(each), 1))
    of_class = np.minimum((np.cumsum(each) - each // 2) * count // total, count - 1)
    return np.cumsum(np.diff(of_class, prepend=of_class[:1]) > 0)  # numbered without gaps


def fit_gains(classes: Classes, share: Ints, mu: Doubles) -> list[int]:
    """The gains that describe mu, (sum n,) in the classes' order, best."""
    squares = np.bincount(np.repeat(share, classes.n), mu * mu)
    expected = np.bincount(share, classes.v * classes.n)
    ratio = np.maximum(squares, 1e-12) / np.maximum(expected, 1e-12)
    gains = np.clip(np.rint(2 * np.log2(ratio)) + UNITY, 0, len(GAINS) - 1)
    return [int(k) for k in gains]


def adjusted(classes: Classes, share: Ints, gains: Sequence[int]) -> Doubles:
    """(G,): ``v`` times the gains."""
    return classes.v * np.array([GAINS[k] for k in gains])[share] if gains else classes.v


def write_gains(gains: Sequence[int], before: int) -> NDArray[np.uint8]:
    """By how much each differs from the one before, in unary: 0, 1, -1, 2, -2, ..."""
    text = ""
    for last, now in itertools.pairwise([before, *gains]):
        text += "1" * (2 * (now - last) - 1 if now > last else 2 * (last - now)) + "0"
    return np.array([int(c) for c in text], np.uint8)


def longest(count: int) -> int:
    """Bits that so many gains may take."""
    return 2 * len(GAINS) * count


def read_gains(bits: NDArray[np.uint8], count: int, before: int) -> tuple[list[int], int]:
    """The inverse, and how many bits they take. Raises Incomplete, FormatError."""
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
