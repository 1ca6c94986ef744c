"""A file on its way: the bytes that have come so far, read as records, up to a stop point."""

from __future__ import annotations

from collections.abc import Iterable

from .container import Stream, cut
from .source import File, pieces
from .stops import parse_stop, stop_offset


class Arrival:
    """Takes in a file piece by piece. What lies behind the stop point is not waited for."""

    def __init__(self, source: File | Iterable[bytes], stop_at: str | int | None = None) -> None:
        """source: as of :func:`ddpm_codec.decode_levels`. Raises ValueError for no stop point."""
        self._kind = None if stop_at is None else parse_stop(stop_at)[0]
        self._stop = stop_at or 0
        self._pieces = pieces(source)
        self._received, self._seen = bytearray(), Stream()  # all of it
        self._kept = bytearray()  # of it, what counts
        self.stream = self._seen if stop_at is None else Stream()  # what a decoder may use
        self.over = False  # nothing more will come
        self.damage: str | None = None  # before the stop point

    def more(self) -> None:
        """Wait for the next piece. Raises as the source does, and FormatError for a bad header."""
        piece = next(self._pieces)
        self._received += piece or b""
        self._seen.read(self._received, last=piece is None)
        self.over = piece is None or self._seen.ended or self._seen.damage is not None
        if self._kind is None or not self._seen.started:
            self.damage = self._seen.damage
            return
        to, at = stop_offset(self._seen, self._stop), self._seen.read_to
        if self._kind in ("bytes", "bpp"):
            self.over |= at >= to < len(self._received)
        else:  # records that follow a level, an alpha plane say, belong to it: until the next level
            self.over |= at > to and bool(self._seen.levels)
        if self.over:
            self._kept += cut(bytes(self._received), to)[len(self._kept) :]
            self.damage = self._seen.damage if to > at else None
        else:
            self._kept += self._received[len(self._kept) : min(at, to)]
        self.stream.read(self._kept, last=self.over)

    def begin(self, whole: bool = False) -> Stream:
        """Wait until the header is there, or the whole file. Raises FormatError for no header."""
        while not self.over and (whole or not self._seen.started):
            self.more()
        _ = self._seen.header
        return self.stream
