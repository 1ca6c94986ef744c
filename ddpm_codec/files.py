"""Files in and out for the command line: ``-``, folders, and outputs that appear whole or not."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image


def read(source: str) -> bytes:
    """The bytes of a file, or of standard input for ``-``."""
    return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()


def refuse_to_overwrite(dest: str, force: bool) -> None:
    """Raises FileExistsError unless there is nothing at ``dest``, or ``force``."""
    if dest != "-" and not force and os.path.lexists(dest):
        raise FileExistsError(None, "exists already (--force overwrites it)", dest)


@contextmanager
def written(dest: str, force: bool) -> Iterator[BinaryIO]:
    """A file that appears at ``dest`` whole, or not at all; ``-`` is standard output."""
    if dest == "-":
        buffer = io.BytesIO()
        yield buffer
        sys.stdout.buffer.write(buffer.getvalue())
        sys.stdout.buffer.flush()
        return
    refuse_to_overwrite(dest, force)
    with replacing(Path(dest)) as partial:
        with open(partial, "wb") as f:
            yield f
        refuse_to_overwrite(dest, force)


@contextmanager
def replacing(dest: Path) -> Iterator[Path]:
    """A path to write to: it becomes ``dest`` at the end, and after an error there is nothing."""
    partial = dest.with_name(f".ddpmc-{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield partial
        os.replace(partial, dest)
    finally:
        partial.unlink(missing_ok=True)


def write(dest: str, data: bytes, force: bool) -> None:
    with written(dest, force) as f:
        f.write(data)


def picture_format(dest: str) -> str:
    """Pillow's name of the format of ``dest``; PNG for standard output. Raises ImageError."""
    from PIL import Image

    suffix = Path(dest).suffix.lower()
    kind = "PNG" if dest == "-" else Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise ImageError(f"cannot write a picture with the suffix {suffix!r}")
    return kind


def save_picture(picture: Image, dest: str, force: bool) -> None:
    """Write a picture in the format of its suffix, with its ICC profile and EXIF if it has any."""
    kind = picture_format(dest)
    extras = {k: picture.info[k] for k in ("icc_profile", "exif") if picture.info.get(k)}
    with written(dest, force) as f:
        picture.save(f, format=kind, **extras)


def destinations(sources: Sequence[str], output: str, suffix: str) -> list[tuple[str, str]]:
    """Pair each source with where its result goes: ``output``, or a file in that folder.

    A folder ends in a slash (it is made if need be), or exists. Raises ValueError for what cannot
    be: several sources and one file, standard input and a folder, two sources of one name.
    """
    if not output.endswith(("/", os.sep)) and not Path(output).is_dir():
        if len(sources) > 1:
            raise ValueError(f"several inputs need a folder: {output}/")
        return [(sources[0], output)]
    if "-" in sources:
        raise ValueError("standard input needs a file or - to go to, not a folder")
    pairs = [(s, str(Path(output, Path(s).stem + suffix))) for s in sources]
    taken: dict[str, str] = {}
    for source, dest in pairs:
        if dest in taken:
            raise ValueError(f"{taken[dest]} and {source} would both become {dest}")
        taken[dest] = source
    Path(output).mkdir(parents=True, exist_ok=True)
    return pairs
