"""The header of a file, and the coding of its numbers (docs/format.md, section 1)."""

from __future__ import annotations

import binascii
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..diffusion.schedule import Ladder, Schedule
from ..errors import FormatError, Incomplete

MAGIC = b"\x8aDPM\r\n"  # like PNG's: neither ASCII nor UTF-8, and newline conversion damages it
VERSION = 2
MODES = ("L", "RGB", "LA", "RGBA")
PATHS = ("spectral", "isotropic")
EFFORTS = range(1, 10)
MAX_LEVELS = 1000
MAX_RUNG = 200
MAX_SEED = 2**32 - 1
MAX_TUNE = 31
MAX_HEADER = 8192  # bytes; no header is that long
CRC_SIZE = 2  # bytes


def crc16(data: bytes, start: int = 0) -> int:
    """CRC-16/XMODEM of ``data``, continuing from the CRC ``start``."""
    return binascii.crc_hqx(data, start)


def crc_bytes(crc: int) -> bytes:
    """A CRC-16 as it stands in a file."""
    return crc.to_bytes(CRC_SIZE, "little")


def varint(n: int) -> bytes:
    """LEB128: seven bits per byte, low bits first."""
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


class Cursor:
    """Reads items from bytes that may end anywhere. Raises Incomplete if an item is cut off."""

    def __init__(self, data: bytes | bytearray, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise Incomplete
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def bits(self, n: int) -> NDArray[np.uint8]:
        """The next n bits, highest bit of a byte first; fewer at the end. The cursor stays."""
        piece = self.data[self.at : self.at + -(-n // 8)]
        return np.unpackbits(np.frombuffer(piece, np.uint8), count=min(n, 8 * len(piece)))

    def number(self, nbytes: int) -> int:
        """A little-endian integer."""
        return int.from_bytes(self.take(nbytes), "little")

    def varint(self) -> int:
        """A LEB128 integer. Raises FormatError for more than 35 bits."""
        n = 0
        for shift in range(0, 35, 7):
            byte = self.number(1)
            n |= (byte & 0x7F) << shift
            if byte < 0x80:
                return n
        raise FormatError("a number in the file is too long")


@dataclass(frozen=True)
class Header:
    """The parameters that a decoder needs before the first level."""

    width: int  # pixels
    height: int
    mode: str  # one of MODES
    path: str  # one of PATHS
    model: bytes  # first six bytes of the model's hash
    seed: int
    effort: int  # one of EFFORTS: the trellis has a memory of 7 + effort bits
    finest: int  # SNR of rung 0; 0 if the levels are timesteps of the paper's schedule
    rungs: tuple[int, ...]  # of each level, falling: half octaves below ``finest``, or timesteps
    tune: tuple[int, int, int] = (0, 0, 0)  # loss of precision of some bands, see tune.py

    @property
    def pixels(self) -> int:
        """Number of pixels of the picture."""
        return self.width * self.height

    @property
    def levels(self) -> int:
        """Number of levels of the whole chain; a cut file holds fewer."""
        return len(self.rungs)

    @property
    def snrs(self) -> list[float]:
        """SNR of each level, rising."""
        if not self.finest:
            return [float(Schedule().snr[t]) for t in self.rungs]
        return [Ladder(finest=self.finest).snr(j) for j in self.rungs]

    @property
    def ts(self) -> list[int]:
        """Timestep of each level, falling; for a rung, the timestep whose SNR is nearest."""
        if not self.finest:
            return list(self.rungs)
        return [Schedule().timestep(s) for s in self.snrs]


def write_header(h: Header) -> bytes:
    """The bytes of a header."""
    steps = [a - b for a, b in zip(h.rungs, h.rungs[1:], strict=False)]
    even = len(set(steps)) <= 1
    tuned = any(h.tune)
    flags = MODES.index(h.mode) | PATHS.index(h.path) << 2 | even << 3 | tuned << 4
    body = bytes([VERSION, flags]) + varint(h.width) + varint(h.height) + h.model + varint(h.seed)
    body += bytes([h.effort]) + varint(h.finest) + varint(h.levels) + varint(h.rungs[0])
    body += b"".join(varint(n) for n in (steps[:1] if even else steps))
    body += bytes(h.tune) if tuned else b""
    return MAGIC + body + crc_bytes(crc16(body))


def read_header(r: Cursor) -> Header:
    """Read a header. Raises FormatError for an invalid one, Incomplete for one that is cut off."""
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
    if r.number(CRC_SIZE) != crc16(bytes(r.data[begin:end])):
        raise FormatError("damaged header (checksum mismatch)")
    rungs = [first]
    for step in steps:
        rungs.append(rungs[-1] - step)
    lowest, highest = (0, MAX_RUNG) if finest else (1, Schedule.T)
    valid = (
        flags < 32 and max(tune) <= MAX_TUNE and width > 0 and height > 0 and effort in EFFORTS
        and finest < 1 << 31 and seed <= MAX_SEED and first <= highest and rungs[-1] >= lowest
        and 0 not in steps
    )  # fmt: skip
    if not valid:
        raise FormatError("damaged header (impossible values)")
    mode, path = MODES[flags & 3], PATHS[flags >> 2 & 1]
    tuned = tune[0], tune[1], tune[2]
    return Header(width, height, mode, path, model, seed, effort, finest, tuple(rungs), tuned)
