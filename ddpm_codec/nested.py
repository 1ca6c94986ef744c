"""Relative-entropy coding by nested universal quantization.

A dithered quantizer simulates a noisy channel: if D is uniform and shared, and the cell of the
shifted grid that holds c is sent, then the cell's centre minus c is uniform on +-q/2 and
independent of c (Ziv 1985; Zamir and Feder 1992). Here the grids of all levels are nested, cells
dividing into ``ratio`` parts from level to level, so that all levels together cost what the last
alone would: being progressive is free.

All is integers. With q the finest cell's width and D the dither in units of it (a multiple of
2^-16), the picture is reduced once to n = floor(c / q + D); the cell at level i is
n // ratio^(L - 1 - i).
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass

import constriction
import numpy as np
from numpy.typing import NDArray

from .bitstream import GROUPS, Cut, Level, seal
from .errors import AgreementError, FormatError
from .tables import (
    BANDS,
    FIRST,
    SCALE_MIN,
    SCALE_STEP,
    SCALES,
    SUB,
    TOTAL,
    WINDOW,
    Ladder,
    Tables,
)

FRACTION = 16  # bits of the dither below the finest cell
BITS = 64  # bands per component
ON_SHARE = 0.125  # of the coefficients not yet sent, those within a scale index of being so
CUT_SPACING = 128  # least number of words between the places at which a level may be cut

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

_categorical = constriction.stream.model.Categorical(perfect=False)

# Zigzag ranges of the band groups; luminance and colour of a range are groups of their own.
_RANGES = ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 28), (28, 36), (36, 43),
           (43, 49), (49, 55), (55, 64))  # fmt: skip


def band_groups() -> list[NDArray[np.int64]]:
    """The GROUPS groups of bands in the order in which a level sends them."""
    groups = []
    for a, b in _RANGES:
        groups.append(np.arange(a, b))
        groups.append(np.concatenate([np.arange(a, b) + 64, np.arange(a, b) + 128]))
    assert len(groups) == GROUPS
    return groups


def dither(seed: int, band: int, n: int, ladder: Ladder) -> NDArray[np.int64]:
    """(n,) dither of one band, in units of 2^-16 finest cells, below one cell of the first level.

    From Philox, a counter-based generator, keyed by seed and band.
    """
    raw = np.random.Philox(key=np.array([seed, band], np.uint64)).random_raw((n + 1) // 2)
    words = raw.astype("<u8").view("<u4")[:n].astype(np.int64)
    cells = ladder.ratio ** (ladder.levels - 1)
    return ((words >> FRACTION) % cells << FRACTION) | (words & ((1 << FRACTION) - 1))


def finest_width(ladder: Ladder) -> float:
    """Width q of the last level's cells: uniform noise of variance q^2 / 12 = 1 / SNR."""
    return float(np.sqrt(12.0 / ladder.finest))


def quantize(c: Floats, seed: int, ladder: Ladder) -> Ints:
    """(192, N) coefficients to (192, N) finest cells n = floor(c / q + D)."""
    q = finest_width(ladder)
    n = np.empty(c.shape, np.int32)
    for k in range(len(c)):
        d = dither(seed, k, c.shape[1], ladder)
        n[k] = np.floor(c[k].astype(np.float64) / q + d / (1 << FRACTION))
    return n


@dataclass
class Cells:
    """What is known of a picture: for each coefficient its cell, and at which level."""

    cell: Ints  # (192, N)
    depth: NDArray[np.int8]  # (192, N): level of the cell, -1 where nothing is known

    @classmethod
    def nothing(cls, n: int) -> Cells:
        return cls(np.zeros((BANDS, n), np.int32), np.full((BANDS, n), -1, np.int8))

    def bounds(
        self, band: int, seed: int, ladder: Ladder
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower edges (N,) and widths (N,) of a band's cells; meaningless where depth is -1."""
        width = float(ladder.ratio) ** (ladder.levels - 1 - self.depth[band].astype(np.float64))
        d = dither(seed, band, self.cell.shape[1], ladder) / (1 << FRACTION)
        q = finest_width(ladder)
        return (self.cell[band] * width - d) * q, width * q

    def centres(self, seed: int, ladder: Ladder) -> Floats:
        """(192, N): M, the middle of each cell; 0 where nothing is known."""
        m = np.zeros(self.cell.shape, np.float32)
        for k in range(BANDS):
            known = self.depth[k] >= 0
            if known.any():
                low, width = self.bounds(k, seed, ladder)
                m[k] = np.where(known, low + 0.5 * width, 0.0)
        return m

    def clip(self, m: Floats, seed: int, ladder: Ladder) -> Floats:
        """Project m onto the cells, in place: c is known to lie there."""
        for k in range(BANDS):
            known = self.depth[k] >= 0
            if known.any():
                low, width = self.bounds(k, seed, ladder)
                m[k] = np.where(known, np.clip(m[k], low, low + width), m[k])
        return m


@dataclass
class Agreed:
    """The integers both ends hold before a level's symbols: the floats end here."""

    send: NDArray[np.bool_]  # (192, N) coefficients that this level sends
    scale: NDArray[np.uint8]  # (192, N) scale index, where sent
    position: Ints  # (192, N) where the estimate lies, in SUB-ths of a cell of this level

    def checksum(self) -> int:
        crc = binascii.crc_hqx(np.packbits(self.send).tobytes(), 0)
        crc = binascii.crc_hqx(self.scale[self.send].tobytes(), crc)
        return binascii.crc_hqx(self.position[self.send].astype("<i4").tobytes(), crc)


class Coder:
    """The one entropy coder of a level, in one of three roles: writes, reads, or draws.

    Each method takes the frequencies of its symbols and, when writing, the symbols; it returns
    the symbols.
    """

    def binary(self, frequency: int, n: int, symbols: Ints | None = None) -> Ints:
        """n bits, each 1 with probability frequency / 2^16."""
        raise NotImplementedError

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

    def _piece(self, f: NDArray[np.uint16], symbols: Ints | None) -> Ints:
        raise NotImplementedError

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

    def words(self) -> int:
        """How many words of the payload decode all symbols so far, whatever follows."""
        return safe_words(self.coder)

    def payload(self) -> bytes:
        return self.coder.get_compressed().astype("<u4").tobytes()


def safe_words(coder: constriction.stream.queue.RangeEncoder) -> int:
    """How many words of the finished stream decode all symbols so far, whatever follows.

    One more than ``num_words``, which counts on a last word chosen for a stream that ends here.
    """
    return int(coder.num_words()) + 1


class Reader(Coder):
    def __init__(self, payload: bytes) -> None:
        words = np.frombuffer(payload[: len(payload) // 4 * 4], "<u4").astype(np.uint32)
        self.coder = constriction.stream.queue.RangeDecoder(words)

    def binary(self, frequency: int, n: int, symbols: Ints | None = None) -> Ints:
        model = constriction.stream.model.Bernoulli(frequency / TOTAL, perfect=False)
        return np.asarray(self.coder.decode(model, n), np.int32)

    def _piece(self, f: NDArray[np.uint16], symbols: Ints | None) -> Ints:
        return np.asarray(self.coder.decode(_categorical, f / float(TOTAL)), np.int32)


class Drawer(Coder):
    """Draws symbols from the tables: the paper's generation instead of reading."""

    def __init__(self, seed: int, level: int) -> None:
        self.rng = np.random.Generator(np.random.Philox(key=np.array([seed, level], np.uint64)))

    def binary(self, frequency: int, n: int, symbols: Ints | None = None) -> Ints:
        return (self.rng.random(n) * TOTAL < frequency).astype(np.int32)

    def _piece(self, f: NDArray[np.uint16], symbols: Ints | None) -> Ints:
        u = self.rng.random((len(f), 1)) * TOTAL
        return (np.cumsum(f, -1, dtype=np.int64)[:, :-1] <= u).sum(-1).astype(np.int32)


def agree(
    coder: Coder, x: NDArray[np.float64], margin: float, low: int, high: int, share: float = 1.0
) -> NDArray[np.int64]:
    """floor(x), clipped to low .. high - 1: the one place where floats become coded integers.

    Two machines' x differ in the last digits, so where x is within ``margin`` of an integer that
    matters the writer says on which side it takes it. share: of all x how many lie between two such
    integers, roughly; it sets the price of saying so.
    """
    floor, nearest = np.floor(x), np.rint(x)
    if isinstance(coder, Drawer):  # nobody to agree with
        return floor.clip(low, high - 1).astype(np.int64)
    close = None
    if isinstance(coder, Writer):
        near = (np.abs(x - nearest) < margin) & (nearest > low) & (nearest < high)
        close = near.astype(np.int32)
    frequency = max(1, round(TOTAL * 2 * margin * share))
    flag = coder.binary(frequency, len(x), close).astype(bool)
    above = (floor >= nearest)[flag].astype(np.int32)
    side = coder.binary(TOTAL // 2, len(above), above if close is not None else None)
    floor[flag] = nearest[flag] - 1 + side
    return floor.clip(low, high - 1).astype(np.int64)


@dataclass(frozen=True)
class Setup:
    """What stays the same from level to level."""

    tables: Tables
    ladder: Ladder
    seed: int
    shape: tuple[int, int]  # blocks, vertically and horizontally
    isotropic: bool


def scale_index(lam: Floats) -> NDArray[np.float64]:
    """The network's log-scale on the grid of scale indices, before rounding down."""
    return (lam.astype(np.float64) - SCALE_MIN) / SCALE_STEP


def bands_in_use(
    setup: Setup, i: int, lam: Floats | None, cells: Cells, components: int
) -> tuple[int, int, int]:
    """For each component, how many bands in zigzag order this level touches (encoder's choice).

    A band is worth touching when one coefficient in 500 is on; one that is known must be touched.
    """
    last = [0, 0, 0]
    for k in range(components * BITS):
        if setup.isotropic:
            use = True
        elif lam is None:
            use = bool(setup.tables.prior[k] >= setup.tables.on[i])
        else:
            on = scale_index(lam[k]) >= setup.tables.on[i]
            use = bool(on.mean() > 0.002) or bool((cells.depth[k] >= 0).any())
        if use:
            last[k // BITS] = k % BITS + 1
    return last[0], last[1], last[2]


def agree_level(
    coder: Coder, setup: Setup, i: int, cells: Cells, eps: Floats | None, lam: Floats | None,
    last: tuple[int, int, int],
) -> Agreed:  # fmt: skip
    """What to send, scales, and where the estimates lie, as integers; in this order for each group.

    eps, lam: (192, N), the network's word on the state before level i; None for level 0, whose
    prior is stored.
    """
    tables, ladder = setup.tables, setup.ladder
    n = cells.cell.shape[1]
    out = Agreed(
        np.zeros((BANDS, n), bool), np.zeros((BANDS, n), np.uint8), np.zeros((BANDS, n), np.int32)
    )
    eps_margin, lam_margin = tables.margin.tolist()
    # An estimate is M - sigma eps, with sigma of the level before: ratio / sqrt(12) of a cell here.
    unit = SUB * ladder.ratio / np.sqrt(12.0)
    shrink = SUB / float(ladder.ratio ** (ladder.levels - 1 - i)) / (1 << FRACTION)
    on = int(tables.on[i])
    for bands in band_groups():
        bands = bands[bands % BITS < np.take(last, bands // BITS)]
        known = cells.depth[bands] >= 0
        send = known | setup.isotropic
        if eps is None or lam is None:
            scale = np.broadcast_to(tables.prior[bands, None], send.shape)
            send |= scale >= on
            out.send[bands], out.scale[bands] = send, scale * send
            q = finest_width(ladder) * ladder.ratio ** (ladder.levels - 1 - i)
            for k in bands[send.any(1)]:
                d = dither(setup.seed, k, n, ladder)
                out.position[k] = np.floor(SUB * tables.mean[k] / q + d * shrink)
            continue
        x = scale_index(lam[bands])
        margin = lam_margin / SCALE_STEP
        send[~send] = agree(coder, x[~send], margin, on - 1, on + 1, ON_SHARE) >= on
        scale = np.zeros(send.shape, np.uint8)
        scale[send] = agree(coder, x[send], margin, 0, SCALES)
        out.send[bands], out.scale[bands] = send, scale

        x = -unit * eps[bands].astype(np.float64)
        for row, k in enumerate(bands):
            grid: float | NDArray[np.float64] = SUB * ladder.ratio / 2
            if (send & ~known)[row].any():
                grid = np.where(known[row], grid, dither(setup.seed, k, n, ladder) * shrink)
            x[row] += grid
        position = np.zeros(send.shape, np.int32)
        for part, low, high in (
            (send & known, -WINDOW, SUB * ladder.ratio + WINDOW),
            (send & ~known, -(1 << 24), 1 << 24),
        ):
            position[part] = agree(coder, x[part], eps_margin * unit, low, high)
        out.position[bands] = position
    return out


class Activity:
    """How surprising this level has been so far around each block: a class 0 .. CONTEXTS - 1.

    Sums of |cell - estimate| in units of the predicted scale, in integers, over the coefficients
    of finished band groups in the block (counted thrice) and its eight neighbours (once).
    """

    def __init__(self, setup: Setup) -> None:
        self.weight = setup.tables.weight.astype(np.int64)
        self.shape = setup.shape
        self.total = np.zeros(setup.shape, np.int64)
        self.count = np.zeros(setup.shape, np.int64)

    def add(
        self, off: NDArray[np.int64], scale: NDArray[np.uint8], sent: NDArray[np.bool_]
    ) -> None:
        """off: (g, N) |cell's centre - estimate| in SUB-ths of a cell, where ``sent``."""
        surprise = np.minimum(off * self.weight[scale], 4 * 256) * sent
        self.total += surprise.sum(0).reshape(self.shape)
        self.count += sent.sum(0).reshape(self.shape)

    def classes(self) -> NDArray[np.int64]:
        """(N,)"""
        total, count = _around(self.total), _around(self.count)
        ratio = 16 * total // np.maximum(256 * count, 1)
        out = 1 + (ratio >= 10).astype(np.int64) + (ratio >= 16)
        return np.where(count < 6, 0, out).reshape(-1)


def _around(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """2 x + the sum over the 3x3 neighbourhood."""
    p = np.pad(x, 1)
    rows = p[:-2] + p[1:-1] + p[2:]
    return 2 * x + rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def send_level(
    coder: Coder, setup: Setup, i: int, cells: Cells, agreed: Agreed, groups: int,
    truth: Ints | None, cuts: list[Cut] | None = None,
) -> None:  # fmt: skip
    """The symbols of the first ``groups`` band groups of level i; updates ``cells``.

    truth: (192, N) finest cells, for a writer. cuts: filled by a writer with safe places (their
    checksums are computed later).
    """
    tables, ladder = setup.tables, setup.ladder
    ratio = ladder.ratio
    first = tables.first[i].reshape(-1, FIRST)
    refine = tables.refine[i].reshape(-1, ratio)
    middle = SUB * ratio // 2
    divisor = ratio ** (ladder.levels - 1 - i)
    activity = Activity(setup)
    for g, bands in enumerate(band_groups()[:groups]):
        bands = bands[agreed.send[bands].any(1)]
        if not len(bands):
            continue
        send, scale = agreed.send[bands], agreed.scale[bands].astype(np.int64)
        position = agreed.position[bands].astype(np.int64)
        known = cells.depth[bands] >= 0
        cell = cells.cell[bands].astype(np.int64)
        context = np.broadcast_to(activity.classes(), send.shape)
        row = context * SCALES + scale
        target = None if truth is None else truth[bands] // divisor

        old = send & known
        right, at = mirror(position[old], 2 * middle)
        rows = row[old] * (WINDOW + middle) + at + WINDOW
        part = None
        if target is not None:
            part = target[old] - ratio * cell[old]
            part = np.where(right, ratio - 1 - part, part).astype(np.int32)
        part = coder.symbols(refine, rows, part)
        cell[old] = ratio * cell[old] + np.where(right, ratio - 1 - part, part)

        new = send & ~known
        base = position[new] // SUB
        right, at = mirror(position[new] % SUB, SUB)
        rows = row[new] * (SUB // 2) + at
        sign = np.where(right, -1, 1).astype(np.int32)
        j = None if target is None else sign * (target[new] - base).astype(np.int32)
        cell[new] = base + sign * escaped_symbols(coder, first, rows, j)

        # Estimates of known coefficients are relative to the known cell, the others to the grid.
        relative = np.where(known, cell % ratio, cell)
        off = np.abs(SUB * relative + SUB // 2 - position)
        activity.add(off, agreed.scale[bands], send)
        cells.cell[bands] = np.where(send, cell, cells.cell[bands])
        cells.depth[bands] = np.where(send, i, cells.depth[bands])
        if cuts is not None and isinstance(coder, Writer):
            words = coder.words()
            if words - (cuts[-1].words if cuts else 0) >= CUT_SPACING:
                cuts.append(Cut(g + 1, words, 0))


def mirror(position: NDArray[np.int64], width: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether positions are right of the middle of a cell, and what they are seen from that end."""
    right = 2 * position >= width
    return right, np.where(right, width - 1 - position, position)


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


def encode_level(
    setup: Setup, i: int, cells: Cells, eps: Floats | None, lam: Floats | None, truth: Ints,
    components: int, coder: Writer | None = None,
) -> tuple[Level, float]:  # fmt: skip
    """One level's record (its PSNR still to be filled in) and its symbols' ideal length in bits.

    coder: another writer, for one that counts.
    """
    last = bands_in_use(setup, i, lam, cells, components)
    coder = coder or Writer()
    agreed = agree_level(coder, setup, i, cells, eps, lam, last)
    agreement = coder.ideal
    cuts = [Cut(0, coder.words(), 0)] if coder.words() >= CUT_SPACING else []
    send_level(coder, setup, i, cells, agreed, GROUPS, truth, cuts)
    payload = coder.payload()
    record = Level(0.0, last, agreed.checksum(), seal(payload, cuts), payload)
    return record, coder.ideal - agreement


def decode_level(
    setup: Setup, i: int, cells: Cells, eps: Floats | None, lam: Floats | None, level: Level,
    received: int,
) -> None:  # fmt: skip
    """Update ``cells`` by the first ``received`` (>= 1) cuts of a level.

    Raises AgreementError, with ``cells`` as they were, if this machine's arithmetic differs from
    the encoder's by more than the margin; FormatError if the symbols make no sense.
    """
    cut = level.cuts[received - 1]
    coder = Reader(level.payload[: 4 * cut.words])
    differs = AgreementError(
        f"level {i}: this machine's arithmetic differs from the encoder's by more than the margin"
    )
    try:
        agreed = agree_level(coder, setup, i, cells, eps, lam, level.last)
    except AssertionError:  # out of step with the writer, after another scale
        raise differs from None
    if agreed.checksum() != level.agreed:
        raise differs
    try:
        send_level(coder, setup, i, cells, agreed, cut.groups, None)
    except AssertionError as e:  # the range decoder met words that no encoder writes
        raise FormatError(f"level {i}: damaged symbols") from e


def draw_level(
    setup: Setup, i: int, cells: Cells, eps: Floats | None, lam: Floats | None, components: int,
    seed: int,
) -> None:  # fmt: skip
    """Draw level i from p instead of reading it (DDPM's progressive generation)."""
    last = bands_in_use(setup, i, lam, cells, components)
    coder = Drawer(seed, i)
    agreed = agree_level(coder, setup, i, cells, eps, lam, last)
    send_level(coder, setup, i, cells, agreed, GROUPS, None)
