"""A second decoder, written from docs/format.md and nothing else, one coefficient at a time.

Of photographs it works out everything that a file tells, in plain Python and numpy; the network is
that of second_network.py. Only the paper's kind of network, in floating point, is the package's.
test_format.py compares the two.
"""

from __future__ import annotations

import binascii
import json
import math
import zlib
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from second_network import Array, Network

M64 = (1 << 64) - 1
ZIGZAG = sorted(
    ((v, u) for v in range(8) for u in range(8)),
    key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]),
)
COSINES = np.array(
    [[math.cos((2 * x + 1) * u * math.pi / 16) / 2 for x in range(8)] for u in range(8)]
)
COSINES[0] /= math.sqrt(2)
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]])
COLOURS = COLOURS / np.sqrt((COLOURS**2).sum(1, keepdims=True))
BASIS = np.array(  # of bands; by colour, row, column
    [np.multiply.outer(c, np.outer(COSINES[u], COSINES[v])) for c in COLOURS for u, v in ZIGZAG]
)
BASIS = np.rint(BASIS * 2**20) / 2**20
RATE = (282, 279, 275, 273, 271, 270, 269, 268, 267)
STEPS = (2, 2, 3, 3, 4, 5, 6, 8, 9, 11, 14, 17, 21, 26, 32, 39, 48, 59, 73, 89, 110, 135, 166, 204,
         251, 309, 379, 466, 573, 704, 866)  # fmt: skip
Place = tuple[int, int]  # band and block of a tile
Kinds = list[tuple[float, list[Place]]]  # of a message: v of each class, and its coefficients


class Cut(Exception):
    """What is read ends here."""


def crc16(data: bytes) -> int:
    return binascii.crc_hqx(data, 0)


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise Cut
        self.at += n
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


def snr_of_rung(finest: int, r: int) -> float:
    return finest * (0.7071067811865476 if r % 2 else 1) * 2.0 ** -(r // 2)


class Record(NamedTuple):
    psnr: float
    size: int
    payload: bytes  # what there is of it


class File:
    """Sections 1 and 2."""

    def __init__(self, data: bytes) -> None:
        f = Bytes(data)
        assert f.take(6) == bytes.fromhex("8A44504D0D0A") and f.number(1) == 2
        flags = f.number(1)
        assert flags < 32
        self.mode, self.isotropic = ("L", "RGB", "LA", "RGBA")[flags & 3], bool(flags & 4)
        self.width, self.height, self.model = f.varint(), f.varint(), f.take(6)
        self.seed, self.effort, self.finest = f.varint(), f.number(1), f.varint()
        count = f.varint()
        self.r = [f.varint()]
        steps = [f.varint()] * (count - 1) if flags & 8 and count > 1 else []
        for step in steps or [f.varint() for _ in range(count - 1)]:
            self.r.append(self.r[-1] - step)
        self.tune = [f.number(1) if flags & 16 else 0 for _ in range(3)]
        assert f.number(2) == crc16(data[6 : f.at - 2])
        self.levels: list[Record] = []
        self.extras: dict[int, bytes] = {}
        try:
            while f.at < len(data):
                self.record(f)
        except Cut:
            pass

    def record(self, f: Bytes) -> None:
        begin = f.at
        n, extra = divmod(f.varint(), 2)
        kind = f.number(1)
        if extra:
            content, end = f.take(n), f.at
            assert f.number(4) == zlib.crc32(f.data[begin:end])
            self.extras[kind] = content
            return
        payload, whole = b"", True
        while whole and len(payload) < n:
            size = min(1024, n - len(payload))
            whole = f.at + size + 2 <= len(f.data)
            if not whole:  # has what is there been sealed?
                size = len(f.data) - 2 - f.at
                if size < 1 or crc16(f.data[:-2]) != int.from_bytes(f.data[-2:], "little"):
                    break
            payload += f.take(size)
            assert f.number(2) == crc16(f.data[: f.at - 2])
        if payload:
            self.levels.append(Record(kind / 4, n, payload))
        if len(payload) < n:
            raise Cut

    def snr(self, i: int) -> float:
        r = self.r[i]
        if self.finest:
            return snr_of_rung(self.finest, r)
        a, s = 1.0, (0.02 - 1e-4) / 999
        for t in range(1, r + 1):
            a *= 1 - ((t - 1) * s + 1e-4 if t < 1000 else 0.02)
        return a / (1 - a)


class ModelFile:
    """Section 7."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "np") as f:
            about = f.metadata()
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        self.network: dict[str, Any] = json.loads(about["network"])
        ladder = json.loads(about["ladder"])
        self.finest, self.tau = ladder["finest"], ladder["tau"]
        self.snrs = [snr_of_rung(self.finest, r) for r in reversed(range(ladder["rungs"]))]
        self.digest = bytes.fromhex(about["digest"])
        self.photographs = "down" in self.network
        self.net = {name[4:]: x for name, x in tensors.items() if name.startswith("net.")}
        tables = {name[7:]: x for name, x in tensors.items() if name.startswith("tables.")}
        self.mean, self.error = tables["mean"], tables["error"].astype(float)
        self.variance, self.residual = tables["variance"].astype(float), tables["residual"]


class Range:
    """Section 6."""

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

    def fair(self, n: int) -> int:
        return sum(self.bit() << k for k in range(n))

    def number(self) -> int:
        j = 0
        while j < 31 and self.bit():
            j += 1
        return (1 << j) - 1 + self.fair(j)


def across(x: Array) -> Array:
    """Section 3, of (bands, h, w)."""
    out: Array = x.copy()
    h, w = x.shape[1:]
    for y in range(0, h - h % 4, 4):
        for z in range(0, w - w % 4, 4):
            for i, j in np.ndindex(4, 4):
                signs = np.array([[(-1) ** ((i & a).bit_count() + (j & b).bit_count())
                                   for b in range(4)] for a in range(4)])  # fmt: skip
                out[:, y + i, z + j] = (signs * x[:, y : y + 4, z : z + 4]).sum((1, 2)) / 4
    return out


def pixels(c: Array) -> Array:
    """Section 3: (192, h, w) coefficients transformed back, (3, 8 h, 8 w)."""
    blocks = np.tensordot(c, BASIS, (0, 0)).transpose(2, 0, 3, 1, 4)  # (3, h, 8, w, 8)
    out: Array = blocks.reshape(3, 8 * c.shape[1], 8 * c.shape[2])
    return out


def coefficients(x: Array) -> Array:
    """And (3, 8 h, 8 w) pixels transformed."""
    blocks = x.reshape(3, x.shape[1] // 8, 8, x.shape[2] // 8, 8)
    out: Array = np.tensordot(BASIS, blocks, ((1, 2, 3), (0, 2, 4)))
    return out


def grid(x: Array, k: int) -> Array:
    """Section 4."""
    return np.clip(np.rint(x * 2.0**k) / 2.0**k, -1024, 1024)


def integers(x: Array) -> Array:
    return np.clip(np.rint(x), -255, 255).astype(np.int64)


def tuned(r: int, g: int, s: int) -> Array:
    """Section 1: W_k of each band."""
    power = (1, 0.8408964152537145, 0.7071067811865476, 0.5946035575013605)
    out = []
    for c in (0, r, g):
        for v, u in ZIGZAG:
            n = c + s * math.floor(16 * math.sqrt(v * v + u * u)) // 128
            out.append(2.0 ** -(n // 4) * power[n % 4])
    return np.array(out)


def philox(counter: int, key: tuple[int, int], purpose: int) -> list[int]:
    """Philox 4x64-10 (Salmon et al. 2011): four words of 64 bits."""
    c, k = [counter, purpose, 0, 0], list(key)
    for i in range(10):
        if i:
            k = [(k[0] + 0x9E3779B97F4A7C15) & M64, (k[1] + 0xBB67AE8584CAA73B) & M64]
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [b >> 64 ^ c[1] ^ k[0], b & M64, a >> 64 ^ c[3] ^ k[1], a & M64]
    return c


@cache
def table_words(seed: int, counter: int) -> list[int]:
    return philox(counter, (seed, 0), 0)


def table(seed: int, row: int, column: int) -> float:
    """-0.0 is another number than 0.0: it has a sign."""
    at = 64 * row + column
    f = table_words(seed, 1 + at // 16)[at // 4 % 4] >> 16 * (at % 4) & 0xFFFF
    x = NormalDist().inv_cdf((f + 1 / 2) / 2**16)
    return math.copysign(round(4096 * x) / 4096, x)


def information(v: float) -> int:
    f, e = math.frexp(1 + v)
    q = (f - 0.75) / (f + 0.75)
    s, p = 0.0, q
    for k in range(1, 24, 2):
        s, p = s + p / k, p * (q * q)
    return max(0, round((e - 0.41503749927884376 + 2 * s * 1.4426950408889634) * 2**19))


def walsh(x: Array) -> Array:
    n = 1
    while n < len(x):  # sums and differences of neighbours n apart
        a, b = np.moveaxis(x.reshape(-1, 2, n), 1, 0)
        x, n = np.stack([a + b, a - b], 1).reshape(-1), 2 * n
    return np.rint(x * (4096 * (1 / math.sqrt(n)))) / 4096


class Message:
    """Sections 5.4 and 5.5."""

    def __init__(self, v: list[float], n: list[int], effort: int) -> None:
        self.each = [(a, b) for a, b in zip(v, n, strict=True) for _ in range(b)]
        self.memory = 7 + effort
        whole = sum(information(a) * b for a, b in zip(v, n, strict=True))
        self.length = 4 - -whole * RATE[effort - 1] // (256 << 20)
        step = max(1, -(-whole // self.length))
        self.waits, so_far = [], 0
        for a, b in zip(v, n, strict=True):
            one = information(a)
            for _ in range(b):
                so_far += one
                self.waits.append(min(max(-(-so_far // step) - 1, 0), self.length - 1))
        self.runs = []
        for b in n:
            full = max(0, b // 4096 - 1)
            self.runs += [4096] * full + [b - 4096 * full]

    def arrived(self, bits: int) -> int:
        there, end = sum(t < bits for t in self.waits), 0
        for run in self.runs:
            if end + run > there:
                break
            end += run
        return end

    def x(self, bits: list[int], seed: int) -> list[float]:
        memory, r, out, c, before = self.memory, self.memory // 3, [], 0, -1
        b = [0] * memory + bits  # b[memory + t] is b(t)
        for t, (v, n) in zip(self.waits[: self.arrived(len(bits))], self.each, strict=False):
            c = c + 1 if t == before else 0
            if t != before:
                t0, before = t - t % r, t
                places = (*range(t0, t), *range(t - memory + 1, t0))
                row = int("".join(str(b[memory + a]) for a in places), 2)
            x = table(seed, row ^ c // 64 % 2 ** (memory - 1), (c + t % r * (64 // r)) % 64)
            if v <= 3 / 4 and n >= 16:
                x = math.copysign(1, x)
            out.append(-x if b[memory + t] != b[t] else x)
        return out

    def y(self, bits: list[int], seed: int, number: int) -> Array:
        y, at = np.array(self.x(bits, seed)), 0
        words = [w for k in range(-(-len(y) // 256)) for w in philox(1 + k, (seed, number), 1)]
        octets = b"".join(w.to_bytes(8, "little") for w in words)
        signs = np.array([1 - 2 * (octets[j // 8] >> 7 - j % 8 & 1) for j in range(len(y))])
        for run in self.runs:
            if at + run > len(y):
                break
            some, s = y[at : at + run], signs[at : at + run]
            p = min(4096, 1 << run.bit_length() - 1)
            if p < run:
                some[-p:] = walsh(some[-p:])
                some *= s[::-1]
            some[:p] = walsh(some[:p])
            some *= s
            at += run
        y *= np.array([math.sqrt(1 + v) for v, _ in self.each[: len(y)]])
        return y


class Contents(NamedTuple):
    """A message as it was decoded."""

    n: list[int]  # coefficients of each class
    places: list[int]
    bits: list[int]
    waits: list[int]
    y: Array


class State(NamedTuple):
    """After a level, or what there is of it."""

    m: Array
    x0_hat: Array
    indices: Array | None  # scale indices
    picture: Array


class Second:
    """Sections 3 to 6. The size of tiles is an argument, for tests with small pictures."""

    def __init__(self, data: bytes, path: Path, tile: int = 768, overlap: int = 64) -> None:
        """path: of the model file."""
        f, model = File(data), ModelFile(path)
        self.file, self.model = f, model
        assert f.model == model.digest[:6]
        assert f.finest == (model.finest if model.photographs else 0)
        t, o = (tile // 8, overlap // 8) if model.photographs else (4, 0)
        patch = 2 if model.photographs else model.network["patch"]
        m = math.lcm(8, patch * 2 ** (len(model.network["channels"]) - 1))
        h, w = (-(-n // m) * m // 8 for n in (f.height, f.width))
        self.tiles = [
            (slice(a, min(a + t, h)), slice(b, min(b + t, w)),
             slice(max(a - o, 0), a + t + o), slice(max(b - o, 0), b + t + o))
            for a in range(0, h, t)
            for b in range(0, w, t)
        ]  # fmt: skip
        self.used = 64 if f.mode in ("L", "LA") else 192
        self.m, self.g, self.x0_hat = (np.zeros((192, h, w)) for _ in range(3))
        self.x0_hat += grid(model.mean, 14)[:, None, None]
        self.index: Array | None = None
        self.gain = [22] * len(self.tiles)  # the first of each tile's last message
        self.snrs = [f.snr(i) for i in range(len(f.r))]
        self.w = tuned(*f.tune)[:, None, None]
        self.contents: list[Contents] = []
        self.states: list[State] = []
        for i, level in enumerate(f.levels):
            payload, self.of_use, breaks_off = Bytes(level.payload), 0, False
            try:
                for k in range(len(self.tiles)):
                    self.message(i, k, payload)
                assert self.of_use == payload.at == level.size
            except Cut:
                assert len(level.payload) < level.size
                breaks_off = True
            if not self.of_use:
                break
            if not breaks_off:
                self.ask(self.snrs[i])
            elif i:
                part, before = self.of_use / level.size, self.snrs[i - 1]
                self.ask(before + part * (self.snrs[i] - before))
            elif self.g.any():
                self.ask(self.snrs[0])
            picture = np.rint(self.samples()).clip(0, 255).astype(np.uint8)
            index = None if self.index is None else self.index.copy()
            self.states.append(State(self.m.copy(), self.x0_hat.copy(), index, picture))
        self.exact = self.lossless(f.extras[3]) if 3 in f.extras else None

    @property
    def pictures(self) -> list[Array]:
        exact = [] if self.exact is None else [self.exact]
        return [state.picture for state in self.states] + exact

    def ask(self, s: float) -> None:
        """Section 4."""
        if self.index is None and self.model.photographs:
            self.index = np.zeros(self.m.shape, int)
        for rows, columns, seen_rows, seen_columns in self.tiles:
            m, g = (a[:, seen_rows, seen_columns] for a in (self.m, self.g))
            place = (slice(None), rows, columns)
            top, left = rows.start - seen_rows.start, columns.start - seen_columns.start
            inner = (
                slice(None), slice(top, top + rows.stop - rows.start),
                slice(left, left + columns.stop - columns.start),
            )  # fmt: skip
            if self.index is None:
                self.x0_hat[place] = self.paper(m, s)[inner]
            else:
                x0_hat, index = self.photograph(m, g, s)
                self.x0_hat[place], self.index[place] = x0_hat[inner], index[inner]

    def photograph(self, m: Array, g: Array, s: float) -> tuple[Array, Array]:
        sd = self.model.net["sigma_data"].astype(float)[:, None, None]
        n = 1 / (1 + sd * sd * g)
        skip, out, whiten = 1 - n, sd * np.sqrt(n), np.sqrt(g * n)
        r = np.where(g > 0, g / s, (s * self.w) / s)
        k = (g > 0) + (np.sqrt(np.sqrt(r)) - 1)
        wiener, w = grid(m * skip, 14), grid(m * whiten, 12)
        outputs = Network(self.model.net, self.model.network)(
            integers(np.concatenate([220 * pixels(wiener), 64 * pixels(w)])),
            integers(128 * k), integers(32 * w), s,
        )  # fmt: skip
        y = coefficients(grid(outputs.y.astype(float), 12)) + outputs.shift + outputs.gain * w
        x0_hat = (wiener + grid(y * out, 14)).astype(np.float32)
        log_scale = outputs.log_scale.clip(-8, 8)
        index = np.floor((log_scale + np.float32(5)) / np.float32(0.25)).clip(0, 31)
        return x0_hat.astype(float), index.astype(int)

    def paper(self, m: Array, s: float) -> Array:
        """The package's own."""
        from ddpm_codec.network.denoiser import ask_isotropic
        from ddpm_codec.network.modelfile import get_model

        net = get_model(self.model.path).unet
        return ask_isotropic(net, m.astype(np.float32), s, "cpu").astype(float)

    def units(self, g: float) -> list[list[int]]:
        """Section 5.1: u of each band at each position."""
        e, f, a = self.model.error, 0.0, 0
        snrs = [0.0, *self.model.snrs]
        if g:
            a = max(j for j in range(len(snrs) - 1) if snrs[j] <= g)
            f = min(1.0, (g - snrs[a]) / (snrs[a + 1] - snrs[a]))
        out = []
        for k in range(192):
            each = [float(x) for x in e[a, k]]
            if g:
                each = [1 / ((1 - f) / max(x, 1e-9) + f / max(float(y), 1e-9))
                        for x, y in zip(each, e[a + 1, k], strict=True)]  # fmt: skip
            row = [round(2**36 * (x * float(self.w[k, 0, 0]))) for x in each]
            out.append([*row, sum(row) // 16])
        return out

    def by_tables(self, i: int, h: int, w: int) -> Kinds:
        g = self.snrs[i - 1] if i else 0.0
        d, u = self.snrs[i] - g, self.units(g)
        of: dict[int, list[Place]] = {}
        pairs: dict[int, set[Place]] = {}
        for k in range(self.used):
            if not self.file.isotropic and sum(u[k][:16]) / (16 * 2**36) * d <= self.model.tau:
                continue
            for n in range(h * w):
                y, x = divmod(n, w)
                inside = y < h - h % 4 and x < w - w % 4
                p = 4 * (y % 4) + x % 4 if inside else 16
                f, e = math.frexp(max(u[k][p], 1))
                number = -(2 * e + (f >= math.sqrt(1 / 2)))
                of.setdefault(number, []).append((k, n))
                pairs.setdefault(number, set()).add((k, p))
        v = {c: d * (sum(u[k][p] for k, p in at) / len(at) / 2**36) for c, at in pairs.items()}
        return [(v[c], of[c]) for c in sorted(of)]

    def by_network(self, i: int, tile: Any, h: int, w: int, payload: Bytes) -> Kinds:
        crc = payload.number(2)
        snr, before = self.snrs[i], self.snrs[i - 1]
        row = len(self.model.snrs) - 1 - self.file.r[i - 1]
        known, new = self.model.variance[row]
        v = [*(known * ((snr - before) / before)), *(new * (snr / before))]
        on = next((j for j in range(32) if v[32 + j] > self.model.tau), 32)
        on = 0 if self.file.isotropic else on
        assert self.index is not None
        index, g = self.index[tile].reshape(192, -1), self.g[tile].reshape(192, -1)
        of: dict[int, list[Place]] = {}
        for at in np.ndindex(self.used, h * w):
            if g[at] > 0:
                of.setdefault(int(index[at]), []).append(at)
            elif index[at] >= on:
                of.setdefault(32 + int(index[at]), []).append(at)
        out = sorted(((float(v[c]), of[c]) for c in sorted(of)), key=lambda kind: -kind[0])
        numbers = [len(at) for _, at in out] + [k * h * w + n for _, at in out for k, n in at]
        checked = np.array([a for a, _ in out], "<f8").tobytes()
        assert crc == crc16(checked + np.array(numbers, "<u4").tobytes())
        return out

    def gains(self, kinds: Kinds, k: int, bits: list[int]) -> tuple[list[float], int]:
        """Section 5.3: v times the gains, and how many bits tell these."""
        info = [information(v) * len(at) for v, at in kinds]
        total, gains, at = max(1, sum(info)), {}, 0
        count = min(max(1, total // (80 << 20)), len(info))
        share = [min((sum(info[: g + 1]) - a // 2) * count // total, count - 1)
                 for g, a in enumerate(info)]  # fmt: skip
        gain = self.gain[k]
        for number in sorted(set(share)):
            ones = 0
            while at < len(bits) and bits[at]:
                at, ones = at + 1, ones + 1
            if at == len(bits):
                raise Cut
            at, gain = at + 1, gain + ((ones + 1) // 2 if ones % 2 else -ones // 2)
            gains[number] = gain
        if gains:
            self.gain[k] = gains[min(gains)]
        times = [2.0 ** ((gains[s] - 22) // 2) * (1, math.sqrt(2))[gains[s] % 2] for s in share]
        return [v * a for (v, _), a in zip(kinds, times, strict=True)], at

    def message(self, i: int, k: int, payload: Bytes) -> None:
        rows, columns, *_ = self.tiles[k]
        h, w = rows.stop - rows.start, columns.stop - columns.start
        tile = (slice(None), rows, columns)
        tables = i == 0 or not self.model.photographs
        kinds = self.by_tables(i, h, w) if tables else self.by_network(i, tile, h, w, payload)
        rest = payload.data[payload.at :]
        bits = [octet >> 7 - j & 1 for octet in rest for j in range(8)]
        v, start = self.gains(kinds, k, bits)
        message = Message(v, [len(at) for _, at in kinds], self.file.effort)
        bits = bits[start : start + message.length]
        y = message.y(bits, self.file.seed, i * len(self.tiles) + k)
        places = [at for _, of in kinds for at in of]
        numbers = [a * h * w + b for a, b in places]
        self.contents.append(
            Contents([len(at) for _, at in kinds], numbers, bits, message.waits, y)
        )
        transform = across if tables else np.copy
        m, x0_hat = (transform(a[tile]).reshape(192, -1) for a in (self.m, self.x0_hat))
        g = self.g[tile].reshape(192, -1)
        snr, after = self.snrs[i], g.copy()
        here = tuple(np.array(places[: len(y)], int).reshape(-1, 2).T)
        w_k = self.w[here[0], 0, 0]
        d = w_k * (snr - np.where(g[here] > 0, self.snrs[i - 1], 0.0))
        o = x0_hat[here] + y / np.sqrt(d)
        m[here] = grid(m[here] + d / (w_k * snr) * (o - m[here]), 14)
        after[here] = w_k * snr
        m = transform(m.reshape(192, h, w)).reshape(192, -1)
        if tables:
            whole = (after == self.w[:, 0] * snr).all(1, keepdims=True)
            after = np.where(whole, self.w[:, 0] * snr, g)
            m[after == 0] = 0
        self.m[tile], self.g[tile] = grid(m.reshape(192, h, w), 14), after.reshape(192, h, w)
        if len(bits) < message.length:
            if len(y):
                self.of_use = payload.at - (-(start + message.waits[len(y) - 1] + 1) // 8)
            raise Cut
        payload.take(-(-(start + message.length) // 8))
        self.of_use = payload.at

    def samples(self) -> Array:
        """(rows, columns, colours) of the picture, before they are rounded."""
        x = pixels(self.x0_hat)[:, : self.file.height, : self.file.width]
        if self.used == 64:
            x = (x[:1] + x[1:2] + x[2:]) / 3
        out: Array = ((x + 1) * 127.5).astype(np.float32).transpose(1, 2, 0)
        return out

    def alpha(self) -> Array:
        size = self.file.height, self.file.width
        if 2 not in self.file.extras:
            return np.full(size, 255, np.uint8)
        rows = np.frombuffer(zlib.decompress(self.file.extras[2]), np.uint8).reshape(size)
        return np.cumsum(rows, axis=0, dtype=np.uint8)

    def lossless(self, data: bytes) -> Array:
        base = np.floor(self.samples().astype(float) + data[0] / 256).clip(0, 255).astype(int)
        assert crc16(base.astype("<i4").tobytes()) == int.from_bytes(data[1:3], "little")
        coder = Range(data[3:])
        h, w, colours = base.shape
        r, done = np.zeros(base.shape, int), np.zeros(base.shape, bool)
        for k in range(colours):
            for oy, ox in ((0, 0), (1, 1), (0, 1), (1, 0)):
                places = [(a, b, k) for a in range(oy, h, 2) for b in range(ox, w, 2)]
                symbols = []
                for a, b, _ in places:
                    near = (slice(max(0, a - 1), a + 2), slice(max(0, b - 1), b + 2), k)
                    t, c = int(np.abs(r[near]).sum()), int(done[near].sum())
                    if k:
                        t, c = t + 2 * abs(int(r[a, b, k - 1])), c + 2
                    row = sum(step <= 16 * t // c for step in STEPS) if c else 12
                    symbols.append(coder.row(self.model.residual[row]))
                far = [at for at, s in zip(places, symbols, strict=True) if s == 0]
                signs = [-1 if coder.bit() else 1 for _ in far]
                for at, s in zip(places, symbols, strict=True):
                    r[at], done[at] = s - 32, True
                for at, sign in zip(far, signs, strict=True):
                    r[at] = sign * (coder.number() + 32)
        return base + r
