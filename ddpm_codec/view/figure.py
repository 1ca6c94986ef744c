"""The curve of PSNR against bits per pixel, as SVG or as pixels: for the page and for ``info``.

Bits are on a logarithmic axis, because a level costs some 1.4 times the bits of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from .. import files
from ..errors import FormatError

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER, GRID, INK = "#ffffff", "#dddddd", "#333333"
COLOURS = ("#0b6b8a", "#c8553d", "#5b8c3a", "#7d5ba6", "#b07d2b", "#3f4e5a")
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 40  # margins
FONT, LINE_HEIGHT = 12, 17
FINE = 4  # times as many pixels are drawn and averaged: Pillow's lines have jagged edges


@dataclass(frozen=True)
class Curve:
    """A line through points of bits per pixel and dB; a single point is a mark without one."""

    name: str
    points: Sequence[tuple[float, float]]


class Line(NamedTuple):
    points: list[tuple[float, float]]
    colour: str
    width: float
    kind: str


class Dot(NamedTuple):
    x: float
    y: float
    radius: float
    colour: str
    kind: str


class Text(NamedTuple):
    x: float
    y: float
    text: str
    anchor: str  # start, middle, end; of the line's middle
    upright: bool = False  # read from below


def curve(name: str, about: dict[str, object]) -> Curve:
    """Of a file's complete levels, from what :func:`ddpm_codec.info` says of it."""
    levels = about["levels"]
    assert isinstance(levels, list)
    return Curve(name, [(v["bpp"], v["psnr"]) for v in levels])


def printable(name: str) -> str:
    """A file's name for a page or figure: what would break these becomes U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def plot(curves: Sequence[Curve], dest: str) -> bytes:
    """A file's bytes, SVG or what else the suffix of ``dest`` says.

    Raises FormatError where there is no point at all, ImageError for a suffix that stands for no
    format of pictures.
    """
    if not any(c.points for c in curves):
        raise FormatError("no complete level to plot")
    if dest.lower().endswith(".svg"):
        return svg(curves).encode()
    return files.picture_bytes(image(curves), dest)


def svg(curves: Sequence[Curve], width: int = 720, height: int = 440) -> str:
    """The figure as an SVG element. Its classes let a page give it other colours."""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="{FONT}">',
        f'<rect class="paper" width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    for mark in _marks(curves, width, height):
        if isinstance(mark, Line):
            at = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
            out.append(
                f'<polyline class="{mark.kind}" points="{at}" fill="none" stroke="{mark.colour}" '
                f'stroke-width="{mark.width}" stroke-linejoin="round"/>'
            )
        elif isinstance(mark, Dot):
            out.append(
                f'<circle class="{mark.kind}" cx="{mark.x:.1f}" cy="{mark.y:.1f}" '
                f'r="{mark.radius}" fill="{mark.colour}"/>'
            )
        else:
            turn = f' transform="rotate(-90 {mark.x:.1f} {mark.y:.1f})"' if mark.upright else ""
            out.append(
                f'<text x="{mark.x:.1f}" y="{mark.y:.1f}" dy="0.35em" fill="{INK}" '
                f'text-anchor="{mark.anchor}"{turn}>{escape(mark.text)}</text>'
            )
    return "\n".join([*out, "</svg>\n"])


def image(curves: Sequence[Curve], width: int = 720, height: int = 440) -> Image:
    """The figure in pixels, two for each unit of the SVG."""
    from PIL import Image, ImageDraw, ImageFont

    scale = 2 * FINE
    out = Image.new("RGB", (width * scale, height * scale), PAPER)
    font, draw = ImageFont.load_default(FONT * scale), ImageDraw.Draw(out)
    for mark in _marks(curves, width, height):
        if isinstance(mark, Line):
            at = [(x * scale, y * scale) for x, y in mark.points]
            draw.line(at, mark.colour, round(mark.width * scale), joint="curve")
        elif isinstance(mark, Dot):
            (x, y), r = (mark.x * scale, mark.y * scale), mark.radius * scale
            draw.ellipse((x - r, y - r, x + r, y + r), mark.colour)
        elif mark.upright:
            size = (round(font.getlength(mark.text)), FONT * scale)
            label = Image.new("L", size)
            ImageDraw.Draw(label).text((0, size[1] / 2), mark.text, 255, font, "lm")
            label = label.rotate(90, expand=True)
            corner = mark.x * scale - label.width / 2, mark.y * scale - label.height / 2
            out.paste(INK, (round(corner[0]), round(corner[1])), label)
        else:
            anchor = {"start": "lm", "middle": "mm", "end": "rm"}[mark.anchor]
            draw.text((mark.x * scale, mark.y * scale), mark.text, INK, font, anchor)
    return out.reduce(FINE)


def _marks(curves: Sequence[Curve], width: int, height: int) -> Iterator[Line | Dot | Text]:
    """What is drawn, in its order."""
    points = [p for c in curves for p in c.points]
    xs, ys = _decades([x for x, _ in points]), _even([y for _, y in points])
    low, high = min([*xs, *(x for x, _ in points)]), max([*xs, *(x for x, _ in points)])
    low, high = low / 1.1, high * 1.1

    def place(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / low) / math.log(high / low)
        up = (y - ys[0]) / (ys[-1] - ys[0])
        inside = width - LEFT - RIGHT, height - TOP - BOTTOM
        return LEFT + right * inside[0], height - BOTTOM - up * inside[1]

    for x in xs:
        across = place(x, ys[0])[0]
        yield Line([(across, TOP), (across, height - BOTTOM)], GRID, 1, "grid")
        yield Text(across, height - BOTTOM + 12, f"{x:g}", "middle")
    for y in ys:
        down = place(low, y)[1]
        yield Line([(LEFT, down), (width - RIGHT, down)], GRID, 1, "grid")
        yield Text(LEFT - 7, down, f"{y:g}", "end")
    yield Text((LEFT + width - RIGHT) / 2, height - 10, "bits per pixel", "middle")
    yield Text(11, (TOP + height - BOTTOM) / 2, "PSNR in dB", "middle", upright=True)
    for i, c in enumerate(curves):
        colour, at = COLOURS[i % len(COLOURS)], [place(*p) for p in c.points]
        if len(at) > 1:
            yield Line(at, colour, 1.5, f"line curve{i}")
        size = 3.5 if len(at) > 1 else 5
        yield from (Dot(*p, size, colour, f"point curve{i}") for p in at)
        if len(curves) > 1:
            y = TOP + 14 + LINE_HEIGHT * i
            yield Dot(LEFT + 14, y, 3.5, colour, f"key curve{i}")
            yield Text(LEFT + 24, y, printable(c.name), "start")


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten around and among the values; where they are few, twice and five times these."""
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high / low < 20 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**k for k in powers for step in steps]
    inside = [x for x in ticks if low / 1.1 <= x <= high * 1.1]
    return inside or [max(x for x in ticks if x <= low)]


def _even(values: Sequence[float]) -> list[float]:
    """At most eight round numbers, evenly apart, from below the least value to above the most."""
    low, high = min(values), max(values)
    for step in (0.5, 1, 2, 5, 10, 20, 50):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first <= 7:
            break
    return [step * k for k in range(first, max(last, first + 1) + 1)]
