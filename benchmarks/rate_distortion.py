"""Rate and distortion: one .ddpm file per picture, cut at many points, against other codecs.

    python benchmarks/rate_distortion.py [--data DIR] [--cuts 3] [--peers all] [--out DIR]

For each codec it prints the mean PSNR at some rates ("-" if a picture's curve does not reach a
rate), and the BD-rate against JPEG (Bjontegaard 2001, by the package ``bjontegaard``, PCHIP). A
BD-rate is computed for each picture over the range of quality that both curves share, and then
averaged. It is computed by PSNR over RGB, by PSNR of luma (BT.601) and by MS-SSIM over RGB (package
``pytorch-msssim``; in dB, -10 log10(1 - MS-SSIM)); with --ssimulacra2 also by SSIMULACRA2 (package
``ssimulacra2``), and with --lpips also by LPIPS (lpips.py; in dB, -10 log10 LPIPS). Quality is
measured after rounding to 8 bits. Rates are whole files.

A codec of --ours has one file per picture, which is cut at the end of each level and at --cuts
points inside each level. BD-rates are of the cuts at the levels' ends; a line below the tables says
what the other cuts cost. A name may end in a number of steps and an effort: ddpmc-s33-e9. Encoding
up to a point gives the same bytes as cutting there, so one file stands for many.

Peers whose names end in -cut have one file per picture, too: a progressive JPEG, a JPEG 2000
codestream with 40 quality layers (decoded by OpenJPEG's ``opj_decompress``) and a progressive JPEG
XL (libjxl's ``cjxl`` and ``djxl``). All other peers have a file for each point.

--others reads mean curves in CompressAI's schema, such as those that CompressAI publishes for
Kodak, plots them and prints their BD-rates against the mean JPEG curve. The pictures must be the
same.

--out writes results.tsv (a line for each codec, picture and point), a JSON file per codec
(CompressAI's schema), the plot as PNG and SVG, and the tables in Markdown. It also keeps each
curve, so that an interrupted run with the same pictures, model and settings can go on. --results
reads such a results.tsv in place of running anything. Seconds are for encoding the whole file and
for decoding 0.5 bpp; they mean little unless --jobs is 1. Needs the extra ``bench``.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import figures
import lpips
import numpy as np
import torch
from curves import (
    Curve,
    Curves,
    Point,
    Slow,
    is_ours,
    quality,
    read_record,
    read_results,
    write_record,
)
from peers import CUT, CUTTERS, PEERS, Peer
from photographs import PICTURES
from PIL import Image

import ddpm_codec
from ddpm_codec.codec.container import parse
from ddpm_codec.codec.decoder import Decoder
from ddpm_codec.codec.image import load
from ddpm_codec.data import list_pictures
from ddpm_codec.network.modelfile import Model, get_model

# Our codecs: the arguments of encode, and the recon of decode.
OURS: dict[str, tuple[dict[str, Any], str]] = {
    "ddpmc": ({}, "mean"),
    "ddpmc-even": ({"tune": "even"}, "mean"),
    "ddpmc-isotropic": ({"path": "isotropic"}, "mean"),
    "ddpmc-sample": ({}, "sample"),
}
NAME = re.compile(r"(ddpmc(?:-even|-isotropic|-sample)?)(?:-s(\d+))?(?:-e(\d))?")


def ours_of(name: str) -> tuple[dict[str, Any], str] | None:
    """Arguments of encode and recon of decode for a name of ours; None for other names."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    how, recon = OURS[found[1]]
    given = {"steps": found[2], "effort": found[3]}
    return how | {k: int(v) for k, v in given.items() if v}, recon


SHARES = np.geomspace(0.02, 1, 24)  # of another codec's file that a cut keeps


def peer_curve(picture: Image.Image, peer: Peer, slow: Slow) -> Curve:
    """The files that Pillow writes with each setting of a codec."""
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
            except OSError:  # too short for this decoder
                continue
            seconds = encoded, time.perf_counter() - begin
            distortion = quality(decoded, pixels, slow)
            out.append(Point(f"cut {share:.3f}", 8 * len(prefix) / size, *distortion, *seconds))
    return out


def our_curve(
    picture: Image.Image, codec: str, cuts: int, model: str | Model | None, slow: Slow
) -> Curve:
    """One .ddpm file, decoded at the end of each level and at ``cuts`` points inside it."""
    pixels, size = np.asarray(picture), picture.width * picture.height
    ours = ours_of(codec)
    assert ours is not None
    how, recon = ours
    loaded = get_model(model)  # before the clock starts
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


class Job(NamedTuple):
    """One curve to compute, in this process or another."""

    codec: str
    picture: Path
    cuts: int
    model: str | None
    slow: Slow
    threads: int | None
    cache: Path | None  # file that keeps the result

    def key(self) -> str:
        """A hash of everything that the result depends on."""
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
    """Compute a curve, or read it from the cache."""
    if job.threads:
        torch.set_num_threads(job.threads)
    key = job.key()
    if job.cache and job.cache.exists():
        cached = json.loads(job.cache.read_text())
        if cached["key"] == key:
            return [Point(*p) for p in cached["points"]]
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
@click.option("--data", default=PICTURES, type=Path, help="Folder.  [default: pictures]")
@click.option("--model", default=None, help="A name or a file.")
@click.option(
    "--ours", default="ddpmc", show_default=True, help=f"Names from {', '.join(OURS)}; or all."
)
@click.option(
    "--cuts", default=1, show_default=True, help="Cuts inside each level, besides its end."
)
@click.option(
    "--peers", default="webp,avif,jpeg-cut", show_default=True,
    help=f"Besides JPEG, names from {', '.join([*PEERS, *CUT])}; or all.",
)  # fmt: skip
@click.option("--others", type=Path, multiple=True, help="JSON files in CompressAI's schema.")
@click.option("--ssimulacra2", is_flag=True, help="BD-rates by SSIMULACRA2, too (slow).")
@click.option(
    "--lpips", "trunk", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="BD-rates by LPIPS, too: torchvision's file of AlexNet's weights.",
)  # fmt: skip
@click.option("--out", type=Path, help="Folder for the record, JSON, plots and tables.")
@click.option("--results", type=Path, help="Read this record (results.tsv) and run nothing.")
@click.option("--threads", type=int, help="CPU threads of each process.")
@click.option("--jobs", default=1, show_default=True, help="Number of processes.")
def main(
    data: Path, model: str | None, ours: str, cuts: int, peers: str, others: tuple[Path, ...],
    ssimulacra2: bool, trunk: Path | None, out: Path | None, results: Path | None,
    threads: int | None, jobs: int,
) -> None:  # fmt: skip
    """Print rate-distortion curves and BD-rates over a folder of pictures."""
    mean_curves = dict(map(read_results, others))
    if results is not None:
        curves, names = read_record(results)
        return show(curves, mean_curves, names, out)
    chosen = ["jpeg"]
    for option, text, valid in (("--peers", peers, [*PEERS, *CUT]), ("--ours", ours, [*OURS])):
        names = valid if text == "all" else [name for name in text.split(",") if name]
        if unknown := sorted(n for n in set(names) - set(valid) if not ours_of(n)):
            raise click.UsageError(f"{option}: unknown: {', '.join(unknown)}")
        chosen += [name for name in names if name not in chosen]
    for program in (program for name in chosen for program in CUT.get(name, ())):
        if not shutil.which(program):
            raise click.UsageError(f"the program {program} is not installed")
    if trunk:
        lpips.load_trunk(trunk)  # so that a wrong file is refused at once
    paths = list_pictures([data])
    caches = {(c, p): out and out / "curves" / f"{c}-{p.stem}.json" for c in chosen for p in paths}
    slow = Slow(ssimulacra2, trunk)
    work = [Job(*at, cuts, model, slow, threads, cache) for at, cache in caches.items()]
    curves: Curves = {}
    pool = ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else None
    done = pool.map(run, work) if pool else map(run, work)
    with click.progressbar(
        zip(work, done, strict=True), length=len(work), file=sys.stderr,
        item_show_func=lambda w: w and f"{w[0].codec} {w[0].picture.name}",
    ) as bar:  # fmt: skip
        for job, curve in bar:
            curves.setdefault(job.codec, []).append(curve)
    show(curves, mean_curves, [p.name for p in paths], out)
    if out:
        sizes = [Image.open(p).size for p in paths]
        pictures = [(p.name, w * h) for p, (w, h) in zip(paths, sizes, strict=True)]
        write_record(curves, pictures, get_model(model).id.hex(), out / "results.tsv")


def show(curves: Curves, others: dict[str, Curve], names: list[str], out: Path | None) -> None:
    """Print the tables, and write them with the plot to ``out``. names: of the pictures."""
    text = figures.all_tables(curves, others)
    points = {name: len(mine[0]) for name, mine in curves.items() if is_ours(name)}
    print(f"{len(names)} pictures; points of one .ddpm file: {points}; PSNR in dB\n")
    print(text)
    if out:
        figures.write(curves, others, names, out, text)


if __name__ == "__main__":
    main()
