"""The Pillow plugin."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError

import ddpm_codec.pillow
from ddpm_codec.codec import container, decoder, encoder, stops
from ddpm_codec.codec.container import Writer
from ddpm_codec.codec.header import MAX_HEADER, Header, write_header
from ddpm_codec.codec.limits import MEMORY_VARIABLE

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
        assert "ddpm" not in im.info  # before load() nothing is known of the decoding


def test_open_reads_the_header_only() -> None:
    out = Writer(Header(8, 8, "L", "isotropic", b"model!", 0, 1, 0, (999, 500, 1)))
    for _ in range(3):
        out.level(20.0, bytes(200_000))
    f = io.BytesIO(out.file())
    with Image.open(f) as im:
        assert (im.mode, im.size) == ("L", (8, 8)) and f.tell() <= MAX_HEADER


def test_a_closed_file(path: Path) -> None:
    with Image.open(path) as im:
        pass
    with pytest.raises(OSError, match="closed"):
        im.load()


def test_verify(path: Path, encoded: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the checksums: no network is asked."""
    monkeypatch.setattr(decoder, "decode", None)
    for sound in (encoded, container.cut(encoded, len(encoded) - 9), encoded[:-9]):
        path.write_bytes(sound)
        with Image.open(path) as im:
            im.verify()
    for at in (len(encoded) // 2, len(encoded) - 3):
        path.write_bytes(encoded[:at] + bytes([encoded[at] ^ 4]) + encoded[at + 1 :])
        with Image.open(path) as im, pytest.raises(OSError, match=r"damaged .checksum mismatch"):
            im.verify()


def test_pickle(path: Path, encoded: bytes) -> None:
    """The pixels, as of any picture of Pillow's: a DataLoader sends them to another process."""
    with Image.open(path) as im:
        im.stop_at = "t=200"  # type: ignore[attr-defined]
        out = pickle.loads(pickle.dumps(im))
    expected = decoder.decode(encoded, stop_at="t=200")
    for one in (out, pickle.loads(pickle.dumps(out)), out.copy()):
        assert one.tobytes() == expected.tobytes() and one.info["ddpm"] == expected.info["ddpm"]


def test_load(path: Path, encoded: bytes) -> None:
    with Image.open(path) as im:
        assert im.tobytes() == decoder.decode(encoded).tobytes()
        assert im.info["ddpm"] == decoder.decode(encoded).info["ddpm"]
        assert im.load() is not None  # once more is no second decoding
        assert im.resize((4, 4)).size == (4, 4)
    assert im.fp is None


# --- Drafts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_level(tiny_model: Path, picture: Image.Image) -> bytes:
    return encoder.encode(picture, model=tiny_model, effort=1, steps=17)


@pytest.fixture
def full(path: Path, every_level: bytes) -> Path:
    path.write_bytes(every_level)
    return path


def snr_of(path: Path, size: tuple[int, int]) -> float:
    with Image.open(path) as im:
        im.draft(None, size)
        im.load()
        assert im.size == (40, 28)
        return float(im.info["ddpm"]["snr"])


@pytest.mark.parametrize(
    ("size", "snr"),
    [((20, 14), 2560), ((10, 7), 640), ((5, 4), 320), ((5, 3), 160), ((0, 1), 20),
     ((40, 28), 2560), ((400, 1), 2560)],
)  # fmt: skip
def test_a_draft_stops_at_a_level_that_will_do(
    full: Path, size: tuple[int, int], snr: float
) -> None:
    """The SNR needed falls with the area."""
    assert snr_of(full, size) == snr


def test_a_draft_is_a_stop_point(full: Path) -> None:
    with Image.open(full) as im:
        assert im.draft("L", (5, 3)) == ("RGB", (0, 0, 40, 28))
        stop = im.stop_at  # type: ignore[attr-defined]
        assert im.draft("L", (1, 1)) is None  # as with JPEG, the first counts
        assert im.tobytes() == decoder.decode(full.read_bytes(), stop_at=stop).tobytes()
        assert im.draft(None, (5, 3)) is None  # too late
    with Image.open(full) as im:
        im.stop_at = "t=900"  # type: ignore[attr-defined]
        assert im.draft(None, (5, 3)) is None and im.draft(None, None) is None


@pytest.mark.parametrize(
    ("how", "snr"),
    [({}, 160), ({"resample": Image.Resampling.LANCZOS}, 160), ({"reducing_gap": None}, 2560),
     ({"resample": Image.Resampling.NEAREST}, 2560)],
)  # fmt: skip
def test_a_thumbnail_takes_fewer_levels(full: Path, how: dict[str, Any], snr: float) -> None:
    with Image.open(full) as im:
        im.thumbnail((5, 9), **how)
        assert im.size == (5, 4) and im.info["ddpm"]["snr"] == snr


@pytest.mark.filterwarnings("error")
def test_a_draft_of_a_file_that_ends_before_the_level(full: Path) -> None:
    """It takes all there is, and warns of nothing."""
    data = full.read_bytes()
    full.write_bytes(stops.truncate(data, stop_at=stops.info(data)["levels"][9]["t"]))
    assert snr_of(full, (5, 3)) == 20
    full.write_bytes(b"")
    with pytest.raises(UnidentifiedImageError):
        snr_of(full, (5, 3))


def test_a_draft_keeps_alpha_and_profile(full: Path, tiny_model: Path) -> None:
    """Wherever in the file they are."""
    noise = Image.effect_noise((40, 28), 99)
    im = Image.merge("LA", (noise, noise))
    data = encoder.encode(im, model=tiny_model, effort=1, steps=17, lossless=True)
    full.write_bytes(data)
    assert snr_of(full, (1, 1)) < snr_of(full, (40, 28))
    with Image.open(full) as out:
        out.draft(None, (1, 1))
        assert out.getchannel("A").tobytes() == noise.tobytes()


def test_stop_point(path: Path, encoded: bytes) -> None:
    with Image.open(path) as im:
        assert isinstance(im, ddpm_codec.pillow.DdpmImageFile)
        im.stop_at = "t=200"
        assert im.tobytes() == decoder.decode(encoded, stop_at="t=200").tobytes()
        assert im.info["ddpm"]["t"] >= 200
    with Image.open(path) as im, pytest.raises(OSError, match="not a stop point"):
        im.stop_at = "soon"  # type: ignore[attr-defined]
        im.load()


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
        assert im.mode == "RGBA" and stops.info(path)["extras"].keys() == {"alpha"}
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
        picture.save(path, bytes=5)


def test_save_lossless_loses_nothing(path: Path, picture: Image.Image) -> None:
    """Of a file with 16 bits a sample Pillow decodes, and hands to the plugin, 8."""
    picture.save(wide := path.with_suffix(".ppm"))
    content = wide.read_bytes().replace(b"255", b"65535", 1)
    wide.write_bytes(content + bytes(len(content)))
    with Image.open(wide) as im, pytest.raises(OSError, match=r"without loss .16 bits"):
        im.save(path, lossless=True)
    for mode in ("CMYK", "YCbCr", "LAB", "HSV", "I;16"):
        with pytest.raises(OSError, match="without loss"):
            Image.new(mode, (8, 8)).save(path, lossless=True)


def test_save_keeps_what_a_tiff_says(path: Path, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    picture.save(tiff := path.with_suffix(".tif"), exif=exif)
    with Image.open(tiff) as im:
        im.save(path, metadata="all", stop_at="t=600", **QUICK)
    with Image.open(path) as im:
        im.load()
        assert im.getexif()[0x010F] == "a camera"


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
