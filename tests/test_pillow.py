"""The Pillow plugin."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError

import ddpm_codec.pillow
from ddpm_codec.codec import container, decoder, encoder, stops
from ddpm_codec.codec.container import MEMORY_VARIABLE, Header, Writer, crc16, write_header

QUICK: dict[str, Any] = {"steps": 6, "effort": 1}


@pytest.fixture(scope="module")
def encoded(tiny_model: Path, picture: Image.Image) -> bytes:
    return encoder.encode(picture, model=tiny_model, **QUICK)


@pytest.fixture
def path(tmp_path: Path, encoded: bytes, tiny_model: Path, monkeypatch: Any) -> Path:
    monkeypatch.setattr("ddpm_codec.network.modelfile.FOLDERS", (tiny_model.parent,))
    monkeypatch.setattr("ddpm_codec.network.modelfile.DEFAULT", "tiny")
    (tmp_path / "x.ddpm").write_bytes(encoded)
    return tmp_path / "x.ddpm"


def test_registered() -> None:
    assert Image.registered_extensions()[".ddpm"] == "DDPM"
    assert Image.MIME["DDPM"] == "image/x-ddpm"


def test_open_decodes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "decode", None)
    with Image.open(path) as im:
        assert (im.format, im.mode, im.size) == ("DDPM", "RGB", (40, 28))
        assert im.info["ddpm"] == stops.info(path.read_bytes())


def test_open_hashes_each_byte_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    out, hashed = Writer(Header(8, 8, "L", "isotropic", b"model!", 0, 1, 0, (999, 500, 1))), 0
    for _ in range(3):
        out.level(20.0, bytes(20000))

    def counting(data: bytes, start: int = 0) -> int:
        nonlocal hashed
        hashed += len(data)
        return crc16(data, start)

    monkeypatch.setattr(container, "crc16", counting)
    with Image.open(io.BytesIO(out.file())) as im:
        assert len(im.info["ddpm"]["levels"]) == 3
    assert 0 < hashed <= 3 * len(out)


def test_load(path: Path, encoded: bytes) -> None:
    with Image.open(path) as im:
        assert im.tobytes() == decoder.decode(encoded).tobytes()
        assert im.info["ddpm"]["complete"]
        assert im.load() is not None  # once more is no second decoding
        assert im.resize((4, 4)).size == (4, 4)
    assert im.fp is None


def test_stop_point(path: Path, encoded: bytes) -> None:
    with Image.open(path) as im:
        assert isinstance(im, ddpm_codec.pillow.DdpmImageFile)
        im.stop_at = "t=200"
        assert im.tobytes() == decoder.decode(encoded, stop_at="t=200").tobytes()
        assert im.info["ddpm"]["t"] >= 200


def test_save(path: Path, picture: Image.Image, encoded: bytes, tiny_model: Path) -> None:
    picture.save(path.with_name("y.ddpm"), **QUICK)
    assert path.with_name("y.ddpm").read_bytes() == encoded
    f = io.BytesIO()
    picture.save(f, "DDPM", bpp=2, model=tiny_model, quality=75, **QUICK)
    assert f.getvalue() == encoder.encode(picture, bpp=2, **QUICK)
    picture.save(f := io.BytesIO(), "DDPM", lossless=True, **QUICK)
    assert Image.open(f).tobytes() == picture.tobytes()


def test_save_knows_all_of_the_encoders_keywords(path: Path, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    picture = picture.copy()
    picture.info["exif"] = exif.tobytes()
    how: dict[str, Any] = {"path": "isotropic", "steps": 3, "effort": 2, "seed": 9}
    f = io.BytesIO()
    picture.save(f, "DDPM", stop_at="t=600", metadata="all", **how)
    about = stops.info(f.getvalue())
    assert {k: about[k] for k in how} == how and list(about["extras"]) == ["exif"]


def test_save_keeps_profile_and_transparency(path: Path, picture: Image.Image) -> None:
    picture = picture.copy()
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(path, stop_at="t=600", steps=3, effort=1)
    with Image.open(path) as im:
        assert im.mode == "RGBA" and im.info["ddpm"]["extras"].keys() == {"alpha"}
        assert im.getchannel("A").tobytes() == picture.getchannel("A").tobytes()
    picture.info["icc_profile"] = b"colours"
    picture.save(path, stop_at="t=600", steps=3, effort=1)
    with Image.open(path) as im:
        im.load()
        assert im.info["icc_profile"] == b"colours"


def test_save_converts(picture: Image.Image, path: Path) -> None:
    picture.quantize(4).save(path, stop_at="t=500", **QUICK)
    assert Image.open(path).mode == "RGB"
    with pytest.raises(OSError, match="32 bits"):
        picture.convert("F").save(path)
    with pytest.raises(OSError, match="5 bytes are too few"):
        picture.save(path, nbytes=5)


def test_broken_files_are_os_errors(path: Path, encoded: bytes) -> None:
    path.write_bytes(encoded[:12])
    with pytest.raises(OSError, match="ends inside its header"):
        Image.open(path)
    path.write_bytes(encoded[:6] + b"\1" + encoded[7:])
    with pytest.raises(OSError, match=r"made by ddpmc 0\.1"):
        Image.open(path)
    path.write_bytes(b"\x8aDPN" + encoded[4:])
    with pytest.raises(UnidentifiedImageError):
        Image.open(path)


def test_large_pictures_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(path) as im, pytest.raises(OSError, match="40x28 pixels take about"):
        monkeypatch.setenv(MEMORY_VARIABLE, "1e6")
        im.load()
    path.write_bytes(write_header(Header(10**9, 10**9, "L", "spectral", b"model!", 0, 5, 1, (0,))))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)


def test_unknown_model_is_an_os_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_codec.network.modelfile.FOLDERS", ())
    with Image.open(path) as im, pytest.raises(OSError, match="not installed"):
        im.load()
