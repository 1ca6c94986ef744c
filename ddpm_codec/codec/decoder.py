"""Decoding: the levels of a file are decoded in turn, and each makes the picture better.

    state = no observations
    for each level:
        x0_hat, v = network(state)          # mean and variance of each coefficient
        y = decode(message, v)              # what a noisy observation differs from x0_hat by
        state = merge(state, x0_hat + y)
    after any level, x0_hat = network(state) is the picture

The encoder runs the same loop. It knows the coefficients, and searches for the messages.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from ..diffusion.schedule import Schedule
from ..errors import CutWarning, DamageWarning, FormatError, warn
from ..network.computing import computing
from ..network.modelfile import Model, get_model
from . import container, limits, lossless
from .arrival import Arrival
from .chain import NOTHING, Chain
from .container import Stream
from .encoder import Callback, ModelLike
from .frame import Pixels
from .image import alpha_from_bytes
from .source import File, content
from .stops import parse_stop, reaches, stopped

Recon = Literal["mean", "sample"]


def check_recon(recon: str) -> None:
    """Raises ValueError for anything but ``mean`` and ``sample``."""
    if recon not in get_args(Recon):
        raise ValueError(f"unknown recon {recon!r}")


@dataclass
class Level:
    """The picture at one level, as :func:`decode_levels` yields it."""

    image: Image.Image
    t: int  # timestep
    snr: float
    bytes: int  # of the file that were used for this picture
    psnr: float  # dB, as the encoder measured it at the level's end
    complete: bool  # whether the whole level has arrived


class Decoder:
    """Decodes the levels of a stream, one at a time."""

    def __init__(self, stream: Stream, model: Model, device: str = "cpu") -> None:
        """Raises FormatError for levels of another model, LimitError for too large a picture."""
        header = stream.header
        limits.check_size((header.width, header.height))
        self.stream = stream
        self.chain = Chain(header, model, device)
        self.estimate = self.chain.estimate(-1)
        self.level = -1  # the last complete level
        self.partial = False  # whether part of the next level was decoded, too
        self.used = stream.header_size  # bytes of the file that were used
        self.damage = stream.damage
        self.exact: Pixels | None = None  # (H, W, C), once the lossless layer is decoded

    def step(self) -> bool:
        """Decode the next level, or the part of it that has arrived.

        Returns False if nothing of it could be used.
        """
        i = self.level + 1
        if self.partial or i >= len(self.stream.levels):
            return False
        level = self.stream.levels[i]
        used, wrong = self.chain.decode_level(i, self.estimate, bytes(level.payload))
        self.damage = wrong or self.damage
        if not used:
            return False
        self.partial = wrong is not None or not level.complete
        self.used = min(level.offset(used), self.stream.size)
        self.level += not self.partial
        self.estimate = NOTHING  # frees its memory before the next one is made
        self.estimate = self.chain.estimate(self.level, used / level.nbytes if self.partial else 0)
        return True

    def run(self, progress: Callback | None = None) -> Decoder:
        """Decode everything that has arrived."""
        total = len(self.stream.levels)
        while self.step():
            if progress:
                progress(self.level + 1 + self.partial, total)
        self.finish()
        return self

    def finish(self) -> None:
        """Decode the lossless layer, if it and all levels have arrived."""
        chain, layer = self.chain, self.stream.extras.get("residual")
        if layer is None or self.level + 1 < self.stream.header.levels:
            return
        estimate = chain.pixels(self.estimate.x0_hat)[..., : chain.components]
        try:
            self.exact = lossless.decode(layer, estimate, chain.model.tables)
        except FormatError as e:
            self.damage = str(e)
            return
        self.used = self.stream.read_to

    def picture(self, recon: Recon = "mean", seed: int = 0) -> Pixels:
        """(H, W, 3) at the current level. ``sample`` changes the chain, which cannot go on."""
        chain = self.chain
        if self.exact is not None:
            return np.repeat(self.exact, 3 // self.exact.shape[2], 2)
        if recon == "sample":
            for i in range(self.level + 1, self.stream.header.levels):
                chain.draw_level(i, self.estimate, seed)
                self.estimate = chain.estimate(i)
        return chain.picture(self.estimate.x0_hat)

    @property
    def timestep(self) -> int:
        """The timestep of the last complete level; T before the first."""
        return self.stream.header.ts[self.level] if self.level >= 0 else Schedule().T

    def image(self, pixels: Pixels) -> Image.Image:
        """A Pillow picture of ``pixels``, with the alpha plane and metadata that have arrived."""
        header, extras = self.stream.header, self.stream.extras
        grey = header.mode in ("L", "LA")
        out = Image.fromarray(pixels[..., 0] if grey else pixels)
        if header.mode in ("LA", "RGBA"):
            out.putalpha(Image.fromarray(self.alpha()))
        if "icc" in extras:
            out.info["icc_profile"] = extras["icc"]
        if "exif" in extras:
            out.info["exif"] = extras["exif"]
        exact = self.exact is not None
        out.info["ddpm"] = {
            "t": 0 if exact else self.timestep,
            "snr": float("inf") if exact else self.chain.snrs[self.level] if self.level >= 0 else 0,
            "bytes": self.used,
            "complete": exact or self.level + 1 == header.levels,
            "damage": self.damage,
        }
        return out

    def alpha(self) -> Pixels:
        """(H, W): the alpha plane; opaque if it has not arrived or is damaged."""
        shape = self.stream.header.height, self.stream.header.width
        data = self.stream.extras.get("alpha")
        if data is None:
            return np.full(shape, 255, np.uint8)
        try:
            return alpha_from_bytes(data, *shape)
        except FormatError as e:
            self.damage = self.damage or str(e)
            return np.full(shape, 255, np.uint8)


def decode(
    data: File,
    *,
    stop_at: str | int | None = None,
    recon: Recon = "mean",
    seed: int = 0,
    model: ModelLike = None,
    device: str = "cpu",
    progress: Callback | None = None,
) -> Image.Image:
    """Decode a file, as far as it is present and sound, and at most up to ``stop_at``.

    data: a file's bytes, its path, or a binary file. stop_at: ``t=500``, ``bpp=0.25``,
    ``bytes=4000`` or ``psnr=32``. recon: ``mean`` (x0_hat) or ``sample`` (the rest of the chain is
    drawn from p, from the last complete level on; ``seed`` chooses the draw). The picture's
    ``.info["ddpm"]`` holds t, snr, the bytes used, whether the chain is complete, and damage or
    None. Warns CutWarning if the file ends before ``stop_at``, or is cut so that its last bytes are
    of no use (as :func:`truncate` does not cut), and DamageWarning if it is damaged. Raises
    FormatError without a sound header, LimitError, ModelError, ValueError.
    """
    check_recon(recon)
    if stop_at is not None:
        parse_stop(stop_at)
    data, damage = stopped(content(data), stop_at)
    stream = container.parse(data)
    limits.check_size((stream.header.width, stream.header.height))
    if recon != "mean":  # sampling starts from a complete level
        stream.levels = stream.whole_levels
    with computing():
        loaded = get_model(model, id=stream.header.model, device=device)
        decoder = Decoder(stream, loaded, device).run(progress)
        decoder.damage = decoder.damage or damage
        out = decoder.image(decoder.picture(recon, seed))
    exact, used = decoder.exact is not None, decoder.used
    if decoder.damage:
        warn(f"damaged ({decoder.damage})", DamageWarning)
    elif stop_at is not None and not exact and not reaches(stream, stop_at):
        warn(f"the file ends before {stop_at}; used {used:,} bytes", CutWarning)
    elif stop_at is None and not (exact or stream.sealed) and used < stream.size > stream.read_to:
        warn(f"the file is cut; used {used:,} of {stream.size:,} bytes", CutWarning)
    return out


def decode_levels(
    data: File | Iterable[bytes] | Arrival,
    *,
    stop_at: str | int | None = None,
    recon: Recon = "mean",
    seed: int = 0,
    model: ModelLike = None,
    device: str = "cpu",
) -> Iterator[Level]:
    """Yield the picture at each level, from one pass, as the bytes arrive.

    data: a file's bytes, its path, a binary file, or an iterable of pieces. A last level that has
    arrived in part is yielded with ``complete`` False. A lossless file ends with the exact picture,
    at t = 0. Nothing is read once ``stop_at`` is reached. Warns and raises as :func:`decode`, and
    what the source raises.
    """
    check_recon(recon)
    arrival = data if isinstance(data, Arrival) else Arrival(data, stop_at)
    stream = arrival.begin()
    with computing():
        loaded = get_model(model, id=stream.header.model, device=device)
        decoder = Decoder(stream, loaded, device)
        while True:
            ready = len(stream.levels) if arrival.over else len(stream.whole_levels)
            while decoder.level + 1 < ready and decoder.step():
                yield level_at(decoder, recon, seed)
            if arrival.over or decoder.level + 1 < ready:  # or one that cannot be decoded
                break
            arrival.more()
        decoder.finish()
        if decoder.exact is not None:
            yield level_at(decoder, recon, seed)
    if damage := decoder.damage or arrival.damage:
        warn(f"damaged ({damage})", DamageWarning)


def level_at(decoder: Decoder, recon: Recon = "mean", seed: int = 0) -> Level:
    """Where a decoder is, after a step or at its end. The decoder can go on from there."""
    at = decoder
    if recon != "mean" and decoder.exact is None:  # on a copy, because sampling changes the chain
        if decoder.partial:  # the copy is decoded anew, up to the last complete level
            stream = copy.copy(decoder.stream)
            stream.levels, stream.extras = stream.levels[: decoder.level + 1], {}
            at = Decoder(stream, decoder.chain.model, decoder.chain.device).run()
        else:
            at = copy.copy(decoder)
            at.chain = decoder.chain.fork()
    image = decoder.image(at.picture(recon, seed))
    level = decoder.level + decoder.partial
    about: dict[str, Any] = image.info["ddpm"]
    return Level(
        image, about["t"], about["snr"], decoder.used,
        float("inf") if decoder.exact is not None else decoder.stream.levels[level].psnr,
        not decoder.partial,
    )  # fmt: skip
