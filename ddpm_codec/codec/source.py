"""The bytes of a file: from memory, a path, a file object, or in pieces as they arrive."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from ..files import PIECE

File = bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryIO


def content(source: File) -> bytes:
    """All bytes of a file that is given as bytes, as a path or as a binary file object.

    Raises TypeError for anything else, and OSError.
    """
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    return _checked(source.read() if is_binary_file(source) else source)


def pieces(source: File | Iterable[bytes]) -> Iterator[bytes | None]:
    """Yield the bytes as they arrive, and None at the end. Raises as :func:`content`."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as f:
            yield from pieces(f)
        return
    if is_binary_file(source):
        # read1() returns the bytes that have arrived; read() may wait for more.
        read = getattr(source, "read1", source.read)
        while piece := _checked(read(PIECE)):
            yield piece
    elif isinstance(source, bytes | bytearray | memoryview | io.TextIOBase):
        yield _checked(source)
    else:
        yield from map(_checked, source if isinstance(source, Iterable) else [source])
    yield None


def is_binary_file(source: object) -> TypeGuard[BinaryIO]:
    """Whether ``source`` is a file object that is not opened in text mode."""
    return hasattr(source, "read") and not isinstance(source, io.TextIOBase)


def _checked(piece: Any) -> bytes:
    if isinstance(piece, bytes | bytearray | memoryview):
        return bytes(piece)
    raise TypeError(
        f"expected the bytes of a file, a path or a file opened in binary mode, not "
        f"{type(piece).__name__}"
    )
