"""Files to pictures, with an untrained network: properties that hold for any network."""

from __future__ import annotations

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

from ddpm_codec.codec import chain, container
from ddpm_codec.codec.decoder import Decoder, Level, Recon, decode, decode_levels
from ddpm_codec.codec.encoder import encode, psnr
from ddpm_codec.codec.header import write_header
from ddpm_codec.codec.image import alpha_to_bytes
from ddpm_codec.errors import CutWarning, DamageWarning, FormatError, LimitError, ModelError
from ddpm_codec.network import tiles
from ddpm_codec.network.exact import ExactUNet
from ddpm_codec.network.modelfile import Model, get_model, load_model

KINDS = ["spectral", "isotropic", "paper"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return get_model(tiny_model)


@pytest.fixture(scope="module")
def full(model: Model, picture: Image.Image) -> bytes:
    """Nine levels and the lossless layer."""
    return encode(picture, model=model, steps=9, effort=1, lossless=True, seed=5)


@pytest.fixture(scope="module")
def pictures(model: Model, full: bytes) -> list[Level]:
    """The picture of each level, and the exact one."""
    return list(decode_levels(full, model=model))


@pytest.fixture(scope="module")
def files(model: Model, small_model: Path, picture: Image.Image) -> dict[str, tuple[bytes, Model]]:
    """One of each kind, and its model."""
    small, out = get_model(small_model), {}
    for kind in KINDS:
        used, path = (small, None) if kind == "paper" else (model, kind)
        out[kind] = encode(picture, model=used, path=path, steps=5, effort=1, tune="even"), used
    return out


def quietly(data: bytes, model: Model, **how: Any) -> Image.Image:
    """Decode and ignore warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode(data, model=model, **how)


def silently(data: bytes, model: Model, **how: Any) -> Image.Image:
    """Decode; any warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return decode(data, model=model, **how)


def ends(data: bytes) -> list[int]:
    """Offsets of the levels' ends."""
    return [level.end for level in container.parse(data).levels]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


# --- Prefixes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sealed", [False, True])
def test_every_prefix_decodes(
    files: dict[str, tuple[bytes, Model]], picture: Image.Image, kind: str, sealed: bool
) -> None:
    """Cut blindly or by container.cut. More bytes never make the picture much worse."""
    data, model = files[kind]
    levels = list(decode_levels(data, model=model))
    at, head = ends(data), container.parse(data).header_size
    rng = np.random.default_rng(1)
    cuts = {head, *at, *(e - 1 for e in at), *(e + 9 for e in at)}
    cuts |= set(rng.integers(head, len(data), 6).tolist())
    best = found = 0.0
    for n in sorted(min(c, len(data)) for c in cuts):
        out = quietly(container.cut(data, n) if sealed else data[:n], model)
        done = sum(e <= n for e in at)
        about = out.info["ddpm"]
        assert about["damage"] is None and about["bytes"] <= n
        assert about["t"] == (levels[done - 1].t if done else 1000)
        assert about["complete"] == (done == 5)
        if about["bytes"] == at[done - 1] and done:
            assert out.tobytes() == levels[done - 1].image.tobytes()
        found = psnr(np.asarray(picture), np.asarray(out))
        # At first the estimate of an untrained network is worse than plain grey.
        if done > 1:
            assert found > best - 1.0
            best = max(best, found)
    assert found > max(best - 0.1, 30)


@pytest.mark.parametrize("n", [0, 3, 6, 20])
def test_less_than_a_header(model: Model, full: bytes, n: int) -> None:
    with pytest.raises(FormatError):
        decode(full[:n], model=model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_in_part_is_between_its_neighbours(
    files: dict[str, tuple[bytes, Model]], picture: Image.Image, kind: str
) -> None:
    data, model = files[kind]
    stream = container.parse(data)
    truth = np.asarray(picture)
    for i in (3, 4):
        level = stream.levels[i]
        low, high = (
            psnr(truth, np.asarray(quietly(data[:end], model))) for end in ends(data)[i - 1 : i + 1]
        )
        found = []
        for share in (0.3, 0.6, 0.9):
            n = level.offset(int(share * level.nbytes))
            out = quietly(container.cut(data, n), model)
            about = out.info["ddpm"]
            assert ends(data)[i - 1] <= about["bytes"] <= n and not about["complete"]
            assert about["t"] == stream.header.ts[i - 1]
            found.append(psnr(truth, np.asarray(out)))
        assert low - 1 < found[0] and found[0] < found[2] < high + 0.5
        assert found[2] > low + 0.3 * (high - low) or kind == "paper"


def test_what_a_cut_uses(model: Model, full: bytes) -> None:
    """The bytes up to the last coefficient that has arrived with its checksum."""
    a, b = ends(full)[5:7]
    for n in (a + 80, b - 3):
        assert a < quietly(container.cut(full, n), model).info["ddpm"]["bytes"] <= n
        # Without a checksum a level's unfinished last kilobyte does not count.
        assert quietly(full[:n], model).info["ddpm"]["bytes"] == a


def test_a_cut_is_reported(model: Model, full: bytes) -> None:
    with pytest.warns(CutWarning, match=r"used [\d,]+ of [\d,]+ bytes"):
        decode(full[: ends(full)[3] + 5], model=model)
    silently(full[: ends(full)[3]], model)  # all bytes are used
    silently(container.cut(full, ends(full)[3] + 80), model)  # all that could be


def test_a_stop_that_is_not_reached_is_reported(model: Model, full: bytes) -> None:
    t, stored = container.parse(full).header.ts[3], container.parse(full).levels[3].psnr
    short = full[: ends(full)[3]]
    for beyond in (f"t={t - 1}", f"psnr={stored + 20}"):
        with pytest.warns(CutWarning, match=f"the file ends before {beyond}"):
            decode(short[:-1], model=model, stop_at=beyond)
    for reached in (f"t={t}", f"psnr={stored}", "bpp=9", f"bytes={len(short) - 1}"):
        silently(short, model, stop_at=reached)
    silently(full, model, stop_at="t=0")


def test_stops(model: Model, full: bytes, pictures: list[Level]) -> None:
    for level in pictures[:-1]:
        out = silently(full, model, stop_at=f"psnr={level.psnr}")
        assert out.info["ddpm"]["bytes"] <= level.bytes
        out = silently(full, model, stop_at=f"t={level.t}")
        assert out.tobytes() == level.image.tobytes()
    assert silently(full, model, stop_at="psnr=90").info["ddpm"]["t"] == 0
    with pytest.raises(ValueError, match="stop"):
        decode(full, model=model, stop_at="soon")


def test_quality_rises_from_level_to_level(pictures: list[Level], picture: Image.Image) -> None:
    found = [psnr(np.asarray(picture), np.asarray(v.image)) for v in pictures]
    assert found[1:] == sorted(found[1:]) and found[-1] == pictures[-1].psnr == float("inf")
    snrs = [v.snr for v in pictures]
    assert snrs == sorted(snrs) and snrs[-2:] == [2560.0, float("inf")]


# --- Damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", [1, 4, 8])
@pytest.mark.parametrize("recon", ["mean", "sample"])
def test_damage_after_a_level(
    model: Model, full: bytes, pictures: list[Level], i: int, recon: Recon
) -> None:
    level = container.parse(full).levels[i]
    for at in (level.start - 1, level.start + 1):  # in its head, in its payload
        with pytest.warns(DamageWarning, match=f"after {ends(full)[i - 1]} good bytes"):
            out = decode(flip(full, at), model=model, recon=recon)
        assert out.info["ddpm"]["t"] == pictures[i - 1].t
        assert out.info["ddpm"]["damage"]
        if recon == "mean":
            assert out.tobytes() == pictures[i - 1].image.tobytes()


def test_damage_in_the_lossless_layer(model: Model, full: bytes, pictures: list[Level]) -> None:
    with pytest.warns(DamageWarning, match="checksum mismatch"):
        out = decode(flip(full, len(full) - 9), model=model)
    assert out.tobytes() == pictures[-2].image.tobytes()


def rebuilt(data: bytes, levels: int, payload: bytes | None = None) -> container.Writer:
    """The first levels of a file and perhaps another payload, with right checksums."""
    stream = container.parse(data)
    writer = container.Writer(stream.header)
    for level in stream.levels[:levels]:
        writer.level(level.psnr, bytes(level.payload))
    if payload:
        writer.level(20.0, payload)
    return writer


def test_a_forged_lossless_layer(model: Model, full: bytes, pictures: list[Level]) -> None:
    layer = container.parse(full).extras["residual"]
    for forged in (b"", layer[:1], layer[:2] + bytes(40), flip(layer, 0), flip(layer, 9)):
        writer = rebuilt(full, 9)
        writer.extra("residual", forged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = decode(writer.file(), model=model)
        if out.info["ddpm"]["t"]:
            assert [w.category for w in caught] == [DamageWarning]
            assert out.tobytes() == pictures[-2].image.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_forged_payloads_raise_no_error(files: dict[str, tuple[bytes, Model]], kind: str) -> None:
    """Any bits with right checksums decode to some picture."""
    data, model = files[kind]
    stream = container.parse(data)
    rng = np.random.default_rng(0)
    for i in (0, 1, 3):
        size = stream.levels[i].nbytes
        for payload in (rng.bytes(size), bytes(size), b"\xff" * size, rng.bytes(3 * size)):
            out = quietly(rebuilt(data, i, payload).file(), model)
            assert out.size == (40, 28)


def test_faults_of_a_level_are_reported(model: Model, full: bytes) -> None:
    with pytest.warns(DamageWarning, match="damaged .level 4: this machine's arithmetic"):
        decode(rebuilt(full, 4, b"\x00" * 90).file(), model=model)
    payload = bytes(container.parse(full).levels[4].payload)
    with pytest.warns(DamageWarning, match="level 4: longer than its messages"):
        out = decode(rebuilt(full, 4, payload + b"abc").file(), model=model)
    assert out.info["ddpm"]["t"] == container.parse(full).header.ts[3]


def test_missing_and_damaged_alpha(model: Model, picture: Image.Image, full: bytes) -> None:
    """Without a sound alpha plane the picture is opaque."""
    header = replace(container.parse(full).header, mode="RGBA")
    alpha = np.arange(28 * 40).reshape(28, 40).astype(np.uint8)
    good = alpha_to_bytes(alpha)

    def file(extra: bytes | None) -> bytes:
        writer = container.Writer(header)
        if extra is not None:
            writer.extra("alpha", extra)
        return writer.file()

    np.testing.assert_array_equal(np.asarray(silently(file(good), model))[..., 3], alpha)
    assert (np.asarray(silently(file(None), model))[..., 3] == 255).all()
    for bad in (b"", b"no zlib", good[:-8], alpha_to_bytes(alpha[1:])):
        with pytest.warns(DamageWarning, match="alpha"):
            out = decode(file(bad), model=model)
        assert "alpha" in out.info["ddpm"]["damage"]
        assert (np.asarray(out)[..., 3] == 255).all()


def test_the_wrong_model(model: Model, full: bytes) -> None:
    other = Model("other", model.net, model.tables, model.ladder, bytes(32))
    with pytest.raises(ModelError, match="not with other"):
        decode(full, model=other)
    with pytest.raises(ModelError, match="which is not installed"):
        decode(full)
    header = replace(container.parse(full).header, finest=2559)
    with pytest.raises(FormatError, match="levels"):
        decode(write_header(header), model=model)


def test_too_large_a_picture(model: Model, full: bytes) -> None:
    header = replace(container.parse(full).header, width=60_000, height=60_000)
    with pytest.raises(LimitError, match="60000x60000 pixels"):
        decode(write_header(header), model=model)


# --- As bytes arrive ---------------------------------------------------------------------------


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[a : a + size] for a in range(0, len(data), size))


@pytest.mark.parametrize("how", [lambda d: pieces(d, 37), io.BytesIO, lambda d: pieces(d, 10**6)])
def test_decode_levels(
    model: Model, full: bytes, pictures: list[Level], how: Callable[[bytes], Any]
) -> None:
    got = list(decode_levels(how(full), model=model))
    assert [v.t for v in got] == [*container.parse(full).header.ts, 0]
    assert [v.bytes for v in got] == [*ends(full), len(full)]
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

    for level in decode_levels(feed(), model=model):
        assert level.bytes <= given < level.bytes + 16


def test_levels_end_at_one_that_cannot_be_decoded(model: Model, full: bytes) -> None:
    """What comes after it is not waited for."""
    bad = rebuilt(full, 3, bytes(90)).file()

    def feed() -> Iterator[bytes]:
        yield from pieces(bad, 16)
        pytest.fail("asked for more")

    with pytest.warns(DamageWarning):
        got = list(decode_levels(feed(), model=model))
    assert [v.complete for v in got if v.complete] == [True] * 3


def test_levels_up_to_a_stop_point(model: Model, full: bytes, pictures: list[Level]) -> None:
    """Those of the file that truncate() makes."""
    for stop in (f"t={pictures[2].t}", f"psnr={pictures[2].psnr}", f"bytes={pictures[2].bytes}"):
        got = list(decode_levels(pieces(full, 50), stop_at=stop, model=model))
        assert [v.bytes for v in got] == [v.bytes for v in pictures[: len(got)]]
        assert len(got) == 3 or (stop.startswith("psnr") and len(got) < 3)
        assert got[-1].image.tobytes() == pictures[len(got) - 1].image.tobytes()


def test_decode_levels_of_a_cut_file(model: Model, full: bytes) -> None:
    data = container.cut(full, ends(full)[6] - 5)
    got = list(decode_levels(pieces(data, 500), model=model))
    assert [v.complete for v in got] == [True] * 6 + [False]
    assert got[-2].bytes < got[-1].bytes <= len(data)
    assert got[-1].psnr == container.parse(full).levels[6].psnr
    assert got[-1].image.tobytes() == quietly(data, model).tobytes()
    with pytest.raises(FormatError):
        list(decode_levels(pieces(full[:20], 3), model=model))
    with pytest.warns(DamageWarning):
        damaged = list(decode_levels(flip(full, ends(full)[4] - 1), model=model))
    assert len(damaged) == 4


def test_decode_levels_without_any(model: Model, full: bytes) -> None:
    assert list(decode_levels(full[: container.parse(full).header_size], model=model)) == []


# --- Other pictures from the same bits ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sample(files: dict[str, tuple[bytes, Model]], kind: str) -> None:
    data, model = files[kind]
    some = data[: ends(data)[2]]

    def made(recon: Recon, seed: int = 0, data: bytes = some) -> bytes:
        return quietly(data, model, recon=recon, seed=seed).tobytes()

    assert made("sample", 1) == made("sample", 1) != made("sample", 2)
    assert made("mean") != made("sample", 1)
    assert made("mean", 1) == made("mean", 2)
    # After all levels both are the same; before the first, samples still differ.
    assert made("mean", data=data) == made("sample", data=data)
    head = data[: container.parse(data).header_size]
    assert made("sample", 1, head) != made("sample", 2, head)
    # Sampling starts from the last complete level and ignores an unfinished one.
    assert made("sample", 1, container.cut(data, ends(data)[2] + 60)) == made("sample", 1)


def test_sample_of_a_lossless_file_is_exact(
    model: Model, full: bytes, picture: Image.Image
) -> None:
    assert decode(full, model=model, recon="sample").tobytes() == picture.tobytes()
    with pytest.raises(ValueError, match="recon"):
        decode(full, model=model, recon="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recon"):
        next(decode_levels(full, model=model, recon="median"))  # type: ignore[arg-type]


def test_samples_at_each_level(model: Model, full: bytes) -> None:
    whole = container.cut(full, ends(full)[3] + 60)
    got = list(decode_levels(whole, model=model, recon="sample"))
    assert [v.complete for v in got] == [True] * 4 + [False]
    for level in got[:4]:
        one = decode(whole[: level.bytes], model=model, recon="sample")
        assert level.image.tobytes() == one.tobytes()
    assert got[4].image.tobytes() == got[3].image.tobytes()


# --- The same everywhere ------------------------------------------------------------------------


def test_tiles(model: Model, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    im = picture.resize((70, 50))
    how: dict[str, Any] = {"model": model, "steps": 3, "effort": 1, "lossless": True}
    alone = encode(im, **how)
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(tiles, "OVERLAP", 16)
    data = encode(im, **how)
    assert data != alone
    assert decode(data, model=model).tobytes() == im.tobytes()


@pytest.mark.parametrize("size", [(32, 32), (70, 33)])
def test_larger_pictures_in_small_networks(
    small_model: Path, picture: Image.Image, size: Any
) -> None:
    """In tiles of the size of its training pictures."""
    im = picture.resize(size)
    data = encode(im, model=small_model, timesteps=(900, 200, 5), effort=1, lossless=True)
    assert decode(data, model=small_model).tobytes() == im.tobytes()


@pytest.mark.parametrize("kind", ["spectral", "paper"])
def test_threads(files: dict[str, tuple[bytes, Model]], picture: Image.Image, kind: str) -> None:
    """Files decode with another number of threads; those of exact networks to the same bits."""
    im, before, model = picture.resize((16, 16)), torch.get_num_threads(), files[kind][1]
    made, decoded = [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(encode(im, model=model, steps=2, effort=1, lossless=True))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            decoded += [[v.image.tobytes() for v in decode_levels(f, model=model)] for f in made]
    finally:
        torch.set_num_threads(before)
    assert all(images[-1] == im.tobytes() for images in decoded)
    if kind == "spectral":
        assert decoded[:2] == decoded[2:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_types_of_convolutions(
    tiny_model: Path, full: bytes, model: Model, pictures: list[Level], picture: Image.Image,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """The same pictures, the same state, and the same file."""
    other = load_model(tiny_model)
    assert isinstance(other.net, ExactUNet)
    other.net.compute_in(dtype)
    got = list(decode_levels(full, model=other))
    assert [v.image.tobytes() for v in got] == [v.image.tobytes() for v in pictures]
    one, two = (Decoder(container.parse(full), m).run().chain for m in (model, other))
    assert one.m.tobytes() == two.m.tobytes() and one.depth.tobytes() == two.depth.tobytes()
    assert encode(picture, model=other, steps=9, effort=1, lossless=True, seed=5) == full


def disturb(monkeypatch: pytest.MonkeyPatch, mean: float, index: float, after: int = 0) -> None:
    """Make the network inexact from the ``after``-th evaluation on.

    mean: largest error of x0_hat; index: share of the coefficients with a wrong scale index.
    """
    exact = chain.ask_exact
    rng = np.random.default_rng(0)
    calls = itertools.count()

    def inexact(*arguments: Any) -> Any:
        x0_hat, indices = exact(*arguments)
        if next(calls) < after:
            return x0_hat, indices
        error = (mean * rng.uniform(-1, 1, x0_hat.shape)).astype(np.float32)
        return x0_hat + error, indices ^ (rng.random(indices.shape) < index)

    monkeypatch.setattr(chain, "ask_exact", inexact)


@pytest.mark.parametrize(("mean", "index"), [(0.0, 0.001), (0.0, 0.1), (0.01, 0.0), (0.1, 0.1)])
@pytest.mark.parametrize("after", [0, 3])
def test_another_arithmetic_is_noticed(
    model: Model, full: bytes, pictures: list[Level], monkeypatch: pytest.MonkeyPatch,
    mean: float, index: float, after: int,
) -> None:  # fmt: skip
    """The picture of the level before it is decoded, nearly unchanged."""
    disturb(monkeypatch, mean, index, after)
    with pytest.warns(DamageWarning, match="arithmetic differs from the encoder's"):
        out = decode(full, model=model)
    about = out.info["ddpm"]
    i = [level.t for level in pictures].index(about["t"])
    assert after <= i <= after + 3
    assert about["bytes"] == ends(full)[i] and not about["complete"]
    apart = psnr(np.asarray(out), np.asarray(pictures[i].image))
    assert apart == float("inf") if mean == 0 else apart > 30


def test_another_arithmetic_in_the_lossless_layer(
    model: Model, full: bytes, pictures: list[Level], monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, 0.05, 0.0, after=8)  # the last evaluation gives the rounded picture
    with pytest.warns(DamageWarning, match="lossless layer: this machine's arithmetic differs"):
        out = decode(full, model=model)
    assert out.info["ddpm"]["bytes"] == ends(full)[-1]
    assert psnr(np.asarray(out), np.asarray(pictures[-2].image)) > 30
