"""One exception per way to fail; the command line turns each into one line and an exit status."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class DdpmcError(Exception):
    """Base of everything the package raises on purpose."""

    exit_status = 1


class ImageError(DdpmcError):
    """The picture cannot be read, or is of a kind that the codec does not hold."""

    exit_status = 4


class FormatError(DdpmcError):
    """Not a .ddpm file, a newer version of it, or one damaged before its first level."""

    exit_status = 5


class LimitError(FormatError):
    """The file or picture asks for more memory than is allowed."""

    exit_status = 6


class ModelError(DdpmcError):
    """The model file is missing, malformed, or not the one that the file was made with."""

    exit_status = 7


class DataError(DdpmcError):
    """No usable training or benchmark pictures."""

    exit_status = 8


class WorkerError(DdpmcError):
    """Whoever should work on pictures is not to be had, or died over one."""

    exit_status = 9


class Incomplete(Exception):
    """The bytes end inside what is being read; never leaves the package."""


class DdpmcWarning(UserWarning):
    """Base of the package's warnings."""


class CutWarning(DdpmcWarning):
    """The file ends early; what arrived was decoded."""


class DamageWarning(DdpmcWarning):
    """Part of the file is damaged; what comes before it was decoded."""


class ConversionWarning(DdpmcWarning):
    """The picture lost something on its way to 8-bit grey or RGB."""


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
    """Warn of the line that called us, directly or by way of Pillow or a decorator."""
    if (caught := _collected.get()) is not None:
        caught.append(category(message))
        return
    between = ("ddpm_codec", "PIL", "contextlib")
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in between:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
