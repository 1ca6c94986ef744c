"""Rate-distortion curves: measures of quality, BD-rates, and the record of points."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import bjontegaard
import click
import lpips
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_msssim import ms_ssim
from ssimulacra2 import compute_ssimulacra2

import ddpm_codec
from ddpm_codec.codec.encoder import psnr


class Point(NamedTuple):
    """One picture coded with one setting of a codec. What was not measured is not a number."""

    setting: str
    bpp: float
    psnr: float  # dB, RGB
    psnr_y: float  # dB, luma
    ms_ssim: float  # RGB; only of pictures that are large enough
    ssimulacra2: float  # only if asked for
    lpips: float  # only if asked for
    encode: float  # seconds
    decode: float


Curve = list[Point]  # of one picture, by rising rate
Curves = dict[str, list[Curve]]  # by codec, one for each picture
Quality = tuple[float, float, float, float, float]  # a point's, in the same order
LUMA = np.array([0.299, 0.587, 0.114])


class Slow(NamedTuple):
    """The slow measures that are asked for."""

    ssimulacra2: bool = False
    lpips: Path | None = None  # file of AlexNet's weights


NOTHING = Slow()


def quality(decoded: NDArray[np.uint8], pixels: NDArray[np.uint8], slow: Slow = NOTHING) -> Quality:
    """PSNR over RGB, PSNR of luma, MS-SSIM, SSIMULACRA2, LPIPS; (H, W, 3) each."""
    mse = float(np.square((decoded.astype(np.float64) - pixels) @ LUMA).mean())
    y = float("inf") if mse == 0 else 10 * np.log10(255**2 / mse)
    ms = float("nan")
    if min(pixels.shape[:2]) > 160:
        a, b = (torch.tensor(x).permute(2, 0, 1)[None].float() for x in (decoded, pixels))
        ms = float(ms_ssim(a, b, data_range=255))
    score = float("nan")
    if slow.ssimulacra2:
        files = io.BytesIO(), io.BytesIO()
        for file, x in zip(files, (pixels, decoded), strict=True):
            Image.fromarray(x).save(file, "PPM")
        score = float(compute_ssimulacra2(*files))
    distance = lpips.distance(decoded, pixels, slow.lpips) if slow.lpips else float("nan")
    return psnr(decoded, pixels), y, ms, score, distance


# The measures that BD-rates are computed from, by name; all but SSIMULACRA2 are in dB.
METRICS: dict[str, Callable[[Point], float]] = {
    "PSNR": lambda p: p.psnr,
    "PSNR-Y": lambda p: p.psnr_y,
    "MS-SSIM": lambda p: -10 * np.log10(max(1 - p.ms_ssim, 1e-9)),
    "SSIMULACRA2": lambda p: p.ssimulacra2,
    "LPIPS": lambda p: -10 * np.log10(max(p.lpips, 1e-9)),
}


def is_ours(codec: str) -> bool:
    """Whether a codec's name stands for a variant of ddpmc."""
    return codec.startswith("ddpmc")


def ends(curve: Curve) -> Curve:
    """The points at the ends of levels; for other codecs, all points."""
    return [p for p in curve if not re.fullmatch(r"level \d+ cut \d+", p.setting)]


def bd_rate(anchor: Curve, test: Curve, metric: str = "PSNR") -> float:
    """Mean difference of rate from the anchor's at equal quality, per cent (Bjontegaard 2001)."""
    # The method needs quality to rise with the rate; points at which it does not are left out.
    value = METRICS[metric]
    curves = []
    for curve in (anchor, test):
        rising: list[tuple[float, float]] = []
        for p in curve:
            if np.isfinite(value(p)) and (
                not rising or (value(p) > rising[-1][1] and p.bpp > rising[-1][0])
            ):
                rising.append((p.bpp, value(p)))
        curves.append(rising)
    (ra, da), (rt, dt) = (np.array(c).T for c in curves)
    return float(
        bjontegaard.bd_rate(
            ra, da, rt, dt, method="pchip", require_matching_points=False, min_overlap=0
        )
    )


def mean_at(
    curves: list[Curve], bpp: float, value: Callable[[Point], float] = METRICS["PSNR"]
) -> float:
    """Mean of the curves' values at one rate; not a number if one of them does not reach it."""
    values = []
    for curve in curves:
        x, y = [p.bpp for p in curve], [value(p) for p in curve]
        values.append(np.interp(bpp, x, y, left=np.nan, right=np.nan))
    return float(np.mean(values))


def average(curves: list[Curve]) -> Iterator[Point]:
    """Mean points over the pictures, one for each setting that all curves have, by rising rate."""
    tables = [{p.setting: p for p in curve} for curve in curves]
    common = [p.setting for p in curves[0] if all(p.setting in t for t in tables)]
    means = [
        Point(s, *(float(np.mean(v)) for v in zip(*(t[s][1:] for t in tables), strict=True)))
        for s in common
    ]
    yield from sorted(means, key=lambda p: p.bpp)


def read_results(path: Path) -> tuple[str, Curve]:
    """Name and mean curve of a JSON file in CompressAI's schema. Raises click.UsageError."""
    try:
        about = json.loads(path.read_text())
        results = about["results"]
        db = results["psnr-rgb"] if "psnr-rgb" in results else results["psnr"]
        pairs = sorted(zip(map(float, results["bpp"]), map(float, db), strict=True))
        return str(about["name"]), [Point("", *pair, *[np.nan] * 6) for pair in pairs]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise click.UsageError(f"--others: {path}: not in CompressAI's schema ({e})") from None


RECORD = (
    "codec", "picture", "point", "bytes", "bpp", "psnr", "psnr_y", "ms_ssim", "ssimulacra2",
    "lpips", "encode_s", "decode_s", "version", "model",
)  # fmt: skip


def write_record(curves: Curves, pictures: list[tuple[str, int]], model: str, path: Path) -> None:
    """Write a line for each codec, picture and point. What was not measured is left empty.

    pictures: names and numbers of pixels. model: identity of the model of our codec.
    """
    lines: list[tuple[str, ...]] = [RECORD]
    for codec, mine in curves.items():
        about = (ddpm_codec.__version__, model) if is_ours(codec) else ("", "")
        for (name, pixels), curve in zip(pictures, mine, strict=True):
            for p in curve:
                shown = ["" if np.isnan(x) else f"{x:.5g}" for x in p[1:]]
                nbytes = str(round(p.bpp * pixels / 8))
                lines.append((codec, name, p.setting, nbytes, *shown, *about))
    path.write_text("".join("\t".join(line) + "\n" for line in lines))


def read_record(path: Path) -> tuple[Curves, list[str]]:
    """Curves and pictures' names, as :func:`write_record` wrote them. Raises click.UsageError."""
    curves: dict[str, dict[str, Curve]] = {}
    try:
        head, *lines = (line.split("\t") for line in path.read_text().splitlines())
        if tuple(head) != RECORD:
            raise ValueError("another header")
        for codec, picture, setting, _, *numbers, _, _ in lines:
            point = Point(setting, *(float(x) if x else np.nan for x in numbers))
            curves.setdefault(codec, {}).setdefault(picture, []).append(point)
        names = list(curves["jpeg"])
        return {
            codec: [by_picture[n] for n in names] for codec, by_picture in curves.items()
        }, names
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise click.UsageError(f"--results: {path}: not a record of points ({e!r})") from None
