"""``ddpmc view`` and ``ddpmc info --plot``: what they write, say and refuse."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddpm_codec import view
from ddpm_codec.cli.main import main
from ddpm_codec.codec import container, encoder, stops

QUICK: dict[str, Any] = {"steps": 4, "effort": 1, "tune": "even"}
Run = Callable[..., int]


@pytest.fixture(scope="module")
def encoded(tiny_model: Path, picture: Image.Image) -> bytes:
    return encoder.encode(picture, model=tiny_model, **QUICK)


@pytest.fixture
def run(
    tmp_path: Path, tiny_model: Path, picture: Image.Image, encoded: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:  # fmt: skip
    """Command lines in a folder with a.ddpm, b.ddpm, cut and broken ones, and a.png."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm_codec.network.modelfile.FOLDERS", (tiny_model.parent,))
    picture.save("a.png")
    broken = bytearray(encoded)
    broken[container.parse(encoded).levels[2].until + 3] ^= 1
    Path("sub").mkdir()
    for name, data in {
        "a": encoded, "sub/b": encoded, "cut": stops.truncate(encoded, stop_at="t=300"),
        "broken": bytes(broken), "text": b"no file",
    }.items():  # fmt: skip
        Path(f"{name}.ddpm").write_bytes(data)
    return lambda *words: main([str(word) for word in words])


def test_the_page_is_the_librarys(run: Run, capsysbinary: Any) -> None:
    want = view.page("a.ddpm", original="a.png", against=["a.png", "cut.ddpm"], stop_at="t=200")
    words = ("view", "a.ddpm", "--original", "a.png", "--against", "a.png", "--against", "cut.ddpm",
             "--stop-at", "t=200")  # fmt: skip
    assert run(*words) == 0
    assert Path("a.html").read_text(encoding="utf-8") == want
    out, err = capsysbinary.readouterr()
    assert (out, err) == (b"", b"a.html: 2 pictures\n")
    assert run(*words, "-o", "-", "-q") == 0
    assert capsysbinary.readouterr() == (want.encode(), b"")


def test_where_the_page_goes(run: Run, capsys: Any) -> None:
    assert run("view", "sub/b.ddpm") == 0 and Path("b.html").exists()
    assert run("view", "sub/b.ddpm", "-o", "new/") == 0 and Path("new/b.html").exists()
    assert run("view", "a.ddpm", "sub/b.ddpm", "-o", "both.html") == 0
    assert Path("both.html").read_text().count('"name": ') == 2
    capsys.readouterr()
    for words, text in (
        (("a.ddpm", "sub/b.ddpm"), "name it with -o PAGE.html"),
        (("a.ddpm", "sub/b.ddpm", "-o", "new/"), "name it with -o PAGE.html"),
        (("-",), "standard input needs a file"),
        (("a.ddpm", "-o", "a.ddpm"), "is an input"),
        (("a.ddpm", "--original", "a.png", "-o", "a.png"), "is an input"),
        (("a.ddpm", "--original", "a.png", "--original", "a.png"), "give one"),
        (("a.ddpm", "-o", "-", "--open"), "needs a file"),
        (("a.ddpm", "-o", "-", "--json"), "needs standard output for itself"),
    ):
        assert run("view", *words) == 2
        assert text in capsys.readouterr().err
    assert not Path("a.html").exists()


def test_nothing_is_overwritten(run: Run, capsys: Any) -> None:
    Path("a.html").write_text("mine")
    assert run("view", "a.ddpm") == 1
    assert capsys.readouterr().err == "ddpmc: a.html: exists already (--force overwrites it)\n"
    assert Path("a.html").read_text() == "mine"
    assert run("view", "a.ddpm", "--force", "-q") == 0
    assert Path("a.html").read_text() != "mine" and capsys.readouterr().err == ""


def test_standard_input(run: Run, encoded: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(encoded)))
    assert run("view", "-", "-o", "x.html") == 0
    assert f'"bytes": {len(encoded)}' in Path("x.html").read_text()


def test_damage(run: Run, capsys: Any) -> None:
    """Status 3, and the page of what is there; of a batch the highest, and the page of the rest."""
    assert run("view", "broken.ddpm") == 3
    assert "broken.ddpm: warning: damaged (checksum mismatch" in capsys.readouterr().err
    assert Path("broken.html").read_text().count('"t": ') == 3
    assert run("view", "text.ddpm", "broken.ddpm", "a.ddpm", "-o", "x.html") == 5
    err = capsys.readouterr().err
    assert "ddpmc: text.ddpm: not a .ddpm file" in err and "x.html: 7 pictures" in err
    assert run("view", "text.ddpm") == 5 and not Path("text.html").exists()
    Image.new("L", (9, 9)).save("other.png")
    assert run("view", "a.ddpm", "--against", "other.png") == 4
    assert "a.ddpm: other.png: 9x9 is not the file's size, 40x28\n" in capsys.readouterr().err
    assert not Path("a.html").exists()


def test_json(run: Run, capsys: Any) -> None:
    assert run("view", "a.ddpm", "cut.ddpm", "-o", "x.html", "--original", "a.png", "--json") == 0
    out, err = capsys.readouterr()
    whole, cut = (json.loads(line) for line in out.splitlines())
    assert (whole["input"], whole["output"], whole["status"]) == ("a.ddpm", "x.html", 0)
    assert whole["levels"][: len(cut["levels"])] == cut["levels"] and whole["measured"]
    assert whole["others"][0]["psnr"] is None and "data:" not in out and err == ""


def test_open(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[str] = []

    def show(url: str) -> bool:
        asked.append(url)
        return False

    monkeypatch.setattr("webbrowser.open", show)
    assert run("view", "a.ddpm", "--open", "-q") == 0
    assert asked == [Path("a.html").resolve().as_uri()]
    assert capsys.readouterr().err == "ddpmc: a.html: there is no browser to show it in\n"


def test_plot(run: Run, capsys: Any) -> None:
    assert run("info", "a.ddpm") == 0
    table = capsys.readouterr().out
    assert run("info", "a.ddpm", "--plot", "c.svg") == 0
    assert capsys.readouterr().out == table
    assert Path("c.svg").read_text().count("<circle") == 4
    assert run("info", "a.ddpm", "cut.ddpm", "text.ddpm", "--plot", "c.png", "--json") == 5
    with Image.open("c.png") as im:
        assert im.format == "PNG"
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_plot_refusals(run: Run, encoded: bytes, capsys: Any) -> None:
    """They come before the table, and leave everything as it was."""
    Path("there.svg").write_text("mine")
    Path("head.ddpm").write_bytes(encoded[: container.parse(encoded).header_size])
    for words, status, text in (
        (("a.ddpm", "--plot", "there.svg"), 1, "exists already"),
        (("a.ddpm", "--plot", "a.ddpm", "--force"), 2, "is an input"),
        (("a.ddpm", "--plot", "x.nonesuch"), 4, "no picture format has the suffix"),
        (("a.ddpm", "--plot", "none/x.svg"), 1, "its folder does not exist"),
    ):
        assert run("info", *words) == status
        out, err = capsys.readouterr()
        assert out == "" and text in err and err.count("\n") <= 4
    assert run("info", "head.ddpm", "--plot", "x.svg") == 5
    assert "no complete level to plot" in capsys.readouterr().err
    assert Path("there.svg").read_text() == "mine" and not Path("x.svg").exists()
    assert run("info", "a.ddpm", "--plot", "there.svg", "--force") == 0
