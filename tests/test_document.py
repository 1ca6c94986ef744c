"""The page as text: its data, its escapes, what goes with which file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddpm_codec import view
from ddpm_codec.codec import encoder
from ddpm_codec.view.document import TEMPLATE, render, shares
from ddpm_codec.view.entry import entry

QUICK: dict[str, Any] = {"steps": 4, "effort": 1, "tune": "even"}
EVIL = "{{data}}<!--<script>\\u003c&quot;\"'.ddpm"


class Elements(HTMLParser):
    """The start tags of a page, and the text of each element that holds nothing else."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.texts.append((tag, self.text))

    def first(self, tag: str) -> str:
        return next(text for name, text in self.texts if name == tag)


@pytest.fixture(scope="module")
def encoded(tiny_model: Path, picture: Image.Image) -> bytes:
    return encoder.encode(picture, model=tiny_model, **QUICK)


def data_of(page: str) -> Any:
    return json.loads(Elements(page).first("script"))


def test_the_page_holds_the_entries(encoded: bytes, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.ddpm").write_bytes(encoded)
    page = view.page(tmp_path / "x.ddpm", model=tiny_model)
    want = entry(tmp_path / "x.ddpm", model=tiny_model)
    (got,) = data_of(page)
    assert [v["src"] for v in got["levels"]] == [v.src for v in want.levels]
    assert [v["psnr"] for v in got["levels"]] == [v.psnr for v in want.levels]
    assert (got["name"], got["bytes"], got["damage"]) == ("x.ddpm", len(encoded), None)
    assert page.count("{{") == 0 and page == render([want])
    assert Elements(page).first("title") == "x.ddpm"


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>.ddpm", EVIL])
def test_names_are_harmless(name: str, encoded: bytes, tiny_model: Path) -> None:
    shown = entry(encoded, model=tiny_model)
    page = render([replace(shown, name=name)])
    assert Elements(page).tags == Elements(render([shown])).tags
    assert data_of(page)[0]["name"] == Elements(page).first("title") == name
    assert page.count("<") == render([shown]).count("<")


def test_infinity_is_no_json(tiny_model: Path, picture: Image.Image) -> None:
    data = encoder.encode(picture, model=tiny_model, lossless=True, steps=4, effort=1)
    last = data_of(view.page(data, original=picture, model=tiny_model))[0]["levels"][-1]
    assert (last["psnr"], last["snr"], last["exact"]) == (None, None, True)


def test_the_template_loads_nothing() -> None:
    """Nor does it rely on anything that its own policy forbids."""
    text = TEMPLATE.read_text()
    assert not re.search(r"https?:|\bsrc=|@import|url\(|fetch|XMLHttp|\beval", text)
    assert not re.search(r"<\w+[^>]* (style|on\w+)=", text)
    assert not re.findall(r'href="(?!data:,)', text)


def test_what_goes_with_which_file() -> None:
    assert shares(1, [], []) == [(None, [])]
    assert shares(1, ["o"], ["a", "b"]) == [("o", ["a", "b"])]
    assert shares(2, ["o"], ["a"]) == [("o", ["a"]), ("o", ["a"])]
    assert shares(2, ["o", "p"], ["a", "b"]) == [("o", ["a"]), ("p", ["b"])]
    for n, originals, against in ((1, ["o", "p"], []), (3, ["o", "p"], []), (3, [], ["a", "b"])):
        with pytest.raises(ValueError, match="give one"):
            shares(n, originals, against)


def test_several_files(encoded: bytes, tiny_model: Path, picture: Image.Image) -> None:
    got = data_of(view.page([encoded, encoded], original=picture, model=tiny_model))
    assert len(got) == 2 and got[0] == got[1] and got[0]["measured"]
    with pytest.raises(ValueError, match="no file"):
        view.page([])
