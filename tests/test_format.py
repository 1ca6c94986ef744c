"""A second decoder, written from docs/format.md and nothing else, one symbol at a time.

It shares with the package the network alone (section 5); everything that is coded it works out in
plain Python. What it decodes has to be what was encoded.
"""

from __future__ import annotations

import binascii
import copy
import math
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_codec.codec import codec
from ddpm_codec.codec import container as bitstream
from ddpm_codec.codec.chain import Gaussian, Nested
from ddpm_codec.diffusion.schedule import Schedule
from ddpm_codec.network.modelfile import Model, load_model
from ddpm_codec.network.tables import Tables
from ddpm_codec.rec import gaussian

M64 = (1 << 64) - 1
STARTS = (0, 1, 3, 6, 10, 15, 21, 28, 36, 43, 49, 55, 64)
ZIGZAG = sorted(
    ((v, u) for v in range(8) for u in range(8)),
    key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]),
)
LATTICES = ((0, 0), (1, 1), (0, 1), (1, 0))
FOUR = ((0, -1), (0, 1), (-1, 0), (1, 0))
CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def crc16(data: bytes, start: int = 0) -> int:
    return binascii.crc_hqx(data, start)


def philox(counter: int, key: tuple[int, int], second: int = 0) -> list[int]:
    """Philox 4x64-10 (Salmon et al. 2011): four words of 64 bits."""
    c, k = [counter, second, 0, 0], list(key)
    for i in range(10):
        if i:
            k = [(k[0] + 0x9E3779B97F4A7C15) & M64, (k[1] + 0xBB67AE8584CAA73B) & M64]
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [b >> 64 ^ c[1] ^ k[0], b & M64, a >> 64 ^ c[3] ^ k[1], a & M64]
    return c


class Bytes:
    """Sections 1 and 2: what a file's bytes are read as."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        self.at += n
        assert self.at <= len(self.data)
        return self.data[self.at - n : self.at]

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def blob(self) -> bytes:
        n, crc = self.varint(), self.number(4)
        data = self.take(n)
        assert zlib.crc32(data) == crc
        return data


class Range:
    """Section 3."""

    def __init__(self, data: bytes) -> None:
        self.words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        self.low, self.range, self.at = 0, M64, 0
        self.point = self.word() << 32
        self.point |= self.word()

    def word(self) -> int:
        self.at += 1
        return self.words[self.at - 1] if self.at <= len(self.words) else 0

    def row(self, frequencies: Any) -> int:
        f = [int(x) for x in frequencies]
        assert sum(f) == 1 << 16
        left = [sum(f[:k]) * ((1 << 24) - len(f)) // (1 << 16) + k for k in range(len(f))]
        left.append(1 << 24)
        scale = self.range >> 24
        q = (self.point - self.low & M64) // scale
        k = max(j for j in range(len(f)) if left[j] <= q)
        self.low = self.low + scale * left[k] & M64
        self.range = scale * (left[k + 1] - left[k])
        if self.range < 1 << 32:
            self.low, self.range = self.low << 32 & M64, self.range << 32
            self.point = (self.point << 32 | self.word()) & M64
        return k

    def bit(self, frequency: int = 1 << 15) -> int:
        return self.row(((1 << 16) - frequency, frequency))

    def number(self) -> int:
        j = 0
        while j < 31 and self.bit():
            j += 1
        return (1 << j) - 1 + sum(self.bit() << k for k in range(j))

    def escaped(self, rows: list[Any], most: int) -> list[int]:
        symbols = [self.row(row) for row in rows]
        out = [s - most - 1 for s in symbols]
        far = [i for i, s in enumerate(symbols) if not s]
        negative = [self.bit() for _ in far]
        for i, minus in zip(far, negative, strict=True):
            size = self.number() + most + 1
            out[i] = -size if minus else size
        return out

    def agree(
        self, x: list[float], margin: float, low: int, high: int, share: float = 1
    ) -> list[int]:
        out = []
        for a in range(0, len(x), 4096):
            some = x[a : a + 4096]
            expected = len(some) * 2 * margin * share
            bits = min(7, int(3 * expected + 0.75))
            while bits and 2 * margin * 2**bits > 1 / 8:
                bits -= 1
            if bits:
                move = sum(self.bit() << j for j in range(bits))
                some = [v + 2 * margin * move for v in some]
            listed = [0] * len(some)
            if self.bit(max(1, min(2**13, round(2**16 * expected)))):
                frequency = max(1, round(2**17 * margin * share))
                listed = [self.bit(frequency) for _ in some]
            out += [
                round(v) - 1 + self.bit() if flag else math.floor(v)
                for v, flag in zip(some, listed, strict=True)
            ]
        return [min(max(v, low), high - 1) for v in out]


def groups() -> list[list[int]]:
    out = []
    for a, b in zip(STARTS, STARTS[1:], strict=False):
        luma = list(range(a, b))
        out += [luma, [64 + z for z in luma] + [128 + z for z in luma]]
    return out


class Level:
    """Section 2, and the range decoder at the payload's start."""

    def __init__(self, file: Bytes) -> None:
        words = file.varint()
        words, some = words // 2, words % 2
        self.psnr = file.number(1) / 4
        self.last, self.agreed = list(file.take(3)), file.number(2)
        count = file.varint() if some else 0
        inner = [(file.varint(), file.varint(), file.number(2)) for _ in range(count)]
        whole, end = file.number(2), file.at
        assert file.number(2) == crc16(file.data[:end])
        payload = file.take(4 * words)
        assert whole == crc16(payload)
        reached = 0
        for _, more, crc in inner:
            reached += more
            assert crc == crc16(payload[: 4 * reached])
        self.coder = Range(payload)


class Second:
    """Sections 6 and 8."""

    def __init__(self, data: bytes, model: Model) -> None:
        self.file, self.tables = Bytes(data), model.tables
        self.header()
        self.chain = codec.make_chain(bitstream.parse(data).header, model)
        assert isinstance(self.chain, Nested)
        self.h, self.w = self.chain.blocks
        n = self.n = self.h * self.w
        self.dither = [self.dithers(k) for k in range(192)]
        self.cell, self.known = [[0] * n for _ in range(192)], [[False] * n for _ in range(192)]
        estimate = None
        for i in range(self.levels):
            self.level(i, estimate)
            self.chain.cells.cell[:] = self.cell
            self.chain.cells.depth[:] = np.where(self.known, i, -1)
            estimate = self.chain.estimate(i)
        pixels = self.chain.pixels(self.chain.mean(estimate))[..., : self.chain.components]
        self.picture = self.lossless(self.file.blob(), pixels)
        assert self.file.at == len(data)

    def header(self) -> None:
        f = self.file
        assert f.take(6) == bytes.fromhex("8A44504D0D0A")
        start = f.at
        assert f.number(1) == 1
        flags = f.number(1)
        assert not flags & 0b110100  # no gaussian coding, ICC or EXIF here
        self.isotropic = bool(flags & 8)
        self.size = f.varint(), f.varint()
        f.take(6)
        self.seed, self.levels = f.varint(), f.varint()
        self.ratio, self.finest = f.number(1), f.varint()
        end = f.at
        assert f.number(2) == crc16(f.data[start:end])
        if flags & 2:
            f.blob()

    def dithers(self, band: int) -> list[int]:
        halves: list[int] = []
        while len(halves) < self.n:
            for word in philox(len(halves) // 8 + 1, (self.seed, band)):
                halves += [word & 0xFFFFFFFF, word >> 32]
        cells = self.ratio ** (self.levels - 1)
        return [((v >> 16) % cells << 16) + (v & 65535) for v in halves[: self.n]]

    def level(self, i: int, estimate: Any) -> None:
        record = Level(self.file)
        send, scale, position = self.agreement(i, record, estimate)
        t, r, coder = self.tables, self.ratio, record.coder
        width = 2**16 * r ** (self.levels - 1 - i)
        grid = [[8 * d // width for d in row] for row in self.dither]
        magnitude = [
            [
                min(abs(8 * r * c + 4 * r - g), 65535) if known else 0
                for c, g, known in zip(*rows, strict=True)
            ]
            for rows in zip(self.cell, grid, self.known, strict=True)
        ]
        surprise: dict[tuple[int, int], int] = {}
        error: dict[tuple[int, int], int] = {}
        for turn, group in [(turn, group) for turn in range(3) for group in groups()]:
            mine = [
                (k, n)
                for k in group
                for n in range(self.n)
                if send[k][n] and (scale[k][n] < 18) + (scale[k][n] < 16) == turn
            ]
            classes = {
                (k, n): (self.energy(magnitude, k, n), self.surprise(surprise, k, n))
                for k, n in mine
            }
            fresh: dict[tuple[int, int], int] = {}
            near = group[0] % 64 in (0, 1, 2, 3, 4, 5)
            for lattice, (oy, ox) in enumerate(LATTICES if near else LATTICES[:1]):
                here = [
                    (k, n)
                    for k, n in mine
                    if not near or (n // self.w % 2, n % self.w % 2) == (oy, ox)
                ]
                moved, law, scales = {}, {}, {}
                for k, n in here:
                    p, s = position[k][n], scale[k][n]
                    if near:
                        move, finer = self.neighbours(i, error, k, n, lattice)
                        low, high = (-12, 8 * r + 11) if self.known[k][n] else (-(2**15), 2**15 - 1)
                        p, s = min(max(p + move, low), high), min(max(s + finer, 0), 31)
                    known = int(self.known[k][n])
                    adjust = int(t.adjust[(known, s, *classes[k, n])])
                    moved[k, n], scales[k, n] = p, s
                    law[k, n] = min(max(2 * s + adjust, 0), 63)
                parts = {}
                for k, n in [at for at in here if self.known[at[0]][at[1]]]:
                    p = moved[k, n]
                    right = p >= 4 * r
                    p = 8 * r - 1 - p if right else p
                    part = coder.row(t.refine[i, law[k, n], p + 12])
                    parts[k, n] = r - 1 - part if right else part
                new = [at for at in here if not self.known[at[0]][at[1]]]
                rows, sign = [], []
                for at in new:
                    p = moved[at] % 8
                    sign.append(-1 if p >= 4 else 1)
                    rows.append(t.first[i, law[at], 7 - p if p >= 4 else p])
                js = coder.escaped(rows, 6)
                for (k, n), part in parts.items():
                    self.cell[k][n] = r * self.cell[k][n] + part
                for (k, n), j, s in zip(new, js, sign, strict=True):
                    self.cell[k][n] = parts[k, n] = moved[k, n] // 8 + s * j
                    self.known[k][n] = True
                for (k, n), part in parts.items():
                    error[k, n] = 8 * part + 4 - position[k][n]
                    off = abs(8 * part + 4 - moved[k, n])
                    fresh[k, n] = min(1024, off * int(t.weight[scales[k, n]]))
            surprise |= fresh
            for k, n in fresh:
                magnitude[k][n] = min(abs(8 * self.cell[k][n] + 4 - grid[k][n]), 65535)

    def agreement(self, i: int, record: Level, estimate: Any) -> Any:
        t, r, d = self.tables, self.ratio, record.coder
        send = [[False] * self.n for _ in range(192)]
        scale, position = ([[0] * self.n for _ in range(192)] for _ in range(2))
        e, margin = t.margin[max(0, i - 1)].tolist()
        u = 8 * r / math.sqrt(12)
        width = 2**16 * r ** (self.levels - 1 - i)
        for group in groups():
            used = [k for k in group if k % 64 < record.last[k // 64]]
            at = [(k, n) for k in used for n in range(self.n)]
            if estimate is None:
                q = math.sqrt(12 / self.finest) * r ** (self.levels - 1)
                for k, n in at:
                    send[k][n] = self.isotropic or t.prior[k] >= t.on[0]
                    scale[k][n] = int(t.prior[k]) if send[k][n] else 0
                    if send[k][n]:
                        x = 8 * float(t.mean[k]) / q + 8 * self.dither[k][n] / width
                        position[k][n] = min(max(math.floor(x), -(2**15)), 2**15 - 1)
                continue
            x = {(k, n): (float(estimate.lam[k, n]) + 5) / 0.25 for k, n in at}
            asked = [a for a in at if not (self.known[a[0]][a[1]] or self.isotropic)]
            on = int(t.on[i])
            got = d.agree([x[a] for a in asked], 4 * margin, on - 1, on + 1, 1 / 8)
            yes = dict(zip(asked, got, strict=True))
            sent = [a for a in at if yes.get(a, on) == on]
            for (k, n), s in zip(
                sent, d.agree([x[a] for a in sent], 4 * margin, 0, 32), strict=True
            ):
                send[k][n], scale[k][n] = True, s
            eps = {(k, n): float(estimate.eps[k, n]) for k, n in sent}
            old = [a for a in sent if self.known[a[0]][a[1]]]
            new = [a for a in sent if not self.known[a[0]][a[1]]]
            where = d.agree([4 * r - u * eps[a] for a in old], u * e, -12, 8 * r + 12)
            grid = [8 * self.dither[k][n] / width - u * eps[k, n] for k, n in new]
            where += d.agree(grid, u * e, -(2**15), 2**15)
            for (k, n), p in zip(old + new, where, strict=True):
                position[k][n] = p
        mask = np.array(send)
        crc = crc16(np.packbits(mask).tobytes())
        crc = crc16(np.array(scale, np.uint8)[mask].tobytes(), crc)
        assert crc16(np.array(position, "<i4")[mask].tobytes(), crc) == record.agreed
        return send, scale, position

    def beside(self, n: int, steps: Any) -> list[int]:
        y, x = divmod(n, self.w)
        places = [(y + dy, x + dx) for dy, dx in steps]
        return [a * self.w + b for a, b in places if 0 <= a < self.h and 0 <= b < self.w]

    def neighbours(self, i: int, error: Any, k: int, n: int, lattice: int) -> tuple[int, int]:
        w = [int(v) for v in self.tables.near[i, k // 64, k % 64, lattice]]
        sums = [
            sum(error.get((k, m), 0) for m in self.beside(n, steps))
            for steps in (FOUR[:2], FOUR[2:], CORNERS)
        ]
        sums.append(error.get((k % 64, n), 0) if k >= 64 else 0)
        return sum(a * b for a, b in zip(w, sums, strict=False)) + 128 >> 8, w[4]

    @staticmethod
    def lower(z: int) -> list[tuple[int, int]]:
        v, u = ZIGZAG[z]
        steps = ((1, 0, 2), (0, 1, 2), (1, 1, 2), (2, 0, 1), (0, 2, 1))
        there = [(v - dv, u - du, w) for dv, du, w in steps if v >= dv and u >= du]
        return [(ZIGZAG.index((a, b)), w) for a, b, w in there if (a, b) != (0, 0)]

    def energy(self, magnitude: Any, k: int, n: int) -> int:
        s = 4 * sum(magnitude[k][m] for m in self.beside(n, FOUR + CORNERS))
        weights = 32
        for z, w in self.lower(k % 64):
            row = magnitude[k // 64 * 64 + z]
            s += 4 * w * row[n] + w * sum(row[m] for m in self.beside(n, FOUR))
            weights += 8 * w
        if k >= 64:
            s, weights = s + 12 * magnitude[k % 64][n], weights + 12
        return sum(2**j <= 4 * s // weights for j in range(9))

    def surprise(self, surprise: dict[tuple[int, int], int], k: int, n: int) -> int:
        times = dict.fromkeys(self.beside(n, FOUR + CORNERS), 1) | {n: 3}
        found = [(v, times[m]) for (_, m), v in surprise.items() if m in times]
        own = [k // 64 * 64 + z for z, _ in self.lower(k % 64)] + ([k % 64] if k >= 64 else [])
        found += [(surprise[b, n], 3) for b in own if (b, n) in surprise]
        s, c = sum(v * w for v, w in found), sum(w for _, w in found)
        if c < 3:
            return 0
        return 1 + sum(t <= s // c for t in (90, 128, 166, 205, 256, 320, 410, 538))

    def lossless(self, data: bytes, estimate: NDArray[Any]) -> NDArray[Any]:
        margin = 510 * float(self.tables.margin[-1][0]) / math.sqrt(self.finest)
        coder = Range(data[2:])
        x = [float(v) + 0.5 for v in estimate.reshape(-1)]
        base = np.array(coder.agree(x, margin, 0, 256)).reshape(estimate.shape)
        assert crc16(base.astype("<i4").tobytes()) == int.from_bytes(data[:2], "little")
        h, w, colours = base.shape
        residual, done = np.zeros(base.shape, int), np.zeros(base.shape, bool)
        steps = (2, 2, 3, 3, 4, 5, 6, 8, 9, 11, 14, 17, 21, 26, 32, 39, 48, 59, 73, 89, 110, 135,
                 166, 204, 251, 309, 379, 466, 573, 704, 866)  # fmt: skip
        for c in range(colours):
            for oy, ox in LATTICES:
                places = [(a, b) for a in range(oy, h, 2) for b in range(ox, w, 2)]
                rows = []
                for a, b in places:
                    near = (slice(max(0, a - 1), a + 2), slice(max(0, b - 1), b + 2), c)
                    s, n = int(np.abs(residual[near]).sum()), int(done[near].sum())
                    if c:
                        s, n = s + 2 * abs(int(residual[a, b, c - 1])), n + 2
                    row = sum(t <= 16 * s // n for t in steps) if n else 12
                    rows.append(self.tables.residual[row])
                for place, v in zip(places, coder.escaped(rows, 31), strict=True):
                    residual[(*place, c)] = v
                for place in places:
                    done[(*place, c)] = True
        return base + residual


@pytest.fixture(scope="module")
def fitted(tiny_model: Path) -> Model:
    """A model whose tables differ everywhere, with estimates far off in the first bands."""
    model = load_model(tiny_model)
    rng = np.random.default_rng(0)
    t: Tables = copy.deepcopy(model.tables)
    t.adjust[:] = rng.integers(-5, 6, t.adjust.shape)
    t.near[:] = rng.integers(-60, 90, t.near.shape)
    t.near[..., 4] = rng.integers(-3, 2, t.near.shape[:-1])
    t.mean[:3] = (40, -90, 25)
    t.margin[:] = rng.uniform(1e-4, 8e-4, t.margin.shape)
    t.error *= np.exp(rng.normal(0, 1.5, t.error.shape)).astype(np.float32)
    return replace(model, tables=t)


@pytest.mark.parametrize(
    ("grey", "path", "size"),
    [(False, "spectral", (28, 40)), (True, "spectral", (17, 33)), (False, "isotropic", (9, 8))],
)
def test_second_decoder(
    fitted: Model, picture: Any, grey: bool, path: str, size: tuple[int, int]
) -> None:
    pixels = np.asarray(picture)[: size[0], : size[1], 0 if grey else slice(None)]
    data = codec.encode(pixels, model=fitted, lossless=True, seed=3, path=path)
    got = Second(data, fitted).picture
    np.testing.assert_array_equal(got.reshape(pixels.shape), pixels)


def words(key: tuple[int, int], purpose: int, at: int) -> int:
    return philox(1 + at // 4, key, purpose)[at % 4]


def units(v: float) -> int:
    """Section 7: information, in units of 2^-20 bits."""
    f, x = math.frexp(1 + v)
    u = (f - 0.75) / (f + 0.75)
    total, power = 0.0, u
    for k in range(1, 24, 2):
        total += power / k
        power *= u * u
    return max(0, round((x - 0.41503749927884376 + 2 * total * 1.4426950408889634) * 2**19))


def walsh(x: list[float]) -> list[float]:
    if len(x) == 1:
        return x
    a, b = walsh(x[: len(x) // 2]), walsh(x[len(x) // 2 :])
    return [s + t for s, t in zip(a, b, strict=True)] + [s - t for s, t in zip(a, b, strict=True)]


def observation(message: list[int], v: list[float], n: list[int], key: tuple[int, int]) -> Any:
    """Section 7: y of each coefficient."""
    memory, rate = (15, 135) if sum(n) <= 2**13 else (12, 138)
    each = [e for e, count in zip(v, n, strict=True) for _ in range(count)]
    whole = sum(map(units, each))
    bits = 4 - -whole * rate // (128 << 20)
    assert len(message) == bits
    w = max(1, -(-whole // bits))
    y: list[float] = []
    so_far = at = column = 0
    draw = before = -1
    for e in each:
        so_far += units(e)
        last = min(max(-(-so_far // w) - 1, 0), bits - 1)
        column += 1
        if last != before or column == 64:
            draw, column, before = draw + 1, 0, last
        window = sum(
            message[b] << memory - (last - b) for b in range(max(0, last - memory), last + 1)
        )
        row = (window + (words(key, 2, draw) >> 32)) % (2 << memory)
        word = words(key, 0, (64 * row + column) // 4)
        q = word >> 16 * (column % 4) & 0xFFFF
        y.append(float(np.float32(NormalDist().inv_cdf((q + 0.5) / 2**16))) * math.sqrt(1 + e))
    for count in n:
        end = at + count
        while at < end:
            run = min(2**12, 1 << (end - at).bit_length() - 1)
            y[at : at + run] = [s / math.sqrt(run) for s in walsh(y[at : at + run])]
            at += run
    for j in range(len(y)):
        octet = words(key, 1, j // 64) >> j % 64 // 8 * 8 & 0xFF
        y[j] *= -1 if octet >> 7 - j % 8 & 1 else 1
    return y


def across(c: dict[tuple[int, int], float], h: int, w: int) -> dict[tuple[int, int], float]:
    """Section 7: c[band, block] with whole squares of blocks transformed."""
    out = dict(c)
    squares = [(y, x) for y in range(0, h - h % 4, 4) for x in range(0, w - w % 4, 4)]
    for k in {band for band, _ in c}:
        for y, x in squares:
            places = [(y + a) * w + x + b for a in range(4) for b in range(4)]
            values = walsh([c[k, n] for n in places])
            out |= {(k, n): v / 4 for n, v in zip(places, values, strict=True)}
    return out


def gaussian_level(data: bytes, model: Model) -> Any:
    """Section 7: M after each level, level by level, from the network's estimates."""
    header = bitstream.parse(data).header
    chain = Gaussian(header, model)
    (h, w), bands = chain.blocks, 64 if header.mode == "L" else 192
    snrs = [float(Schedule().snr[t]) for t in header.timesteps]
    m = {(k, n): 0.0 for k in range(bands) for n in range(h * w)}
    before, estimate, last = 0.0, None, 22
    for i, (level, snr) in enumerate(zip(bitstream.parse(data).levels, snrs, strict=True)):
        d = snr - before
        known = [0.0, *model.ladder.snrs]
        a = max(j for j in range(len(known) - 1) if known[j] <= before)
        part = min(1.0, (before - known[a]) / (known[a + 1] - known[a]))
        cells: dict[tuple[int, int], int] = {}
        place = {}
        for k in range(bands):
            each = []
            for low, high in model.tables.error[a : a + 2, k].T.astype(float).tolist():
                e = 1 / ((1 - part) / max(low, 1e-9) + part / max(high, 1e-9))
                each.append(round(e * 2**36))
            for n in range(h * w):
                y, x = divmod(n, w)
                inside = y < h - h % 4 and x < w - w % 4
                p = 4 * (y % 4) + x % 4 if inside else 16
                place[k, n] = (k, p)
                cells[k, p] = each[p] if inside else sum(each) // 16
        kinds: dict[int, list[tuple[int, int]]] = {}
        for cell, u in sorted(cells.items()):
            octave = max(u, 1).bit_length()
            half = max(u, 1) >= math.sqrt(0.5) * 2**octave
            kinds.setdefault(2 * octave + half, []).append(cell)
        order: list[tuple[int, int]] = []
        v, count = [], []
        for kind in sorted(kinds, reverse=True):
            inside_kind = set(kinds[kind])
            here = [at for at in sorted(place) if place[at] in inside_kind]
            order += here
            count.append(len(here))
            v.append(d * (sum(cells[c] for c in kinds[kind]) / len(kinds[kind]) / 2**36))
        info = [units(e) * n for e, n in zip(v, count, strict=True)]
        total = max(sum(info), 1)
        c = min(max(total // (80 << 20), 1), len(v))
        share, so_far = [], 0
        for bits in info:
            so_far += bits
            share.append(min((so_far - bits // 2) * c // total, c - 1))
        names = sorted(set(share))
        stream = iter([byte >> 7 - b & 1 for byte in level.payload for b in range(8)])
        gains: list[int] = []
        for _ in names:
            ones = 0
            while next(stream):
                ones += 1
            last = (gains[-1] if gains else last) + (ones + 1) // 2 * (1 if ones % 2 else -1)
            gains.append(last)
        last = gains[0]
        k_of = [gains[names.index(s)] - 22 for s in share]
        v = [e * (2.0 ** (k // 2) * math.sqrt(2) ** (k % 2)) for e, k in zip(v, k_of, strict=True)]
        information = sum(units(e) * n for e, n in zip(v, count, strict=True))
        rate = 135 if len(order) <= 2**13 else 138
        message = [next(stream) for _ in range(4 - -information * rate // (128 << 20))]
        y_of = dict(zip(order, observation(message, v, count, (header.seed, i)), strict=True))
        x0_hat = chain.mean(estimate)
        turned = across({at: float(x0_hat[at]) for at in m}, h, w)
        m = across(m, h, w)
        for at in m:
            m[at] = (before * m[at] + d * (turned[at] + y_of[at] / math.sqrt(d))) / snr
        m = across(m, h, w)
        yield m
        for (k, n), value in m.items():
            chain.m[k, n] = value
        chain.band_precision[:bands] = snr
        estimate, before = chain.estimate(i), snr


@pytest.mark.parametrize(("mode", "size"), [("RGB", (33, 40)), ("L", (20, 9))])
def test_second_decoder_of_gaussian_levels(
    fitted: Model, picture: Any, mode: str, size: tuple[int, int]
) -> None:
    image = picture.resize(size).convert(mode)
    data = codec.encode(image, model=fitted, rec="gaussian", timesteps=(700, 420, 300), seed=9)
    decoder = codec._Decoder(bitstream.parse(data), fitted, "cpu")
    for m in gaussian_level(data, fitted):
        assert decoder.step()
        for at, value in m.items():
            assert decoder.chain.m[at] == pytest.approx(value, abs=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [[3, 64, 0, 700, 10], [1, 8800]])
def test_second_decoder_of_messages(n: list[int]) -> None:
    v = [40.0, 0.8, 0.1, 0.02, 0.003][: len(n)]
    layout = gaussian.Layout.of(np.array(v), np.array(n))
    mu = np.random.default_rng(0).standard_normal(sum(n)) * np.sqrt(layout.each(layout.v))
    message, y = gaussian.encode(mu, layout, (77, 5))
    np.testing.assert_allclose(observation(message.tolist(), v, n, (77, 5)), y, atol=1e-9)
