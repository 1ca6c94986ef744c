"""The command as a process: standard streams, pipes, devices, links, encodings."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ddpm_codec.codec import encoder, stops

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


class Process:
    """Runs lines of a shell in a folder with a file; ``ddpmc`` is the command."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.out, self.err = b"", ""

    def __call__(self, line: str, keep: tuple[int, ...] = (), **environment: str) -> int:
        """keep: descriptors that the shell inherits."""
        run = shlex.join([sys.executable, "-m", "ddpm_codec"])
        done = subprocess.run(
            [str(BASH), "-c", f'ddpmc() {{ {run} "$@"; }}\n{line}'], stdin=subprocess.DEVNULL,
            capture_output=True, check=False, pass_fds=keep, cwd=self.folder,
            env=os.environ | environment, timeout=120,
        )  # fmt: skip
        self.out, self.err = done.stdout, done.stderr.decode(errors="surrogateescape")
        assert "Traceback" not in self.err and "Exception ignored" not in self.err
        return done.returncode


@pytest.fixture(scope="module")
def encoded(tiny_model: Path, picture: Image.Image) -> bytes:
    return encoder.encode(picture, model=tiny_model, steps=4, effort=1)


@pytest.fixture
def shell(tmp_path: Path, tiny_model: Path, encoded: bytes) -> Process:
    (tmp_path / "a.ddpm").write_bytes(encoded)
    return Process(tmp_path, tiny_model)


CUT = "ddpmc truncate a.ddpm --bytes 100 -q -o"


# --- Standard streams --------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "kind"), [("", "PNG"), ("--format jpg", "JPEG")])
def test_a_picture_on_standard_output(shell: Process, more: str, kind: str) -> None:
    assert shell(f"ddpmc decode a.ddpm -o - --model {shell.model} {more}") == 0
    with Image.open(io.BytesIO(shell.out)) as im:
        assert (im.format, im.size) == (kind, (40, 28))
    assert shell.err.count("\n") == 1


def test_a_sheet_on_standard_output(shell: Process, small_model: Path) -> None:
    assert shell(f"ddpmc sample -n 1 --steps 2 -o - --model {small_model}") == 0
    with Image.open(io.BytesIO(shell.out)) as im:
        assert (im.format, im.size) == ("PNG", (32, 32))


def test_a_pipeline(shell: Process, encoded: bytes) -> None:
    line = "cat a.ddpm | ddpmc truncate - --bytes 300 -o - | ddpmc truncate - --bytes 200 -o -"
    assert shell(line) == 0
    assert shell.out == stops.truncate(encoded, bytes=200)


@pytest.mark.parametrize(
    ("line", "status", "err"),
    [
        (f"{CUT} b.ddpm <&-", 0, ""),
        (f"{CUT} b.ddpm >&-", 0, ""),
        (f"{CUT} b.ddpm 2>&-", 0, ""),
        (f"{CUT} b.ddpm <&- >&- 2>&-", 0, ""),
        ("ddpmc truncate - --bytes 100 -o b.ddpm <&-", 1, "standard input: Bad file descriptor"),
        (f"{CUT} - >&-", 1, "standard output: Bad file descriptor"),
        ("ddpmc info a.ddpm a.ddpm >&-", 1, "standard output: Bad file descriptor"),
        ("ddpmc info a.ddpm a.ddpm --json >&-", 1, "standard output: Bad file descriptor"),
        ("ddpmc info none >&- 2>&-", 1, ""),
        ("ddpmc truncate a.ddpm -o b 2>&-", 2, ""),
        (r"f=$'\xff'; echo no > $f; ddpmc info $f 2>&-", 5, ""),
    ],
)
def test_closed_streams(shell: Process, encoded: bytes, line: str, status: int, err: str) -> None:
    assert shell(line) == status
    assert shell.err == (f"ddpmc: {err}\n" if err else "") and shell.out == b""
    made = shell.folder / "b.ddpm"
    assert made.exists() == (status == 0)
    if made.exists():  # it has not become one of the streams
        assert made.read_bytes() == stops.truncate(encoded, bytes=100)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("line", "status", "lines"),
    [
        ("ddpmc info a.ddpm a.ddpm > /dev/full", 1, 1),
        ("ddpmc info a.ddpm a.ddpm --json > /dev/full", 1, 1),
        ("ddpmc info none 2> /dev/full", 1, 0),
        ("ddpmc truncate a.ddpm --bytes 100 -o b.ddpm 2> /dev/full", 0, 0),
    ],
)
def test_full_streams(shell: Process, line: str, status: int, lines: int) -> None:
    assert shell(line) == status
    assert shell.err.count("\n") == lines and shell.out == b""


@pytest.mark.parametrize("what", ["ddpmc info a.ddpm", f"{CUT} -", "ddpmc --help"])
def test_a_reader_that_wants_no_more(shell: Process, what: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert shell(f"{what} >&{writer}", keep=(writer,)) == 1
    finally:
        os.close(writer)
    assert shell.err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", ["日本.ddpm", os.fsdecode(b"\xff.ddpm")])
def test_names_that_an_encoding_lacks(
    shell: Process, encoded: bytes, encoding: str, name: str
) -> None:
    (shell.folder / name).write_bytes(encoded)
    assert shell("ddpmc info *.ddpm missing-*", PYTHONIOENCODING=encoding) == 1
    assert shell.out.count(b"40x28 RGB") == 2 and shell.err.count("\n") == 1
    assert shell("ddpmc info *.ddpm --json", PYTHONIOENCODING=encoding) == 0
    assert {json.loads(line)["input"] for line in shell.out.splitlines()} == {"a.ddpm", name}


# --- Pipes, devices, links ---------------------------------------------------------------------


def test_process_substitution_and_named_pipes(shell: Process, encoded: bytes) -> None:
    want = stops.truncate(encoded, bytes=100)
    assert shell(f"{CUT} >(cat > b.ddpm); wait $!") == 0
    assert (shell.folder / "b.ddpm").read_bytes() == want
    assert shell(f"mkfifo p; cat p > c.ddpm & {CUT} p --force && wait") == 0
    assert (shell.folder / "c.ddpm").read_bytes() == want
    assert stat.S_ISFIFO((shell.folder / "p").stat().st_mode)
    assert shell(f"cat p & ddpmc decode a.ddpm --model {shell.model} -q -o p && wait") == 0
    assert Image.open(io.BytesIO(shell.out)).format == "PNG"


def test_devices_stay(shell: Process) -> None:
    assert shell(f"{CUT} /dev/null --force && test -c /dev/null") == 0
    assert shell(f"{CUT} /dev/null && {CUT} /dev/stdout | cat") == 0
    assert len(shell.out) == 100


def test_links_are_followed(shell: Process, encoded: bytes) -> None:
    want = stops.truncate(encoded, bytes=100)
    target, link = shell.folder / "sub" / "b.ddpm", shell.folder / "link"
    target.parent.mkdir()
    link.symlink_to("sub/b.ddpm")
    assert shell(f"{CUT} link") == 0  # to where nothing is
    assert link.is_symlink() and target.read_bytes() == want
    target.write_text("precious")
    target.chmod(0o600)
    assert shell(f"{CUT} link") == 1
    assert target.read_text() == "precious"
    assert shell(f"{CUT} link --force") == 0
    assert link.is_symlink() and target.read_bytes() == want
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
