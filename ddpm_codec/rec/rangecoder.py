"""The range coder of the lossless layer: constriction's, with integer frequencies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError

Ints = NDArray[np.int32]

TOTAL = 1 << 16  # frequencies of a row add up to this

_categorical = constriction.stream.model.Categorical(perfect=False)


class Coder(ABC):
    """A writer or a reader of symbols, with the same methods.

    Each method takes the frequencies of its symbols and, when writing, the symbols. It returns the
    symbols.
    """

    @abstractmethod
    def binary(self, frequency: int, n: int, symbols: Ints | None = None) -> Ints:
        """n bits, each 1 with probability frequency / 2^16."""

    def symbols(
        self, table: NDArray[np.uint16], rows: NDArray[np.int64], symbols: Ints | None = None
    ) -> Ints:
        """One symbol for each of ``rows``, under that row of ``table`` (R, K)."""
        out = np.empty(len(rows), np.int32)
        # In pieces, because a large picture's probabilities would fill the memory.
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
        """n unsigned integers below 2^31 in Elias's gamma code."""
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


class RangeWriter(Coder):
    """Writes symbols; ``ideal`` is the sum of their -log2 p."""

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


class RangeReader(Coder):
    """Reads symbols. Raises FormatError for words that no writer makes."""

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


def escaped_symbols(
    coder: Coder, table: NDArray[np.uint16], rows: NDArray[np.int64], j: Ints | None
) -> Ints:
    """Signed integers j, one for each of ``rows``, under that row of ``table``.

    Where |j| is too large for the table, the symbol is 0, and a sign and a number follow.
    """
    escape = table.shape[1] // 2 - 1
    symbol = None
    if j is not None:
        symbol = np.where(np.abs(j) > escape, 0, j + escape + 1).astype(np.int32)
    got = coder.symbols(table, rows, symbol)
    out = got - escape - 1
    far = np.flatnonzero(got == 0)
    if len(far):
        large = None if j is None else j[far]
        sign = coder.binary(
            TOTAL // 2, len(far), None if large is None else (large < 0).astype(np.int32)
        )
        excess = coder.numbers(None if large is None else np.abs(large) - escape - 1, len(far))
        out[far] = np.where(sign == 1, -1, 1) * (excess + escape + 1)
    return out
