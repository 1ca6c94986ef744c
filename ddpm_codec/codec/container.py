"""The file: a header, the levels' records, extras between them. Bytes in, records out.

Specified in docs/format.md. Every prefix of a file is a valid file: what is needed first comes
first, nothing points ahead, and a record's payload may be cut anywhere. Knows nothing of networks.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

from ..errors import FormatError, Incomplete
from .header import Cursor, Header, crc16, read_header, varint, write_header

EXTRAS = ("icc", "exif", "alpha", "residual")  # kinds of records that are no levels
CHUNK = 1024  # bytes of payload that share a checksum
PSNR_STEP = 0.25  # dB per unit of a level's PSNR byte


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
                self._header = read_header(r)
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
