"""Agreement on floats, and the range coder that it and the lossless layer use.

A range coder (constriction) under integer tables. Floats enter in one place only, :func:`agree`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError

Ints = NDArray[np.int32]

TOTAL = 1 << 16  # frequencies of a row add up to this
BLOCK = 4096  # numbers that are agreed upon together
MOVE_BITS = 7  # they are moved by fewer than 2^7 times twice the margin
FARTHEST = 0.125  # and no farther than this
OFF_SHARE = 0.125  # of numbers most of which are below the least that matters: how many are near

_categorical = constriction.stream.model.Categorical(perfect=False)


class Coder(ABC):
    """The one entropy coder of a level, in one of two roles: writes or reads.

    Each method takes the frequencies of its symbols and, when writing, the symbols; it returns
    the symbols.
    """

    @abstractmethod
    def binary(self, frequency: int, n: int, symbols: Ints | None = None) -> Ints:
        """n bits, each 1 with probability frequency / 2^16."""

    def symbols(
        self, table: NDArray[np.uint16], rows: NDArray[np.int64], symbols: Ints | None = None
    ) -> Ints:
        """One symbol for each of ``rows``, under that row of ``table`` (R, K)."""
        out = np.empty(len(rows), np.int32)
        # In pieces, so that a large picture's probabilities are never all in memory.
        step = (1 << 22) // table.shape[1]
        for a in range(0, len(rows), step):
            piece = slice(a, a + step)
            out[piece] = self._piece(
                table[rows[piece]], None if symbols is None else symbols[piece]
            )
        return out

    @abstractmethod
    def _piece(self, f: NDArray[np.uint16], symbols: Ints | None) -> Ints:
        """One symbol for each row of frequencies f (n, K)."""

    def numbers(self, values: Ints | None, n: int) -> Ints:
        """n unsigned integers below 2^32 in Elias's gamma code."""
        if not n:
            return np.zeros(0, np.int32)
        bits = None if values is None else [(int(v) + 1).bit_length() - 1 for v in values]
        flat = None if bits is None else [b for k in bits for b in [1] * k + [0]]
        out = []
        at = 0
        for i in range(n):
            k = 0
            while True:
                bit = None if flat is None else np.array([flat[at]], np.int32)
                at += 1
                if not int(self.binary(TOTAL // 2, 1, bit)[0]) or k == 31:
                    break
                k += 1
            low = None
            if values is not None:
                low = np.array([(int(values[i]) + 1) >> j & 1 for j in range(k)], np.int32)
            tail = self.binary(TOTAL // 2, k, low) if k else np.zeros(0, np.int32)
            out.append((1 << k) + sum(int(b) << j for j, b in enumerate(tail)) - 1)
        return np.array(out, np.int64).clip(0, 2**31 - 1).astype(np.int32)


class Writer(Coder):
    """Writes; ``ideal`` counts bits by the tables' own probabilities."""

    def __init__(self) -> None:
        self.coder = constriction.stream.queue.RangeEncoder()
        self.ideal = 0.0

    def binary(self, frequency: int, n: int, symbols: Ints | None = None) -> Ints:
        assert symbols is not None
        p = frequency / TOTAL
        self.coder.encode(symbols, constriction.stream.model.Bernoulli(p, perfect=False))
        ones = int(symbols.sum())
        self.ideal -= ones * np.log2(p) + (n - ones) * np.log2(1 - p)
        return symbols

    def _piece(self, f: NDArray[np.uint16], symbols: Ints | None) -> Ints:
        assert symbols is not None
        p = f / float(TOTAL)
        self.coder.encode(symbols, _categorical, p)
        self.ideal -= float(np.log2(p[np.arange(len(p)), symbols]).sum())
        return symbols

    def payload(self) -> bytes:
        return self.coder.get_compressed().astype("<u4").tobytes()


class Reader(Coder):
    """Raises FormatError for words that no writer makes."""

    def __init__(self, payload: bytes) -> None:
        words = np.frombuffer(payload[: len(payload) // 4 * 4], "<u4").astype(np.uint32)
        self.coder = constriction.stream.queue.RangeDecoder(words)

    def binary(self, frequency: int, n: int, symbols: Ints | None = None) -> Ints:
        model = constriction.stream.model.Bernoulli(frequency / TOTAL, perfect=False)
        return self._decode(model, n)

    def _piece(self, f: NDArray[np.uint16], symbols: Ints | None) -> Ints:
        return self._decode(_categorical, f / float(TOTAL))

    def _decode(self, model: Any, count_or_p: Any) -> Ints:
        try:
            return np.asarray(self.coder.decode(model, count_or_p), np.int32)
        except AssertionError:
            raise FormatError("the range coder's words are damaged") from None


def agree(
    coder: Coder | None,
    x: NDArray[np.float64],
    margin: float,
    low: int,
    high: int,
    share: float = 1.0,
) -> NDArray[np.int64]:
    """floor(x), clipped to low .. high - 1: the one place where floats become coded integers.

    Two machines' x differ in the last digits, so where x is within ``margin`` of an integer that
    matters the writer says on which side it takes it. That is dear, and it can nearly always be
    avoided: which x are near is a matter of chance, so the writer first moves a block of them by as
    many margins as leave fewest near, most often none, and says by how many. share: of all x how
    many lie between two integers that matter, roughly; it sets the prices. Without a coder there
    is nobody to agree with.
    """
    if coder is None:
        return np.floor(x).clip(low, high - 1).astype(np.int64)
    out = np.empty(len(x), np.int64)
    for a in range(0, len(x), BLOCK):
        block = slice(a, a + BLOCK)
        out[block] = _agree_block(coder, x[block], margin, low, high, share)
    return out


def _agree_block(
    coder: Coder, x: NDArray[np.float64], margin: float, low: int, high: int, share: float
) -> NDArray[np.int64]:
    expected = len(x) * 2 * margin * share  # to be near without a move
    bits = min(MOVE_BITS, int(3 * expected + 0.75))
    while bits and 2 * margin * 2**bits > FARTHEST:
        bits -= 1
    writing, move, close = isinstance(coder, Writer), None, None
    if writing:
        k = _quietest(x, margin, low, high, 1 << bits)
        move = (k >> np.arange(bits) & 1).astype(np.int32)
    if bits:
        move = coder.binary(TOTAL // 2, bits, move)
        x = x + 2 * margin * int(move @ (1 << np.arange(bits)))
    floor, nearest = np.floor(x), np.rint(x)
    if writing:
        near = (np.abs(x - nearest) < margin) & (nearest > low) & (nearest < high)
        close = near.astype(np.int32)
    some = None if close is None else close.max(keepdims=True)
    if coder.binary(max(1, min(TOTAL // 8, round(TOTAL * expected))), 1, some)[0]:
        frequency = max(1, min(TOTAL // 2, round(TOTAL * 2 * margin * share)))
        flag = coder.binary(frequency, len(x), close).astype(bool)
        above = (floor >= nearest)[flag].astype(np.int32)
        side = coder.binary(TOTAL // 2, len(above), above if writing else None)
        floor[flag] = nearest[flag] - 1 + side
    return floor.clip(low, high - 1).astype(np.int64)


def _quietest(x: NDArray[np.float64], margin: float, low: int, high: int, moves: int) -> int:
    """By how many times 2 margins to move x so that fewest are near an integer that matters."""
    # Each x is near the next integer under one of the moves, or under none.
    integer = np.rint(x + margin * (moves - 1))
    k = np.rint((integer - x) / (2 * margin))
    k = k[(k >= 0) & (k < moves) & (integer > low) & (integer < high)]
    return int(np.bincount(k.astype(np.int64), minlength=moves).argmin())


def escaped_symbols(
    coder: Coder, table: NDArray[np.uint16], rows: NDArray[np.int64], j: Ints | None
) -> Ints:
    """Integers around 0; beyond what the table holds a sign and a number follow the symbol 0."""
    escape = table.shape[1] // 2 - 1
    symbol = None
    if j is not None:
        symbol = np.where(np.abs(j) > escape, 0, j + escape + 1).astype(np.int32)
    got = coder.symbols(table, rows, symbol)
    out = got - escape - 1
    far = np.flatnonzero(got == 0)
    if len(far):
        wild = None if j is None else j[far]
        sign = coder.binary(
            TOTAL // 2, len(far), None if wild is None else (wild < 0).astype(np.int32)
        )
        size = coder.numbers(None if wild is None else np.abs(wild) - escape - 1, len(far))
        out[far] = np.where(sign == 1, -1, 1) * (size + escape + 1)
    return out
