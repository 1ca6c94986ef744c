"""Input and output files: which are replaced, written into, or refused before any work."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ddpm_codec import files
from ddpm_codec.errors import ImageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Outputs -----------------------------------------------------------------------------------


def test_outputs_are_checked_before_the_work() -> None:
    Path("old").write_text("precious")
    Path("sub").mkdir()
    Path("link").symlink_to("none/b")
    for dest, force, message in (
        ("old", False, "exists already"), ("sub", True, "is a folder"),
        ("none/b", True, "its folder does not exist"), ("old/b", True, "its folder does not exist"),
        ("link", True, "its folder does not exist"), ("b" * 300, True, "File name too long"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=message) as e:
            files.check_output(dest, force)
        assert e.value.filename == dest
    for dest, force in (("old", True), ("sub/b", False), ("-", False), (os.devnull, False)):
        files.check_output(dest, force)
    assert sorted(os.listdir()) == ["link", "old", "sub"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_nothing_can_be_written_to() -> None:
    Path("sub").mkdir(mode=0o555)
    with pytest.raises(PermissionError) as e:
        files.check_output("sub/b", force=True)
    assert e.value.filename == "sub/b"


def test_errors_name_the_output_not_the_partial_file() -> None:
    with pytest.raises(OSError) as e, files.replacing(Path("none/b")) as partial:
        partial.write_bytes(b"x")
    assert e.value.filename == "none/b"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_gets_the_whole_and_stays() -> None:
    """A pipe is not replaced. Model files and checkpoints are written in the same way."""
    os.mkfifo("p")
    with subprocess.Popen(["cat", "p"], stdout=subprocess.PIPE) as reader:
        with files.replacing(Path("p")) as partial:
            partial.write_bytes(b"model")
        assert reader.communicate(timeout=60)[0] == b"model"
    assert stat.S_ISFIFO(os.stat("p").st_mode) and os.listdir() == ["p"]


def test_inputs_are_no_outputs() -> None:
    Path("a").touch()
    Path("link").symlink_to("a")
    for dest in ("a", "./a", "link"):
        with pytest.raises(ValueError, match="is an input"):
            files.refuse_inputs(dest, ["-", "a"])
    files.refuse_inputs("-", ["-", "a"])
    with pytest.raises(ValueError, match="a is an input"):
        files.destinations(["b", "a"], ".", "", ())


# --- Pictures ----------------------------------------------------------------------------------


def test_formats() -> None:
    assert files.picture_format("a.JPG") == "JPEG"
    assert files.picture_format("a.jpg", "png") == files.picture_format("-") == "PNG"
    assert files.picture_format(os.devnull) == "PNG"
    for dest, suffix in (("a", None), ("a.png", "xyz"), ("a.xyz", None)):
        with pytest.raises(ImageError, match=r"no picture format has the suffix .*\.png"):
            files.picture_format(dest, suffix)


@pytest.mark.parametrize(
    ("mode", "size", "suffix"),
    [("RGBA", (8, 8), "jpg"), ("RGBA", (8, 8), "pcx"), ("LA", (8, 8), "eps"),
     ("L", (70000, 1), "jpg"), ("L", (17000, 1), "webp")],
)  # fmt: skip
def test_a_format_that_does_not_hold_the_picture(
    mode: str, size: tuple[int, int], suffix: str
) -> None:
    picture = Image.new(mode, size)
    with pytest.raises(ImageError, match=rf"does not hold this picture, {size[0]}x.*\.png"):
        files.picture_bytes(picture, f"a.{suffix}")
    for fine in ("a.png", "a.tif"):
        assert files.picture_bytes(picture, fine)
