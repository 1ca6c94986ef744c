"""Many pictures by the command as a process, which is interrupted, killed, and loses workers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ddpm_codec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.name != "posix" or shutil.which("ps") is None, reason="needs signals and ps"
    ),
]
dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs Dask: pip install 'ddpmc[dask]'"
)
HOW: dict[str, Any] = {"steps": 5, "effort": 5}
COUNT = 16  # more than are done before this process, of a busy machine, looks again


class Command:
    """``ddpmc encode in -o out/``, in a session of its own, which a terminal would interrupt."""

    def __init__(self, folder: Path, model: Path, *more: str) -> None:
        self.out, self.err = folder / "stdout", folder / "stderr"
        words = [sys.executable, "-m", "ddpm_codec", "encode", "in", "-o", "out/", "--json"]
        words += ["--model", str(model), "--skip-existing", *more]
        words += [word for k, v in HOW.items() for word in (f"--{k}", str(v))]
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                words, cwd=folder, stdout=out, stderr=err, start_new_session=True,
                # A shell's background jobs, these tests perhaps among them, ignore interrupts.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    def wait_until(self, what: Callable[[], Any]) -> None:
        end = time.monotonic() + 300
        while not what():
            assert self.process.poll() is None and time.monotonic() < end, self.err.read_text()
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """Process ids."""
        # Wide: a pipe has 80 columns.
        ps = ["ps", "-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "args="]
        rows = [row.split() for row in subprocess.check_output(ps, text=True).splitlines()]
        ours = [row for row in rows if row[1] == str(self.process.pid)]
        return [int(pid) for pid, _, *words in ours if "spawn_main" in " ".join(words)]

    def send(self, sign: int) -> int:
        """To all its processes, as a terminal does. Returns the exit status."""
        os.killpg(self.process.pid, sign)
        return self.end()

    def end(self) -> int:
        """The exit status, after which there is no process left."""
        status, end = self.process.wait(300), time.monotonic() + 60
        with suppress(ProcessLookupError, PermissionError):  # macOS says this of dead ones
            while time.monotonic() < end:
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail("its processes live on")
        assert "Traceback" not in self.err.read_text()
        return status

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]


@pytest.fixture(scope="module")
def want(
    tmp_path_factory: pytest.TempPathFactory, picture: Image.Image, tiny_model: Path
) -> dict[str, tuple[bytes, bytes]]:
    """Pictures, and the files that shall become of them."""
    file, made = tmp_path_factory.mktemp("picture") / "a.png", {}
    for i in range(COUNT):
        picture.rotate(i).save(file)
        made[f"sub/{i}"] = file.read_bytes(), ddpm_codec.encode(file, model=tiny_model, **HOW)
    return made


class Place:
    """A folder with pictures, one of which is broken."""

    def __init__(self, folder: Path, model: Path, want: dict[str, tuple[bytes, bytes]]) -> None:
        self.folder, self.model = folder, model
        self.want = {f"{name}.ddpm": file for name, (_, file) in want.items()}
        (folder / "in" / "sub").mkdir(parents=True)
        (folder / "in" / "broken.png").write_text("none")
        for name, (picture, _) in want.items():
            (folder / "in" / f"{name}.png").write_bytes(picture)

    def made(self) -> dict[str, int]:
        """The files that are there, with what tells them from others of that name."""
        out = self.folder / "out"
        files = [p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")]
        for file in files:
            assert file.read_bytes() == self.want[file.relative_to(out).as_posix()]
        return {f"out/{p.relative_to(out).as_posix()}": p.stat().st_ino for p in files}

    def hidden(self) -> list[str]:
        """The names of hidden files: the record, and parts of files that are being written."""
        return [p.name for p in (self.folder / "out").rglob(".*")]

    def begin(self, *more: str) -> Command:
        return Command(self.folder, self.model, *more)

    def finish(self, command: Command) -> list[str]:
        """Let it end. Nothing that is there is made again. Returns what is said of others."""
        before = self.made()
        assert command.end() == 4
        after = self.made()
        assert len(after) == COUNT and before.items() <= after.items()
        lines = command.lines()
        outputs = {f"out/{name}" for name in self.want} | {"out/broken.ddpm"}
        assert len(lines) == COUNT + 1 and {line["output"] for line in lines} == outputs
        told = command.err.read_text().splitlines()
        broken = "ddpmc: in/broken.png: not a picture that Pillow can read"
        assert broken in told
        return [line for line in told if line != broken]


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, want: dict[str, tuple[bytes, bytes]]) -> Place:
    return Place(tmp_path, tiny_model, want)


def test_processes_interrupted_killed_and_gone_on_with(place: Place) -> None:
    command = place.begin("--jobs", "2")
    command.wait_until(place.made)
    assert command.send(signal.SIGINT) == 130
    assert place.hidden() == [".ddpmc.jsonl"]
    first = place.made()
    assert 0 < len(first) < COUNT
    command = place.begin("--jobs", "2")
    command.wait_until(lambda: len(place.made()) > len(first))
    command.process.kill()
    assert command.end() == -signal.SIGKILL
    second = place.made()
    assert len(first) < len(second) < COUNT
    command = place.begin("--jobs", "2")
    command.wait_until(command.workers)
    os.kill(command.workers()[0], signal.SIGKILL)
    (told,) = place.finish(command)
    assert told.endswith("warning: the process that worked on it died; another did it")
    assert {n["output"] for n in command.lines() if n.get("skipped")} == set(second)


@dask
def test_a_cluster_interrupted_and_gone_on_with(place: Place) -> None:
    command = place.begin("--jobs", "2", "--scheduler", "local")
    command.wait_until(place.made)
    assert command.send(signal.SIGINT) == 130
    assert place.hidden() == [".ddpmc.jsonl"]
    first = place.made()
    assert 0 < len(first) < COUNT
    command = place.begin("--jobs", "2", "--scheduler", "local")
    command.wait_until(lambda: len(place.made()) > len(first) and command.workers())
    os.kill(command.workers()[0], signal.SIGKILL)
    assert place.finish(command) == []
    assert {n["output"] for n in command.lines() if n.get("skipped")} == set(first)
