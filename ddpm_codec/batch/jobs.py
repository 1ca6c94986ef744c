"""The work on one picture: bytes in, bytes and a description out.

It opens no file and can be pickled, so any machine can do it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import files
from ..errors import DamageWarning, DdpmcError, DdpmcWarning, ModelError, WorkerError, collected

if TYPE_CHECKING:
    from ..codec.container import Stream
    from ..codec.encoder import Callback

Made = tuple[bytes | None, dict[str, Any]]  # a file's bytes, and its description for --json
Failure = DdpmcError | OSError | MemoryError


@dataclass(frozen=True)
class Job:
    """A source's name and bytes, and the name of its output."""

    source: str
    dest: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Result:
    """The outcome for one source."""

    source: str
    dest: str
    data: bytes | None = field(default=None, repr=False)  # until it is written
    about: dict[str, Any] = field(default_factory=dict)  # as info() tells, or a picture's .info
    warnings: tuple[DdpmcWarning, ...] = ()
    error: Failure | None = None
    skipped: bool = False  # it was done before

    @property
    def damaged(self) -> bool:
        return bool(self.about.get("damage")) or any(
            isinstance(w, DamageWarning) for w in self.warnings
        )


# Does a job. It may warn, and raise a Failure, which becomes part of the Result.
Work = Callable[[Job, "Callback | None"], Made]


def perform(work: Work, job: Job, progress: Callback | None = None) -> Result:
    """Do the work; errors and warnings become part of the result. Other exceptions are raised."""
    made: Made = (None, {})
    error: Failure | None = None
    with collected() as ours, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's
        try:
            made = work(job, progress)
        except (DdpmcError, OSError, MemoryError) as e:
            error = e
    return Result(job.source, job.dest, *made, tuple(ours), error)


@dataclass(frozen=True)
class Encode:
    """Encode a picture."""

    how: Mapping[str, Any]  # keywords of ddpm_codec.encode
    model: str  # its digest: another computer's model of that name may be another

    def __call__(self, job: Job, progress: Callback | None) -> Made:
        from ..codec import encoder, image, stops
        from ..network.computing import computing
        from ..network.modelfile import get_model

        device = checked_device(self.how)
        with computing():
            model = get_model(self.how.get("model"), device=device)
        if not self.model.startswith(model.id.hex()):
            raise ModelError(f"the worker's model {model.name} is another than the one asked for")
        picture = image.load(io.BytesIO(job.content), exact=self.how.get("lossless", False))
        data = encoder.encode(picture, progress=progress, **self.how)
        return data, stops.info(data)


@dataclass(frozen=True)
class Decode:
    """Decode a file."""

    how: Mapping[str, Any]  # keywords of ddpm_codec.decode
    suffix: str | None = None  # of the picture's format, whatever its name says

    def __call__(self, job: Job, progress: Callback | None) -> Made:
        from ..codec import container, decoder

        checked_device(self.how)
        check_format(container.parse(job.content), job.dest, self.suffix)
        picture = decoder.decode(job.content, progress=progress, **self.how)
        data = files.picture_bytes(picture, job.dest, self.suffix)
        return data, {
            "width": picture.width, "height": picture.height, **picture.info["ddpm"],
        }  # fmt: skip


def checked_device(how: Mapping[str, Any]) -> str:
    """The device. Raises WorkerError if this machine does not have it."""
    from ..network.modelfile import check_device

    device: str = how.get("device", "cpu")
    try:
        check_device(device)
    except ValueError as e:
        raise WorkerError(str(e)) from None
    return device


def check_format(stream: Stream, dest: str, suffix: str | None = None) -> None:
    """Check, before the long part, whether the output's format can hold a file's picture.

    Raises ImageError, and LimitError for too large a picture.
    """
    from PIL import Image

    from ..codec import limits

    size = stream.header.width, stream.header.height
    limits.check_size(size)
    blank = Image.new(stream.header.mode, size)
    blank.info["icc_profile"] = stream.extras.get("icc")
    blank.info["exif"] = stream.extras.get("exif")
    files.picture_bytes(blank, dest, suffix)
