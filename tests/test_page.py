"""The page in a browser, by real keys and a real mouse."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from chromium import Browser
from PIL import Image

from ddpm_codec import view
from ddpm_codec.codec import encoder, stops

pytestmark = pytest.mark.skipif(not chromium.FOUND, reason="needs Chromium")
QUICK: dict[str, Any] = {"steps": 6, "effort": 1, "tune": "even"}
LAST = 5  # level of six
EVIL = "<!--<script>alert(1)<b>&amp;"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, picture: Image.Image) -> Path:
    """A folder of pages: plain.html, beside.html with pictures to compare with, several.html."""
    folder = tmp_path_factory.mktemp("pages")
    data = encoder.encode(picture, model=tiny_model, **QUICK)
    (folder / "a.ddpm").write_bytes(data)
    small = encoder.encode(picture.convert("LA"), model=tiny_model, **QUICK)
    broken = bytearray(stops.truncate(data, stop_at="t=100"))
    broken[-3] ^= 1
    picture.save(folder / "true.png")
    Image.new("RGB", picture.size, (255, 0, 0)).save(folder / "red.png")
    (folder / "grey").write_bytes(small)
    (folder / "broken").write_bytes(broken)
    made = {
        "plain": view.page(folder / "a.ddpm", model=tiny_model),
        "beside": view.page(
            folder / "a.ddpm", original=folder / "true.png", against=[folder / "red.png"],
            model=tiny_model,
        ),
    }  # fmt: skip
    evil = io.BytesIO(data)
    evil.name = EVIL  # type: ignore[attr-defined]
    with pytest.warns(match="damaged"):
        made["several"] = view.page(
            [folder / "a.ddpm", evil, folder / "grey", folder / "broken"], model=tiny_model
        )
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def nothing_wrong(browser: Browser) -> Iterator[None]:
    """Whatever a test does: no error, nothing on the console, no request but of the page."""
    yield
    told = [e for e in browser.events if e["method"] in (
        "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
    )]  # fmt: skip
    assert told == []
    asked = {e["params"]["request"]["url"].partition(":")[0] for e in browser.events
             if e["method"] == "Network.requestWillBeSent"}  # fmt: skip
    assert asked <= {"file", "data"}
    files = [e for e in browser.events if e["method"] == "Network.requestWillBeSent"
             and e["params"]["request"]["url"].startswith("file:")]  # fmt: skip
    assert len(files) == 1


def level(browser: Browser) -> int:
    return int(browser.run("document.getElementById('level').value"))


def text(browser: Browser, name: str) -> str:
    return str(browser.run(f"document.getElementById('{name}').textContent"))


def centre(browser: Browser, selector: str) -> tuple[float, float]:
    """Where an element is, in the window."""
    x, y = browser.run(
        f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
        f"(document.querySelector('{selector}').getBoundingClientRect())"
    )
    return x, y


def pixels(browser: Browser) -> np.ndarray:
    with Image.open(io.BytesIO(browser.screenshot())) as im:
        return np.asarray(im.convert("RGB")).astype(int)


def test_keys_move_the_slider(browser: Browser, pages: Path) -> None:
    """Picture, figures, the dot and what is said follow it."""
    browser.open(pages / "plain.html")
    assert level(browser) == LAST
    data = browser.run("files[0].levels")
    browser.run("document.getElementById('level').focus()")
    seen = set()
    for key, want in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1),
                      ("End", LAST)):  # fmt: skip
        browser.press(key)
        assert level(browser) == want
        about = data[want]
        assert browser.run("document.getElementById('picture').src") == about["src"]
        said = text(browser, "said")
        assert f"{about['bytes']:,} bytes" in said and f"t={about['t']}" in said
        assert f"{about['psnr']:.2f} dB" in said and f"Level {want + 1}" in said
        assert text(browser, "psnr") == f"{about['psnr']:.2f} dB"
        seen.add(browser.run("document.getElementById('dot').style.transform"))
    assert len(seen) == 4
    width = browser.run("document.getElementById('picture').naturalWidth")
    assert width == 40


def test_points_of_the_curve_can_be_clicked(browser: Browser, pages: Path) -> None:
    browser.open(pages / "plain.html")
    for i in (1, 4):
        at = centre(browser, f"#curve .point:nth-of-type({i + 1})")
        browser.mouse("mousePressed", *at)
        browser.mouse("mouseReleased", *at)
        assert level(browser) == i
    browser.mouse("mousePressed", *centre(browser, "#curve .point:nth-of-type(5)"))
    browser.mouse("mouseMoved", *centre(browser, "#curve .point:nth-of-type(1)"))
    browser.mouse("mouseReleased", *centre(browser, "#curve .point:nth-of-type(1)"))
    assert level(browser) == 0


def test_the_divider(browser: Browser, pages: Path) -> None:
    """By mouse and by keys: left of it the file, right of it what is compared, which is red."""
    browser.open(pages / "beside.html")
    red = "files[0].others[1]"
    assert browser.run("document.getElementById('rival').selectedOptions[0].text") == "red.png"
    assert f"{browser.run(f'{red}.bytes')} bytes" in text(browser, "right")
    assert f"{browser.run(f'{red}.psnr'):.2f} dB" in text(browser, "right")

    def share() -> float:
        """Of the picture's columns that are red, a quarter from the top."""
        x, y = centre(browser, "#sheet")
        w, h = browser.run("[sheet.offsetWidth, sheet.offsetHeight]")
        row = pixels(browser)[round(y - h / 4), round(x - w / 2) : round(x + w / 2)]
        return float((np.abs(row - (255, 0, 0)).max(1) < 30).mean())

    assert share() == pytest.approx(0.5, abs=0.05)
    x, y = centre(browser, "#divider")
    w = browser.run("sheet.offsetWidth")
    browser.mouse("mousePressed", x, y)
    browser.mouse("mouseMoved", x - w / 4, y)
    browser.mouse("mouseReleased", x - w / 4, y)
    assert share() == pytest.approx(0.75, abs=0.05)
    assert abs(int(browser.run("divider.ariaValueNow")) - 25) <= 1
    browser.run("divider.focus()")
    for key, want in (("End", 0), ("ArrowLeft", 0.02), ("Home", 1), ("ArrowRight", 0.98)):
        browser.press(key)
        assert share() == pytest.approx(want, abs=0.03)
    browser.run("document.getElementById('rival').focus()")
    browser.press("ArrowUp")
    assert "the original, true.png" in text(browser, "right") and share() < 0.1
    browser.press("ArrowUp")
    assert browser.run("divider.hidden && other.hidden") is True


def test_the_same_size(browser: Browser, pages: Path) -> None:
    """The page begins with the largest level that is no larger than what it is compared with."""
    browser.open(pages / "beside.html")
    size, levels = browser.run("[files[0].others[1].bytes, files[0].levels.map(v => v.bytes)]")
    want = max(i for i, n in enumerate(levels) if n <= size)
    assert level(browser) == want < LAST
    browser.run("document.getElementById('level').focus()")
    browser.press("End")
    assert level(browser) == LAST
    browser.run("equal.click()")
    assert level(browser) == want


def test_zoom(browser: Browser, pages: Path) -> None:
    browser.open(pages / "plain.html", 420, 800)
    for value, scale in (("1", 1), ("2", 2), ("4", 4)):
        at = centre(browser, f'[name=zoom][value="{value}"]')
        browser.mouse("mousePressed", *at)
        browser.mouse("mouseReleased", *at)
        assert browser.run("picture.getBoundingClientRect().width") == 40 * scale
        crisp = browser.run("getComputedStyle(picture).imageRendering")
        assert (crisp == "pixelated") == (scale > 1)
    browser.resize(130, 800)
    assert browser.run("scroller.scrollWidth > scroller.clientWidth") is True
    before = browser.run("scroller.scrollLeft")
    x, y = centre(browser, "#scroller")
    browser.mouse("mousePressed", x, y)
    browser.mouse("mouseMoved", x - 10, y)
    browser.mouse("mouseReleased", x - 10, y)
    assert browser.run("scroller.scrollLeft") == before + 10


def test_several_files(browser: Browser, pages: Path) -> None:
    """One is chosen by keys; tags in a name, alpha and damage are shown as what they are."""
    browser.open(pages / "several.html")
    assert browser.run("document.querySelectorAll('b').length") == 0
    browser.run("document.getElementById('file').focus()")
    browser.press("ArrowDown")
    assert text(browser, "name") == EVIL
    browser.press("ArrowDown")
    assert text(browser, "name") == "grey"
    assert browser.run("getComputedStyle(picture).backgroundImage") != "none"
    assert browser.run("note.hidden") is True
    browser.press("ArrowDown")
    assert "damaged" in text(browser, "note") and browser.run("note.hidden") is False
    assert browser.run("files.map(f => f.levels.length)")[3] < LAST + 1


def test_narrow_and_dark(browser: Browser, pages: Path) -> None:
    browser.open(pages / "beside.html", 390, 844)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth") is True
    light = pixels(browser)[2, 2].sum()
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser("Emulation.setEmulatedMedia", features=dark)
    assert pixels(browser)[2, 2].sum() < 150 < 650 < light
    browser("Emulation.setEmulatedMedia", features=[])


def test_everything_has_a_name(browser: Browser, pages: Path) -> None:
    """What a screen reader finds of it."""
    browser.open(pages / "beside.html")
    tree = browser("Accessibility.getFullAXTree")["nodes"]
    found: dict[str, list[str]] = {}
    for node in tree:
        if not node["ignored"]:
            name = node.get("name", {}).get("value", "")
            found.setdefault(node["role"]["value"], []).append(name)
    assert sorted(found["slider"]) == ["Divider between the two pictures", "Level"]
    assert found["combobox"] == ["Against"] and found["button"] == ["Same size"]
    assert found["radio"] == ["Fit", "1×", "2×", "4×"]
    pictures = found["image"]
    assert any(p.startswith("a.ddpm, decoded from its first") for p in pictures)
    assert any(p.startswith("PSNR against bits per pixel: from") for p in pictures)
    assert all(pictures) and found["heading"][0] == "a.ddpm"
    live = "document.querySelector('[aria-live]').textContent"
    assert "bits per pixel" in browser.run(live)
