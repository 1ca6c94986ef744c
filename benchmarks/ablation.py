"""What each part of the codec is worth: tables fitted and files made with one thing changed.

    python benchmarks/ablation.py --train PICTURES [--data OTHERS] [--pictures 6] [--shots 24]

For every row the network of --model gets tables of its own, fitted on --train as `ddpmc calibrate`
does, and encodes the pictures of --data; one file each, decoded at every level's end and at safe
points inside. Prints the BD-rate (rate_distortion.py) against the default's files: more than 0
is worse; over all that they share, where the lowest rates weigh as much as the highest, and from 28
dB on. Rows:

- *tau*: from which ratio of a coefficient's expected energy to the noise on it is sent at all;
- *r*: cells divide into r parts from level to level, so that SNR grows by r^2;
- *first SNR*: more or fewer levels before;
- *without contexts*: the laws of symbols by the network's scale alone; *without neighbours*: no
  prediction from the blocks around in the lowest bands;
- *without clipping*: x0_hat not projected onto the cells;
- *margins*: how near to a boundary a value has to be for the sender to say on which side it lies;
- *fresh noise*: each level a new dithered observation, merged with what is known, as DDPM's
  Algorithms 3 and 4 read, in place of a finer cell. Both by ideal code lengths under the
  network's Laplace distributions, so against nested cells reckoned likewise.

The transform's size cannot be changed under a trained network. The second table says what the
bands' variances alone have to say to it: bits per pixel that independent Gaussian coefficients of
these variances cost at each level's SNR, sum max(0, log2(variance SNR) / 2), for each picture with
its own variances. Needs the extra ``bench``.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import click
import numpy as np
import rate_distortion as rd
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpm_codec.codec import chain, codec, contexts, nested
from ddpm_codec.codec import container as bitstream
from ddpm_codec.codec.image import load
from ddpm_codec.codec.nested import Floats
from ddpm_codec.data import list_pictures
from ddpm_codec.diffusion import transform
from ddpm_codec.diffusion.transform import BITS
from ddpm_codec.network.modelfile import Model, find, get_model, load_model
from ddpm_codec.network.tables import SCALE_MIN, SCALE_STEP, Ladder, laplace_cdf
from ddpm_codec.training import calibrate

HERE = Path(__file__).resolve().parent


def nothing_around(self: contexts.Surroundings, bands: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.zeros((len(bands), self.total.size), np.uint8)


PLAIN = {
    (contexts.Surroundings, "energies"): nothing_around,
    (contexts.Surroundings, "surprises"): nothing_around,
}


@dataclass(frozen=True)
class Row:
    """One thing changed; ``base``: the row whose tables serve, where they need not be its own."""

    name: str
    ladder: Ladder = field(default_factory=Ladder)
    tau: float = 1.0
    base: str = ""
    margins: float = 1.0  # in units of the model's
    patches: dict[tuple[Any, str], Any] = field(default_factory=dict)


DEFAULT = "default"
GOOD = 28.0  # dB, from which on a picture is worth looking at
ROWS = (
    Row(DEFAULT),
    Row("tau 0.5", tau=0.5),
    Row("tau 2", tau=2.0),
    Row("tau 3", tau=3.0),
    Row("tau 4", tau=4.0),
    Row("r = 3", Ladder(levels=6, ratio=3)),
    Row("r = 4", Ladder(levels=5, ratio=4)),
    Row("first SNR 0.16 (8 levels)", Ladder(levels=8)),
    Row("first SNR 0.01 (10 levels)", Ladder(levels=10)),
    Row("without contexts", patches=PLAIN),
    Row("without neighbours", patches={(calibrate, "fit_neighbours"): lambda *_: None}),
    Row("without clipping", base=DEFAULT, patches={(chain.Nested, "mean"): chain.Chain.mean}),
    Row("margins / 10", base=DEFAULT, margins=0.1),
    Row("margins x 4", base=DEFAULT, margins=4.0),
)


def point(nbytes: float, db: float, pixels: int) -> rd.Point:
    return rd.Point("", 8 * nbytes / pixels, db, *[math.nan] * 6)


def above(curve: rd.Curve, floor: float) -> rd.Curve:
    """From the last point on before those above ``floor`` dB."""
    first = next(k for k, p in enumerate(curve) if p.psnr > floor)
    return curve[max(0, first - 1) :]


def our_curve(picture: Image.Image, model: Model, cuts: int) -> rd.Curve:
    """Points at the levels' ends and at ``cuts`` places inside each, from one pass."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    encoder = codec.Encoder(pixels, codec.make_header(picture, model, None, None, 0), model)
    out = []
    for i in range(model.ladder.levels):
        before, estimate = encoder.chain.fork(), copy.copy(encoder.estimate)
        encoder.step()
        level = bitstream.parse(encoder.bytes()).levels[-1]
        inside = [k for k, cut in enumerate(level.cuts[:-1], 1) if cut.groups]
        for k in np.unique(np.linspace(0, len(inside) - 1, cuts + 2).round()[1:-1].astype(int)):
            if len(inside) <= cuts:
                break
            part = before.fork()
            part.decode_level(i, copy.copy(estimate), level, inside[k])
            share = level.share(inside[k])
            reached = part.picture(part.mean(part.estimate(i - 1, share)))
            nbytes = level.start + level.cuts[inside[k] - 1].nbytes
            out.append(point(nbytes, codec.psnr(pixels, reached), size))
        reached = encoder.chain.picture(encoder.chain.mean(encoder.estimate))
        out.append(point(len(encoder.bytes()), codec.psnr(pixels, reached), size))
    return sorted(out, key=lambda p: p.bpp)


# --- Fresh noise at each level, by ideal code lengths ---------------------------------------------


def mass(low: Floats, high: Floats, mean: Floats, b: Floats) -> NDArray[np.float64]:
    """Of Laplace(mean, b) between ``low`` and ``high``; all alike in shape."""
    return np.asarray(laplace_cdf((high - mean) / b) - laplace_cdf((low - mean) / b))


def ideal_curve(picture: Image.Image, model: Model, fresh: bool) -> rd.Curve:
    """Ideal code lengths of the spectral path: nested cells, or fresh observations merged."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    header, tables = codec.make_header(picture, model, None, None, 0), model.tables
    one = chain.Nested(header, model)
    c = one.coefficients(pixels)
    m, known = np.zeros_like(c), np.zeros(c.shape, bool)
    cells = np.zeros((2, *c.shape), np.float32)  # lower and upper edges
    mean = np.repeat(tables.mean[:, None].astype(np.float32), one.n, 1)
    lam = SCALE_MIN + SCALE_STEP * (tables.prior[:, None] + 0.5) + np.zeros_like(c)
    rng, bits, out, g = np.random.default_rng(0), 0.0, [], 0.0
    offset = rng.random(c.shape, dtype=np.float32)  # the nested grids' dither, in first cells
    ratio, first = model.ladder.ratio, math.sqrt(12 / one.snrs[0])
    for i, snr in enumerate(one.snrs):
        # Scales are in units of the noise of the level before.
        b = np.maximum(np.exp(lam) * ratio * snr**-0.5, 1e-6).astype(np.float32)
        send = known | (nested.scale_index(lam) >= tables.on[i])
        send[one.components * BITS :] = False
        width = np.full_like(c, math.sqrt(12 / snr))
        if fresh:  # what is missing of the precision that a cell would have
            width[known] = math.sqrt(12 / (snr - g))
            offset = rng.random(c.shape, dtype=np.float32)
            shift = offset * width
        else:
            shift = offset * first
        low = np.floor((c - shift) / width) * width + shift
        high = low + width
        p = mass(low, high, mean, b)
        if not fresh:  # of a cell's parts, kept from vanishing as in tables.laplace_refine
            least = 1e-4 * np.minimum(b / width, 1)
            whole = mass(*cells, mean, b) + ratio * least
            p = np.where(known, (p + least) / whole, p)
        bits -= float(np.log2(p[send] + 1e-7).sum())
        middle = (low + high) / 2
        if fresh:
            middle = np.where(known, (g * m + (snr - g) * middle) / snr, middle)
        m = np.where(send, middle, 0).astype(np.float32)
        cells, known, g = np.where(send, [low, high], cells), send, snr
        estimate = one.ask(m.copy(), chain.masked(known, snr, one.blocks), snr)
        mean, lam = m - np.float32(snr**-0.5) * estimate.eps, estimate.lam
        shown = mean if fresh else np.where(known, mean.clip(*cells), mean)
        out.append(point(bits / 8, codec.psnr(pixels, one.picture(shown)), size))
    return out


# --- Transform sizes ------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------


def same_margins(given: Model) -> Callable[..., None]:
    """In place of calibrate.fit_margins, which takes minutes: the model's, by SNR."""

    def interpolate(model: Model, *_: object) -> None:
        at, snrs = (np.log(m.ladder.snrs) for m in (model, given))
        columns = [np.interp(at, snrs, np.log(x)) for x in given.tables.margin.T]
        model.tables.margin = np.exp(np.stack(columns, 1))

    return interpolate


def fitted(row: Row, which: str | None, train: list[Path], shots: int, folder: Path) -> Model:
    """The model with tables of the row's own."""
    out = folder / "model.safetensors"
    calibrate.calibrate(
        find(which), train, out, pictures=shots, tau=row.tau,
        levels=row.ladder.levels, finest=row.ladder.finest, ratio=row.ladder.ratio,
        say=lambda text: None,
    )  # fmt: skip
    return load_model(out)


def rows(
    which: str | None, train: list[Path], shots: int, pictures: list[Image.Image], cuts: int,
    only: str,
) -> Iterator[tuple[str, list[rd.Curve]]]:  # fmt: skip
    """Name and curves of each row."""
    models: dict[str, Model] = {}
    for row in (row for row in ROWS if row.name == DEFAULT or only in row.name):
        with TemporaryDirectory() as folder, ExitStack() as changed:
            margins = same_margins(get_model(which))
            changed.enter_context(mock.patch.object(calibrate, "fit_margins", margins))
            for (owner, name), other in row.patches.items():
                changed.enter_context(mock.patch.object(owner, name, other))
            model = models.get(row.base) or fitted(row, which, train, shots, Path(folder))
            models[row.name] = model
            margin = model.tables.margin * row.margins
            model = replace(model, tables=replace(model.tables, margin=margin))
            yield row.name, [our_curve(picture, model, cuts) for picture in pictures]


@click.command()
@click.option("--train", required=True, multiple=True, type=Path, help="Pictures to fit tables on.")
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--model", default=None, help="Whose network: a name or a file.")
@click.option("--pictures", default=6, show_default=True, help="Of --data, the first.")
@click.option("--shots", default=24, show_default=True, help="Crops of --train for each row.")
@click.option("--cuts", default=1, show_default=True, help="Inside each level, beside its end.")
@click.option("--only", default="", help="Rows whose name has this in it.")
@click.option("--threads", default=2, show_default=True)
def main(
    train: tuple[Path, ...], data: Path, model: str | None, pictures: int, shots: int, cuts: int,
    only: str, threads: int,
) -> None:  # fmt: skip
    """Ablation: BD-rates against the default."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    seen = [load(path).convert("RGB") for path in list_pictures([data])[:pictures]]
    print(f"{len(seen)} pictures, tables from {shots} crops each\n")
    heads = "changed", "levels", "BD-rate", "(pictures)", f"from {GOOD:g} dB on", "(pictures)"
    print(f"| {' | '.join(heads)} | last level: bpp | PSNR |\n" + "|---" * 8 + "|")

    def show(name: str, mine: list[rd.Curve], anchor: list[rd.Curve], levels: int) -> None:
        cells = [name, str(levels)]
        for floor in (0.0, GOOD):
            pairs = zip(anchor, mine, strict=True)
            rates = [rd.bd_rate(above(a, floor), above(b, floor)) for a, b in pairs]
            cells += [f"{np.mean(rates):+.2f} %", f"{min(rates):+.1f} to {max(rates):+.1f}"]
        bpp, db = np.mean([(curve[-1].bpp, curve[-1].psnr) for curve in mine], 0)
        print(f"| {' | '.join(cells)} | {bpp:.3f} | {db:.2f} |", flush=True)

    levels = {row.name: row.ladder.levels for row in ROWS}
    default: list[rd.Curve] = []
    for name, mine in rows(model, list(train), shots, seen, cuts, only):
        default = default or mine
        show(name, mine, default, levels[name])
    if only:
        return
    loaded = get_model(model)
    cells = [ideal_curve(picture, loaded, False) for picture in seen]
    show("ideal lengths: nested cells", cells, cells, loaded.ladder.levels)
    again = [ideal_curve(picture, loaded, True) for picture in seen]
    show("ideal lengths: fresh noise", again, cells, loaded.ladder.levels)

    snrs = loaded.ladder.snrs
    print("\n| transform | " + " | ".join(f"SNR {s:.3g}" for s in snrs) + " |")
    print("|---" * (len(snrs) + 1) + "|")
    for side in (4, 8, 16):
        bits = np.mean([gaussian_bits(picture, side, snrs) for picture in seen], 0)
        print(f"| {side}x{side} | " + " | ".join(f"{b:.4f}" for b in bits) + " |")


if __name__ == "__main__":
    sys.exit(main())
