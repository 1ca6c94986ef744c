"""Relative-entropy coding of Gaussian observations by a random trellis: DDPM's Algorithms 3 and 4.

All numbers are standardised. The decoder expects mu_j ~ N(0, v_j). The encoder knows mu and wants
the decoder to hold an observation of it through unit noise, y_j = mu_j + N(0, 1). Before the
message the decoder expects y_j ~ N(0, 1 + v_j), so y_j carries I(mu; y) = 1/2 log2(1 + v_j) bits.

1. *The list.* Both ends can produce the same candidates for y. They are the paths of a trellis
   whose state is the last ``memory`` bits of the message. The labels of the branch of bit t are a
   row of a table of normals, chosen by the memory - 1 bits before t. They are negated if bit t
   differs from the bit that it drives out of the memory. So the two branches that leave a state,
   and the two that meet in one, have opposite labels, as far apart as possible.
2. *Selection.* The encoder sends the path of the largest information density,
   log q(y | mu) / p(y) = sum_j mu_j y_j - alpha_j y_j^2 / 2 + const with alpha = v / (1 + v).
   Viterbi's algorithm finds it among all 2^bits paths in 2^(memory + 1) steps a bit. This is the
   argmax of the Poisson functional representation (Li and El Gamal 2018) without its exponential
   variable, over a list so long that a whole level is one message. Coding in chunks would limit
   the length of each and cost 2 to 4 bits for the index of every 11.
3. *Rate.* A message of just I bits would make y a little less correlated with mu than the channel
   does: paths are compared only up to the message's end, and N = 2^memory survivors are not all
   paths (the best of N branching walks falls short by a share of about pi^2 / 2 (ln N)^2). So a
   message has rate * I + OVERHEAD bits. Then E y.mu = |mu|^2, and the noise has variance one.
4. *Mixing.* This holds if mu is distributed as the decoder expects. A picture's coefficients are
   not: some blocks have most of the energy. White noise stays white under any rotation, so y is an
   observation of a random rotation of mu. A rotation mixes a run of coefficients of one class, and
   its results are nearly Gaussian and alike.
5. *Signs.* A sum of many random signs is nearly Gaussian, too. Where a coefficient carries little
   information (v <= QUIET) and enough of them are mixed (FEW), the labels are only the signs of the
   table's normals. This is even a little better: y^2 is the same on all paths, so none is preferred
   for being short.

The bits are the message; no entropy coder follows. The distribution of y given mu is not exact,
because a path is chosen, not drawn. Its first two moments are right (tests/test_trellis.py measures
them, and benchmarks/paper.py the effect on the chain). The noise along mu, one dimension for each
bit, varies less than N(0, 1) does. By the duality of source coding and simulation the distribution
becomes exact as the memory grows (Mao and Gray 2010, "Stationary and trellis encoding for IID
sources and simulation"; Viterbi and Omura 1974, "Trellis encoding of memoryless discrete-time
sources").

Rates are integers, computed by exactly rounded arithmetic. Normals are on a grid on which their
sums are exact. So all machines find the same length of a message, and the same y.

Further reading: Marcellin and Fischer 1990 (trellis-coded quantization); Tseng et al. 2024, "QTIP"
(bitshift trellises for the weights of language models); Theis and Yosri 2022, "Algorithms for the
communication of samples" (the same task with one index for each chunk).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FormatError

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]
Key = tuple[int, int]  # (seed of a file, stream), each in [0, 2^64); a stream for each message

# 256ths of a bit sent for each bit of information, by memory; found by simulation.
RATE = {8: 282, 9: 279, 10: 275, 11: 273, 12: 271, 13: 270, 14: 269, 15: 268, 16: 267}
MEMORY = 7  # the trellis remembers MEMORY + effort bits
OVERHEAD = 4  # bits of a message beyond its rate: its beginning and end are used less well
WIDTH = 64  # columns of the table
QUIET = 0.75  # largest v for which labels are signs
FEW = 16  # number of coefficients from which on sums of signs are Gaussian enough
MIXED = 1 << 12  # coefficients that are mixed with one another
GRID = 2.0**12  # normals are multiples of 1 / GRID
PART = 1 << 16  # coefficients decoded at a time, few enough for the caches


def information(v: Floats) -> Ints:
    """1/2 log2(1 + v), elementwise, in units of 2^-20 bits. v: >= 0, any shape.

    The mantissa's logarithm is the series ln((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + ...). It needs
    only + - * / on doubles, which are exactly rounded: all machines find the same integers.
    """
    mantissa, exponent = np.frexp(1.0 + np.asarray(v, dtype=np.float64))  # in [1/2, 1)
    s = (mantissa - 0.75) / (mantissa + 0.75)  # |s| <= 1/5
    square, power, series = s * s, s, np.zeros_like(s)
    for k in range(1, 24, 2):
        series = series + power / k
        power = power * square
    log2 = exponent - 0.41503749927884376 + 2.0 * series * 1.4426950408889634
    out: Ints = np.maximum(np.rint(log2 * 2.0**19), 0.0).astype(np.int64)
    return out


@dataclass(frozen=True)
class Layout:
    """The length of a message, and the bit that each of its coefficients waits for."""

    v: Floats  # (G,) expected mu_j^2 in each class of coefficients, one class after the other
    n: Ints  # (G,) number of coefficients in each class
    memory: int  # bits of a state
    bits: int  # length of the message
    last: NDArray[np.int32]  # (sum n,) index of the last bit that a coefficient depends on, rising

    @staticmethod
    def of(v: Floats, n: Ints, memory: int) -> Layout:
        """The layout of a message of these classes. memory: a key of RATE."""
        total = np.cumsum(np.repeat(information(v), n))
        information_bits = int(total[-1]) if len(total) else 0
        bits = OVERHEAD - (-information_bits * RATE[memory] // (256 << 20))
        share = max(1, -(-information_bits // bits))  # of the information, for each bit
        total += share - 1
        total //= share
        last = np.clip(total - 1, 0, bits - 1).astype(np.int32)
        return Layout(v, n, memory, bits, last)

    def arrived(self, bits: int) -> int:
        """How many leading coefficients the first ``bits`` bits determine, in whole runs."""
        labelled = int(np.searchsorted(self.last, bits))
        ends = np.cumsum(self.n)
        whole = int(np.searchsorted(ends, labelled, side="right"))  # number of whole classes
        begin = int(ends[whole - 1]) if whole else 0
        full = 0 if whole == len(ends) else _full(int(self.n[whole]))
        return begin + min(full, (labelled - begin) // MIXED * MIXED)

    def columns(self) -> tuple[Ints, NDArray[np.int32]]:
        """(bits + 1,) first coefficient of each bit; (sum n,) index of each among its bit's."""
        first = np.searchsorted(self.last, np.arange(self.bits + 1, dtype=np.int32))
        each = np.repeat(first[:-1].astype(np.int32), np.diff(first))
        return first, np.arange(len(self.last), dtype=np.int32) - each

    @property
    def normal(self) -> NDArray[np.bool_]:
        """(G,) whether a class's labels are normals, not signs."""
        return (self.v > QUIET) | (self.n < FEW)


def decode(bits: Bits, layout: Layout, key: Key) -> Floats:
    """The y that the encoder chose (search.encode), (n,).

    If the message is incomplete, its first k = layout.arrived(len(bits)) values. Raises FormatError
    if there are more bits than the layout has.
    """
    if len(bits) > layout.bits:
        raise FormatError("a message of more bits than its level has")
    n, period = layout.arrived(len(bits)), period_of(layout.memory)
    row, flip = branches(bits, layout.memory)
    table, column = _table(key[0], layout.memory), layout.columns()[1]
    shift = np.arange(len(bits), dtype=np.int32) % period * (WIDTH // period)
    sign = np.float32(1) - np.float32(2) * flip
    normal = np.repeat(layout.normal, layout.n)
    y = np.empty(n, dtype=np.float32)
    for begin in range(0, n, PART):
        part = slice(begin, min(n, begin + PART))
        bit, c = layout.last[part], column[part]
        index = (row[bit] ^ c // WIDTH % len(table)) * WIDTH + (c + shift[bit]) % WIDTH
        label = table.reshape(-1)[index]
        label = np.where(normal[part], label, np.copysign(np.float32(1), label))
        y[part] = label * sign[bit]
    sizes = np.diff(np.minimum(np.cumsum(layout.n), n), prepend=0)
    return mix(y, sizes, key, inverse=True) * np.repeat(np.sqrt(1.0 + layout.v), layout.n)[:n]


def mix(x: NDArray[Any], n: Ints, key: Key, inverse: bool = False) -> Floats:
    """An orthonormal transform of each run of x, or its inverse. n: (G,) sizes of the classes.

    After each step numbers are rounded to 1 / GRID, so that sums are exact, whatever their order.

    A class is divided into runs of MIXED coefficients; a remainder joins the last of them, or is a
    run itself if the class is smaller. A run is multiplied by random signs, and its beginning, the
    largest power of two that is at most MIXED, goes through the Walsh-Hadamard transform. If the
    run is longer, it is multiplied by its signs in reverse order, and as many coefficients at its
    end go through the transform.
    """
    out = np.rint(x.astype(np.float64) * GRID) / GRID
    signs = _signs(key, len(x))
    if not inverse:
        out *= signs
    begin = 0
    for size in n.tolist():
        last, end = begin + _full(size), begin + size
        _hadamard(out[begin:last], MIXED)
        run, reversed_signs = out[last:end], signs[last:end][::-1]
        power = min(MIXED, 1 << len(run).bit_length() >> 1)
        if power == len(run):
            _hadamard(run, power)
        else:
            halves = run[:power], run[-power:]
            _hadamard(halves[inverse], power)
            run *= reversed_signs
            _hadamard(halves[not inverse], power)
        begin = end
    if inverse:
        out *= signs
    return out


def _full(size: int) -> int:
    """How many of a class's coefficients are in runs of exactly MIXED."""
    return max(0, size // MIXED - (size % MIXED > 0)) * MIXED


def _hadamard(x: Floats, size: int) -> None:
    """Transform each ``size`` elements of x in place, as a matrix X: H_a X H_b."""
    if size > 1:
        norm = 1.0 / math.sqrt(size)
        a, b = _matrix(size.bit_length() // 2), _matrix((size.bit_length() - 1) // 2)
        for part in np.split(x, range(64 * size, len(x), 64 * size)):  # parts fit the caches
            matrices = torch.from_numpy(part).view(-1, len(a), len(b))
            matrices.copy_(a @ (matrices @ b)).mul_(GRID * norm).round_().mul_(1.0 / GRID)


@cache
def _matrix(log2: int) -> Tensor:
    """(2^log2, 2^log2): the Hadamard matrix of ones and minus ones."""
    out = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(log2):
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return out


# --- the trellis ------------------------------------------------------------------------------
# A register holds the last ``memory`` bits as a number, the oldest bit at the highest place. Each
# new bit takes the place of the oldest one, from the highest place downwards. So a step of the
# search is a butterfly in place, on contiguous arrays that get shorter from step to step. After
# memory // 3 steps (a period) the register is rotated, so that the oldest bit is at the highest
# place again. Within a period successive bits may have the same row of the table, so each step of a
# period begins at another column.


def period_of(memory: int) -> int:
    """Number of steps after which a register is rotated."""
    return memory // 3


def branches(bits: Bits, memory: int) -> tuple[NDArray[np.int32], Bits]:
    """(len(bits),) each bit's row of the table, and whether its labels' signs are flipped.

    The row is the register without the place that the bit takes.
    """
    period = period_of(memory)
    padded = np.concatenate([np.zeros(memory, dtype=np.uint8), bits])
    row = np.zeros(len(bits), dtype=np.int32)
    for k in range(period):
        rows = row[k::period]  # of the bits t0 + k, t0 being the first bit of a period
        for offset in (*range(k), *range(k - memory + 1, 0)):  # bits relative to t0
            rows *= 2
            rows += padded[memory + offset :: period][: len(rows)]
    return row, bits ^ padded[: len(bits)]


# --- shared randomness ------------------------------------------------------------------------
# Raw words of Philox 4x64 (Salmon et al. 2011) only: numpy guarantees that they never change.

NORMALS, SIGNS = 0, 1


def _words(key: Key, purpose: int, count: int) -> NDArray[np.uint64]:
    counter = np.array([0, purpose, 0, 0], dtype=np.uint64)
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter)
    words: NDArray[np.uint64] = generator.random_raw(count)
    return words


@cache
def _quantiles() -> Singles:
    """(2^16,): Phi^-1((k + 1/2) / 2^16), rounded to 1 / GRID."""
    inverse = NormalDist().inv_cdf
    exact = np.array([inverse((k + 0.5) / 2**16) for k in range(2**16)])
    return (np.rint(exact * GRID) / GRID).astype(np.float32)


@lru_cache(maxsize=1)
def _table(seed: int, memory: int) -> Singles:
    """(2^(memory - 1), WIDTH) normals, four from a word; all messages of a file share the table."""
    words = _words((seed, 0), NORMALS, (WIDTH // 4) << memory - 1)
    return _quantiles()[words.astype("<u8", copy=False).view("<u2")].reshape(-1, WIDTH)


@lru_cache(maxsize=1)
def label_columns(seed: int, memory: int) -> tuple[Tensor, ...]:
    """(period, WIDTH, 2^(memory - 1)) columns at each step of a period: signs, normals, squares."""
    period = period_of(memory)
    table = torch.from_numpy(_table(seed, memory)).T.repeat(2, 1)
    every = torch.sign(table), table, table * table
    return tuple(x.unfold(0, WIDTH, WIDTH // period)[:period].transpose(1, 2) for x in every)


def _signs(key: Key, n: int) -> Floats:
    """(n,) random signs, -1 or 1, for the mixing."""
    octets = _words(key, SIGNS, -(-n // 64)).astype("<u8", copy=False).view(np.uint8)
    return 1.0 - 2.0 * np.unpackbits(octets, count=n).astype(np.float64)
