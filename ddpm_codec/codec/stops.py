"""Where a file may be stopped, and what it holds: nothing here needs a network."""

from __future__ import annotations

import math
from typing import Any

from ..diffusion.schedule import Schedule
from ..errors import CutWarning, LimitError, warn
from .container import Stream, cut, parse
from .source import File, content


def parse_stop(stop: str | int) -> tuple[str, float]:
    """``t=500``, ``bpp=0.25``, ``bytes=4000``, ``psnr=32``; a bare number is a timestep.

    Raises ValueError.
    """
    text = str(stop)
    kind, _, value = text.partition("=") if "=" in text else ("t", "", text)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if kind not in ("t", "bpp", "bytes", "psnr") or not math.isfinite(number) or number < 0:
        raise ValueError(f"not a stop point: {text!r} (t=500, bpp=0.25, bytes=4000 or psnr=32)")
    if kind == "t" and number > Schedule.T:
        raise ValueError(f"not a stop point: {text!r} (timesteps are 0 .. {Schedule.T})")
    return kind, number


def stop_offset(stream: Stream, stop: str | int) -> int:
    """How many bytes of the file a decoder stopped at ``stop`` may use.

    ``t``: all levels whose timestep is at least t, with t=0 the whole file; ``psnr``: the first
    level whose stored PSNR reaches it, or the whole file. What follows a level before the next,
    an alpha plane say, is part of it.
    """
    kind, value = parse_stop(stop)
    h = stream.header
    if kind in ("bytes", "bpp"):
        limit = value if kind == "bytes" else value * h.width * h.height / 8
        return max(stream.header_size, math.floor(min(stream.size, limit)))
    if kind == "psnr":
        good = (v.until for v in stream.levels if v.psnr >= value)
        return min(next(good, stream.size), stream.size)
    if value == 0 or (len(stream.levels) < h.levels and value <= h.ts[-1]):
        return stream.size
    ends = [v.until for v, t in zip(stream.levels, h.ts, strict=False) if t >= value]
    return min(max(ends, default=stream.header_size), stream.size)


def reaches(stream: Stream, stop: str | int) -> bool:
    """Whether complete levels go as far as ``stop``; always of a number of bytes, and of t=0."""
    kind, value = parse_stop(stop)
    whole = stream.whole_levels
    if kind == "psnr":
        return stream.lossless or any(level.psnr >= value for level in whole)
    return kind != "t" or value == 0 or len(whole) >= sum(t >= value for t in stream.header.ts)


def stopped(data: bytes, stop: str | int | None) -> tuple[bytes, str | None]:
    """The part of a file up to ``stop``, None being its end, and the damage in it, if any.

    Raises FormatError for what is not a file of ours.
    """
    stream = parse(data)
    if stop is None:
        return data, stream.damage
    to = stop_offset(stream, stop)
    return cut(data, to), stream.damage if to > stream.read_to else None


def truncate(
    data: File,
    *,
    bytes: int | None = None,
    bpp: float | None = None,
    stop_at: str | int | None = None,
) -> bytes:
    """A file that decodes to the picture of ``data`` (see :func:`info`) stopped there.

    Exactly one of the targets; a number of bytes is used up but not exceeded. Warns CutWarning if
    the file does not go as far as a timestep or PSNR. Raises FormatError for what is not a file of
    ours, LimitError for fewer bytes than its header takes.
    """
    targets = {"bytes": bytes, "bpp": bpp}
    stops = [f"{k}={v}" for k, v in targets.items() if v is not None]
    if stop_at is not None:
        stops.append(str(stop_at))
    if len(stops) != 1:
        raise ValueError("give exactly one of bytes, bpp and stop_at")
    data = content(data)
    stream, (kind, value) = parse(data), parse_stop(stops[0])
    limit = value if kind == "bytes" else value * stream.header.width * stream.header.height / 8
    if kind in ("bytes", "bpp") and limit < stream.header_size:
        text = f"{math.floor(limit)} bytes are too few: the header alone takes {stream.header_size}"
        raise LimitError(text)
    if not reaches(stream, stops[0]):
        warn(f"the file ends before {stops[0]}", CutWarning)
    return cut(data, stop_offset(stream, stops[0]))


def info(data: File) -> dict[str, Any]:
    """What a file holds, without decoding it. data: its bytes, its path, or a binary file."""
    stream = parse(data := content(data))
    h = stream.header
    pixels = h.width * h.height
    levels = [
        {"t": t, "snr": snr, "bytes": level.end, "bpp": 8 * level.end / pixels, "psnr": level.psnr}
        for level, t, snr in zip(stream.whole_levels, h.ts, h.snrs, strict=False)
    ]
    return {
        "width": h.width, "height": h.height, "mode": h.mode, "path": h.path, "tune": list(h.tune),
        "steps": h.levels,
        "effort": h.effort, "model": h.model.hex(), "seed": h.seed, "lossless": stream.lossless,
        "complete": len(levels) == h.levels, "damage": stream.damage, "bytes": len(data),
        "bpp": 8 * len(data) / pixels, "levels": levels,
        "extras": {kind: len(blob) for kind, blob in stream.extras.items()},
    }  # fmt: skip
