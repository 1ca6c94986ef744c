"""Warnings point at the line of the caller, directly or through Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import ddpm_codec
import ddpm_codec.pillow
from ddpm_codec.errors import CutWarning, warn


@pytest.fixture(scope="module")
def damaged(tiny_model: Path, picture: Image.Image) -> bytes:
    data = bytearray(ddpm_codec.encode(picture, model=tiny_model, steps=4, effort=1))
    data[-20] ^= 1
    return bytes(data)


def noise() -> Image.Image:
    return Image.effect_noise((9, 9), 50)


def wide() -> Image.Image:
    return Image.new("I;16", (9, 9))


def png(im: Image.Image) -> io.BytesIO:
    im.save(out := io.BytesIO(), format="PNG")
    return out


def loaded(data: bytes, model: Path) -> Image.Image:
    im = Image.open(io.BytesIO(data))
    im.model = model  # type: ignore[attr-defined]
    return im


@pytest.mark.parametrize(
    "use",
    [
        lambda data, model: ddpm_codec.decode(data, model=model),
        lambda data, model: ddpm_codec.decode(data[:-50], model=model),
        lambda data, model: list(ddpm_codec.decode_levels(data, model=model)),
        lambda data, model: ddpm_codec.truncate(data, stop_at="psnr=60"),
        lambda data, model: loaded(data, model).load(),
        lambda data, model: loaded(data, model).save(io.BytesIO(), format="PNG"),
        lambda data, model: loaded(data, model).convert("L"),
        lambda data, model: ddpm_codec.encode(noise(), psnr=90, steps=1, model=model),
        lambda data, model: ddpm_codec.encode(wide(), steps=1, model=model),
        lambda data, model: ddpm_codec.encode(png(wide()), steps=1, model=model),
        lambda data, model: wide().save(io.BytesIO(), format="DDPM", steps=1, model=model),
    ],
)
def test_warnings_point_at_the_caller(
    damaged: bytes, tiny_model: Path, use: Callable[[bytes, Path], object]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use(damaged, tiny_model)
    (ours,) = (w for w in caught if issubclass(w.category, ddpm_codec.DdpmcWarning))
    assert ours.filename == __file__


def test_a_warning_of_code_in_no_module() -> None:
    """What exec() runs has no __name__."""
    with pytest.warns(CutWarning, match="text"):
        exec('warn("text", CutWarning)', {"warn": warn, "CutWarning": CutWarning})
