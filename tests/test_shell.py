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
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddpm_codec.codec import decoder, encoder, stops
from ddpm_codec.codec.container import parse

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


# --- Slow pipes --------------------------------------------------------------------------------


class Sender:
    """A ``decode --all levels`` that is sent a file in dribs, by standard input or a named pipe."""

    def __init__(self, folder: Path, line: str, pipe: Path | None = None) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ddpm_codec", "decode", *shlex.split(line), "--all", "levels"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder,
            bufsize=0,
        )  # fmt: skip
        self.to: Any = pipe.open("wb", buffering=0) if pipe else self.process.stdin

    def send(self, data: bytes) -> None:
        with suppress(BrokenPipeError):
            for at in range(0, len(data), 50):
                self.to.write(data[at : at + 50])

    def pictures(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "levels").glob("[!.]*"))

    def wait_for(self, n: int) -> list[str]:
        """Until so many pictures are there. Fails after a minute."""
        end = time.monotonic() + 60
        while len(names := self.pictures()) < n:
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)
        return names

    def end(self) -> tuple[int, str]:
        with self.process, self.to:  # closes what is sent, then waits
            assert self.process.stderr
            self.to.close()
            err = self.process.stderr.read().decode()
        return self.process.returncode, err


@pytest.mark.parametrize("pipe", [None, "p.ddpm"])
def test_levels_of_a_slow_pipe_are_written_as_they_arrive(
    shell: Process, encoded: bytes, pipe: str | None
) -> None:
    """The first picture is there before the sender has sent the rest; it stops in the third."""
    if pipe:
        os.mkfifo(shell.folder / pipe)
    named = shell.folder / pipe if pipe else None
    sender = Sender(shell.folder, f"{pipe or '-'} --model {shell.model}", named)
    stem, ts = "p" if pipe else "stdin", parse(encoded).header.ts
    first, second, third = parse(encoded).levels[:3]
    sender.send(encoded[: first.end])
    assert sender.wait_for(1) == [f"{stem}-t{ts[0]:04d}.png"]
    sender.send(encoded[first.end : second.end])
    sender.wait_for(2)
    sender.send(encoded[second.end : third.end - 9])
    assert sender.end()[0] == 0
    whole = [f"{stem}-t{t:04d}.png" for t in ts[1::-1]]
    assert [n for n in sender.pictures() if "part" not in n] == whole
    levels = decoder.decode_levels(encoded[: second.end], model=shell.model)
    for name, level in zip(whole[::-1], levels, strict=True):
        assert Image.open(shell.folder / "levels" / name).tobytes() == level.image.tobytes()


def test_a_slow_pipe_is_read_up_to_a_stop_point(shell: Process, encoded: bytes) -> None:
    """The command ends though the sender goes on."""
    t = parse(encoded).header.ts[1]
    sender = Sender(shell.folder, f"- --model {shell.model} --stop-at t={t} -q")
    sender.send(encoded[: parse(encoded).levels[2].end])
    assert sender.process.wait(timeout=60) == 0
    assert len(sender.pictures()) == 2 and sender.end() == (0, "")


def test_a_slow_pipe_overwrites_nothing(shell: Process, encoded: bytes) -> None:
    """What is in the way of any level is found when the header is there."""
    (shell.folder / "levels").mkdir()
    name = f"stdin-t{parse(encoded).header.ts[2]:04d}.png"
    (shell.folder / "levels" / name).write_text("precious")
    sender = Sender(shell.folder, f"- --model {shell.model}")
    sender.send(encoded[: parse(encoded).header_size])
    assert sender.process.wait(timeout=60) == 1
    assert sender.pictures() == [name]
    assert sender.end()[1] == f"ddpmc: levels/{name}: exists already (--force overwrites it)\n"


@pytest.mark.parametrize(
    ("sent", "status", "err"),
    [
        (lambda data: data[:12], 5, "the file ends inside its header"),
        (lambda data: data[: parse(data).levels[1].end] + bytes(99), 3, "warning: damaged ("),
    ],
)
def test_a_slow_pipe_with_something_else(
    shell: Process, encoded: bytes, sent: Callable[[bytes], bytes], status: int, err: str
) -> None:
    sender = Sender(shell.folder, f"- --model {shell.model} -q")
    sender.send(sent(encoded))
    got, text = sender.end()
    assert got == status and text.startswith(f"ddpmc: stdin: {err}") and text.count("\n") == 1
    assert len(sender.pictures()) == (2 if status == 3 else 0)
