"""Pictures of every kind: converted, converted with a warning, or refused in one line."""

from __future__ import annotations

import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm_codec.codec.container import BYTES_PER_PIXEL, FIXED_MEMORY, MEMORY_VARIABLE
from ddpm_codec.codec.image import (
    ConversionWarning,
    alpha_from_bytes,
    alpha_to_bytes,
    load,
    prepare,
)
from ddpm_codec.errors import FormatError, ImageError, LimitError


def file_of(im: Image.Image, kind: str = "PNG", **how: object) -> io.BytesIO:
    f = io.BytesIO()
    im.save(f, kind, **how)
    f.seek(0)
    return f


def quiet_load(f: io.BytesIO, **how: bool) -> Image.Image:
    """load(), with any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(f, **how)


def random_picture(mode: str, size: tuple[int, int] = (7, 5)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    rng = np.random.default_rng(1)
    return Image.frombytes(mode, size, rng.bytes(size[0] * size[1] * channels))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5)])
def test_own_modes_are_untouched(mode: str, size: tuple[int, int]) -> None:
    im = random_picture(mode, size)
    out = quiet_load(file_of(im), exact=True)
    assert (out.mode, out.size, out.tobytes()) == (mode, size, im.tobytes())


def test_palette() -> None:
    im = random_picture("RGB").quantize(8)
    out = quiet_load(file_of(im), exact=True)
    assert out.mode == "RGB" and out.tobytes() == im.convert("RGB").tobytes()


def test_palette_with_a_transparent_entry() -> None:
    im = random_picture("RGB").quantize(8)
    out = quiet_load(file_of(im, transparency=0), exact=True)
    assert out.mode == "RGBA"
    assert np.array_equal(np.asarray(out)[..., 3] == 0, np.asarray(im) == 0)


def test_transparent_colour() -> None:
    out = quiet_load(file_of(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)))
    assert out.mode == "RGBA" and out.getpixel((0, 0)) == (1, 2, 3, 0)
    out = quiet_load(file_of(Image.new("L", (2, 2), 9), transparency=9))
    assert out.mode == "LA" and out.getpixel((0, 0)) == (9, 0)


def test_bitmap() -> None:
    out = quiet_load(file_of(Image.new("1", (3, 2), 1)), exact=True)
    assert out.mode == "L" and out.getpixel((2, 1)) == 255


def test_cmyk_is_converted_with_a_warning() -> None:
    f = file_of(random_picture("CMYK", (16, 16)), "JPEG", icc_profile=b"of CMYK")
    with pytest.warns(ConversionWarning, match="CMYK converted to RGB"):
        out = load(f)
    assert out.mode == "RGB" and "icc_profile" not in out.info
    with pytest.raises(ImageError, match="without loss"):
        load(f, exact=True)


def test_sixteen_bits_are_rounded_with_a_warning() -> None:
    wide = np.array([[0, 128, 129, 257, 65535]], np.uint16)
    f = file_of(Image.fromarray(wide))
    with pytest.warns(ConversionWarning, match="16 bits"):
        out = load(f)
    assert out.mode == "L" and list(out.tobytes()) == [0, 0, 1, 1, 255]
    with pytest.raises(ImageError, match="without loss"):
        load(f, exact=True)


def test_sixteen_bit_colour() -> None:
    """Pillow hands out 8 bits of such a file without a word."""
    rows = zlib.compress(b"\0" + bytes(range(12)))
    chunks = [(b"IHDR", bytes([0, 0, 0, 2, 0, 0, 0, 1, 16, 2, 0, 0, 0])), (b"IDAT", rows)]
    png = b"\x89PNG\r\n\x1a\n"
    for name, body in [*chunks, (b"IEND", b"")]:
        png += len(body).to_bytes(4, "big") + name + body
        png += zlib.crc32(name + body).to_bytes(4, "big")
    with pytest.warns(ConversionWarning, match="16 bits"):
        assert load(io.BytesIO(png)).mode == "RGB"
    with pytest.raises(ImageError, match="without loss"):
        load(io.BytesIO(png), exact=True)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="32 bits"):
        load(file_of(Image.new(mode, (2, 2)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "green", "blue")]
    f = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="animated or of several pages"):
        load(f)


def test_one_frame_is_no_animation() -> None:
    assert quiet_load(file_of(Image.new("RGB", (8, 8), "red"), "GIF")).mode == "RGB"


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    out = quiet_load(file_of(random_picture("RGB", (7, 5)), exif=exif), exact=True)
    assert out.size == (5, 7)
    assert 0x0112 not in out.getexif()


def test_no_pixels() -> None:
    with pytest.raises(ImageError, match="no pixels"):
        prepare(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_no_picture(content: bytes) -> None:
    with pytest.raises(ImageError):
        load(io.BytesIO(content))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_cut_picture(kind: str) -> None:
    whole = file_of(random_picture("RGB", (64, 64)), kind).getvalue()
    for size in (20, len(whole) // 2, len(whole) - 40):
        with pytest.raises(ImageError):
            load(io.BytesIO(whole[:size]))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.png")


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    f = file_of(Image.new("L", (20, 10)))
    needed = FIXED_MEMORY + 200 * BYTES_PER_PIXEL
    monkeypatch.setenv(MEMORY_VARIABLE, str(needed - 1))
    with pytest.raises(LimitError, match=r"20x10 pixels take about 0\.6 GB, more than the limit"):
        load(f)
    monkeypatch.setenv(MEMORY_VARIABLE, str(needed))
    assert load(f).size == (20, 10)
    monkeypatch.setenv(MEMORY_VARIABLE, "many")
    with pytest.raises(LimitError, match="not a number"):
        load(f)


def test_absurd_size_is_refused_before_decoding() -> None:
    bomb = bytearray(file_of(Image.new("1", (8, 8)), "PPM").getvalue())
    bomb[3:6] = b"60000 60000"
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(LimitError, match=r"60000x60000 pixels take about 360\.6 GB"):
        load(io.BytesIO(bytes(bomb)))
    assert limit == Image.MAX_IMAGE_PIXELS


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_alpha_round_trip(height: int, width: int, seed: int) -> None:
    alpha = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    data = alpha_to_bytes(alpha)
    assert np.array_equal(alpha_from_bytes(data, height, width), alpha)


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", zlib.compress(bytes(5)), zlib.compress(bytes(9))]
)
def test_damaged_alpha(data: bytes) -> None:
    with pytest.raises(FormatError, match="damaged alpha"):
        alpha_from_bytes(data, 2, 3)
