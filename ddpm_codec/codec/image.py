"""Pictures in: whatever Pillow reads, as one of the four modes that a file can hold.

The codec is an 8-bit codec of still pictures in grey or RGB, with or without alpha. What can be
brought into that form without loss (palettes, bitmaps, transparent colours, the EXIF orientation)
is, in silence; what loses something (CMYK, 16 bits) is converted with a warning; the rest is
refused.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DdpmcWarning, FormatError, ImageError
from .container import check_size

MODES = ("L", "LA", "RGB", "RGBA")


class ConversionWarning(DdpmcWarning):
    """The picture lost something on its way to 8-bit grey or RGB."""


@contextmanager
def _own_limit() -> Iterator[None]:
    """Pillow's own limit off, because ours is checked before anything is decoded."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def load(source: str | Path | BinaryIO, *, exact: bool = False) -> Image.Image:
    """A picture from a file, upright, in mode L, LA, RGB or RGBA.

    With ``exact``, a picture that would lose something is refused instead. ICC profile and EXIF
    stay in ``.info``. Raises ImageError (not a picture, damaged, animated, samples of a kind not
    held) and LimitError (see :func:`ddpm_codec.codec.container.memory_limit`); OSError if the file
    cannot be read.
    """
    try:
        with _own_limit(), Image.open(source) as im:
            check_size(im.size)
            return prepare(im, exact=exact)
    except UnidentifiedImageError:
        raise ImageError("not a picture that Pillow can read") from None
    except OSError as e:
        if e.errno is not None:  # from the file system, not from Pillow
            raise
        raise ImageError(f"damaged picture ({e})") from None
    except (SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as e:
        raise ImageError(f"damaged picture ({e})") from None


def prepare(im: Image.Image, *, exact: bool = False) -> Image.Image:
    """Bring a picture into mode L, LA, RGB or RGBA, upright, all pixels decoded.

    Raises ImageError; see :func:`load` for ``exact``.
    """
    # A phone's JPEG holds further pictures (previews, gain maps) beside the photograph.
    if getattr(im, "is_animated", False) and im.format != "MPO":
        raise ImageError(f"animated or of several pages ({getattr(im, 'n_frames', '?')} frames)")
    if 0 in im.size:
        raise ImageError(f"{im.size[0]}x{im.size[1]}: no pixels")
    wide = _sixteen_bits(im)
    im.load()
    if im.mode == "F" or (im.mode == "I" and not wide):
        raise ImageError("32 bits a sample")
    out = _narrow(im) if im.mode.startswith("I") else _eight_bits(im)
    lost = "16 bits a sample reduced to 8" if wide else ""
    kept = ["exif", "icc_profile"]
    if im.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        lost = f"{im.mode} converted to {out.mode}"
        kept.remove("icc_profile")  # of the colours that were
    if lost and exact:
        raise ImageError(f"cannot be kept without loss ({lost})")
    if lost:
        warnings.warn(lost, ConversionWarning, stacklevel=2)
    out.info = {key: im.info[key] for key in kept if key in im.info}
    ImageOps.exif_transpose(out, in_place=True)
    return out


def _sixteen_bits(im: Image.Image) -> bool:
    """Whether the file has more than 8 bits a sample, though Pillow may hand out only 8.

    Asked before load(), which uses the raw mode up.
    """
    tile = getattr(im, "tile", None)
    args = tile[0][3] if tile else None
    raw = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else ""
    return im.mode.startswith("I;16") or ";16" in str(raw)


def _narrow(im: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit, rounded; the transparent value, if any, becomes alpha."""
    wide = np.asarray(im).astype(np.int64)
    out = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
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
