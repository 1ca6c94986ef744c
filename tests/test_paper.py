"""The commands of the paper: samples, mixtures, code lengths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_codec.cli import main as cli


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
