"""The benchmarks' computations, against cases worked out by hand."""

from __future__ import annotations

import math
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_codec.codec import container
from ddpm_codec.codec.chain import Chain
from ddpm_codec.codec.encoder import encode, make_header
from ddpm_codec.codec.header import write_header
from ddpm_codec.network.exact import ExactUNet
from ddpm_codec.network.modelfile import get_model, load_model

pytest.importorskip("bjontegaard", reason="needs the extra bench")
# They import each other, as scripts in one folder do.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
curves, figures, frechet, ablation, paper, lpips = map(
    import_module, ("curves", "figures", "frechet", "ablation", "paper", "lpips")
)
speed, soak, agreement = map(import_module, ("speed", "soak", "agreement"))


def curve(rate: float, slope: float = 6.0) -> list[Any]:
    """A curve with PSNR = 30 + slope log2(bpp / rate)."""
    points = []
    for k in range(-4, 5):
        db = 30 + slope * k / 2
        ms = 1 - 10 ** (-db / 10)
        points.append(curves.Point(str(k), rate * 2 ** (k / 2), db, db, ms, db, 1 - ms, 0.0, 0.0))
    return points


@pytest.mark.parametrize("metric", ["PSNR", "PSNR-Y", "MS-SSIM", "SSIMULACRA2", "LPIPS"])
def test_bd_rate_of_a_constant_ratio(metric: str) -> None:
    """Half the rate at every quality is -50 %, by definition."""
    assert curves.bd_rate(curve(1.0), curve(0.5), metric) == pytest.approx(-50, abs=0.01)
    assert curves.bd_rate(curve(1.0), curve(1.25), metric) == pytest.approx(25, abs=0.01)


def test_bd_rate_by_hand() -> None:
    """Two straight lines of log2 rate: r_a = d / 6, r_t = d / 5 - 1 over the shared d = -10 .. 10.

    The mean of r_t - r_a over it is -1 (the slopes' difference cancels), so 2^-1: -50 %; over a
    range that is not symmetric it is not.
    """
    a, t = curve(1.0, 6.0), curve(0.5, 5.0)
    assert curves.bd_rate(a, t) == pytest.approx(-50, abs=0.05)
    upper = [p for p in t if p.psnr >= 30]  # d = 0 .. 10: mean of d / 30 is 1/6
    expected = 100 * (2 ** (1 / 6 - 1) - 1)
    assert curves.bd_rate(a, upper) == pytest.approx(expected, abs=0.05)


def test_quality() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(20, 230, (176, 180, 3), dtype=np.uint8)
    rgb, y, ms, score, _ = curves.quality(x, x, curves.Slow(ssimulacra2=True))
    assert rgb == y == math.inf and ms == pytest.approx(1) and score == pytest.approx(100)
    # One step of green is 0.587 of luma.
    x2 = x.copy()
    x2[..., 1] += 1
    rgb, y, ms, score, distance = curves.quality(x2, x)
    assert math.isnan(score) and math.isnan(distance)
    assert rgb == pytest.approx(20 * math.log10(255) + 10 * math.log10(3))
    assert y == pytest.approx(20 * math.log10(255 / 0.587))
    assert 0.99 < ms < 1
    assert math.isnan(curves.quality(x2[:160], x[:160])[2])


def test_lpips(tmp_path: Path) -> None:
    """Against the authors' package (lpips 0.1.4), which gave these values with the same weights."""
    trunk, rng = tmp_path / "alexnet.pth", np.random.default_rng(0)
    weights = {
        f"features.{k}": torch.from_numpy(rng.normal(0, 0.03, v.shape)).float()
        for k, v in lpips.alexnet().state_dict().items()
    }
    torch.save(weights | {"classifier.1.bias": torch.zeros(3)}, trunk)
    x = rng.integers(0, 256, (100, 75, 3), dtype=np.uint8)
    y = rng.integers(0, 256, (100, 75, 3), dtype=np.uint8)
    assert lpips.distance(x, x, trunk) == 0
    assert lpips.distance(x, y, trunk) == pytest.approx(0.098956764, rel=1e-5)
    assert curves.quality(y, x, curves.Slow(lpips=trunk))[4] == pytest.approx(0.098956764, rel=1e-5)
    for bad in (b"", b"PK", b"no weights"):
        (tmp_path / "bad.pth").write_bytes(bad)
        with pytest.raises(click.UsageError, match="not AlexNet's weights"):
            lpips.load_trunk(tmp_path / "bad.pth")


def test_frechet_distance_by_hand() -> None:
    """Commuting covariances: the sum of the squared differences of means and deviations."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    a, b = np.array([1, 2, 3, 0, 4.0]), np.array([1, 5, 3, 2, 0.5])
    m, n = rng.normal(size=(2, 5))
    got = frechet.distance((m, q @ np.diag(a**2) @ q.T), (n, q @ np.diag(b**2) @ q.T))
    assert got == pytest.approx(np.square(m - n).sum() + np.square(a - b).sum())
    # One dimension of samples against the formula for two normals.
    x, y = rng.normal(1, 2, (100_000, 1)), rng.normal(3, 5, (100_000, 1))
    x, y = np.hstack([x, x * 0]), np.hstack([y, y * 0])
    distance = frechet.distance(frechet.moments(x), frechet.moments(y))
    assert distance == pytest.approx(2**2 + 3**2, rel=0.03)


def test_features_tell_pictures_from_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, 32).expand(8, 3, 32, 32) * torch.rand(8, 3, 1, 1, generator=rng)
    noise = torch.randn(8, 3, 32, 32, generator=rng)
    f = frechet.features(torch.cat([ramp, noise]))
    assert f.shape == (16, 1280)
    inside, across = (
        np.linalg.norm(f[:4].mean(0) - f[4:8].mean(0)),
        np.linalg.norm(f[:8].mean(0) - f[8:].mean(0)),
    )
    assert across > 3 * inside


def test_reads_what_it_writes(tmp_path: Path) -> None:
    """CompressAI's schema, there and back; BD-rates of mean curves."""
    both = {"jpeg": [curve(1.0)], "ddpmc": [curve(0.5)]}
    figures.write(both, {}, ["a.png"], tmp_path, "table")
    record = tmp_path / "results.tsv"
    curves.write_record(both, [("a.png", 8000)], "abc", record)
    lines = [x.split("\t") for x in record.read_text().splitlines()]
    assert len(lines) == 1 + 2 * len(both["jpeg"][0])
    last = dict(zip(lines[0], lines[-1], strict=True))
    assert (last["codec"], last["picture"], last["model"]) == ("ddpmc", "a.png", "abc")
    assert int(last["bytes"]) == round(1000 * both["ddpmc"][0][-1].bpp)
    again, names = curves.read_record(record)
    assert names == ["a.png"] and list(again) == list(both)
    for codec in both:
        a, b = (np.array([p[1:] for p in c[codec][0]]) for c in (again, both))
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert "| **ddpmc** | **-50.0 %** |" in figures.short_table(again)
    for bad in ("", "codec\tpicture\n", record.read_text().replace("jpeg", "gif")):
        (tmp_path / "bad.tsv").write_text(bad)
        with pytest.raises(click.UsageError, match="not a record"):
            curves.read_record(tmp_path / "bad.tsv")
    name, points = curves.read_results(tmp_path / "ddpmc.json")
    assert name == "ddpmc"
    assert [(p.bpp, p.psnr) for p in points] == [(p.bpp, p.psnr) for p in both["ddpmc"][0]]
    assert "| theirs | -50.0 % |" in figures.others_table(both, {"theirs": points})
    (tmp_path / "older.json").write_text(
        '{"name": "x", "results": {"psnr": [30, 27], "bpp": [1, 0.5]}}'
    )
    assert [p.psnr for p in curves.read_results(tmp_path / "older.json")[1]] == [27, 30]
    for bad in ("{", "{}", '{"name": "x", "results": {"bpp": [1]}}'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(click.UsageError, match="schema"):
            curves.read_results(tmp_path / "bad.json")


def test_gaussian_bits_of_noise() -> None:
    """White noise costs log2(variance SNR) / 2 per coefficient for any size of the transform."""
    rng = np.random.default_rng(0)
    noise = rng.normal(127.5, 25.5, (320, 320, 3)).clip(0, 255).round().astype(np.uint8)
    variance = float((noise / 127.5).var())
    for side in (4, 8, 16):
        (got,) = ablation.gaussian_bits(Image.fromarray(noise), side, [100.0])
        assert got == pytest.approx(1.5 * np.log2(100 * variance), rel=0.01)


def test_smoothed_distortion() -> None:
    """Exact for a straight line, at its ends and with values missing; a mean of noise."""
    t = np.arange(1, 1001)
    rng = np.random.default_rng(0)
    line = np.where(rng.random(1000) < 0.3, np.nan, 5.0 + 0.1 * t)
    line[:20], line[1], line[499:] = np.nan, 5.2, np.nan
    got = paper.smoothed(line)
    assert got[1] == 5.2 and np.isnan(got[[0, 5, 900]]).all()
    np.testing.assert_allclose(got[29:520], 5.0 + 0.1 * t[29:520])
    assert np.abs(paper.smoothed(rng.normal(7.0, 1.0, 1000))[200:] - 7.0).max() < 0.6


def test_messages_are_counted_to_the_bit(small_model: Path, picture: Image.Image) -> None:
    """Messages and gains are a level's whole payload, except for bits that fill a last byte."""
    with paper.counted() as bits:
        data = encode(picture, model=small_model, timesteps=(800, 500), effort=1)
    sizes = [level.nbytes for level in container.parse(data).levels]
    assert len(bits) == 2 * len(sizes) * 2  # messages and gains of two tiles each
    per_level = np.array(bits).reshape(len(sizes), -1, 2).sum(2)
    assert [int(np.ceil(tiles / 8).sum()) for tiles in per_level] == sizes


def test_bits_and_seconds_add_up(
    tiny_model: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = speed.Stages.watch

    def for_now(self: Any, owner: Any, name: str, *more: Any) -> None:
        monkeypatch.setattr(owner, name, getattr(owner, name))
        watch(self, owner, name, *more)

    monkeypatch.setattr(speed.Stages, "watch", for_now)
    model, how = load_model(tiny_model), speed.How(steps=3, effort=1)
    row = speed.measure(picture, model, speed.Stages(model), how)
    data = encode(picture, model=model, steps=3, effort=1)
    assert row.bits["written"] == 8 * len(data)
    # Messages take a little more than the information that they send.
    assert 0.9 < row.bits["trellis"] / row.bits["information"] < 1.2
    heads = row.bits["written"] - row.bits["trellis"]
    assert 8 * len(write_header(how.header(picture, model))) < heads < 8 * 100
    for seconds in (row.encode, row.decode):
        assert seconds.keys() == set(speed.STAGES)
        assert min(seconds["network"], seconds["trellis"], seconds["classes"]) > 0


def test_soak_finds_unnoticed_damage(
    small_model: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checksums all damage is noticed; without them much of it is not."""
    model, small = get_model(small_model), picture.resize((8, 8))

    def outcomes() -> Counter[str]:
        data = encode(small, model=model, timesteps=(300, 20, 1), effort=1)
        rng = np.random.default_rng(0)
        return Counter(outcome for _, outcome in soak.damages(data, model, 60, rng))

    sound = outcomes()
    assert sound["refused"] > 5 and sound["prefix, damage"] > 5
    assert not sound["wrong"] + sound["slow"]
    monkeypatch.setattr(container, "crc16", lambda *_: 0)
    assert outcomes()["wrong"] > 5


def test_soak_cuts_everywhere(
    small_model: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, small = get_model(small_model), picture.resize((8, 8))
    monkeypatch.setattr(soak, "SEEDS", 1)
    monkeypatch.setattr(soak, "halves", lambda *_: [np.asarray(small), 255 - np.asarray(small)])
    data = encode(small, model=model, timesteps=(500,), effort=1)
    header = container.parse(data).header_size
    counts = soak.every_cut(data, small, model, 500)
    assert counts.pop("refused") == header
    assert counts.pop("decoded") == 2 * (len(data) + 1 - header)
    assert counts.pop("fell") == 1 and not counts.total()
    # A PSNR that differs from the stored one.
    monkeypatch.setattr(soak, "psnr", lambda *_: 50.0)
    assert soak.every_cut(data, small, model, 500)["wrong"] == 2


def test_agreement_of_tiles_in_any_order(
    tiny_model: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model)
    assert isinstance(model.net, ExactUNet)
    monkeypatch.setattr(agreement.tiles, "TILE", 16)
    monkeypatch.setattr(agreement.tiles, "OVERLAP", 0)
    state = Chain(make_header(picture, model), model)
    state.m[:] = np.random.default_rng(0).integers(-(2**14), 2**14, state.m.shape) / 2**13
    inputs: list[np.ndarray] = []
    plain_stem = model.net.stem.forward

    def watched(x: torch.Tensor) -> Any:
        inputs.append(x.float().numpy())
        return plain_stem(x)

    monkeypatch.setattr(model.net.stem, "forward", watched)
    plain = state.ask(10.0)
    tiles = inputs.copy()
    for kind, expected, batch in (
        ("1 thread", tiles, 1),
        ("tiles reversed", tiles[::-1], 1),
        ("batches of two", tiles, 2),
    ):
        inputs.clear()
        with agreement.arithmetic(kind, model.net):
            got = state.ask(10.0)
        for mine, theirs in zip(inputs, expected, strict=True):
            assert len(mine) == batch
            np.testing.assert_array_equal(mine[-1:], theirs)
        np.testing.assert_array_equal(got.x0_hat, plain.x0_hat)
        np.testing.assert_array_equal(got.index, plain.index)


def test_agreement_finds_what_differs(tiny_model: Path, picture: Image.Image) -> None:
    model = get_model(tiny_model)
    data = encode(picture, model=model, steps=3, effort=1)
    one, two = agreement.follow(data, model), agreement.follow(data, model)
    assert agreement.row("1 thread", one, two).good
    two.m[1][3, 0, 0] += 2**-14
    assert agreement.row("1 thread", one, two)[1:5] == (2, 3, 3, 0)
    two.picture[0, 0, 0] ^= 1
    assert agreement.row("1 thread", one, two)[1:5] == (2, 3, 3, 1)
    assert not agreement.row("1 thread", one, two).good
    shorter = one._replace(m=one.m[:2], scales=one.scales[:2])
    assert not agreement.row("1 thread", shorter, one).good
