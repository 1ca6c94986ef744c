"""The file: a header, the levels' records, extras between them. Bytes in, records out.

Specified in docs/format.md. Every prefix of a file is a valid file: what is needed first comes
first, nothing points ahead, and a record's payload may be cut anywhere. Knows nothing of networks.
"""

from __future__ import annotations

import binascii
import math
import os
import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..diffusion.schedule import Ladder, Schedule
from ..errors import FormatError, Incomplete, LimitError

MAGIC = b"\x8aDPM\r\n"  # not ASCII, not UTF-8, and damaged by newline conversion (as PNG's)
VERSION = 2
MODES = ("L", "RGB", "LA", "RGBA")
PATHS = ("spectral", "isotropic")
EXTRAS = ("icc", "exif", "alpha", "residual")  # kinds of records that are no levels
EFFORTS = range(1, 10)
MAX_LEVELS = 1000
MAX_HEADER = 8192  # bytes, more than the longest takes
CHUNK = 1024  # bytes of payload that share a checksum
MAX_TUNE = 31
PSNR_STEP = 0.25  # dB per unit of a level's PSNR byte

MEMORY_VARIABLE = "DDPMC_MAX_MEMORY"
MAX_MEMORY = 4.0e9  # bytes
FIXED_MEMORY = 0.6e9  # what torch, the network and one tile take
BYTES_PER_PIXEL = 100  # what all else takes, of a large picture


def memory_limit() -> float:
    """Bytes that a picture may take: ``DDPMC_MAX_MEMORY`` if set, else 4 GB. Raises LimitError."""
    text = os.environ.get(MEMORY_VARIABLE, "")
    try:
        limit = float(text) if text else MAX_MEMORY
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise LimitError(f"{MEMORY_VARIABLE}={text}: not a number of bytes")
    return limit


def check_size(size: tuple[int, int]) -> None:
    """Raises LimitError for a picture that would take more memory than :func:`memory_limit`."""
    needed = FIXED_MEMORY + BYTES_PER_PIXEL * size[0] * size[1]
    if needed > (limit := memory_limit()):
        raise LimitError(
            f"{size[0]}x{size[1]} pixels take about {needed / 1e9:.1f} GB, more than the limit of "
            f"{limit / 1e9:.1f} GB ({MEMORY_VARIABLE})"
        )


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


class Cursor:
    """Reads bytes that may end anywhere. Raises Incomplete where they do."""

    def __init__(self, data: bytes | bytearray, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise Incomplete
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def bits(self, n: int) -> NDArray[np.uint8]:
        """The next n bits, or as many as there are, the highest of a byte first; taken by none."""
        piece = self.data[self.at : self.at + -(-n // 8)]
        return np.unpackbits(np.frombuffer(piece, np.uint8), count=min(n, 8 * len(piece)))

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def varint(self) -> int:
        """Raises FormatError for more than 35 bits."""
        n = 0
        for shift in range(0, 35, 7):
            byte = self.number(1)
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
    path: str  # one of PATHS
    model: bytes  # first six bytes of the model's hash
    seed: int
    effort: int  # one of EFFORTS: the trellis remembers 7 + effort bits
    finest: int  # SNR of rung 0; 0: the levels are timesteps of the paper's schedule
    rungs: tuple[int, ...]  # of each level, falling: half octaves below ``finest``, or timesteps
    tune: tuple[int, int, int] = (0, 0, 0)  # how much less well some bands are known, see tune.py

    @property
    def levels(self) -> int:
        """Of the whole chain, whether or not they are in the file."""
        return len(self.rungs)

    @property
    def snrs(self) -> list[float]:
        """SNR of each level, rising."""
        if not self.finest:
            return [float(Schedule().snr[t]) for t in self.rungs]
        return [Ladder(finest=self.finest).snr(j) for j in self.rungs]

    @property
    def ts(self) -> list[int]:
        """Timestep of each level in the paper's schedule; the nearest, where it has none."""
        if not self.finest:
            return list(self.rungs)
        return [Schedule().timestep(s) for s in self.snrs]


@dataclass
class LevelRecord:
    """One level, as far as it has arrived."""

    psnr: float  # dB, of the picture after this level
    nbytes: int  # of the whole payload
    start: int  # offset in the file of the payload's first byte
    payload: bytearray = field(default_factory=bytearray)  # what is there of it, undamaged
    extras_end: int = 0  # offset behind the extras that follow it, if any do

    @property
    def complete(self) -> bool:
        return len(self.payload) == self.nbytes

    @property
    def end(self) -> int:
        """Offset in the whole file of the first byte after the level."""
        return self.offset(self.nbytes)

    @property
    def until(self) -> int:
        """Behind the extras that follow it, too."""
        return max(self.end, self.extras_end)

    def offset(self, nbytes: int) -> int:
        """Offset in the file behind the first ``nbytes`` of payload and what checks them."""
        return self.start + nbytes + 2 * (-(-nbytes // CHUNK))


class Writer:
    """Puts a file together, record by record."""

    def __init__(self, header: Header) -> None:
        head = write_header(header)
        self._out, self._crc = bytearray(head), crc16(head)

    def __len__(self) -> int:
        return len(self._out)

    def file(self) -> bytes:
        """All that has been written."""
        return bytes(self._out)

    def _write(self, data: bytes) -> None:
        self._out += data
        self._crc = crc16(data, self._crc)

    def level(self, psnr: float, payload: bytes) -> None:
        """psnr: dB, kept in steps of PSNR_STEP, rounded down."""
        self._write(level_head(psnr, len(payload)))
        for begin in range(0, len(payload), CHUNK):
            self._write(payload[begin : begin + CHUNK])
            self._write(self._crc.to_bytes(2, "little"))

    def extra(self, kind: str, data: bytes) -> None:
        """kind: one of EXTRAS."""
        head = varint(len(data) << 1 | 1) + bytes([EXTRAS.index(kind)])
        self._write(head + data)
        self._write(zlib.crc32(head + data).to_bytes(4, "little"))


def level_head(psnr: float, nbytes: int) -> bytes:
    units = max(0, min(255, math.floor(min(psnr, 99.0) / PSNR_STEP)))
    return varint(nbytes << 1) + bytes([units])


def level_size(nbytes: int) -> int:
    """Bytes of a level's record with a payload of ``nbytes``."""
    return len(level_head(0.0, nbytes)) + nbytes + 2 * -(-nbytes // CHUNK)


def extra_size(nbytes: int) -> int:
    """Bytes of the record of an extra of ``nbytes``."""
    return len(varint(nbytes << 1)) + 1 + nbytes + 4


def write_header(h: Header) -> bytes:
    steps = [a - b for a, b in zip(h.rungs, h.rungs[1:], strict=False)]
    even = len(set(steps)) <= 1
    tuned = any(h.tune)
    flags = MODES.index(h.mode) | PATHS.index(h.path) << 2 | even << 3 | tuned << 4
    body = bytes([VERSION, flags]) + varint(h.width) + varint(h.height) + h.model + varint(h.seed)
    body += bytes([h.effort]) + varint(h.finest) + varint(h.levels) + varint(h.rungs[0])
    body += b"".join(varint(n) for n in (steps[:1] if even else steps))
    body += bytes(h.tune) if tuned else b""
    return MAGIC + body + crc16(body).to_bytes(2, "little")


def _read_header(r: Cursor) -> Header:
    """Raises FormatError; Incomplete where the bytes end."""
    magic = bytes(r.data[: len(MAGIC)])
    if magic != MAGIC[: len(magic)]:
        raise FormatError("not a .ddpm file")
    r.take(len(MAGIC))
    begin = r.at
    version = r.number(1)
    if version == 1:
        raise FormatError("made by ddpmc 0.1, whose format is no longer read")
    if version != VERSION:
        raise FormatError(f"format version {version}; this program reads version {VERSION}")
    flags = r.number(1)
    width, height, model, seed = r.varint(), r.varint(), r.take(6), r.varint()
    effort, finest, levels, first = r.number(1), r.varint(), r.varint(), r.varint()
    if not 1 <= levels <= MAX_LEVELS:
        raise FormatError("damaged header (impossible number of levels)")
    even = flags >> 3 & 1
    steps = [r.varint() for _ in range(min(1, levels - 1) if even else levels - 1)]
    steps = steps * (levels - 1) if even else steps
    tune = tuple(r.take(3)) if flags >> 4 & 1 else (0, 0, 0)
    end = r.at
    if r.number(2) != crc16(bytes(r.data[begin:end])):
        raise FormatError("damaged header (checksum mismatch)")
    rungs = [first]
    for step in steps:
        rungs.append(rungs[-1] - step)
    least, largest = (0, 200) if finest else (1, 1000)
    possible = (
        flags < 32 and max(tune) <= MAX_TUNE and width > 0 and height > 0 and effort in EFFORTS
        and finest < 1 << 31 and seed < 1 << 32 and first <= largest and rungs[-1] >= least
        and 0 not in steps
    )  # fmt: skip
    if not possible:
        raise FormatError("damaged header (impossible values)")
    mode, path = MODES[flags & 3], PATHS[flags >> 2 & 1]
    tuned = tune[0], tune[1], tune[2]
    return Header(width, height, mode, path, model, seed, effort, finest, tuple(rungs), tuned)


class Stream:
    """A file as far as it has arrived: what :func:`parse` returns, and :meth:`read` extends."""

    def __init__(self) -> None:
        self.levels: list[LevelRecord] = []
        self.extras: dict[str, bytes] = {}
        self.damage: str | None = None  # why reading stopped, if not for lack of bytes
        self.size = 0  # bytes seen
        self.header_size = 0
        self._header: Header | None = None
        self._at, self._crc = 0, 0  # what has been read, and its checksum

    @property
    def header(self) -> Header:
        """Raises FormatError where not even that is there."""
        if self._header is None:
            raise FormatError("the file ends inside its header" if self.size else "an empty file")
        return self._header

    @property
    def started(self) -> bool:
        """Whether the header is there."""
        return self._header is not None

    @property
    def read_to(self) -> int:
        """Offset behind the last whole record or chunk."""
        return self._at

    @property
    def lossless(self) -> bool:
        return "residual" in self.extras

    @property
    def ended(self) -> bool:
        """Whether nothing may follow: what does is not looked at."""
        return self.lossless and len(self.levels) == self.header.levels

    @property
    def whole_levels(self) -> list[LevelRecord]:
        return [level for level in self.levels if level.complete]

    def read(self, data: bytes | bytearray, last: bool = True) -> None:
        """Go on. data: the file from its beginning, at least as far as before; last: all of it.

        Raises FormatError for a bad header. Damage after it ends the reading and is reported in
        ``damage``; missing bytes are no damage.
        """
        self.size = len(data)
        try:
            if self._header is None:
                r = Cursor(data)
                self._header = _read_header(r)
                self._accept(r)
                self.header_size = r.at
            while self.damage is None and self._at < len(data) and not self.ended:
                self._record(Cursor(data, self._at))
        except Incomplete:
            if last and self.damage is None and self._header is not None:
                self._sealed(Cursor(data, self._at))
        except FormatError as e:
            if self._header is None:
                raise
            self.damage = f"{e} after {self._at} good bytes"

    def _accept(self, r: Cursor) -> None:
        self._crc = crc16(bytes(r.data[self._at : r.at]), self._crc)
        self._at = r.at

    def _record(self, r: Cursor) -> None:
        level = self._level(r)
        if level is None:
            self._extra(r)
            return
        self._extend(level, self._chunk(r, min(CHUNK, level.nbytes - len(level.payload))))
        self._accept(r)

    def _chunk(self, r: Cursor, nbytes: int) -> bytes:
        data = r.take(nbytes)
        if r.number(2) != crc16(bytes(r.data[self._at : r.at - 2]), self._crc):
            raise FormatError("checksum mismatch")
        return data

    def _level(self, r: Cursor) -> LevelRecord | None:
        """The level whose payload comes next, after its head if that is new; None: an extra."""
        if self.levels and not self.levels[-1].complete:
            return self.levels[-1]
        begin = r.at
        n, extra = divmod(r.varint(), 2)
        if extra:
            r.at = begin
            return None
        psnr = r.number(1) * PSNR_STEP
        level = LevelRecord(psnr, n, r.at)
        if n == 0 or len(self.levels) == self.header.levels or self.lossless:
            raise FormatError("a level where none belongs")
        return level

    def _extend(self, level: LevelRecord, data: bytes) -> None:
        level.payload += data
        if level not in self.levels[-1:]:  # its head is sound now, too
            self.levels.append(level)

    def seal(self, data: bytes, nbytes: int) -> bytes:
        """The first ``nbytes`` of ``data`` beyond :attr:`read_to`, the last two a checksum.

        Nothing, unless they are part of a chunk whose own checksum is right.
        """
        r = Cursor(data, self._at)
        try:
            level = self._level(r)
            if level is None or nbytes - r.at <= 2:
                return b""
            left = min(CHUNK, level.nbytes - len(level.payload))
            self._chunk(r, min(left, len(data) - r.at - 2))
        except (Incomplete, FormatError):
            return b""
        rest = data[self._at : nbytes - 2]
        return rest + crc16(rest, self._crc).to_bytes(2, "little")

    def _sealed(self, r: Cursor) -> None:
        """A chunk that :func:`cut` has shortened and given a checksum, at the end of the file."""
        try:
            level = self._level(r)
            if level is None:
                return
            if (nbytes := len(r.data) - r.at - 2) > 0:
                self._extend(level, self._chunk(r, nbytes))
        except (Incomplete, FormatError):
            return

    def _extra(self, r: Cursor) -> None:
        n, kind = r.varint() >> 1, r.number(1)
        data, crc = r.take(n), r.number(4)
        if zlib.crc32(bytes(r.data[self._at : r.at - 4])) != crc or kind >= len(EXTRAS):
            raise FormatError("checksum mismatch")
        if EXTRAS[kind] in self.extras or self.lossless:
            raise FormatError("a record where none belongs")
        self.extras[EXTRAS[kind]] = data
        if self.levels and not self.lossless:
            self.levels[-1].extras_end = r.at
        self._accept(r)


def parse(data: bytes | bytearray) -> Stream:
    """Read a file as far as it goes. Raises FormatError if not even the header is whole."""
    stream = Stream()
    stream.read(data)
    _ = stream.header
    return stream


def cut(data: bytes, nbytes: int) -> bytes:
    """A file of at most ``nbytes`` bytes that holds as much of ``data`` as possible.

    Where it ends inside a sound chunk of payload, the last two bytes are that part's checksum;
    damage before stays. Raises FormatError if nbytes do not hold the header.
    """
    if nbytes >= len(data):
        return data
    stream, prefix = Stream(), data[:nbytes]
    stream.read(prefix, last=False)
    _ = stream.header
    if stream.damage is not None:
        return prefix
    return prefix[: stream.read_to] + stream.seal(data, nbytes)
