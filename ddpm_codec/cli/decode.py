"""Files to pictures, and what can be done with files without decoding them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import files
from . import options
from .options import NAME, at_most_one, one_of, option, pairs_of, torch_device
from .report import Report, Work, headline, table
from .streams import show

if TYPE_CHECKING:
    from ..codec.container import Stream

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
@options.reporting
def decode(
    sources: tuple[str, ...], output: str | None, folder: str | None, suffix: str | None,
    force: bool, as_json: bool, quiet: bool, threads: int | None, device: str, **how: Any,
) -> int:  # fmt: skip
    """Decode files, wholly or up to a point.

    A file that ends early gives the best picture of what is there. A damaged one gives the picture
    before the damage, with exit status 3.
    """
    if (output is None) == (folder is None):
        raise click.UsageError("give one of -o IMG and --all DIR")
    report, to = Report(as_json, quiet), output or f"{folder}/"
    named = ["stdin" if folder and source == "-" else source for source in sources]
    dests = [dest for _, dest in pairs_of(named, to, f".{suffix or 'png'}")]
    pairs = list(zip(sources, dests, strict=True))
    how["device"] = torch_device(device, threads)
    files.make_folder(to)
    if folder is not None:
        return report.batch(pairs, decode_levels(report, force, **how))
    return report.batch(pairs, decode_one(report, force, suffix, **how), force)


def check_format(stream: Stream, dest: str, suffix: str | None = None) -> None:
    """Whether the output's format holds a file's picture, told before the long part.

    Raises ImageError, and LimitError for too large a picture.
    """
    from PIL import Image

    from ..codec import limits

    size = stream.header.width, stream.header.height
    limits.check_size(size)
    blank = Image.new(stream.header.mode, size)
    blank.info["icc_profile"] = stream.extras.get("icc")
    blank.info["exif"] = stream.extras.get("exif")
    files.picture_bytes(blank, dest, suffix)


def decode_one(report: Report, force: bool, suffix: str | None, **how: Any) -> Work:
    """Work that writes the picture of a file."""
    from ..codec import container, decoder

    def work(source: str, dest: str) -> dict[str, Any]:
        content = files.read(source)
        check_format(container.parse(content), dest, suffix)
        with report.progress(source) as progress:
            picture = decoder.decode(content, progress=progress, **how)
        files.write(dest, files.picture_bytes(picture, dest, suffix), force)
        about = picture.info["ddpm"]
        size = f"{picture.width}x{picture.height}"
        report.say(f"{dest}: {size} at t={about['t']}, {about['bytes']:,} bytes")
        return {"width": picture.width, "height": picture.height, **about}

    return work


def decode_levels(report: Report, force: bool, *, stop_at: str | None, **how: Any) -> Work:
    """Work that writes the picture at every level of a file, of a pipe's as its bytes arrive."""
    from ..codec import decoder
    from ..codec.arrival import Arrival

    def work(source: str, dest: str) -> dict[str, Any]:
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
        return {"output": str(Path(dest).parent), "levels": levels, "damage": arrival.damage}

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
    report, pairs = Report(as_json, quiet), pairs_of(sources, output, ".ddpm")
    from ..codec import stops

    def work(source: str, dest: str) -> dict[str, Any]:
        left = stops.truncate(files.read(source), bytes=bytes, bpp=bpp, stop_at=stop_at)
        files.write(dest, left, force)
        report.say(headline(dest, about := stops.info(left)))
        return about

    files.make_folder(output)
    return report.batch(pairs, work, force)


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

    def work(source: str, _: str) -> dict[str, Any]:
        about = stops.info(files.read(source))
        curves.append(curve(source, about))
        if not as_json:
            show(table(source, about))
        return about

    status = Report(as_json).batch([(source, "") for source in sources], work)
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
