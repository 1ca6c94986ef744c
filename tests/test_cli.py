"""The command line: what it writes, what it says, and with which status it ends."""

from __future__ import annotations

import io
import json
import shlex
import struct
import tracemalloc
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_decoder import rebuilt

from ddpm_codec.cli import main as cli
from ddpm_codec.cli.decode import level_names
from ddpm_codec.cli.report import json_line
from ddpm_codec.codec import container, decoder, encoder, stops
from ddpm_codec.codec.container import parse
from ddpm_codec.codec.header import VERSION, Header, write_header
from ddpm_codec.codec.limits import MEMORY_VARIABLE
from ddpm_codec.codec.tune import TUNES
from ddpm_codec.errors import CutWarning, DamageWarning
from ddpm_codec.training.config import TrainConfig

QUICK: dict[str, Any] = {"steps": 6, "effort": 1, "tune": "even"}


@pytest.fixture(scope="module")
def encoded(tiny_model: Path, picture: Image.Image) -> bytes:
    return encoder.encode(picture, model=tiny_model, **QUICK)


class Shell:
    """Runs command lines in a folder with a picture, a file and a model; QUICK by default."""

    def __init__(self, folder: Path, capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.capture, self.monkeypatch = folder, capture, monkeypatch
        self.out, self.err = b"", ""

    def __call__(self, *arguments: object, stdin: bytes = b"") -> int:
        self.monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self.capture.readouterr()
        status = cli.main([str(a) for a in arguments])
        out, err = self.capture.readouterr()
        self.out, self.err = out, err.decode()
        return status

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))


@pytest.fixture
def shell(
    tmp_path: Path,
    tiny_model: Path,
    picture: Image.Image,
    encoded: bytes,
    capsysbinary: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Shell:
    monkeypatch.chdir(tmp_path)
    picture.save("a.png")
    Path("a.ddpm").write_bytes(encoded)
    monkeypatch.setattr("ddpm_codec.network.modelfile.FOLDERS", (tiny_model.parent,))
    monkeypatch.setattr("ddpm_codec.network.modelfile.DEFAULT", "tiny")
    monkeypatch.setattr("ddpm_codec.codec.planning.STEPS", QUICK["steps"])
    monkeypatch.setattr("ddpm_codec.codec.encoder.EFFORT_OF_SMALL", QUICK["effort"])
    monkeypatch.setattr("ddpm_codec.codec.tune.default", lambda *_: TUNES[QUICK["tune"]])
    return Shell(tmp_path, capsysbinary, monkeypatch)


# --- Encoding and decoding ---------------------------------------------------------------------


def test_encode_is_the_librarys(shell: Shell, encoded: bytes) -> None:
    assert shell("encode", "a.png", "-o", "b.ddpm") == 0
    assert Path("b.ddpm").read_bytes() == encoded
    assert shell.out == b""
    assert shell.err.startswith("b.ddpm: 40x28 RGB, ") and shell.err.count("\n") == 1


def test_decode_is_the_librarys(shell: Shell, encoded: bytes) -> None:
    assert shell("decode", "a.ddpm", "-o", "b.png") == 0
    assert Image.open("b.png").tobytes() == decoder.decode(encoded).tobytes()
    assert shell.err.startswith("b.png: 40x28 at t=") and shell.err.count("\n") == 1


def test_lossless(shell: Shell, picture: Image.Image) -> None:
    assert shell("encode", "a.png", "-o", "b.ddpm", "--lossless", "--threads", 1) == 0
    assert shell.err.rstrip().endswith(", lossless")
    assert shell("decode", "b.ddpm", "-o", "b.png", "--json") == 0
    assert Image.open("b.png").tobytes() == picture.tobytes()
    assert b"Infinity" not in shell.out and json.loads(shell.out)["snr"] is None


def test_decode_writes_what_the_suffix_says(shell: Shell) -> None:
    assert shell("decode", "a.ddpm", "-o", "b.JPG") == 0
    assert Image.open("b.JPG").format == "JPEG"
    assert shell("decode", "a.ddpm", "-o", "b.xyz") == 4
    assert shell.err == (
        "ddpmc: a.ddpm: no picture format has the suffix '.xyz'; try .png or .tif\n"
    )


def test_standard_streams(shell: Shell, encoded: bytes) -> None:
    png = Path("a.png").read_bytes()
    assert shell("encode", "-", "-o", "-", "-q", stdin=png) == 0
    assert shell.out == encoded and shell.err == ""
    assert shell("truncate", "-", "--bytes", 200, "-o", "-", stdin=encoded) == 0
    assert shell.out == stops.truncate(encoded, bytes=200) and len(shell.out) == 200
    assert shell("decode", "-", "-o", "-", stdin=encoded) == 0
    assert Image.open(io.BytesIO(shell.out)).format == "PNG"
    assert shell("info", "-", stdin=encoded) == 0
    assert shell("decode", "-", "-o", "x.png", stdin=b"") == 5
    assert shell.err == "ddpmc: stdin: an empty file\n"


@pytest.mark.parametrize("target", [("--bytes", 400), ("--bpp", 3), ("--stop-at", "t=100")])
def test_targets(shell: Shell, encoded: bytes, target: tuple[str, object]) -> None:
    assert shell("encode", "a.png", "-o", "b.ddpm", *target) == 0
    assert shell("truncate", "a.ddpm", *target, "-o", "c.ddpm") == 0
    cut = Path("c.ddpm").read_bytes()
    assert 0 < len(cut) < len(encoded)
    assert Path("b.ddpm").read_bytes() == cut
    if target[0] != "--stop-at":
        assert len(cut) == {"--bytes": 400, "--bpp": 3 * 40 * 28 // 8}[target[0]]
    assert shell("decode", "c.ddpm", "-o", "c.png", "-q") == 0
    stop = f"{target[0][2:]}={target[1]}" if target[0] != "--stop-at" else target[1]
    assert shell("decode", "a.ddpm", "--stop-at", stop, "-o", "d.png") == 0
    assert Image.open("c.png").tobytes() == Image.open("d.png").tobytes()


def test_psnr_target_stops_early(shell: Shell, encoded: bytes, picture: Image.Image) -> None:
    level = stops.info(encoded)["levels"][3]
    assert shell("encode", "a.png", "-o", "b.ddpm", "--psnr", level["psnr"] - 1) == 0
    assert shell("decode", "b.ddpm", "-o", "b.png") == 0
    got, want = np.asarray(Image.open("b.png")), np.asarray(picture)
    assert encoder.psnr(got, want) >= level["psnr"] - 1
    assert Path("b.ddpm").stat().st_size < level["bytes"]


def test_targets_that_cannot_be_met(shell: Shell, encoded: bytes) -> None:
    least = parse(encoded).header_size
    for target in (("--bytes", least - 1), ("--stop-at", "bytes=1"), ("--bpp", 0.01)):
        assert shell("truncate", "a.ddpm", "-o", "b.ddpm", *target) == 6
        assert shell.err.endswith(f" bytes are too few: the header alone takes {least}\n")
        assert shell.err.count("\n") == 1 and not Path("b.ddpm").exists()
    assert shell("truncate", "a.ddpm", "-o", "b.ddpm", "--stop-at", "psnr=90") == 0
    assert "ddpmc: a.ddpm: note: the file ends before psnr=90\n" in shell.err
    assert shell("encode", "a.png", "-o", "c.ddpm", "--psnr", 90) == 0
    assert "ddpmc: a.png: warning: 90 dB is out of reach: all levels give " in shell.err
    assert Path("b.ddpm").read_bytes() == Path("c.ddpm").read_bytes() == encoded


def test_steps_and_effort(shell: Shell, picture: Image.Image) -> None:
    assert shell("encode", "a.png", "-o", "b.ddpm", "--steps", 3, "--effort", 2, "--seed", 5) == 0
    about = stops.info(Path("b.ddpm").read_bytes())
    assert (about["steps"], len(about["levels"]), about["effort"], about["seed"]) == (3, 3, 2, 5)
    assert Path("b.ddpm").read_bytes() == encoder.encode(picture, steps=3, effort=2, seed=5)
    assert shell("info", "b.ddpm") == 0
    assert b", spectral, 3 steps, effort 2, seed 5\n" in shell.out
    assert shell("encode", "a.png", "-o", "c.ddpm", "--steps", 1, "--path", "isotropic") == 0
    assert stops.info(Path("c.ddpm").read_bytes())["path"] == "isotropic"


@pytest.mark.parametrize(
    ("more", "kept"),
    [([], ["icc"]), (["--metadata", "icc"], ["icc"]), (["--metadata", "none"], []),
     (["--metadata", "all"], ["exif", "icc"])],
)  # fmt: skip
def test_metadata(shell: Shell, picture: Image.Image, more: list[str], kept: list[str]) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    picture.save("m.png", icc_profile=b"colours", exif=exif)
    assert shell("encode", "m.png", "-o", "b.ddpm", "--stop-at", "t=600", *more) == 0
    assert sorted(stops.info(Path("b.ddpm").read_bytes())["extras"]) == kept
    assert shell("decode", "b.ddpm", "-o", "b.png") == 0
    with Image.open("b.png") as im:
        assert im.info.get("icc_profile") == (b"colours" if "icc" in kept else None)
        assert im.getexif().get(0x010E) == ("a picture" if "exif" in kept else None)


@pytest.mark.parametrize("recon", ["mean", "sample"])
def test_reconstructions(shell: Shell, recon: str) -> None:
    how = ("--recon", recon, "--seed", 1, "--stop-at", "t=300", "--force", "-o", "b.png")
    assert shell("decode", "a.ddpm", *how) == 0
    first = Image.open("b.png").tobytes()
    assert shell("decode", "a.ddpm", *how) == 0
    assert Image.open("b.png").tobytes() == first


def test_decode_all(shell: Shell, encoded: bytes) -> None:
    assert shell("decode", "a.ddpm", "--all", "levels", "--json") == 0
    about = json.loads(shell.out)
    ts = [level["t"] for level in stops.info(encoded)["levels"]]
    assert [level["t"] for level in about["levels"]] == ts
    assert sorted(p.name for p in Path("levels").iterdir()) == sorted(f"a-t{t:04d}.png" for t in ts)
    last = Image.open(f"levels/a-t{ts[-1]:04d}.png")
    assert last.tobytes() == decoder.decode(encoded).tobytes()
    assert shell("decode", "a.ddpm", "--all", "levels") == 1
    assert "exists already" in shell.err
    assert shell("decode", "a.ddpm", "--all", "other", "--format", "jpg", "-q") == 0
    assert sorted(p.name for p in Path("other").iterdir()) == sorted(f"a-t{t:04d}.jpg" for t in ts)


def test_decode_all_of_a_cut_file(shell: Shell, encoded: bytes) -> None:
    """A part of a level has a picture and a name of its own."""
    third, fourth = parse(encoded).levels[2:4]
    Path("cut.ddpm").write_bytes(stops.truncate(encoded, bytes=fourth.start + fourth.nbytes // 2))
    assert shell("decode", "cut.ddpm", "--all", "levels", "--json") == 0
    levels = json.loads(shell.out)["levels"]
    t = stops.info(encoded)["levels"][2]["t"]
    assert [level["complete"] for level in levels] == [True, True, True, False]
    assert levels[2]["output"] == f"levels/cut-t{t:04d}.png" and levels[2]["bytes"] == third.end
    assert levels[3]["output"] == f"levels/cut-t{t:04d}-part.png" and levels[3]["psnr"] is None
    pictures = [Image.open(level["output"]).tobytes() for level in levels]
    assert len(set(pictures)) == 4
    assert pictures[3] == decoder.decode(Path("cut.ddpm").read_bytes()).tobytes()
    # Whatever is in the way is found before any level is written.
    Path(levels[0]["output"]).unlink()
    before = shell.files()
    assert shell("decode", "cut.ddpm", "--all", "levels") == 1
    assert shell.err.startswith(f"ddpmc: {levels[1]['output']}: exists already")
    assert shell.files() == before


def test_decode_all_of_a_file_whose_damage_only_decoding_shows(
    shell: Shell, encoded: bytes
) -> None:
    Path("bad.ddpm").write_bytes(rebuilt(encoded, 3, bytes(90)).file())
    assert shell("info", "bad.ddpm") == 0
    assert shell("decode", "bad.ddpm", "-o", "b.png", "-q") == 3
    assert shell("decode", "bad.ddpm", "--all", "levels", "-q") == 3
    assert shell.err.startswith("ddpmc: bad.ddpm: warning: damaged") and shell.err.count("\n") == 1


def test_levels_beyond_the_schedule_have_names_of_their_own(tmp_path: Path) -> None:
    header = Header(8, 8, "L", "spectral", bytes(6), 0, 5, 40960, (6, 3, 0))
    writer = container.Writer(header)
    for _ in header.rungs:
        writer.level(30.0, b"payload")
    names = level_names(parse(writer.file()), str(tmp_path / "a.png"))
    assert header.ts == [2, 1, 1]
    assert [Path(n).name for n in names] == ["a-t0002.png", "a-t0001.png", "a-t0001+.png"]


# --- Many files, JSON, quiet -------------------------------------------------------------------


def test_many_files_into_a_folder(shell: Shell, picture: Image.Image) -> None:
    picture.convert("L").save("b.png")
    assert shell("encode", "a.png", "b.png", "-o", "out/") == 0
    assert shell("decode", "out/a.ddpm", "out/b.ddpm", "-o", "out") == 0
    assert [f for f in shell.files() if f.startswith("out/")] == [
        f"out/{name}.{suffix}" for name in "ab" for suffix in ("ddpm", "png")
    ]
    assert Image.open("out/b.png").mode == "L"


def test_a_batch_goes_on_and_ends_with_the_worst_status(shell: Shell) -> None:
    Path("empty.png").touch()
    assert shell("encode", "none.png", "empty.png", "a.png", "-o", "out/", "-q") == 4
    assert shell.err.splitlines() == [
        "ddpmc: none.png: No such file or directory",
        "ddpmc: empty.png: not a picture that Pillow can read",
    ]
    assert Path("out/a.ddpm").exists()


# A texture of a kind that Pillow knows and does not read.
UNKNOWN = struct.pack("<4s7I44x8I20x", b"DDS ", 124, 0x1007, 8, 8, 0, 0, 0, 32, 8, *6 * [0])


@pytest.mark.parametrize("error", [TypeError("None + 1"), RuntimeError(""), NotImplementedError])
def test_a_batch_goes_on_after_a_strange_picture(shell: Shell, error: Any) -> None:
    Path("b.dds").write_bytes(UNKNOWN)
    assert shell("encode", "b.dds", "a.png", "-o", "out/", "-q") == 4
    assert shell.err == "ddpmc: b.dds: not a picture that Pillow can read\n"
    assert Path("out/a.ddpm").exists()

    def strange(*_: object, **__: object) -> Image.Image:
        raise error

    shell.monkeypatch.setattr(Image, "open", strange)
    assert shell("encode", "a.png", "-o", "b.ddpm") == 4
    assert shell.err.startswith("ddpmc: a.png: ") and shell.err.count("\n") == 1
    assert "picture" in shell.err and not Path("b.ddpm").exists()


def test_json_is_one_object_per_file(shell: Shell, encoded: bytes) -> None:
    Path("b.ddpm").write_bytes(b"GIF89a")
    assert shell("info", "a.ddpm", "b.ddpm", "--json") == 5
    good, bad = map(json.loads, shell.out.splitlines())
    assert good == {"input": "a.ddpm", "status": 0} | stops.info(encoded)
    assert bad == {"input": "b.ddpm", "status": 5, "error": "not a .ddpm file"}
    assert shell("encode", "a.png", "-o", "c.ddpm", "--json") == 0
    assert json.loads(shell.out)["output"] == "c.ddpm" and shell.err == ""
    assert shell("decode", "a.ddpm", "-o", "c.png", "--json") == 0
    assert json.loads(shell.out)["complete"] is True


def test_json_has_no_infinities() -> None:
    about = {"a": [np.float32("inf"), {"b": float("nan")}], "c": (np.int64(3), True, None, "x")}
    assert json.loads(json_line(about)) == {"a": [None, {"b": None}], "c": [3, True, None, "x"]}


def test_info_is_a_table(shell: Shell, encoded: bytes) -> None:
    assert shell("info", "a.ddpm") == 0
    lines = shell.out.decode().splitlines()
    about = stops.info(encoded)
    assert lines[0].startswith(f"a.ddpm: 40x28 RGB, {len(encoded):,} bytes")
    assert "6 steps, effort 1, seed 0" in lines[1]
    assert [int(line.split()[0]) for line in lines[3:]] == [v["t"] for v in about["levels"]]


def test_quiet(shell: Shell) -> None:
    assert shell("encode", "a.png", "-o", "b.ddpm", "--quiet") == 0
    assert shell.err == "" and shell.out == b""


def test_a_progress_bar_only_on_a_terminal(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell("encode", "a.png", "-o", "b.ddpm") == 0
    assert "%" not in shell.err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert shell("encode", "a.png", "-o", "c.ddpm") == 0
    assert "100%" in shell.err
    assert shell("decode", "c.ddpm", "-o", "c.png") == 0
    assert "100%" in shell.err
    for k, target in enumerate(("--stop-at t=500", "--bytes 200", "--psnr 12", "--bpp 3")):
        assert shell("encode", "a.png", "-o", f"d{k}.ddpm", *target.split()) == 0
        assert "100%" in shell.err
        assert shell("decode", f"d{k}.ddpm", "-o", f"d{k}.png") == 0
        assert "100%" in shell.err


# --- Usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("encode a.png", "Missing option"),
        ("encode a.png -o b --bpp 1 --psnr 30", "--bpp and --psnr exclude each other"),
        ("encode a.png -o b --bytes 9 --lossless", "--bytes and --lossless exclude each other"),
        ("encode a.png -o b --rec nested", "No such option"),
        ("encode a.png -o b --bpp 0", "--bpp"),
        ("encode a.png -o b --bpp nan", "not a finite number"),
        ("encode a.png -o b --bpp inf", "not a finite number"),
        ("encode a.png -o b --psnr inf", "not a finite number"),
        ("encode a.png -o b --bytes 0", "--bytes"),
        ("encode a.png -o b --stop-at soon", "not a stop point"),
        ("encode a.png -o b --stop-at bpp=1", "not a timestep: 'bpp=1'"),
        ("encode a.png -o b --stop-at t=1001", "timesteps are 0 .. 1000"),
        ("encode a.png -o b --path zigzag", "--path"),
        ("encode a.png -o b --steps 0", "--steps"),
        ("encode a.png -o b --steps 34", "steps must be in 1 .. 33"),
        ("encode a.png -o b --steps 2.5", "--steps"),
        ("encode a.png -o b --effort 0", "--effort"),
        ("encode a.png -o b --effort 10", "--effort"),
        ("encode a.png -o b --metadata some", "--metadata"),
        ("encode a.png -o b --seed -1", "--seed"),
        ("encode a.png -o b --threads 0", "--threads"),
        ("encode a.png -o b --threads 100000", "1<=x<=1024"),
        ("encode a.png -o b --device abacus", "'--device': device abacus: Expected one of cpu"),
        ("encode a.png -o b --device meta", "'--device': device meta: "),
        ("encode a.png -o b --device cuda:99", "'--device': device cuda:99: "),
        ("encode a.png -o b --device hpu", "'--device': device hpu: "),
        ("encode a.png -o ''", "'--output': the name is empty"),
        ("encode '' -o b", "the name is empty"),
        ("encode a.png -o b --model ''", "'--model': the name is empty"),
        ("encode a.png -o a.png --force", "a.png is an input"),
        ("truncate a.ddpm a.png --bytes 200 -o . --force", "a.ddpm is an input"),
        ("encode a.png a.png -o b", "several inputs need a folder"),
        ("encode a.png sub/a.png -o out/", "would both become"),
        ("encode - a.png -o out/", "standard input needs"),
        ("encode a.png -o - --json", "--json needs standard output"),
        ("decode a.ddpm", "one of -o IMG and --all DIR"),
        ("decode a.ddpm -o b.png --all c", "one of -o IMG and --all DIR"),
        ("decode a.ddpm -o ''", "'--output': the name is empty"),
        ("decode a.ddpm --all ''", "'--all': the name is empty"),
        ("decode a.ddpm -o b.png --format xyz", "no picture format has the suffix '.xyz'"),
        ("decode a.ddpm -o b.png --stop-at x=1", "not a stop point"),
        ("decode a.ddpm -o b.png --recon flow", "--recon"),
        ("truncate a.ddpm -o b", "one of --bytes, --bpp and --stop-at"),
        ("truncate a.ddpm -o b --bytes 9 --bpp 1", "exclude each other"),
        ("train --data . --out x --channels a,b", "--channels"),
        ("train --data . --out x --channels 32,0", "1<=x<=2048"),
        ("train --data none --out x", "--data"),
        ("train --data '' --out x", "'--data': the name is empty"),
        ("train --data . --out x --parts ''", "'--parts': the name is empty"),
        ("train --data . --out ''", "'--out': the name is empty"),
        ("train --data . --out x --size 65", "65 is not a multiple of 16"),
        ("train --data . --out x --decay 2", "0<=x<=1"),
        ("train --data . --out x --lr nan", "not a finite number"),
        ("train --data . --out x --clip 0", "x>0"),
        ("train --data . --out x --ema 2", "0<=x<=1"),
        ("train --data . --out x --dropout 1", "0<=x<1"),
        ("train --data . --out x --log-snr nan 1 2", "not a finite number"),
        ("train --data . --out x --patch 3", "'3' is not one of"),
        ("train --data . --out x --patch 4", "the network of --preset photo has no --patch"),
        ("calibrate --data . --checkpoint a.ddpm -o a.ddpm --force", "a.ddpm is an input"),
        ("calibrate --data . --checkpoint a.ddpm -o x --rungs 201", "1<=x<=200"),
        ("sample -o x.png --steps 1001", "1<=x<=1000"),
        ("interpolate a.png b.png -o x.png --lam 0,nan", "not a finite number"),
        ("likelihood a.png --terms a.png --force", "a.png is an input"),
        ("nothing", "No such command"),
    ],
)
def test_usage(shell: Shell, arguments: str, message: str) -> None:
    before = shell.files()
    assert shell(*shlex.split(arguments)) == 2
    assert message in shell.err and "Traceback" not in shell.err
    assert shell.err.count("Error: ") == 1 and shell.err.splitlines()[-1].startswith("Error: ")
    assert shell.files() == before


@pytest.mark.parametrize("command", ["", *cli.cli.commands])
def test_help(shell: Shell, command: str) -> None:
    assert shell(*command.split(), "--help") == 0
    assert shell.out.startswith(b"Usage: ddpmc")


# --- Overwriting, atomicity, interruption ------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    ["encode a.png -o old", "decode a.ddpm -o old", "truncate a.ddpm --bytes 200 -o old"],
)
def test_overwriting_is_refused(shell: Shell, arguments: str) -> None:
    Path("old").write_text("precious")
    assert shell(*arguments.split()) == 1
    assert shell.err == "ddpmc: old: exists already (--force overwrites it)\n"
    assert Path("old").read_text() == "precious"


def test_force_overwrites(shell: Shell, encoded: bytes) -> None:
    Path("old.ddpm").write_text("precious")
    assert shell("encode", "a.png", "-o", "old.ddpm", "--force") == 0
    assert Path("old.ddpm").read_bytes() == encoded


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, 130), (OSError("disk full"), 1), (MemoryError, 6)]
)
def test_nothing_half_written_is_left(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Any, status: int
) -> None:
    def write(self: Path, data: bytes) -> None:
        with open(self, "wb") as f:
            f.write(data[: len(data) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", write)
    Path("old.png").write_text("precious")
    before = shell.files()
    assert shell("decode", "a.ddpm", "-o", "new.png") == status
    assert shell("decode", "a.ddpm", "-o", "old.png", "--force") == status
    assert shell.files() == before
    assert Path("old.png").read_text() == "precious"


def test_an_interruption_ends_a_batch(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder, "encode", interrupted)
    assert shell("encode", "a.png", "-o", "out/") == 130
    assert list(Path("out").iterdir()) == []


def test_no_such_folder(shell: Shell) -> None:
    assert shell("truncate", "a.ddpm", "--bytes", 200, "-o", "none/b.ddpm") == 1
    assert shell.err == "ddpmc: none/b.ddpm: its folder does not exist\n"


@pytest.mark.parametrize(
    ("arguments", "status", "err"),
    [
        ("encode a.png -o none/b.ddpm", 1, "none/b.ddpm: its folder does not exist"),
        ("decode a.ddpm -o none/b.png", 1, "none/b.png: its folder does not exist"),
        ("decode alpha.ddpm -o b.jpg", 4, "alpha.ddpm: JPEG does not hold this picture"),
        ("decode alpha.ddpm --all b --format eps", 4, "alpha.ddpm: EPS does not hold this picture"),
        ("sample -o none/b.png", 1, "none/b.png: its folder does not exist"),
        ("sample -o b.xyz", 4, "no picture format has the suffix '.xyz'"),
        ("interpolate a.png a.png -o a.ddpm/b.png", 1, "a.ddpm/b.png: its folder does not exist"),
        ("likelihood a.png --terms none/b", 1, "none/b: its folder does not exist"),
        ("train --data . --out none/b", 1, "none/b: its folder does not exist"),
        (
            "calibrate --data . --checkpoint a.ddpm -o none/b",
            1,
            "none/b: its folder does not exist",
        ),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(
    shell: Shell, arguments: str, status: int, err: str
) -> None:
    header = Header(9, 9, "RGBA", "spectral", bytes(6), 0, 5, 2560, (0,))
    Path("alpha.ddpm").write_bytes(write_header(header))
    shell.monkeypatch.setattr("ddpm_codec.codec.chain.Chain.estimate", None)
    shell.monkeypatch.setattr("ddpm_codec.network.unet.UNet.forward", None)
    assert shell(*arguments.split()) == status
    assert shell.err.startswith(f"ddpmc: {err}") and shell.err.count("\n") == 1


# --- Bad input ---------------------------------------------------------------------------------


def newer(data: bytes) -> bytes:
    return data[:6] + bytes([VERSION + 1]) + data[7:]


@pytest.mark.parametrize("command", ["decode", "info", "truncate"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: b"", "an empty file"),
        (lambda d: b"\x89PNG" + d, "not a .ddpm file"),
        (lambda d: d[:12], "the file ends inside its header"),
        (newer, "format version 3; this program reads version 2"),
        (lambda d: d[:6] + b"\1", "made by ddpmc 0.1, whose format is no longer read"),
        (lambda d: d[:9] + bytes([d[9] ^ 4]) + d[10:], "damaged header (checksum mismatch)"),
    ],
)
def test_no_file_of_ours(
    shell: Shell, encoded: bytes, command: str, damage: Any, message: str
) -> None:
    Path("bad.ddpm").write_bytes(damage(encoded))
    options: dict[str, list[object]]
    options = {"decode": ["-o", "x.png"], "truncate": ["--bpp", 1, "-o", "x"], "info": []}
    more = options[command]
    assert shell(command, "bad.ddpm", *more) == 5
    assert shell.err == f"ddpmc: bad.ddpm: {message}\n"
    assert not Path("x.png").exists() and not Path("x").exists()


def test_a_cut_file_decodes_with_a_note(shell: Shell, encoded: bytes) -> None:
    Path("cut.ddpm").write_bytes(encoded[: len(encoded) // 2])
    assert shell("decode", "cut.ddpm", "-o", "x.png") == 0
    notes = [line for line in shell.err.splitlines() if line.startswith("ddpmc: cut.ddpm: note: ")]
    assert len(notes) == 1
    assert shell("decode", "cut.ddpm", "-o", "y.png", "-q") == 0
    assert shell.err == "" and Image.open("y.png").tobytes() == Image.open("x.png").tobytes()


def test_a_damaged_file_decodes_up_to_the_damage(shell: Shell, encoded: bytes) -> None:
    start = parse(encoded).levels[4].start
    bad = bytearray(encoded)
    bad[start + 5] ^= 1
    Path("bad.ddpm").write_bytes(bad)
    assert shell("decode", "bad.ddpm", "-o", "x.png", "-q") == 3
    assert shell.err.startswith("ddpmc: bad.ddpm: ") and shell.err.count("\n") == 1
    t = stops.info(encoded)["levels"][3]["t"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutWarning)
        sound = decoder.decode(encoded, stop_at=f"t={t}")
    assert Image.open("x.png").tobytes() == sound.tobytes()
    with pytest.warns(DamageWarning):
        assert decoder.decode(bytes(bad)).info["ddpm"]["damage"]
    assert shell("info", "bad.ddpm") == 3
    assert shell("decode", "bad.ddpm", "--all", "levels", "-q") == 3
    # A cut inside what is damaged shows none of it.
    assert shell("decode", "bad.ddpm", "-o", "y.png", "--stop-at", f"bytes={start + 20}") == 3
    assert Image.open("y.png").tobytes() == sound.tobytes()
    assert shell("truncate", "bad.ddpm", "-o", "c.ddpm", "--bytes", start + 20) == 0
    assert shell("decode", "c.ddpm", "-o", "z.png", "-q") == 0
    assert Image.open("z.png").tobytes() == sound.tobytes()
    assert shell("truncate", "bad.ddpm", "-o", "d.ddpm", "--bytes", len(bad) - 1) == 3


def test_unknown_models(shell: Shell, tmp_path: Path) -> None:
    assert shell("encode", "a.png", "-o", "b.ddpm", "--model", "nonesuch") == 7
    assert "nonesuch" in shell.err and shell.err.count("\n") == 1
    assert shell("decode", "a.ddpm", "-o", "b.png", "--model", "a.png") == 7
    shell.monkeypatch.setattr("ddpm_codec.network.modelfile.FOLDERS", ())
    assert shell("decode", "a.ddpm", "-o", "b.png") == 7
    assert "not installed" in shell.err and shell.err.count("\n") == 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 1), (9, 8)])
def test_every_kind_of_picture(shell: Shell, mode: str, size: tuple[int, int]) -> None:
    n = len(Image.new(mode, size).tobytes())
    im = Image.frombytes(mode, size, np.random.default_rng(0).bytes(n))
    name = "b.tif" if mode == "CMYK" else "b.png"
    im.save(name)
    assert shell("encode", name, "-o", "b.ddpm", "--stop-at", "t=500") == 0
    assert ("warning: " in shell.err) == (mode in ("CMYK", "I;16"))
    assert shell("decode", "b.ddpm", "-o", "c.png") == 0
    out = Image.open("c.png")
    assert out.size == size
    assert out.mode == {"P": "RGB", "1": "L", "CMYK": "RGB", "I;16": "L"}.get(mode, mode)
    if "A" in mode:
        assert out.getchannel("A").tobytes() == im.getchannel("A").tobytes()


def test_animations_are_refused(shell: Shell) -> None:
    frames = [Image.new("L", (8, 8), v) for v in (0, 99)]
    frames[0].save("b.gif", save_all=True, append_images=frames[1:])
    assert shell("encode", "b.gif", "-o", "b.ddpm") == 4
    assert shell.err == "ddpmc: b.gif: animated or of several pages (2 frames)\n"


def test_absurd_sizes_are_refused(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY_VARIABLE, "3e8")
    assert shell("encode", "a.png", "-o", "b.ddpm") == 6
    assert shell.err == (
        "ddpmc: a.png: 40x28 pixels take about 0.6 GB, more than the limit of 0.3 GB "
        "(DDPMC_MAX_MEMORY)\n"
    )
    monkeypatch.setenv(MEMORY_VARIABLE, "much")
    assert shell("decode", "a.ddpm", "-o", "b.png") == 6
    assert shell.err == "ddpmc: a.ddpm: DDPMC_MAX_MEMORY=much: not a number of bytes\n"
    monkeypatch.delenv(MEMORY_VARIABLE)
    model = parse(Path("a.ddpm").read_bytes()).header.model
    header = Header(2**34, 2**34, "RGB", "spectral", model, 0, 5, 2560, (32, 0))
    Path("b.ddpm").write_bytes(write_header(header))
    assert shell("info", "b.ddpm") == 0
    tracemalloc.start()
    assert shell("decode", "b.ddpm", "-o", "b.png") == 6
    assert shell("decode", "b.ddpm", "--all", "levels") == 6
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    assert f"{2**34}x{2**34}" in shell.err and shell.err.count("\n") == 1


@pytest.mark.parametrize("target", [("--bytes",), ("--bpp",)])
def test_too_few_bytes_for_header_and_extras(
    shell: Shell, picture: Image.Image, target: tuple[str]
) -> None:
    picture.save("m.png", icc_profile=bytes(90))
    assert shell("encode", "m.png", "-o", "b.ddpm", "--bytes", 1000) == 0
    least = parse(Path("b.ddpm").read_bytes()).header_size + 90 + 7
    for n, status in ((least - 1, 6), (least, 0)):
        amount = n if target[0] == "--bytes" else 8 * (n + 0.5) / (40 * 28)
        assert shell("encode", "m.png", "-o", "c.ddpm", target[0], amount) == status
        if status:
            assert shell.err == (
                f"ddpmc: m.png: {n} bytes are too few: the header and icc alone take {least}\n"
            )
    data = Path("c.ddpm").read_bytes()
    assert len(data) == least and stops.info(data)["extras"] == {"icc": 90}


# --- Training ----------------------------------------------------------------------------------


def test_train_defaults_are_the_librarys() -> None:
    defaults = {p.name: p.default for p in cli.cli.commands["train"].params}
    for field in fields(TrainConfig):
        if field.name in defaults:
            assert defaults[field.name] == field.default, field.name


def test_train_dry_run(shell: Shell) -> None:
    assert shell("train", "--data", ".", "--out", "x", "--channels", "8,8,8,8", "--dry-run") == 0
    assert "1 pictures" in shell.err and not Path("x").exists()
    Path("empty").mkdir()
    assert shell("train", "--data", "empty", "--out", "x", "--dry-run") == 8
    assert shell.err.splitlines()[-1] == "ddpmc: no pictures below empty"
