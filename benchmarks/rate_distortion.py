"""Rate and distortion: one .ddpm file per picture, cut at many points, beside Pillow's codecs.

    python benchmarks/rate_distortion.py [--data DIR] [--cuts 3] [--json FILE]

Prints for every codec the mean rate and PSNR of each setting, and the BD-rate (Bjontegaard 2001,
by the package ``bjontegaard``, PCHIP) against JPEG: of each picture over the range of PSNR that
both curves share, then averaged. Rates are whole files; PSNR is over RGB after rounding to 8 bits.
Needs the extra ``bench``.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import bjontegaard
import click
import numpy as np
import torch
from PIL import Image

import ddpm_codec
from ddpm_codec import bitstream
from ddpm_codec.codec import psnr
from ddpm_codec.data import list_pictures
from ddpm_codec.image import load

HERE = Path(__file__).resolve().parent
Curve = list[tuple[float, float]]  # (bpp, PSNR) of one picture, by rising rate

# The peers' settings; chroma sub-sampling is each encoder's default (4:2:0 for all three).
QUALITIES = {
    "jpeg": ("JPEG", (5, 8, 12, 18, 25, 35, 50, 65, 75, 85, 90, 95), {"optimize": True}),
    "webp": ("WEBP", (1, 5, 15, 30, 50, 65, 75, 82, 88, 92, 96), {"method": 6}),
    "avif": ("AVIF", (10, 20, 30, 40, 50, 60, 70, 78, 85, 91), {"speed": 4}),
}
PEERS: dict[str, list[tuple[str, dict[str, object]]]] = {
    name: [(kind, {"quality": q} | more) for q in qualities]
    for name, (kind, qualities, more) in QUALITIES.items()
}


def peer_curve(picture: Image.Image, settings: list[tuple[str, dict[str, object]]]) -> Curve:
    """Every setting of a Pillow codec."""
    pixels, out = np.asarray(picture), []
    for kind, how in settings:
        file = io.BytesIO()
        picture.save(file, kind, **how)
        decoded = np.asarray(Image.open(file).convert("RGB"))
        out.append(
            (8 * len(file.getvalue()) / picture.width / picture.height, psnr(decoded, pixels))
        )
    return sorted(out)


def our_curve(picture: Image.Image, cuts: int, **how: object) -> Curve:
    """One file, decoded at the end of every level and at ``cuts`` safe points inside each."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    data = ddpm_codec.encode(picture, **how)
    model = how.get("model")
    levels = list(ddpm_codec.decode_levels(data, model=model))
    out = [(8 * v.nbytes / size, psnr(np.asarray(v.image), pixels)) for v in levels]
    stream = bitstream.parse(data)
    points = list(bitstream.safe_points(data, stream))
    for i in range(len(stream.levels)):
        inside = [o for o, k, c in points if k == i and c.groups < bitstream.GROUPS]
        chosen = np.unique(np.linspace(0, len(inside) - 1, cuts + 2).round().astype(int)[1:-1])
        for k in chosen if len(inside) > 2 else []:
            decoded = ddpm_codec.decode(data[: inside[k]], model=model)
            out.append((8 * inside[k] / size, psnr(np.asarray(decoded), pixels)))
    return sorted(out)


def bd_rate(anchor: Curve, test: Curve) -> float:
    """Per cent of rate more (+) or less (-) than the anchor at the same PSNR."""
    # The method wants PSNR to rise with the rate; a point that does not is no use to anybody.
    curves = []
    for curve in (anchor, test):
        rising: Curve = []
        for r, d in curve:
            if not rising or (d > rising[-1][1] and r > rising[-1][0]):
                rising.append((r, d))
        curves.append(rising)
    (ra, da), (rt, dt) = (np.array(c).T for c in curves)
    return float(
        bjontegaard.bd_rate(
            ra, da, rt, dt, method="pchip", require_matching_points=False, min_overlap=0
        )
    )


def summary(name: str, curves: list[Curve], anchors: list[Curve]) -> None:
    rates = np.array([bd_rate(a, c) for a, c in zip(anchors, curves, strict=True)])
    print(
        f"{name}: BD-rate against JPEG {rates.mean():+.1f} % "
        f"(from {rates.min():+.1f} to {rates.max():+.1f})"
    )


def mean_at(curves: list[Curve], bpp: float) -> float:
    """Mean PSNR of the curves at one rate; not a number where one of them does not reach."""
    return float(
        np.mean([np.interp(bpp, *zip(*c, strict=True), left=np.nan, right=np.nan) for c in curves])
    )


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--model", default=None, help="Model: a name or a file.")
@click.option(
    "--path", type=click.Choice(["spectral", "isotropic"]), default="spectral", show_default=True
)
@click.option(
    "--cuts", default=3, show_default=True, help="Cuts inside each level, beside its end."
)
@click.option("--peers", default="jpeg,webp,avif", show_default=True)
@click.option("--json", "file", type=Path, help="Write all points here.")
@click.option("--threads", type=int, help="CPU threads to use.")
def main(
    data: Path,
    model: str | None,
    path: str,
    cuts: int,
    peers: str,
    file: Path | None,
    threads: int | None,
) -> None:
    """Rate-distortion curves and BD-rates over a folder of pictures."""
    if threads:
        torch.set_num_threads(threads)
    paths = list_pictures([data])
    pictures = [load(p).convert("RGB") for p in paths]
    curves: dict[str, list[Curve]] = {}
    makers: dict[str, Callable[[Image.Image], Curve]] = {
        name: (lambda im, s=PEERS[name]: peer_curve(im, s))
        for name in ["jpeg", *peers.split(",")]
        if name in PEERS
    }
    makers["ddpmc"] = lambda im: our_curve(im, cuts, model=model, path=path)
    for name, make in makers.items():
        begin = time.perf_counter()
        curves[name] = []
        for picture_path, picture in zip(paths, pictures, strict=True):
            curves[name].append(make(picture))
            click.echo(f"{name} {picture_path.name} {time.perf_counter() - begin:.0f} s", err=True)
    print(f"{len(paths)} pictures, {len(curves['ddpmc'][0])} points of each .ddpm file")
    print("   bpp  " + "".join(f"{name:>8}" for name in curves) + "   (mean PSNR, dB)")
    for bpp in (0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.0):
        print(f"  {bpp:4.2f}  " + "".join(f"{mean_at(c, bpp):8.2f}" for c in curves.values()))
    for name in curves:
        if name != "jpeg":
            summary(name, curves[name], curves["jpeg"])
    if file:
        points = {n: {p.name: c for p, c in zip(paths, v, strict=True)} for n, v in curves.items()}
        file.write_text(json.dumps(points, indent=1))


if __name__ == "__main__":
    main()
