"""What DDPM does with small pictures: samples, mixtures, code lengths."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click

from .. import files
from . import options
from .options import ANY, COUNT, NAME, TIMESTEP, at_most_one, flag, option, torch_device, usage
from .report import Report, json_line
from .streams import show

model = option(
    "--model", "M", NAME, "Model of the paper's kind: a name or a file.  [default: cifar10]"
)
small = options.options(model, options.threads, options.device)
sheet = options.options(
    option("-o --output", "PNG", NAME, "Picture to write; - for standard output.", required=True),
    options.picture_kind,
)


def check_sheet(output: str, suffix: str | None, force: bool) -> None:
    """Whether a contact sheet can be written there, told before it is drawn."""
    from PIL import Image

    files.check_output(output, force)
    files.picture_bytes(Image.new("RGB", (1, 1)), output, suffix)


@click.command()
@sheet
@option("-n --number n", "N", COUNT, "How many pictures.", default=16)
@option("--steps", "N", TIMESTEP, "Timesteps to visit, evenly apart.", default=1000)
@flag("--ddim deterministic", "The deterministic sampler (DDIM); else DDPM's Algorithm 2.")
@options.variance("fitted")
@option("--shared", "T", TIMESTEP, "The pictures share all down to x_T and part there.")
@option("--progressive columns", "K", COUNT, "A row per picture: x0_hat at K points on the way.")
@option("--nearest among", "PATH", ANY, "A second row: the nearest of these pictures, in pixels.")
@options.seed
@small
@options.force
@options.quiet
def sample(
    output: str, suffix: str | None, force: bool, quiet: bool, model: str | None,
    threads: int | None, device: str, columns: int | None, among: Path | None, **how: Any,
) -> int:  # fmt: skip
    """Draw pictures from a model of the paper's kind, and write them as one contact sheet."""
    at_most_one(("--progressive", columns), ("--nearest", among))
    check_sheet(output, suffix, force)
    device = torch_device(device, threads)
    from ..paper import sampling

    with Report(quiet=quiet).progress(output) as progress:
        picture = sampling.sampled_sheet(model, device, columns, among, progress, **how)
    files.write(output, files.picture_bytes(picture, output, suffix), force)
    return 0


def shares(context: click.Context, option: click.Parameter, value: str) -> list[float]:
    """Callback: numbers, separated by commas."""
    finite = options.Finite()
    return [finite.convert(x, option, context) for x in value.split(",")]


@click.command()
@click.argument("ends", metavar="A B", nargs=2, type=NAME)
@sheet
@option("--t start", "T", TIMESTEP, "Where the latents are mixed.", default=500)
@option("--lam", "X,X..", str, "Shares of B.", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
        callback=shares)  # fmt: skip
@option("--steps", "N", TIMESTEP, "Timesteps to visit on the way back.", default=1000)
@options.seed
@small
@options.force
def interpolate(
    ends: tuple[str, str], output: str, suffix: str | None, force: bool, lam: list[float],
    model: str | None, threads: int | None, device: str, **how: Any,
) -> int:  # fmt: skip
    """Between two 32x32 pictures, through latents: A, the mixtures, B in one row."""
    with usage():
        files.refuse_inputs(output, ends)
    check_sheet(output, suffix, force)
    device = torch_device(device, threads)
    from ..codec import image
    from ..paper import sampling

    a, b = (image.load(io.BytesIO(files.read(end))).convert("RGB") for end in ends)
    picture = sampling.interpolated_sheet(model, device, a, b, lam, **how)
    files.write(output, files.picture_bytes(picture, output, suffix), force)
    return 0


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=ANY)
@option("-n --number n", "N", COUNT, "Only the first N pictures.")
@option("--draws", "N", COUNT, "Steps to evaluate for each picture.  [default: all 999]")
@options.variance("fitted")
@option(
    "--terms", "CSV", options.FILE, "File to write: L_{t-1} and the eps error at each timestep."
)
@options.seed
@small
@options.force
@options.as_json
@options.quiet
def likelihood(
    paths: tuple[Path, ...], terms: Path | None, force: bool, as_json: bool, quiet: bool,
    model: str | None, threads: int | None, device: str, **how: Any,
) -> int:  # fmt: skip
    """Code lengths of 32x32 pictures: the variational bound in bits per dimension."""
    if terms:
        with usage():
            files.refuse_inputs(str(terms), [str(path) for path in paths])
        files.check_output(str(terms), force)
    device = torch_device(device, threads)
    from ..paper import likelihood as bound

    with Report(as_json, quiet).progress("pictures") as progress:
        got = bound.of_files(paths, model, device, progress=progress, **how)
    if terms:
        files.write(str(terms), got.csv().encode(), force)
    show(json_line(got.summary()) if as_json else bound.text(got))
    return 0
