"""What is encoded is what a second decoder, written from docs/format.md alone, decodes."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from second import M64, File, Message, Second, Told, crc16, philox, pixels, table

import ddpm_codec
from ddpm_codec.codec import container
from ddpm_codec.network import tiles
from ddpm_codec.network.denoiser import State, eps_hat
from ddpm_codec.network.modelfile import Model, load_model
from ddpm_codec.rec import classes, trellis


def fitted(path: Path) -> Model:
    """A model whose tables differ everywhere, and expect quite another picture."""
    model, rng = load_model(path), np.random.default_rng(0)
    t = replace(model.tables, mean=model.tables.mean + 0.3 * rng.standard_normal(192))
    t.error = t.error * np.exp(rng.normal(1, 1.5, t.error.shape)).astype(np.float32)
    loud = np.exp(rng.normal(0, 0.3, t.variance.shape)).astype(np.float32)
    t.variance = np.sort(t.variance * loud, axis=-1)
    t.margin = rng.uniform(1e-4, 1.2e-4, t.margin.shape)
    t.margin[::2] *= 8  # where some have to be listed, too
    t.check(model.ladder, model.net.cfg.precisions)
    return replace(model, tables=t)


@pytest.fixture(scope="module")
def models(tiny_model: Path, small_model: Path) -> dict[str, Model]:
    return {"tiny": fitted(tiny_model), "small": fitted(small_model)}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """The messages that the package decodes."""
    out: list[Told] = []
    orders: list[Any] = []
    sort, decode = classes.sort, trellis.decode

    def sorting(*args: Any) -> Any:
        orders.append(sort(*args))
        return orders[-1]

    def decoding(bits: Any, layout: Any, key: Any) -> Any:
        y = decode(bits, layout, key)
        out.append(Told(bits.tolist(), orders[-1].order.tolist(), layout.last.tolist(), y))
        return y

    monkeypatch.setattr(classes, "sort", sorting)
    monkeypatch.setattr(trellis, "decode", decoding)
    return out


def compare(data: bytes, model: Model, told: list[Told], **tile: int) -> Second:
    """Both decoders have to find the same."""
    told.clear()
    levels = list(ddpm_codec.decode_levels(data, model=model))
    second = Second(data, model, **tile)
    for a, b in zip(told, second.told, strict=True):
        assert a[:3] == b[:3]
        size = max(1.0, float(np.abs(a.y).max(initial=0)))
        np.testing.assert_allclose(a.y, b.y, rtol=0, atol=1e-5 * size)
    assert [(p.size, p.payload) for p in second.file.levels] == [
        (p.nbytes, bytes(p.payload)) for p in container.parse(data).levels
    ]
    for level, picture in zip(levels, second.pictures, strict=True):
        colours, *alpha = np.split(np.atleast_3d(np.asarray(level.image)), [picture.shape[2]], 2)
        off = np.abs(colours.astype(int) - picture)
        assert off.max() <= 1 and off.mean() < 0.01
        if "A" in level.image.mode:
            np.testing.assert_array_equal(alpha[0][..., 0], second.alpha())
    return second


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """So that a small picture has some."""
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(tiles, "OVERLAP", 8)
    return {"tile": 32, "overlap": 8}


@pytest.mark.parametrize(
    ("name", "mode", "size", "options"),
    [
        ("tiny", "RGB", (44, 36), {"steps": 4, "effort": 1, "seed": 2**32 - 1}),
        ("tiny", "RGBA", (33, 17), {"steps": 3, "effort": 5, "lossless": True}),
        ("tiny", "LA", (20, 41), {"steps": 5, "effort": 1, "stop_at": 100}),
        ("tiny", "RGB", (40, 28), {"steps": 3, "effort": 1, "path": "isotropic"}),
        ("tiny", "L", (9, 8), {"steps": 1, "effort": 1, "path": "isotropic", "lossless": True}),
        ("small", "RGB", (40, 28), {"timesteps": (1000, 520, 100), "effort": 1, "seed": 7}),
        ("small", "RGB", (9, 8), {"timesteps": (900, 400), "effort": 5, "lossless": True}),
    ],
)
def test_second_decoder(
    models: dict[str, Model], picture: Image.Image, told: list[Told], small_tiles: dict[str, int],
    name: str, mode: str, size: tuple[int, int], options: dict[str, Any],
) -> None:  # fmt: skip
    """Messages, places, observations and pictures are the same."""
    image = picture.resize(size).convert(mode[:-1] if "A" in mode else mode)
    if "A" in mode:
        alpha = np.add.outer(7 * np.arange(size[1]), 3 * np.arange(size[0]))
        image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    data = ddpm_codec.encode(image, model=models[name], **options)
    second = compare(data, models[name], told, **small_tiles)
    assert second.file.mode == mode and told
    if "lossless" in options:
        exact = np.atleast_3d(np.asarray(image))[..., : second.pictures[-1].shape[2]]
        np.testing.assert_array_equal(second.pictures[-1], exact)


@pytest.mark.parametrize(
    ("name", "options"), [("tiny", {"steps": 4}), ("small", {"timesteps": (700, 400, 300)})]
)
def test_prefixes(
    models: dict[str, Model], picture: Image.Image, told: list[Told], small_tiles: dict[str, int],
    name: str, options: dict[str, Any],
) -> None:  # fmt: skip
    """Files that end inside a level, with a checksum there or without."""
    image = picture.copy()
    image.putalpha(200)
    data = ddpm_codec.encode(image, model=models[name], effort=1, **options)
    levels = container.parse(data).levels
    seen = set()
    for level in levels:
        for nbytes in {level.start + level.nbytes // 2, level.start + level.nbytes // 4}:
            for prefix in (data[:nbytes], container.cut(data, nbytes)):
                second = compare(prefix, models[name], told, **small_tiles)
                seen.add(len(second.file.levels))
    assert {0, 1, len(levels)} <= seen


def test_header_and_records() -> None:
    """Every field, byte by byte."""
    head = "8A44504D0D0A 02 06 AC02 01 010203040506 FFFFFFFF0F 09 8014 03 20 02 07"
    data = bytes.fromhex(head)
    data += crc16(data[6:]).to_bytes(2, "little")
    model = bytes.fromhex("010203040506")
    rungs = (32, 30, 23)
    header = container.Header(300, 1, "LA", "isotropic", model, 2**32 - 1, 9, 2560, rungs)
    assert container.write_header(header) == data
    f = File(data)
    assert (f.mode, f.isotropic, f.width, f.height, f.model) == ("LA", True, 300, 1, model)
    assert (f.seed, f.effort, f.finest, f.r) == (2**32 - 1, 9, 2560, [*rungs])
    assert [f.snr(i) for i in range(3)] == header.snrs == [0.0390625, 0.078125, 0.8838834764831844]
    writer = container.Writer(header)
    writer.level(31.9, b"abc")
    writer.extra("exif", b"de")
    records = b"\x06\x7fabc" + crc16(data + b"\x06\x7fabc").to_bytes(2, "little")
    records += b"\x05\x01de" + zlib.crc32(b"\x05\x01de").to_bytes(4, "little")
    assert writer.file() == data + records
    f = File(data + records)
    assert f.levels == [(31.75, 3, b"abc")] and f.extras == {1: b"de"}


def test_header_of_timesteps() -> None:
    """Evenly apart: the first difference is said once."""
    header = container.Header(9, 8, "RGB", "isotropic", bytes(6), 0, 1, 0, (1000, 600, 200))
    f = File(container.write_header(header))
    assert container.write_header(header)[17:-2] == bytes.fromhex("01 00 03 E807 9003")
    assert f.r == [1000, 600, 200] and [f.snr(i) for i in range(3)] == header.snrs


def test_random_words() -> None:
    """Philox as numpy has it, the table and the signs by their first numbers."""
    numpys = np.random.Philox(
        key=np.array([5, 2**64 - 1], np.uint64), counter=np.array([0, 1, 0, 0], np.uint64)
    )
    assert [w for k in (1, 2) for w in philox(k, (5, M64), 1)] == numpys.random_raw(8).tolist()
    first = [1.0199450619668766, -1.8153296401967414, 0.6070646880874339, -2.2719993787835793]
    assert [table(0, 0, k) for k in range(4)] == pytest.approx(first, abs=1e-12)
    assert philox(1, (7, 9), 1)[:2] == [0x9706993A71B75626, 0xBA34AEECD2EAE858]


@pytest.mark.parametrize("effort", [1, 4, 9])
def test_messages(effort: int) -> None:
    """Any bits are one; of long classes, and of a beginning of one."""
    n, v = [3, 64, 700, 4096, 8300], [40.0, 0.8, 0.7, 0.02, 0.0001]
    layout = trellis.Layout.of(np.array(v), np.array(n), 7 + effort)
    message = Message(v, n, effort)
    assert (layout.bits, layout.last.tolist()) == (message.length, message.waits)
    bits = np.random.default_rng(effort).integers(0, 2, layout.bits, np.uint8)
    for k in (layout.bits, layout.bits - 1, layout.bits // 2, 3):
        y = trellis.decode(bits[:k], layout, (77, 5))
        np.testing.assert_allclose(message.y(bits[:k].tolist(), 77, 5)[: len(y)], y, atol=1e-5)
        assert len(y) == message.arrived(k)


@pytest.mark.parametrize("prediction", ["edm", "eps"])
def test_network(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    """What it is asked, and how its answer is read (section 4)."""
    net, rng, s = models["tiny"].net, np.random.default_rng(0), 3.0
    asked: list[Any] = []
    forward = net.forward

    def recorded(*args: Any) -> Any:
        asked.extend([*args, forward(*args)])
        return asked[-1]

    spread = rng.uniform(0.5, 2, (192, 1, 1))
    monkeypatch.setitem(net._buffers, "spread", torch.from_numpy(spread[:, 0, 0]).float())
    monkeypatch.setattr(net, "forward", recorded)
    g = rng.choice([0.0, s, 2.0], (192, 2, 3))
    m = rng.standard_normal(g.shape) * (g > 0)
    state = State(*(torch.from_numpy(a[None]) for a in (m, g)), torch.tensor([s]))
    eps = eps_hat(net, state, prediction)[0][0].numpy()
    x, level, blocks, (y, coefficients, _) = asked
    w, n = np.sqrt(g / (1 + spread**2 * g)), 1 / (1 + spread**2 * g)
    planes = np.concatenate([pixels(m) * math.sqrt(s / (1 + s)), pixels(m * w)], 2)
    precisions = np.where(g > 0, 1 + np.log(np.maximum(g, 1e-9) / s) / 4, 0)
    told = (np.moveaxis(x[0].numpy(), 0, 2), *(b[0].numpy() for b in blocks), level.item())
    expected = (planes, precisions, m * w, 50 * (math.log(s) + 10))
    if prediction == "edm":
        answer = (n * m - eps / math.sqrt(s)) / (spread * np.sqrt(n))
    else:
        answer = eps
    told = (*told, np.moveaxis(y[0].numpy(), 0, 2) + pixels(coefficients[0].numpy()))
    for a, b in zip(told, (*expected, pixels(answer)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
