"""The Pillow plugin."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError

import ddpm_codec.pillow
from ddpm_codec.codec import codec
from ddpm_codec.codec import container as bitstream


@pytest.fixture(scope="module")
def encoded(tiny_model: Path, picture: Image.Image) -> bytes:
    return codec.encode(picture, model=tiny_model)


@pytest.fixture
def path(tmp_path: Path, encoded: bytes, tiny_model: Path, monkeypatch: Any) -> Path:
    monkeypatch.setattr("ddpm_codec.modelfile.FOLDERS", (tiny_model.parent,))
    monkeypatch.setattr("ddpm_codec.modelfile.DEFAULT", "tiny")
    (tmp_path / "x.ddpm").write_bytes(encoded)
    return tmp_path / "x.ddpm"


def test_registered() -> None:
    assert Image.registered_extensions()[".ddpm"] == "DDPM"
    assert Image.MIME["DDPM"] == "image/x-ddpm"


def test_open_reads_the_header_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "decode", None)
    with Image.open(path) as im:
        assert (im.format, im.mode, im.size) == ("DDPM", "RGB", (40, 28))
        assert im.info["ddpm"]["levels"] == bitstream.info(path.read_bytes())["levels"]


def test_load(path: Path, encoded: bytes) -> None:
    with Image.open(path) as im:
        assert im.tobytes() == codec.decode(encoded).tobytes()
        assert im.info["ddpm"]["complete"]
        assert im.load() is not None  # once more is no second decoding
        assert im.resize((4, 4)).size == (4, 4)
    assert im.fp is None


def test_stop_point(path: Path, encoded: bytes) -> None:
    with Image.open(path) as im:
        assert isinstance(im, ddpm_codec.pillow.DdpmImageFile)
        im.stop_at = "t=200"
        assert im.tobytes() == codec.decode(encoded, stop_at="t=200").tobytes()
        assert im.info["ddpm"]["t"] >= 200


def test_save(path: Path, picture: Image.Image, encoded: bytes, tiny_model: Path) -> None:
    picture.save(path.with_name("y.ddpm"))
    assert path.with_name("y.ddpm").read_bytes() == encoded
    f = io.BytesIO()
    picture.save(f, "DDPM", bpp=2, model=tiny_model, quality=75)
    assert f.getvalue() == codec.encode(picture, bpp=2)
    picture.save(f := io.BytesIO(), "DDPM", lossless=True)
    assert Image.open(f).tobytes() == picture.tobytes()


def test_save_converts(picture: Image.Image, path: Path) -> None:
    picture.quantize(4).save(path, stop_at="t=500")
    assert Image.open(path).mode == "RGB"
    with pytest.raises(OSError, match="32 bits"):
        picture.convert("F").save(path)


def test_broken_files_are_os_errors(path: Path, encoded: bytes) -> None:
    path.write_bytes(encoded[:12])
    with pytest.raises(OSError, match="ends inside its header"):
        Image.open(path)
    path.write_bytes(b"\x8aDPN" + encoded[4:])
    with pytest.raises(UnidentifiedImageError):
        Image.open(path)


def test_unknown_model_is_an_os_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_codec.modelfile.FOLDERS", ())
    with Image.open(path) as im, pytest.raises(OSError, match="not installed"):
        im.load()
