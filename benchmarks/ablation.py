"""What each part of the codec is worth: files made with one thing changed.

    python benchmarks/ablation.py [--data PICTURES] [--pictures 3] [--only TEXT]

Every row encodes the pictures with the model's own tables and one thing changed, and prints the
BD-rate (rate_distortion.py) of the levels' ends against the default's: more than 0 is worse; over
all that they share, where the lowest rates weigh as much as the highest, and from 28 dB on. Rows:

- *tau*: the expected energy, in noise variances, from which on a coefficient is sent;
- *gains*: none, or one for other numbers of bits of information;
- *across*: the first level without sums and differences over neighbouring blocks;
- *noise*: observations merged as if their noise had another variance than 1 / D;
- *ideal*: observations drawn from q in place of messages, at their information, 1/2 log2(1 + D v),
  and nothing else: what a perfect coder of the same chain would cost.

The second table says what prediction from neighbours could save: were the errors of each band
turned over squares of 4x4 blocks, as the first level's are, and each of the 16 sums and differences
sent by its own variance, known from the picture itself: per cent of each level's information, an
upper bound, where all 16 blocks of a square send the band. The third what the transform's size is
worth by the bands' variances alone: bits per pixel that independent Gaussian coefficients of these
variances cost, sum max(0, log2(variance SNR) / 2). Needs the extra ``bench``.
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
from PIL import Image

from ddpm_codec.codec.chain import Chain
from ddpm_codec.codec.encoder import Encoder, make_header, psnr
from ddpm_codec.codec.image import load
from ddpm_codec.data import list_pictures
from ddpm_codec.diffusion import transform
from ddpm_codec.diffusion.transform import BANDS, POSITIONS
from ddpm_codec.network.modelfile import Model, get_model
from ddpm_codec.rec import classes

HERE = Path(__file__).resolve().parent
GOOD = 28.0  # dB, from which on a picture is worth looking at
LEAST = 4  # squares of which a variance is worth anything


def no_gains(of: classes.Classes, share: NDArray[np.int64], mu: object) -> list[int]:
    return [classes.UNITY] * (int(share[-1]) + 1 if len(share) else 0)


def every(bits: int) -> Callable[..., NDArray[np.int64]]:
    """One gain for so many bits of information."""
    plain = classes.shares
    return lambda of: plain(of, bits)


def noise(variance: float) -> Callable[..., None]:
    """Merge as if observations had this share of their noise: they count for more, or for less."""
    plain = Chain._merge

    def merge(self: Chain, i: int, tile: Any, message: Any, x0_hat: Any, y: Any) -> None:
        before = self.precision_before(i)
        d = (self.snrs[i] - before) / variance
        weight = d / (before + d) if before else 1.0
        usual = (self.snrs[i] - before) / self.snrs[i]
        # What is merged is x0_hat + y / sqrt(D), with the usual weight: so M is moved afterwards.
        place = slice(None), tile.rows, tile.columns
        m, known = self.m[place].copy(), self.depth[place] >= 0
        plain(self, i, tile, message, x0_hat, y)
        moved = m + (self.m[place] - m) * (weight / usual)
        self.m[place] = np.where(known, moved, self.m[place])

    return merge


@dataclass(frozen=True)
class Row:
    """One thing changed."""

    name: str
    tau: float | None = None
    ideal: bool = False
    patches: dict[tuple[Any, str], Any] = field(default_factory=dict)


DEFAULT = "default"
ROWS = (
    Row(DEFAULT),
    Row("ideal", ideal=True),
    Row("tau 0.25", tau=0.25),
    Row("tau 1", tau=1.0),
    Row("tau 2", tau=2.0),
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
    return curves.Point("", 8 * nbytes / pixels, db, *[math.nan] * 6)


def above(curve: curves.Curve, floor: float) -> curves.Curve:
    """From the last point on before those above ``floor`` dB."""
    first = next(k for k, p in enumerate(curve) if p.psnr > floor)
    return curve[max(0, first - 1) :]


def our_curve(picture: Image.Image, model: Model) -> curves.Curve:
    """Points at the levels' ends, from one pass of the encoder."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    encoder = Encoder(pixels, make_header(picture, model), model)
    out = []
    for _ in range(encoder.chain.header.levels):
        reached = encoder.step()
        out.append(point(len(encoder.writer), reached, size))
    return out


def ideal_curve(picture: Image.Image, model: Model) -> curves.Curve:
    """The same of observations drawn from q, at their information."""
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
    """Share of each level's information, from the second level on, that neighbours could save."""
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
        turned = transform.across(error * np.sqrt(added), chain.blocks)
        for some in (sent & (before < 0), sent & (before >= 0)):
            share = transform.across(some.astype(np.float64), chain.blocks)[:, place == 0]
            for band, whole in enumerate(np.isclose(share, POSITIONS**0.5)):
                if whole.sum() >= LEAST:
                    squares = [turned[band, place == k][whole] ** 2 for k in range(POSITIONS)]
                    v = np.mean(squares, 1)
                    each = np.log2(1 + v.mean()) / 2 - np.log2(1 + v).mean() / 2
                    # A variance fitted to n numbers is too good by half a nat.
                    each -= 0.5 / math.log(2) / len(squares[0])
                    saved += max(0.0, float(each) * len(squares[0]) * POSITIONS)
        out.append(100 * saved / max(chain.information - bits, 1.0))
    return out


def gaussian_bits(picture: Image.Image, side: int, snrs: list[float]) -> list[float]:
    """Bits per pixel by the variances of the bands of a side x side DCT and the colour rotation."""
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
    given: Model, pictures: list[Image.Image], only: str
) -> Iterator[tuple[str, list[curves.Curve]]]:
    """Name and curves of each row."""
    for row in (row for row in ROWS if row.name == DEFAULT or only in row.name):
        ladder = given.ladder if row.tau is None else replace(given.ladder, tau=row.tau)
        model = replace(given, ladder=ladder)
        with ExitStack() as changed:
            for (owner, name), other in row.patches.items():
                changed.enter_context(mock.patch.object(owner, name, other))
            curve = ideal_curve if row.ideal else our_curve
            yield row.name, [curve(picture, model) for picture in pictures]


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--model", default=None, help="A name or a file.")
@click.option("--pictures", default=3, show_default=True, help="Of --data, the first.")
@click.option("--crop", default=0, help="Of each picture, the middle so many pixels wide.")
@click.option("--only", default="", help="Rows whose name has this in it.")
@click.option("--threads", default=2, show_default=True)
def main(data: Path, model: str | None, pictures: int, crop: int, only: str, threads: int) -> None:
    """Ablation: BD-rates against the default."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    seen = [load(path).convert("RGB") for path in list_pictures([data])[:pictures]]
    if crop:
        boxes = [((w - crop) // 2, (h - crop) // 2) for w, h in (im.size for im in seen)]
        seen = [im.crop((x, y, x + crop, y + crop)) for im, (x, y) in zip(seen, boxes, strict=True)]
    loaded = get_model(model)
    print(f"{len(seen)} pictures\n")
    heads = "changed", "BD-rate", "(pictures)", f"from {GOOD:g} dB on", "(pictures)"
    print(f"| {' | '.join(heads)} |\n" + "|---" * 5 + "|")
    default: list[curves.Curve] = []
    for name, mine in rows(loaded, seen, only):
        default = default or mine
        cells = [name]
        for floor in (0.0, GOOD):
            pairs = zip(default, mine, strict=True)
            rates = [curves.bd_rate(above(a, floor), above(b, floor)) for a, b in pairs]
            cells += [f"{np.mean(rates):+.2f} %", f"{min(rates):+.1f} to {max(rates):+.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    if only:
        return
    saved = np.mean([neighbours(picture, loaded) for picture in seen], 0)
    print("\nprediction from neighbours, per cent of each level's information, from the second on:")
    print(" ".join(f"{x:.2f}" for x in saved))
    snrs = loaded.ladder.snrs[::4]
    print("\n| transform | " + " | ".join(f"SNR {s:.3g}" for s in snrs) + " |")
    print("|---" * (len(snrs) + 1) + "|")
    for side in (4, 8, 16):
        bits = np.mean([gaussian_bits(picture, side, snrs) for picture in seen], 0)
        print(f"| {side}x{side} | " + " | ".join(f"{b:.4f}" for b in bits) + " |")


if __name__ == "__main__":
    sys.exit(main())
