"""One exception for each kind of failure, with the exit status that the command line ends with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class DdpmcError(Exception):
    """Base of all errors that the package raises on purpose."""

    exit_status = 1


class ImageError(DdpmcError):
    """The picture cannot be read or written, or the codec does not support its kind."""

    exit_status = 4


class FormatError(DdpmcError):
    """Not a .ddpm file, a file of another format version, or one with an invalid header."""

    exit_status = 5


class LimitError(FormatError):
    """The picture needs more memory than is allowed, or the file was given too few bytes."""

    exit_status = 6


class ModelError(DdpmcError):
    """The model is missing, malformed, not the one the file was made with, or lacks a feature."""

    exit_status = 7


class DataError(DdpmcError):
    """No usable training or benchmark pictures."""

    exit_status = 8


class WorkerError(DdpmcError):
    """Whoever should work on pictures is not to be had, or died over one."""

    exit_status = 9


class Incomplete(Exception):
    """The bytes end inside the item being read; never leaves the package."""


class DdpmcWarning(UserWarning):
    """Base of the package's warnings."""


class CutWarning(DdpmcWarning):
    """The file ends early; the part that is present was used."""


class DamageWarning(DdpmcWarning):
    """Part of the file is damaged; the part before it was decoded."""


class ConversionWarning(DdpmcWarning):
    """The picture lost information when it was converted to 8-bit grey or RGB."""


_collected: ContextVar[list[DdpmcWarning] | None] = ContextVar("collected", default=None)


@contextmanager
def collected() -> Iterator[list[DdpmcWarning]]:
    """The package's warnings of this thread, in a list in place of where warnings go.

    What Python itself has for this takes in the warnings of all threads.
    """
    caught: list[DdpmcWarning] = []
    token = _collected.set(caught)
    try:
        yield caught
    finally:
        _collected.reset(token)


def warn(message: str, category: type[DdpmcWarning]) -> None:
    """Issue a warning that points at the user's line, past this package, Pillow and contextlib."""
    if (caught := _collected.get()) is not None:
        caught.append(category(message))
        return
    skipped = ("ddpm_codec", "PIL", "contextlib")
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in skipped:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
