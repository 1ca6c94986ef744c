"""Pictures to files: the one loop of encoder and decoder, seen from the side that knows c."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..diffusion.schedule import Schedule
from ..errors import DdpmcWarning, LimitError, ModelError, warn
from ..network.computing import computing
from ..network.modelfile import Model, get_model
from . import container, lossless
from . import tune as tuning
from .chain import NOTHING, Chain
from .container import Writer
from .frame import Pixels
from .header import EFFORTS, MAX_TUNE, PATHS, Header, write_header
from .image import Picture, alpha_to_bytes, colours, picture_of
from .planning import FEW, default_rungs, evenly
from .stops import parse_stop
from .tune import TUNES, Tune

ModelLike = str | Path | Model | None
Callback = Callable[[int, int], None]  # told how many levels are done, and how many there are
EFFORT = 5  # of photographs
EFFORT_OF_SMALL = 8  # of pictures of up to FEW coefficients, which have the time
METADATA = ("none", "icc", "all")


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all samples, dB; infinite for equal pictures."""
    total = sum(  # by rows, so that a large picture is never copied as a whole
        float(np.square(x.astype(np.float32) - y).sum(dtype=np.float64))
        for x, y in zip(a, b, strict=True)
    )
    return float("inf") if total == 0 else 10 * float(np.log10(255**2 * a.size / total))


class Encoder:
    """Encodes level by level."""

    def __init__(
        self, pixels: Pixels, header: Header, model: Model, device: str = "cpu",
        extras: dict[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        """pixels: (H, W, 3). extras: by kind, see container.EXTRAS."""
        self.pixels = pixels
        self.chain = Chain(header, model, device)
        self.chain.observe(pixels)
        self.estimate = self.chain.estimate(-1)
        self.level = 0  # the next one
        self.writer = Writer(header)
        self._waiting = dict(extras or {})

    def step(self, limit: float = float("inf"), enough: float = float("inf")) -> float:
        """Encode one more level; returns the PSNR reached.

        Extras come as soon as the levels before them have as many bytes, so that a picture is
        there early, and in any case within the first ``limit`` bytes and before the level that
        reaches ``enough`` dB: the file may be cut inside it.
        """
        payload = self.chain.encode_level(self.level, self.estimate)
        self.estimate = NOTHING  # room for the next
        self.estimate = self.chain.estimate(self.level)
        reached = psnr(self.pixels, self.chain.picture(self.estimate.x0_hat))
        taken = container.level_size(len(payload)) + sum(
            container.extra_size(len(extra)) for extra in self._waiting.values()
        )
        if len(self.writer) + taken > limit or reached >= enough:
            self.write_extras()
        self.writer.level(reached, payload)
        for kind, extra in list(self._waiting.items()):
            if len(extra) <= len(self.writer):
                self.writer.extra(kind, self._waiting.pop(kind))
        self.level += 1
        return reached

    def write_extras(self) -> None:
        """Write all that wait."""
        for kind, extra in self._waiting.items():
            self.writer.extra(kind, extra)
        self._waiting = {}

    def finish(self) -> None:
        """Add the layer that makes the file lossless."""
        chain = self.chain
        estimate = chain.pixels(self.estimate.x0_hat)[..., : chain.components]
        pixels = self.pixels[..., : chain.components]
        layer, _ = lossless.encode(pixels, estimate, chain.model.tables)
        self.writer.extra("residual", layer)

    def file(self) -> bytes:
        """A valid file at any time."""
        return self.writer.file()


@computing()
def encode(
    image: Picture,
    *,
    model: ModelLike = None,
    path: str | None = None,
    tune: str | tuple[int, int, int] | None = None,
    steps: int | None = None,
    effort: int | None = None,
    bpp: float | None = None,
    bytes: int | None = None,
    psnr: float | None = None,
    stop_at: str | int | None = None,
    lossless: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: Callback | None = None,
    metadata: str = "icc",
    timesteps: tuple[int, ...] | None = None,
) -> bytes:
    """Compress a picture; stops working as soon as the target is reached.

    image: any Pillow picture, or (H, W), (H, W, 3), (H, W, 4) uint8, or the path of a picture, or
    a binary file; what full transparency hides is kept by ``lossless`` alone. At most one target:
    ``bpp`` or ``bytes`` (not exceeded), ``psnr`` (dB over all samples, reached with the fewest
    bytes that do), ``stop_at`` (``t=500``: all levels down to that timestep), ``lossless``; without
    one, all levels. ``steps``: levels of the whole chain; more make smaller files and take longer,
    in the decoder, too. ``effort``: 1 .. 9, of the search for messages, the encoder's time alone.
    ``path``: spectral or isotropic, which the paper's networks have alone. ``tune``: what the bits
    are spent on, visual or even (see tune.py); by default what serves the target best.
    ``metadata``: none, icc
    (the colour profile) or all (EXIF, too). ``timesteps``: of the paper's networks, falling.
    Warns DdpmcWarning of a PSNR out of reach. Raises ImageError (of ``lossless`` also for what a
    file cannot hold), LimitError (also for a number of bytes that cannot be met), ModelError;
    ValueError for arguments out of range or that exclude each other.
    """
    targets = {"bpp": bpp, "bytes": bytes, "psnr": psnr, "t": _timestep(stop_at)}
    given = {k: float(v) for k, v in targets.items() if v is not None}
    if len(given) + lossless > 1:
        raise ValueError("bpp, bytes, psnr, stop_at and lossless exclude each other")
    for name, number in given.items():
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name} must be a finite number, at least 0, not {number}")
    if metadata not in METADATA:
        raise ValueError(f"metadata is none, icc or all, not {metadata!r}")
    picture = picture_of(image, exact=lossless)
    loaded = get_model(model, device=device)
    path = path or PATHS[not loaded.exact]
    if tune is None:
        tune = tuning.default(path, psnr, lossless)
    header = make_header(picture, loaded, path, seed, steps, effort, timesteps, tune)
    extras = extras_of(picture, metadata)
    kind, value = next(iter(given.items()), ("t", 0.0))
    limit = float("inf")
    if kind in ("bpp", "bytes"):
        bits = 8.0 if kind == "bytes" else picture.width * picture.height
        limit = int(min(value * bits / 8, sys.maxsize))
        _check_limit(limit, header, extras)
    encoder = Encoder(colours(picture, exact=lossless), header, loaded, device, extras)
    levels = sum(t >= value for t in header.ts) if kind == "t" else header.levels
    for i in range(levels):
        reached = encoder.step(limit, value if kind == "psnr" else float("inf"))
        full = len(encoder.writer) >= limit
        good = kind == "psnr" and reached >= value
        if progress:
            progress(i + 1, i + 1 if full or good else levels)
        if full:
            return container.cut(encoder.file(), int(limit))
        if good:
            return _shortest(encoder.file(), value, encoder.pixels, loaded, device)
    if kind == "psnr":
        warn(f"{value:g} dB is out of reach: all levels give {reached:.2f} dB", DdpmcWarning)
    encoder.write_extras()
    if lossless:
        encoder.finish()
    return encoder.file()


def _timestep(stop_at: str | int | None) -> float | None:
    if stop_at is None:
        return None
    kind, value = parse_stop(stop_at)
    if kind != "t":
        raise ValueError(f"encoding stops at a timestep (t=500), not at {stop_at!r}")
    return value


def _check_limit(limit: float, header: Header, extras: dict[str, bytes]) -> None:
    least = len(write_header(header)) + sum(
        container.extra_size(len(extra)) for extra in extras.values()
    )
    if limit < least:
        parts = "".join(f" and {kind}" for kind in extras)
        raise LimitError(f"{limit:,.0f} bytes are too few: the header{parts} alone take {least:,}")


def extras_of(picture: Image.Image, metadata: str) -> dict[str, bytes]:
    """What is kept beside the colours: the alpha plane, and the metadata asked for."""
    extras = {}
    if picture.mode in ("LA", "RGBA"):
        extras["alpha"] = alpha_to_bytes(np.asarray(picture)[..., -1])
    if metadata != "none" and picture.info.get("icc_profile"):
        extras["icc"] = picture.info["icc_profile"]
    if metadata == "all" and picture.info.get("exif"):
        extras["exif"] = picture.info["exif"]
    return extras


def make_header(
    picture: Image.Image, model: Model, path: str | None = None, seed: int = 0,
    steps: int | None = None, effort: int | None = None, timesteps: tuple[int, ...] | None = None,
    tune: str | tuple[int, int, int] | None = None,
) -> Header:  # fmt: skip
    """The header of a new file. Raises ValueError for what the format does not hold, ModelError."""
    spectral = model.exact  # another network knows one SNR at a time
    if path not in (None, *PATHS):
        raise ValueError(f"unknown path {path!r}")
    if path == "spectral" and not spectral:
        raise ModelError(f"model {model.name} has the isotropic path only")
    path = path or PATHS[not spectral]
    if tune is None:
        tune = tuning.default(path)
    if isinstance(tune, str) and tune not in TUNES:
        raise ValueError(f"unknown tune {tune!r}")
    tuned = TUNES[tune] if isinstance(tune, str) else Tune(*tune)
    if not tuned.possible:
        raise ValueError(f"numbers of a tune must be in 0 .. {MAX_TUNE}")
    if any(tuned) and not spectral:
        raise ModelError(f"model {model.name} knows all bands alike")
    if timesteps is not None and spectral:
        raise ValueError("timesteps are of the paper's networks; give steps")
    if not 0 <= seed < 2**32:
        raise ValueError("seed must be in 0 .. 2^32 - 1")
    pixels = picture.width * picture.height
    if effort is None:
        effort = EFFORT if 3 * pixels > FEW else EFFORT_OF_SMALL
    if effort not in EFFORTS:
        raise ValueError(f"effort must be in 1 .. {EFFORTS[-1]}")
    if timesteps is not None:
        rungs = tuple(timesteps)
        if not rungs or any(a <= b for a, b in zip(rungs, rungs[1:], strict=False)):
            raise ValueError("timesteps must fall")
        if rungs[0] > Schedule().T or rungs[-1] < 1:
            raise ValueError("timesteps must be in 1 .. 1000")
    else:
        rungs = default_rungs(model, pixels) if steps is None else evenly(model, steps)
    return Header(
        picture.width, picture.height, picture.mode, path, model.id, seed, effort,
        model.ladder.finest if spectral else 0, rungs, tuned,
    )  # fmt: skip


def _shortest(data: bytes, value: float, pixels: Pixels, model: Model, device: str) -> bytes:
    """The shortest cut whose picture reaches ``value`` dB; the whole of ``data`` does."""
    from .decoder import Decoder

    stream = container.parse(data)
    level = stream.levels.pop()
    before = Decoder(stream, model, device).run()
    step = max(16, level.nbytes // 64)
    tries = range(step, level.nbytes, step)

    def reached(nbytes: int) -> bool:
        chain = before.chain.fork()
        prefix = bytes(level.payload[:nbytes])
        used, _ = chain.decode_level(before.level + 1, before.estimate, prefix)
        estimate = chain.estimate(before.level, used / level.nbytes)
        return psnr(pixels, chain.picture(estimate.x0_hat)) >= value

    k = bisect.bisect_left(tries, True, key=reached)
    return container.cut(data, level.offset(tries[k])) if k < len(tries) else data
