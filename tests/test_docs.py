"""The documents: their examples run, what they name is there, the generated page is up to date."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
import threading
from http.server import ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import click
import pytest
from PIL import Image

import ddpm_codec
from ddpm_codec.cli.main import cli, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
EVERYWHERE = {"--help", "--json"}  # named in prose

spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make.py")
assert spec and spec.loader
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small photo.png in the current folder, and in a folder of photographs."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with Image.open(ROOT / "benchmarks" / "pictures" / "coffee.png") as im:
        im.crop((250, 150, 314, 198)).save("photo.png")
    shutil.copy("photo.png", "photos")


def test_the_page_of_commands_is_up_to_date() -> None:
    assert make.PAGE.read_text() == make.page(), "make docs"


@pytest.mark.parametrize("name", ["", *cli.commands])
def test_the_page_of_commands_is_what_they_print(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*name.split(), "--help"]) == 0
    title = f"ddpmc {name}".rstrip()
    assert make.section(title, capsys.readouterr().out.rstrip("\n")) in make.PAGE.read_text()


def test_sizes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192
    lines = (ROOT / "docs" / "format.md").read_text().splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 130


@pytest.mark.usefixtures("photo")
def test_commands_of_the_readme_run() -> None:
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "ddpmc" and main(words[1:]) == 0, line


@pytest.mark.usefixtures("photo")
@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
@pytest.mark.filterwarnings("ignore::ddpm_codec.DdpmcWarning")
def test_python_examples_run(page: str) -> None:
    assert main(["encode", "photo.png", "-o", "photo.ddpm", "-q"]) == 0
    examples = blocks(page, "python")
    assert examples
    for example in examples:
        exec(compile(example, page, "exec"), {})


class Serving:
    """The server of docs/streaming.md, in a thread; a slow one waits for a word before the rest."""

    def __init__(self, handler: Any, first: int, rest: threading.Event) -> None:
        class Slow(handler):  # type: ignore[misc]
            def copyfile(self, source: Any, outputfile: Any) -> None:
                outputfile.write(source.read(first))
                if rest.wait(60):
                    outputfile.write(source.read())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
        self.url = f"http://127.0.0.1:{self.server.server_port}/photo.ddpm"

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.usefixtures("photo")
def test_streaming_over_http() -> None:
    """Levels come while the server still waits; a range is what was asked for."""
    data = ddpm_codec.encode("photo.png", steps=3)
    Path("photo.ddpm").write_bytes(data)
    ends = [level["bytes"] for level in ddpm_codec.info(data)["levels"]]
    names: dict[str, Any] = {}
    for example in blocks("docs/streaming.md", "python"):
        exec(compile(example, "docs/streaming.md", "exec"), names)
    rest = threading.Event()
    with Serving(names["Files"], ends[0], rest) as url:
        arriving = names["levels"](url)
        assert next(arriving).bytes == ends[0]
        assert [v.bytes for v in names["levels"](url, ends[1])] == ends[:2]  # no need to wait
        t = ddpm_codec.info(data)["levels"][0]["t"]
        rest.set()
        assert [v.bytes for v in arriving] == ends[1:]
        assert [v.bytes for v in names["levels"](url, stop_at=f"t={t}")] == ends[:1]
        for wanted, status, content in (
            ("bytes=10-19", 206, data[10:20]), ("bytes=10-", 206, data[10:]),
            (f"bytes=0-{9 * len(data)}", 206, data), ("lines=1", 200, data),
        ):  # fmt: skip
            with urlopen(Request(url, headers={"Range": wanted}), timeout=30) as response:
                assert (response.status, response.read()) == (status, content)
        with pytest.raises(HTTPError, match="416"):
            urlopen(Request(url, headers={"Range": f"bytes={len(data)}-"}), timeout=30)


@pytest.mark.parametrize("name", NAMES)
def test_links_and_paths_exist(name: str) -> None:
    page = ROOT / name
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"\b((?:benchmarks|tests|docs|models|ddpm_codec)/[\w./-]*\w)", text):
        if not path.endswith("TARGET"):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("command-line.md")])
def test_options_exist(name: str) -> None:
    """Of the commands and benchmarks whose whole line a page gives."""
    text = re.sub(r"\\\n\s+", "", (ROOT / name).read_text())
    code = re.findall(r"^ {4}(.*)$|`([^`]+)`", text, re.M)
    code += [(line, "") for block in blocks(name, "sh") for line in block.splitlines()]
    for line in (re.sub(r"\s#.*", "", a or b.replace("\n", " ")) for a, b in code):
        options = set(re.findall(r"(?<!\S)--[\w-]+", line)) - EVERYWHERE
        if found := re.search(r"(?:\bddpmc|-m ddpm_codec) (\w+)", line):
            command = cli.commands[found[1]]
            known = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
            assert options - {"--nproc-per-node"} <= known, line
        elif found := re.match(r"python ((?:benchmarks|tests)/\w+\.py)", line):
            source = (ROOT / found[1]).read_text()
            assert all(f'"{o}' in source for o in options), line


@pytest.mark.parametrize("name", ["kodak", "photographs"])
def test_tables_are_those_of_the_record(name: str) -> None:
    """What the documents show is what benchmarks/rate_distortion.py --results prints."""
    pytest.importorskip("bjontegaard", reason="needs the extra bench")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    curves, figures = import_module("curves"), import_module("figures")
    record, _ = curves.read_record(ROOT / "results" / f"{name}.tsv")
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert figures.table(record) in page
    if name == "kodak":
        assert figures.low_rates_table(record) in page
        assert figures.short_table(record) in (ROOT / "README.md").read_text()
