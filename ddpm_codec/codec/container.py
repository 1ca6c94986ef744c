"""The file: header, extras, levels, residual. Bytes in, records out; knows nothing of networks.

The format is specified in docs/format.md. Every prefix of a file is a valid file: records come in
the order in which they are needed, and a level carries the places inside it up to which its payload
can be decoded alone.
"""

from __future__ import annotations

import binascii
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..diffusion.process import Schedule
from ..errors import FormatError, LimitError

MAGIC = b"\x8aDPM\r\n"  # not ASCII, not UTF-8, and damaged by newline conversion (as PNG's)
VERSION = 1
MODES = ("L", "RGB", "LA", "RGBA")
RECS = ("nested", "gaussian")
PATHS = ("spectral", "isotropic")
MAX_PIXELS = 200_000_000
LIMIT_VARIABLE = "DDPMC_MAX_PIXELS"
MAX_LEVELS = 1000
GROUPS = 72  # of a level: three turns of 12 ranges of frequencies, luminance before colour
WORD = 4  # bytes of one word of the range coder
UNITS = {"nested": WORD, "gaussian": 1}  # bytes that lengths in a level's record are counted in
PSNR_STEP = 0.25  # dB per unit of a level's PSNR byte


def pixel_limit() -> int:
    """Largest number of pixels accepted: ``DDPMC_MAX_PIXELS`` if set, else 200 million."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        return int(float(text)) if text else MAX_PIXELS
    except (ValueError, OverflowError):
        raise LimitError(f"{LIMIT_VARIABLE}={text}: not a number of pixels") from None


def check_size(size: tuple[int, int]) -> None:
    """Raises LimitError for a picture of more pixels than :func:`pixel_limit`."""
    if size[0] * size[1] > (limit := pixel_limit()):
        raise LimitError(
            f"{size[0]}x{size[1]} pixels, more than the limit of {limit:,} ({LIMIT_VARIABLE})"
        )


class Incomplete(Exception):
    """The bytes end inside a record; never leaves this module."""


def crc16(data: bytes, start: int = 0) -> int:
    """CRC-16/XMODEM."""
    return binascii.crc_hqx(data, start)


def varint(n: int) -> bytes:
    """LEB128: seven bits a byte, low bits first."""
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


class Reader:
    """A cursor over bytes that may end anywhere."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise Incomplete
        self.at += n
        return self.data[self.at - n : self.at]

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "little")

    def varint(self) -> int:
        n = 0
        for shift in range(0, 35, 7):
            byte = self.u8()
            n |= (byte & 0x7F) << shift
            if byte < 0x80:
                return n
        raise FormatError("a number in the file is too long")


@dataclass(frozen=True)
class Header:
    """What a decoder must know before the first level."""

    width: int  # pixels
    height: int
    mode: str  # one of MODES
    rec: str  # one of RECS
    path: str  # one of PATHS
    model: bytes  # first six bytes of the model's hash
    seed: int
    levels: int  # of the whole ladder, whether or not they are in the file
    ratio: int  # nested: cells divide by this from level to level
    finest: int  # nested: SNR of the last level
    timesteps: tuple[int, ...] = ()  # gaussian: t of each level, falling
    icc: bytes = b""
    exif: bytes = b""
    alpha: bytes = b""  # zlib stream of the alpha plane, see image.py

    @property
    def snrs(self) -> list[float]:
        """SNR of each level."""
        if self.rec == "gaussian":
            return [float(Schedule().snr[t]) for t in self.timesteps]
        return [self.finest / self.ratio ** (2 * (self.levels - 1 - i)) for i in range(self.levels)]

    @property
    def ts(self) -> list[int]:
        """Timestep of each level in the paper's schedule (the nearest, for nested)."""
        if self.rec == "gaussian":
            return list(self.timesteps)
        return [Schedule().timestep(s) for s in self.snrs]


@dataclass
class Cut:
    """A place inside a level up to which its payload decodes alone."""

    groups: int  # groups complete at this place
    nbytes: int  # of the payload up to here
    crc: int  # CRC-16 of those bytes


@dataclass
class Level:
    """One level's record. ``payload`` may be shorter than ``cuts`` promise, in a cut file."""

    psnr: float  # dB, of the picture after this level
    last: tuple[int, int, int]  # bands in use per colour component, in zigzag order
    agreed: int  # CRC-16 of the agreed integers
    cuts: list[Cut] = field(default_factory=list)  # rising; the last one is the level's end
    payload: bytes = b""
    start: int = 0  # offset in the file of the payload's first byte
    base: int = 0  # CRC-16 of what the cuts' checksums cover besides the payload

    @property
    def nbytes(self) -> int:
        """Of the whole payload."""
        return self.cuts[-1].nbytes if self.cuts else 0

    @property
    def end(self) -> int:
        """Offset in the whole file of the first byte after the level."""
        return self.start + self.nbytes

    def share(self, received: int) -> float:
        """Of the payload, up to the end of the first ``received`` (>= 1) cuts."""
        return self.cuts[received - 1].nbytes / self.nbytes if self.nbytes else 1.0

    def received(self) -> int:
        """How many of ``cuts`` are there, undamaged."""
        crc, at = self.base, 0
        for i, cut in enumerate(self.cuts):
            crc, at = crc16(self.payload[at : cut.nbytes], crc), cut.nbytes
            if at > len(self.payload) or crc != cut.crc:
                return i
        return len(self.cuts)


@dataclass
class Stream:
    """A parsed file, as far as it goes."""

    header: Header
    levels: list[Level]
    residual: bytes | None  # the lossless layer's record
    size: int  # bytes
    damage: str | None = None  # why parsing stopped early, if not for lack of bytes
    header_size: int = 0  # offset of the first level
    levels_end: int = 0  # offset of the first byte after the last whole level

    @property
    def lossless(self) -> bool:
        return self.residual is not None


def write_header(h: Header) -> bytes:
    flags = MODES.index(h.mode) | RECS.index(h.rec) << 2 | PATHS.index(h.path) << 3
    flags |= bool(h.icc) << 4 | bool(h.exif) << 5
    body = bytes([VERSION, flags]) + varint(h.width) + varint(h.height) + h.model + varint(h.seed)
    body += varint(h.levels)
    if h.rec == "gaussian":
        falling = [1001, *h.timesteps]
        body += b"".join(varint(a - b) for a, b in zip(falling, falling[1:], strict=False))
    else:
        body += bytes([h.ratio]) + varint(h.finest)
    out = MAGIC + body + crc16(body).to_bytes(2, "little")
    for extra, present in ((h.icc, h.icc), (h.exif, h.exif), (h.alpha, "A" in h.mode)):
        if present:
            out += write_blob(extra)
    return out


def write_blob(data: bytes) -> bytes:
    """Length, CRC-32, bytes."""
    return varint(len(data)) + zlib.crc32(data).to_bytes(4, "little") + data


def read_blob(r: Reader) -> bytes:
    n = r.varint()
    crc = int.from_bytes(r.take(4), "little")
    data = r.take(n)
    if zlib.crc32(data) != crc:
        raise FormatError("checksum mismatch")
    return data


def read_header(r: Reader) -> Header:
    """Raises FormatError or LimitError; Incomplete where the bytes end."""
    if r.data[: len(MAGIC)] != MAGIC:
        raise FormatError("not a .ddpm file" if r.data else "the file is empty")
    r.take(len(MAGIC))
    begin = r.at
    version = r.u8()
    if version != VERSION:
        raise FormatError(f"format version {version}; this program reads version {VERSION}")
    flags = r.u8()
    width, height = r.varint(), r.varint()
    model, seed, levels = r.take(6), r.varint(), r.varint()
    ratio, finest, timesteps = 2, 1, []
    if levels > MAX_LEVELS:
        raise FormatError("damaged header")
    if flags & 4:
        t = 1001
        for _ in range(levels):
            t -= r.varint()
            timesteps.append(t)
    else:
        ratio, finest = r.u8(), r.varint()
    end = r.at
    if r.u16() != crc16(r.data[begin:end]):
        raise FormatError("damaged header (checksum mismatch)")
    if flags & 0xC0 or not width or not height or not levels or ratio < 2 or not finest:
        raise FormatError("damaged header (impossible values)")
    if not flags & 4 and ratio**levels > 1 << 31:  # cells are counted in 32 bits
        raise FormatError("damaged header (impossible levels)")
    if any(not 1 <= t <= 1000 for t in timesteps) or timesteps != sorted(set(timesteps))[::-1]:
        raise FormatError("damaged header (impossible timesteps)")
    check_size((width, height))
    mode = MODES[flags & 3]
    icc = read_blob(r) if flags & 16 else b""
    exif = read_blob(r) if flags & 32 else b""
    alpha = read_blob(r) if "A" in mode else b""
    return Header(
        width, height, mode, RECS[flags >> 2 & 1], PATHS[flags >> 3 & 1], model, seed,
        levels, ratio, finest, tuple(timesteps), icc, exif, alpha,
    )  # fmt: skip


def seal(payload: bytes, cuts: list[Cut]) -> list[Cut]:
    """A level's cuts with their checksums: those inside the payload, and its end."""
    cuts = [c for c in cuts if c.groups < GROUPS and c.nbytes < len(payload)]
    cuts.append(Cut(GROUPS, len(payload), 0))
    return [Cut(c.groups, c.nbytes, crc16(payload[: c.nbytes])) for c in cuts]


def write_level(level: Level, rec: str = "nested", before: int = 0) -> bytes:
    """A level's record. before: CRC-16 of the file so far, for a level counts in its place only."""
    *inner, end = level.cuts
    unit = UNITS[rec]
    head = varint(level.nbytes // unit << 1 | bool(inner))
    head += bytes([max(0, min(255, math.floor(min(level.psnr, 99.0) / PSNR_STEP)))])
    if rec == "nested":
        head += bytes(level.last) + level.agreed.to_bytes(2, "little")
    if inner:
        head += varint(len(inner))
    groups = nbytes = 0
    for cut in inner:
        head += varint(cut.groups - groups) + varint((cut.nbytes - nbytes) // unit)
        head += cut.crc.to_bytes(2, "little")
        groups, nbytes = cut.groups, cut.nbytes
    if rec == "gaussian" and not inner:  # all or nothing: one checksum will do
        return (
            head + crc16(level.payload, crc16(head, before)).to_bytes(2, "little") + level.payload
        )
    head += end.crc.to_bytes(2, "little")
    return head + crc16(head, before).to_bytes(2, "little") + level.payload


def read_level(r: Reader, rec: str = "nested", before: int = 0) -> Level:
    """One level, see write_level; its payload may be cut short.

    Raises FormatError; Incomplete inside the head.
    """
    begin = r.at
    total = r.varint()
    unit = UNITS[rec]
    total, some = (total >> 1) * unit, total & 1
    psnr = r.u8() * PSNR_STEP
    last, agreed = (0, 0, 0), 0
    if rec == "nested":
        last, agreed = (r.u8(), r.u8(), r.u8()), r.u16()
    count = r.varint() if some else 0
    if count > GROUPS + 1 or (some and not count):
        raise FormatError("damaged level")
    cuts: list[Cut] = []
    g = n = 0
    for _ in range(count):
        g, n = g + r.varint(), n + r.varint() * unit
        cuts.append(Cut(g, n, r.u16()))
    one = rec == "gaussian" and not some  # checksum, of head and payload
    base = crc16(r.data[begin : r.at], before) if one else 0
    cuts.append(Cut(GROUPS, total, r.u16()))
    end = r.at
    if not one and r.u16() != crc16(r.data[begin:end], before):
        raise FormatError("damaged level (checksum mismatch)")
    if g > GROUPS or n > total or max(last) > 64:
        raise FormatError("damaged level (impossible values)")
    level = Level(psnr, last, agreed, cuts, start=r.at, base=base)
    size = min(total, len(r.data) - r.at)
    level.payload = r.take(size)
    return level


def parse(data: bytes) -> Stream:
    """Read a file as far as it goes.

    Raises FormatError if not even the header is whole, LimitError for absurd sizes. Damage after
    the header ends the parse and is reported in ``damage``; missing bytes are no damage.
    """
    r = Reader(data)
    try:
        header = read_header(r)
    except Incomplete:
        raise FormatError("the file ends inside its header") from None
    stream = Stream(header, [], None, len(data), header_size=r.at, levels_end=r.at)
    crc, begin = 0, 0
    try:
        while len(stream.levels) < header.levels:
            crc, begin = crc16(data[begin : r.at], crc), r.at
            level = read_level(r, header.rec, crc)
            stream.levels.append(level)
            if len(level.payload) < level.nbytes:
                return stream
            if level.received() < len(level.cuts):
                raise FormatError("checksum mismatch")
            stream.levels_end = r.at
        if r.at < len(data):
            stream.residual = read_blob(r)
        if r.at < len(data):
            stream.damage = f"{len(data) - r.at} bytes after the end of the file"
    except Incomplete:
        pass
    except FormatError as e:
        stream.damage = f"{e} after {stream.levels_end} good bytes"
    return stream


def safe_points(data: bytes, stream: Stream) -> Iterator[tuple[int, int, Cut | None]]:
    """(offset in the file, level index, cut) of every place up to which the file decodes alone.

    Not those after which there is no new band group yet, but only the agreement.
    """
    for i, level in enumerate(stream.levels):
        for cut in level.cuts:
            offset = level.start + cut.nbytes
            if cut.groups and offset <= len(data):
                yield offset, i, cut


def parse_stop(stop: str | int) -> tuple[str, float]:
    """``t=500``, ``bpp=0.25``, ``bytes=4000``, ``psnr=32``; a bare number is a timestep."""
    text = str(stop)
    kind, _, value = text.partition("=") if "=" in text else ("t", "", text)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if kind not in ("t", "bpp", "bytes", "psnr") or not math.isfinite(number) or number < 0:
        raise ValueError(f"not a stop point: {text!r} (t=500, bpp=0.25, bytes=4000 or psnr=32)")
    return kind, number


def stop_offset(data: bytes, stream: Stream, stop: str | int) -> int:
    """The length of the shortest prefix that a decoder stopped at ``stop`` needs.

    ``bytes`` and ``bpp``: the last safe point within them; ``t``: all levels whose timestep is at
    least t, with t=0 the whole file; ``psnr``: the first level whose stored PSNR reaches it, or the
    whole file. Where not even the first level fits, the header alone.
    """
    kind, value = parse_stop(stop)
    h = stream.header
    points = [(stream.header_size, 0, None), *safe_points(data, stream)]
    if kind in ("bytes", "bpp"):
        limit = value if kind == "bytes" else value * h.width * h.height / 8
        if limit >= len(data):
            return len(data)
        return max((o for o, _, _ in points if o <= limit), default=stream.header_size)
    if kind == "psnr":
        good = (level.end for level in stream.levels if level.psnr >= value)
        return min(next(good, len(data)), len(data))
    if value == 0 or (len(stream.levels) < h.levels and value <= h.ts[-1]):
        return len(data)
    ends = [level.end for level, t in zip(stream.levels, h.ts, strict=False) if t >= value]
    return min(max(ends, default=stream.header_size), len(data))


def reaches(stream: Stream, stop: str | int) -> bool:
    """Whether complete levels go as far as ``stop``; always of a number of bytes, and of t=0."""
    kind, value = parse_stop(stop)
    whole = [v for v in stream.levels if v.received() == len(v.cuts)]
    if kind == "psnr":
        return any(level.psnr >= value for level in whole)
    return kind != "t" or value == 0 or len(whole) >= sum(t >= value for t in stream.header.ts)


def truncate(
    data: bytes,
    *,
    nbytes: int | None = None,
    bpp: float | None = None,
    stop_at: str | int | None = None,
) -> bytes:
    """The shortest file that decodes to the same picture as ``data`` stopped there.

    Exactly one of the targets. Raises FormatError for what is not a file of ours.
    """
    targets = {"bytes": nbytes, "bpp": bpp}
    stops = [f"{k}={v}" for k, v in targets.items() if v is not None]
    if stop_at is not None:
        stops.append(str(stop_at))
    if len(stops) != 1:
        raise ValueError("give exactly one of nbytes, bpp and stop_at")
    stream = parse(data)
    return data[: stop_offset(data, stream, stops[0])]


def info(data: bytes) -> dict[str, Any]:
    """What a file holds, without decoding it."""
    stream = parse(data)
    h = stream.header
    pixels = h.width * h.height
    levels = []
    for i, level in enumerate(stream.levels):
        if level.received() < len(level.cuts):
            break
        levels.append({"t": h.ts[i], "snr": h.snrs[i], "bytes": level.end,
                       "bpp": 8 * level.end / pixels, "psnr": level.psnr})  # fmt: skip
    return {
        "width": h.width, "height": h.height, "mode": h.mode, "rec": h.rec, "path": h.path,
        "model": h.model.hex(), "seed": h.seed, "lossless": stream.lossless,
        "complete": len(levels) == h.levels, "damage": stream.damage, "bytes": len(data),
        "bpp": 8 * len(data) / pixels, "levels": levels,
    }  # fmt: skip
