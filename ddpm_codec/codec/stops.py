"""Stop points in a file, and the description of a file; none of this needs a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..diffusion.schedule import Schedule
from ..errors import CutWarning, LimitError, warn
from .container import Stream, cut, parse
from .header import Header
from .source import File, content


def parse_stop(stop: str | int) -> tuple[str, float]:
    """Kind and value of ``t=500``, ``bpp=0.25``, ``bytes=4000`` or ``psnr=32``.

    A bare number is a timestep. Raises ValueError for anything else.
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


def byte_limit(kind: str, value: float, header: Header) -> float:
    """The whole number of bytes that ``bytes`` or ``bpp`` allows; infinite for the other kinds."""
    limits = {"bytes": value, "bpp": value * header.pixels / 8}
    limit = limits.get(kind, math.inf)
    return math.floor(limit) if math.isfinite(limit) else limit


def check_limit(limit: float, least: int, extras: Sequence[str] = ()) -> None:
    """Raise LimitError if ``limit`` is below ``least``: the bytes of the header and the extras."""
    if limit < least:
        parts = " and ".join(["the header", *extras])
        raise LimitError(
            f"{limit:,} bytes are too few: {parts} alone take{'' if extras else 's'} {least:,}"
        )


def stop_offset(stream: Stream, stop: str | int) -> int:
    """Number of bytes of the file that a decoder stopped at ``stop`` may use.

    ``t``: all levels whose timestep is at least t; with t=0, the whole file. ``psnr``: all levels
    up to the first whose stored PSNR is at least that; the whole file if there is none. The extras
    after a level, such as an alpha plane, count as part of it.
    """
    kind, value = parse_stop(stop)
    header = stream.header
    if kind in ("bytes", "bpp"):
        return max(stream.header_size, int(min(stream.size, byte_limit(kind, value, header))))
    if kind == "psnr":
        good = (level.until for level in stream.levels if level.psnr >= value)
        return min(next(good, stream.size), stream.size)
    if value == 0 or (len(stream.levels) < header.levels and value <= header.ts[-1]):
        return stream.size
    levels = zip(stream.levels, header.ts, strict=False)
    ends = [level.until for level, t in levels if t >= value]
    return min(max(ends, default=stream.header_size), stream.size)


def reaches(stream: Stream, stop: str | int) -> bool:
    """Whether the complete levels reach ``stop``. A number of bytes and t=0 are always reached."""
    kind, value = parse_stop(stop)
    whole = stream.whole_levels
    if kind == "psnr":
        return stream.lossless or any(level.psnr >= value for level in whole)
    return kind != "t" or value == 0 or len(whole) >= sum(t >= value for t in stream.header.ts)


def stopped(data: bytes, stop: str | int | None) -> tuple[bytes, str | None]:
    """The part of a file up to ``stop`` (None: its end), and the damage in it or None.

    Raises FormatError if ``data`` is not a .ddpm file.
    """
    stream = parse(data)
    if stop is None:
        return data, stream.damage
    end = stop_offset(stream, stop)
    return cut(data, end), stream.damage if end > stream.read_to else None


def truncate(
    data: File,
    *,
    bytes: int | None = None,
    bpp: float | None = None,
    stop_at: str | int | None = None,
) -> bytes:
    """Cut a file at a stop point, without decoding it.

    data: a file's bytes, its path, or a binary file. Give exactly one of ``bytes``, ``bpp`` and
    ``stop_at`` (``t=500``, ``bpp=0.25``, ``bytes=4000``, ``psnr=32``). A number of bytes is used
    up as far as possible and never exceeded. Warns CutWarning if the file ends before a timestep or
    PSNR. Raises FormatError if ``data`` is not a .ddpm file, LimitError for fewer bytes than its
    header takes, ValueError.
    """
    targets = {"bytes": bytes, "bpp": bpp}
    stops = [f"{k}={v}" for k, v in targets.items() if v is not None]
    if stop_at is not None:
        stops.append(str(stop_at))
    if len(stops) != 1:
        raise ValueError("give exactly one of bytes, bpp and stop_at")
    data = content(data)
    stream = parse(data)
    check_limit(byte_limit(*parse_stop(stops[0]), stream.header), stream.header_size)
    if not reaches(stream, stops[0]):
        warn(f"the file ends before {stops[0]}", CutWarning)
    return cut(data, stop_offset(stream, stops[0]))


def info(data: File) -> dict[str, Any]:
    """Describe a file without decoding it: header, complete levels, extras, damage.

    data: a file's bytes, its path, or a binary file. Raises FormatError.
    """
    stream = parse(data := content(data))
    h = stream.header
    levels = [
        {
            "t": t, "snr": snr, "bytes": level.end, "bpp": 8 * level.end / h.pixels,
            "psnr": level.psnr,
        }
        for level, t, snr in zip(stream.whole_levels, h.ts, h.snrs, strict=False)
    ]  # fmt: skip
    return {
        "width": h.width, "height": h.height, "mode": h.mode, "path": h.path, "tune": list(h.tune),
        "steps": h.levels,
        "effort": h.effort, "model": h.model.hex(), "seed": h.seed, "lossless": stream.lossless,
        "complete": len(levels) == h.levels, "damage": stream.damage, "bytes": len(data),
        "bpp": 8 * len(data) / h.pixels, "levels": levels,
        "extras": {kind: len(blob) for kind, blob in stream.extras.items()},
    }  # fmt: skip
