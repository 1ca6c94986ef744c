"""Other codecs to compare with: Pillow's at several settings, and three whose files are cut."""

from __future__ import annotations

import io
import subprocess
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

# Chroma sub-sampling is each encoder's default: 4:2:0 for JPEG, WebP and AVIF, none for JPEG 2000
# and JPEG XL. Names ending in -444 have none; names ending in -fast and -slow have other efforts.
Peer = tuple[str, str, tuple[float, ...], dict[str, object]]  # format, option, its values, others
JPEG = (5, 8, 12, 18, 25, 35, 50, 65, 75, 85, 90, 95)
WEBP = (1, 5, 15, 30, 50, 65, 75, 82, 88, 92, 96)
AVIF = (1, 5, 10, 20, 30, 40, 50, 60, 70, 78, 85, 91)
JXL = (1, 5, 10, 20, 30, 45, 60, 70, 80, 88, 93)
PEERS: dict[str, Peer] = {
    "jpeg": ("JPEG", "quality", JPEG, {"optimize": True}),
    "jpeg-444": ("JPEG", "quality", JPEG, {"optimize": True, "subsampling": "4:4:4"}),
    "webp": ("WEBP", "quality", WEBP, {"method": 6}),
    "webp-fast": ("WEBP", "quality", WEBP, {"method": 0}),
    "avif": ("AVIF", "quality", AVIF, {"speed": 4}),
    "avif-fast": ("AVIF", "quality", AVIF, {"speed": 8}),
    "avif-slow": ("AVIF", "quality", AVIF, {"speed": 1}),
    "avif-444": ("AVIF", "quality", AVIF, {"speed": 4, "subsampling": "4:4:4"}),
    "jxl": ("JXL", "quality", JXL, {"effort": 7}),
    "jxl-fast": ("JXL", "quality", JXL, {"effort": 3}),
    "jxl-slow": ("JXL", "quality", JXL, {"effort": 9}),
    "jpeg2000": (
        "JPEG2000", "rate", (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
        {"irreversible": True, "quality_mode": "rates", "mct": 1},
    ),
}  # fmt: skip
# The codecs whose files are cut, with the programs that they need.
CUT: dict[str, tuple[str, ...]] = {
    "jpeg-cut": (),
    "jpeg2000-cut": ("opj_decompress",),
    "jxl-cut": ("cjxl", "djxl"),
}

Cutter = tuple[
    bytes, Callable[[bytes], NDArray[np.uint8]]
]  # a file, and the function that decodes a prefix


def cut_jpeg(picture: Image.Image, _: Path) -> Cutter:
    """A progressive JPEG of quality 95. Pillow decodes a prefix."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, progressive=True, optimize=True)

    def decode(prefix: bytes) -> NDArray[np.uint8]:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            return np.asarray(Image.open(io.BytesIO(prefix)).convert("RGB"))
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False

    return file.getvalue(), decode


def cut_jpeg2000(picture: Image.Image, folder: Path) -> Cutter:
    """A codestream of 40 quality layers, 0.05 to 4 bpp. Of a prefix the whole layers are decoded.

    OpenJPEG decodes an unfinished layer, too, and the result is often worse than without it. So a
    prefix is decoded up to the last layer that gives the same picture as in the whole file.
    """
    file = io.BytesIO()
    layers = (24 / np.geomspace(0.05, 4, 40)).tolist()
    picture.save(
        file, "JPEG2000", irreversible=True, mct=1, quality_mode="rates", quality_layers=layers,
        progression="LRCP", no_jp2=True,
    )  # fmt: skip
    data = file.getvalue()

    def layers_of(prefix: bytes, n: int) -> NDArray[np.uint8]:
        command = ("opj_decompress", "-allow-partial", "-l", str(n), "-i")
        return by_program(folder, "j2k", *command)(prefix)

    whole = [layers_of(data, n) for n in range(1, len(layers) + 1)]

    def decode(prefix: bytes) -> NDArray[np.uint8]:
        def missing(n: int) -> bool:
            try:
                return not np.array_equal(layers_of(prefix, n), whole[n - 1])
            except OSError:
                return True

        n = bisect_left(range(1, len(whole) + 1), True, key=missing)
        if not n:
            raise OSError("no whole layer")
        return whole[n - 1]

    return data, decode


def cut_jxl(picture: Image.Image, folder: Path) -> Cutter:
    """A progressive JPEG XL of distance 1, the default."""
    picture.save(folder / "whole.png")
    whole = folder / "whole.jxl"
    command = ["cjxl", folder / "whole.png", whole, "-d", "1", "-p", "-e", "7"]
    subprocess.run(command, check=True, capture_output=True)
    return whole.read_bytes(), by_program(folder, "jxl", "djxl", "--allow_partial_files")


def by_program(folder: Path, suffix: str, *command: str) -> Callable[[bytes], NDArray[np.uint8]]:
    """A decoder that calls a program, which writes PPM. It raises OSError if the program fails."""
    cut, out = folder / f"cut.{suffix}", folder / "cut.ppm"

    def decode(prefix: bytes) -> NDArray[np.uint8]:
        cut.write_bytes(prefix)
        out.unlink(missing_ok=True)
        to = [out] if command[0] == "djxl" else ["-o", out]
        subprocess.run([*command, cut, *to], capture_output=True, check=False)
        with Image.open(out) as decoded:
            return np.asarray(decoded.convert("RGB"))

    return decode


CUTTERS = {"jpeg-cut": cut_jpeg, "jpeg2000-cut": cut_jpeg2000, "jxl-cut": cut_jxl}
