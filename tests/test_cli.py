"""The command line: what it writes, what it says, and with which status it ends."""

from __future__ import annotations

import io
import json
import tracemalloc
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_codec.cli import main as cli
from ddpm_codec.codec import container, decoder, encoder, stops
from ddpm_codec.codec.container import MEMORY_VARIABLE, Header, parse, write_header
from ddpm_codec.errors import CutWarning, DamageWarning
from ddpm_codec.training.train import TrainConfig

QUICK: dict[str, Any] = {"steps": 6, "effort": 1}


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
    assert shell.err == "ddpmc: a.ddpm: cannot write a picture with the suffix '.xyz'\n"


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
        ("encode a.png -o b --path zigzag", "--path"),
        ("encode a.png -o b --steps 0", "--steps"),
        ("encode a.png -o b --steps 34", "steps must be in 1 .. 33"),
        ("encode a.png -o b --steps 2.5", "--steps"),
        ("encode a.png -o b --effort 0", "--effort"),
        ("encode a.png -o b --effort 10", "--effort"),
        ("encode a.png -o b --metadata some", "--metadata"),
        ("encode a.png -o b --seed -1", "--seed"),
        ("encode a.png -o b --threads 0", "--threads"),
        ("encode a.png -o b --device abacus", "--device abacus"),
        ("encode a.png a.png -o b", "several inputs need a folder"),
        ("encode a.png sub/a.png -o out/", "would both become"),
        ("encode - a.png -o out/", "standard input needs"),
        ("encode a.png -o - --json", "--json needs standard output"),
        ("decode a.ddpm", "one of -o IMG and --all DIR"),
        ("decode a.ddpm -o b.png --all c", "one of -o IMG and --all DIR"),
        ("decode a.ddpm -o b.png --stop-at x=1", "not a stop point"),
        ("decode a.ddpm -o b.png --recon flow", "--recon"),
        ("truncate a.ddpm -o b", "one of --bytes, --bpp and --stop-at"),
        ("truncate a.ddpm -o b --bytes 9 --bpp 1", "exclude each other"),
        ("train --data . --out x --channels a,b", "--channels"),
        ("train --data none --out x", "--data"),
        ("nothing", "No such command"),
    ],
)
def test_usage(shell: Shell, arguments: str, message: str) -> None:
    before = shell.files()
    assert shell(*arguments.split()) == 2
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
    def save(self: Image.Image, f: io.BytesIO, **_: object) -> None:
        f.write(b"the first half")
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
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
    assert "No such file or directory" in shell.err and shell.err.count("\n") == 1


# --- Bad input ---------------------------------------------------------------------------------


def newer(data: bytes) -> bytes:
    return data[:6] + bytes([container.VERSION + 1]) + data[7:]


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
    more = {"decode": ["-o", "x.png"], "truncate": ["--bpp", 1, "-o", "x"], "info": []}[command]
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
    defaults = {p.name: p.default for p in cli.train.params}
    for field in fields(TrainConfig):
        if field.name in defaults:
            assert defaults[field.name] == field.default, field.name


def test_train_dry_run(shell: Shell) -> None:
    assert (
        shell(
            "train", "--data", ".", "--out", "x", "--channels", "32,32", "--patch", "4", "--dry-run"
        )
        == 0
    )
    assert "1 pictures" in shell.err and not Path("x").exists()
    Path("empty").mkdir()
    assert shell("train", "--data", "empty", "--out", "x", "--dry-run") == 8
    assert shell.err.splitlines()[-1] == "ddpmc: no pictures below empty"


# --- Commands of the paper ------------------------------------------------------------------------


@pytest.fixture
def small_pictures(tmp_path: Path) -> Path:
    path = tmp_path / "pictures.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    return path


@pytest.mark.parametrize(
    ("more", "columns", "rows"),
    [
        ([], 2, 2),
        (["--ddim"], 2, 2),
        (["--variance", "beta"], 2, 2),
        (["--shared", "700"], 2, 2),
        (["--progressive", "4"], 4, 3),
        (["--nearest"], 3, 2),
    ],
)
def test_sample(
    small_model: Path, small_pictures: Path, tmp_path: Path, more: list[str], columns: int,
    rows: int,
) -> None:  # fmt: skip
    more = [*more, str(small_pictures)] if more == ["--nearest"] else more
    out = [tmp_path / f"{k}.png" for k in "abc"]
    for path, seed in zip(out, ("1", "1", "2"), strict=True):
        arguments = ["sample", "--model", str(small_model), "-n", "3", "--steps", "6", *more]
        assert cli.main([*arguments, "--seed", seed, "-o", str(path)]) == 0
    with Image.open(out[0]) as im:
        assert im.size == (34 * columns - 2, 34 * rows - 2)
    assert out[0].read_bytes() == out[1].read_bytes() != out[2].read_bytes()


def test_interpolate(small_model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ends = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in ends:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    a, b, out = (str(p) for p in (*ends, tmp_path / "out.png"))
    arguments = ["interpolate", a, b, "--model", str(small_model), "--steps", "4", "-o", out]
    assert cli.main([*arguments, "--lam", "0,0.5,1", "--t", "300"]) == 0
    with Image.open(out) as im, Image.open(a) as first:
        assert im.size == (34 * 5 - 2, 32)
        assert im.crop((0, 0, 32, 32)).tobytes() == first.tobytes()
    assert cli.main([*arguments, "--lam", "0,half", "--force"]) == 2
    Image.new("RGB", (32, 40)).save(b)
    assert cli.main([*arguments, "--force"]) == 4


def test_likelihood(
    small_model: Path, small_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = tmp_path / "terms.csv"
    arguments = ["likelihood", str(small_pictures), "--model", str(small_model), "--draws", "5"]
    assert cli.main([*arguments, "--terms", str(terms)]) == 0
    assert "3 pictures" in capsys.readouterr().out
    assert terms.read_text().splitlines()[0] == "t,bits_per_dim,eps_mse"
    assert cli.main([*arguments, "--json", "-n", "2"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["pictures"] == 2
    parts = sum(about[k] for k in ("L_T", "L_1..T-1", "L_0"))
    assert about["total"] == pytest.approx(parts)
    assert cli.main([*arguments, "--terms", str(terms)]) == 1  # it is there
    assert cli.main([*arguments[:2], "--model", "photo"]) == 7
    assert cli.main(["likelihood", str(terms), "--model", str(small_model)]) == 8


def test_sample_needs_a_model_of_its_kind(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    assert cli.main(["sample", "--model", "photo", "-n", "1", "-o", str(out)]) == 7
    assert capsys.readouterr().err.count("\n") == 1 and not out.exists()
    arguments = ["sample", "--model", str(small_model), "-n", "1", "--steps", "3", "-o", str(out)]
    assert cli.main([*arguments, "--variance", "learned"]) == 7
    assert capsys.readouterr().err.count("\n") == 1 and not out.exists()
