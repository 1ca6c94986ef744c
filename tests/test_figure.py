"""The curve of PSNR against bits per pixel."""

from __future__ import annotations

import io
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ddpm_codec.errors import FormatError, ImageError
from ddpm_codec.view.figure import COLOURS, Curve, curve, plot, svg

NAME = "{http://www.w3.org/2000/svg}"
ONE = Curve("one", [(0.01, 20.0), (0.1, 30.0), (1.0, 40.0)])


def circles(curves: list[Curve], which: str = "curve0") -> list[tuple[float, float]]:
    root = ElementTree.fromstring(svg(curves))
    found = [c for c in root.iter(f"{NAME}circle") if c.get("class") == f"point {which}"]
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in found]


def test_points_lie_where_the_axes_say() -> None:
    """Equal factors of bits and equal steps of dB are equally far apart, up is better."""
    (x0, y0), (x1, y1), (x2, y2) = circles([ONE])
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 - x0 > 100
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 - y1 > 50
    root = ElementTree.fromstring(svg([ONE]))
    at = {t.text: (float(t.attrib["x"]), float(t.attrib["y"])) for t in root.iter(f"{NAME}text")}
    for (x, y), (bits, db) in zip(
        circles([ONE]), (("0.01", "20"), ("0.1", "30"), ("1", "40")), strict=True
    ):
        assert (at[bits][0], at[db][1]) == pytest.approx((x, y), abs=0.2)


@pytest.mark.parametrize("points", [
    [(0.5, 30.0)], [(0.5, 30.0), (0.50001, 30.0)], [(0.3, 0.0), (0.4, 63.75)],
    [(1e-5, 3.0), (40.0, 99.0)], [(7.0, 30.1)],
])  # fmt: skip
def test_any_range_has_ticks_and_stays_inside(points: list[tuple[float, float]]) -> None:
    for x, y in circles([Curve("", points)]):
        assert 0 < x < 720 and 0 < y < 440
    words = [t.text for t in ElementTree.fromstring(svg([Curve("", points)])).iter(f"{NAME}text")]
    assert len(words) >= 5 and "bits per pixel" in words and "PSNR in dB" in words


def test_several_curves_have_names_and_colours() -> None:
    names = ["<b>&", "line\nbreak", "\udcff", *"cdefgh"]
    text = svg([Curve(name, ONE.points) for name in names])
    words = [t.text for t in ElementTree.fromstring(text).iter(f"{NAME}text")]
    assert {"<b>&", "line\ufffdbreak", "\ufffd", "h"} <= set(words)
    assert all(colour in text for colour in COLOURS)
    assert ">one<" not in svg([ONE])  # a curve alone needs no key


def test_of_a_files_levels() -> None:
    levels = [{"bpp": 0.5, "psnr": 30.0, "t": 9}, {"bpp": 1.0, "psnr": 33.0, "t": 8}]
    assert curve("a", {"levels": levels}) == Curve("a", [(0.5, 30.0), (1.0, 33.0)])


@pytest.mark.parametrize("dest", ["a.png", "a.jpg", "a.SVG"])
def test_formats(dest: str) -> None:
    made = plot([ONE, Curve("line\nbreak", [(0.2, 25.0)])], dest)
    if dest == "a.SVG":
        assert ElementTree.fromstring(made).tag == f"{NAME}svg"
        return
    with Image.open(io.BytesIO(made)) as im:
        assert im.size == (1440, 880)
        pixels = np.asarray(im.convert("RGB")).astype(int)
    (x, y), *_ = circles([ONE, Curve("b", [(0.2, 25.0)])])
    blue = [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert math.dist(pixels[round(2 * y), round(2 * x)], blue) < 20
    assert (pixels[:, :90] < 120).any(), "no words left of the axis"


def test_refusals() -> None:
    with pytest.raises(FormatError, match="no complete level"):
        plot([Curve("a", [])], "a.svg")
    with pytest.raises(ImageError, match="no picture format"):
        plot([ONE], "a.nonesuch")
