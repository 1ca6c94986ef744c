"""Pictures to files."""

from __future__ import annotations

from typing import Any

import click

from ..batch import encode_all
from . import options
from .options import ABOVE_0, at_most_one, flag, one_of, option, torch_device, usage
from .report import Report, headline, label_of


def timestep(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Callback: of the stop points, a timestep only."""
    from ..codec.stops import parse_stop

    if options.stop_point(context, option, value) is not None and parse_stop(value or "")[0] != "t":
        text = f"not a timestep: {value!r} (t=500; for others --bpp, --bytes, --psnr)"
        raise click.BadParameter(text, context, option)
    return value


# fmt: off
encode_options = options.options(
    option("--path", None, one_of("spectral", "isotropic"), "Which bands come when."),
    option("--tune", None, one_of("visual", "even"),
           "What bits are spent on.  [default: visual; even with --lossless and above 38 dB]"),
    option("--steps", "N", options.COUNT,
           "Levels: fewer are faster and make larger files.  [default: 17]"),
    option("--effort", "1..9", click.IntRange(1, 9), "Of the encoder's search.  [default: 5]"),
    options.bits,
    options.size,
    option("--psnr", "DB", ABOVE_0, "Until this quality is reached."),
    option("--stop-at", "t=T", str, "All levels down to this timestep.", callback=timestep),
    flag("--lossless", "Down to the last bit."),
    option("--metadata", None, one_of("none", "icc", "all"),
           "What to keep: the colour profile; EXIF, too.", default="icc"),
)
# fmt: on


@click.command()
@click.argument("sources", metavar="IMG...", nargs=-1, required=True, type=options.NAME)
@options.output
@encode_options
@options.seed
@options.compute
@options.many
@options.reporting
def encode(
    sources: tuple[str, ...], output: str, as_json: bool, quiet: bool, threads: int | None,
    device: str, **how: Any,
) -> int:  # fmt: skip
    """Compress pictures, and all pictures below folders.

    Without a target: everything up to visually lossless. Pictures may be of any size and any kind
    that Pillow reads; 16-bit and CMYK ones are converted to 8-bit grey or RGB, with a warning (or
    refused, with --lossless), animations are refused.
    """
    targets = ("--bpp", "--bytes", "--psnr", "--stop-at", "--lossless")
    names = ("bpp", "bytes", "psnr", "stop_at", "lossless")
    at_most_one(*((t, how[n]) for t, n in zip(targets, names, strict=True)))
    how["device"] = torch_device(device, threads)
    from ..codec import planning
    from ..network.modelfile import get_model

    if how["steps"]:
        with usage("'--steps'"):
            planning.evenly(get_model(how["model"], device=how["device"]), how["steps"])
    with usage():
        batch = encode_all(sources, output, threads=threads, **how)
    return Report(as_json, quiet).batch(
        batch, lambda made: headline(made.dest, made.about), label_of(sources, "encode")
    )
