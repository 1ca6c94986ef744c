"""Files to pictures, and what can be done with files without decoding them."""

from __future__ import annotations

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
    from ..codec.encoder import Callback

# fmt: off
decode_options = options.options(
    option("-o --output", "IMG", NAME,
           f"Picture to write, PNG or as its suffix says; {options.SEVERAL}"),
    option("--all folder", "DIR", NAME, "Instead, the picture at every level: DIR/FILE-tNNNN.png."),
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
        pairs = pairs_of(sources, f"{folder}/", f".{suffix or 'png'}")
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
    """Work that writes the picture at every level of a file, as it comes."""
    from ..codec import decoder, stops

    def work(job: Job, _: Callback | None) -> Made:
        content, damage = stops.stopped(files.read(job.source), stop_at)
        check_format(content, job.dest)
        for name in level_names(content, job.dest):
            files.refuse_to_overwrite(name, force)
        levels: list[dict[str, Any]] = []
        for level in decoder.decode_levels(content, **how):
            to = level_name(job.dest, level.t, level.complete, [v["output"] for v in levels])
            files.write(to, files.picture_bytes(level.image, to), force)
            psnr = level.psnr if level.complete else None  # a part has less than its level
            about = {"t": level.t, "snr": level.snr, "bytes": level.bytes, "psnr": psnr}
            levels.append({"output": to, **about, "complete": level.complete})
            quality = (
                f"{psnr:.2f} dB" if psnr is not None else "a part of the next level among them"
            )
            report.say(f"{to}: {level.bytes:,} bytes, {quality}")
        return None, {"output": str(Path(job.dest).parent), "levels": levels, "damage": damage}

    return work


def level_name(dest: str, t: int, complete: bool, taken: list[str]) -> str:
    """FILE-tNNNN.png; -part where a part of the next level has been used, too."""
    path = Path(dest)
    stem = f"{path.stem}-t{t:04d}" + ("" if complete else "-part")
    while (name := str(path.with_name(stem + path.suffix))) in taken:
        stem += "+"  # beyond the paper's schedule several levels have its last timestep
    return name


def level_names(content: bytes, dest: str) -> list[str]:
    """What the pictures of all levels will be called, if none is damaged."""
    from ..codec import container
    from ..diffusion.schedule import Schedule

    stream = container.parse(content)
    ts = [Schedule().T, *stream.header.ts]
    ends = [(ts[i + level.complete], level.complete) for i, level in enumerate(stream.levels)]
    names: list[str] = []
    for t, complete in ends + [(0, True)] * stream.lossless:
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
@options.as_json
def info(sources: tuple[str, ...], as_json: bool) -> int:
    """Show what files hold: size, model, and bytes, bpp and PSNR at each timestep."""
    from ..codec import stops

    pairs = [(file, "") for source in sources for file in files.below(source, (".ddpm",))]
    return Report(as_json).batch(
        Batch(pairs, lambda job, _: (None, stops.info(job.content))),
        lambda result: table(result.source, result.about), out=show,
    )  # fmt: skip
