"""What is encoded is what a second decoder, written from docs/format.md alone, decodes."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import exact_models
import numpy as np
import pytest
import second_network
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from second import M64, Contents, File, Message, ModelFile, Second, State, crc16, philox, table

import ddpm_codec
from ddpm_codec.codec import container
from ddpm_codec.codec.decoder import Decoder
from ddpm_codec.codec.header import Header, write_header
from ddpm_codec.network import modelfile, tiles
from ddpm_codec.network.exact import Block, Convolution, ExactUNet, Inputs, Quantiser, plus, scaled
from ddpm_codec.network.modelfile import Model, get_model
from ddpm_codec.rec import classes, trellis

GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    out = {
        "tiny": exact_models.exact_model(folder / "tiny.safetensors"),
        "small": exact_models.paper_model(folder / "small.safetensors"),
    }
    for path in out.values():
        get_model(path)  # once: the size of tiles is part of its digest
    return out


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> list[Contents]:
    """The messages that the package decodes."""
    out: list[Contents] = []
    sorted_: list[classes.Classes] = []
    sort, decode = classes.sort, trellis.decode

    def sorting(*args: Any) -> classes.Classes:
        sorted_.append(sort(*args))
        return sorted_[-1]

    def decoding(bits: trellis.Bits, layout: trellis.Layout, key: trellis.Key) -> Any:
        y, of = decode(bits, layout, key), sorted_[-1]
        out.append(
            Contents(of.n.tolist(), of.order.tolist(), bits.tolist(), layout.last.tolist(), y)
        )
        return y

    monkeypatch.setattr(classes, "sort", sorting)
    monkeypatch.setattr(trellis, "decode", decoding)
    return out


class First(NamedTuple):
    """What the package makes of a file."""

    stream: container.Stream
    contents: list[Contents]
    states: list[State]
    exact: Any
    alpha: Any


def first(data: bytes, model: Model, contents: list[Contents]) -> First:
    contents.clear()
    decoder, states = Decoder(container.parse(data), model), []
    while decoder.step():
        chain, estimate = decoder.chain, decoder.estimate
        index = None if estimate.index is None else estimate.index.reshape(chain.m.shape)
        shown = chain.picture(estimate.x0_hat)[..., : chain.components]
        states.append(State(chain.m.copy(), estimate.x0_hat.reshape(chain.m.shape), index, shown))
    decoder.finish()
    assert decoder.damage is None
    return First(decoder.stream, list(contents), states, decoder.exact, decoder.alpha())


def compare(data: bytes, path: Path, contents: list[Contents], **tile: int) -> Second:
    """Both decoders have to find the same: of photographs the same bits."""
    model = get_model(path)
    a, b = first(data, model, contents), Second(data, path, **tile)
    for mine, other in zip(a.contents, b.contents, strict=True):
        assert mine[:-1] == other[:-1]
        np.testing.assert_array_equal(mine.y, other.y)
    assert [(p.size, p.payload) for p in b.file.levels] == [
        (p.nbytes, bytes(p.payload)) for p in a.stream.levels
    ]
    for old, new in zip(a.states, b.states, strict=True):
        if model.exact:
            for x, y in zip(old, new, strict=True):
                np.testing.assert_array_equal(x, y)
        else:  # a step of the grid, where x0_hat differs in its last digits
            np.testing.assert_allclose(old.m, new.m, rtol=0, atol=2**-13)
            np.testing.assert_allclose(old.x0_hat, new.x0_hat, rtol=0, atol=1e-2)
            off = np.abs(old.picture.astype(int) - new.picture)
            assert off.max() <= 1 and off.mean() < 0.01
    np.testing.assert_array_equal(a.exact, b.exact)
    np.testing.assert_array_equal(a.alpha, b.alpha())
    return b


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """So that a small picture has some."""
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(tiles, "OVERLAP", 16)
    return {"tile": 32, "overlap": 16}


@pytest.mark.parametrize(
    ("name", "mode", "size", "options"),
    [
        ("tiny", "RGB", (48, 36), {"steps": 4, "effort": 1, "seed": 2**32 - 1}),
        ("tiny", "RGB", (20, 41), {"steps": 7, "effort": 2, "lossless": True}),
        ("tiny", "RGBA", (33, 17), {"steps": 3, "effort": 5, "lossless": True}),
        ("tiny", "RGB", (36, 40), {"steps": 4, "effort": 1, "tune": (5, 31, 7)}),
        ("tiny", "LA", (20, 41), {"steps": 5, "effort": 1, "stop_at": 100}),
        ("tiny", "RGB", (40, 28), {"steps": 3, "effort": 1, "path": "isotropic"}),
        ("tiny", "L", (9, 8), {"steps": 1, "effort": 1, "path": "isotropic", "lossless": True}),
        ("small", "RGB", (40, 28), {"timesteps": (1000, 520, 100), "effort": 1, "seed": 7}),
        ("small", "RGB", (9, 8), {"timesteps": (900, 400), "effort": 5, "lossless": True}),
        ("small", "L", (33, 9), {"timesteps": (800, 200), "effort": 1}),
    ],
)
def test_second_decoder(
    models: dict[str, Path], picture: Image.Image, contents: list[Contents],
    small_tiles: dict[str, int], name: str, mode: str, size: tuple[int, int],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Messages, places, observations and pictures are the same."""
    image = picture.resize(size).convert(mode[:-1] if "A" in mode else mode)
    if "A" in mode:
        alpha = np.add.outer(7 * np.arange(size[1]), 3 * np.arange(size[0]))
        image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    data = ddpm_codec.encode(image, model=models[name], **options)
    second = compare(data, models[name], contents, **small_tiles)
    assert second.file.mode == mode and contents
    if "lossless" in options:
        exact = np.atleast_3d(np.asarray(image))[..., : second.pictures[-1].shape[2]]
        np.testing.assert_array_equal(second.pictures[-1], exact)
    for level, shown in zip(
        ddpm_codec.decode_levels(data, model=models[name]), second.pictures, strict=True
    ):
        colours = np.atleast_3d(np.asarray(level.image))[..., : shown.shape[2]].astype(int)
        assert np.abs(colours - shown).max() <= (name == "small")


def test_one_tile(models: dict[str, Path], picture: Image.Image, contents: list[Contents]) -> None:
    """As large as the format has them."""
    data = ddpm_codec.encode(picture, model=models["tiny"], effort=1, steps=3)
    assert len(compare(data, models["tiny"], contents).contents) == 3


@pytest.mark.parametrize(
    ("name", "options"), [("tiny", {"steps": 3}), ("small", {"timesteps": (700, 400, 300)})]
)
def test_prefixes(
    models: dict[str, Path], picture: Image.Image, contents: list[Contents],
    small_tiles: dict[str, int], name: str, options: dict[str, Any],
) -> None:  # fmt: skip
    """Files that end inside a level, with a checksum there or without."""
    image = picture.resize((40, 28))
    image.putalpha(200)
    data = ddpm_codec.encode(image, model=models[name], effort=1, **options)
    levels = container.parse(data).levels
    seen, parts = set(), 0
    for level in levels:
        middle = level.start + level.nbytes * 9 // 16
        quarter = level.start + level.nbytes // 4
        for prefix in (data[:middle], container.cut(data, middle), container.cut(data, quarter)):
            second = compare(prefix, models[name], contents, **small_tiles)
            seen.add(len(second.file.levels))
            parts += len(second.states) > level_of(levels, len(prefix))
    assert {0, 1, len(levels)} <= seen and parts > len(levels)


def level_of(levels: list[container.LevelRecord], nbytes: int) -> int:
    """How many levels end before."""
    return sum(level.offset(level.nbytes) < nbytes for level in levels)


@pytest.mark.parametrize("name", ["alpha", "colour", "grey-lossless", "isotropic"])
def test_golden(name: str) -> None:
    """With a network of full size."""
    data = (GOLDEN / f"{name}.ddpm").read_bytes()
    second = Second(data, modelfile.find(id=File(data).model))
    h = hashlib.sha256()
    for message in second.contents:
        for part in message[:-1]:
            h.update(np.array(part, "<i8").tobytes())
    assert h.hexdigest() == json.loads((GOLDEN / "symbols.json").read_text())[name]
    with Image.open(GOLDEN / f"{name}.png") as stored:
        shown = np.atleast_3d(np.asarray(stored))
    np.testing.assert_array_equal(shown[..., : second.used // 64], second.pictures[-1])


def test_header_and_records() -> None:
    """Every field, byte by byte."""
    head = "8A44504D0D0A 02 06 AC02 01 010203040506 FFFFFFFF0F 09 8014 03 20 02 07"
    data = bytes.fromhex(head)
    data += crc16(data[6:]).to_bytes(2, "little")
    model = bytes.fromhex("010203040506")
    rungs = (32, 30, 23)
    header = Header(300, 1, "LA", "isotropic", model, 2**32 - 1, 9, 2560, rungs)
    assert write_header(header) == data
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
    """Evenly apart: the first difference is written once."""
    header = Header(9, 8, "RGB", "isotropic", bytes(6), 0, 1, 0, (1000, 600, 200))
    f = File(write_header(header))
    assert write_header(header)[17:-2] == bytes.fromhex("01 00 03 E807 9003")
    assert f.r == [1000, 600, 200] and [f.snr(i) for i in range(3)] == header.snrs


def test_random_words() -> None:
    """Philox as numpy has it, the table and the signs by their first numbers."""
    numpys = np.random.Philox(
        key=np.array([5, 2**64 - 1], np.uint64), counter=np.array([0, 1, 0, 0], np.uint64)
    )
    assert [w for k in (1, 2) for w in philox(k, (5, M64), 1)] == numpys.random_raw(8).tolist()
    begin = [1.0199450619668766, -1.8153296401967414, 0.6070646880874339, -2.2719993787835793]
    assert [table(0, 0, k) for k in range(4)] == [round(4096 * x) / 4096 for x in begin]
    assert philox(1, (7, 9), 1)[:2] == [0x9706993A71B75626, 0xBA34AEECD2EAE858]


def test_table() -> None:
    """All of it; numbers that are rounded to 0 keep their signs."""
    theirs = trellis._table(17, 8)
    mine = np.array([[table(17, row, column) for column in range(64)] for row in range(128)])
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(np.signbit(mine), np.signbit(theirs))
    assert np.signbit(mine[mine == 0]).any()


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
        np.testing.assert_array_equal(message.y(bits[:k].tolist(), 77, 5), y)
        assert len(y) == message.arrived(k)


# --- the network, layer by layer -----------------------------------------------------------------


@pytest.fixture(scope="module")
def both(models: dict[str, Path]) -> tuple[ExactUNet, second_network.Network]:
    net = get_model(models["tiny"]).net
    assert isinstance(net, ExactUNet)
    other = ModelFile(models["tiny"])
    return net, second_network.Network(other.net, other.network)


def numbers(rng: np.random.Generator, *shape: int) -> Any:
    """Of all sizes, as bfloat16 has them; some halfway between whole numbers."""
    x = rng.standard_normal(shape) * 4.0 ** rng.integers(-3, 5, shape)
    x = np.where(rng.random(shape) < 0.3, np.rint(x * 64) / 64, x)
    return second_network.bf16(x.astype(np.float32))


def tensor(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))[None].bfloat16()


def same(a: torch.Tensor, b: Any) -> None:
    np.testing.assert_array_equal(a[0].float().numpy(), b)


def signed_integers(rng: np.random.Generator, *shape: int) -> Any:
    """Many of them as large as may be."""
    return (rng.integers(-255, 256, shape) * rng.integers(1, 5, shape)).clip(-255, 255)


SEEDS = st.integers(0, 2**32 - 1)
Both = tuple[ExactUNet, second_network.Network]


@given(SEEDS)
def test_rounding(seed: int) -> None:
    """bf16 is what the package calls bfloat16."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-(2**24) + 1, 2**24, 200) >> rng.integers(0, 24, 200)
    x = np.append(x, 257 * 2 ** np.arange(16) * (1 - 2 * rng.integers(0, 2, 16)))  # halves
    f = x.astype(np.float32)
    np.testing.assert_array_equal(
        torch.from_numpy(f).bfloat16().float().numpy(), second_network.bf16(f)
    )


@given(SEEDS)
def test_products(seed: int) -> None:
    """In double precision: what int64 gives, and what Python's integers give."""
    rng = np.random.default_rng(seed)
    w, a = rng.integers(-127, 128, (5, 300)), signed_integers(rng, 300, 7)
    found = second_network.product(w, a)
    np.testing.assert_array_equal(found, w @ a)
    assert int(found[2, 3]) == sum(int(x) * int(y) for x, y in zip(w[2], a[:, 3], strict=True))


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_layers(both: Both, seed: int) -> None:
    """Every quantiser and every convolution, of numbers of all sizes."""
    net, other = both
    rng = np.random.default_rng(seed)
    for name, layer in net.named_modules():
        with torch.inference_mode():
            if isinstance(layer, Quantiser):
                x, signed = numbers(rng, len(layer.gain), 3, 5), layer.low < 0
                same(layer(tensor(x)), other.q(name, x, signed))
                t = 2.0 ** rng.integers(-9, 3, (len(layer.gain), 1, 1)) * rng.integers(128, 256)
                stood = second_network.f32(t)
                scale = torch.from_numpy(stood)
                same(
                    layer(tensor(x), scale), other.q(name, second_network.Scaled(x, stood), signed)
                )
            elif isinstance(layer, Convolution):
                a = signed_integers(rng, layer.weight.shape[1], 8, 12)
                product, theirs = layer(tensor(a)), other.conv(name, a, layer.stride)
                same(product[0], theirs.u)
                np.testing.assert_array_equal(product[1].numpy(), theirs.t)
                same(scaled(product), second_network.bf16(theirs.value))
                h = numbers(rng, *theirs.u.shape)
                same(plus(tensor(h), product), second_network.plus(h, theirs))


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(2.0**-8, 2.0**14))
def test_blocks(both: Both, seed: int, snr: float) -> None:
    net, other = both
    rng = np.random.default_rng(seed)
    row = net.embedding(torch.tensor([snr]))
    assert row.tolist() == [second_network.row_of(float(np.float32(snr)))]
    for name, layer in net.named_modules():
        if isinstance(layer, Block):
            h = numbers(rng, len(layer.q1.gain), 5, 4)
            with torch.inference_mode():
                same(layer(tensor(h), row), other.block(name, h, int(row)))


def test_rows() -> None:
    """Of a level's offsets: halfway between two noise levels."""
    snrs = [0.0, 2.0**-6, 2.0**-5.875, np.nextafter(2.0**-5.875, 1), 1.0, 2560.0, 2.0**12, 2.0**20]
    assert [second_network.row_of(float(s)) for s in snrs] == [0, 0, 0, 1, 24, 69, 72, 72]


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.sampled_from([(16, 16), (16, 48), (32, 16)]), st.floats(2.0**-6, 2.0**12))
def test_network(both: Both, seed: int, size: tuple[int, int], snr: float) -> None:
    """From end to end, of integers that no picture has."""
    net, other = both
    rng = np.random.default_rng(seed)
    h, w = size
    x = signed_integers(rng, 6, h, w)
    precision_map, whitened = (signed_integers(rng, 192, h // 8, w // 8) for _ in range(2))
    blocks = tensor(np.concatenate([precision_map, whitened]))
    with torch.inference_mode():
        ours = net(Inputs(tensor(x), blocks, torch.tensor([snr], dtype=torch.float64)))
    others = other(x, precision_map, whitened, snr)
    for mine, theirs in zip(ours, others, strict=True):
        assert mine.dtype == torch.float32
        same(mine, theirs)
