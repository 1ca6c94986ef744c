"""Pictures to files and back: the one loop that encoder and decoder share.

    state: nothing known
    for each level:
        estimate = network(state)
        state <- rec(c | estimate, state)
    any time: x0_hat(state) is the picture

The encoder is the decoder plus the knowledge of c.
"""

from __future__ import annotations

import bisect
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from ..diffusion.process import Schedule
from ..diffusion.transform import BITS, POSITIONS
from ..errors import AgreementError, CutWarning, DamageWarning, FormatError, ModelError
from ..network.modelfile import Model, get_model
from ..rec import gaussian
from . import container as bitstream
from . import lossless
from .chain import Chain, Doubles, Estimate, Gaussian, Nested, Pixels, loudness, whole_units
from .container import Header, Stream, parse_stop
from .image import alpha_from_bytes, alpha_to_bytes, prepare

LEVEL_BITS = 36.0  # that a level takes beside its message, about: a record, gains
ModelLike = str | Path | Model | None
Recon = Literal["mean", "sample", "flow"]
Progress = Callable[[int, int], None]


@dataclass
class Level:
    """A picture on the way, as :func:`decode_levels` yields it."""

    image: Image.Image
    t: int  # timestep
    snr: float
    nbytes: int  # of the file, up to here
    psnr: float  # dB, as the encoder measured it at the level's end
    complete: bool  # whether all of the level has arrived


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio over all samples, dB; infinite for equal pictures."""
    total = sum(  # by rows, so that a large picture is never copied as a whole
        float(np.square(x.astype(np.float32) - y).sum(dtype=np.float64))
        for x, y in zip(a, b, strict=True)
    )
    return float("inf") if total == 0 else 10 * float(np.log10(255**2 * a.size / total))


def make_chain(header: Header, model: Model, device: str = "cpu") -> Chain:
    return (Gaussian if header.rec == "gaussian" else Nested)(header, model, device)


class Encoder:
    """Encodes level by level; ``bytes()`` is a valid file at any time."""

    def __init__(self, pixels: Pixels, header: Header, model: Model, device: str = "cpu") -> None:
        self.pixels, self.model = pixels, model
        self.chain = make_chain(header, model, device)
        self.chain.observe(pixels)
        self.estimate: Estimate | None = None
        self.records: list[bytes] = [bitstream.write_header(header)]
        self.ideal_bits = 0.0  # what the tables say the symbols cost, agreement apart
        self.level = 0  # the next one

    def step(self) -> float:
        """Encode one more level; returns the PSNR reached."""
        record, ideal = self.chain.encode_level(self.level, self.estimate)
        self.estimate = None  # room for the next
        self.estimate = self.chain.estimate(self.level)
        record.psnr = psnr(self.pixels, self.chain.picture(self.chain.mean(self.estimate)))
        self.ideal_bits += ideal
        before = bitstream.crc16(self.bytes())
        self.records.append(bitstream.write_level(record, self.chain.header.rec, before))
        self.level += 1
        return record.psnr

    def finish(self) -> None:
        """Add the layer that makes the file lossless."""
        estimate = self.chain.pixels(self.chain.mean(self.estimate))[..., : self.chain.components]
        layer, ideal = lossless.encode(
            self.pixels[..., : self.chain.components], estimate,
            lossless_margin(self.chain), self.model.tables,
        )  # fmt: skip
        self.ideal_bits += ideal
        self.records.append(bitstream.write_blob(layer))

    def bytes(self) -> bytes:
        return b"".join(self.records)


def lossless_margin(chain: Chain) -> float:
    """How far apart two machines' estimates may be, in grey levels.

    Both pixels and coefficients err by a share of the last level's noise.
    """
    return 4 * float(chain.model.tables.margin[-1, 0]) * chain.snrs[-1] ** -0.5 * 127.5


def encode(
    image: Image.Image | Pixels,
    *,
    model: ModelLike = None,
    rec: str | None = None,
    path: str | None = None,
    bpp: float | None = None,
    nbytes: int | None = None,
    psnr: float | None = None,
    stop_at: str | int | None = None,
    lossless: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    metadata: bool = False,
    timesteps: tuple[int, ...] | None = None,
) -> bytes:
    """Compress a picture; stops working as soon as the target is reached.

    image: any Pillow picture, or (H, W), (H, W, 3), (H, W, 4) uint8. At most one target:
    ``bpp`` or ``nbytes`` (not exceeded), ``psnr`` (dB over all samples, reached at the least cut
    that does), ``stop_at`` (``t=500``: all levels down to that timestep), ``lossless``; without
    one, all levels. ``rec``: nested or gaussian; ``path``: spectral or isotropic; by default nested
    and spectral, with the paper's networks gaussian and isotropic. ``metadata`` keeps ICC profile
    and EXIF. ``timesteps``: of gaussian, falling.
    Raises ImageError, LimitError, ModelError; ValueError for arguments that exclude each other.
    """
    targets = {"bpp": bpp, "bytes": nbytes, "psnr": psnr, "t": _timestep(stop_at)}
    given = {k: float(v) for k, v in targets.items() if v is not None}
    if len(given) + lossless > 1:
        raise ValueError("bpp, nbytes, psnr, stop_at and lossless exclude each other")
    picture = prepare(image if isinstance(image, Image.Image) else Image.fromarray(image))
    bitstream.check_size(picture.size)
    loaded = get_model(model, device=device)
    header = make_header(picture, loaded, rec, path, seed, metadata, timesteps)
    encoder = Encoder(np.asarray(picture.convert("RGB")), header, loaded, device)
    kind, value = next(iter(given.items()), ("t", 0.0))
    limit = value if kind == "bytes" else value * picture.width * picture.height / 8
    for i, t in enumerate(header.ts):
        if kind == "t" and t < value:
            break
        reached = encoder.step()
        if progress:
            progress(i + 1, header.levels)
        data = encoder.bytes()
        if kind in ("bpp", "bytes") and len(data) >= limit:
            return bitstream.truncate(data, nbytes=int(limit))
        if kind == "psnr" and reached >= value:
            return _shortest(data, value, encoder.pixels, loaded, device)
    if lossless:
        encoder.finish()
    return encoder.bytes()


def _timestep(stop_at: str | int | None) -> float | None:
    if stop_at is None:
        return None
    kind, value = parse_stop(stop_at)
    if kind != "t":
        raise ValueError(f"encoding stops at a timestep (t=500), not at {stop_at!r}")
    return value


def make_header(
    picture: Image.Image, model: Model, rec: str | None, path: str | None, seed: int,
    metadata: bool = False, timesteps: tuple[int, ...] | None = None,
) -> Header:  # fmt: skip
    """The header of a new file. Raises ValueError for what the format does not hold, ModelError."""
    spectral = model.net.cfg.precisions  # a network without them knows one SNR at a time
    rec = rec or ("nested" if spectral else "gaussian")
    if rec not in bitstream.RECS or path not in (None, *bitstream.PATHS):
        raise ValueError(f"unknown rec {rec!r} or path {path!r}")
    if rec == "gaussian" and path == "spectral":
        raise ValueError("gaussian coding has the isotropic path only")
    if path == "spectral" and not spectral:
        raise ModelError(f"model {model.name} has the isotropic path only")
    path = path or ("spectral" if spectral and rec == "nested" else "isotropic")
    if not 0 <= seed < 2**32:
        raise ValueError("seed must be in 0 .. 2^32 - 1")
    alpha = alpha_to_bytes(np.asarray(picture)[..., -1]) if picture.mode in ("LA", "RGBA") else b""
    header = Header(
        picture.width, picture.height, picture.mode, rec, path, model.id, seed,
        model.ladder.levels, model.ladder.ratio, model.ladder.finest,
        icc=picture.info.get("icc_profile") or b"" if metadata else b"",
        exif=picture.getexif().tobytes() if metadata and len(picture.getexif()) else b"",
        alpha=alpha,
    )  # fmt: skip
    if rec == "nested":
        return header
    if timesteps is None:
        timesteps = plan(model, picture.width * picture.height)
    if list(timesteps) != sorted(set(timesteps), reverse=True) or not timesteps:
        raise ValueError("timesteps must fall")
    return replace(header, levels=len(timesteps), timesteps=tuple(timesteps))


def plan(model: Model, pixels: int, last: int | None = None) -> tuple[int, ...]:
    """Timesteps for ``gaussian`` that cost a picture of this many pixels least, down to ``last``.

    By default down to where the model's nested levels end. For a photo model, whose steps take
    time, from the nested levels' timesteps; x_T, never skipped, is part of the first step.
    """
    schedule = Schedule()
    if last is None:
        last = schedule.timestep(model.ladder.snrs[-1])
    if model.net.cfg.precisions:
        ts = [t for t in (schedule.timestep(s) for s in model.ladder.snrs) if t > last] + [last]
    else:
        ts = list(range(schedule.T, last - 1, -1))
    snr = schedule.snr[ts]
    # What is alike before anything is known stays alike enough.
    known = [model.tables.error_at(model.ladder, s).reshape(-1) for s in (0.0, *snr)]
    _, kind, cells = np.unique(
        loudness(whole_units(known[0])), return_inverse=True, return_counts=True
    )
    error = np.stack([np.bincount(kind, e) / cells for e in known])
    n: Doubles = cells.astype(np.float64) * (pixels / (BITS * POSITIONS))
    chosen = gaussian.plan(snr, error, n, LEVEL_BITS)
    return tuple(ts[k] for k in chosen)


def _shortest(data: bytes, value: float, pixels: Pixels, model: Model, device: str) -> bytes:
    """The shortest safe prefix whose picture reaches ``value`` dB; the whole of it does."""
    stream = bitstream.parse(data)
    level = stream.levels.pop()
    before = _Decoder(stream, model, device).run()
    cuts = [n for n, cut in enumerate(level.cuts, 1) if cut.groups]

    def reached(received: int) -> bool:
        chain = before.chain.fork()
        chain.decode_level(before.level + 1, before.estimate, level, received)
        estimate = chain.estimate(before.level, level.share(received))
        return psnr(pixels, chain.picture(chain.mean(estimate))) >= value

    received = cuts[bisect.bisect_left(cuts[:-1], True, key=reached)]
    return data[: level.start + level.cuts[received - 1].nbytes]


class _Decoder:
    """Follows a stream's chain as far as it goes."""

    def __init__(self, stream: Stream, model: Model, device: str) -> None:
        self.stream = stream
        self.chain = make_chain(stream.header, model, device)
        self.estimate: Estimate | None = None
        self.level = -1  # the last complete one
        self.partial = False  # part of the next has arrived, too
        self.used = stream.header_size  # bytes of the file that count
        self.damage = stream.damage
        self.exact: Pixels | None = None

    def step(self) -> bool:
        """Take in one more level, or what there is of it. False: there was nothing to use."""
        i = self.level + 1
        if self.partial or i >= len(self.stream.levels):
            return False
        level = self.stream.levels[i]
        received = level.received()
        if received < len(level.cuts) and len(level.payload) >= level.cuts[received].nbytes:
            self.damage = self.damage or f"level {i}: checksum mismatch"
        if not received or not level.cuts[received - 1].groups:
            return False
        try:
            self.chain.decode_level(i, self.estimate, level, received)
        except (AgreementError, FormatError) as e:
            self.damage = str(e)
            return False
        self.used = level.start + level.cuts[received - 1].nbytes
        self.partial = received < len(level.cuts)
        self.level += not self.partial
        self.estimate = None
        self.estimate = self.chain.estimate(
            self.level, level.share(received) if self.partial else 0.0
        )
        return True

    def run(self, progress: Progress | None = None) -> _Decoder:
        total = len(self.stream.levels)
        while self.step():
            if progress:
                progress(self.level + 1, total)
        self.finish()
        return self

    def finish(self) -> None:
        """The lossless layer, if all of it is there."""
        stream, chain = self.stream, self.chain
        if stream.residual is None or self.level + 1 < stream.header.levels:
            return
        estimate = chain.pixels(chain.mean(self.estimate))[..., : chain.components]
        try:
            self.exact = lossless.decode(
                stream.residual, estimate, lossless_margin(chain), chain.model.tables
            )
        except (AgreementError, FormatError, AssertionError) as e:
            self.damage = str(e) or "damaged lossless layer"
            return
        self.used = stream.size

    def picture(self, recon: Recon, seed: int) -> Pixels:
        """(H, W, 3). ``sample`` and ``flow`` use up the chain."""
        chain = self.chain
        if self.exact is not None:
            return np.repeat(self.exact, 3 // self.exact.shape[2], 2)
        left = self.level + 1 < self.stream.header.levels
        if recon == "flow" and left and self.estimate is not None:
            return chain.picture(chain.mean(chain.flow(self.level, self.estimate)))
        if recon == "sample":
            for i in range(self.level + 1, self.stream.header.levels):
                chain.draw_level(i, self.estimate, seed)
                self.estimate = chain.estimate(i)
        return chain.picture(chain.mean(self.estimate))

    @property
    def timestep(self) -> int:
        """Of the last complete level; T before the first."""
        return self.stream.header.ts[self.level] if self.level >= 0 else Schedule().T

    def image(self, pixels: Pixels) -> Image.Image:
        header = self.stream.header
        if header.mode in ("L", "LA"):
            out = Image.fromarray(pixels[..., 0])
        else:
            out = Image.fromarray(pixels)
        if header.mode in ("LA", "RGBA"):
            alpha = alpha_from_bytes(header.alpha, header.height, header.width)
            out.putalpha(Image.fromarray(alpha))
        if header.icc:
            out.info["icc_profile"] = header.icc
        if header.exif:
            out.info["exif"] = header.exif
        exact = self.exact is not None
        out.info["ddpm"] = {
            "t": 0 if exact else self.timestep,
            "snr": float("inf") if exact else self.chain.snrs[self.level] if self.level >= 0 else 0,
            "bytes": self.used,
            "complete": exact or self.level + 1 == header.levels,
            "damage": self.damage,
        }
        return out


def decode(
    data: bytes,
    *,
    stop_at: str | int | None = None,
    recon: Recon = "mean",
    seed: int = 0,
    model: ModelLike = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Image.Image:
    """The picture of a file, or of as much of it as is there, or as ``stop_at`` asks for.

    stop_at: ``t=500``, ``bpp=0.25``, ``bytes=4000`` or ``psnr=32``. recon: ``mean`` (x0_hat),
    ``sample`` (go on with the chain, drawing from p) or ``flow`` (go on deterministically, DDIM);
    these start from the last complete level. ``.info["ddpm"]`` tells t, snr, bytes used,
    whether the chain is complete, and damage. Warns CutWarning or DamageWarning; raises FormatError
    if not even the header is whole, LimitError, ModelError.
    """
    if recon not in ("mean", "sample", "flow"):
        raise ValueError(f"unknown recon {recon!r}")
    stream = bitstream.parse(data)
    if stop_at is not None:
        shorter = data[: bitstream.stop_offset(data, stream, stop_at)]
        if len(shorter) < len(data):
            stream = bitstream.parse(shorter)
    if recon != "mean":  # these go on from a complete level
        whole = [level for level in stream.levels if level.received() == len(level.cuts)]
        stream = replace(stream, levels=whole)
    loaded = get_model(model, id=stream.header.model, device=device)
    end = _Decoder(stream, loaded, device).run(progress)
    if end.damage:
        warnings.warn(f"damaged ({end.damage})", DamageWarning, stacklevel=2)
    elif stop_at is not None and end.exact is None and not bitstream.reaches(stream, stop_at):
        text = f"the file ends before {stop_at}; used {end.used:,} bytes"
        warnings.warn(text, CutWarning, stacklevel=2)
    elif end.used < stream.size and stop_at is None:
        text = f"the file is cut; used {end.used:,} of {stream.size:,} bytes"
        warnings.warn(text, CutWarning, stacklevel=2)
    return end.image(end.picture(recon, seed))


def decode_levels(
    data: bytes | BinaryIO | Iterable[bytes],
    *,
    recon: Recon = "mean",
    seed: int = 0,
    model: ModelLike = None,
    device: str = "cpu",
) -> Iterator[Level]:
    """Yield the picture at each level, from one pass, as the bytes arrive.

    data: a file's bytes, a binary file object, or an iterable of pieces. What there is of
    an unfinished last level comes last, with ``complete`` False; of a lossless file the exact
    picture. Raises as :func:`decode`.
    """
    received = b""
    decoder: _Decoder | None = None
    exhausted = False
    pieces = _pieces(data)
    while not exhausted:
        piece = next(pieces, None)
        exhausted = piece is None
        received += piece or b""
        try:
            stream = bitstream.parse(received)
        except FormatError:
            if exhausted:
                raise
            continue  # not even the header yet
        if decoder is None:
            loaded = get_model(model, id=stream.header.model, device=device)
            decoder = _Decoder(stream, loaded, device)
        decoder.stream, decoder.damage = stream, stream.damage if exhausted else None
        whole = [level for level in stream.levels if level.received() == len(level.cuts)]
        ready = len(stream.levels) if exhausted else len(whole)
        while decoder.level + 1 < ready and decoder.step():
            yield _level(decoder, recon, seed)
    if decoder is not None:
        decoder.finish()
        if decoder.exact is not None:
            yield _level(decoder, recon, seed)
        if decoder.damage:
            warnings.warn(f"damaged ({decoder.damage})", DamageWarning, stacklevel=2)


def _pieces(data: bytes | BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    if isinstance(data, bytes | bytearray | memoryview):
        yield bytes(data)
    elif hasattr(data, "read"):
        while piece := data.read(1 << 16):
            yield piece
    else:
        yield from data


def _level(decoder: _Decoder, recon: Recon, seed: int) -> Level:
    at = decoder
    if recon != "mean" and decoder.exact is None:  # on a copy: the chain must go on
        if decoder.partial:  # back to the last complete level
            prefix = decoder.stream.levels[: decoder.level + 1]
            stream = replace(decoder.stream, levels=prefix, residual=None)
            at = _Decoder(stream, decoder.chain.model, decoder.chain.device).run()
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
