"""Pillow plugin: after ``import ddpm_codec.pillow``, Pillow opens and saves .ddpm files.

import ddpm_codec.pillow
from PIL import Image

with Image.open("x.ddpm") as im:   # reads the header only: ddpm_codec.info tells the rest
    im.stop_at = "t=500"           # optional, before the pixels are asked for
    im.save("x.png")
im.save("y.ddpm", bpp=0.5)         # the keywords of ddpm_codec.encode

im.draft(None, size) and im.thumbnail(size) leave out the levels that a picture of that size does
not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from PIL import Image, ImageFile
from PIL.Image import Resampling

from .codec.container import Stream, cut, parse
from .codec.header import MAGIC, MAX_HEADER
from .codec.stops import reaches, stop_offset
from .errors import DdpmcError

# A level of that SNR leaves noise of the variance 1 / SNR in each coefficient, of pixels in
# -1 .. 1. Shrinking to 1/k averages k^2 pixels: what is left is 10 log10(4 k^2 SNR) dB below white.
ENOUGH = 10240  # k^2 SNR: 46 dB

_KEYWORDS = (
    "model", "path", "tune", "steps", "effort", "bpp", "bytes", "psnr", "stop_at", "lossless",
    "seed", "device", "progress", "metadata", "timesteps",
)  # fmt: skip


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


class DdpmImageFile(ImageFile.ImageFile):
    """A .ddpm file. The attributes say how to decode it, and count until the first load().

    Afterwards ``info["ddpm"]`` is what :func:`ddpm_codec.decode` says of the picture.
    """

    format = "DDPM"
    format_description = "Diffusion-model progressive image"

    stop_at: str | None = None  # t=500, bpp=0.25, bytes=4000 or psnr=32; None: all there is
    recon: str = "mean"
    seed: int = 0
    model: Any = None
    device: str = "cpu"

    _decoded = True  # also of what comes out of a pickle

    def _open(self) -> None:
        assert self.fp is not None
        stream = Stream()
        with _os_errors():
            stream.read(self.fp.read(MAX_HEADER), last=False)
            header = stream.header
        self._size = header.width, header.height
        self._mode = header.mode
        self._decoded = False

    def _content(self) -> bytes:
        if self.fp is None:
            raise ValueError("Operation on closed image")
        self.fp.seek(0)
        return self.fp.read()

    def verify(self) -> None:
        """Raises OSError unless all checksums are right; nothing is decoded."""
        if not self._decoded:
            with _os_errors():
                if damage := parse(self._content()).damage:
                    raise OSError(f"damaged ({damage})")
        super().verify()

    def draft(
        self, mode: str | None, size: tuple[int, int] | None
    ) -> tuple[str, tuple[int, int, float, float]] | None:
        """Set ``stop_at`` to the first level that is good enough if the picture is shrunk to size.

        The picture keeps its own size and mode. None if nothing changes: it is loaded, or
        ``stop_at`` is set, or all there is counts.
        """
        if self._decoded or self.stop_at is not None or not size:
            return None
        with _os_errors():
            stream = parse(content := self._content())
        shrink = min(whole / max(1, part) for whole, part in zip(self.size, size, strict=True))
        kept = stream.extras.keys() - {"residual"}
        for t, snr in zip(stream.header.ts, stream.header.snrs, strict=True):
            end = stop_offset(stream, t)
            if snr * shrink**2 < ENOUGH or end == stream.size or not reaches(stream, t):
                continue
            if kept <= parse(cut(content, end)).extras.keys():  # an alpha plane may come later
                self.stop_at = f"t={t}"
                return self.mode, (0, 0, *self.size)
        return None

    def thumbnail(
        self, size: tuple[float, float], resample: Resampling = Resampling.BICUBIC,
        reducing_gap: float | None = 2.0,
    ) -> None:  # fmt: skip
        """Pillow's, after a :meth:`draft`; not with NEAREST, which averages nothing.

        Pillow itself would ask for a draft of ``reducing_gap`` times the size.
        """
        if resample == Resampling.NEAREST:
            reducing_gap = None
        if reducing_gap is not None:
            shrink = max(n / max(1, of) for n, of in zip(self.size, size, strict=True))
            self.draft(None, (int(self.width / shrink), int(self.height / shrink)))
        super().thumbnail(size, resample, reducing_gap)

    def load(self) -> Any:
        if not self._decoded:
            from .codec.decoder import decode

            how: dict[str, Any] = {"recon": self.recon, "seed": self.seed, "model": self.model}
            with _os_errors():
                out = decode(self._content(), stop_at=self.stop_at, device=self.device, **how)
            self.im, self._decoded = out.im, True
            self.info |= out.info
            if self._exclusive_fp and self.fp is not None:
                self.fp.close()
                self.fp = None
        return super().load()


def _save(im: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    from .codec.encoder import encode
    from .codec.image import prepare

    how = {k: v for k, v in im.encoderinfo.items() if k in _KEYWORDS}
    with _os_errors():
        fp.write(encode(prepare(im, exact=how.get("lossless", False)), **how))


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise the package's errors as OSError, which users of Pillow expect."""
    try:
        yield
    except (DdpmcError, ValueError) as e:
        raise OSError(str(e)) from e


Image.register_open(DdpmImageFile.format, DdpmImageFile, _accept)
Image.register_save(DdpmImageFile.format, _save)
Image.register_extension(DdpmImageFile.format, ".ddpm")
Image.register_mime(DdpmImageFile.format, "image/x-ddpm")
