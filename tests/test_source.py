"""Bytes in memory, in files, and as they arrive."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest

from ddpm_codec.codec.source import content, pieces

DATA = bytes(range(256)) * 300


def test_content(tmp_path: Path) -> None:
    (path := tmp_path / "x.ddpm").write_bytes(DATA)
    with open(path, "rb") as f:
        sources = (DATA, bytearray(DATA), memoryview(DATA), path, str(path), f, io.BytesIO(DATA))
        assert all(content(source) == DATA for source in sources)
    assert content(b"") == b""
    with pytest.raises(FileNotFoundError):
        content(tmp_path / "none")


def test_pieces(tmp_path: Path) -> None:
    (path := tmp_path / "x.ddpm").write_bytes(DATA)
    with open(path, "rb") as f:
        for source in (DATA, memoryview(DATA), path, str(path), f, [DATA[:9], DATA[9:]]):
            *got, end = pieces(source)
            assert b"".join(p for p in got if p) == DATA and end is None
    assert list(pieces([])) == [None]


def test_bytes_are_yielded_as_they_arrive() -> None:
    a, b = socket.socketpair()
    with a, b, b.makefile("rb") as f:
        arriving = pieces(f)
        for piece in (b"first", b"second"):
            a.sendall(piece)
            assert next(arriving) == piece
        a.close()
        assert list(arriving) == [None]


def test_what_is_not_a_source() -> None:
    with open(__file__) as text:
        wrong = (None, 3, io.StringIO("text"), text)
    for source in wrong:
        with pytest.raises(
            TypeError, match="expected the bytes of a file, a path or a file opened"
        ):
            content(source)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected the bytes"):
            list(pieces(source))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not str"):
        list(pieces(["text"]))  # type: ignore[list-item]
