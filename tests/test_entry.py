"""What the page shows of a file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from ddpm_codec.codec import container, decoder, encoder, stops
from ddpm_codec.codec.encoder import psnr
from ddpm_codec.errors import DamageWarning, FormatError, ImageError
from ddpm_codec.view import entry as module
from ddpm_codec.view.entry import Entry, data_uri, entry, name_of

QUICK: dict[str, Any] = {"steps": 6, "effort": 1, "tune": "even"}


@pytest.fixture(scope="module")
def encoded(tiny_model: Path, picture: Image.Image) -> bytes:
    return encoder.encode(picture, model=tiny_model, **QUICK)


def shown(src: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(src.partition("base64,")[2])))


def pixels(im: Image.Image, mode: str = "RGB") -> np.ndarray:
    return np.asarray(im.convert(mode))


def test_levels_are_the_librarys(encoded: bytes, tiny_model: Path) -> None:
    got = entry(encoded, model=tiny_model)
    want = list(decoder.decode_levels(encoded, model=tiny_model))
    assert len(got.levels) == len(want) == 6
    for ours, level in zip(got.levels, want, strict=True):
        assert (ours.t, ours.snr, ours.bytes) == (level.t, level.snr, level.bytes)
        assert (ours.psnr, ours.complete) == (level.psnr, True)
        assert ours.bpp == 8 * level.bytes / (40 * 28)
        assert shown(ours.src).format == "WEBP"
        assert (pixels(shown(ours.src)) == pixels(level.image)).all()
    assert (got.name, got.width, got.height, got.mode) == ("picture", 40, 28, "RGB")
    assert (got.bytes, got.steps, got.measured, got.damage) == (len(encoded), 6, False, None)
    assert got.curves()[0].points == [(v.bpp, v.psnr) for v in got.levels]


def test_psnr_is_measured_against_the_original(
    encoded: bytes, tiny_model: Path, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "true.png")
    picture.save(tmp_path / "b.jpg", quality=30)
    got = entry(encoded, tmp_path / "true.png", [tmp_path / "b.jpg"], model=tiny_model)
    for ours in got.levels:
        assert ours.psnr == psnr(pixels(shown(ours.src)), pixels(picture))
    true, jpeg = got.others
    assert (true.name, true.original, true.psnr) == ("true.png", True, float("inf"))
    assert (jpeg.name, jpeg.original) == ("b.jpg", False)
    assert jpeg.bytes == (tmp_path / "b.jpg").stat().st_size
    assert jpeg.psnr == psnr(pixels(Image.open(tmp_path / "b.jpg")), pixels(picture))
    own, mark = got.curves()  # the original is no point: its PSNR is infinite
    assert len(own.points) == 6
    assert mark.points[0] == pytest.approx((jpeg.bytes * 8 / (40 * 28), jpeg.psnr))


def test_against_another_file(encoded: bytes, tiny_model: Path, tmp_path: Path) -> None:
    small = stops.truncate(encoded, stop_at="t=300")
    (tmp_path / "small.ddpm").write_bytes(small)
    (other,) = entry(encoded, None, [tmp_path / "small.ddpm"], model=tiny_model).others
    assert (other.name, other.bytes, other.psnr) == ("small.ddpm", len(small), None)
    assert (pixels(shown(other.src)) == pixels(decoder.decode(small, model=tiny_model))).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_grey_and_alpha(tiny_model: Path, picture: Image.Image, mode: str) -> None:
    """PSNR counts what can be seen, and hidden colours are not held against anybody."""
    original = picture.convert(mode)
    if mode.endswith("A"):
        alpha = np.full((28, 40), 255, np.uint8)
        alpha[:10] = 0
        original.putalpha(Image.fromarray(alpha))
    data = encoder.encode(original, model=tiny_model, **QUICK)
    got = entry(data, original, model=tiny_model)
    last, want = got.levels[-1], decoder.decode(data, model=tiny_model)
    assert (pixels(shown(last.src), "RGBA")[10:] == pixels(want, "RGBA")[10:]).all()
    top = 10 if mode.endswith("A") else 0
    assert last.psnr == pytest.approx(psnr(pixels(want)[top:], pixels(original)[top:]), abs=1e-9)
    if top:
        assert (pixels(shown(last.src), "RGBA")[:10, :, 3] == 0).all()


def test_lossless(tiny_model: Path, picture: Image.Image) -> None:
    data = encoder.encode(picture, model=tiny_model, lossless=True, steps=6, effort=1)
    got = entry(data, model=tiny_model)
    assert len(got.levels) == 7 and got.levels[-1].psnr == float("inf")
    assert (pixels(shown(got.levels[-1].src)) == pixels(picture)).all()
    assert len(got.curves()[0].points) == 6


def test_a_part_of_a_level_has_no_noted_psnr(encoded: bytes, tiny_model: Path) -> None:
    stream = container.parse(encoded)
    middle = (stream.levels[4].until + stream.levels[5].until) // 2
    for got in (entry(encoded[:middle], model=tiny_model),
                entry(encoded, stop_at=f"bytes={middle}", model=tiny_model)):  # fmt: skip
        assert got.levels[-1].bytes <= middle and got.damage is None
        assert [v.psnr is None for v in got.levels] == [not v.complete for v in got.levels]
    assert not got.levels[-1].complete


def test_the_header_alone(encoded: bytes, tiny_model: Path) -> None:
    head = container.parse(encoded).header_size
    got = entry(encoded[:head], model=tiny_model)
    (only,) = got.levels
    assert (only.t, only.snr, only.bytes, only.psnr) == (1000, 0, head, None)
    assert got.curves()[0].points == []
    with pytest.raises(FormatError):
        entry(encoded[: head - 1], model=tiny_model)


def test_damage_is_told_and_the_rest_shown(encoded: bytes, tiny_model: Path) -> None:
    broken = bytearray(encoded)
    broken[container.parse(encoded).levels[3].until + 3] ^= 1
    with pytest.warns(DamageWarning, match="checksum"):
        got = entry(bytes(broken), model=tiny_model)
    assert len(got.levels) == 4 and "checksum" in (got.damage or "")


def test_damage_of_another_file_is_its_own(
    encoded: bytes, tiny_model: Path, tmp_path: Path
) -> None:
    broken = bytearray(encoded)
    broken[container.parse(encoded).levels[3].until + 3] ^= 1
    (tmp_path / "b.ddpm").write_bytes(broken)
    with pytest.warns(DamageWarning, match=r"^b.ddpm is damaged \(checksum") as caught:
        got = entry(encoded, None, [tmp_path / "b.ddpm"], model=tiny_model)
    assert len(caught) == 1 and got.damage is None


def test_samples_are_another_picture_of_unknown_quality(encoded: bytes, tiny_model: Path) -> None:
    data = stops.truncate(encoded, stop_at="t=400")
    got = [entry(data, model=tiny_model, recon="sample", seed=seed) for seed in (0, 0, 1)]
    assert got[0] == got[1] != got[2]
    assert {v.psnr for v in got[0].levels} == {None}
    with pytest.raises(ValueError, match="recon"):
        entry(data, model=tiny_model, recon="nonesuch")  # type: ignore[arg-type]


def test_refusals_name_the_picture(
    encoded: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And come before anything is decoded."""
    monkeypatch.setattr(module, "Decoder", None)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (3, 2)).save(tmp_path / "small.png")
    with pytest.raises(ImageError, match=r"^text.png: not a picture"):
        entry(encoded, tmp_path / "text.png")
    with pytest.raises(ImageError, match=r"^small.png: 3x2 is not the file's size, 40x28"):
        entry(encoded, None, [tmp_path / "small.png"])
    with pytest.raises(FileNotFoundError):
        entry(encoded, tmp_path / "nonesuch.png")


def test_pictures_without_loss(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("L", "LA", "RGB", "RGBA"):
        im = picture.convert(mode)
        im.info = {"icc_profile": profile, "exif": b"Exif\0\0whatever"}
        with shown(data_uri(im)) as got:
            assert got.format == ("PNG" if mode in ("L", "LA") else "WEBP")
            assert got.info["icc_profile"] == profile and not got.getexif()
            assert (pixels(got, "RGBA") == pixels(im, "RGBA")).all()
    assert shown(data_uri(Image.new("L", (16384, 1)))).format == "PNG"
    assert shown(data_uri(Image.new("L", (16383, 1)))).format == "WEBP"
    monkeypatch.setattr(features, "check", lambda _: False)
    assert shown(data_uri(picture)).format == "PNG"


def test_about_has_everything_but_pictures(encoded: bytes, tiny_model: Path) -> None:
    got = entry(encoded, decoder.decode(encoded, model=tiny_model), model=tiny_model)
    about = got.about()
    assert "data:" not in str(about) and about["levels"][0]["t"] == got.levels[0].t
    assert isinstance(got, Entry) and about["others"][0]["name"] == "picture"


def test_names(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as im, (tmp_path / "a.png").open("rb") as f:
        for file in (tmp_path / "a.png", str(tmp_path / "a.png"), im, f):
            assert name_of(file) == "a.png"
    assert name_of(b"") == name_of(picture) == "picture"
    assert name_of("x/\udcff\n.ddpm") == "\ufffd\ufffd.ddpm"
