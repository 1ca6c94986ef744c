"""Many pictures: folders, what is left out, what is said, and the functions for Python."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_cli import Shell, encoded, shell
from works import work

import ddpm_codec
from ddpm_codec import batch, files
from ddpm_codec.batch.record import NAME
from ddpm_codec.codec import encoder
from ddpm_codec.errors import DataError, ModelError
from ddpm_codec.network.modelfile import get_model

__all__ = ["encoded", "shell"]  # fixtures


@pytest.fixture
def photos(shell: Shell, picture: Image.Image) -> Path:
    """Three pictures, two of them in a folder of the folder, and what is none."""
    folder = shell.folder / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a.png", "sub/b.PNG", "sub/c.png", ".hidden/d.png"):
        picture.rotate(len(name)).save(folder / name)
    (folder / "notes.txt").touch()
    return folder


def below(folder: str) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# --- Folders -----------------------------------------------------------------------------------


def test_a_folder_keeps_its_folders(shell: Shell, photos: Path) -> None:
    assert shell("encode", "photos", "-o", "out/", "-q", "--bytes", 300) == 0
    assert below("out") == ["a.ddpm", "sub/b.ddpm", "sub/c.ddpm"]
    with Image.open(photos / "sub" / "b.PNG") as im:
        assert Path("out/sub/b.ddpm").read_bytes() == encoder.encode(im, bytes=300)
    assert shell("decode", "out", "a.ddpm", "-o", "out/pictures/", "-q") == 2
    assert "out/a.ddpm and a.ddpm would both become out/pictures/a.png" in shell.err
    assert shell("decode", "out", "-o", "out/pictures/", "-q") == 0
    assert below("out/pictures") == ["a.png", "sub/b.png", "sub/c.png"]
    # Not what is in the folder that is written to.
    for _ in range(2):
        assert shell("truncate", "out", "-o", "out/small/", "--bytes", 200, "-q", "--force") == 0
    assert below("out/small") == ["a.ddpm", "sub/b.ddpm", "sub/c.ddpm"]
    assert shell("info", "out/small") == 0
    assert shell.out.count(b" 200 bytes") == 3


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("encode photos -o b", 2, "a folder as input needs a folder to go to: -o OUT/"),
        ("encode photos -o -", 2, "a folder as input needs a folder to go to: -o OUT/"),
        ("encode photos photos/a.png -o out/", 2, "photos/a.png and photos/a.png would both"),
        ("encode photos/.hidden/.. -o out/ --jobs 0", 2, "1<=x"),
        ("encode empty -o out/", 8, "ddpmc: no file below empty is called *.png, *.jpg, "),
        ("decode photos -o out/", 8, "ddpmc: no file below photos is called *.ddpm\n"),
        ("encode photos -o out/ --scheduler here", 2, "tcp://HOST:PORT or local, not 'here'"),
        ("encode photos -o out/ --jobs 2 --scheduler tcp://a:1", 2, "jobs is the cluster's own"),
        ("encode a.png -o - --skip-existing", 2, "only files can be left out"),
        ("decode a.ddpm --all out --jobs 2", 2, "--all and --jobs exclude each other"),
        ("decode a.ddpm --all out --skip-existing", 2, "--all and --skip-existing exclude"),
        ("encode photos -o out/ --model nonesuch", 7, "no model nonesuch"),
    ],
)
def test_what_is_refused_before_any_work(
    shell: Shell, photos: Path, arguments: str, status: int, message: str
) -> None:
    Path("empty").mkdir()
    before = shell.files()
    assert shell(*arguments.split()) == status
    assert message in shell.err and shell.files() == before


def test_two_names_that_become_one(shell: Shell, photos: Path) -> None:
    shutil.copy("a.png", photos / "sub" / "b.tif")
    before = shell.files()
    assert shell("encode", "photos", "-o", "out/") == 2
    text = "photos/sub/b.PNG and photos/sub/b.tif would both become out/sub/b.ddpm"
    assert text in shell.err and shell.files() == before


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert files.below(str(tmp_path), (".png",)) == [str(tmp_path / "a.png")]


# --- What is there already ---------------------------------------------------------------------


def test_what_was_made_before_is_left_out(shell: Shell, photos: Path) -> None:
    encode = ("encode", "photos", "-o", "out/", "--skip-existing", "--json", "--bytes")
    made = {name: Path("out", name) for name in ("a.ddpm", "sub/b.ddpm", "sub/c.ddpm")}

    def again(*more: object) -> list[str]:
        """Those that are made anew; the others stay the files that they are."""
        before = {name: path.stat() for name, path in made.items() if path.exists()}
        assert shell(*encode, *more) == 0
        lines = [json.loads(line) for line in shell.out.splitlines()]
        assert sorted(line["output"] for line in lines) == [f"out/{name}" for name in made]
        new = [line["output"][4:] for line in lines if not line.get("skipped")]
        kept = set(made) - set(new)
        assert all(made[name].stat().st_ino == before[name].st_ino for name in kept)
        return new

    assert again(300) == list(made) and again(300) == []
    assert again(200) == list(made) and again(200, "--threads", 1) == []
    shutil.copy("a.png", photos / "sub" / "c.png")  # another picture
    assert again(200) == ["sub/c.ddpm"]
    (photos / "a.png").touch()  # the same picture
    made["sub/b.ddpm"].unlink()
    assert again(200) == ["sub/b.ddpm"]
    assert again(200, "--seed", 1) == list(made)
    assert shell(*encode[:-2], "--bytes", 200, "--seed", 1) == 0
    assert shell.err.splitlines()[0] == (
        "out/a.ddpm: skipped, it was made from the same file before"
    )


def test_what_nobody_knows_is_not_overwritten(shell: Shell, photos: Path) -> None:
    encode = ("encode", "photos", "-o", "out/", "--skip-existing", "--bytes", 200, "-q")
    assert shell(*encode) == 0
    Path("out/a.ddpm").write_text("precious")
    assert shell(*encode) == 1
    assert shell.err == (
        "ddpmc: out/a.ddpm: exists, but no run with --skip-existing made it as it is "
        "(--force overwrites it)\n"
    )
    assert Path("out/a.ddpm").read_text() == "precious"
    assert shell(*encode, "--force") == 0
    assert Path("out/a.ddpm").stat().st_size == 200
    assert shell(*encode) == 0 and shell.err == ""


def test_damage_is_told_each_time(shell: Shell, encoded: bytes) -> None:
    Path("bad.ddpm").write_bytes(encoded[:-20] + bytes(20))
    for _ in range(2):
        assert shell("decode", "a.ddpm", "bad.ddpm", "-o", "out/", "--skip-existing") == 3
        assert "ddpmc: bad.ddpm: warning: damaged" in shell.err
    assert "out/a.png: skipped" in shell.err
    assert shell("decode", "a.ddpm", "-o", "out/", "--skip-existing", "--stop-at", "t=500") == 0
    assert "skipped" not in shell.err


def test_nothing_is_remembered_unasked(shell: Shell, photos: Path) -> None:
    assert shell("encode", "a.png", "-o", "b.ddpm", "-q") == 0
    assert shell("encode", "photos", "-o", "out/", "-q", "--bytes", 200) == 0
    assert not Path(NAME).exists() and not Path("out", NAME).exists()
    assert shell("encode", "a.png", "-o", "c.ddpm", "-q", "--skip-existing") == 0
    assert shell("encode", "a.png", "-o", "c.ddpm", "--skip-existing") == 0
    assert "c.ddpm: skipped" in shell.err and Path(NAME).exists()


# --- What is said ------------------------------------------------------------------------------


def test_one_bar_over_all(shell: Shell, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "sub" / "c.png").write_text("none")
    encode = ("encode", "photos", "-o", "out/", "--bytes", 200, "--force")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert shell(*encode) == 4
    assert "3/3" in shell.err
    assert shell.err.count("\x1b[K") == 3 and "\x1b[Kout/a.ddpm: 40x28" in shell.err
    assert "\x1b[Kddpmc: photos/sub/c.png: not a picture" in shell.err
    assert shell(*encode, "--json") == 4
    assert "%" not in shell.err and shell.out.count(b"\n") == 3
    assert shell("encode", "photos/sub/c.png", "-o", "b.ddpm") == 4
    assert "100%" not in shell.err


# --- Python ------------------------------------------------------------------------------------


def test_encode_all_and_decode_all(shell: Shell, photos: Path, picture: Image.Image) -> None:
    (photos / "sub" / "c.png").write_text("none")
    todo = batch.encode_all(photos, "out/", bytes=300)
    assert len(todo) == 3 and below("out") == []
    first, *_, last = todo
    assert first.dest == "out/a.ddpm" and first.error is None and first.data is None
    assert Path(first.dest).read_bytes() == ddpm_codec.encode(first.source, bytes=300)
    assert first.about == ddpm_codec.info(first.dest)
    assert isinstance(last.error, ddpm_codec.ImageError) and not Path(last.dest).exists()
    (done,) = batch.decode_all([first.dest], "out/", suffix="tif", stop_at="t=500")
    assert done.dest == "out/a.tif" and done.about["t"] >= 500
    (again,) = batch.encode_all("a.png", "b.ddpm", model=get_model(), bytes=300)
    assert again.about == ddpm_codec.info("b.ddpm")


def test_what_they_raise(shell: Shell, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, wrong in (
        (ValueError, {"jobs": 0}), (ValueError, {"scheduler": "here"}), (ModelError, {"model": "x"})
    ):  # fmt: skip
        with pytest.raises(error):
            batch.encode_all(photos, "out/", **wrong)
    with pytest.raises(DataError):
        batch.decode_all(photos, "out/")
    with pytest.raises(ValueError, match="needs a folder"):
        batch.encode_all(photos, "out")
    assert not Path("out").exists()


def test_whoever_stops_listening_stops_the_work(tmp_path: Path) -> None:
    pairs = []
    for name in "abc":
        (tmp_path / name).write_text("fine")
        pairs.append((str(tmp_path / name), str(tmp_path / f"{name}.out")))
    results = batch.Batch(pairs, work).results()
    next(results)
    results.close()
    assert [Path(dest).exists() for _, dest in pairs] == [True, False, False]


def test_without_dask(shell: Shell, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert shell("encode", "photos", "-o", "out/", "--scheduler", "local") == 9
    assert shell.err == "ddpmc: a scheduler needs Dask: pip install 'ddpmc[dask]'\n"
    assert not Path("out").exists()
