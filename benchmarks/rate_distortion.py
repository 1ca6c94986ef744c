"""Rate and distortion: one .ddpm file per picture, cut at many points, beside other codecs.

    python benchmarks/rate_distortion.py [--data DIR] [--cuts 3] [--peers all] [--out DIR]

Prints for every codec the mean PSNR at some rates ("-" where a picture's curve does not reach) and
the BD-rate (Bjontegaard 2001, by the package ``bjontegaard``, PCHIP) against JPEG: of each picture
over the range of quality that both curves share, then averaged; by PSNR over RGB, PSNR of luma
(BT.601), MS-SSIM over RGB (by the package ``pytorch-msssim``, in dB: -10 log10(1 - MS-SSIM)); with
--ssimulacra2, which is slow, by that (by the package ``ssimulacra2``), and with --lpips by LPIPS
(lpips.py, in dB: -10 log10 LPIPS), whose trunk's weights are the user's to give. All after rounding
to 8 bits. Rates are whole files.

The curves of ``--ours`` are one file per picture, cut at the end of each level and at ``--cuts``
places inside; the BD-rates are of the levels' ends, and a line below the table says what the other
cuts cost beside them. A name may end in the number of steps and the effort: ddpmc-s33-e9. Peers
called ``-cut`` are one file per picture, too: a progressive JPEG, a JPEG 2000 codestream with 40
quality layers (decoded by ``opj_decompress``, of OpenJPEG's tools) and a progressive JPEG XL
(``cjxl`` and ``djxl``, of libjxl's tools). All other peers' points are files of their own. Ours
encoded separately would be the same bytes: encoding up to a point is cutting there, so being
progressive costs nothing.

--others reads mean curves in CompressAI's schema, as it publishes them for Kodak, draws them beside
ours and prints their BD-rates against the mean JPEG curve (the pictures have to be the same).

--json-results FILE writes the mean curve of the first of --ours in that schema.

With --out also a JSON per codec (the same schema), a CSV of all points, the curves as PNG and
SVG, and the table in Markdown; what is already there of an interrupted run, of the same pictures,
model and settings, is not done again. Seconds, of a whole file's encoding and of decoding 0.5 bpp,
are only worth something with --jobs 1. Needs the extra ``bench``.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import bjontegaard
import click
import lpips
import numpy as np
import torch
from numpy.typing import NDArray
from peers import CUT, CUTTERS, PEERS, Peer
from PIL import Image
from pytorch_msssim import ms_ssim
from ssimulacra2 import compute_ssimulacra2

import ddpm_codec
from ddpm_codec.codec.container import parse
from ddpm_codec.codec.decoder import Decoder
from ddpm_codec.codec.encoder import psnr
from ddpm_codec.codec.image import load
from ddpm_codec.data import list_pictures
from ddpm_codec.network.modelfile import Model, get_model

HERE = Path(__file__).resolve().parent
RATES = (0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.0)


class Point(NamedTuple):
    """One picture under one setting of a codec. Seconds are not a number where not measured."""

    setting: str
    bpp: float
    psnr: float  # dB, RGB
    psnr_y: float  # dB, luma
    ms_ssim: float  # RGB; not a number for pictures that are too small for it
    ssimulacra2: float  # not a number unless asked for, like the next
    lpips: float
    encode: float  # seconds
    decode: float


Curve = list[Point]  # of one picture, by rising rate
Quality = tuple[float, float, float, float, float]
LUMA = np.array([0.299, 0.587, 0.114])


class Slow(NamedTuple):
    """What is measured only if asked for."""

    ssimulacra2: bool = False
    lpips: Path | None = None  # file of the trunk's weights


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
    far = lpips.distance(decoded, pixels, slow.lpips) if slow.lpips else float("nan")
    return psnr(decoded, pixels), y, ms, score, far


# What a BD-rate can be by: a point's figure, in dB but for the last.
METRICS: dict[str, Callable[[Point], float]] = {
    "PSNR": lambda p: p.psnr,
    "PSNR-Y": lambda p: p.psnr_y,
    "MS-SSIM": lambda p: -10 * np.log10(max(1 - p.ms_ssim, 1e-9)),
    "SSIMULACRA2": lambda p: p.ssimulacra2,
    "LPIPS": lambda p: -10 * np.log10(max(p.lpips, 1e-9)),
}

# Ours: how a file is made, and how it is decoded.
OURS: dict[str, tuple[dict[str, Any], str]] = {
    "ddpmc": ({}, "mean"),
    "ddpmc-even": ({"tune": "even"}, "mean"),
    "ddpmc-isotropic": ({"path": "isotropic"}, "mean"),
    "ddpmc-sample": ({}, "sample"),
}
NAME = re.compile(r"(ddpmc(?:-even|-isotropic|-sample)?)(?:-s(\d+))?(?:-e(\d))?")


def ours_of(name: str) -> tuple[dict[str, Any], str] | None:
    """How a file of ours of this name is made and decoded; None for other names."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    how, recon = OURS[found[1]]
    given = {"steps": found[2], "effort": found[3]}
    return how | {k: int(v) for k, v in given.items() if v}, recon


SHARES = np.geomspace(0.02, 1, 24)  # of another codec's file, where it is cut


def peer_curve(picture: Image.Image, peer: Peer, slow: Slow) -> Curve:
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
        distortion = quality(decoded, pixels, slow)
        out.append(Point(f"{option} {value:g}", bpp, *distortion, *seconds))
    return sorted(out, key=lambda p: p.bpp)


def cut_curve(picture: Image.Image, codec: str, slow: Slow) -> Curve:
    """One file of another codec, cut as a .ddpm file would be."""
    pixels, size, out = np.asarray(picture), picture.width * picture.height, []
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        data, decode = CUTTERS[codec](picture, Path(folder))
        encoded = time.perf_counter() - begin
        for share in SHARES:
            prefix, begin = data[: round(share * len(data))], time.perf_counter()
            try:
                decoded = decode(prefix)
            except OSError:  # not even the header, or the programs' own idea of it
                continue
            seconds = encoded, time.perf_counter() - begin
            distortion = quality(decoded, pixels, slow)
            out.append(Point(f"cut {share:.3f}", 8 * len(prefix) / size, *distortion, *seconds))
    return out


def our_curve(
    picture: Image.Image, codec: str, cuts: int, model: str | Model | None, slow: Slow
) -> Curve:
    """One file, decoded at the end of every level and at ``cuts`` places inside each."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    ours = ours_of(codec)
    assert ours is not None
    how, recon = ours
    loaded = get_model(model)  # loading is not encoding
    begin = time.perf_counter()
    data = ddpm_codec.encode(picture, model=loaded, **how)
    encoded, decoding, out = time.perf_counter() - begin, 0.0, []
    if recon != "mean":
        for i, level in enumerate(ddpm_codec.decode_levels(data, model=loaded, recon=recon)):
            distortion = quality(np.asarray(level.image), pixels, slow)
            bpp = 8 * level.bytes / size
            out.append(Point(f"level {i}", bpp, *distortion, encoded, float("nan")))
        return out
    decoder = Decoder(parse(data), loaded)
    for i, arrived in enumerate(decoder.stream.levels):
        before, estimate, begin = decoder.chain.fork(), decoder.estimate, time.perf_counter()
        decoder.step()
        reached = decoder.picture()
        decoding += time.perf_counter() - begin
        for k in range(1, cuts + 1):
            n = arrived.nbytes * k // (cuts + 1)
            part = before.fork()
            used, _ = part.decode_level(i, estimate, bytes(arrived.payload[:n]))
            shown = part.picture(part.estimate(i - 1, used / arrived.nbytes).x0_hat)
            bpp, distortion = 8 * arrived.offset(n) / size, quality(shown, pixels, slow)
            out.append(Point(f"level {i} cut {k}", bpp, *distortion, encoded, decoding))
        bpp, distortion = 8 * arrived.end / size, quality(reached, pixels, slow)
        out.append(Point(f"level {i}", bpp, *distortion, encoded, decoding))
    return out


def ends(curve: Curve) -> Curve:
    """Without the points inside levels."""
    return [p for p in curve if not re.fullmatch(r"level \d+ cut \d+", p.setting)]


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


def mean_at(
    curves: list[Curve], bpp: float, value: Callable[[Point], float] = METRICS["PSNR"]
) -> float:
    """Mean PSNR of the curves at one rate; not a number where one of them does not reach."""
    values = []
    for curve in curves:
        x, y = [p.bpp for p in curve], [value(p) for p in curve]
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


def read_results(path: Path) -> tuple[str, Curve]:
    """Name and mean curve of a JSON in CompressAI's schema. Raises click.UsageError."""
    try:
        about = json.loads(path.read_text())
        columns = about["results"]
        db = columns["psnr-rgb"] if "psnr-rgb" in columns else columns["psnr"]
        pairs = sorted(zip(map(float, columns["bpp"]), map(float, db), strict=True))
        return str(about["name"]), [Point("", *pair, *[np.nan] * 6) for pair in pairs]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise click.UsageError(f"--others: {path}: not in CompressAI's schema ({e})") from None


def others_table(curves: dict[str, list[Curve]], others: dict[str, Curve]) -> str:
    """BD-rates of mean curves against JPEG's."""
    anchor = list(average(curves["jpeg"]))
    means = {name: list(average(mine)) for name, mine in curves.items() if ours_of(name)} | others
    lines = ["| mean curve | BD-rate, PSNR |", "|---|---|"]
    return "\n".join(
        lines + [f"| {name} | {bd_rate(anchor, c):+.1f} % |" for name, c in means.items()]
    )


def table(curves: dict[str, list[Curve]]) -> str:
    """Markdown: each codec's mean PSNR at some rates, and its BD-rates."""
    metrics = [m for m, f in METRICS.items() if all(np.isfinite(f(p)) for p in curves["jpeg"][0])]
    heads = [*(f"{bpp:g} bpp" for bpp in RATES), *(f"BD-rate, {metric}" for metric in metrics)]
    heads += ["encode, s", "decode 0.5 bpp, s"]
    lines = [f"| codec | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, whole in curves.items():
        mine = [ends(curve) for curve in whole]
        values = (mean_at(mine, bpp) for bpp in RATES)
        cells = ["-" if np.isnan(v) else f"{v:.2f}" for v in values]
        for metric in metrics:
            rates = [bd_rate(a, c, metric) for a, c in zip(curves["jpeg"], mine, strict=True)]
            spread = f"({min(rates):+.0f} to {max(rates):+.0f})"
            cells.append("0" if name == "jpeg" else f"{np.mean(rates):+.1f} % {spread}")
        cells.append(f"{np.mean([c[-1].encode for c in mine]):.2f}")
        cells.append(f"{mean_at(mine, 0.5, lambda p: p.decode):.2f}".replace("nan", "-"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cuts_table(curves: dict[str, list[Curve]]) -> str:
    """What cuts inside levels cost: BD-rates over the levels' ends of the same files."""
    lines = []
    for name, mine in curves.items():
        if any(len(ends(c)) < len(c) for c in mine):
            rates = [bd_rate(ends(c), c) for c in mine]
            lines.append(
                f"{name}, cut at {len(mine[0])} points: {np.mean(rates):+.2f} % over the ends of "
                f"its {len(ends(mine[0]))} levels ({min(rates):+.1f} to {max(rates):+.1f})"
            )
    return "\n".join(lines)


def plot(curves: dict[str, list[Curve]], others: dict[str, Curve], out: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, mine in curves.items():
        points = list(average(mine))
        style = {"linewidth": 2.5, "color": "black"} if name == "ddpmc" else {"linewidth": 1.2}
        style |= {"linestyle": "--"} if name.endswith("-cut") else {}
        marker = "o" if len(points) < 20 else None
        rates, distortions = [p.bpp for p in points], [p.psnr for p in points]
        axes.plot(rates, distortions, marker=marker, markersize=3, label=name, **style)
    for name, points in others.items():
        rates, distortions = [p.bpp for p in points], [p.psnr for p in points]
        axes.plot(rates, distortions, linestyle=":", linewidth=1.2, label=name)
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


def results(name: str, mine: list[Curve]) -> str:
    """A codec's mean curve as JSON in CompressAI's schema, which :func:`read_results` reads."""
    points = list(average(mine))
    columns: dict[str, list[float]] = {
        "bpp": [p.bpp for p in points],
        "psnr-rgb": [p.psnr for p in points],
        "psnr-y": [p.psnr_y for p in points],
        "ms-ssim-rgb": [p.ms_ssim for p in points],
        "ssimulacra2": [p.ssimulacra2 for p in points],
        "lpips": [p.lpips for p in points],
        "encoding_time": [p.encode for p in points],
        "decoding_time": [p.decode for p in points],
    }
    # JSON has no "not a number", which stands for what was not measured.
    columns = {k: v for k, v in columns.items() if np.isfinite(v).all() or k == "psnr-rgb"}
    about = {"name": name, "description": f"{len(mine)} pictures", "results": columns}
    return json.dumps(about, indent=1) + "\n"


def write(
    curves: dict[str, list[Curve]], others: dict[str, Curve], names: list[str], out: Path, text: str
) -> None:
    """Everything that --out promises."""
    out.mkdir(parents=True, exist_ok=True)
    for name, mine in curves.items():
        (out / f"{name}.json").write_text(results(name, mine))
    with (out / "points.csv").open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["codec", "picture", *Point._fields])
        for name, mine in curves.items():
            for picture, curve in zip(names, mine, strict=True):
                rows.writerows([name, picture, *p] for p in curve)
    (out / "table.md").write_text(text + "\n")
    plot(curves, others, out, f"{len(names)} pictures")


RECORD = (
    "codec picture point bytes bpp psnr psnr_y ms_ssim ssimulacra2 encode_s decode_s version model"
)


def record(
    curves: dict[str, list[Curve]], pictures: list[tuple[str, int]], model: str, out: Path
) -> None:
    """``results.tsv``: a line for each picture and point of ours. pictures: names, pixels."""
    lines = [RECORD.split()]
    for codec, mine in curves.items():
        for (name, pixels), curve in zip(pictures, mine, strict=True):
            for p in curve if ours_of(codec) else []:
                numbers = (p.bpp, p.psnr, p.psnr_y, p.ms_ssim, p.ssimulacra2, p.encode, p.decode)
                shown = ["" if np.isnan(x) else f"{x:.5g}" for x in numbers]
                nbytes = str(round(p.bpp * pixels / 8))
                at = [codec, name, p.setting, nbytes, *shown, ddpm_codec.__version__, model]
                lines.append(at)
    (out / "results.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))


class Job(NamedTuple):
    """One curve to be had, in whatever process."""

    codec: str
    picture: Path
    cuts: int
    model: str | None
    slow: Slow
    threads: int | None
    cache: Path | None  # file for the result

    def key(self) -> str:
        """Changes with everything that the result depends on."""
        h = hashlib.sha256(self.picture.read_bytes())
        how: object
        if ours_of(self.codec):
            how = ours_of(self.codec), self.cuts, get_model(self.model).id, ddpm_codec.__version__
        elif self.codec in CUTTERS:
            how = inspect.getsource(CUTTERS[self.codec])
        else:
            how = PEERS[self.codec]
        h.update(repr((how, self.slow, Point._fields)).encode())
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
    if ours_of(job.codec):
        curve = our_curve(picture, job.codec, job.cuts, job.model, job.slow)
    elif job.codec in CUT:
        curve = cut_curve(picture, job.codec, job.slow)
    else:
        if job.codec.startswith("jxl"):
            import pillow_jxl  # noqa: F401 (registers itself)
        curve = peer_curve(picture, PEERS[job.codec], job.slow)
    if job.cache:
        job.cache.parent.mkdir(parents=True, exist_ok=True)
        job.cache.write_text(json.dumps({"key": key, "points": curve}))
    return curve


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--model", default=None, help="Model: a name or a file.")
@click.option("--ours", default="ddpmc", show_default=True, help=f"Of {', '.join(OURS)}; or all.")
@click.option(
    "--cuts", default=1, show_default=True, help="Cuts inside each level, beside its end."
)
@click.option(
    "--peers", default="webp,avif,jpeg-cut", show_default=True,
    help=f"Beside JPEG; of {', '.join([*PEERS, *CUT])}; or all.",
)  # fmt: skip
@click.option("--others", type=Path, multiple=True, help="JSON files in CompressAI's schema.")
@click.option("--json-results", type=Path, help="Write the first of --ours in that schema.")
@click.option("--ssimulacra2", is_flag=True, help="Also by that; slow.")
@click.option(
    "--lpips", "trunk", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also by that: AlexNet's weights, as torchvision has them.",
)  # fmt: skip
@click.option("--out", type=Path, help="Folder for JSON, CSV, plots and table.")
@click.option("--threads", type=int, help="CPU threads of each process.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
def main(
    data: Path, model: str | None, ours: str, cuts: int, peers: str, others: tuple[Path, ...],
    json_results: Path | None, ssimulacra2: bool, trunk: Path | None, out: Path | None,
    threads: int | None, jobs: int,
) -> None:  # fmt: skip
    """Rate-distortion curves and BD-rates over a folder of pictures."""
    chosen = ["jpeg"]
    for option, text, known in (("--peers", peers, [*PEERS, *CUT]), ("--ours", ours, [*OURS])):
        names = known if text == "all" else [name for name in text.split(",") if name]
        if unknown := sorted(n for n in set(names) - set(known) if not ours_of(n)):
            raise click.UsageError(f"{option}: unknown: {', '.join(unknown)}")
        chosen += [name for name in names if name not in chosen]
    for program in (program for name in chosen for program in CUT.get(name, ())):
        if not shutil.which(program):
            raise click.UsageError(f"the program {program} is not installed")
    read = dict(map(read_results, others))
    if trunk:
        lpips.load_trunk(trunk)  # or say at once what is wrong with it
    paths = list_pictures([data])
    caches = {(c, p): out and out / "curves" / f"{c}-{p.stem}.json" for c in chosen for p in paths}
    slow = Slow(ssimulacra2, trunk)
    work = [Job(*at, cuts, model, slow, threads, cache) for at, cache in caches.items()]
    curves: dict[str, list[Curve]] = {}
    pool = ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else None
    done = pool.map(run, work) if pool else map(run, work)
    with click.progressbar(
        zip(work, done, strict=True), length=len(work), file=sys.stderr,
        item_show_func=lambda w: w and f"{w[0].codec} {w[0].picture.name}",
    ) as bar:  # fmt: skip
        for job, curve in bar:
            curves.setdefault(job.codec, []).append(curve)
    text = table(curves)
    if read:
        text += "\n\n" + others_table(curves, read)
    text = "\n\n".join(part for part in (text, cuts_table(curves)) if part)
    points = {name: len(mine[0]) for name, mine in curves.items() if ours_of(name)}
    if json_results and points:
        first = next(iter(points))
        json_results.write_text(results(first, curves[first]))
    print(f"{len(paths)} pictures; points of one .ddpm file: {points}; PSNR in dB\n")
    print(text)
    if out:
        write(curves, read, [p.name for p in paths], out, text)
        sizes = [Image.open(p).size for p in paths]
        pictures = [(p.name, w * h) for p, (w, h) in zip(paths, sizes, strict=True)]
        record(curves, pictures, get_model(model).id.hex(), out)


if __name__ == "__main__":
    main()
