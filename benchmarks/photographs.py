"""The photographs that the benchmarks run on."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ddpm_codec.codec.image import load
from ddpm_codec.data import list_pictures

PICTURES = Path(__file__).resolve().parent / "pictures"
COFFEE = PICTURES / "coffee.png"


def photographs(
    folder: Path, count: int | None = None, crop: int = 0
) -> list[tuple[str, Image.Image]]:
    """File names and RGB pictures: the first ``count`` of a folder, None for all.

    crop: side in pixels of the middle square that is cut out of each; 0: all of the picture.
    """
    out = []
    for path in list_pictures([folder])[:count]:
        picture = load(path).convert("RGB")
        if crop:
            left, top = ((side - crop) // 2 for side in picture.size)
            picture = picture.crop((left, top, left + crop, top + crop))
        out.append((path.name, picture))
    return out
