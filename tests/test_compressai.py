"""As CompressAI's evaluation would use it, without CompressAI."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ddpm_codec
from ddpm_codec.codec.encoder import encode
from ddpm_codec.compressai import Codec
from ddpm_codec.errors import FormatError

pytestmark = pytest.mark.filterwarnings("ignore::ddpm_codec.CutWarning")  # cut on purpose
QUICK: dict[str, Any] = {"steps": 5, "effort": 1}


@pytest.fixture(scope="module")
def x(picture: Image.Image) -> Tensor:
    """(1, 3, 28, 40)"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def test_an_evaluation(tiny_model: Path, x: Tensor) -> None:
    """Pad to multiples of 64, compress, decompress, cut the padding off, count bits."""
    codec = Codec(model=tiny_model, **QUICK).eval()
    assert next(codec.parameters()).device.type == "cpu" and codec.update(force=True) is False
    padding = (12, 12, 18, 18)
    out = codec.compress(F.pad(x, padding))
    x_hat = F.pad(codec.decompress(out["strings"], out["shape"])["x_hat"], [-n for n in padding])
    assert x_hat.shape == x.shape and x_hat.min() >= 0 and x_hat.max() <= 1
    assert -10 * math.log10(F.mse_loss(x, x_hat).item()) > 15
    assert sum(len(s[0]) for s in out["strings"]) * 8.0 / (28 * 40) > 0


def test_files_and_pictures_are_the_librarys(
    tiny_model: Path, picture: Image.Image, x: Tensor
) -> None:
    codec = Codec(model=tiny_model, bytes=300, tune="even", **QUICK)
    out = codec.compress(x)
    assert out == {
        "strings": [[encode(picture, model=tiny_model, bytes=300, tune="even", **QUICK)]],
        "shape": torch.Size((28, 40)),
    }
    want = np.asarray(ddpm_codec.decode(out["strings"][0][0], model=tiny_model))
    got = codec.decompress(**out)["x_hat"]
    assert np.array_equal((got[0] * 255).round().byte().permute(1, 2, 0).numpy(), want)


def test_a_batch(tiny_model: Path, x: Tensor) -> None:
    """Each picture has a string of its own; half precision and what is out of range will do."""
    codec = Codec(model=tiny_model, lossless=True, **QUICK).half()
    both = torch.cat([x, 2 * x.flip(3) - 0.5])
    out = codec.compress(both.half())
    assert [len(s) for s in out["strings"]] == [2]
    want = (both.half().float() * 255).round().clamp(0, 255) / 255
    assert torch.equal(codec.decompress(**out)["x_hat"], want)


def test_what_is_wrong_is_said(tiny_model: Path, x: Tensor) -> None:
    with pytest.raises(TypeError, match="no keyword 'quality'"):
        Codec(model=tiny_model, quality=3)
    codec = Codec(model=tiny_model, bytes=100, **QUICK)
    for wrong in (x[0], x[:, :2], x[:0]):
        with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\), not \("):
            codec.compress(wrong)
    out = codec.compress(x)
    wrong_strings: list[list[list[bytes]]] = [[], [[]], 2 * out["strings"]]
    for strings in wrong_strings:
        with pytest.raises(ValueError, match="one list of files"):
            codec.decompress(strings, out["shape"])
    with pytest.raises(FormatError, match="picture is 28x40, not 7x10"):
        codec.decompress(out["strings"], (7, 10))
