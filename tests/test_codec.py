"""The whole loop with an untrained network: what holds whatever the network says."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_codec.codec import chain, codec, nested
from ddpm_codec.codec import container as bitstream
from ddpm_codec.diffusion import transform
from ddpm_codec.errors import CutWarning, DamageWarning, FormatError, ModelError
from ddpm_codec.network.modelfile import Model, get_model, load_model
from ddpm_codec.network.tables import Ladder, laplace_tables
from ddpm_codec.rec import gaussian

KINDS = [("nested", "spectral"), ("nested", "isotropic"), ("gaussian", "isotropic")]
TIMESTEPS = (1000, 700, 500, 350, 250)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return get_model(tiny_model)


@pytest.fixture(scope="module")
def full(model: Model, picture: Image.Image) -> bytes:
    """All levels and the lossless layer."""
    return codec.encode(picture, model=model, lossless=True, seed=5)


@pytest.fixture(scope="module")
def pictures(model: Model, full: bytes) -> list[codec.Level]:
    """The picture of each level, and the exact one."""
    return list(codec.decode_levels(full, model=model))


def crop(im: Image.Image, width: int, height: int, mode: str) -> Image.Image:
    out = im.resize((width, height)).convert(mode)
    if mode in ("LA", "RGBA"):
        alpha = np.arange(width * height).reshape(height, width) % 256
        out.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return out


def quietly(data: bytes, model: Model, **how: Any) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return codec.decode(data, model=model, **how)


def ends(data: bytes) -> list[int]:
    return [level.end for level in bitstream.parse(data).levels]


def encode(im: Image.Image, model: Model, rec: str, path: str, **how: Any) -> bytes:
    ts = TIMESTEPS if rec == "gaussian" else None
    return codec.encode(im, model=model, rec=rec, path=path, timesteps=ts, **how)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


# --- Round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (1, 19), (33, 1), (40, 28)])
@pytest.mark.parametrize(("rec", "path"), KINDS)
def test_lossless_is_lossless(
    model: Model, picture: Image.Image, rec: str, path: str, size: tuple[int, int], mode: str
) -> None:
    im = crop(picture, *size, mode)
    data = encode(im, model, rec, path, lossless=True)
    out = codec.decode(data, model=model)
    assert (out.mode, out.size, out.tobytes()) == (mode, size, im.tobytes())
    about = out.info["ddpm"]
    assert (about["t"], about["bytes"], about["complete"]) == (0, len(data), True)
    assert about["snr"] == float("inf") and about["damage"] is None


@pytest.mark.parametrize(("rec", "path"), KINDS)
def test_both_ends_hold_the_same(model: Model, picture: Image.Image, rec: str, path: str) -> None:
    header = codec.make_header(picture, model, rec, path, 3, timesteps=TIMESTEPS)
    encoder = codec.Encoder(np.asarray(picture), header, model)
    decoder: codec._Decoder | None = None
    for i in range(header.levels):
        psnr = encoder.step()
        stream = bitstream.parse(encoder.bytes())
        assert stream.levels[-1].psnr == np.floor(4 * psnr) / 4
        decoder = decoder or codec._Decoder(stream, model, "cpu")
        decoder.stream = stream
        assert decoder.step() and decoder.level == i and not decoder.partial
        assert np.array_equal(encoder.chain.centres(), decoder.chain.centres())
        assert codec.psnr(np.asarray(picture), decoder.picture("mean", 0)) == psnr


def test_a_nested_file_ends_close_to_the_picture(model: Model, picture: Image.Image) -> None:
    # Noise of SNR 2560 on its own: 255 sigma / 2 = 2.5 grey levels.
    for path in ("spectral", "isotropic"):
        out = codec.decode(codec.encode(picture, model=model, path=path), model=model)
        assert codec.psnr(np.asarray(picture), np.asarray(out)) > 36


def test_psnr_rises_from_level_to_level(pictures: list[codec.Level], picture: Image.Image) -> None:
    found = [codec.psnr(np.asarray(picture), np.asarray(v.image)) for v in pictures]
    assert found == sorted(found) and found[-1] == pictures[-1].psnr == float("inf")
    for level, psnr in zip(pictures[:-1], found, strict=False):
        assert 0 <= psnr - level.psnr < 0.25


def test_ideal_bits(model: Model, picture: Image.Image) -> None:
    header = codec.make_header(picture, model, "nested", None, 0)
    encoder = codec.Encoder(np.asarray(picture), header, model)
    for _ in range(header.levels):
        encoder.step()
    bits = 8 * sum(v.nbytes for v in bitstream.parse(encoder.bytes()).levels)
    # A range coder may need up to two more words a level than the symbols.
    assert encoder.ideal_bits <= bits <= 1.01 * encoder.ideal_bits + 64 * header.levels


def test_arrays_are_pictures_too(model: Model, picture: Image.Image) -> None:
    one = codec.encode(picture, model=model, stop_at="t=500")
    assert codec.encode(np.asarray(picture), model=model, stop_at=500) == one


def test_metadata_on_request(model: Model, picture: Image.Image) -> None:
    im = picture.copy()
    im.info["icc_profile"] = b"a profile"
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    im.info["exif"] = exif.tobytes()
    how: dict[str, Any] = {"model": model, "stop_at": "t=500"}
    out = codec.decode(codec.encode(im, metadata=True, **how), model=model)
    assert out.info["icc_profile"] == b"a profile" and b"a camera" in out.info["exif"]
    assert codec.encode(im, **how) == codec.encode(picture, **how)


# --- Prefixes and damage -----------------------------------------------------------------------


@pytest.mark.parametrize(("rec", "path"), KINDS[::2])
def test_every_prefix_decodes(model: Model, picture: Image.Image, rec: str, path: str) -> None:
    data = encode(picture, model, rec, path, lossless=True)
    levels = list(codec.decode_levels(data, model=model))
    at = ends(data)
    rng = np.random.default_rng(1)
    near = {*at[::2], *(e - 1 for e in at[1::3]), *(e + 9 for e in at[::3])}
    cuts = near | set(rng.integers(0, len(data), 8).tolist())
    head = bitstream.parse(data).header_size
    for n in sorted(min(c, len(data)) for c in cuts):
        if n < head:
            with pytest.raises(FormatError):
                codec.decode(data[:n], model=model)
            continue
        out = quietly(data[:n], model)
        done = sum(e <= n for e in at)
        about = out.info["ddpm"]
        assert about["damage"] is None and about["bytes"] <= n
        assert about["t"] == (levels[done - 1].t if done else 1000)
        if about["bytes"] == at[done - 1] and done:
            assert out.tobytes() == levels[done - 1].image.tobytes()


def test_a_cut_is_said(model: Model, full: bytes) -> None:
    with pytest.warns(CutWarning, match=r"used [\d,]+ of [\d,]+ bytes"):
        codec.decode(full[: ends(full)[3] + 5], model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.decode(full[: ends(full)[3]], model=model)  # nothing in vain


def test_a_stop_that_is_not_reached_is_said(model: Model, full: bytes) -> None:
    t, psnr = bitstream.parse(full).header.ts[3], bitstream.parse(full).levels[3].psnr
    short = full[: ends(full)[3]]
    for beyond in (f"t={t - 1}", f"psnr={psnr + 20}"):
        with pytest.warns(CutWarning, match=f"the file ends before {beyond}"):
            codec.decode(short[:-1], model=model, stop_at=beyond)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reached in (f"t={t}", f"psnr={psnr}", "bpp=9", f"bytes={len(short) - 1}"):
            codec.decode(short, model=model, stop_at=reached)
        codec.decode(full, model=model, stop_at="t=0")


def falling(model: Model) -> Model:
    """Errors that differ from band to band, and for sums and differences of blocks."""
    tables = copy.deepcopy(model.tables)
    rate = np.add.outer(np.arange(192) / 40, np.arange(16) / 8)
    tables.error *= np.exp(-rate).astype(np.float32)
    return replace(model, tables=tables)


def arrived(of: chain.Chain, i: int, parts: int) -> Any:
    """M of the coefficients in the first parts of level i."""
    if isinstance(of, chain.Gaussian):
        groups = of.groups(i)
        here = groups.order[: groups.n[: groups.until(parts)].sum()]
        return transform.across(of.m, of.blocks).reshape(-1)[here]
    assert isinstance(of, chain.Nested)
    return np.where(of.cells.depth == i, of.centres(), 0)


@pytest.mark.parametrize(("rec", "path"), KINDS)
def test_what_arrived_of_a_level_is_right(
    model: Model, picture: Image.Image, rec: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rec == "gaussian":  # slow, so that the file is small: more places to cut it, then
        monkeypatch.setattr(nested, "CUT_SPACING", 16)
        model = falling(model)
    im = picture.resize((160, 112) if rec == "nested" else (64, 64))
    data = encode(im, model, rec, path, stop_at="t=240")
    stream = bitstream.parse(data)
    decoder = codec._Decoder(stream, model, "cpu")
    seen = 0
    for i, level in enumerate(stream.levels):
        forks, some = [], 0
        for received, cut in enumerate(level.cuts[:-1], 1):
            fork = decoder.chain.fork()
            fork.decode_level(i, decoder.estimate, level, received)
            # What follows a safe place does not matter.
            alone = decoder.chain.fork()
            short = codec.replace(level, payload=level.payload[: cut.nbytes])
            alone.decode_level(i, decoder.estimate, short, received)
            assert np.array_equal(alone.centres(), fork.centres())
            forks.append((cut.groups, arrived(fork, i, cut.groups)))
            assert received == 1 or len(np.flatnonzero(forks[-1][1])) > some
            some = len(np.flatnonzero(forks[-1][1]))
        assert decoder.step()
        for parts, centres in forks:
            whole = arrived(decoder.chain, i, parts)
            if rec == "nested":
                whole = np.where(centres == 0, 0, whole)
            assert len(whole) and np.allclose(whole, centres, atol=1e-12)
        seen += len(forks)
    assert seen >= 2


def test_an_unfinished_level_helps(model: Model, picture: Image.Image) -> None:
    im = picture.resize((96, 80))
    data = codec.encode(im, model=model, psnr=33.0)
    points = [p for p in bitstream.safe_points(data, bitstream.parse(data)) if p[1] == 7]
    assert len(points) > 2
    found = []
    for offset, _, _ in points[::2]:
        out = quietly(data[:offset], model)
        assert out.info["ddpm"]["bytes"] == offset
        found.append(codec.psnr(np.asarray(im), np.asarray(out)))
    assert found[-1] > found[0]


def test_an_unfinished_level_is_between_two(
    model: Model, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the logarithm of its SNR as far on the way as the level's bytes are."""
    asked: list[float] = []
    ask = chain.Chain.ask

    def listen(self: chain.Chain, m: Any, precision: object, snr: float) -> chain.Estimate:
        asked.append(snr)
        return ask(self, m, precision, snr)

    monkeypatch.setattr(chain.Chain, "ask", listen)
    data = codec.encode(picture.resize((96, 80)), model=model, stop_at="t=9")
    stream = bitstream.parse(data)
    offset, i, cut = list(bitstream.safe_points(data, stream))[-3]
    assert cut and cut.groups < bitstream.GROUPS
    asked.clear()
    quietly(data[:offset], model)
    snrs = stream.header.snrs
    assert asked[:-1] == snrs[:i]
    share = cut.nbytes / stream.levels[i].nbytes
    assert asked[-1] == pytest.approx(snrs[i - 1] * 4**share)


@pytest.mark.parametrize("i", [1, 4, 8])
@pytest.mark.parametrize("recon", ["mean", "sample"])
def test_damage_after_a_level(
    model: Model, full: bytes, pictures: list[codec.Level], i: int, recon: codec.Recon
) -> None:
    level = bitstream.parse(full).levels[i]
    for at in (level.start - 4, level.start + 1):  # in its head, in its payload
        with pytest.warns(DamageWarning, match=f"after {ends(full)[i - 1]} good bytes"):
            out = codec.decode(flip(full, at), model=model, recon=recon)
        assert out.info["ddpm"]["t"] == pictures[i - 1].t
        assert out.info["ddpm"]["damage"]
        if recon == "mean":
            assert out.tobytes() == pictures[i - 1].image.tobytes()


def test_damage_in_the_lossless_layer(
    model: Model, full: bytes, pictures: list[codec.Level]
) -> None:
    with pytest.warns(DamageWarning, match="checksum mismatch"):
        out = codec.decode(flip(full, len(full) - 9), model=model)
    assert out.tobytes() == pictures[-2].image.tobytes()


def test_a_forged_lossless_layer(model: Model, full: bytes, pictures: list[codec.Level]) -> None:
    layer = bitstream.parse(full).residual
    assert layer
    start = ends(full)[-1]
    for forged in (
        b"",
        layer[:1],
        layer[:2] + bytes(40),
        flip(layer, 0),
        flip(layer, 9),
        layer[:60],
    ):
        data = full[:start] + bitstream.write_blob(forged)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            out = codec.decode(data, model=model)
        if out.info["ddpm"]["t"]:
            assert [w.category for w in seen] == [DamageWarning]
            assert out.tobytes() == pictures[-2].image.tobytes()


def test_forged_payloads_raise_nothing_else(model: Model, full: bytes) -> None:
    """Whatever the symbols are, checksums being right."""
    stream = bitstream.parse(full)
    rng = np.random.default_rng(0)
    for i in (0, 0, 0, 3, 3, 3, 8, 8):
        level = stream.levels[i]
        level.payload = rng.bytes(level.nbytes)
        level.cuts = [bitstream.Cut(bitstream.GROUPS, level.nbytes, bitstream.crc16(level.payload))]
        before = full[: ends(full)[i - 1] if i else stream.header_size]
        record = bitstream.write_level(level, before=bitstream.crc16(before))
        out = quietly(before + record, model)
        assert out.size == (40, 28)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_damaged_alpha(model: Model, picture: Image.Image, mode: str) -> None:
    im = crop(picture, 40, 28, mode)
    header = codec.make_header(im, model, "nested", None, 0)
    for alpha in (b"", b"no zlib", header.alpha[:-8]):
        data = bitstream.write_header(codec.replace(header, alpha=alpha))
        with pytest.raises(FormatError, match="alpha"):
            codec.decode(data, model=model)


def test_the_wrong_model(model: Model, full: bytes, tiny_model: Path) -> None:
    other = Model("other", model.net, model.tables, model.ladder, bytes(32))
    with pytest.raises(ModelError, match="not with other"):
        codec.decode(full, model=other)
    with pytest.raises(ModelError, match="which is not installed"):
        codec.decode(full)
    header = codec.replace(bitstream.parse(full).header, levels=5)
    with pytest.raises(FormatError, match="levels"):
        codec.decode(bitstream.write_header(header), model=model)


# --- Targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "stop"),
    [({"nbytes": n}, f"bytes={n}") for n in (1, 60, 300, 900, 10**6)]
    + [({"bpp": b}, f"bpp={b}") for b in (0.5, 2.0, 6.0)]
    + [({"stop_at": t}, t) for t in ("t=1000", "t=500", "t=77", "t=1")],
)
def test_encode_stops_where_truncate_does(
    model: Model, picture: Image.Image, how: dict[str, Any], stop: str
) -> None:
    whole = codec.encode(picture, model=model)
    data = codec.encode(picture, model=model, **how)
    assert data == bitstream.truncate(whole, stop_at=stop)
    assert data == bitstream.truncate(whole, **how)
    out = codec.decode(data, model=model)
    assert out.tobytes() == codec.decode(whole, model=model, stop_at=stop).tobytes()
    kind, _, value = stop.partition("=")
    if kind == "bytes" and int(value) > 100:
        assert len(data) <= int(value)
    if kind == "t":
        assert out.info["ddpm"]["t"] >= int(value)


def test_encode_does_no_more_than_asked(
    model: Model, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    codec.encode(picture, model=model, stop_at="t=300", progress=lambda *v: calls.append(v))
    ts = bitstream.info(codec.encode(picture, model=model))["levels"]
    assert calls == [(i + 1, 9) for i in range(sum(v["t"] >= 300 for v in ts))]


@pytest.mark.parametrize("value", [15.0, 22.3, 30.1])
def test_psnr_target_is_reached_and_hardly_more(
    model: Model, picture: Image.Image, value: float
) -> None:
    im = picture.resize((120, 84))
    data = codec.encode(im, model=model, psnr=value)
    assert codec.psnr(np.asarray(im), np.asarray(quietly(data, model))) >= value
    stream = bitstream.parse(data)
    points = [o for o, _, _ in bitstream.safe_points(data, stream)]
    assert points[-1] == len(data)
    shorter = quietly(data[: points[-2]], model)
    assert codec.psnr(np.asarray(im), np.asarray(shorter)) < value


def test_decode_stops_at_a_stored_psnr(
    model: Model, full: bytes, pictures: list[codec.Level]
) -> None:
    for level in pictures[:-1]:
        out = codec.decode(full, model=model, stop_at=f"psnr={level.psnr}")
        assert out.info["ddpm"]["bytes"] <= level.nbytes
    assert codec.decode(full, model=model, stop_at="psnr=90").info["ddpm"]["t"] == 0


@pytest.mark.parametrize(
    "how",
    [{"bpp": 1.0, "nbytes": 4}, {"lossless": True, "psnr": 30.0}, {"rec": "x"}, {"path": "x"},
     {"rec": "gaussian", "path": "spectral"}, {"seed": -1}, {"seed": 2**32}, {"stop_at": "bpp=1"},
     {"stop_at": "soon"}, {"rec": "gaussian", "timesteps": (1, 2)}],
)  # fmt: skip
def test_arguments_that_make_no_sense(
    model: Model, picture: Image.Image, how: dict[str, Any]
) -> None:
    with pytest.raises(ValueError):
        codec.encode(picture, model=model, **how)


# --- As bytes arrive ---------------------------------------------------------------------------


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[a : a + size] for a in range(0, len(data), size))


@pytest.mark.parametrize("how", [lambda d: pieces(d, 37), io.BytesIO, lambda d: pieces(d, 10**6)])
def test_decode_levels(
    model: Model, full: bytes, pictures: list[codec.Level], how: Callable[[bytes], Any]
) -> None:
    got = list(codec.decode_levels(how(full), model=model))
    assert [v.t for v in got] == [*bitstream.parse(full).header.ts, 0]
    assert [v.nbytes for v in got] == [*ends(full), len(full)]
    assert all(v.complete for v in got)
    for a, b in zip(got, pictures, strict=True):
        assert a.image.tobytes() == b.image.tobytes()


def test_levels_come_as_soon_as_they_can(model: Model, full: bytes) -> None:
    given = 0

    def feed() -> Iterator[bytes]:
        nonlocal given
        for piece in pieces(full, 16):
            given += len(piece)
            yield piece

    for level in codec.decode_levels(feed(), model=model):
        assert level.nbytes <= given < level.nbytes + 16


def test_decode_levels_of_a_cut_file(model: Model, picture: Image.Image, full: bytes) -> None:
    data = codec.encode(picture.resize((160, 112)), model=model)
    points = list(bitstream.safe_points(data, bitstream.parse(data)))
    offset, i, _ = next(p for p in points if p[1] >= 5 and p[2] and p[2].groups < bitstream.GROUPS)
    got = list(codec.decode_levels(pieces(data[: offset + 3], 500), model=model))
    assert [v.complete for v in got] == [True] * i + [False]
    assert got[-1].nbytes == offset
    assert got[-1].image.tobytes() == quietly(data[:offset], model).tobytes()
    with pytest.raises(FormatError):
        list(codec.decode_levels(pieces(full[:20], 3), model=model))
    with pytest.warns(DamageWarning):
        damaged = list(codec.decode_levels(flip(full, ends(full)[4] - 1), model=model))
    assert len(damaged) == 4


# --- Other pictures from the same bits ---------------------------------------------------------


@pytest.mark.parametrize(("rec", "path"), KINDS[::2])
def test_sample_and_flow(model: Model, picture: Image.Image, rec: str, path: str) -> None:
    data = encode(picture, model, rec, path)
    some = data[: ends(data)[2]]

    def made(recon: codec.Recon, seed: int = 0, data: bytes = some) -> bytes:
        return quietly(data, model, recon=recon, seed=seed).tobytes()

    assert made("sample", 1) == made("sample", 1) != made("sample", 2)
    assert made("flow", 1) == made("flow", 2)
    assert len({made("mean"), made("flow"), made("sample")}) == 3
    # With nothing left to add, all three are the same; with nothing to start from, all can be had.
    assert made("mean", data=data) == made("flow", data=data) == made("sample", data=data)
    head = data[: bitstream.parse(data).header_size]
    assert made("sample", 1, head) != made("sample", 2, head)
    assert made("flow", data=head) == made("mean", data=head)
    # From the last complete level: the rest of a cut file is left alone.
    assert made("sample", 1, data[: ends(data)[2] + 20]) == made("sample", 1)


def test_sample_of_a_lossless_file_is_exact(
    model: Model, full: bytes, picture: Image.Image
) -> None:
    assert codec.decode(full, model=model, recon="sample").tobytes() == picture.tobytes()
    with pytest.raises(ValueError, match="recon"):
        codec.decode(full, model=model, recon="median")  # type: ignore[arg-type]


def test_samples_at_each_level(model: Model, full: bytes) -> None:
    whole = full[: ends(full)[-1]]
    for recon in ("sample", "flow"):
        for level in itertools.islice(codec.decode_levels(whole, model=model, recon=recon), 4):
            one = codec.decode(whole[: level.nbytes], model=model, recon=recon)
            assert level.image.tobytes() == one.tobytes()


# --- Agreement ---------------------------------------------------------------------------------


def test_tiles(model: Model, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    im = picture.resize((70, 50))
    alone = codec.encode(im, model=model, lossless=True)
    monkeypatch.setattr(chain, "TILE", 32)
    monkeypatch.setattr(chain, "OVERLAP", 0)
    data = codec.encode(im, model=model, lossless=True)
    assert data != alone
    mean = codec.decode(data[: ends(data)[-1]], model=model)
    before = chain.tiles
    assert len(list(before(9, 13))) == 12
    monkeypatch.setattr(chain, "tiles", lambda *size: reversed(list(before(*size))))
    assert codec.decode(data, model=model).tobytes() == im.tobytes()
    assert codec.decode(data[: ends(data)[-1]], model=model).tobytes() == mean.tobytes()


@pytest.mark.parametrize("backwards", [False, True])
def test_every_tile_sees_m(model: Model, monkeypatch: pytest.MonkeyPatch, backwards: bool) -> None:
    """Estimates take the place of M while tiles beside them still look at it."""
    monkeypatch.setattr(chain, "TILE", 16)
    monkeypatch.setattr(chain, "OVERLAP", 16)
    header = codec.make_header(Image.new("RGB", (70, 90)), model, "nested", None, 0)
    ours = chain.Nested(header, model)
    tiles = list(chain.tiles(*ours.blocks))
    assert len({rows.start for rows, *_ in tiles}) > 4
    if backwards:
        monkeypatch.setattr(chain, "tiles", lambda *_: reversed(tiles))
    m = np.random.default_rng(0).normal(size=(192, *ours.blocks)).astype(np.float32)

    def precision(rows: slice, columns: slice) -> np.ndarray[Any, Any]:
        return np.full(m[:, rows, columns].shape, 3, np.float32)

    got = ours.ask(m.reshape(192, -1).copy(), precision, 3.0)
    for rows, columns, inner_rows, inner_columns in tiles:
        known = torch.from_numpy(precision(rows, columns)[None])
        seen = torch.from_numpy(m[None, :, rows, columns]).double()
        with torch.inference_mode():
            expected = chain.eps_hat(
                model.net, chain.State(seen, known, torch.tensor([3.0])), model.net.cfg.prediction
            )
        for whole, part in zip((got.eps, got.lam), expected, strict=True):
            mine = whole.reshape(m.shape)[:, rows, columns][:, inner_rows, inner_columns]
            np.testing.assert_array_equal(mine, part[0, :, inner_rows, inner_columns].float())


@pytest.mark.parametrize("size", [(1, 1), (9, 13), (128, 300)])
def test_tiles_cover_once(size: tuple[int, int]) -> None:
    count = np.zeros(size, int)
    for rows, columns, inner_rows, inner_columns in chain.tiles(*size):
        count[rows, columns][inner_rows, inner_columns] += 1
    assert (count == 1).all()


def test_threads(model: Model, picture: Image.Image) -> None:
    before = torch.get_num_threads()
    try:
        files = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            files.append(codec.encode(picture, model=model, lossless=True))
        torch.set_num_threads(1)
        assert codec.decode(files[1], model=model).tobytes() == picture.tobytes()
    finally:
        torch.set_num_threads(before)
    # The same integers; at the margins another machine may note another few.
    assert [v.agreed for v in bitstream.parse(files[0]).levels] == [
        v.agreed for v in bitstream.parse(files[1]).levels
    ]


def test_double_precision_reads_the_same_integers(
    tiny_model: Path, model: Model, full: bytes, pictures: list[codec.Level]
) -> None:
    double = load_model(tiny_model, dtype=torch.float64)
    got = list(codec.decode_levels(full, model=double))
    assert len(got) == len(pictures) and got[-1].image.tobytes() == pictures[-1].image.tobytes()
    for a, b in zip(got, pictures, strict=True):
        assert codec.psnr(np.asarray(a.image), np.asarray(b.image)) > 50
    chains = [codec._Decoder(bitstream.parse(full), m, "cpu").run().chain for m in (model, double)]
    assert np.array_equal(chains[0].centres(), chains[1].centres())


def disturb(monkeypatch: pytest.MonkeyPatch, eps: float, lam: float, after: int = 0) -> None:
    """From the ``after``-th evaluation on, a network that is off by up to so much."""
    honest = chain.eps_hat
    rng = np.random.default_rng(0)
    calls = itertools.count()

    def dishonest(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = honest(*args)
        if next(calls) < after:
            return out
        noise = [torch.from_numpy(rng.uniform(-1, 1, out[0].shape)) for _ in range(2)]
        return out[0] + eps * noise[0], out[1] + lam * noise[1]

    monkeypatch.setattr(chain, "eps_hat", dishonest)


def test_noise_within_the_margin_changes_no_integer(
    model: Model, full: bytes, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    margin = 0.9 * float(model.tables.margin.min())
    disturb(monkeypatch, margin, margin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codec.decode(full, model=model).tobytes() == picture.tobytes()


@pytest.mark.parametrize(("eps", "lam"), [(1e-2, 0.0), (0.0, 1e-2), (0.3, 0.3), (1e-3, 1e-3)])
@pytest.mark.parametrize("after", [0, 3])
def test_noise_beyond_the_margin_is_noticed(
    model: Model, full: bytes, pictures: list[codec.Level], monkeypatch: pytest.MonkeyPatch,
    eps: float, lam: float, after: int,
) -> None:  # fmt: skip
    disturb(monkeypatch, eps, lam, after)
    with pytest.warns(DamageWarning, match="arithmetic differs"):
        out = codec.decode(full, model=model)
    about = out.info["ddpm"]
    i = [level.t for level in pictures].index(about["t"])
    assert i >= after and about["bytes"] == ends(full)[i]
    if eps <= 1e-2:
        other = np.asarray(pictures[i].image)
        assert codec.psnr(np.asarray(out), other) > 30


def test_noise_beyond_the_margin_in_the_lossless_layer(
    model: Model, full: bytes, pictures: list[codec.Level], monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, 0.05, 0.0, after=8)  # the last evaluation gives the rounded picture
    with pytest.warns(DamageWarning, match="lossless layer"):
        out = codec.decode(full, model=model)
    assert codec.psnr(np.asarray(out), np.asarray(pictures[-2].image)) > 40


# --- Models of the paper's kind -------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (40, 28), (70, 33)])
def test_model_without_precisions(small_model: Path, picture: Image.Image, size: Any) -> None:
    """Gaussian and isotropic by default; larger pictures go through it in tiles."""
    im = picture.resize(size)
    given = {"gaussian": None, "nested": "nested"}
    for rec, asked in given.items():
        stop = {"stop_at": "t=300"} if rec == "gaussian" else {"lossless": True}
        data = codec.encode(im, model=small_model, rec=asked, **stop)  # type: ignore[arg-type]
        about = bitstream.info(data)
        assert (about["rec"], about["path"]) == (rec, "isotropic")
        out = codec.decode(data, model=small_model)
        assert out.size == size
        if rec == "nested":
            assert out.tobytes() == im.tobytes()


def test_model_without_precisions_refuses_the_spectral_path(
    small_model: Path, picture: Image.Image
) -> None:
    with pytest.raises(ModelError, match="isotropic path only"):
        codec.encode(picture, model=small_model, rec="nested", path="spectral")


def test_layout_of_a_gaussian_level(small_model: Path) -> None:
    """All coefficients once, the larger first; a gain for each share of information."""
    model = falling(get_model(small_model))
    counts = set()
    for mode, bands in (("RGB", 192), ("L", 64)):
        for size in (8, 32, 96, 512):
            header = codec.make_header(
                Image.new(mode, (size, size)), model, "gaussian", None, 0, timesteps=(900, 500, 5)
            )
            ours = chain.Gaussian(header, model)
            for i in range(3):
                groups = ours.groups(i)
                assert np.array_equal(np.sort(groups.order), np.arange(bands * ours.n))
                error = model.tables.error_at(model.ladder, ours.precision_before(i))
                error = np.column_stack([error, error.mean(1)])[:bands, ours.place].reshape(-1)
                of_groups = np.split(error[groups.order], np.cumsum(groups.n)[:-1])
                assert np.all(np.diff(groups.error) < 0) and len(of_groups) >= 5
                for expected, of in zip(groups.error, of_groups, strict=True):
                    assert of.max() < 1.4143 * of.min() and of.min() <= expected * (1 + 1e-4)
                assert groups.until(0) == 0 and groups.until(bitstream.GROUPS) == len(groups.n)
                layout, share = ours.layout(i, groups)
                count = int(share[-1]) + 1
                assert share[0] == 0 and set(np.diff(share)) <= {0, 1} and layout.n.sum() > 0
                told = np.bincount(share, gaussian.information(layout.v) * layout.n) / 2**20
                assert count == 1 or np.median(told) > chain.GAIN_SHARE / 2
                counts.add(count)
                gains = [chain.UNITY + 2 * (k % 2) for k in range(count)]
                scaled, same = ours.layout(i, groups, gains)
                assert np.array_equal(same, share)
                np.testing.assert_array_equal(scaled.v, layout.v * (1 + share % 2))
    assert 1 in counts and max(counts) > 8


@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
def test_a_gaussian_level_observes_through_the_noise_it_says(
    small_model: Path, scale: float
) -> None:
    """Whatever the picture's energy: M is c and noise of variance 1 / SNR, no more."""
    model, rng = get_model(small_model), np.random.default_rng(0)
    header = codec.make_header(
        Image.new("RGB", (64, 64)), model, "gaussian", None, 0, timesteps=(400, 100)
    )
    ours = chain.Gaussian(header, model)
    ours.mean = lambda estimate: ours.m.astype(np.float32)  # type: ignore[method-assign]
    for i in range(2):
        # Not of one picture: only this level's noise is of interest.
        error = model.error_at(ours.precision_before(i))[:, None]
        c = ours.m + rng.laplace(0, scale, ours.m.shape) * error**0.5
        before, ours.c = ours.m.copy(), c
        level, bits = ours.encode_level(i, None)
        assert len(level.payload) == pytest.approx(bits / 8, abs=4)
        told = (ours.snrs[i] * ours.m - ours.precision_before(i) * before) / ours.precision_of(i)
        noise = (told - c) * np.sqrt(ours.precision_of(i))
        assert noise.var() == pytest.approx(1, abs=0.1)
        assert abs(np.corrcoef(noise.ravel(), c.ravel())[0, 1]) < 0.1


def test_gains() -> None:
    rng = np.random.default_rng(0)
    for count, before in ((1, 0), (2, 31), (24, chain.UNITY)):
        gains = rng.integers(0, len(chain.GAINS), count).tolist()
        bits = chain.write_gains(gains, before)
        assert chain.read_gains(np.append(bits, [1, 1, 0]).astype(np.uint8), count, before) == (
            gains, len(bits),
        )  # fmt: skip
        for end in range(len(bits)):
            with pytest.raises(FormatError, match="gains"):
                chain.read_gains(bits[:end], count, before)
    assert chain.write_gains([9, 10, 8], 9).tolist() == [0, 1, 0, 1, 1, 1, 1, 0]
    for outside, before in (("10", 31), ("110", 0), ("1" * 200, 9)):
        with pytest.raises(FormatError, match="gains"):
            chain.read_gains(np.array([int(c) for c in outside], np.uint8), 1, before)
    assert chain.GAINS[chain.UNITY] == 1.0


def test_expected_errors_between_levels() -> None:
    """Exact for a Gaussian source, whose error is 1 / (1 / v + SNR)."""
    ladder = Ladder()
    tables = laplace_tables(ladder)
    v = np.geomspace(1e-3, 10, 192 * 16).reshape(192, 16)
    tables.error[:] = 1 / (1 / v + np.array([0.0, *ladder.snrs])[:, None, None])
    for snr in (0.0, 0.01, 0.04, 1.0, 77.7, 2560.0):
        np.testing.assert_allclose(tables.error_at(ladder, snr), 1 / (1 / v + snr), rtol=1e-5)
    np.testing.assert_allclose(tables.error_at(ladder, 1e6), tables.error[-1])
