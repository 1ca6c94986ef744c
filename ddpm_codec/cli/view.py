"""Files to pages, which show them in a browser."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import files
from ..batch import Batch
from ..batch.jobs import Job, Made, Work
from . import options
from .options import NAME, flag, one_of, option, pairs_of, torch_device, usage
from .report import Report, label_of

if TYPE_CHECKING:
    from ..codec.encoder import Callback
    from ..codec.source import File
    from ..view.entry import Entry, Rival

# fmt: off
view_options = options.options(
    option("-o --output", "PAGE", NAME,
           "HTML file to write, or the folder for it; - for standard output.  [default: FILE.html "
           "in the current folder]"),
    option("--original originals", "IMG", NAME, multiple=True,
           text="The true picture: PSNR is measured against it. Of several FILEs one for all, or "
           "one for each, in their order."),
    option("--against rivals", "IMG", NAME, multiple=True,
           text="A picture to compare with, or another .ddpm file. May be repeated; of several "
           "FILEs one for all, or one for each."),
    options.stop,
    option("--recon", None, one_of("mean", "sample"), "The expected picture, or a sample.",
           default="mean"),
    flag("--open show", "Show the page in a browser."),
)
# fmt: on


@click.command()
@options.ddpm_files
@view_options
@options.seed
@options.compute
@options.reporting
def view(
    sources: tuple[str, ...], output: str | None, originals: tuple[str, ...],
    rivals: tuple[str, ...], show: bool, force: bool, as_json: bool, quiet: bool,
    threads: int | None, device: str, **how: Any,
) -> int:  # fmt: skip
    """Write a page that shows files at every level.

    One HTML file, which any browser opens without a network: a slider over the levels, the curve of
    quality against size, and a divider against the original or another picture.
    """
    dest = page_name(sources, output, [*originals, *rivals])
    if show and dest == "-":
        raise click.UsageError("--open needs a file")
    files.check_output(dest, force)
    from ..view import document

    lists = ([given(name) for name in names] for names in (originals, rivals))
    with usage():
        others = document.shares(len(sources), *lists)
    how["device"] = torch_device(device, threads)
    report = Report(as_json, quiet)
    entries: list[Entry] = []
    pairs = [(source, dest) for source in sources]
    batch = Batch(pairs, shown(others, entries, **how), force=True, read=False)
    status = report.batch(batch, label=label_of(sources, "view"))
    if entries:
        write(report, dest, entries, force, show)
    return status


def write(report: Report, dest: str, entries: Sequence[Entry], force: bool, show: bool) -> None:
    """Write the page, and open it in a browser if it is to be shown. Raises OSError."""
    from ..view.document import render

    files.write(dest, render(entries).encode(), force)
    report.say(f"{dest}: {sum(len(e.levels) for e in entries)} pictures")
    if show and not webbrowser.open(Path(dest).resolve().as_uri()):
        report.complain(dest, "there is no browser to show it in")


def page_name(sources: Sequence[str], output: str | None, others: Sequence[str]) -> str:
    """Where the page goes. Raises UsageError where that is not clear, or an input."""
    folder = output is None or files.is_folder(output)
    if folder and len(sources) > 1:
        raise click.UsageError("several files make one page: name it with -o PAGE.html")
    files.make_folders(output or "", [])
    ((_, dest),) = pairs_of(sources[:1], output or ".", ".html")
    with usage():
        files.refuse_inputs(dest, [*sources, *others])
    return dest


def given(name: str) -> File:
    """What the library takes, for a name on the command line."""
    return sys.stdin.buffer if name == "-" else name


def shown(
    others: Sequence[tuple[Rival | None, Sequence[Rival]]], entries: list[Entry], **how: Any
) -> Work:
    """Work that adds a file to ``entries``, with what is beside it: the next of ``others``."""
    from ..view.entry import entry

    rest = iter(others)

    def work(job: Job, progress: Callback | None) -> Made:
        one = entry(given(job.source), *next(rest), progress=progress, **how)
        entries.append(one)
        return None, one.about()

    return work
