"""One photograph as one file, and the pictures that the file gives when it is cut at six points.

    python benchmarks/demo.py [--picture FILE] [--out DIR]

Writes the file, the pictures, a contact sheet of all and a film strip of a detail. Prints bytes and
PSNR at each of the six timesteps.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
from photographs import COFFEE
from PIL import Image, ImageDraw, ImageFont

import ddpm_codec
from ddpm_codec.codec.encoder import psnr
from ddpm_codec.codec.image import load

ROOT = Path(__file__).resolve().parent.parent
POINTS = 6
MARGIN, LINE = 12, 26  # pixels, of the contact sheet
DETAIL = 240  # pixels, side of the film strip's pictures


def contact_sheet(cells: list[tuple[Image.Image, str]], columns: int = 4) -> Image.Image:
    """Pictures of one size in a grid, each with a line of text below it."""
    width, height = cells[0][0].size
    rows = -(-len(cells) // columns)
    step = (width + MARGIN, height + LINE + MARGIN)
    sheet = Image.new("RGB", (columns * step[0] + MARGIN, rows * step[1] + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for i, (picture, text) in enumerate(cells):
        x, y = MARGIN + i % columns * step[0], MARGIN + i // columns * step[1]
        sheet.paste(picture, (x, y))
        draw.text((x, y + height + 2), text, "black", font)
    return sheet


@click.command()
@click.option("--picture", default=COFFEE, type=Path, show_default=True)
@click.option("--out", default=ROOT / "demo", type=Path, show_default=True)
@click.option("--model", default=None, help="A name or a file.")
def main(picture: Path, out: Path, model: str | None) -> None:
    """Encode a photograph once, and decode the file at six points."""
    out.mkdir(parents=True, exist_ok=True)
    original = load(picture)
    begin = time.perf_counter()
    data = ddpm_codec.encode(original, model=model)
    encoded = time.perf_counter()
    levels = list(ddpm_codec.decode_levels(data, model=model))
    decoded = time.perf_counter()
    (out / f"{picture.stem}.ddpm").write_bytes(data)

    pixels = original.width * original.height
    print(f"{picture.name}: {original.width}x{original.height}, one file of {len(data):,} bytes;")
    print(f"encoded in {encoded - begin:.1f} s, all levels decoded in {decoded - encoded:.1f} s")
    print("     t      bytes     bpp   PSNR  picture")
    original.save(out / f"{picture.stem}-original.png")
    film = []
    cells = [(original, f"original, {picture.stat().st_size:,} bytes as {picture.suffix[1:]}")]
    chosen = np.unique(np.linspace(0, len(levels) - 1, POINTS).round().astype(int))
    for level in (levels[i] for i in chosen):
        name = f"{picture.stem}-t{level.t:04d}.png"
        level.image.save(out / name)
        bpp, quality = 8 * level.bytes / pixels, psnr(np.asarray(original), np.asarray(level.image))
        print(f"  {level.t:4d}  {level.bytes:9,}  {bpp:6.3f}  {quality:5.2f}  {out.name}/{name}")
        text = f"t = {level.t}: {level.bytes:,} bytes, {bpp:.3f} bpp, {quality:.2f} dB"
        cells.append((level.image, text))
        film.append((level.image, f"{level.bytes:,} bytes, {quality:.1f} dB"))
    contact_sheet(cells).save(out / "contact-sheet.png")
    left, top = (original.width - DETAIL) // 2, (original.height - DETAIL) // 2
    box = (left, top, left + DETAIL, top + DETAIL)
    strip = [(im.crop(box), text) for im, text in [*film, (original, "original")]]
    contact_sheet(strip, len(strip)).save(out / "film-strip.png")
    print(f"all together: {out.name}/contact-sheet.png; a detail: {out.name}/film-strip.png")


if __name__ == "__main__":
    main()
