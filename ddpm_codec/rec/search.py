"""The encoder's side of the trellis (trellis.py): Viterbi's algorithm finds the message.

Nothing here is part of the format: any message decodes, and a better search finds a better one.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .trellis import (
    WIDTH,
    Bits,
    Floats,
    Ints,
    Key,
    Layout,
    Singles,
    decode,
    label_columns,
    mix,
    period_of,
)  # fmt: skip

MAX_MU = 1e5  # a larger mu can only come from a broken model


class _OneThread:
    """While any thread searches, torch uses one thread: its products are too small to divide.

    The setting is the process's: the first search to begin changes it, the last to end restores it.
    """

    def __init__(self) -> None:
        self.lock, self.users, self.threads = Lock(), 0, 1

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.threads = torch.get_num_threads()
                torch.set_num_threads(1)
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                torch.set_num_threads(self.threads)


_one_thread = _OneThread()


def encode(mu: Floats, layout: Layout, key: Key) -> tuple[Bits, Floats]:
    """Choose y, about N(mu, I), and the message from which :func:`trellis.decode` finds it.

    mu: (n,), classes one after the other. Returns the message (bits,), zeros and ones, and y (n,),
    bit for bit the decoder's. Raises ValueError if mu is not finite or beyond MAX_MU.
    """
    if not np.all(np.abs(mu) <= MAX_MU):
        raise ValueError(f"an observation is not within {MAX_MU} of its expected value")
    with _one_thread:
        mixed = mix(mu, layout.n, key).astype(np.float32)
        message = Search(mixed, layout, key).message()
    return message, decode(message, layout, key)


class Search:
    """Viterbi's algorithm, on several stretches of the message at once.

    Every string of bits is a message. So stretches can be searched independently, from any state to
    any state. Then the bits around each seam are searched again, between the states that the two
    stretches have there. The first axis of an array is the state, numbered by its register; the
    last is the stretch (lane).
    """

    STATES = 1 << 17  # of all stretches searched at once, few enough for the caches
    LONG = 15  # from this memory on, a single stretch is searched at a time
    AHEAD = 8  # periods whose metrics are computed at a time for a single stretch
    LEAST, MOST = 1 << 9, 1 << 11  # bits of a stretch
    SEAM = 5  # memories on either side of a seam that are searched again
    MAX_CELLS = 1 << 20  # cells of the arrays of coefficients that are filled at a time
    SPARSE = 64  # empty cells at each step that are accepted
    # Coefficients of a bit that are counted. Where there are more, each carries no information.
    MAX_LABELS = 1 << 12
    RANGE = 28000.0  # largest metric in 16-bit integers
    FINEST, COARSEST = 256.0, 4.0  # units per nat: the most, and the least for 16-bit integers
    PEAK = 4.4  # bound on the magnitude of the table's normals

    def __init__(self, mu: Singles, layout: Layout, key: Key) -> None:
        self.bits, self.memory, self.period = layout.bits, layout.memory, period_of(layout.memory)
        self.lanes = self.STATES >> self.memory if self.memory < self.LONG else 1
        self.last, (self.first, self.column) = layout.last, layout.columns()
        self.count = np.diff(self.first)  # coefficients of each bit
        self.tables = label_columns(key[0], self.memory)
        # log q / p is linear in a row of the table and its squares.
        v = np.repeat(layout.v.astype(np.float32), layout.n)
        self.normal = np.repeat(layout.normal, layout.n)
        self.linear, self.square = mu * np.sqrt(1 + v), v * np.float32(-0.5)
        bound = np.abs(self.linear)
        bound[self.normal] *= self.PEAK
        bound[self.normal] -= self.square[self.normal] * self.PEAK**2
        most = float(np.bincount(self.last, bound).max(initial=0.0)) + 1e-9
        # States' metrics differ by at most twice the bound on ``memory`` branches. If a sum
        # overflows all the same, the path is worse but valid.
        scale = min(self.RANGE / ((2 * self.memory + self.period) * most), self.FINEST)
        self.kind: type[np.int16 | np.float32] = np.int16
        if scale < self.COARSEST:
            self.kind, scale = np.float32, 1.0
        self.linear *= np.float32(scale)
        self.square *= np.float32(scale)

    def message(self) -> Bits:
        """The best message, (bits,)."""
        lanes = self.lanes
        count = max(1, min(self.bits // self.LEAST, lanes))
        count *= -(-self.bits // (count * self.MOST))
        length = -(-self.bits // (count * self.period)) * self.period
        begin = np.arange(count) * length
        out = self._search(begin, length, np.where(begin, -1, 0), np.full(count, -1)).reshape(-1)
        if count > 1:
            seam = -(-self.SEAM * self.memory // self.period) * self.period
            before, bit = np.arange(-self.memory, 0), 1 << np.arange(self.memory)[::-1]
            begin = begin[1:] - seam
            start, end = (out[at[:, None] + before] @ bit for at in (begin, begin + 2 * seam))
            found = self._search(begin, 2 * seam, start, end)
            out[begin[:, None] + np.arange(2 * seam)] = found
        return out[: self.bits]

    def _search(self, begin: Ints, steps: int, start: Ints, end: Ints) -> Bits:
        """(count, steps) the best bits from ``begin`` (count,) on. steps: whole periods.

        start, end: (count,) registers; -1 for any.
        """
        lanes = self.lanes
        every = (slice(a, a + lanes) for a in range(0, len(begin), lanes))
        return np.concatenate([self._lockstep(begin[p], steps, start[p], end[p]) for p in every])

    def _lockstep(self, begin: Ints, steps: int, start: Ints, end: Ints) -> Bits:
        """:meth:`_search` for as many stretches as fit the caches."""
        period, lanes = self.period, len(begin)
        best = np.zeros((1 << self.memory, lanes), dtype=self.kind)  # log q / p up to each state
        best[:, start >= 0] = -self.RANGE / 2 if self.kind is np.int16 else -1e30
        best[start[start >= 0], np.flatnonzero(start >= 0)] = 0
        to, same, other = (np.empty_like(best) for _ in range(3))
        wins = np.empty(best.shape, dtype=np.bool_)
        # The bit that leaves the register at each step, eight states in a byte.
        dropped = np.empty((steps, -(-best.size // 8)), dtype=np.uint8)
        at = until = 0  # the steps of ``rows``
        for step in range(0, steps, period):
            if step == until:
                at, until = step, step + self._length(begin + step, steps - step)
                rows = self._rows(begin + step, until - at)
                ahead = period if lanes > 1 else min(self.AHEAD * period, until - at)
            if (step - at) % ahead == 0:
                odd, *even = self._metrics([r[step - at :][:ahead] for r in rows])
            u = (step - at) % ahead // period
            for k in range(period):
                # Axes: the register's places above the new bit's, that place, the rest and lanes.
                b, s, o, w = (x.reshape(1 << k, 2, -1) for x in (best, same, other, wins))
                x = odd[k, u].reshape(1 << k, -1)
                np.add(b[:, 0], x, out=s[:, 0])
                np.subtract(b[:, 1], x, out=o[:, 0])
                np.subtract(b[:, 0], x, out=s[:, 1])
                np.add(b[:, 1], x, out=o[:, 1])
                np.greater(o, s, out=w)
                np.maximum(o, s, out=b)
                for squares in even:
                    b += squares[k, u].reshape(1 << k, 1, -1)
                dropped[step + k] = np.packbits(wins.reshape(-1), bitorder="little")
            # Rotate the registers: the places filled in this period become the lowest.
            whole = f"V{best.itemsize * lanes}"
            to.view(whole).reshape(-1, 1 << period)[:] = best.view(whole).reshape(1 << period, -1).T
            best, to = to, best
            if step // period % 4 == 0:
                best -= best.max(0)
        return self._trace(dropped, np.where(end < 0, best.argmax(0), end))

    def _trace(self, dropped: Bits, state: Ints) -> Bits:
        """(lanes, steps) the bits of the best paths to ``state`` (lanes,)."""
        memory, period, lanes = self.memory, self.period, len(state)
        out = np.empty((len(dropped) + memory, lanes), dtype=np.uint8)
        out[len(dropped) :] = state >> np.arange(memory)[::-1, None] & 1
        for step in range(len(dropped) - 1, -1, -1):
            place = memory - 1 - step % period
            if step % period == period - 1:
                state = state >> period | (state & (1 << period) - 1) << memory - period
            at = state * lanes + np.arange(lanes)
            out[step] = bit = dropped[step].take(at >> 3) >> (at & 7) & 1
            state = state & ~(1 << place) | bit.astype(np.int64) << place
        return out[memory:].T

    def _length(self, begin: Ints, steps: int) -> int:
        """For how many steps, in whole periods, to make :meth:`_rows`.

        All steps have as many columns as the widest, so there are fewer where most were empty.
        """
        n = min(steps, 64 * self.AHEAD * self.period)
        while n > self.period:
            i, j = np.clip([begin, begin + n], 0, self.bits)
            width = max(int(self.count[a:b].max(initial=0)) for a, b in zip(i, j, strict=True))
            filled = int((self.first[j] - self.first[i]).sum())
            if width * n * len(begin) <= min(4 * filled + self.SPARSE * n, self.MAX_CELLS):
                break
            n = -(-n // (2 * self.period)) * self.period
        return n

    def _rows(self, begin: Ints, steps: int) -> list[Tensor]:
        """(steps, columns, lanes) terms of the coefficients at some steps.

        Three arrays: linear terms of signs, linear terms of normals, square terms of normals; only
        the first if there are no normals.
        """
        i, j = self.first[np.clip([begin, begin + steps], 0, self.bits)].tolist()
        index = np.concatenate([np.arange(a, b) for a, b in zip(i, j, strict=True)])
        lane = np.repeat(np.arange(len(begin)), np.subtract(j, i))
        counted = self.column[index] < self.MAX_LABELS
        signs, normals = (counted & (self.normal[index] == kind) for kind in (False, True))
        out = []
        for term, pick in (self.linear, signs), (self.linear, normals), (self.square, normals):
            picked, lanes = index[pick], lane[pick]
            # Without any coefficient there is one column of zeros.
            columns = int(self.column[picked].max(initial=-1 if normals.any() else 0)) + 1
            rows = np.zeros((steps, columns, len(begin)), dtype=np.float32)
            rows[self.last[picked] - begin[lanes], self.column[picked], lanes] = term[picked]
            out.append(torch.from_numpy(rows))
            if not normals.any():
                break
        return out

    def _metrics(self, rows: list[Tensor]) -> list[NDArray[Any]]:
        """(period, periods, half of the states, lanes) log q / p of each row of the table.

        The odd part, which takes the branch's sign; and the even part if there are normals.
        """
        parts: list[Tensor] = []
        for table, terms in zip(self.tables, rows, strict=False):
            for a in range(0, terms.shape[1], WIDTH):
                block = terms[:, a : a + WIDTH]
                labels = table[:, : block.shape[1]]
                if terms.shape[2] == 1:  # several periods at a time, because the table is large
                    periods = block.reshape(-1, self.period, block.shape[1]).transpose(0, 1)
                    part = torch.bmm(periods, labels)[..., None]
                else:
                    part = torch.bmm(labels.transpose(1, 2), block)[:, None]
                if a:
                    part = part[:, :, torch.arange(part.shape[2]) ^ a // WIDTH]
                    parts[-1] += part
                else:
                    parts.append(part)
        if len(parts) == 3:
            parts[0] += parts.pop(1)
        return [part.numpy().astype(self.kind, copy=False) for part in parts]
