"""A device that does not compute exactly is not trusted, and files stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import TINY
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ddpm_codec.codec.decoder import decode
from ddpm_codec.codec.encoder import encode
from ddpm_codec.errors import ModelError
from ddpm_codec.network import selftest
from ddpm_codec.network.exact import HIGH, SUM, WEIGHT, Convolution, ExactConfig, ExactUNet
from ddpm_codec.network.modelfile import load_model

HALF, SINGLE, DOUBLE = selftest.TYPES
CONV2D = F.conv2d
SHAPES = [(24, 64, 3, 1), (64, 64, 3, 1), (320, 320, 3, 1), (64, 128, 2, 2), (384, 256, 1, 1)]


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(selftest, "_chosen", {})


def in_pieces(x: Tensor, w: Tensor, **how: Any) -> Tensor:
    """Sums of halves of the channels, rounded to bfloat16 each."""
    half = x.shape[1] // 2
    parts = (
        CONV2D(x[:, part].float(), w[:, part].float(), **how).bfloat16()
        for part in (slice(half), slice(half, None))
    )
    return sum(parts, torch.zeros(())).to(x.dtype)


def accumulated_in_half(x: Tensor, w: Tensor, **how: Any) -> Tensor:
    """One input channel after the other, the sum being kept in ten bits; scaled to fit."""
    out = torch.zeros(())
    for k in range(x.shape[1]):
        part = slice(k, k + 1)
        out = (out + CONV2D(x[:, part].float(), w[:, part].float(), **how) / 512).half().float()
    return (512 * out).to(x.dtype)


def wrong_where_large(x: Tensor, w: Tensor, **how: Any) -> Tensor:
    """Above 2^20 the last bits are missing."""
    y = CONV2D(x.double(), w.double(), **how)
    off = torch.where(y.abs() > 2.0**20, y * (1 + 2.0**-7), y)
    return off.to(x.dtype)


def not_there(x: Tensor, w: Tensor, **how: Any) -> Tensor:
    raise RuntimeError('"slow_conv2d" not implemented for this type')


WRONG = [in_pieces, accumulated_in_half, wrong_where_large, not_there]


def plant(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor], types: tuple[torch.dtype, ...]
) -> None:
    def conv2d(x: Tensor, w: Tensor, **how: Any) -> Tensor:
        return wrong(x, w, **how) if x.dtype in types else CONV2D(x, w, **how)

    monkeypatch.setattr(F, "conv2d", conv2d)


@pytest.fixture(scope="module")
def file(tiny_model: Path, picture: Image.Image) -> bytes:
    return encode(picture, model=load_model(tiny_model), steps=3, effort=1)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_exact_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, picture: Image.Image, file: bytes, wrong: Any
) -> None:
    """The next type is, and the same file comes out and is read."""
    expected = decode(file, model=load_model(tiny_model)).tobytes()
    for types, dtype in (((HALF,), SINGLE), ((HALF, SINGLE), DOUBLE)):
        selftest._chosen.clear()
        with monkeypatch.context() as patch:
            plant(patch, wrong, types)
            model = load_model(tiny_model)
            assert isinstance(model.net, ExactUNet) and model.net.stem.frozen is not None
            assert model.net.stem.frozen[0].dtype == dtype
            assert encode(picture, model=model, steps=3, effort=1) == file
            assert decode(file, model=model).tobytes() == expected


def test_nothing_that_is_exact(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    plant(monkeypatch, wrong_where_large, selftest.TYPES)
    with pytest.raises(ModelError) as e:
        load_model(tiny_model)
    assert str(e.value) == "no arithmetic of cpu is exact"


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_shows_it(
    monkeypatch: pytest.MonkeyPatch, shape: selftest.Shape, wrong: Any
) -> None:
    assert selftest.passes([shape], "cpu", SINGLE)
    plant(monkeypatch, wrong, (SINGLE,))
    assert not selftest.passes([shape], "cpu", SINGLE)


def test_one_wrong_shape_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv2d(x: Tensor, w: Tensor, **how: Any) -> Tensor:
        return (in_pieces if w.shape[2] == 2 else CONV2D)(x, w, **how)

    monkeypatch.setattr(F, "conv2d", conv2d)
    assert selftest.passes([s for s in SHAPES if s[2] != 2], "cpu", SINGLE)
    assert not selftest.passes(SHAPES, "cpu", SINGLE)


@pytest.mark.parametrize("shape", [*SHAPES, (8, 12, 3, 1), (1, 1, 1, 1), (2048, 8, 3, 1)])
def test_the_worst_integers(shape: selftest.Shape) -> None:
    """Sums come near to 2^24 but do not reach it, and no integer is out of its range."""
    x, w = selftest.worst(shape)
    sums = HIGH * w.double().abs().flatten(1).sum(1)
    assert float(sums.max()) < SUM
    assert float(w.abs().min()) >= 1 and float(w.abs().max()) <= WEIGHT
    assert float(x.min()) >= 0 and float(x.max()) <= HIGH
    if shape[0] * shape[2] ** 2 > 4000:
        assert float(sums.min()) > 0.5 * SUM
    one, both = w[: (len(w) + 1) // 2], w[(len(w) + 1) // 2 :]
    assert bool((one > 0).all())
    if both.numel() > 20:
        assert bool((both > 0).any()) and bool((both < 0).any())
    assert torch.equal(x, x.round()) and torch.equal(w, w.round())


def test_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one device and the same shapes of convolutions."""
    calls = []
    passes = selftest.passes

    def counted(shapes: Any, device: str, dtype: torch.dtype) -> bool:
        calls.append(dtype)
        return passes(shapes, device, dtype)

    monkeypatch.setattr(selftest, "passes", counted)
    first = selftest.choose(ExactUNet(TINY), "cpu")
    n = len(calls)
    assert calls == [HALF, SINGLE] or calls == [HALF, SINGLE, DOUBLE]
    assert selftest.choose(ExactUNet(TINY), "cpu") == first and len(calls) == n
    selftest.choose(ExactUNet(ExactConfig((8, 8, 8, 9), (1,) * 4, (1,) * 3, 16)), "cpu")
    assert len(calls) > n


@pytest.mark.parametrize("dtype", selftest.TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (24, 16, 4, 4), (64, 192, 4, 4)])
def test_what_passes_is_right_elsewhere(shape: selftest.Shape, dtype: torch.dtype) -> None:
    """On other integers, other sizes and in another layout."""
    if not selftest.passes([shape], "cpu", dtype):
        pytest.skip("not exact on this machine, and not used then")
    torch.manual_seed(0)
    c_in, c_out, size, stride = shape
    layer = Convolution(c_in, c_out, size, stride)
    w, _ = layer.integers()
    x = torch.randint(-HIGH, HIGH + 1, (2, c_in, 12, 28)).to(dtype)
    exact = CONV2D(x.double(), w.double(), stride=stride, padding=layer.padding).bfloat16()
    for layout in (torch.contiguous_format, torch.channels_last):
        layer.frozen = w.detach().to(dtype, memory_format=layout), torch.ones(c_out)
        u, _ = layer(x.contiguous(memory_format=layout))
        assert torch.equal(u, exact)
