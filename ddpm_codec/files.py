"""Files of the command line: ``-``, folders, and outputs that are written whole or not at all."""

from __future__ import annotations

import io
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError, ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

# Of the pictures in a folder.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
STDIN, STDOUT = "standard input", "standard output"  # their names in errors
PIECE = 1 << 16  # bytes asked for at a time


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Make errors of the file system name ``name``, not a temporary file of ours."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), name) from None


def read(source: str) -> bytes:
    """The bytes of a file, or of standard input for ``-``."""
    if source != "-":
        return Path(source).read_bytes()
    with _naming(STDIN):
        return sys.stdin.buffer.read()


def arriving(source: str) -> Iterator[bytes]:
    """The bytes of a pipe, or of standard input for ``-``, as they come."""
    f: Any  # which tells what has arrived: read() would wait for more
    with (
        _naming(STDIN if source == "-" else source),
        nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb") as f,
    ):
        while piece := f.read1(PIECE):
            yield piece


# --- Existing files ----------------------------------------------------------------------------


def _mode(path: str) -> int:
    """The st_mode of the file at ``path``, after following links; 0 if there is no file."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def special(path: str) -> bool:
    """Whether ``path`` is a pipe or a device. These are written into, never replaced."""
    mode = _mode(path)
    return mode != 0 and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def refuse_to_overwrite(dest: str, force: bool) -> None:
    """Raise FileExistsError if writing to ``dest`` would destroy data, unless ``force``.

    Regular files and block devices (disks) hold data; pipes and terminals do not.
    """
    mode = 0 if dest == "-" or force else _mode(dest)
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        raise FileExistsError(None, "exists already (--force overwrites it)", dest)


def refuse_inputs(dest: str, sources: Sequence[str]) -> None:
    """Raise ValueError if the output ``dest`` is one of the inputs."""
    _refuse_any(dest, {os.path.realpath(s) for s in sources if s != "-"})


def _refuse_any(dest: str, inputs: set[str]) -> None:
    if dest != "-" and os.path.isfile(dest) and os.path.realpath(dest) in inputs:
        raise ValueError(f"{dest} is an input: give another output")


def check_output(dest: str, force: bool) -> None:
    """Raise, before any work, the OSError that writing to ``dest`` would raise in the end."""
    refuse_to_overwrite(dest, force)
    if dest == "-":
        return
    if special(dest):  # not opened as a test: closing a pipe would end its reader
        if not os.access(dest, os.W_OK):
            raise PermissionError(None, "cannot be written to", dest)
        return
    if os.path.isdir(dest):
        raise IsADirectoryError(None, "is a folder", dest)
    folder = os.path.dirname(os.path.realpath(dest))
    if not os.path.isdir(folder):
        raise FileNotFoundError(None, "its folder does not exist", dest)
    with _naming(dest), tempfile.TemporaryFile(dir=folder):  # permissions alone prove nothing
        pass


# --- Writing -----------------------------------------------------------------------------------


@contextmanager
def replacing(dest: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``dest`` at the end and is deleted after an error.

    Links are followed. Into a pipe or device the contents are copied. Errors name ``dest``.
    """
    with _naming(str(dest)):
        if special(str(dest)):
            with tempfile.TemporaryDirectory() as folder:
                yield (whole := Path(folder, "whole"))
                with open(whole, "rb") as f, open(dest, "wb") as to:
                    shutil.copyfileobj(f, to)
            return
        target = Path(os.path.realpath(dest))
        partial = target.with_name(f".ddpmc-{os.getpid()}-{threading.get_ident()}.partial")
        try:
            yield partial
            if target.exists():
                shutil.copymode(target, partial)  # a private file stays private
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def write(dest: str, data: bytes, force: bool) -> None:
    """Write ``data`` to ``dest``, whole or not at all; ``-`` is standard output. Raises OSError."""
    if dest == "-":
        with _naming(STDOUT):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        return
    with replacing(Path(dest)) as partial:
        partial.write_bytes(data)
        refuse_to_overwrite(dest, force)  # a file may have appeared since the first check


# --- Pictures ----------------------------------------------------------------------------------


def picture_format(dest: str, suffix: str | None = None) -> str:
    """Pillow's name of the picture format that ``suffix`` stands for, by default that of ``dest``.

    It is PNG for standard output, pipes and devices without a suffix. Raises ImageError if Pillow
    writes no such format.
    """
    from PIL import Image

    named = Path(dest).suffix or (".png" if dest == "-" or special(dest) else "")
    wanted = f".{suffix}" if suffix else named
    kind = Image.registered_extensions().get(wanted.lower())
    if kind not in Image.SAVE:
        raise ImageError(f"no picture format has the suffix {wanted!r}; try .png or .tif")
    return kind


def picture_bytes(picture: Image, dest: str, suffix: str | None = None) -> bytes:
    """The picture encoded in the format of :func:`picture_format`, with its ICC profile and EXIF.

    Raises ImageError if the format cannot hold the picture.
    """
    kind = picture_format(dest, suffix)
    extras = {k: picture.info[k] for k in ("icc_profile", "exif") if picture.info.get(k)}
    out = io.BytesIO()
    try:
        picture.save(out, format=kind, **extras)
    except MemoryError:
        raise
    except Exception as e:  # Pillow's plugins raise errors of any kind
        size = f"{picture.width}x{picture.height} {picture.mode}"
        text = f"{kind} does not hold this picture, {size} ({e}); .png and .tif do"
        raise ImageError(text) from e
    return out.getvalue()


# --- Several files -----------------------------------------------------------------------------


def is_folder(output: str) -> bool:
    """Whether results go into it, each under a name of its own."""
    return output.endswith(("/", os.sep)) or os.path.isdir(output)


def below(source: str, wanted: Sequence[str], output: str = "") -> list[str]:
    """The files below a folder with one of these suffixes, sorted; of anything else, itself.

    Hidden files and folders, and the folder ``output``, are left out, and links to folders are not
    followed. Raises DataError if there are none, OSError.
    """
    if source == "-" or not os.path.isdir(source):
        return [source]
    found, own = [], os.path.realpath(output) if output else ""

    def unreadable(e: OSError) -> None:
        raise e

    for folder, inner, names in os.walk(source, onerror=unreadable):
        inner[:] = [
            name for name in inner
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) != own
        ]  # fmt: skip
        for name in names:
            if Path(name).suffix.lower() in wanted and not name.startswith("."):
                found.append(os.path.join(folder, name))
    if not found:
        raise DataError(f"no file below {source} is called {', '.join(f'*{w}' for w in wanted)}")
    return sorted(found)


def destinations(
    sources: Sequence[str], output: str, suffix: str, wanted: Sequence[str]
) -> list[tuple[str, str]]:
    """Pair each source with where its result goes: ``output``, or a file in that folder.

    A folder as ``output`` ends in a slash, or exists. Of a folder among the sources, all files with
    a suffix that is wanted, in the same sub-folders (see :func:`below`). Raises ValueError for what
    cannot be: several sources or a folder, and one file; standard input and a folder; two sources
    of one name; an output that is an input. Raises DataError for a folder without files.
    """
    if not is_folder(output):
        if len(sources) > 1:
            raise ValueError("several inputs need a folder: -o OUT/")
        if os.path.isdir(sources[0]):
            raise ValueError("a folder as input needs a folder to go to: -o OUT/")
        pairs = [(sources[0], output)]
    elif "-" in sources:
        raise ValueError("standard input needs a file or - to go to, not a folder")
    else:
        pairs = []
        for source in sources:
            for file in below(source, wanted, output):
                folder = Path(file).parent.relative_to(source) if file != source else ""
                pairs.append((file, str(Path(output, folder, Path(file).stem + suffix))))
    inputs = {os.path.realpath(source) for source, _ in pairs if source != "-"}
    taken: dict[str, str] = {}
    for source, dest in pairs:
        if dest in taken:
            raise ValueError(f"{taken[dest]} and {source} would both become {dest}")
        _refuse_any(dest, inputs)
        taken[dest] = source
    return pairs


def make_folders(output: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Make the folder that results go to, and those in it, if need be. Raises OSError."""
    if is_folder(output):
        for folder in {Path(output), *(Path(dest).parent for _, dest in pairs)}:
            folder.mkdir(parents=True, exist_ok=True)
