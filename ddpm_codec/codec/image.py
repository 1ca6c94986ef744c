"""Input pictures: whatever Pillow reads, converted to one of the four modes that a file can hold.

The codec holds 8-bit still pictures in grey or RGB, with or without alpha. Pictures that can be
converted without loss (palettes, bitmaps, transparent colours, the EXIF orientation) are converted
silently. A conversion that loses something (CMYK, 16 bits) warns. Others are refused.
"""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import ConversionWarning, DdpmcError, FormatError, ImageError, LimitError, warn
from .limits import check_size
from .source import is_binary_file

OTHER_COLOURS = ("CMYK", "YCbCr", "LAB", "HSV")
PREMULTIPLIED = ("La", "RGBa")
Picture = str | os.PathLike[str] | BinaryIO | Image.Image | NDArray[np.uint8]

# The tags of a TIFF that describe what it shows; the others say how it is stored.
DESCRIPTIVE = {
    ExifTags.Base[name]
    for name in (
        "DocumentName", "ImageDescription", "Make", "Model", "XResolution", "YResolution",
        "ResolutionUnit", "Software", "DateTime", "Artist", "HostComputer", "Copyright", "XPTitle",
        "XPComment", "XPAuthor", "XPKeywords", "XPSubject", "ExifOffset", "GPSInfo",
    )
}  # fmt: skip
SMALLER_OR_MASK = 5  # bits of a TIFF page's NewSubfileType, tag 254

_opening = Lock()


def load(source: str | os.PathLike[str] | BinaryIO, *, exact: bool = False) -> Image.Image:
    """A picture from a file, upright, in mode L, LA, RGB or RGBA.

    With ``exact``, a picture that would lose something is refused. ICC profile and EXIF stay in
    ``.info``. Raises ImageError (not a picture, damaged, animated, unsupported samples) and
    LimitError (see :func:`ddpm_codec.codec.limits.memory_limit`); OSError if the file cannot be
    read.
    """
    try:
        with _open(source) as im:
            return _still(im, exact)
    except (DdpmcError, Warning, MemoryError):
        raise
    except (UnidentifiedImageError, NotImplementedError):
        raise ImageError("not a picture that Pillow can read") from None
    except Image.DecompressionBombError as e:
        raise LimitError(str(e)) from None
    except OSError as e:
        if e.errno is not None:  # from the file system, not from Pillow
            raise
        raise ImageError(f"damaged picture ({e})") from None
    except Exception as e:  # Pillow's plugins raise all kinds of errors for damaged files
        raise ImageError(f"damaged picture ({e or type(e).__name__})") from None


def picture_of(image: Picture, *, exact: bool = False) -> Image.Image:
    """A picture from any input that :func:`ddpm_codec.encode` takes, as :func:`load` returns it.

    Raises TypeError for anything else.
    """
    if isinstance(image, np.ndarray):
        shape, kind = image.shape, image.dtype
        try:
            image = Image.fromarray(image)
        except (TypeError, ValueError):
            raise ImageError(
                f"an array of shape {shape} and type {kind}; expected are (H, W), (H, W, 3) or "
                "(H, W, 4) of uint8"
            ) from None
    if isinstance(image, Image.Image):
        return _still(image, exact)
    if isinstance(image, str | os.PathLike) or is_binary_file(image):
        return load(image, exact=exact)
    raise TypeError(
        "expected a picture (of Pillow, or an array), a path or a file opened in binary mode, not "
        + type(image).__name__
    )


def _open(source: str | os.PathLike[str] | BinaryIO) -> ImageFile.ImageFile:
    """Image.open without Pillow's limit, because ours is checked before anything is decoded.

    The limit is the process's, so only one thread at a time may open a file.
    """
    with _opening:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _still(im: Image.Image, exact: bool) -> Image.Image:
    check_size(im.size)
    # A phone's JPEG also holds previews and gain maps of the photograph. A PSD holds the layers of
    # the picture that Pillow shows.
    several = getattr(im, "is_animated", False) and im.format not in ("MPO", "PSD")
    if several and not (im.format == "TIFF" and _overviews(im)):
        raise ImageError(f"animated or of several pages ({getattr(im, 'n_frames', '?')} frames)")
    return prepare(im, exact=exact)


def _overviews(im: Image.Image) -> bool:
    """Whether all pages of a TIFF but the first are smaller copies of it, or masks."""
    if not getattr(im, "tile", None):  # it is decoded, and seeking would discard the pixels
        return False
    shown = im.tell()
    try:
        for page in range(1, im.n_frames):  # type: ignore[attr-defined]
            im.seek(page)
            if not im.tag_v2.get(254, 0) & SMALLER_OR_MASK:  # type: ignore[attr-defined]
                return False
    finally:
        im.seek(shown)
    return True


def prepare(im: Image.Image, *, exact: bool = False) -> Image.Image:
    """A picture in mode L, LA, RGB or RGBA, upright, with all pixels decoded.

    Of several frames it takes the current one. Raises ImageError; see :func:`load` for ``exact``.
    """
    if 0 in im.size:
        raise ImageError(f"{im.size[0]}x{im.size[1]}: no pixels")
    wide = _sixteen_bits(im)
    im.load()  # this changes the mode of some icons
    wide = wide or im.mode.startswith("I;16")
    if im.mode == "F" or (im.mode == "I" and not wide):
        raise ImageError("32 bits a sample")
    out = _narrow(im) if im.mode.startswith("I") else _eight_bits(im)
    lost = "16 bits a sample reduced to 8" if wide else ""
    if im.mode in OTHER_COLOURS + PREMULTIPLIED:
        lost = f"{im.mode} converted to {out.mode}"
    # A profile of other colours does not fit the converted ones.
    kept = ["icc_profile"] if im.mode not in OTHER_COLOURS else []
    out.info = {key: im.info[key] for key in kept if key in im.info}
    if lost and exact:
        raise ImageError(f"cannot be kept without loss ({lost})")
    if lost:
        warn(lost, ConversionWarning)
    if len(exif := _exif(im)):
        out.info["exif"] = exif.tobytes()
        ImageOps.exif_transpose(out, in_place=True)
        if not len(out.getexif()):
            del out.info["exif"]
    return out


def _exif(im: Image.Image) -> Image.Exif:
    """A picture's EXIF data, wherever its format keeps them; the orientation may be XMP's.

    Broken data are left out, and the picture is still accepted.
    """
    kept, orientation = Image.Exif(), None
    with suppress(Exception):
        found = im.getexif()
        orientation = found.get(ExifTags.Base.Orientation)
        kept.load(found.tobytes())
    if hasattr(im, "tag_v2"):
        for tag in set(kept) - DESCRIPTIVE:
            del kept[tag]
    if orientation in range(2, 9):
        kept[ExifTags.Base.Orientation] = orientation
    return kept


def _sixteen_bits(im: Image.Image) -> bool:
    """Whether the file has more than 8 bits a sample, though Pillow may return only 8.

    After load() Pillow no longer knows; then the file is opened once more.
    """
    tile = getattr(im, "tile", None)
    if not tile and (name := getattr(im, "filename", None)):
        with suppress(Exception), _open(name) as again:
            tile = again.tile
    if not tile:
        return False
    codec, _, _, args = tile[0]
    raw, *more = args if isinstance(args, tuple) and args else (args,)
    if codec in ("ppm", "ppm_plain"):  # their argument is the largest sample
        return any(n > 255 for n in more)
    # The two excluded raw modes have 16 bits a pixel, not a sample.
    return ";16" in str(raw) and raw not in ("RGB;16", "BGR;16")


def _narrow(im: Image.Image) -> Image.Image:
    """16-bit grey rounded to 8 bits; the transparent value, if any, becomes alpha."""
    wide = np.asarray(im).astype(np.int64)
    out = Image.fromarray(((wide.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(key := im.info.get("transparency"), int):
        out.putalpha(Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8)))
    return out


def _eight_bits(im: Image.Image) -> Image.Image:
    if im.mode in ("LA", "RGBA"):
        return im.copy()
    alpha = im.has_transparency_data
    if im.mode in ("L", "1", "La"):
        return im.convert("LA" if alpha else "L") if im.mode != "L" or alpha else im.copy()
    return im.convert("RGBA" if alpha else "RGB")


def colours(picture: Image.Image, *, exact: bool) -> NDArray[np.uint8]:
    """(H, W, 3). Unless ``exact``, fully transparent pixels get colours that cost little."""
    pixels = np.asarray(picture.convert("RGB"))
    if exact or picture.mode in ("L", "RGB"):
        return pixels
    return smoothed(pixels, np.asarray(picture.getchannel("A")) > 0)


def smoothed(pixels: NDArray[np.uint8], visible: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(H, W, C) with the colours of pixels that are not ``visible`` (H, W) interpolated.

    Pull-push interpolation (Gortler et al. 1996, "The lumigraph", section 3.4).
    """
    if visible.all():
        return pixels
    if not visible.any():
        return np.full_like(pixels, 128)
    return np.rint(_pull_push(pixels.astype(np.float32), visible)).astype(np.uint8)


def _pull_push(x: NDArray[np.float32], visible: NDArray[np.bool_]) -> NDArray[np.float32]:
    """x with pixels that are not visible interpolated from means over squares of 2x2, 4x4, ..."""
    if visible.all():
        return x
    h, w = visible.shape
    weight = _sums(visible[..., None].astype(np.float32))
    mean = _sums(x * visible[..., None]) / np.maximum(weight, np.float32(1))
    coarse = _pull_push(mean, weight[..., 0] > 0)
    box, planes = (0, 0, w / 2, h / 2), [Image.fromarray(c) for c in np.moveaxis(coarse, 2, 0)]
    fine = [np.asarray(c.resize((w, h), Image.Resampling.BILINEAR, box)) for c in planes]
    return np.where(visible[..., None], x, np.stack(fine, 2))


def _sums(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums over squares of 2x2; the last ones may lack a row or column."""
    h, w, c = x.shape
    x = np.pad(x, ((0, h % 2), (0, w % 2), (0, 0)))
    sums: NDArray[np.float32] = x.reshape((h + 1) // 2, 2, (w + 1) // 2, 2, c).sum((1, 3))
    return sums


def alpha_to_bytes(alpha: NDArray[np.uint8]) -> bytes:
    """The alpha plane (H, W) as a zlib stream of each row less the one above, mod 256."""
    above = np.concatenate([np.zeros_like(alpha[:1]), alpha[:-1]])
    return zlib.compress((alpha - above).tobytes(), 9)


def alpha_from_bytes(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """The inverse of :func:`alpha_to_bytes`. Raises FormatError, also for more data than (H, W)."""
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(data, width * height + 1)
    except zlib.error as e:
        raise FormatError(f"damaged alpha plane ({e})") from None
    if len(raw) != width * height:
        raise FormatError("damaged alpha plane (wrong length)")
    rows = np.frombuffer(raw, np.uint8).reshape(height, width)
    return np.cumsum(rows, axis=0, dtype=np.uint8)
