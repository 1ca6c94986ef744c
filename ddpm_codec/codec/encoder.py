"""Encoding: pictures to files, level by level, until the target is reached."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..diffusion.schedule import Schedule
from ..errors import DdpmcWarning, ModelError, warn
from ..network.computing import computing
from ..network.modelfile import Model, get_model
from . import container, lossless
from . import tune as tuning
from .chain import NOTHING, Chain
from .container import Writer
from .frame import Pixels
from .header import EFFORTS, MAX_SEED, MAX_TUNE, PATHS, Header, write_header
from .image import Picture, alpha_to_bytes, colours, picture_of
from .planning import FEW, default_rungs, evenly
from .stops import byte_limit, check_limit, parse_stop
from .tune import TUNES, Tune

ModelLike = str | Path | Model | None
TuneLike = str | tuple[int, int, int] | None
Callback = Callable[[int, int], None]  # gets the number of levels done and the number of all
EFFORT = 5  # the default for photographs
EFFORT_OF_SMALL = 8  # the default for pictures of up to FEW coefficients, which are soon searched
METADATA = ("none", "icc", "all")


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all samples, dB; infinite for equal pictures."""
    total = sum(  # row by row, so that no large picture is copied as a whole
        float(np.square(x.astype(np.float32) - y).sum(dtype=np.float64))
        for x, y in zip(a, b, strict=True)
    )
    return float("inf") if total == 0 else 10 * float(np.log10(255**2 * a.size / total))


class Encoder:
    """Encodes one picture level by level."""

    def __init__(
        self, pixels: Pixels, header: Header, model: Model, device: str = "cpu",
        extras: dict[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        """pixels: (H, W, 3). extras: contents by kind, see container.EXTRAS."""
        self.pixels = pixels
        self.chain = Chain(header, model, device)
        self.chain.observe(pixels)
        self.estimate = self.chain.estimate(-1)
        self.level = 0  # the next level
        self.writer = Writer(header)
        self._waiting = dict(extras or {})  # not yet written

    def step(self, limit: float = math.inf, target: float = math.inf) -> float:
        """Encode one more level. Returns the PSNR after it, dB.

        An extra is written once the file before it is as long as the extra, so that a first picture
        arrives early. If the level would end beyond ``limit`` bytes or reaches ``target`` dB, the
        file may be cut inside it: then all extras are written before it.
        """
        payload = self.chain.encode_level(self.level, self.estimate)
        self.estimate = NOTHING  # frees its memory before the next one is made
        self.estimate = self.chain.estimate(self.level)
        reached = psnr(self.pixels, self.chain.picture(self.estimate.x0_hat))
        size = container.level_size(len(payload)) + extras_size(self._waiting)
        if len(self.writer) + size > limit or reached >= target:
            self.write_extras()
        self.writer.level(reached, payload)
        for kind, extra in list(self._waiting.items()):
            if len(extra) <= len(self.writer):
                self.writer.extra(kind, self._waiting.pop(kind))
        self.level += 1
        return reached

    def write_extras(self) -> None:
        """Write all extras that are not yet written."""
        for kind, extra in self._waiting.items():
            self.writer.extra(kind, extra)
        self._waiting = {}

    def finish(self) -> None:
        """Write the lossless layer. All levels must have been encoded."""
        chain = self.chain
        estimate = chain.pixels(self.estimate.x0_hat)[..., : chain.components]
        pixels = self.pixels[..., : chain.components]
        layer, _ = lossless.encode(pixels, estimate, chain.model.tables)
        self.writer.extra("residual", layer)

    def file(self) -> bytes:
        """The file so far, which is valid after every step."""
        return self.writer.file()


@computing()
def encode(
    image: Picture,
    *,
    model: ModelLike = None,
    path: str | None = None,
    tune: TuneLike = None,
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
    """Compress a picture. Encoding stops as soon as the target is reached.

    image: a Pillow picture, an array of uint8 (H, W), (H, W, 3) or (H, W, 4), the path of a picture
    or a binary file. Colours under full transparency are kept with ``lossless`` only.

    At most one target: ``bpp`` or ``bytes`` (never exceeded), ``psnr`` (dB over all samples, with
    as few bytes as possible), ``stop_at`` (``t=500``: all levels down to that timestep) or
    ``lossless``. Without a target, all levels are encoded.

    ``steps``: number of levels of the whole chain; more make smaller files and take longer, also in
    the decoder. ``effort``: 1 .. 9, of the search for messages; it takes the encoder's time only.
    ``path``: spectral or isotropic; the paper's networks have isotropic only. ``tune``: what bits
    are spent on, visual or even (see tune.py); the default depends on the target. ``metadata``:
    none, icc (the colour profile) or all (EXIF, too). ``timesteps``: falling; for the paper's
    networks, in place of ``steps``.

    Warns DdpmcWarning if a PSNR cannot be reached. Raises ImageError (with ``lossless``, also for a
    picture that would lose something), LimitError (also if header and extras exceed the number of
    bytes), ModelError; ValueError for arguments that are out of range or exclude each other.
    """
    kind, value = _target(
        {"bpp": bpp, "bytes": bytes, "psnr": psnr, "t": _timestep(stop_at)}, lossless
    )
    if metadata not in METADATA:
        raise ValueError(f"metadata is none, icc or all, not {metadata!r}")
    picture = picture_of(image, exact=lossless)
    loaded = get_model(model, device=device)
    if tune is None:
        tune = tuning.default(path or default_path(loaded), psnr, lossless)
    header = make_header(picture, loaded, path, seed, steps, effort, timesteps, tune)
    extras = extras_of(picture, metadata)
    limit = byte_limit(kind, value, header)
    check_limit(limit, len(write_header(header)) + extras_size(extras), list(extras))

    encoder = Encoder(colours(picture, exact=lossless), header, loaded, device, extras)
    levels = sum(t >= value for t in header.ts) if kind == "t" else header.levels
    for i in range(levels):
        reached = encoder.step(limit, value if kind == "psnr" else math.inf)
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


def _target(targets: dict[str, float | None], lossless: bool) -> tuple[str, float]:
    """Kind and value of the given target; without one, t=0: all levels. Raises ValueError."""
    given = {kind: float(value) for kind, value in targets.items() if value is not None}
    if len(given) + lossless > 1:
        raise ValueError("bpp, bytes, psnr, stop_at and lossless exclude each other")
    for kind, value in given.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{kind} must be a finite number, at least 0, not {value}")
    return next(iter(given.items()), ("t", 0.0))


def _timestep(stop_at: str | int | None) -> float | None:
    if stop_at is None:
        return None
    kind, value = parse_stop(stop_at)
    if kind != "t":
        raise ValueError(f"encoding stops at a timestep (t=500), not at {stop_at!r}")
    return value


def extras_of(picture: Image.Image, metadata: str) -> dict[str, bytes]:
    """The extras of a file, by kind: the alpha plane, and the metadata asked for."""
    extras = {}
    if picture.mode in ("LA", "RGBA"):
        extras["alpha"] = alpha_to_bytes(np.asarray(picture)[..., -1])
    if metadata != "none" and picture.info.get("icc_profile"):
        extras["icc"] = picture.info["icc_profile"]
    if metadata == "all" and picture.info.get("exif"):
        extras["exif"] = picture.info["exif"]
    return extras


def extras_size(extras: dict[str, bytes]) -> int:
    """Length of the extras' records."""
    return sum(container.extra_size(len(extra)) for extra in extras.values())


# --- The header --------------------------------------------------------------------------------


def make_header(
    picture: Image.Image, model: Model, path: str | None = None, seed: int = 0,
    steps: int | None = None, effort: int | None = None, timesteps: tuple[int, ...] | None = None,
    tune: TuneLike = None,
) -> Header:  # fmt: skip
    """The header of a new file. None stands for the default of this model and picture.

    Raises ValueError for arguments out of range, ModelError for a path or tune that the model does
    not support.
    """
    path = path or default_path(model)
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}")
    if path == "spectral" and not model.exact:
        raise ModelError(f"model {model.name} has the isotropic path only")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError("seed must be in 0 .. 2^32 - 1")
    pixels = picture.width * picture.height
    if effort is None:
        effort = EFFORT if 3 * pixels > FEW else EFFORT_OF_SMALL
    if effort not in EFFORTS:
        raise ValueError(f"effort must be in 1 .. {EFFORTS[-1]}")
    return Header(
        picture.width, picture.height, picture.mode, path, model.id, seed, effort,
        model.ladder.finest if model.exact else 0, _rungs(model, pixels, steps, timesteps),
        _tune(model, path, tune),
    )  # fmt: skip


def default_path(model: Model) -> str:
    """The paper's networks take one SNR for all coefficients, so they have isotropic only."""
    return "spectral" if model.exact else "isotropic"


def _tune(model: Model, path: str, tune: TuneLike) -> Tune:
    if isinstance(tune, str) and tune not in TUNES:
        raise ValueError(f"unknown tune {tune!r}")
    if tune is None:
        tune = tuning.default(path)
    numbers = TUNES[tune] if isinstance(tune, str) else Tune(*tune)
    if not numbers.possible:
        raise ValueError(f"numbers of a tune must be in 0 .. {MAX_TUNE}")
    if any(numbers) and not model.exact:
        raise ModelError(f"model {model.name} supports tune even only")
    return numbers


def _rungs(
    model: Model, pixels: int, steps: int | None, timesteps: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The levels: rungs of the model's ladder, or timesteps for the paper's networks."""
    if timesteps is None:
        return default_rungs(model, pixels) if steps is None else evenly(model, steps)
    if model.exact:
        raise ValueError("timesteps are for the paper's networks; give steps")
    ts = tuple(timesteps)
    if not ts or any(a <= b for a, b in zip(ts, ts[1:], strict=False)):
        raise ValueError("timesteps must fall")
    if ts[0] > Schedule.T or ts[-1] < 1:
        raise ValueError(f"timesteps must be in 1 .. {Schedule.T}")
    return ts


# --- A target of quality -----------------------------------------------------------------------


def _shortest(data: bytes, value: float, pixels: Pixels, model: Model, device: str) -> bytes:
    """The shortest cut of ``data`` inside its last level whose picture reaches ``value`` dB.

    The levels before do not reach it and the whole of ``data`` does. The cuts that are tried lie
    some 1/64 of the level apart.
    """
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

    k = bisect.bisect_left(tries, True, key=reached)  # quality rises with the bytes
    return container.cut(data, level.offset(tries[k])) if k < len(tries) else data
