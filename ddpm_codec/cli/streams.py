"""The standard streams as shells leave them: closed, full, or short of a character."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

import click

from ..files import STDOUT


def prepare() -> None:
    """Let all three exist, and both outputs take any character.

    One that was closed gets /dev/null, standard input and output opened the wrong way round: using
    them fails as it should, and no file opened later takes their place and what is meant for them.
    """
    for name, mode, flags in (
        ("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY),
    ):  # fmt: skip
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """A result, on standard output. Raises OSError."""
    try:
        click.echo(text)
    except OSError as e:
        raise OSError(e.errno, e.strerror, STDOUT) from None


def tell(text: str, newline: bool = True) -> None:
    """Everything else, on standard error; where that is not to be had, the exit status must do."""
    with suppress(OSError):
        click.echo(text, nl=newline, err=True)


def finish(status: int) -> int:
    """Flush, so that the interpreter need not at its end, where errors have no status of ours."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # what is left in the buffer goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout:
                status = status or 1
    return status
