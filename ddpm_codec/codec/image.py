"""Pictures in: whatever Pillow reads, as one of the four modes that a file can hold.

The codec is an 8-bit codec of still pictures in grey or RGB, with or without alpha. What can be
brought into that form without loss (palettes, bitmaps, transparent colours, the EXIF orientation)
is, in silence; what loses something (CMYK, 16 bits) is converted with a warning; the rest is
refused.
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

MODES = ("L", "LA", "RGB", "RGBA")
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

    With ``exact``, a picture that would lose something is refused instead. ICC profile and EXIF
    stay in ``.info``. Raises ImageError (not a picture, damaged, animated, samples of a kind not
    held) and LimitError (see :func:`ddpm_codec.codec.limits.memory_limit`); OSError if the file
    cannot be read.
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
    except Exception as e:  # Pillow's plugins raise whatever a strange file makes them stumble over
        raise ImageError(f"damaged picture ({e or type(e).__name__})") from None


def picture_of(image: Picture, *, exact: bool = False) -> Image.Image:
    """Whatever :func:`ddpm_codec.encode` takes, as :func:`load` returns it.

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

    The limit is the process's: threads take turns, for as long as it takes to read a header.
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
    # A phone's JPEG holds further pictures (previews, gain maps) beside the photograph, a PSD the
    # layers of the one that Pillow shows.
    several = getattr(im, "is_animated", False) and im.format not in ("MPO", "PSD")
    if several and not (im.format == "TIFF" and _overviews(im)):
        raise ImageError(f"animated or of several pages ({getattr(im, 'n_frames', '?')} frames)")
    return prepare(im, exact=exact)


def _overviews(im: Image.Image) -> bool:
    """Whether all pages of a TIFF but the first are smaller copies of it, or masks."""
    if not getattr(im, "tile", None):  # decoded: to look at other pages would undo that
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
    """Bring a picture into mode L, LA, RGB or RGBA, upright, all pixels decoded.

    Of several frames, the one that Pillow shows. Raises ImageError; see :func:`load` for
    ``exact``.
    """
    if 0 in im.size:
        raise ImageError(f"{im.size[0]}x{im.size[1]}: no pixels")
    wide = _sixteen_bits(im)
    im.load()  # which changes the mode of some icons
    wide = wide or im.mode.startswith("I;16")
    if im.mode == "F" or (im.mode == "I" and not wide):
        raise ImageError("32 bits a sample")
    out = _narrow(im) if im.mode.startswith("I") else _eight_bits(im)
    lost = "16 bits a sample reduced to 8" if wide else ""
    if im.mode in OTHER_COLOURS + PREMULTIPLIED:
        lost = f"{im.mode} converted to {out.mode}"
    kept = ["icc_profile"] if im.mode not in OTHER_COLOURS else []  # of the colours that are left
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
    """What is known of a picture, wherever its format keeps it, with the orientation, also XMP's.

    What is broken of it is no reason to refuse the picture.
    """
    kept, turned = Image.Exif(), None
    with suppress(Exception):
        found = im.getexif()
        turned = found.get(ExifTags.Base.Orientation)
        kept.load(found.tobytes())
    if hasattr(im, "tag_v2"):
        for tag in set(kept) - DESCRIPTIVE:
            del kept[tag]
    if turned in range(2, 9):
        kept[ExifTags.Base.Orientation] = turned
    return kept


def _sixteen_bits(im: Image.Image) -> bool:
    """Whether the file has more than 8 bits a sample, though Pillow may hand out only 8.

    Pillow forgets it in load(); then the file is asked once more.
    """
    tile = getattr(im, "tile", None)
    if not tile and (name := getattr(im, "filename", None)):
        with suppress(Exception), _open(name) as again:
            tile = again.tile
    if not tile:
        return False
    codec, _, _, args = tile[0]
    raw, *more = args if isinstance(args, tuple) and args else (args,)
    if codec in ("ppm", "ppm_plain"):  # whose argument is the largest value
        return any(n > 255 for n in more)
    # Two raw modes are 16 bits a pixel.
    return ";16" in str(raw) and raw not in ("RGB;16", "BGR;16")


def _narrow(im: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit, rounded; the transparent value, if any, becomes alpha."""
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
    """(H, W, 3). Unless ``exact``, smooth and cheap where full transparency hides them."""
    pixels = np.asarray(picture.convert("RGB"))
    if exact or picture.mode in ("L", "RGB"):
        return pixels
    return smoothed(pixels, np.asarray(picture.getchannel("A")) > 0)


def smoothed(pixels: NDArray[np.uint8], seen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(H, W, C) with colours that cost little where nothing is ``seen``, (H, W).

    Pull-push interpolation (Gortler et al. 1996, "The lumigraph", section 3.4).
    """
    if seen.all():
        return pixels
    if not seen.any():
        return np.full_like(pixels, 128)
    return np.rint(_pull_push(pixels.astype(np.float32), seen)).astype(np.uint8)


def _pull_push(x: NDArray[np.float32], seen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Means of the pixels seen in squares twice as large, interpolated where none is."""
    if seen.all():
        return x
    h, w = seen.shape
    weight = _sums(seen[..., None].astype(np.float32))
    mean = _sums(x * seen[..., None]) / np.maximum(weight, np.float32(1))
    coarse = _pull_push(mean, weight[..., 0] > 0)
    box, planes = (0, 0, w / 2, h / 2), [Image.fromarray(c) for c in np.moveaxis(coarse, 2, 0)]
    fine = [np.asarray(c.resize((w, h), Image.Resampling.BILINEAR, box)) for c in planes]
    return np.where(seen[..., None], x, np.stack(fine, 2))


def _sums(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over squares of 2x2, the last ones of which may lack a row or column."""
    h, w, c = x.shape
    x = np.pad(x, ((0, h % 2), (0, w % 2), (0, 0)))
    sums: NDArray[np.float32] = x.reshape((h + 1) // 2, 2, (w + 1) // 2, 2, c).sum((1, 3))
    return sums


def alpha_to_bytes(alpha: NDArray[np.uint8]) -> bytes:
    """Losslessly: each row less the one above (mod 256), deflated. (H, W) in, zlib stream out."""
    above = np.concatenate([np.zeros_like(alpha[:1]), alpha[:-1]])
    return zlib.compress((alpha - above).tobytes(), 9)


def alpha_from_bytes(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Undo :func:`alpha_to_bytes`, never inflating to more than (H, W). Raises FormatError."""
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(data, width * height + 1)
    except zlib.error as e:
        raise FormatError(f"damaged alpha plane ({e})") from None
    if len(raw) != width * height:
        raise FormatError("damaged alpha plane (wrong length)")
    rows = np.frombuffer(raw, np.uint8).reshape(height, width)
    return np.cumsum(rows, axis=0, dtype=np.uint8)
