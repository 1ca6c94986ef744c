"""The file: a header, then records of levels and extras (docs/format.md, section 2).

Every prefix of a file that holds the header is a valid file: nothing in it points ahead, and a
level's payload may be cut anywhere. This module parses and writes records; it needs no network.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

from ..errors import FormatError, Incomplete
from .header import (
    CRC_SIZE,
    Cursor,
    Header,
    crc16,
    crc_bytes,
    read_header,
    varint,
    write_header,
)

EXTRAS = ("icc", "exif", "alpha", "residual")  # kinds of extras, by their number in the file
CHUNK = 1024  # bytes of payload for each checksum
PSNR_STEP = 0.25  # dB, the unit of a level's PSNR byte


@dataclass
class LevelRecord:
    """One level, as far as it has arrived. Offsets count from the beginning of the file."""

    psnr: float  # dB, of the picture after this level
    nbytes: int  # length of the whole payload
    start: int  # offset of the payload's first byte
    payload: bytearray = field(default_factory=bytearray)  # the part that is present and sound
    extras_end: int = 0  # offset of the end of the extras after this level; 0: there are none

    @property
    def complete(self) -> bool:
        """Whether the whole payload has arrived."""
        return len(self.payload) == self.nbytes

    @property
    def end(self) -> int:
        """Offset of the end of the level."""
        return self.offset(self.nbytes)

    @property
    def until(self) -> int:
        """Offset of the end of the level and of the extras after it."""
        return max(self.end, self.extras_end)

    def offset(self, nbytes: int) -> int:
        """Offset of the end of the first ``nbytes`` of payload and their checksums."""
        return self.start + checked_size(nbytes)


class Writer:
    """Writes a file, record by record."""

    def __init__(self, header: Header) -> None:
        head = write_header(header)
        self._out, self._crc = bytearray(head), crc16(head)

    def __len__(self) -> int:
        return len(self._out)

    def file(self) -> bytes:
        """All bytes that have been written."""
        return bytes(self._out)

    def _write(self, data: bytes) -> None:
        self._out += data
        self._crc = crc16(data, self._crc)

    def level(self, psnr: float, payload: bytes) -> None:
        """Write a level. psnr: dB; it is rounded down to a multiple of PSNR_STEP."""
        self._write(level_head(psnr, len(payload)))
        for begin in range(0, len(payload), CHUNK):
            self._write(payload[begin : begin + CHUNK])
            self._write(crc_bytes(self._crc))

    def extra(self, kind: str, data: bytes) -> None:
        """Write an extra. kind: one of EXTRAS."""
        head = varint(len(data) << 1 | 1) + bytes([EXTRAS.index(kind)])
        self._write(head + data)
        self._write(zlib.crc32(head + data).to_bytes(4, "little"))


def level_head(psnr: float, nbytes: int) -> bytes:
    """The bytes of a level's record before its payload of ``nbytes``."""
    units = max(0, min(255, math.floor(min(psnr, 99.0) / PSNR_STEP)))
    return varint(nbytes << 1) + bytes([units])


def level_size(nbytes: int) -> int:
    """Length of a level's record with a payload of ``nbytes``."""
    return len(level_head(0.0, nbytes)) + checked_size(nbytes)


def checked_size(nbytes: int) -> int:
    """Length of ``nbytes`` of payload with the checksums of their chunks."""
    return nbytes + CRC_SIZE * -(-nbytes // CHUNK)


def extra_size(nbytes: int) -> int:
    """Length of the record of an extra of ``nbytes``."""
    return len(varint(nbytes << 1)) + 1 + nbytes + 4


class Stream:
    """The parsed records of a file, as far as it has arrived. :meth:`read` parses more of it."""

    def __init__(self) -> None:
        self.levels: list[LevelRecord] = []
        self.extras: dict[str, bytes] = {}
        self.damage: str | None = None  # what is wrong where parsing stopped; None at a mere end
        self.size = 0  # bytes given so far
        self.sealed = False  # whether it ends with a chunk that :func:`cut` has shortened
        self.header_size = 0
        self._header: Header | None = None
        self._at, self._crc = 0, 0  # number of bytes parsed, and their checksum

    @property
    def header(self) -> Header:
        """The header. Raises FormatError if the file ends before or inside it."""
        if self._header is None:
            raise FormatError("the file ends inside its header" if self.size else "an empty file")
        return self._header

    @property
    def started(self) -> bool:
        """Whether the header has arrived."""
        return self._header is not None

    @property
    def read_to(self) -> int:
        """Offset of the end of the last whole record or chunk that was parsed."""
        return self._at

    @property
    def lossless(self) -> bool:
        """Whether the lossless layer has arrived."""
        return "residual" in self.extras

    @property
    def ended(self) -> bool:
        """Whether the last possible record has arrived. Bytes after it are ignored."""
        return self.lossless and len(self.levels) == self.header.levels

    @property
    def whole_levels(self) -> list[LevelRecord]:
        """The complete levels."""
        return [level for level in self.levels if level.complete]

    def read(self, data: bytes | bytearray, last: bool = True) -> None:
        """Parse the new bytes of a file.

        data: the file from its first byte on, at least as long as before; last: whether it is the
        whole file. Raises FormatError for an invalid header. Damage after the header ends the
        parsing and is reported in ``damage``; missing bytes are not damage.
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
                self._sealed_chunk(Cursor(data, self._at))
        except FormatError as e:
            if self._header is None:
                raise
            self.damage = f"{e} after {self._at} good bytes"

    def _accept(self, r: Cursor) -> None:
        """Count all bytes before the cursor as parsed."""
        self._crc = crc16(bytes(r.data[self._at : r.at]), self._crc)
        self._at = r.at

    def _record(self, r: Cursor) -> None:
        """Parse an extra, or the next chunk of a level."""
        level = self._level(r)
        if level is None:
            self._extra(r)
            return
        self._extend(level, self._chunk(r, min(CHUNK, level.nbytes - len(level.payload))))
        self._accept(r)

    def _chunk(self, r: Cursor, nbytes: int) -> bytes:
        """``nbytes`` of payload, whose checksum follows. Raises FormatError if it is wrong."""
        data = r.take(nbytes)
        if r.number(CRC_SIZE) != crc16(bytes(r.data[self._at : r.at - CRC_SIZE]), self._crc):
            raise FormatError("checksum mismatch")
        return data

    def _level(self, r: Cursor) -> LevelRecord | None:
        """The level that the next chunk belongs to; None if the next record is an extra.

        The head of a new level is parsed on the way.
        """
        if self.levels and not self.levels[-1].complete:
            return self.levels[-1]
        begin = r.at
        nbytes, extra = divmod(r.varint(), 2)
        if extra:
            r.at = begin
            return None
        psnr = r.number(1) * PSNR_STEP
        level = LevelRecord(psnr, nbytes, r.at)
        if nbytes == 0 or len(self.levels) == self.header.levels or self.lossless:
            raise FormatError("a level where none belongs")
        return level

    def _extend(self, level: LevelRecord, data: bytes) -> None:
        level.payload += data
        if level not in self.levels[-1:]:  # the first chunk's checksum covers the head, too
            self.levels.append(level)

    def seal(self, data: bytes, nbytes: int) -> bytes:
        """The bytes of ``data`` from :attr:`read_to` to ``nbytes``, the last two made a checksum.

        Empty unless these bytes are part of a chunk whose own checksum in ``data`` is right.
        """
        r = Cursor(data, self._at)
        try:
            level = self._level(r)
            if level is None or nbytes - r.at <= CRC_SIZE:
                return b""
            left = min(CHUNK, level.nbytes - len(level.payload))
            self._chunk(r, min(left, len(data) - r.at - CRC_SIZE))
        except (Incomplete, FormatError):
            return b""
        part = data[self._at : nbytes - CRC_SIZE]
        return part + crc_bytes(crc16(part, self._crc))

    def _sealed_chunk(self, r: Cursor) -> None:
        """Parse a chunk at the end of the file that :func:`cut` has shortened and sealed."""
        try:
            level = self._level(r)
            if level is None:
                return
            if (nbytes := len(r.data) - r.at - CRC_SIZE) > 0:
                self._extend(level, self._chunk(r, nbytes))
                self.sealed = True
        except (Incomplete, FormatError):
            return

    def _extra(self, r: Cursor) -> None:
        nbytes, kind = r.varint() >> 1, r.number(1)
        data, crc = r.take(nbytes), r.number(4)
        if zlib.crc32(bytes(r.data[self._at : r.at - 4])) != crc or kind >= len(EXTRAS):
            raise FormatError("checksum mismatch")
        if EXTRAS[kind] in self.extras or self.lossless:
            raise FormatError("a record where none belongs")
        self.extras[EXTRAS[kind]] = data
        if self.levels and not self.lossless:
            self.levels[-1].extras_end = r.at
        self._accept(r)


def parse(data: bytes | bytearray) -> Stream:
    """Parse a file as far as it is present and sound. Raises FormatError without a sound header."""
    stream = Stream()
    stream.read(data)
    _ = stream.header
    return stream


def cut(data: bytes, nbytes: int) -> bytes:
    """A file of at most ``nbytes`` bytes that holds as much of the file ``data`` as possible.

    If it ends inside a sound chunk of payload, its last two bytes are the checksum of the part that
    is left; damaged bytes never get a new checksum. Raises FormatError if ``nbytes`` do not hold
    the header.
    """
    if nbytes >= len(data):
        return data
    stream, prefix = Stream(), data[:nbytes]
    stream.read(prefix, last=False)
    _ = stream.header
    if stream.damage is not None:
        return prefix
    return prefix[: stream.read_to] + stream.seal(data, nbytes)
