"""What the page shows of one file: its picture at every level, what these cost, and its rivals."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from PIL import Image, features

from ..codec import container, image, limits, stops
from ..codec.container import Stream
from ..codec.decoder import Decoder, Recon, check_recon, level_at
from ..codec.encoder import Callback, ModelLike, psnr
from ..codec.header import MAGIC, Header
from ..codec.source import File, content
from ..errors import DamageWarning, DdpmcError, ImageError, warn
from ..network.computing import computing
from ..network.modelfile import get_model
from .figure import Curve, printable

Rival = File | image.Picture  # a .ddpm file, or a picture
WEBP_SIDE = 16383  # pixels, the most that WebP holds


@dataclass(frozen=True)
class Step:
    """The picture at a level."""

    t: int
    snr: float
    bytes: int  # of the file, up to here
    bpp: float
    psnr: float | None  # dB; infinite: no loss; None: not known
    complete: bool  # whether all of the level is there
    src: str  # the picture, a data URI


@dataclass(frozen=True)
class Other:
    """A picture to compare with."""

    name: str
    bytes: int | None  # None: it does not come from a file
    psnr: float | None
    original: bool
    src: str


@dataclass(frozen=True)
class Entry:
    """A file as the page shows it."""

    name: str
    width: int
    height: int
    mode: str
    bytes: int
    measured: bool  # PSNR is measured; else it is what the encoder noted in the file
    steps: int  # levels of the whole chain
    damage: str | None
    levels: list[Step]
    others: list[Other]

    def about(self) -> dict[str, Any]:
        """All but the pictures."""
        about = asdict(self)
        for part in (*about["levels"], *about["others"]):
            del part["src"]
        return about

    def curves(self) -> list[Curve]:
        """The file's own, then a mark for each other picture of known size and quality."""
        own = [(v.bpp, v.psnr) for v in self.levels if _finite(v.psnr)]
        share = 8 / (self.width * self.height)
        marks = [
            Curve(o.name, [(o.bytes * share, o.psnr)])
            for o in self.others
            if o.bytes and _finite(o.psnr)
        ]
        return [Curve(self.name, own), *marks]


def entry(
    file: File,
    original: Rival | None = None,
    against: Sequence[Rival] = (),
    *,
    stop_at: str | int | None = None,
    recon: Recon = "mean",
    seed: int = 0,
    model: ModelLike = None,
    device: str = "cpu",
    progress: Callback | None = None,
) -> Entry:
    """Decode a file for the page, with the arguments of :func:`ddpm_codec.decode`.

    PSNR is measured where there is an ``original``, over what is not fully transparent. Warns
    DamageWarning. Raises as :func:`ddpm_codec.decode`; ImageError for a picture that cannot be read
    or is of another size.
    """
    check_recon(recon)
    data, damage = stops.stopped(content(file), stop_at)
    stream = container.parse(data)
    h = stream.header
    limits.check_size((h.width, h.height))

    # Whatever may be refused is checked before the long part.
    true = None if original is None else _read(original, h, model, device)
    others = ([true] if true else []) + [_read(rival, h, model, device) for rival in against]
    reference = true.picture if true else None
    with computing():
        decoder = Decoder(stream, get_model(model, id=h.model, device=device), device)
        levels = [
            _step(picture, noted if reference is None else _psnr(picture, reference), complete)
            for picture, noted, complete in _pictures(decoder, recon, seed, progress)
        ]
    if damage := decoder.damage or damage:
        warn(f"damaged ({damage})", DamageWarning)
    return Entry(
        name_of(file), h.width, h.height, h.mode, len(data), reference is not None, h.levels,
        damage, levels, [_other(read, reference) for read in others],
    )  # fmt: skip


def _step(picture: Image.Image, db: float | None, complete: bool) -> Step:
    t, snr, nbytes = (picture.info["ddpm"][key] for key in ("t", "snr", "bytes"))
    bpp = 8 * nbytes / (picture.width * picture.height)
    return Step(t, snr, nbytes, bpp, db, complete, data_uri(picture))


def _other(read: Read, reference: Image.Image | None) -> Other:
    db = None if reference is None else _psnr(read.picture, reference)
    src = data_uri(read.picture)
    return Other(read.name, read.bytes, db, read.picture is reference, src)


def _pictures(
    decoder: Decoder, recon: Recon, seed: int, progress: Callback | None
) -> Iterator[tuple[Image.Image, float | None, bool]]:
    """At every level: the picture, the PSNR that the encoder noted, whether the level is whole.

    Of a file without any level: what the decoder expects before the first.
    """
    total = len(decoder.stream.levels)
    while decoder.step():
        level = level_at(decoder, recon, seed)
        # The encoder measured whole levels, and the expected picture.
        noted = level.psnr if level.complete and recon == "mean" else None
        yield level.image, noted, level.complete
        if progress:
            progress(decoder.level + 1 + decoder.partial, total)
    decoder.finish()
    if decoder.exact is not None:
        yield level_at(decoder).image, math.inf, True
    elif decoder.level < 0 and not decoder.partial:
        yield decoder.image(decoder.picture(recon, seed)), None, False


def name_of(file: object) -> str:
    """The last part of a path, or of the path that a file or picture knows."""
    path = file
    if not isinstance(file, str | os.PathLike):
        path = getattr(file, "name", None) or getattr(file, "filename", None)
    if not isinstance(path, str | os.PathLike):
        return "picture"
    return printable(Path(path).name)


class Read(NamedTuple):
    """A picture to compare with, as it was read."""

    name: str
    bytes: int | None
    picture: Image.Image


def _read(rival: Rival, header: Header, model: ModelLike, device: str) -> Read:
    """``model``: of a .ddpm file of the same model as ``header``; others find their own."""
    name, nbytes = name_of(rival), None
    try:
        if isinstance(rival, Image.Image | np.ndarray):
            picture = image.picture_of(rival)
        else:
            data = content(rival)
            nbytes = len(data)
            if data.startswith(MAGIC):
                stream = container.parse(data)
                same = stream.header.model == header.model
                picture = _decoded(name, stream, model if same else None, device)
            else:
                picture = image.load(io.BytesIO(data))
        if picture.size != (header.width, header.height):
            text = f"{picture.width}x{picture.height} is not the file's size"
            raise ImageError(f"{text}, {header.width}x{header.height}")
    except DdpmcError as e:
        raise type(e)(f"{name}: {e}") from None
    return Read(name, nbytes, picture)


def _decoded(name: str, stream: Stream, model: ModelLike, device: str) -> Image.Image:
    with computing():
        end = Decoder(stream, get_model(model, id=stream.header.model, device=device), device).run()
        picture = end.image(end.picture())
    if end.damage:
        warn(f"{name} is damaged ({end.damage})", DamageWarning)
    return picture


def _psnr(picture: Image.Image, original: Image.Image) -> float:
    a, b = (np.asarray(x.convert("RGB")) for x in (picture, original))
    if original.mode in ("LA", "RGBA"):
        seen = np.asarray(original.getchannel("A")) > 0
        a, b = a[None, seen], b[None, seen]
    return psnr(a, b)


def data_uri(picture: Image.Image) -> str:
    """A picture without loss: as WebP, or as PNG where WebP does not hold it."""
    icc = picture.info.get("icc_profile") or b""
    grey = picture.mode in ("L", "LA") and icc  # WebP stores RGB, which a grey profile does not fit
    webp = features.check("webp") and max(picture.size) <= WEBP_SIDE and not grey
    out = io.BytesIO()
    kind = "webp" if webp else "png"
    # Neither orientation, which has been applied, nor place and time of a photograph belong here.
    picture.save(out, kind, lossless=True, method=1, quality=20, icc_profile=icc, exif=b"")
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def _finite(x: float | None) -> TypeGuard[float]:
    return x is not None and math.isfinite(x)
