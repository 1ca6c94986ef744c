"""Pillow plugin: after ``import ddpm_codec.pillow``, Pillow opens and saves .ddpm files.

import ddpm_codec.pillow
from PIL import Image

with Image.open("x.ddpm") as im:   # reads the header only
    im.stop_at = "t=500"           # optional, before the pixels are asked for
    im.save("x.png")
im.save("y.ddpm", bpp=0.5)         # the keywords of ddpm_codec.encode
"""

from __future__ import annotations

from typing import IO, Any

from PIL import Image, ImageFile

from .codec import container, stops
from .errors import DdpmcError

_KEYWORDS = (
    "model", "path", "steps", "effort", "bpp", "nbytes", "psnr", "stop_at", "lossless", "seed",
    "device", "progress", "metadata", "timesteps",
)  # fmt: skip


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(container.MAGIC)


class DdpmImageFile(ImageFile.ImageFile):
    """A .ddpm file. The attributes say how to decode it, and count until the first load()."""

    format = "DDPM"
    format_description = "Diffusion-model progressive image"

    stop_at: str | None = None  # t=500, bpp=0.25, bytes=4000 or psnr=32; None: all there is
    recon: str = "mean"
    seed: int = 0
    model: Any = None
    device: str = "cpu"

    def _open(self) -> None:
        assert self.fp is not None
        self._data = self.fp.read()
        try:
            about = stops.info(self._data)
        except DdpmcError as e:
            raise OSError(str(e)) from e  # what users of Pillow expect of a broken file
        self._size = about["width"], about["height"]
        self._mode = about["mode"]
        self.info["ddpm"] = about

    def load(self) -> Any:
        if self._data:
            from .codec.decoder import decode

            how: dict[str, Any] = {"recon": self.recon, "seed": self.seed, "model": self.model}
            try:
                out = decode(self._data, stop_at=self.stop_at, device=self.device, **how)
            except DdpmcError as e:
                raise OSError(str(e)) from e
            self.im, self._data = out.im, b""
            self.info |= out.info
            if self._exclusive_fp and self.fp is not None:
                self.fp.close()
                self.fp = None
        return super().load()


def _save(im: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    from .codec.encoder import encode
    from .codec.image import prepare

    how = {k: v for k, v in im.encoderinfo.items() if k in _KEYWORDS}
    try:
        picture = prepare(im.copy(), exact=how.get("lossless", False))
        fp.write(encode(picture, **how))
    except DdpmcError as e:
        raise OSError(str(e)) from e


Image.register_open(DdpmImageFile.format, DdpmImageFile, _accept)
Image.register_save(DdpmImageFile.format, _save)
Image.register_extension(DdpmImageFile.format, ".ddpm")
Image.register_mime(DdpmImageFile.format, "image/x-ddpm")
