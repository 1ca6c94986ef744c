"""The command line. Every command parses, calls the library, writes; torch comes in only with them.

Exit status: 0 done, also for a file that is merely cut; 1 the file system; 2 usage; 3 a damaged
file, decoded as far as it is sound; 4 to 8 the errors of errors.py; 130 interrupted. A batch goes
on after a failure and ends with the highest.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import __version__, files
from ..errors import DdpmcError
from .report import Report, Work, failure, headline, table

INTERRUPTED = 130
F = TypeVar("F", bound=Callable[..., Any])


# --- Options -----------------------------------------------------------------------------------


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator."""

    def apply(f: F) -> F:
        for d in reversed(decorators):
            f = d(f)
        return f

    return apply


def stop_point(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Callback: refuse what is no stop point, before any work."""
    from ..codec.stops import parse_stop

    try:
        if value is not None:
            parse_stop(value)
    except ValueError as e:
        raise click.BadParameter(str(e), context, option) from None
    return value


def timestep(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Callback: of the stop points, a timestep only."""
    from ..codec.stops import parse_stop

    if stop_point(context, option, value) is not None and parse_stop(value or "")[0] != "t":
        raise click.BadParameter(f"not a timestep: {value!r} (t=500)", context, option)
    return value


class Positive(click.FloatRange):
    """No infinities either, and no NaN, which click takes for numbers."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def channel_list(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    try:
        return tuple(int(n) for n in value.split(",")) if value is not None else None
    except ValueError:
        raise click.BadParameter(repr(value), context, option) from None


def snr_ranges(
    context: click.Context, option: click.Parameter, value: tuple[tuple[float, float, float], ...]
) -> tuple[tuple[float, float, float], ...]:
    if sum(share for share, *_ in value) > 1 or any(low >= high for _, low, high in value):
        raise click.BadParameter("shares are at most 1 in all, LOW is below HIGH", context, option)
    return value


def at_most_one(*given: tuple[str, object]) -> int:
    """How many of the named options are given. Raises UsageError for more than one."""
    names = [name for name, value in given if value]
    if len(names) > 1:
        raise click.UsageError(f"{' and '.join(names)} exclude each other")
    return len(names)


def pairs_of(sources: Sequence[str], output: str, suffix: str) -> list[tuple[str, str]]:
    try:
        return files.destinations(sources, output, suffix)
    except ValueError as e:
        raise click.UsageError(str(e)) from None


def torch_device(device: str, threads: int | None = None) -> str:
    """The device, if it is there; ``auto`` is CUDA or else the CPU. Sets the number of threads."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise click.UsageError(f"--device {device}: {str(e).splitlines()[0]}") from None
    return device


def option(names: str, metavar: str | None, kind: Any, text: str, **more: Any) -> Callable[[F], F]:
    """A click option on one line; a default that is there is shown."""
    more = {"show_default": "default" in more} | more
    return click.option(*names.split(), metavar=metavar, type=kind, help=text, **more)


def flag(names: str, text: str) -> Callable[[F], F]:
    return click.option(*names.split(), is_flag=True, help=text)


# fmt: off
PRESETS = ("photo", "cifar10", "cifar10-paper")
ANY = click.Path(path_type=Path, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False)
ABOVE_0 = Positive(0, min_open=True)
COUNT = click.IntRange(1)
SEED = click.IntRange(0, 2**32 - 1)
SEVERAL = "a folder (OUT/) for several; - for standard output."
POINT = "t=500, bpp=0.25, bytes=4000 or psnr=32."


def one_of(*names: str) -> click.Choice[str]:
    return click.Choice(names)


def variance(*more: str) -> Callable[[F], F]:
    """The option of that name."""
    text = "For 32x32 pictures: of p(x_{t-1} | x_t)."
    kinds = one_of("beta", "posterior", "learned", *more)
    return option("--variance", None, kinds, text, default="posterior")


pictures = click.argument("sources", metavar="IMG...", nargs=-1, required=True)
ddpm_files = click.argument("sources", metavar="FILE...", nargs=-1, required=True)
output = option("-o --output", "OUT", str, f"File to write; {SEVERAL}", required=True)
bits = option("--bpp", "X", ABOVE_0, "At most X bits per pixel.")
size = option("--bytes", "N", COUNT, "At most N bytes.")
stop = option("--stop-at", "POINT", str, POINT, callback=stop_point)
seed = option("--seed", "S", SEED, "Of all that is random.", default=0)
force = flag("--force", "Overwrite what exists.")
quiet = flag("-q --quiet", "Only errors and damage.")
as_json = flag("--json as_json", "One JSON object per file on standard output.")
reporting = options(force, as_json, quiet)
data = option(
    "--data folders", "DIR", ANY, multiple=True, required=True,
    text="Pictures; may be repeated. Of 32x32 also .npz, .zip and CIFAR-10 batches.",
)
auto = option("--device", "D", str, "Torch device: cpu, cuda; auto is cuda if there.",
              default="auto")
compute = options(
    option("--model", "M", str, "Model: a name or a file."),
    option("--threads", "N", COUNT, "CPU threads to use."),
    option("--device", "D", str, "Torch device: cpu, cuda.", default="cpu"),
)
encode_options = options(
    option("--path", None, one_of("spectral", "isotropic"), "Which bands come when."),
    option("--steps", "N", COUNT, "Levels: fewer are faster and make larger files.  [default: 17]"),
    option("--effort", "1..9", click.IntRange(1, 9), "Of the encoder's search.  [default: 5]"),
    bits,
    size,
    option("--psnr", "DB", ABOVE_0, "Until this quality is reached."),
    option("--stop-at", "t=T", str, "All levels down to this timestep.", callback=timestep),
    flag("--lossless", "Down to the last bit."),
    option("--metadata", None, one_of("none", "icc", "all"),
           "What to keep: the colour profile; EXIF, too.", default="icc"),
)
decode_options = options(
    option("-o --output", "IMG", str, f"Picture to write, PNG or as its suffix says; {SEVERAL}"),
    option("--all folder", "DIR", str, "Instead, the picture at every level: DIR/FILE-tNNNN.png."),
    stop,
    option("--recon", None, one_of("mean", "sample"), "The expected picture, or a sample.",
           default="mean"),
)
train_options = options(
    option("--out checkpoint", "FILE", FILE, "Checkpoint to write, or to go on from.",
           required=True),
    option("--val validation", "DIR", ANY, "For the validation; may be repeated.", multiple=True),
    option("--preset", None, one_of(*PRESETS), default="photo",
           text="The photo codec's network, or DDPM's for 32x32 pictures: narrow, or the paper's "
           "own."),
    option("--coarse", "PATH", ANY, multiple=True,
           text="Small pictures with compression artefacts, for high noise only; may be repeated."),
    option("--patches", "N", COUNT, "Length of the run, in 64x64 patches; in pictures of 32x32.",
           default=1_000_000),
    option("--size", "N", COUNT, "Side of a crop.", default=128),
    option("--batch", "N", COUNT, "Crops per step and process.", default=16),
    option("--lr", "X", float, "Learning rate at its highest.", default=6e-4),
    option("--warmup", "N", COUNT, "Steps until it is reached.", default=400),
    option("--decay", "X", float, "Part of the run over which it falls to zero.", default=0.3),
    option("--weight-decay", "X", float, "Of AdamW.", default=1e-3),
    option("--clip", "X", float, "Largest norm of the gradient.", default=1.0),
    option("--optimizer", None, one_of("muon", "adamw"), "Muon beside AdamW, or alone the latter.",
           default="muon"),
    option("--from start", "FILE", FILE,
           "Model or checkpoint whose weights, those that fit, a new run starts with."),
    option("--ema", "X", float, "Memory of the averaged weights.", default=0.9995),
    option("--channels", "N,N..", str, "Widths of the network, in place of the preset's.",
           callback=channel_list),
    option("--patch", "N", COUNT, "Pixel-unshuffle factor at the input."),
    option("--blocks", "N", COUNT, "Residual blocks at each resolution."),
    option("--dropout", "X", float, "Share of activations dropped in training."),
    option("--prediction", None, one_of("eps", "x0", "v", "mu", "edm"),
           "What the network puts out."),
    option("--objective", None, one_of("simple", "bound"), default="simple",
           text="For 32x32 pictures: L_simple, or the variational bound."),
    variance(),
    option("--log-snr", "SHARE LOW HIGH", (click.FloatRange(0.0, 1.0), ABOVE_0, ABOVE_0),
           "For 32x32 pictures: share of a batch with log-SNR uniform between these, in place of "
           "uniform t; may be repeated.", multiple=True, default=(), callback=snr_ranges),
    option("--coarse-below", "SNR", ABOVE_0, "Where the --coarse pictures serve.", default=1.0),
    flag("--dry-run", "Count pictures and parameters; train nothing."),
)
calibrate_options = options(
    option("--checkpoint", "FILE", FILE, "Of `ddpmc train`, or a model file.", required=True),
    option("-o --output", "MODEL.safetensors", FILE, "Model file to write.", required=True),
    option("--name", "NAME", str, "Name of the model.", default="photo"),
    option("--pictures", "N", COUNT, "How many pictures to look at.", default=64),
    option("--safety", "X", ABOVE_0, default=4.0,
           text="Agreement margins are X times the largest distance from double precision."),
    option("--rungs", "N", COUNT, "Of the ladder of SNRs.  [default: 33; for 32x32 pictures 37]"),
    option("--finest", "SNR", COUNT, "Of the last.  [default: 2560; for 32x32 pictures 10240]"),
    option("--tau", "X", ABOVE_0, default=0.5,
           text="A coefficient is first sent when its expected energy is X times the noise's."),
)
# fmt: on


# --- Commands ----------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ddpmc")
def cli() -> None:
    """Progressive image compression with a diffusion model.

    A file can be cut anywhere and decoded at any timestep.
    """


@cli.command()
@pictures
@output
@encode_options
@seed
@compute
@reporting
def encode(
    sources: tuple[str, ...], output: str, force: bool, as_json: bool, quiet: bool,
    threads: int | None, device: str, **how: Any,
) -> int:  # fmt: skip
    """Compress pictures.

    Without a target: everything up to visually lossless. Pictures may be of any size and any kind
    that Pillow reads; 16-bit and CMYK ones are converted to 8-bit grey or RGB, with a warning (or
    refused, with --lossless), animations are refused.
    """
    targets = ("--bpp", "--bytes", "--psnr", "--stop-at", "--lossless")
    names = ("bpp", "bytes", "psnr", "stop_at", "lossless")
    at_most_one(*((t, how[n]) for t, n in zip(targets, names, strict=True)))
    report, pairs = Report(as_json, quiet), pairs_of(sources, output, ".ddpm")
    how["device"] = torch_device(device, threads)
    from ..codec import encoder, image, planning, stops
    from ..network.modelfile import get_model

    if how["steps"]:
        try:
            planning.evenly(get_model(how["model"], device=how["device"]), how["steps"])
        except ValueError as e:
            raise click.BadParameter(str(e), param_hint="--steps") from None

    def work(source: str, dest: str) -> dict[str, Any]:
        picture = image.load(io.BytesIO(files.read(source)), exact=how["lossless"])
        with report.progress(source) as progress:
            encoded = encoder.encode(picture, progress=progress, **how)
        files.write(dest, encoded, force)
        report.say(headline(dest, about := stops.info(encoded)))
        return about

    return report.batch(pairs, work, force)


@cli.command()
@ddpm_files
@decode_options
@seed
@compute
@reporting
def decode(
    sources: tuple[str, ...], output: str | None, folder: str | None, force: bool, as_json: bool,
    quiet: bool, threads: int | None, device: str, **how: Any,
) -> int:  # fmt: skip
    """Decode files, wholly or up to a point.

    A file that ends early gives the best picture of what is there. A damaged one gives the picture
    before the damage, with exit status 3.
    """
    if (output is None) == (folder is None):
        raise click.UsageError("give one of -o IMG and --all DIR")
    report = Report(as_json, quiet)
    pairs = pairs_of(sources, output or f"{folder}/", ".png")
    how["device"] = torch_device(device, threads)
    if folder is not None:
        return report.batch(pairs, decode_levels(report, force, **how))
    return report.batch(pairs, decode_one(report, force, **how), force)


def decode_one(report: Report, force: bool, **how: Any) -> Work:
    """Work that writes the picture of a file."""
    from ..codec import decoder

    def work(source: str, dest: str) -> dict[str, Any]:
        files.picture_format(dest)  # before the long part
        with report.progress(source) as progress:
            picture = decoder.decode(files.read(source), progress=progress, **how)
        files.save_picture(picture, dest, force)
        about = picture.info["ddpm"]
        size = f"{picture.width}x{picture.height}"
        report.say(f"{dest}: {size} at t={about['t']}, {about['bytes']:,} bytes")
        return {"width": picture.width, "height": picture.height, **about}

    return work


def decode_levels(report: Report, force: bool, *, stop_at: str | None, **how: Any) -> Work:
    """Work that writes the picture at every level of a file."""
    from ..codec import decoder, stops

    def work(source: str, dest: str) -> dict[str, Any]:
        content = files.read(source)
        damage = stops.info(content)["damage"]
        if stop_at:
            content = stops.truncate(content, stop_at=stop_at)
        levels = []
        for level in decoder.decode_levels(content, **how):
            to = str(Path(dest).with_name(f"{Path(dest).stem}-t{level.t:04d}.png"))
            files.save_picture(level.image, to, force)
            about = {"t": level.t, "snr": level.snr, "bytes": level.bytes, "psnr": level.psnr}
            levels.append({"output": to, **about})
            report.say(f"{to}: {level.bytes:,} bytes, {level.psnr:.2f} dB")
        return {"output": str(Path(dest).parent), "levels": levels, "damage": damage}

    return work


@cli.command()
@ddpm_files
@bits
@size
@stop
@output
@reporting
def truncate(
    sources: tuple[str, ...], output: str, force: bool, as_json: bool, quiet: bool,
    bytes: int | None, bpp: float | None, stop_at: str | None,
) -> int:  # fmt: skip
    """Cut files, without decoding them. What is left is a file like any other."""
    if not at_most_one(("--bytes", bytes), ("--bpp", bpp), ("--stop-at", stop_at)):
        raise click.UsageError("give one of --bytes, --bpp and --stop-at")
    report = Report(as_json, quiet)
    from ..codec import stops

    def work(source: str, dest: str) -> dict[str, Any]:
        left = stops.truncate(files.read(source), bytes=bytes, bpp=bpp, stop_at=stop_at)
        files.write(dest, left, force)
        report.say(headline(dest, about := stops.info(left)))
        return about

    return report.batch(pairs_of(sources, output, ".ddpm"), work, force)


@cli.command()
@ddpm_files
@as_json
def info(sources: tuple[str, ...], as_json: bool) -> int:
    """Show what files hold: size, model, and bytes, bpp and PSNR at each timestep."""
    from ..codec import stops

    def work(source: str, _: str) -> dict[str, Any]:
        about = stops.info(files.read(source))
        if not as_json:
            click.echo(table(source, about))
        return about

    return Report(as_json).batch([(source, "") for source in sources], work)


@cli.command()
@data
@train_options
@seed
@auto
def train(
    folders: tuple[Path, ...], checkpoint: Path, validation: tuple[Path, ...], preset: str,
    device: str, dry_run: bool, start: Path | None, coarse: tuple[Path, ...], **how: Any,
) -> int:  # fmt: skip
    """Train a network on pictures.

    On several GPUs or processes: torchrun --nproc-per-node N -m ddpm_codec train ...
    """
    device = torch_device(device)
    from ..network.modelfile import preset_config
    from ..training.train import TrainConfig
    from ..training.train import train as run

    network = {k: how.pop(k) for k in ("channels", "patch", "blocks", "dropout", "prediction")}
    if how["variance"] == "learned":
        network["variance"] = True
    net = preset_config(preset, {k: v for k, v in network.items() if v is not None})
    run(
        folders, checkpoint, net, TrainConfig(**how), validation, device,
        dry_run=dry_run, start=start, coarse=coarse,
    )  # fmt: skip
    return 0


@cli.command()
@data
@calibrate_options
@seed
@auto
@force
@quiet
def calibrate(
    folders: tuple[Path, ...], checkpoint: Path, output: Path, force: bool, quiet: bool,
    device: str, **how: Any,
) -> int:  # fmt: skip
    """Fit a trained network's tables on pictures, and write both as one model file."""
    files.refuse_to_overwrite(str(output), force)
    device = torch_device(device)
    from ..training.calibrate import calibrate as run

    say = Report(quiet=quiet).say
    run(checkpoint, list(folders), output, device=device, say=say, **how)
    return 0


small = options(
    option("--model", "M", str, "Model of the paper's kind: a name or a file.  [default: cifar10]"),
    option("--threads", "N", COUNT, "CPU threads to use."),
    option("--device", "D", str, "Torch device: cpu, cuda.", default="cpu"),
)
sheet = option("-o --output", "PNG", str, "Picture to write; - for standard output.", required=True)


@cli.command()
@sheet
@option("-n --number n", "N", COUNT, "How many pictures.", default=16)
@option("--steps", "N", COUNT, "Timesteps to visit, evenly apart.", default=1000)
@flag("--ddim deterministic", "The deterministic sampler (DDIM); else DDPM's Algorithm 2.")
@variance("fitted")
@option("--shared", "T", COUNT, "The pictures share all down to x_T and part there.")
@option("--progressive columns", "K", COUNT, "A row per picture: x0_hat at K points on the way.")
@option("--nearest among", "PATH", ANY, "A second row: the nearest of these pictures, in pixels.")
@seed
@small
@force
@quiet
def sample(
    output: str, force: bool, quiet: bool, model: str | None, threads: int | None, device: str,
    columns: int | None, among: Path | None, **how: Any,
) -> int:  # fmt: skip
    """Draw pictures from a model of the paper's kind, and write them as one contact sheet."""
    files.refuse_to_overwrite(output, force)
    files.picture_format(output)
    at_most_one(("--progressive", columns), ("--nearest", among))
    device = torch_device(device, threads)
    from ..diffusion import sampling

    with Report(quiet=quiet).progress(output) as progress:
        picture = sampling.sampled_sheet(model, device, columns, among, progress, **how)
    files.save_picture(picture, output, force)
    return 0


@cli.command()
@click.argument("ends", metavar="A B", nargs=2)
@sheet
@option("--t start", "T", COUNT, "Where the latents are mixed.", default=500)
@option(
    "--lam weights", "X,X..", str, "Shares of B.", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"
)
@option("--steps", "N", COUNT, "Timesteps to visit on the way back.", default=1000)
@seed
@small
@force
def interpolate(
    ends: tuple[str, str], output: str, force: bool, weights: str, model: str | None,
    threads: int | None, device: str, **how: Any,
) -> int:  # fmt: skip
    """Between two 32x32 pictures, through latents: A, the mixtures, B in one row."""
    files.refuse_to_overwrite(output, force)
    files.picture_format(output)
    try:
        lam = [float(x) for x in weights.split(",")]
    except ValueError:
        raise click.BadParameter(repr(weights), param_hint="--lam") from None
    device = torch_device(device, threads)
    from ..codec import image
    from ..diffusion import sampling

    a, b = (image.load(io.BytesIO(files.read(end))).convert("RGB") for end in ends)
    picture = sampling.interpolated_sheet(model, device, a, b, lam, **how)
    files.save_picture(picture, output, force)
    return 0


@cli.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=ANY)
@option("-n --number n", "N", COUNT, "Only the first N pictures.")
@option("--draws", "N", COUNT, "Steps to evaluate for each picture.  [default: all 999]")
@variance("fitted")
@option("--terms", "CSV", FILE, "File to write: L_{t-1} and the eps error at each timestep.")
@seed
@small
@force
@as_json
@quiet
def likelihood(
    paths: tuple[Path, ...], terms: Path | None, force: bool, as_json: bool, quiet: bool,
    model: str | None, threads: int | None, device: str, **how: Any,
) -> int:  # fmt: skip
    """Code lengths of 32x32 pictures: the variational bound in bits per dimension."""
    if terms:
        files.refuse_to_overwrite(str(terms), force)
    device = torch_device(device, threads)
    from ..diffusion import likelihood as bound

    with Report(as_json, quiet).progress("pictures") as progress:
        got = bound.of_files(paths, model, device, progress=progress, **how)
    if terms:
        files.write(str(terms), got.csv().encode(), force)
    click.echo(json.dumps(got.summary()) if as_json else bound.text(got))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` by default) and return its exit status."""
    try:
        return int(cli.main(arguments, prog_name="ddpmc", standalone_mode=False) or 0)
    except click.Abort:  # Ctrl-C
        return INTERRUPTED
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (DdpmcError, OSError, MemoryError) as e:
        status, text, about = failure(e, "")
        click.echo(": ".join(part for part in ("ddpmc", about, text) if part), err=True)
        return status


if __name__ == "__main__":
    sys.exit(main())
