"""What each part of the codec is worth: pictures are encoded with one thing changed.

    python benchmarks/ablation.py [--data PICTURES] [--pictures 3] [--only TEXT]

Each row of the first table is one change. It has the BD-rate (rate_distortion.py) at the levels'
ends against the unchanged codec, where more than 0 is worse, once over all rates and once from 28
dB on. The tables of the model stay the same. The changes are:

- *tau*: another significance threshold, the expected energy in noise variances from which on a
  coefficient is sent;
- *gains*: no gains, or a gain for another number of bits of information;
- *across*: a first level without sums and differences over neighbouring blocks;
- *noise*: observations are merged as if the variance of their noise were not 1 / D;
- *ideal*: observations are drawn from q and cost their information, 1/2 log2(1 + D v), and nothing
  else, as with a perfect coder of the same chain.

The second table has an upper bound of what prediction from neighbouring blocks could save, in per
cent of each level's information. The errors of each band are transformed over squares of 4x4
blocks, as in the first level, and each of the 16 sums and differences is coded with its own
variance, measured on the picture itself. Only squares in which all 16 blocks send the band count.

The third table compares sizes of the DCT by the variances of its bands alone. It has the bits per
pixel of independent Gaussian coefficients with these variances, the sum of max(0, log2(variance
SNR) / 2). Needs the extra ``bench``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import curves
import numpy as np
import torch
from numpy.typing import NDArray
from photographs import PICTURES, photographs
from PIL import Image

from ddpm_codec.codec.chain import Chain
from ddpm_codec.codec.encoder import Encoder, make_header, psnr
from ddpm_codec.diffusion import transform
from ddpm_codec.diffusion.transform import BANDS, POSITIONS
from ddpm_codec.network.modelfile import Model, get_model
from ddpm_codec.rec import classes

GOOD = 28.0  # dB, of a picture of fair quality
LEAST = 4  # squares that a variance is estimated from, at least


def no_gains(_: classes.Classes, share: NDArray[np.int64], mu: object) -> list[int]:
    """In place of classes.fit_gains: all gains are 1."""
    return [classes.UNITY] * (int(share[-1]) + 1 if len(share) else 0)


def every(bits: int) -> Callable[..., NDArray[np.int64]]:
    """In place of classes.shares: one gain for so many bits of information."""
    plain = classes.shares
    return lambda parts: plain(parts, bits)


def noise(variance: float) -> Callable[..., None]:
    """In place of Chain._merge: as if the noise had this multiple of its variance."""
    plain = Chain._merge

    def merge(self: Chain, i: int, tile: Any, message: Any, x0_hat: Any, y: Any) -> None:
        before = self.precision_before(i)
        d = (self.snrs[i] - before) / variance
        weight = d / (before + d) if before else 1.0
        usual = (self.snrs[i] - before) / self.snrs[i]
        # The plain method moves M by the usual weight; afterwards that is corrected.
        place = slice(None), tile.rows, tile.columns
        m, observed = self.m[place].copy(), self.depth[place] >= 0
        plain(self, i, tile, message, x0_hat, y)
        moved = m + (self.m[place] - m) * (weight / usual)
        self.m[place] = np.where(observed, moved, self.m[place])

    return merge


@dataclass(frozen=True)
class Row:
    """One change."""

    name: str
    tau: float | None = None
    ideal: bool = False
    patches: dict[tuple[Any, str], Any] = field(default_factory=dict)  # by owner and attribute


DEFAULT = "default"
ROWS = (
    Row(DEFAULT),
    Row("ideal", ideal=True),
    Row("tau 0.125", tau=0.125),
    Row("tau 0.5", tau=0.5),
    Row("tau 1", tau=1.0),
    Row("without gains", patches={(classes, "fit_gains"): no_gains}),
    Row("a gain every 30 bits", patches={(classes, "shares"): every(30)}),
    Row("a gain every 500 bits", patches={(classes, "shares"): every(500)}),
    Row(
        "first level without across",
        patches={
            (transform, "across"): lambda c, blocks: c,
            (transform, "positions"): lambda blocks: np.full(math.prod(blocks), POSITIONS),
        },
    ),
    Row("noise of 0.95", patches={(Chain, "_merge"): noise(0.95)}),
    Row("noise of 1.05", patches={(Chain, "_merge"): noise(1.05)}),
)


def point(nbytes: float, db: float, pixels: int) -> curves.Point:
    """A point that has a rate and a PSNR only."""
    return curves.Point("", 8 * nbytes / pixels, db, *[math.nan] * 6)


def above(curve: curves.Curve, floor: float) -> curves.Curve:
    """The points above ``floor`` dB and the last one before them."""
    first = next(k for k, p in enumerate(curve) if p.psnr > floor)
    return curve[max(0, first - 1) :]


def our_curve(picture: Image.Image, model: Model) -> curves.Curve:
    """A point at each level's end, from one pass of the encoder."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    encoder = Encoder(pixels, make_header(picture, model), model)
    out = []
    for _ in range(encoder.chain.header.levels):
        reached = encoder.step()
        out.append(point(len(encoder.writer), reached, size))
    return out


def ideal_curve(picture: Image.Image, model: Model) -> curves.Curve:
    """The same with observations drawn from q, which cost their information."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    chain, out = Chain(make_header(picture, model), model), []
    chain.observe(pixels)
    estimate = chain.estimate(-1)
    for i in range(chain.header.levels):
        chain.draw_level(i, estimate, 1, truth=True)
        estimate = chain.estimate(i)
        reached = psnr(pixels, chain.picture(estimate.x0_hat))
        out.append(point(chain.information / 8, reached, size))
    return out


def neighbours(picture: Image.Image, model: Model) -> list[float]:
    """Per cent of the information that neighbours could save, for each level but the first."""
    chain, out = Chain(make_header(picture, model), model), []
    chain.observe(np.asarray(picture))
    estimate, place = chain.estimate(-1), transform.positions(chain.blocks)
    for i in range(chain.header.levels):
        before, bits = chain.depth.reshape(BANDS, -1), chain.information
        error = chain.c.astype(np.float64) - estimate.x0_hat
        added = np.where(before < 0, chain.snrs[i], chain.snrs[i] - chain.precision_before(i))
        chain.draw_level(i, estimate, 1, truth=True)
        estimate = chain.estimate(i)
        if i == 0:
            continue
        sent, saved = chain.depth.reshape(BANDS, -1) == i, 0.0
        crossed = transform.across(error * np.sqrt(added), chain.blocks)
        for some in (sent & (before < 0), sent & (before >= 0)):
            share = transform.across(some.astype(np.float64), chain.blocks)[:, place == 0]
            for band, whole in enumerate(np.isclose(share, POSITIONS**0.5)):
                if whole.sum() >= LEAST:
                    squares = [crossed[band, place == k][whole] ** 2 for k in range(POSITIONS)]
                    v = np.mean(squares, 1)
                    each = np.log2(1 + v.mean()) / 2 - np.log2(1 + v).mean() / 2
                    # Coding n numbers with a variance fitted to them saves half a nat too much.
                    each -= 0.5 / math.log(2) / len(squares[0])
                    saved += max(0.0, float(each) * len(squares[0]) * POSITIONS)
        out.append(100 * saved / max(chain.information - bits, 1.0))
    return out


def gaussian_bits(picture: Image.Image, side: int, snrs: list[float]) -> list[float]:
    """Bits per pixel at each SNR, by the variances of the bands of a side x side DCT."""
    x = np.asarray(picture).astype(np.float64) / 127.5 - 1
    h, w = (n // side * side for n in x.shape[:2])
    n = np.arange(side)
    dct = np.sqrt(2 / side) * np.cos(np.pi * (2 * n[None, :] + 1) * n[:, None] / (2 * side))
    dct[0] /= np.sqrt(2)
    blocks = (x[:h, :w] @ transform.COLOUR.T).reshape(h // side, side, w // side, side, 3)
    bands = np.einsum("vy,aybxc,hx->vhcab", dct, blocks, dct)
    variance = bands.var((-2, -1)).reshape(-1)
    return [float(0.5 * np.log2(np.maximum(variance * s, 1)).sum() / side**2) for s in snrs]


def rows(
    plain: Model, pictures: list[Image.Image], only: str
) -> Iterator[tuple[str, list[curves.Curve]]]:
    """Name and curves (one per picture) of the default and of the rows whose name has ``only``."""
    for row in (row for row in ROWS if row.name == DEFAULT or only in row.name):
        ladder = plain.ladder if row.tau is None else replace(plain.ladder, tau=row.tau)
        model = replace(plain, ladder=ladder)
        with ExitStack() as stack:
            for (owner, name), other in row.patches.items():
                stack.enter_context(mock.patch.object(owner, name, other))
            curve = ideal_curve if row.ideal else our_curve
            yield row.name, [curve(picture, model) for picture in pictures]


@click.command()
@click.option("--data", default=PICTURES, type=Path, help="Folder.  [default: pictures]")
@click.option("--model", default=None, help="A name or a file.")
@click.option("--pictures", default=3, show_default=True, help="Use the first N of --data.")
@click.option("--crop", default=0, help="Use the middle NxN pixels of each picture.")
@click.option("--only", default="", help="Only rows whose name contains this.")
@click.option("--threads", default=2, show_default=True)
def main(data: Path, model: str | None, pictures: int, crop: int, only: str, threads: int) -> None:
    """Ablation: BD-rates against the default."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    shots = [picture for _, picture in photographs(data, pictures, crop)]
    loaded = get_model(model)
    print(f"{len(shots)} pictures\n")
    heads = "changed", "BD-rate", "(pictures)", f"from {GOOD:g} dB on", "(pictures)"
    print(f"| {' | '.join(heads)} |\n" + "|---" * 5 + "|")
    default: list[curves.Curve] = []
    for name, mine in rows(loaded, shots, only):
        default = default or mine
        cells = [name]
        for floor in (0.0, GOOD):
            pairs = zip(default, mine, strict=True)
            rates = [curves.bd_rate(above(a, floor), above(b, floor)) for a, b in pairs]
            cells += [f"{np.mean(rates):+.2f} %", f"{min(rates):+.1f} to {max(rates):+.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    if only:
        return
    saved = np.mean([neighbours(picture, loaded) for picture in shots], 0)
    print("\nprediction from neighbours could save, per cent of each level from the second on:")
    print(" ".join(f"{x:.2f}" for x in saved))
    snrs = loaded.ladder.snrs[::4]
    print("\n| transform | " + " | ".join(f"SNR {s:.3g}" for s in snrs) + " |")
    print("|---" * (len(snrs) + 1) + "|")
    for side in (4, 8, 16):
        bits = np.mean([gaussian_bits(picture, side, snrs) for picture in shots], 0)
        print(f"| {side}x{side} | " + " | ".join(f"{b:.4f}" for b in bits) + " |")


if __name__ == "__main__":
    sys.exit(main())
