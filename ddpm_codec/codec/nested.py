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
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..diffusion.transform import BANDS, BITS
from ..errors import AgreementError, FormatError
from ..network.tables import FIRST, NEAR, SCALE_MIN, SCALE_STEP, SCALES, SUB, WINDOW, Ladder
from ..rec.agree import Coder, Drawer, Ints, Reader, Writer, agree, escaped_symbols
from .container import GROUPS, WORD, Cut, Level, seal
from .contexts import LARGEST, Neighbours, Setup, Surroundings, lattices, mirror

FRACTION = 16  # bits of the dither below the finest cell
ON_SHARE = 0.125  # of the coefficients not yet sent, those within a scale index of being so
FAR = 1 << 15  # beyond this many SUB-ths of a cell there is no estimate
KEPT = 1 << 15  # up to this many blocks, dithers are kept
CUT_SPACING = 512  # least number of bytes between the places at which a level may be cut
# Least scale index of what a level sends in its first turn, and in its second. What a bit tells is
# about proportional to the error that is expected, and a cut should find the best told.
TURNS = (18, 16)

Floats = NDArray[np.float32]
Cell = NDArray[np.signedinteger[Any]]  # see cell_type

# Zigzag ranges of the band groups; luminance and colour of a range are groups of their own.
_RANGES = ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 28), (28, 36), (36, 43),
           (43, 49), (49, 55), (55, 64))  # fmt: skip


def band_groups() -> list[NDArray[np.int64]]:
    """The groups of bands in the order in which a turn sends them."""
    groups = []
    for a, b in _RANGES:
        groups.append(np.arange(a, b))
        groups.append(np.concatenate([np.arange(a, b) + 64, np.arange(a, b) + 128]))
    return groups


def turn(scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """In which turn, 0 .. 2, a level sends coefficients of these scale indices."""
    return (scale < TURNS[0]).astype(np.uint8) + (scale < TURNS[1])


def groups_in_turn() -> list[tuple[int, NDArray[np.int64]]]:
    """Turn and bands of the GROUPS groups of a level."""
    groups = [(t, bands) for t in range(len(TURNS) + 1) for bands in band_groups()]
    assert len(groups) == GROUPS
    return groups


def dither(seed: int, band: int, n: int, ladder: Ladder) -> NDArray[np.int64]:
    """(n,) dither of one band, in units of 2^-16 finest cells, below one cell of the first level.

    From Philox, a counter-based generator, keyed by seed and band.
    """
    # Asked for several times a level; of a large picture all bands' would fill the memory.
    return (_kept if n <= KEPT else _drawn)(seed, band, n, ladder)


def _drawn(seed: int, band: int, n: int, ladder: Ladder) -> NDArray[np.int64]:
    raw = np.random.Philox(key=np.array([seed, band], np.uint64)).random_raw((n + 1) // 2)
    words = raw.astype("<u8").view("<u4")[:n].astype(np.int64)
    cells = ladder.ratio ** (ladder.levels - 1)
    out = ((words >> FRACTION) % cells << FRACTION) | (words & ((1 << FRACTION) - 1))
    out.setflags(write=False)
    return out


_kept = lru_cache(BANDS)(_drawn)


def finest_width(ladder: Ladder) -> float:
    """Width q of the last level's cells: uniform noise of variance q^2 / 12 = 1 / SNR."""
    return float(np.sqrt(12.0 / ladder.finest))


def cell_type(ladder: Ladder) -> type[np.signedinteger[Any]]:
    """An integer type that holds every cell of a picture; half the memory where 16 bits do."""
    # The transform is orthonormal, and pixels are in [-1, 1].
    largest = BANDS**0.5 / finest_width(ladder) + ladder.ratio ** (ladder.levels - 1) + 1
    return np.int16 if largest < 1 << 15 else np.int32


def quantize(c: Floats, seed: int, ladder: Ladder) -> Cell:
    """(192, N) coefficients to (192, N) finest cells n = floor(c / q + D)."""
    q = finest_width(ladder)
    n = np.empty(c.shape, cell_type(ladder))
    for k in range(len(c)):
        d = dither(seed, k, c.shape[1], ladder)
        n[k] = np.floor(c[k].astype(np.float64) / q + d / (1 << FRACTION))
    return n


@dataclass
class Cells:
    """What is known of a picture: for each coefficient its cell, and at which level."""

    cell: Cell  # (192, N)
    depth: NDArray[np.int8]  # (192, N): level of the cell, -1 where nothing is known

    @classmethod
    def nothing(cls, n: int, ladder: Ladder) -> Cells:
        return cls(np.zeros((BANDS, n), cell_type(ladder)), np.full((BANDS, n), -1, np.int8))

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
    position: NDArray[np.int16]  # (192, N) where the estimate lies, SUB-ths of this level's cell
    last: tuple[int, int, int]  # for each component, how many bands in zigzag order are in use

    def in_turn(self, t: int, bands: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(b, N): which coefficients of these bands are sent in turn t."""
        return self.send[bands] & (turn(self.scale[bands]) == t)

    def checksum(self) -> int:
        crc = binascii.crc_hqx(np.packbits(self.send).tobytes(), 0)
        crc = binascii.crc_hqx(self.scale[self.send].tobytes(), crc)
        return binascii.crc_hqx(self.position[self.send].astype("<i4").tobytes(), crc)


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
        np.zeros((BANDS, n), bool), np.zeros((BANDS, n), np.uint8), np.zeros((BANDS, n), np.int16),
        last,
    )  # fmt: skip
    eps_margin, lam_margin = tables.margin[max(i - 1, 0)].tolist()
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
                x = np.floor(SUB * tables.mean[k] / q + d * shrink)
                out.position[k] = x.clip(-FAR, FAR - 1)
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
        position = np.zeros(send.shape, np.int16)
        for part, low, high in (
            (send & known, -WINDOW, SUB * ladder.ratio + WINDOW),
            (send & ~known, -FAR, FAR),
        ):
            position[part] = agree(coder, x[part], eps_margin * unit, low, high)
        out.position[bands] = position
    return out


def send_level(
    coder: Coder, setup: Setup, i: int, cells: Cells, agreed: Agreed, groups: int,
    truth: Cell | None, cuts: list[Cut] | None = None,
) -> None:  # fmt: skip
    """The symbols of the first ``groups`` groups of level i; updates ``cells``.

    truth: (192, N) finest cells, for a writer. cuts: filled by a writer with safe places (their
    checksums are computed later).
    """
    ladder = setup.ladder
    divisor = ladder.ratio ** (ladder.levels - 1 - i)
    end = SUB * ladder.ratio + WINDOW - 1
    surroundings = Surroundings(setup, magnitudes(setup, i, cells))
    neighbours = Neighbours(setup, i)
    everything = [np.arange(agreed.send.shape[1])]
    for g, (t, bands) in enumerate(groups_in_turn()[:groups]):
        send = agreed.in_turn(t, bands)
        some = send.any(1)
        bands, send = bands[some], send[some]
        if not len(bands):
            continue
        near = bands[0] % BITS < NEAR
        energies, surprises = surroundings.energies(bands), surroundings.surprises(bands)
        zero = grid(setup, i, bands)
        for lattice, blocks in enumerate(lattices(setup.shape) if near else everything):
            # One entry for each coefficient sent: row of its band, band, block.
            row, n = np.nonzero(send[:, blocks])
            at = (k, n) = bands[row], blocks[n]
            known, scale = cells.depth[at] >= 0, agreed.scale[at].astype(np.int64)
            position = moved = agreed.position[at].astype(np.int64)
            if near:
                move, narrower = neighbours.predict(bands, lattice, row, n)
                scale = (scale + narrower).clip(0, SCALES - 1)
                low, high = np.where(known, -WINDOW, -FAR), np.where(known, end, FAR - 1)
                moved = (position + move).clip(low, high)
            law = setup.tables.law(
                known.astype(np.int8), scale, energies[row, n], surprises[row, n]
            )
            target = None if truth is None else truth[at].astype(np.int32) // divisor
            cell = _symbols(
                coder, setup, i, known, cells.cell[at].astype(np.int64), law, moved, target
            )
            # Estimates of known coefficients are relative to the known cell, others to the grid.
            centre = SUB * np.where(known, cell % ladder.ratio, cell) + SUB // 2
            if near:
                neighbours.add(k, n, centre - position)
            size = np.abs(SUB * cell + SUB // 2 - zero[row, n])
            surroundings.add(k, n, np.abs(centre - moved), scale, size)
            cells.cell[at], cells.depth[at] = cell, i
        if cuts is not None and isinstance(coder, Writer):
            nbytes = WORD * coder.words()
            if nbytes - (cuts[-1].nbytes if cuts else 0) >= CUT_SPACING:
                cuts.append(Cut(g + 1, nbytes, 0))


def grid(setup: Setup, i: int, bands: NDArray[np.int64]) -> Ints:
    """(b, N) where 0 lies in the grid of level i, SUB-ths of a cell, rounded down."""
    ladder, n = setup.ladder, setup.shape[0] * setup.shape[1]
    width = ladder.ratio ** (ladder.levels - 1 - i) << FRACTION
    zero = [SUB * dither(setup.seed, k, n, ladder) // width for k in bands]
    return np.stack([z.astype(np.int32) for z in zero])


def magnitudes(setup: Setup, i: int, cells: Cells) -> NDArray[np.uint16]:
    """(192, N) |centre| of cells known from level i - 1, SUB-ths of level i's cells; 0 if none."""
    out = np.zeros(cells.cell.shape, np.uint16)
    for k in np.flatnonzero((cells.depth >= 0).any(1)):
        centre = SUB * setup.ladder.ratio * cells.cell[k].astype(np.int64)
        centre += SUB * setup.ladder.ratio // 2 - grid(setup, i, np.array([k]))[0]
        out[k] = np.where(cells.depth[k] >= 0, np.abs(centre).clip(max=LARGEST), 0)
    return out


def _symbols(
    coder: Coder, setup: Setup, i: int, known: NDArray[np.bool_], cell: NDArray[np.int64],
    law: NDArray[np.int64], position: NDArray[np.int64], target: Ints | None,
) -> NDArray[np.int64]:  # fmt: skip
    """The cells at level i of n coefficients, known ones first coded; all arrays (n,)."""
    ratio, middle = setup.ladder.ratio, SUB * setup.ladder.ratio // 2
    cell, new = cell.copy(), ~known

    right, at = mirror(position[known], 2 * middle)
    rows = law[known] * (WINDOW + middle) + at + WINDOW
    part = None
    if target is not None:
        part = target[known] - ratio * cell[known]
        part = np.where(right, ratio - 1 - part, part).astype(np.int32)
    part = coder.symbols(setup.tables.refine[i].reshape(-1, ratio), rows, part)
    cell[known] = ratio * cell[known] + np.where(right, ratio - 1 - part, part)

    base = position[new] // SUB
    right, at = mirror(position[new] % SUB, SUB)
    rows = law[new] * (SUB // 2) + at
    sign = np.where(right, -1, 1).astype(np.int32)
    j = None if target is None else sign * (target[new] - base).astype(np.int32)
    j = escaped_symbols(coder, setup.tables.first[i].reshape(-1, FIRST), rows, j)
    cell[new] = base + sign * j
    return cell


def encode_level(
    coder: Writer, setup: Setup, i: int, cells: Cells, agreed: Agreed, truth: Cell
) -> tuple[Level, float]:
    """One level's record (its PSNR still to be filled in) and its symbols' ideal length in bits.

    coder: the one that ``agreed`` was written with.
    """
    agreement = coder.ideal
    cuts = [Cut(0, WORD * coder.words(), 0)] if WORD * coder.words() >= CUT_SPACING else []
    send_level(coder, setup, i, cells, agreed, GROUPS, truth, cuts)
    payload = coder.payload()
    record = Level(0.0, agreed.last, agreed.checksum(), seal(payload, cuts), payload)
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
    coder = Reader(level.payload[: cut.nbytes])
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
