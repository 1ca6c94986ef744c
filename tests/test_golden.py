"""Files of earlier days, of the shipped models: every release decodes them to the same symbols."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_codec.codec.encoder import psnr

GOLDEN = Path(__file__).resolve().parent / "golden"
SYMBOLS: dict[str, str] = json.loads((GOLDEN / "symbols.json").read_text())

spec = importlib.util.spec_from_file_location("golden", GOLDEN / "make.py")
assert spec and spec.loader
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def test_all_are_here() -> None:
    assert {p.stem for p in GOLDEN.glob("*.ddpm")} == set(SYMBOLS)


@pytest.mark.parametrize("name", sorted(SYMBOLS))
def test_golden(name: str) -> None:
    picture, symbols = make.decoded((GOLDEN / f"{name}.ddpm").read_bytes())
    assert symbols == SYMBOLS[name]
    with Image.open(GOLDEN / f"{name}.png") as stored:
        assert picture.mode == stored.mode
        a, b = np.asarray(picture), np.asarray(stored)
    if "lossless" in name:
        np.testing.assert_array_equal(a, b)
    assert psnr(a, b) > 50
