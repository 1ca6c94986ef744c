"""Pictures of every kind: converted, converted with a warning, or refused in one line."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from ddpm_codec.codec import image
from ddpm_codec.codec.image import (
    alpha_from_bytes,
    alpha_to_bytes,
    colours,
    load,
    picture_of,
    prepare,
    smoothed,
)
from ddpm_codec.codec.limits import BYTES_PER_PIXEL, FIXED_MEMORY, MEMORY_VARIABLE
from ddpm_codec.errors import ConversionWarning, FormatError, ImageError, LimitError


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


def wide_png(colour: int = 2) -> bytes:
    """Two pixels of 16 bits a sample, RGB or of another of PNG's kinds."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    rows = zlib.compress(b"\0" + bytes(range(4 * samples)))
    chunks = [(b"IHDR", bytes([0, 0, 0, 2, 0, 0, 0, 1, 16, colour, 0, 0, 0])), (b"IDAT", rows)]
    png = b"\x89PNG\r\n\x1a\n"
    for name, body in [*chunks, (b"IEND", b"")]:
        png += len(body).to_bytes(4, "big") + name + body
        png += zlib.crc32(name + body).to_bytes(4, "big")
    return png


@pytest.mark.parametrize(
    ("content", "mode"),
    [(wide_png(0), "L"), (wide_png(2), "RGB"), (wide_png(4), "LA"), (wide_png(6), "RGBA"),
     (b"P2 2 1 65535 0 65535", "L"), (b"P2 2 1 300 0 300", "L"), (b"P5 1 1 65535 12", "L"),
     (b"P5 1 1 300 \0\1", "L"), (b"P3 1 1 65535 1 2 3", "RGB"), (b"P6 1 1 65535 123456", "RGB")],
)  # fmt: skip
def test_more_than_eight_bits_a_sample(tmp_path: Path, content: bytes, mode: str) -> None:
    """Of most such files Pillow returns 8 bits silently."""
    with pytest.warns(ConversionWarning, match="16 bits"):
        assert load(io.BytesIO(content)).mode in (mode, "RGBA" if mode == "LA" else mode)
    with pytest.raises(ImageError, match=r"without loss .16 bits"):
        load(io.BytesIO(content), exact=True)
    (tmp_path / "wide").write_bytes(content)
    with Image.open(tmp_path / "wide") as im:
        im.load()  # forgets it
        with pytest.raises(ImageError, match=r"without loss .16 bits"):
            picture_of(im, exact=True)


def rgb565() -> bytes:
    """A BMP of 16 bits a pixel."""
    head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    return b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + head + masks + b"\xff\xff\x00\xf8"


@pytest.mark.parametrize(
    "content", [rgb565(), b"P1 2 1 0 1", b"P2 2 1 100 0 100", b"P6 1 1 7 \0\1\7"]
)
def test_what_pillow_shows_in_full_is_exact(content: bytes) -> None:
    """Sixteen bits a pixel, fewer levels than 256."""
    out = quiet_load(io.BytesIO(content), exact=True)
    with Image.open(io.BytesIO(content)) as im:
        assert out.tobytes() == im.convert(out.mode).tobytes()


def test_an_icon_of_sixteen_bits() -> None:
    """Its mode is another before it is decoded."""
    f = file_of(Image.new("I;16", (16, 16), 300), "ICNS")
    with pytest.raises(ImageError, match="16 bits"):
        load(f, exact=True)


def test_signed_samples_do_not_wrap() -> None:
    im = Image.new("I", (3, 1))
    im.putdata([-5, 0, 70000])
    assert image._narrow(im).tobytes() == b"\0\0\xff"


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "I;16", "RGBa", "La"])
def test_what_would_lose_something_is_not_exact(mode: str) -> None:
    im = random_picture(mode) if mode != "I;16" else Image.new(mode, (7, 5))
    with pytest.warns(ConversionWarning):
        assert picture_of(im).size == (7, 5)
    with pytest.raises(ImageError, match="without loss"):
        picture_of(im, exact=True)


def test_arrays() -> None:
    rng = np.random.default_rng(0)
    for shape, mode in (((4, 5), "L"), ((4, 5, 3), "RGB"), ((4, 5, 4), "RGBA")):
        x = rng.integers(0, 256, shape, np.uint8)
        out = picture_of(x, exact=True)
        assert out.mode == mode and out.tobytes() == x.tobytes()
    with pytest.raises(ImageError, match=r"without loss .16 bits"):
        picture_of(np.zeros((4, 5), np.uint16), exact=True)  # type: ignore[arg-type]
    for wrong in (
        np.zeros((4, 5, 3), np.uint16),
        np.zeros((4, 5, 7), np.uint8),
        np.zeros((0, 5), np.uint8),
    ):
        with pytest.raises(ImageError, match=r"expected are|no pixels"):
            picture_of(wrong)  # type: ignore[arg-type]


def test_paths_and_files_are_pictures(tmp_path: Path) -> None:
    im = random_picture("RGB")
    im.save(path := tmp_path / "x.png")
    with open(path, "rb") as f:
        for source in (path, str(path), f, im):
            assert picture_of(source).tobytes() == im.tobytes()
    for wrong in (None, 3, [im], b"PNG", io.StringIO("text")):
        with pytest.raises(TypeError, match="expected a picture"):
            picture_of(wrong)  # type: ignore[arg-type]


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


def test_a_gif_in_hand_is_its_frame() -> None:
    """Only a file of several pictures is ambiguous."""
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    f = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(f) as im:
        with pytest.raises(ImageError, match=r"several pages .2 frames"):
            picture_of(im)
        im.seek(1)
        assert picture_of(im.copy()).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(("kind", "fine"), [(1, True), (4, True), (2, False), (0, False)])
def test_a_tiff_of_one_picture_and_smaller_ones(kind: int, fine: bool) -> None:
    """Overviews and masks, in contrast to pages."""
    im, f = random_picture("RGB", (8, 6)), io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(f, new=True) as out:
        for k in range(3):
            small = im.resize((8 >> k, 6 >> k))
            small.save(out, "TIFF", tiffinfo={254: kind} if k else {})
            out.newFrame()
    f.seek(0)
    if fine:
        assert quiet_load(f, exact=True).tobytes() == im.tobytes()
    else:
        with pytest.raises(ImageError, match=r"several pages .3 frames"):
            load(f)


def psd(layers: int) -> bytes:
    """2x1 pixels beside layers without any."""
    layer = bytes(16) + struct.pack(">H", 0) + b"8BIMnorm\xff\0\0\0" + struct.pack(">III", 8, 0, 0)
    info = struct.pack(">h", layers) + layer * layers
    both = struct.pack(">I", len(info)) + info
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 1, 2, 8, 3) + bytes(8)
    return head + struct.pack(">I", len(both)) + both + bytes(2) + b"aabbcc"


@pytest.mark.parametrize("layers", [1, 2])
def test_a_psd_is_what_its_layers_make(layers: int) -> None:
    assert quiet_load(io.BytesIO(psd(layers)), exact=True).tobytes() == b"abcabc"


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    out = quiet_load(file_of(random_picture("RGB", (7, 5)), exif=exif), exact=True)
    assert out.size == (5, 7)
    assert 0x0112 not in out.getexif()


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def in_png(im: Image.Image, key: str, text: str) -> io.BytesIO:
    about = PngImagePlugin.PngInfo()
    about.add_itxt(key, text) if key.startswith("XML") else about.add_text(key, text)
    return file_of(im, pnginfo=about)


def in_jpeg(im: Image.Image) -> io.BytesIO:
    body = b"http://ns.adobe.com/xap/1.0/\0" + XMP.encode()
    jpeg = file_of(im, "JPEG").getvalue()
    return io.BytesIO(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:])


def test_orientation_is_applied_wherever_it_is_kept() -> None:
    """In XMP, in ImageMagick's raw profile, in the tags of a TIFF."""
    im, exif = random_picture("RGB", (7, 5)), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    block = exif.tobytes()
    raw = f"\nexif\n{len(block):8}\n{block.hex()}\n"
    files = [
        in_png(im, "XML:com.adobe.xmp", XMP), in_jpeg(im),
        in_png(im, "Raw profile type exif", raw), file_of(im, "TIFF", exif=exif),
    ]  # fmt: skip
    for k, f in enumerate(files):
        out = quiet_load(f, exact=True)
        assert out.size == (5, 7), k
        assert k == 1 or out.tobytes() == im.transpose(Image.Transpose.ROTATE_270).tobytes()
        assert out.getexif().get(0x010F) == (None if k < 2 else "a camera")
        assert 0x0112 not in out.getexif() and ("exif" in out.info) == (k >= 2)
        assert prepare(out).size == (5, 7)  # once


def test_exif_of_a_tiff_is_what_describes_it() -> None:
    exif = Image.Exif()
    exif[0x0132] = "2024:01:01 00:00:00"
    exif[0x8769] = {0x829A: 0.5}
    out = quiet_load(file_of(random_picture("RGB"), "TIFF", exif=exif.tobytes()))
    kept = Image.Exif()
    kept.load(out.info["exif"])
    assert set(kept) == {0x0132, 0x8769} and kept.get_ifd(0x8769) == {0x829A: 0.5}


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0none", b"Exif\0\0II*\0\xff\0\0\0"])
def test_broken_exif_is_no_reason_to_refuse_a_picture(block: bytes) -> None:
    im = random_picture("RGB")
    out = quiet_load(file_of(im, exif=block))
    assert out.tobytes() == im.tobytes() and "exif" not in out.info


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


@pytest.mark.parametrize("error", [NotImplementedError("odd"), TypeError(), KeyError(3)])
def test_whatever_a_plugin_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def stumble(*_: object) -> None:
        raise error

    monkeypatch.setattr(image, "prepare", stumble)
    with pytest.raises(ImageError, match="picture"):
        load(file_of(Image.new("L", (2, 2))))


def test_pillows_limit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the process's: only for the length of an opening it is off."""
    limit, seen = Image.MAX_IMAGE_PIXELS, []
    content = file_of(Image.new("L", (2, 2))).getvalue()
    honest = image.prepare

    def looking(im: Image.Image, **how: bool) -> Image.Image:
        with image._opening:
            seen.append(Image.MAX_IMAGE_PIXELS)
        return honest(im, **how)

    monkeypatch.setattr(image, "prepare", looking)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: load(io.BytesIO(content)), range(40)))
    finally:
        sys.setswitchinterval(interval)
    assert seen == [limit] * 40 and limit == Image.MAX_IMAGE_PIXELS is not None


# --- Alpha -------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_hidden_colours_are_smooth(height: int, width: int, seed: int) -> None:
    """Between those seen, which stay, and of no effect themselves."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    seen = rng.random((height, width)) < rng.choice([0.0, 0.1, 0.9, 1.0])
    out = smoothed(np.where(seen[..., None], x, y), seen)
    assert out.dtype == np.uint8 and np.array_equal(out[seen], x[seen])
    np.testing.assert_array_equal(out, smoothed(np.where(seen[..., None], x, 9), seen))
    if seen.any():
        assert (out >= x[seen].min(0)).all() and (out <= x[seen].max(0)).all()
    flat = smoothed(np.where(seen[..., None], np.uint8(70), y), seen)
    assert len(np.unique(flat)) == 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_colours(mode: str) -> None:
    im = random_picture(mode)
    exact = np.asarray(im.convert("RGB"))
    np.testing.assert_array_equal(colours(im, exact=True), exact)
    np.testing.assert_array_equal(colours(im, exact=False), exact)  # nothing is quite transparent
    if mode in ("LA", "RGBA"):
        im.putalpha(Image.new("L", im.size, 0))
        np.testing.assert_array_equal(colours(im, exact=True), exact)
        assert (colours(im, exact=False) == 128).all()


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
