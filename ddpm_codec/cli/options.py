"""What the commands' options have in common: their types, their bounds, groups of them."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import files
from ..errors import ImageError

F = TypeVar("F", bound=Callable[..., Any])


# --- Types -------------------------------------------------------------------------------------


class Finite(click.FloatRange):
    """No infinities and no NaN, which click takes for numbers of any range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class PathName(click.Path):
    """Never empty, as the value of an unset shell variable is."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:  # fmt: skip
        if value == "":
            self.fail("the name is empty (an unset variable?)", param, ctx)
        return super().convert(value, param, ctx)


def one_of(*names: str) -> click.Choice[str]:
    return click.Choice(names)


NAME = PathName(path_type=str, readable=False)
FILE = PathName(path_type=Path, readable=False, dir_okay=False)
FOLDER = PathName(path_type=Path, readable=False, file_okay=False)
ANY = PathName(path_type=Path, readable=False, exists=True)
ABOVE_0 = Finite(0, min_open=True)
SHARE = Finite(0, 1)
COUNT = click.IntRange(1)
THREADS = click.IntRange(1, 1024)  # with many more the threads' stacks fill the memory
TIMESTEP = click.IntRange(1, 1000)
SEED = click.IntRange(0, 2**32 - 1)


# --- Options -----------------------------------------------------------------------------------


def option(names: str, metavar: str | None, kind: Any, text: str, **more: Any) -> Callable[[F], F]:
    """A click option on one line; a default that is there is shown."""
    more = {"show_default": "default" in more} | more
    return click.option(*names.split(), metavar=metavar, type=kind, help=text, **more)


def log(context: click.Context, option: click.Parameter, value: bool) -> None:
    """Callback: what the package's modules log goes to standard error."""
    if value:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def words(*known: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What a shell completes, of an option that takes other values, too."""
    return lambda context, option, begun: [word for word in known if word.startswith(begun)]


def flag(names: str, text: str) -> Callable[[F], F]:
    return click.option(*names.split(), is_flag=True, help=text)


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


def picture_suffix(
    context: click.Context, option: click.Parameter, value: str | None
) -> str | None:
    """Callback: refuse a format that Pillow does not write."""
    try:
        if value is not None:
            files.picture_format("-", value)
    except ImageError as e:
        raise click.BadParameter(str(e), context, option) from None
    return value


# fmt: off
SEVERAL = "a folder (OUT/) for several or for a folder; - for standard output."
POINT = "t=500, bpp=0.25, bytes=4000 or psnr=32."

ddpm_files = click.argument("sources", metavar="FILE...", nargs=-1, required=True, type=NAME)
output = option("-o --output", "OUT", NAME, f"File to write; {SEVERAL}", required=True)
picture_kind = option("--format suffix", "SUFFIX", str, callback=picture_suffix,
                      shell_complete=words("png", "tif", "jpg", "webp", "ppm"),
                      text="Format of the picture (png, tif, jpg), whatever its name says.")
bits = option("--bpp", "X", ABOVE_0, "At most X bits per pixel.")
size = option("--bytes", "N", COUNT, "At most N bytes.")
stop = option("--stop-at", "POINT", str, POINT, callback=stop_point,
              shell_complete=words("t=", "bpp=", "bytes=", "psnr="))
seed = option("--seed", "S", SEED, "Of all that is random.", default=0)
force = flag("--force", "Overwrite what exists.")
quiet = flag("-q --quiet", "Only errors and damage.")
as_json = flag("--json as_json", "One JSON object per file on standard output.")
reporting = options(force, as_json, quiet)
threads = option("--threads", "N", THREADS, "CPU threads to use.")
device = option("--device", "D", str, "Torch device: cpu, cuda.", default="cpu",
                shell_complete=words("cpu", "cuda"))
auto = option("--device", "D", str, "Torch device: cpu, cuda; auto is cuda if there.",
              default="auto", shell_complete=words("auto", "cpu", "cuda"))
verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=log,
                       help="Also which arithmetic is used.")
compute = options(
    option("--model", "M", NAME, "Model: a name or a file."), threads, device, verbose,
)
many = options(
    option("--jobs", "N", click.IntRange(1, 1024),
           "How many at a time; several have a process of one thread each.", default=1),
    option("--scheduler", "WHERE", str,
           "Let a Dask cluster do it: tcp://HOST:PORT, or local for one of --jobs processes."),
    flag("--skip-existing",
         "Leave out what a run with this option made from the same file with the same options."),
)
data = option(
    "--data folders", "DIR", ANY, multiple=True, required=True,
    text="Pictures; may be repeated. Of 32x32 also .npz, .zip and CIFAR-10 batches.",
)
# fmt: on


def variance(*more: str) -> Callable[[F], F]:
    """The option of that name."""
    text = "For 32x32 pictures: of p(x_{t-1} | x_t)."
    kinds = one_of("beta", "posterior", "learned", *more)
    return option("--variance", None, kinds, text, default="posterior")


# --- What cannot be said of one option alone ---------------------------------------------------


@contextmanager
def usage(hint: str | None = None) -> Iterator[None]:
    """A ValueError is a fault of the command line, of the option ``hint``."""
    try:
        yield
    except ValueError as e:
        if hint is None:
            raise click.UsageError(str(e)) from None
        raise click.BadParameter(str(e), param_hint=hint) from None


def at_most_one(*given: tuple[str, object]) -> int:
    """How many of the named options are given. Raises UsageError for more than one."""
    names = [name for name, value in given if value]
    if len(names) > 1:
        raise click.UsageError(f"{' and '.join(names)} exclude each other")
    return len(names)


def pairs_of(
    sources: Sequence[str], output: str, suffix: str, wanted: Sequence[str] = (".ddpm",)
) -> list[tuple[str, str]]:
    with usage():
        return files.destinations(sources, output, suffix, wanted)


def torch_device(device: str, threads: int | None = None) -> str:
    """The device, if it will do; ``auto`` is CUDA or else the CPU. Sets the number of threads."""
    import torch

    from ..network.computing import computing
    from ..network.modelfile import check_device

    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with usage("'--device'"), computing():
        check_device(device)
    return device
