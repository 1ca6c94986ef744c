"""Files to pictures, and what can be done with files without decoding them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import files
from ..batch import Batch, Result, decode_all
from ..batch.jobs import Job, Made, Work, check_format
from . import options
from .options import NAME, at_most_one, one_of, option, pairs_of, torch_device, usage
from .report import Report, headline, label_of, table
from .streams import show

if TYPE_CHECKING:
    from ..codec.container import Stream
    from ..codec.encoder import Callback

# fmt: off
decode_options = options.options(
    option("-o --output", "IMG", NAME,
           f"Picture to write, PNG or as its suffix says; {options.SEVERAL}"),
    option("--all folder", "DIR", NAME,
           "Instead, the picture at every level: DIR/FILE-tNNNN.png; of a pipe as it arrives."),
    options.picture_kind,
    options.stop,
    option("--recon", None, one_of("mean", "sample"), "The expected picture, or a sample.",
           default="mean"),
)
# fmt: on


@click.command()
@options.ddpm_files
@decode_options
@options.seed
@options.compute
@options.many
@options.reporting
def decode(
    sources: tuple[str, ...], output: str | None, folder: str | None, suffix: str | None,
    force: bool, as_json: bool, quiet: bool, threads: int | None, device: str, jobs: int,
    scheduler: str | None, skip_existing: bool, **how: Any,
) -> int:  # fmt: skip
    """Decode files, and all .ddpm files below folders, wholly or up to a point.

    A file that ends early gives the best picture of what is there. A damaged one gives the picture
    before the damage, with exit status 3.
    """
    if (output is None) == (folder is None):
        raise click.UsageError("give one of -o IMG and --all DIR")
    many = {"--jobs": jobs > 1, "--scheduler": scheduler, "--skip-existing": skip_existing}
    for name, given in many.items():
        at_most_one(("--all", folder), (name, given))
    how["device"] = torch_device(device, threads)
    report = Report(as_json, quiet)
    if output is None:
        named = ["stdin" if source == "-" else source for source in sources]
        dests = [dest for _, dest in pairs_of(named, f"{folder}/", f".{suffix or 'png'}")]
        pairs = list(zip(sources, dests, strict=True))
        files.make_folders(f"{folder}/", pairs)
        work = levels_of(report, force, **how)
        return report.batch(Batch(pairs, work, force=True, read=False))
    with usage():
        batch = decode_all(
            sources, output, suffix=suffix, jobs=jobs, scheduler=scheduler, threads=threads,
            skip_existing=skip_existing, force=force, **how,
        )  # fmt: skip
    return report.batch(batch, decoded, label_of(sources, "decode"))


def decoded(result: Result) -> str:
    """One line on a picture."""
    about = result.about
    size = f"{about['width']}x{about['height']}"
    return f"{result.dest}: {size} at t={about['t']}, {about['bytes']:,} bytes"


def levels_of(report: Report, force: bool, *, stop_at: str | None, **how: Any) -> Work:
    """Work that writes the picture at every level of a file, of a pipe's as its bytes arrive."""
    from ..codec import decoder
    from ..codec.arrival import Arrival

    def work(job: Job, _: Callback | None) -> Made:
        source, dest = job.source, job.dest
        pipe = source == "-" or files.special(source)
        arrival = Arrival(files.arriving(source) if pipe else files.read(source), stop_at)
        stream = arrival.begin(whole=not pipe)
        check_format(stream, dest)
        for name in level_names(stream, dest, more=pipe):
            files.refuse_to_overwrite(name, force)
        levels: list[dict[str, Any]] = []
        for level in decoder.decode_levels(arrival, **how):
            to = level_name(dest, level.t, level.complete, [v["output"] for v in levels])
            files.write(to, files.picture_bytes(level.image, to), force)
            psnr = level.psnr if level.complete else None  # a part has less than its level
            about = {"t": level.t, "snr": level.snr, "bytes": level.bytes, "psnr": psnr}
            levels.append({"output": to, **about, "complete": level.complete})
            quality = (
                f"{psnr:.2f} dB" if psnr is not None else "a part of the next level among them"
            )
            report.say(f"{to}: {level.bytes:,} bytes, {quality}")
        folder = str(Path(dest).parent)
        return None, {"output": folder, "levels": levels, "damage": arrival.damage}

    return work


def level_name(dest: str, t: int, complete: bool, taken: list[str]) -> str:
    """FILE-tNNNN.png; -part where a part of the next level has been used, too."""
    path = Path(dest)
    stem = f"{path.stem}-t{t:04d}" + ("" if complete else "-part")
    while (name := str(path.with_name(stem + path.suffix))) in taken:
        stem += "+"  # beyond the paper's schedule several levels have its last timestep
    return name


def level_names(stream: Stream, dest: str, more: bool = False) -> list[str]:
    """What the pictures of all levels will be called, if none is damaged.

    more: the file has only begun. Then all names that there may be.
    """
    from ..diffusion.schedule import Schedule

    ts = [Schedule().T, *stream.header.ts]
    ends = [(ts[i + level.complete], level.complete) for i, level in enumerate(stream.levels)]
    if more:
        ends = [(t, True) for t in ts[1:]] + [(t, False) for t in ts]
    names: list[str] = []
    for t, complete in ends + [(0, True)] * (more or stream.lossless):
        names.append(level_name(dest, t, complete, names))
    return names


@click.command()
@options.ddpm_files
@options.bits
@options.size
@options.stop
@options.output
@options.reporting
def truncate(
    sources: tuple[str, ...], output: str, force: bool, as_json: bool, quiet: bool,
    bytes: int | None, bpp: float | None, stop_at: str | None,
) -> int:  # fmt: skip
    """Cut files, without decoding them. What is left is a file like any other."""
    if not at_most_one(("--bytes", bytes), ("--bpp", bpp), ("--stop-at", stop_at)):
        raise click.UsageError("give one of --bytes, --bpp and --stop-at")
    pairs = pairs_of(sources, output, ".ddpm")
    from ..codec import stops

    def work(job: Job, _: Callback | None) -> Made:
        left = stops.truncate(job.content, bytes=bytes, bpp=bpp, stop_at=stop_at)
        return left, stops.info(left)

    files.make_folders(output, pairs)
    return Report(as_json, quiet).batch(
        Batch(pairs, work, force=force), lambda cut: headline(cut.dest, cut.about)
    )


@click.command()
@options.ddpm_files
@option("--plot figure", "FILE", options.FILE,
        "Also draw PSNR against bits per pixel: an SVG file, or a picture.")  # fmt: skip
@options.force
@options.as_json
def info(sources: tuple[str, ...], figure: Path | None, force: bool, as_json: bool) -> int:
    """Show what files hold: size, model, and bytes, bpp and PSNR at each timestep."""
    if figure:
        check_figure(str(figure), sources, force)
    from ..codec import stops
    from ..view.figure import curve, plot

    curves = []

    def work(job: Job, _: Callback | None) -> Made:
        about = stops.info(job.content)
        curves.append(curve(job.source, about))
        return None, about

    pairs = [(file, "") for source in sources for file in files.below(source, (".ddpm",))]
    status = Report(as_json).batch(
        Batch(pairs, work), lambda result: table(result.source, result.about), out=show
    )
    if figure and curves:
        files.write(str(figure), plot(curves, str(figure)), force)
    return status


def check_figure(dest: str, sources: Sequence[str], force: bool) -> None:
    """Whether a figure can be written there, told before anything is shown."""
    with options.usage():
        files.refuse_inputs(dest, sources)
    files.check_output(dest, force)
    if not dest.lower().endswith(".svg"):
        files.picture_format(dest)
