"""Relative-entropy coding of Gaussian observations by a random trellis: DDPM's Algorithms 3 and 4.

Everything is in standardised units: the decoder expects mu_j ~ N(0, v_j), the encoder knows mu and
wants the decoder to hold an observation of it through unit noise, y_j = mu_j + N(0, 1). To the
decoder y_j ~ N(0, 1 + v_j) before it comes, and it is worth I(mu; y) = 1/2 log2(1 + v_j) bits.

1. *The list.* Both ends can produce the same candidates for y. They are the paths of a trellis
   whose state is the last ``memory`` bits of the message. The coefficients that wait for bit t are
   a row of a table of normals, picked by the memory - 1 bits before t, with the sign turned if bit
   t is not the bit that it drives out of the memory: the two branches that leave a state, and the
   two that meet in one, are opposites, as far apart as can be.
2. *Selection.* The encoder sends the path along which the information density
   log q(y | mu) / p(y) = sum_j mu_j y_j - alpha_j y_j^2 / 2 + const, alpha = v / (1 + v), is
   largest. Viterbi's algorithm finds it among all 2^bits in 2^(memory + 1) steps a bit. It is
   the Poisson functional representation's argmax (Li and El Gamal 2018) without its exponential
   variable, over a list that is long enough for a whole level to be one message: neither the price
   of an index (2 to 4 bits for each chunk of 11) nor a bound on chunks is left.
3. *Rate.* A message of I bits would leave y a little less like mu than the channel does, for its
   end is not looked past, and N = 2^memory survivors are not all paths (the best of N branching
   walks falls short by a share of about pi^2 / 2 (ln N)^2, Brunet and Derrida 1997). rate * I +
   OVERHEAD bits make up for it: then E y.mu = |mu|^2, and the noise has variance one.
4. *Mixing.* That holds of mu's that are as the decoder expects. Coefficients of a picture are not:
   some blocks have most of the energy. White noise stays white under any rotation, so y is an
   observation of a random rotation of mu, run by run of coefficients of which the same is
   expected: there all blocks are alike and about Gaussian.
5. *Signs.* So is a sum of many signs. Where a coefficient is worth little (v <= QUIET) and many are
   mixed (FEW), the table's signs alone serve as well as its normals, and a little better: y^2 is
   the same on all paths, so that none is preferred for being short.

The bits are the message; there is nothing left for an entropy coder. What is not exact is the law
of y given mu: a path is chosen, not drawn. Its first two moments are right (measured in
tests/test_trellis.py, and benchmarks/paper.py measures what the chain makes of it); the noise
along mu, one dimension for each bit, varies less than N(0, 1) does. By the duality of source coding
and simulation the law becomes exact as the memory grows (Mao and Gray 2010, "Stationary and trellis
encoding for IID sources and simulation"; Viterbi and Omura 1974, "Trellis encoding of memoryless
discrete-time sources").

Rates are integers by exactly rounded arithmetic, and so are the values of y: normals are on a grid
on which sums of them are exact. All machines find the same message's length, and the same y.

Further reading: Marcellin and Fischer 1990 (trellis-coded quantization); Tseng et al. 2024, "QTIP"
(bitshift trellises for the weights of language models); Theis and Yosri 2022, "Algorithms for the
communication of samples" (the same task by one index a chunk).
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

# 256ths of a bit sent for each bit of information, by memory, by simulation.
RATE = {8: 282, 9: 279, 10: 275, 11: 273, 12: 271, 13: 270, 14: 269, 15: 268, 16: 267}
MEMORY = 7  # bits that a state remembers, effort apart
OVERHEAD = 4  # bits of a message beyond its rate, for it has a beginning and an end
WIDTH = 64  # columns of the table
QUIET = 0.75  # v up to which signs do
FEW = 16  # coefficients whose mixtures of signs are not yet like normals
MIXED = 1 << 12  # coefficients mixed with one another
GRID = 2.0**12  # steps of a normal
PART = 1 << 16  # coefficients decoded at a time, few enough for the caches


def information(v: Floats) -> Ints:
    """1/2 log2(1 + v) of each, in units of 2^-20 bits. v: >= 0, any shape.

    ln((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + ...), after the power of two is taken off: only
    + - * / on doubles, exactly rounded, so that all machines find the same integers.
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
    """Which bit of the message each coefficient waits for."""

    v: Floats  # (G,) expected mu_j^2 in each class of coefficients, one class after the other
    n: Ints  # (G,) coefficients of each
    memory: int  # bits that a state remembers
    bits: int  # of the message
    last: NDArray[np.int32]  # (sum n,) index of the last bit that a coefficient depends on, rising

    @staticmethod
    def of(v: Floats, n: Ints, memory: int) -> Layout:
        """The message's layout; OVERHEAD bits at least. memory: a key of RATE."""
        total = np.cumsum(np.repeat(information(v), n))
        information_bits = int(total[-1]) if len(total) else 0
        bits = OVERHEAD - (-information_bits * RATE[memory] // (256 << 20))
        share = max(1, -(-information_bits // bits))  # of the information, for each bit
        total += share - 1
        total //= share
        last = np.clip(total - 1, 0, bits - 1).astype(np.int32)
        return Layout(v, n, memory, bits, last)

    def arrived(self, bits: int) -> int:
        """How many leading coefficients the first ``bits`` bits determine: whole runs."""
        known = int(np.searchsorted(self.last, bits))
        ends = np.cumsum(self.n)
        whole = int(np.searchsorted(ends, known, side="right"))  # classes
        begin = int(ends[whole - 1]) if whole else 0
        full = 0 if whole == len(ends) else _full(int(self.n[whole]))
        return begin + min(full, (known - begin) // MIXED * MIXED)

    def columns(self) -> tuple[Ints, NDArray[np.int32]]:
        """(bits + 1,) first coefficient of each bit; (sum n,) place of each among its bit's."""
        first = np.searchsorted(self.last, np.arange(self.bits + 1, dtype=np.int32))
        each = np.repeat(first[:-1].astype(np.int32), np.diff(first))
        return first, np.arange(len(self.last), dtype=np.int32) - each

    @property
    def normal(self) -> NDArray[np.bool_]:
        """(G,) whether a class has normals from the table, or their signs."""
        return (self.v > QUIET) | (self.n < FEW)


def decode(bits: Bits, layout: Layout, key: Key) -> Floats:
    """The y that the encoder chose (search.encode), (n,).

    Of a message that breaks off, what has arrived: (k,), k = layout.arrived(len(bits)). Raises
    FormatError if there are more bits than the coefficients have.
    """
    if len(bits) > layout.bits:
        raise FormatError("a message of more bits than its level has")
    n, turn = layout.arrived(len(bits)), turn_of(layout.memory)
    row, flip = branches(bits, layout.memory)
    table, column = _table(key[0], layout.memory), layout.columns()[1]
    shift = np.arange(len(bits), dtype=np.int32) % turn * (WIDTH // turn)
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

    In between, numbers are rounded to 1 / GRID, so that sums are exact, whatever their order.

    A class is runs of MIXED and what is left; if there is a whole run, that joins the last. Of a
    run, which is shorter than two of MIXED, the largest power of two that it has at the beginning
    has random signs and is transformed by Walsh and Hadamard; then, if that is not all, as many at
    its end, with the run's signs backwards.
    """
    out = np.rint(x.astype(np.float64) * GRID) / GRID
    signs = _signs(key, len(x))
    if not inverse:
        out *= signs
    begin = 0
    for size in n.tolist():
        last, end = begin + _full(size), begin + size
        _hadamard(out[begin:last], MIXED)
        run, turned = out[last:end], signs[last:end][::-1]
        power = min(MIXED, 1 << len(run).bit_length() >> 1)
        if power == len(run):
            _hadamard(run, power)
        else:
            halves = run[:power], run[-power:]
            _hadamard(halves[inverse], power)
            run *= turned
            _hadamard(halves[not inverse], power)
        begin = end
    if inverse:
        out *= signs
    return out


def _full(size: int) -> int:
    """Coefficients of a class that are in runs of MIXED."""
    return max(0, size // MIXED - (size % MIXED > 0)) * MIXED


def _hadamard(x: Floats, size: int) -> None:
    """Transform each ``size`` of x in place: as a matrix, H_a X H_b."""
    if size > 1:
        norm = 1.0 / math.sqrt(size)
        a, b = _matrix(size.bit_length() // 2), _matrix((size.bit_length() - 1) // 2)
        for part in np.split(x, range(64 * size, len(x), 64 * size)):  # in the caches
            of = torch.from_numpy(part).view(-1, len(a), len(b))
            of.copy_(a @ (of @ b)).mul_(GRID * norm).round_().mul_(1.0 / GRID)


@cache
def _matrix(log2: int) -> Tensor:
    """(2^log2, 2^log2): Hadamard's, of ones and minus ones."""
    out = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(log2):
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return out


# --- the trellis ------------------------------------------------------------------------------
# A register of the last ``memory`` bits is a number, the oldest bit highest. Bit after bit takes
# the place of the oldest, from the highest place downwards, so that a step of the search is a
# butterfly in place on long contiguous stretches; after memory // 3 bits (a turn), before they
# become short, the number is rotated so that the oldest bit is highest again. From step to step of
# a turn a row may stay the same: so each step begins at another column of it.


def turn_of(memory: int) -> int:
    """Steps after which a register is rotated."""
    return memory // 3


def branches(bits: Bits, memory: int) -> tuple[NDArray[np.int32], Bits]:
    """(len(bits),) row of the table for each bit, and whether its signs are turned.

    The row is the register without the place that the bit takes.
    """
    turn = turn_of(memory)
    padded = np.concatenate([np.zeros(memory, dtype=np.uint8), bits])
    row = np.zeros(len(bits), dtype=np.int32)
    for k in range(turn):
        at = row[k::turn]  # bit t = t0 + k, in turns that begin at t0
        for place in (*range(k), *range(k - memory + 1, 0)):  # from t0
            at *= 2
            at += padded[memory + place :: turn][: len(at)]
    return row, bits ^ padded[: len(bits)]


# --- shared randomness ------------------------------------------------------------------------
# Only Philox's raw words (4x64, Salmon et al. 2011), which numpy promises never to change.

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
    """(2^(memory - 1), WIDTH) normals, four to a word: one table for all messages of a file."""
    words = _words((seed, 0), NORMALS, (WIDTH // 4) << memory - 1)
    return _quantiles()[words.astype("<u8", copy=False).view("<u2")].reshape(-1, WIDTH)


@lru_cache(maxsize=1)
def label_columns(seed: int, memory: int) -> tuple[Tensor, ...]:
    """(turn, WIDTH, 2^(memory - 1)) columns for each step of a turn: signs, normals, squares."""
    turn = turn_of(memory)
    table = torch.from_numpy(_table(seed, memory)).T.repeat(2, 1)
    every = torch.sign(table), table, table * table
    return tuple(x.unfold(0, WIDTH, WIDTH // turn)[:turn].transpose(1, 2) for x in every)


def _signs(key: Key, n: int) -> Floats:
    """(n,) of -1 and 1: what makes the mixing random."""
    octets = _words(key, SIGNS, -(-n // 64)).astype("<u8", copy=False).view(np.uint8)
    return 1.0 - 2.0 * np.unpackbits(octets, count=n).astype(np.float64)
