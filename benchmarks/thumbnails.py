"""How many levels a thumbnail needs: what pillow.py's draft() is derived from.

    python benchmarks/thumbnails.py [--data DIR] [--threads N]

For every level of whole files: the least PSNR over the pictures, in dB, between the level's picture
and the last one, both shrunk to 1/2, 1/4, 1/8 and 1/16 (by Pillow's reducing_gap=None, BICUBIC).
Then for each of the sizes the level at which draft() stops, and the seconds of processor time to
decode up to there.
"""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

import ddpm_codec
from ddpm_codec.codec.encoder import psnr
from ddpm_codec.data import list_pictures
from ddpm_codec.pillow import DdpmImageFile

HERE = Path(__file__).resolve().parent
FACTORS = (1, 2, 4, 8, 16)


def shrunk(picture: Image.Image, k: int) -> np.ndarray:
    return np.asarray(picture.resize((picture.width // k, picture.height // k)))


def agreement(data: bytes) -> dict[float, list[float]]:
    """By SNR: for each factor the PSNR between a level's picture and the last, both shrunk."""
    levels = list(ddpm_codec.decode_levels(data))
    last = [shrunk(levels[-1].image, k) for k in FACTORS]
    return {
        v.snr: [psnr(shrunk(v.image, k), end) for k, end in zip(FACTORS, last, strict=True)]
        for v in levels
    }


def draft(data: bytes, k: int) -> tuple[int, float]:
    """The level's timestep at which draft() stops, and the seconds to decode up to it."""
    with Image.open(BytesIO(data)) as im:
        assert isinstance(im, DdpmImageFile)
        im.draft(None, (im.width // k, im.height // k))
        begin = time.process_time()
        im.load()
        return im.info["ddpm"]["t"], time.process_time() - begin


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
def main(data: Path, threads: int | None) -> None:
    """How many levels a thumbnail needs."""
    if threads:
        torch.set_num_threads(threads)
    files = [ddpm_codec.encode(path) for path in list_pictures([data])]
    tables = [agreement(file) for file in files]
    heads = [f"1/{k}" for k in FACTORS]
    print(f"| SNR | {' | '.join(heads)} |\n{'|---' * (1 + len(heads))}|")
    for snr in tables[0]:
        least = np.min([table[snr] for table in tables], axis=0)
        print(f"| {snr:g} | {' | '.join(f'{db:.1f}' for db in least)} |")
    print("\n| shrunk to | down to t | seconds |\n|---|---|---|")
    for k in FACTORS:
        ts, seconds = zip(*(draft(file, k) for file in files), strict=True)
        print(f"| 1/{k} | {max(ts)} | {np.mean(seconds):.2f} |")


if __name__ == "__main__":
    main()
