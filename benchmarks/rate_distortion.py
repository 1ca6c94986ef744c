"""Rate and distortion: one .ddpm file per picture, cut at many points, beside other codecs.

    python benchmarks/rate_distortion.py [--data DIR] [--cuts 3] [--out DIR]

Prints for every codec the mean PSNR at some rates and the BD-rate (Bjontegaard 2001, by the package
``bjontegaard``, PCHIP) against JPEG: of each picture over the range of quality that both curves
share, then averaged; by PSNR over RGB, PSNR of luma (BT.601) and MS-SSIM over RGB (by the package
``pytorch-msssim``, in dB: -10 log10(1 - MS-SSIM)), all after rounding to 8 bits. Rates are whole
files. ``jpeg-cut`` is one progressive JPEG per picture cut at many bytes, as ours is; all other
codecs' points are files of their own. With --out also a JSON per codec (CompressAI's schema), a CSV
of all points, the curves as PNG and SVG, and the table in Markdown; what is already there of an
interrupted run, of the same pictures, model and settings, is not done again. Seconds are only worth
something with --jobs 1. Needs the extra ``bench``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import bjontegaard
import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from pytorch_msssim import ms_ssim

import ddpm_codec
from ddpm_codec import bitstream
from ddpm_codec.codec import psnr
from ddpm_codec.data import list_pictures
from ddpm_codec.image import load
from ddpm_codec.modelfile import get_model

HERE = Path(__file__).resolve().parent
RATES = (0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.0)


class Point(NamedTuple):
    """One picture under one setting of a codec. Seconds are not a number where not measured."""

    setting: str
    bpp: float
    psnr: float  # dB, RGB
    psnr_y: float  # dB, luma
    ms_ssim: float  # RGB; not a number for pictures that are too small for it
    encode: float  # seconds
    decode: float


Curve = list[Point]  # of one picture, by rising rate
Quality = tuple[float, float, float]
LUMA = np.array([0.299, 0.587, 0.114])


def quality(decoded: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> Quality:
    """PSNR over RGB, PSNR of luma, MS-SSIM; (H, W, 3) each."""
    mse = float(np.square((decoded.astype(np.float64) - pixels) @ LUMA).mean())
    y = float("inf") if mse == 0 else 10 * np.log10(255**2 / mse)
    ms = float("nan")
    if min(pixels.shape[:2]) > 160:
        a, b = (torch.tensor(x).permute(2, 0, 1)[None].float() for x in (decoded, pixels))
        ms = float(ms_ssim(a, b, data_range=255))
    return psnr(decoded, pixels), y, ms


# What a BD-rate can be by: a point's figure in dB.
METRICS: dict[str, Callable[[Point], float]] = {
    "PSNR": lambda p: p.psnr,
    "PSNR-Y": lambda p: p.psnr_y,
    "MS-SSIM": lambda p: -10 * np.log10(max(1 - p.ms_ssim, 1e-9)),
}

# Chroma sub-sampling is each encoder's default: 4:2:0 for JPEG, WebP and AVIF, none for JPEG 2000
# and JPEG XL.
Peer = tuple[str, str, tuple[float, ...], dict[str, object]]  # Pillow's name, option, values, more
PEERS: dict[str, Peer] = {
    "jpeg": ("JPEG", "quality", (5, 8, 12, 18, 25, 35, 50, 65, 75, 85, 90, 95), {"optimize": True}),
    "webp": ("WEBP", "quality", (1, 5, 15, 30, 50, 65, 75, 82, 88, 92, 96), {"method": 6}),
    "avif": ("AVIF", "quality", (10, 20, 30, 40, 50, 60, 70, 78, 85, 91), {"speed": 4}),
    "jxl": ("JXL", "quality", (10, 20, 30, 45, 60, 70, 80, 88, 93), {"effort": 7}),
    "jpeg2000": (
        "JPEG2000", "rate", (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
        {"irreversible": True, "quality_mode": "rates"},
    ),
}  # fmt: skip


def peer_curve(picture: Image.Image, peer: Peer) -> Curve:
    """A Pillow codec at every setting, each a file of its own."""
    kind, option, values, more = peer
    pixels, out = np.asarray(picture), []
    for value in values:
        file, begin = io.BytesIO(), time.perf_counter()
        how = {"quality_layers": [24 / value]} if option == "rate" else {option: value}
        picture.save(file, kind, **how, **more)
        encoded = time.perf_counter()
        decoded = np.asarray(Image.open(file).convert("RGB"))
        seconds = encoded - begin, time.perf_counter() - encoded
        bpp = 8 * len(file.getvalue()) / picture.width / picture.height
        out.append(Point(f"{option} {value:g}", bpp, *quality(decoded, pixels), *seconds))
    return sorted(out, key=lambda p: p.bpp)


def cut_jpeg_curve(picture: Image.Image, cuts: int = 24) -> Curve:
    """One progressive JPEG, cut as a .ddpm file would be."""
    pixels, size, file = np.asarray(picture), picture.width * picture.height, io.BytesIO()
    begin = time.perf_counter()
    picture.save(file, "JPEG", quality=95, progressive=True, optimize=True)
    encoded, data, out = time.perf_counter() - begin, file.getvalue(), []
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    for share in np.geomspace(0.02, 1, cuts):
        prefix, begin = data[: round(share * len(data))], time.perf_counter()
        try:
            decoded = np.asarray(Image.open(io.BytesIO(prefix)).convert("RGB"))
        except OSError:  # not even the header
            continue
        seconds = encoded, time.perf_counter() - begin
        out.append(
            Point(f"cut {share:.3f}", 8 * len(prefix) / size, *quality(decoded, pixels), *seconds)
        )
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    return out


def our_curve(picture: Image.Image, cuts: int, model: str | None, path: str) -> Curve:
    """One file, decoded at the end of every level and at ``cuts`` safe points inside each."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    get_model(model)  # loading is not encoding
    begin = time.perf_counter()
    data = ddpm_codec.encode(picture, model=model, path=path)
    encoded, begin, out = time.perf_counter() - begin, time.perf_counter(), []
    for i, level in enumerate(ddpm_codec.decode_levels(data, model=model)):
        seconds = encoded, time.perf_counter() - begin  # an encoder goes on to the last level
        distortion = quality(np.asarray(level.image), pixels)
        out.append(Point(f"level {i}", 8 * level.nbytes / size, *distortion, *seconds))
    stream = bitstream.parse(data)
    points = list(bitstream.safe_points(data, stream))
    for i in range(len(stream.levels)):
        inside = [o for o, k, c in points if k == i and c.groups < bitstream.GROUPS]
        chosen = np.unique(np.linspace(0, len(inside) - 1, cuts + 2).round().astype(int)[1:-1])
        for j, k in enumerate(chosen if len(inside) > 2 else []):
            begin = time.perf_counter()
            decoded = np.asarray(ddpm_codec.decode(data[: inside[k]], model=model))
            seconds = encoded, time.perf_counter() - begin
            bpp = 8 * inside[k] / size
            out.append(Point(f"level {i} cut {j}", bpp, *quality(decoded, pixels), *seconds))
    return sorted(out, key=lambda p: p.bpp)


def bd_rate(anchor: Curve, test: Curve, metric: str = "PSNR") -> float:
    """Per cent of rate more (+) or less (-) than the anchor at the same quality."""
    # The method wants quality to rise with the rate; a point that does not is no use to anybody.
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


def mean_at(curves: list[Curve], bpp: float) -> float:
    """Mean PSNR of the curves at one rate; not a number where one of them does not reach."""
    values = []
    for curve in curves:
        x, y = [p.bpp for p in curve], [p.psnr for p in curve]
        values.append(np.interp(bpp, x, y, left=np.nan, right=np.nan))
    return float(np.mean(values))


def average(curves: list[Curve]) -> Iterator[Point]:
    """The mean over pictures of every setting that all of them have, by rising rate."""
    tables = [{p.setting: p for p in curve} for curve in curves]
    common = [p.setting for p in curves[0] if all(p.setting in t for t in tables)]
    means = [
        Point(s, *(float(np.mean(v)) for v in zip(*(t[s][1:] for t in tables), strict=True)))
        for s in common
    ]
    yield from sorted(means, key=lambda p: p.bpp)


def table(curves: dict[str, list[Curve]]) -> str:
    """Markdown: mean PSNR at some rates, and BD-rates."""
    lines = ["| bpp | " + " | ".join(curves) + " |", "|---" * (len(curves) + 1) + "|"]
    for bpp in RATES:
        values = (mean_at(c, bpp) for c in curves.values())
        lines.append(
            f"| {bpp:.2f} | "
            + " | ".join("-" if np.isnan(v) else f"{v:.2f}" for v in values)
            + " |"
        )
    for metric in METRICS:
        cells = []
        for name, mine in curves.items():
            rates = [bd_rate(a, c, metric) for a, c in zip(curves["jpeg"], mine, strict=True)]
            spread = f"({min(rates):+.0f} to {max(rates):+.0f})"
            cells.append("0" if name == "jpeg" else f"{np.mean(rates):+.1f} % {spread}")
        lines.append(f"| BD-rate, {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(curves: dict[str, list[Curve]], out: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, mine in curves.items():
        points = list(average(mine))
        style = {"linewidth": 2.5, "color": "black"} if name == "ddpmc" else {"linewidth": 1.2}
        marker = "o" if len(points) < 20 else None
        rates, distortions = [p.bpp for p in points], [p.psnr for p in points]
        axes.plot(rates, distortions, marker=marker, markersize=3, label=name, **style)
    axes.set(
        xlabel="bits per pixel",
        ylabel="PSNR over RGB, dB",
        title=title,
        xlim=(0, 2.5),
        ylim=(20, 43),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    for suffix in ("png", "svg"):
        figure.savefig(out / f"rate-distortion.{suffix}", dpi=120)
    plt.close(figure)


def write(curves: dict[str, list[Curve]], names: list[str], out: Path, text: str) -> None:
    """Everything that --out promises."""
    out.mkdir(parents=True, exist_ok=True)
    for name, mine in curves.items():
        points = list(average(mine))
        results = {
            "bpp": [p.bpp for p in points],
            "psnr-rgb": [p.psnr for p in points],
            "psnr-y": [p.psnr_y for p in points],
            "ms-ssim-rgb": [p.ms_ssim for p in points],
            "encoding_time": [p.encode for p in points],
            "decoding_time": [p.decode for p in points],
        }
        about = {"name": name, "description": f"{len(names)} pictures", "results": results}
        (out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    with (out / "points.csv").open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["codec", "picture", *Point._fields])
        for name, mine in curves.items():
            for picture, curve in zip(names, mine, strict=True):
                rows.writerows([name, picture, *p] for p in curve)
    (out / "table.md").write_text(text + "\n")
    plot(curves, out, f"{len(names)} pictures")


class Job(NamedTuple):
    """One curve to be had, in whatever process."""

    codec: str
    picture: Path
    cuts: int
    model: str | None
    path: str
    threads: int | None
    cache: Path | None  # file for the result

    def key(self) -> str:
        """Changes with everything that the result depends on."""
        h = hashlib.sha256(self.picture.read_bytes())
        ours = (self.cuts, get_model(self.model).id, self.path, ddpm_codec.__version__)
        h.update(repr(ours if self.codec == "ddpmc" else PEERS.get(self.codec)).encode())
        return h.hexdigest()


def run(job: Job) -> Curve:
    if job.threads:
        torch.set_num_threads(job.threads)
    key = job.key()
    if job.cache and job.cache.exists():
        known = json.loads(job.cache.read_text())
        if known["key"] == key:
            return [Point(*p) for p in known["points"]]
    picture = load(job.picture).convert("RGB")
    if job.codec == "ddpmc":
        curve = our_curve(picture, job.cuts, job.model, job.path)
    elif job.codec == "jpeg-cut":
        curve = cut_jpeg_curve(picture)
    else:
        if job.codec == "jxl":
            import pillow_jxl  # noqa: F401 (registers itself)
        curve = peer_curve(picture, PEERS[job.codec])
    if job.cache:
        job.cache.parent.mkdir(parents=True, exist_ok=True)
        job.cache.write_text(json.dumps({"key": key, "points": curve}))
    return curve


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--model", default=None, help="Model: a name or a file.")
@click.option(
    "--path", type=click.Choice(["spectral", "isotropic"]), default="spectral", show_default=True
)
@click.option(
    "--cuts", default=3, show_default=True, help="Cuts inside each level, beside its end."
)
@click.option(
    "--peers", default="webp,avif,jpeg-cut", show_default=True,
    help=f"Beside JPEG; of {', '.join(PEERS)}, jpeg-cut.",
)  # fmt: skip
@click.option("--out", type=Path, help="Folder for JSON, CSV, plots and table.")
@click.option("--threads", type=int, help="CPU threads of each process.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
def main(
    data: Path, model: str | None, path: str, cuts: int, peers: str, out: Path | None,
    threads: int | None, jobs: int,
) -> None:  # fmt: skip
    """Rate-distortion curves and BD-rates over a folder of pictures."""
    chosen = ["jpeg", *(name for name in peers.split(",") if name and name != "jpeg"), "ddpmc"]
    if unknown := set(chosen) - set(PEERS) - {"jpeg-cut", "ddpmc"}:
        raise click.UsageError(f"unknown peers: {', '.join(sorted(unknown))}")
    paths = list_pictures([data])
    work = [
        Job(name, p, cuts, model, path, threads, out and out / "curves" / f"{name}-{p.stem}.json")
        for name in chosen
        for p in paths
    ]
    curves: dict[str, list[Curve]] = {}
    pool = ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else None
    results = pool.map(run, work) if pool else map(run, work)
    with click.progressbar(
        zip(work, results, strict=True), length=len(work), file=sys.stderr,
        item_show_func=lambda w: w and f"{w[0].codec} {w[0].picture.name}",
    ) as bar:  # fmt: skip
        for job, curve in bar:
            curves.setdefault(job.codec, []).append(curve)
    text = table(curves)
    print(
        f"{len(paths)} pictures, {len(curves['ddpmc'][0])} points of each .ddpm file; PSNR in dB\n"
    )
    print(text)
    if out:
        write(curves, [p.name for p in paths], out, text)


if __name__ == "__main__":
    main()
