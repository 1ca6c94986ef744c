"""Relative-entropy coding of Gaussian observations by a random trellis: DDPM's Algorithms 3 and 4.

Everything is in standardised units: the decoder expects mu_j ~ N(0, v_j), the encoder knows mu and
wants the decoder to hold an observation of it through unit noise, y_j = mu_j + N(0, 1). To the
decoder y_j ~ N(0, 1 + v_j) before it comes, and it is worth I(mu; y) = 1/2 log2(1 + v_j) bits.

1. *The list.* Both ends can produce the same candidates for y. They are the paths of a trellis
   whose state is the last bits of the message, as many as its ``memory`` (a "bitshift" trellis):
   the coefficients that fall to one bit of rate are a row of a table of normals, picked by that bit
   and the state before it, times sqrt(1 + v_j). Every path is a draw from the decoder's own law.
2. *Selection.* The encoder sends the path along which the information density
   log q(y | mu) / p(y) = sum_j mu_j y_j - alpha_j y_j^2 / 2 + const, alpha = v / (1 + v), is
   largest. Viterbi's algorithm finds it among all 2^bits in 2^(memory + 1) steps a bit. This is
   the Poisson functional representation's argmax (Li and El Gamal 2018) without its exponential
   variable, over a list that is long enough for a whole level to be one message: neither the price
   of an index (2 to 4 bits for each chunk of 11) nor a bound on chunks is left.
3. *Rate.* A message of I bits would leave y a little less like mu than the channel does, for its
   end is not looked past, and N = 2^memory survivors are not all paths (the best of N branching
   walks falls short by a share of about pi^2 / 2 (ln N)^2, Brunet and Derrida 1997). rate * I +
   OVERHEAD bits make up for it: then E y.mu = |mu|^2, and the noise has variance one.
4. *Mixing.* That holds of mu's that are as the decoder expects. Coefficients of a picture are not:
   some blocks have most of the energy. White noise stays white under any rotation, so y is an
   observation of a random rotation of mu, group by group of coefficients of which the same is
   expected: there all blocks are alike and about Gaussian.

The bits are the message; there is nothing left for an entropy coder. What is not exact is the law
of y given mu: a path is chosen, not drawn. Its first two moments are right (measured in
tests/test_gaussian.py, and benchmarks/paper.py measures what the chain makes of it); the noise
along mu, one dimension for each bit, varies less than N(0, 1) does. By the duality of source coding
and simulation the law becomes exact as the memory grows (Mao and Gray 2010, "Stationary and trellis
encoding for IID sources and simulation"; Viterbi and Omura 1974, "Trellis encoding of memoryless
discrete-time sources").

Floating point reaches the choice of the path (encoder alone) and the value of y (whose last digits
do not matter), never the message's length: rates are integers by exactly rounded arithmetic.

Further reading: Marcellin and Fischer 1990 (trellis-coded quantization); Tseng et al. 2024, "QTIP"
(bitshift trellises for the weights of language models); Theis and Yosri 2022, "Algorithms for the
communication of samples" (the same task by one index a chunk).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import FormatError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)
Key = tuple[int, int]  # (seed, stream), each in [0, 2^64), never the same for two messages

WIDTH = 64  # columns of the table: coefficients that share one
OVERHEAD = 4  # bits of a message beyond its rate, for it has a beginning and an end
RUN = 1 << 25  # bytes of survivors held at a time
BATCH = 64  # table rows whose metrics are computed at a time
MIXED = 1 << 12  # coefficients mixed with one another
MAX_MU = 2000.0  # beyond, the caller's model is broken


class Trellis(NamedTuple):
    """How many bits a state remembers, and what comes of it."""

    memory: int
    rate: int  # 128ths of a bit sent for each bit of information, by simulation

    @property
    def rows(self) -> int:
        """Of the table: a state, and the bit before it."""
        return 2 << self.memory


# A bit takes time in proportion to 2^memory.
FEW = 1 << 13  # coefficients, a picture of 48x48 or so
TRELLISES = Trellis(15, 135), Trellis(12, 138)  # up to FEW, and beyond


def trellis(coefficients: int) -> Trellis:
    return TRELLISES[coefficients > FEW]


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

    v: Floats  # (G,) expected mu_j^2 in each group of coefficients
    n: Ints  # (G,) coefficients of each
    trellis: Trellis
    bits: int  # of the message
    last: Ints  # (sum n,) index of the last bit that a coefficient depends on, rising

    @staticmethod
    def of(v: Floats, n: Ints) -> Layout:
        """The message's layout; OVERHEAD bits at least."""
        total = np.cumsum(np.repeat(information(v), n))
        information_bits = int(total[-1]) if len(total) else 0
        kind = trellis(len(total))
        bits = OVERHEAD - (-information_bits * kind.rate // (128 << 20))
        share = max(1, -(-information_bits // bits))  # of the information, for each bit
        return Layout(v, n, kind, bits, np.clip(-(-total // share) - 1, 0, bits - 1))

    def prefix(self, groups: int) -> int:
        """Bits that the first groups depend on."""
        coefficients = int(self.n[:groups].sum())
        return int(self.last[coefficients - 1]) + 1 if coefficients else 0

    def each(self, of_group: NDArray[T]) -> NDArray[T]:
        """(G,) -> (sum n,)."""
        return np.repeat(of_group, self.n)

    def draws(self) -> tuple[Ints, Ints]:
        """(n,) draw from the table and (n,) column of each: one row holds WIDTH coefficients."""
        n = len(self.last)
        first = np.flatnonzero(np.diff(self.last, prepend=-1))
        column = (np.arange(n) - np.repeat(first, np.diff(first, append=n))) % WIDTH
        return np.cumsum(column == 0) - 1, column


def plan(snr: Floats, error: Floats, n: Floats, level_bits: float) -> list[int]:
    """Which of K levels to visit on the way to the last, so that all coefficients cost least.

    snr: (K,) precisions, rising; error: (K + 1, B) mean E(x_0 - x0_hat)^2 of the bands before
    anything is known and after each; n: (B,) coefficients of each band. A level costs its
    information, a message's overhead and its record; many small ones have the sharper priors.
    Dynamic programming over the last. Returns indices into ``snr``, rising, the last being K - 1.
    """
    at = np.concatenate([[0.0], snr])
    rate = trellis(int(n.sum())).rate / 128
    best, come = np.zeros(len(at)), np.zeros(len(at), dtype=np.int64)
    for j in range(1, len(at)):
        nats = np.log1p((at[j] - at[:j])[:, None] * error[:j]) @ n / 2
        cost = best[:j] + nats / np.log(2.0) * rate + OVERHEAD + level_bits
        come[j] = int(cost.argmin())
        best[j] = cost[come[j]]
    path, j = [], len(at) - 1
    while j:
        path.append(j - 1)
        j = int(come[j])
    return path[::-1]


def encode(mu: Floats, layout: Layout, key: Key) -> tuple[Bits, Floats]:
    """Choose y, about N(mu, I), so that :func:`decode` finds the same y.

    mu: (n,), groups one after the other. Returns the message (bits,), zeros and ones, and y (n,),
    bit for bit the decoder's on the same machine. Raises ValueError if mu is not finite or absurdly
    large.
    """
    if not np.all(np.abs(mu) <= MAX_MU):
        raise ValueError(f"an observation is not within {MAX_MU} of what was expected")
    search = _Search(mix(mu * _signs(key, len(mu)), layout.n), layout, key)
    message = np.zeros(layout.bits, dtype=np.uint8)
    run = (RUN << 3) >> layout.trellis.memory
    for begin in range(0, layout.bits, run):
        message[begin : begin + run] = search.run(begin, min(layout.bits, begin + run))
    return message, decode(message, layout, key)


def decode(message: Bits, layout: Layout, key: Key) -> Floats:
    """The y that :func:`encode` chose, (n,).

    Of a message that breaks off, the groups that have arrived whole: (k,), k <= n. Raises
    FormatError if there are more bits than the coefficients have.
    """
    if len(message) > layout.bits:
        raise FormatError("a message of more bits than its level has")
    groups = sum(layout.prefix(g + 1) <= len(message) for g in range(len(layout.n)))
    n = int(layout.n[:groups].sum())
    window = np.zeros(len(message), dtype=np.int64)  # each bit above those before it
    memory, rows = layout.trellis.memory, layout.trellis.rows
    for k in range(min(memory + 1, len(message))):
        window[k:] += message[: len(message) - k].astype(np.int64) << (memory - k)
    draw, column = layout.draws()
    draw, column = draw[:n], column[:n]
    row = (window[layout.last[:n]] + _shifts(key, draw)) % rows
    mixed = _table(key, rows)[row, column] * np.sqrt(1.0 + layout.each(layout.v)[:n])
    y: Floats = mix(mixed, layout.n[:groups]) * _signs(key, n)
    return y


def mix(x: Floats, n: Ints) -> Floats:
    """An orthonormal transform of each group of x, its own inverse. n: (G,) sizes of the groups.

    Walsh and Hadamard's, over runs of a power of two, MIXED at most.
    """
    out, begin = x.copy(), 0
    for size in n.tolist():
        end = begin + size
        while begin < end:
            run = min(MIXED, 1 << (end - begin).bit_length() - 1)
            whole = (end - begin) // run * run if run == MIXED else run
            part = out[begin : begin + whole].reshape(-1, run)
            half = 1
            while half < run:
                pairs = part.reshape(len(part), -1, 2, half)
                part = np.stack(
                    [pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2
                )
                half *= 2
            out[begin : begin + whole] = part.reshape(-1) * run**-0.5
            begin += whole
    return out


# --- the search -------------------------------------------------------------------------------


class _Search:
    """Viterbi's algorithm. A window is a bit (the highest) and the bits that a state remembers."""

    def __init__(self, mu: Floats, layout: Layout, key: Key) -> None:
        v = layout.each(layout.v)
        draw, column = layout.draws()
        first = np.flatnonzero(column == 0)
        self.bit = layout.last[first]
        self.shift = _shifts(key, draw[first]) % layout.trellis.rows
        self.ends = np.append(first, len(mu))
        # log q / p is linear in a row of the table and its squares.
        self.linear = (mu * np.sqrt(1.0 + v)).astype(np.float32)
        self.square = (-0.5 * v).astype(np.float32)
        self.column = column
        self.memory, self.rows = layout.trellis.memory, layout.trellis.rows
        table = _table(key, self.rows)
        self.table = torch.from_numpy(np.concatenate([table, table * table], axis=1).T.copy())
        self.best = np.full(self.rows // 2, -1e30, dtype=np.float32)  # log q / p up to each state
        self.best[0] = 0.0

    def run(self, begin: int, end: int) -> Bits:
        """The best message from bit ``begin`` to ``end``; the next goes on from its state."""
        rows = self.rows
        older = np.zeros((end - begin, rows // 16), dtype=np.uint8)  # bit that left the window
        at = np.zeros((2, rows // 2), dtype=np.float32)
        windows = at.reshape(-1)
        draw, last = np.searchsorted(self.bit, [begin, end]).tolist()
        metrics = self._metrics(draw, last)
        for b in range(begin, end):
            at[:] = self.best
            while draw < last and self.bit[draw] == b:
                metric, shift = next(metrics), int(self.shift[draw])
                windows[: rows - shift] += metric[shift:]
                windows[rows - shift :] += metric[:shift]
                draw += 1
            even, odd = windows[0::2], windows[1::2]
            older[b - begin] = np.packbits(odd > even)
            np.maximum(even, odd, out=self.best)
            if b % 64 == 0:
                self.best -= self.best.max()
        state = int(self.best.argmax())
        self.best[:] = -1e30
        self.best[state] = 0.0
        message = np.zeros(end - begin, dtype=np.uint8)
        for b in range(end - begin - 1, -1, -1):
            message[b] = state >> self.memory - 1
            left = int(older[b, state >> 3]) >> (7 - (state & 7)) & 1
            state = (state << 1 | left) & rows // 2 - 1
        return message

    def _metrics(self, draw: int, last: int) -> Iterator[NDArray[np.float32]]:
        """(rows,) log q / p of each row of the table, draw by draw."""
        for a in range(draw, last, BATCH):
            b = min(last, a + BATCH)
            i, j = int(self.ends[a]), int(self.ends[b])
            columns = self.column[i:j]
            width = int(columns.max()) + 1
            rows = np.zeros((b - a, 2 * width), dtype=np.float32)
            which = np.repeat(np.arange(b - a), np.diff(self.ends[a : b + 1]))
            rows[which, columns] = self.linear[i:j]
            rows[which, width + columns] = self.square[i:j]
            used = np.r_[:width, WIDTH : WIDTH + width]
            yield from (torch.from_numpy(rows) @ self.table[used]).numpy()


# --- shared randomness ------------------------------------------------------------------------
# Only Philox's raw words (4x64, Salmon et al. 2011), which numpy promises never to change.

NORMALS, SIGNS, SHIFTS = 0, 1, 2


def _words(key: Key, purpose: int, count: int) -> NDArray[np.uint64]:
    counter = np.array([0, purpose, 0, 0], dtype=np.uint64)
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter)
    words: NDArray[np.uint64] = generator.random_raw(count)
    return words


@cache
def _quantiles() -> NDArray[np.float32]:
    """(2^16,): Phi^-1((k + 1/2) / 2^16)."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse((k + 0.5) / 2**16) for k in range(2**16)], dtype=np.float32)


@lru_cache(maxsize=1)
def _table(key: Key, rows: int) -> NDArray[np.float32]:
    """(rows, WIDTH) normals, four to a word."""
    fractions = _words(key, NORMALS, rows * WIDTH // 4).astype("<u8", copy=False).view("<u2")
    return _quantiles()[fractions].reshape(rows, WIDTH)


def _signs(key: Key, n: int) -> NDArray[np.float32]:
    """(n,) of -1 and 1: what makes the mixing random."""
    octets = _words(key, SIGNS, -(-n // 64)).astype("<u8", copy=False).view(np.uint8)
    return 1.0 - 2.0 * np.unpackbits(octets, count=n).astype(np.float32)


def _shifts(key: Key, draw: Ints) -> Ints:
    """By how many rows, modulo their number, the table is turned for each draw."""
    count = int(draw[-1]) + 1 if len(draw) else 0
    return (_words(key, SHIFTS, count) >> np.uint64(32)).astype(np.int64)[draw]
