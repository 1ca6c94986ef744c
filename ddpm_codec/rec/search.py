"""The encoder's side of the trellis: Viterbi's algorithm finds the message. See trellis.py.

Nothing here is part of the format: any message decodes, a better search makes better ones.
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
    turn_of,
)  # fmt: skip

MAX_MU = 1e5  # beyond, the caller's model is broken


class _OneThread:
    """While anybody searches, torch has one thread: products are too small to share.

    The setting is the process's: the first to come changes it, the last to go restores it.
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
    """Choose y, about N(mu, I), so that :func:`trellis.decode` finds the same y.

    mu: (n,), classes one after the other. Returns the message (bits,), zeros and ones, and y (n,),
    bit for bit the decoder's. Raises ValueError if mu is not finite or absurdly
    large.
    """
    if not np.all(np.abs(mu) <= MAX_MU):
        raise ValueError(f"an observation is not within {MAX_MU} of what was expected")
    with _one_thread:
        mixed = mix(mu, layout.n, key).astype(np.float32)
        message = Search(mixed, layout, key).message()
    return message, decode(message, layout, key)


class Search:
    """Viterbi's algorithm, in lockstep on several stretches of the message.

    Every string of bits is a message: so stretches can be searched apart, from any state to any
    state, and what is near their seams again, from a state of the one to a state of the other.
    Arrays have the states first, by their registers, and the stretches last.
    """

    STATES = 1 << 17  # of all stretches in hand: what is in use is to stay in the caches
    LONG = 15  # memory with which a single stretch has enough of them
    AHEAD = 8  # turns whose metrics are computed at a time for a single stretch
    LEAST, MOST = 1 << 9, 1 << 11  # bits of a stretch
    SEAM = 5  # memories on either side of a seam that are searched again
    LAID = 1 << 20  # places for coefficients that are filled at a time
    SPARSE = 64  # empty places that do not matter, for each step
    HEARD = 1 << 12  # coefficients of a bit that are looked at: of more, each is worth nothing
    RANGE = 28000.0  # of 16-bit integers
    FINEST, COARSEST = 256.0, 4.0  # steps of a nat for which they will do
    PEAK = 4.4  # of the table

    def __init__(self, mu: Singles, layout: Layout, key: Key) -> None:
        self.bits, self.memory, self.turn = layout.bits, layout.memory, turn_of(layout.memory)
        self.lanes = self.STATES >> self.memory if self.memory < self.LONG else 1
        self.last, (self.first, self.column) = layout.last, layout.columns()
        self.count = np.diff(self.first)  # coefficients of each bit
        self.tables = label_columns(key[0], self.memory)
        # log q / p is linear in a row of the table and its squares.
        v = np.repeat(layout.v.astype(np.float32), layout.n)
        self.normal = np.repeat(layout.normal, layout.n)
        self.linear, self.square = mu * np.sqrt(1 + v), v * np.float32(-0.5)
        size = np.abs(self.linear)
        size[self.normal] *= self.PEAK
        size[self.normal] -= self.square[self.normal] * self.PEAK**2
        most = float(np.bincount(self.last, size).max(initial=0.0)) + 1e-9
        # States differ by no more than twice what a memory of branches does; and should a sum
        # overflow all the same, a worse path is chosen.
        scale = min(self.RANGE / ((2 * self.memory + self.turn) * most), self.FINEST)
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
        length = -(-self.bits // (count * self.turn)) * self.turn
        begin = np.arange(count) * length
        out = self._search(begin, length, np.where(begin, -1, 0), np.full(count, -1)).reshape(-1)
        if count > 1:
            seam = -(-self.SEAM * self.memory // self.turn) * self.turn
            before, bit = np.arange(-self.memory, 0), 1 << np.arange(self.memory)[::-1]
            begin = begin[1:] - seam
            start, end = (out[at[:, None] + before] @ bit for at in (begin, begin + 2 * seam))
            found = self._search(begin, 2 * seam, start, end)
            out[begin[:, None] + np.arange(2 * seam)] = found
        return out[: self.bits]

    def _search(self, begin: Ints, steps: int, start: Ints, end: Ints) -> Bits:
        """(count, steps) the best bits from ``begin`` (count,) on, ``steps`` being whole turns.

        start, end: (count,) registers; or -1, any.
        """
        lanes = self.lanes
        every = (slice(a, a + lanes) for a in range(0, len(begin), lanes))
        return np.concatenate([self._lockstep(begin[p], steps, start[p], end[p]) for p in every])

    def _lockstep(self, begin: Ints, steps: int, start: Ints, end: Ints) -> Bits:
        """_search of as many as are in hand at a time."""
        turn, lanes = self.turn, len(begin)
        best = np.zeros((1 << self.memory, lanes), dtype=self.kind)  # log q / p up to each state
        best[:, start >= 0] = -self.RANGE / 2 if self.kind is np.int16 else -1e30
        best[start[start >= 0], np.flatnonzero(start >= 0)] = 0
        to, same, other = (np.empty_like(best) for _ in range(3))
        wins = np.empty(best.shape, dtype=np.bool_)
        # The bit that leaves the register in a step, eight states to a byte.
        older = np.empty((steps, -(-best.size // 8)), dtype=np.uint8)
        at = until = 0  # of the rows in hand
        for step in range(0, steps, turn):
            if step == until:
                at, until = step, step + self._length(begin + step, steps - step)
                rows = self._rows(begin + step, until - at)
                ahead = turn if lanes > 1 else min(self.AHEAD * turn, until - at)
            if (step - at) % ahead == 0:
                odd, *even = self._metrics([r[step - at :][:ahead] for r in rows])
            u = (step - at) % ahead // turn
            for k in range(turn):
                # States by what is before the place, the place, and what is behind, with the lanes.
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
                older[step + k] = np.packbits(wins.reshape(-1), bitorder="little")
            # The turn's places become the lowest.
            whole = f"V{best.itemsize * lanes}"
            to.view(whole).reshape(-1, 1 << turn)[:] = best.view(whole).reshape(1 << turn, -1).T
            best, to = to, best
            if step // turn % 4 == 0:
                best -= best.max(0)
        return self._trace(older, np.where(end < 0, best.argmax(0), end))

    def _trace(self, older: Bits, state: Ints) -> Bits:
        """(lanes, steps) bits on the way to ``state`` (lanes,)."""
        memory, turn, lanes = self.memory, self.turn, len(state)
        out = np.empty((len(older) + memory, lanes), dtype=np.uint8)
        out[len(older) :] = state >> np.arange(memory)[::-1, None] & 1
        for step in range(len(older) - 1, -1, -1):
            place = memory - 1 - step % turn
            if step % turn == turn - 1:
                state = state >> turn | (state & (1 << turn) - 1) << memory - turn
            at = state * lanes + np.arange(lanes)
            out[step] = bit = older[step].take(at >> 3) >> (at & 7) & 1
            state = state & ~(1 << place) | bit.astype(np.int64) << place
        return out[memory:].T

    def _length(self, begin: Ints, steps: int) -> int:
        """For how many steps, whole turns, to lay out rows: fewer where most would be empty.

        All bits get as many columns as the widest has.
        """
        n = min(steps, 64 * self.AHEAD * self.turn)
        while n > self.turn:
            i, j = np.clip([begin, begin + n], 0, self.bits)
            width = max(int(self.count[a:b].max(initial=0)) for a, b in zip(i, j, strict=True))
            filled = int((self.first[j] - self.first[i]).sum())
            if width * n * len(begin) <= min(4 * filled + self.SPARSE * n, self.LAID):
                break
            n = -(-n // (2 * self.turn)) * self.turn
        return n

    def _rows(self, begin: Ints, steps: int) -> list[Tensor]:
        """(steps, columns, lanes) what comes in some steps: linear terms of signs, linear terms of
        normals, square terms of normals."""
        i, j = self.first[np.clip([begin, begin + steps], 0, self.bits)].tolist()
        which = np.concatenate([np.arange(a, b) for a, b in zip(i, j, strict=True)])
        lane = np.repeat(np.arange(len(begin)), np.subtract(j, i))
        heard = self.column[which] < self.HEARD
        signs, normals = (heard & (self.normal[which] == kind) for kind in (False, True))
        out = []
        for term, pick in (self.linear, signs), (self.linear, normals), (self.square, normals):
            some, its = which[pick], lane[pick]
            # Where there is nothing at all: signs, times nothing.
            columns = int(self.column[some].max(initial=-1 if normals.any() else 0)) + 1
            rows = np.zeros((steps, columns, len(begin)), dtype=np.float32)
            rows[self.last[some] - begin[its], self.column[some], its] = term[some]
            out.append(torch.from_numpy(rows))
            if not normals.any():
                break
        return out

    def _metrics(self, rows: list[Tensor]) -> list[NDArray[Any]]:
        """(turn, turns, half of the states, lanes) log q / p of each row of the table: the odd
        part, which has the branch's sign, and the even part if there is one."""
        parts: list[Tensor] = []
        for table, of in zip(self.tables, rows, strict=False):
            for a in range(0, of.shape[1], WIDTH):
                some = of[:, a : a + WIDTH]
                labels = table[:, : some.shape[1]]
                if of.shape[2] == 1:  # several turns at a time, for the table is large
                    turns = some.reshape(-1, self.turn, some.shape[1]).transpose(0, 1)
                    part = torch.bmm(turns, labels)[..., None]
                else:
                    part = torch.bmm(labels.transpose(1, 2), some)[:, None]
                if a:
                    part = part[:, :, torch.arange(part.shape[2]) ^ a // WIDTH]
                    parts[-1] += part
                else:
                    parts.append(part)
        if len(parts) == 3:
            parts[0] += parts.pop(1)
        return [part.numpy().astype(self.kind, copy=False) for part in parts]
