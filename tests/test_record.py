"""What an output folder remembers: what is done, what is ours, and broken lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddpm_codec.batch.record import NAME, Record, sha256

OPTIONS = {"command": "encode", "steps": 5}
SOURCE = sha256(b"source")


@pytest.fixture
def dest(tmp_path: Path) -> str:
    """Made, and written down."""
    path = tmp_path / "sub" / "a.ddpm"
    path.parent.mkdir()
    Record(tmp_path, OPTIONS).add(str(path), b"made", SOURCE, False)
    path.write_bytes(b"made")
    return str(path)


def test_a_line(tmp_path: Path, dest: str) -> None:
    assert json.loads((tmp_path / NAME).read_text()) == {
        "output": "sub/a.ddpm", "sha256": sha256(b"made"), "source": SOURCE, "options": OPTIONS,
        "damaged": False,
    }  # fmt: skip


def test_done_is_same_source_same_options_same_file(tmp_path: Path, dest: str) -> None:
    record = Record(tmp_path, OPTIONS)
    assert record.done(dest, SOURCE) and record.made(dest)
    assert not record.done(dest, sha256(b"another"))
    other = Record(tmp_path, OPTIONS | {"steps": 6})
    assert not other.done(dest, SOURCE) and other.made(dest)
    Path(dest).write_bytes(b"edited")
    assert not record.done(dest, SOURCE) and not record.made(dest)
    Path(dest).unlink()
    assert not record.done(dest, SOURCE) and not record.made(dest)


def test_what_is_damaged_is_never_done(tmp_path: Path) -> None:
    record, path = Record(tmp_path, OPTIONS), tmp_path / "a.png"
    record.add(str(path), b"made", SOURCE, True)
    path.write_bytes(b"made")
    assert record.made(str(path)) and not record.done(str(path), SOURCE)


def test_a_run_killed_before_its_file_appears(tmp_path: Path, dest: str) -> None:
    """The line is there, the file is the old one: which is what it is said to be."""
    other = Record(tmp_path, OPTIONS | {"steps": 6})
    other.add(dest, b"never written", SOURCE, False)
    assert not Record(tmp_path, other.options).done(dest, SOURCE)
    assert Record(tmp_path, OPTIONS).done(dest, SOURCE)


def test_the_same_line_is_written_once(tmp_path: Path, dest: str) -> None:
    before = (tmp_path / NAME).read_bytes()
    Record(tmp_path, OPTIONS).add(dest, b"made", SOURCE, False)
    assert (tmp_path / NAME).read_bytes() == before


@pytest.mark.parametrize(
    "rest", [b'{"output": "sub/a.d', b"\xff\xfe\n", b"[]\n", b'{"output": 1}\n{"sha256": 2}\n\n']
)
def test_broken_lines_are_passed_over(tmp_path: Path, dest: str, rest: bytes) -> None:
    with open(tmp_path / NAME, "ab") as f:
        f.write(rest)
    record = Record(tmp_path, OPTIONS)
    assert record.done(dest, SOURCE)
    record.add(str(tmp_path / "b"), b"new", SOURCE, False)
    (tmp_path / "b").write_bytes(b"new")
    assert Record(tmp_path, OPTIONS).done(str(tmp_path / "b"), SOURCE)
