"""Pictures to files: targets, extras, and invalid arguments."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_codec.codec import container
from ddpm_codec.codec.decoder import decode
from ddpm_codec.codec.encoder import Encoder, encode, make_header, psnr
from ddpm_codec.codec.stops import truncate
from ddpm_codec.errors import DdpmcWarning, ImageError, LimitError, ModelError
from ddpm_codec.network.modelfile import Model, get_model

QUICK: dict[str, Any] = {"steps": 5, "effort": 1, "tune": "even"}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return get_model(tiny_model)


@pytest.fixture(scope="module")
def whole(model: Model, picture: Image.Image) -> bytes:
    """All levels."""
    return encode(picture, model=model, **QUICK)


def crop(im: Image.Image, size: tuple[int, int], mode: str) -> Image.Image:
    out = im.resize(size).convert(mode)
    if mode in ("LA", "RGBA"):
        alpha = np.arange(size[0] * size[1]).reshape(size[::-1]) % 256
        out.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return out


def quietly(data: bytes, model: Model, **how: Any) -> Image.Image:
    """Decode and ignore warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode(data, model=model, **how)


# --- Whole files -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (1, 19), (33, 1), (40, 28)])
@pytest.mark.parametrize("kind", ["spectral", "isotropic", "paper"])
def test_lossless_is_lossless(
    model: Model, small_model: Path, picture: Image.Image, kind: str, size: Any, mode: str
) -> None:
    im = crop(picture, size, mode)
    used = small_model if kind == "paper" else model
    path = None if kind == "paper" else kind
    data = encode(im, model=used, path=path, steps=2, effort=1, lossless=True)
    out = decode(data, model=used)
    assert (out.mode, out.size, out.tobytes()) == (mode, size, im.tobytes())
    about = out.info["ddpm"]
    assert (about["t"], about["bytes"], about["complete"]) == (0, len(data), True)
    assert about["snr"] == float("inf") and about["damage"] is None


@pytest.mark.parametrize("path", ["spectral", "isotropic"])
def test_a_file_ends_close_to_the_picture(model: Model, picture: Image.Image, path: str) -> None:
    """The last level alone has an SNR of 2560: its noise has 127.5 sigma = 2.5 grey levels."""
    out = decode(encode(picture, model=model, path=path, **QUICK), model=model)
    assert psnr(np.asarray(picture), np.asarray(out)) > 36


def test_stored_psnr_is_that_of_the_picture(
    model: Model, picture: Image.Image, whole: bytes
) -> None:
    for level in container.parse(whole).levels:
        out = decode(whole[: level.end], model=model)
        found = psnr(np.asarray(picture), np.asarray(out))
        assert 0 <= found - level.psnr < 0.25


def test_psnr() -> None:
    a = np.zeros((2, 2, 3), np.uint8)
    assert psnr(a, a) == float("inf")
    assert psnr(a, a + np.uint8(255)) == 0
    assert psnr(a, np.array([[[5, 0, 0], [0, 0, 0]]] * 2, np.uint8)) == pytest.approx(
        41.933, abs=1e-3
    )


def test_arrays_are_pictures_too(model: Model, picture: Image.Image, whole: bytes) -> None:
    assert encode(np.asarray(picture), model=model, **QUICK) == whole
    grey = np.asarray(picture.convert("L"))
    out = decode(encode(grey, model=model, **QUICK), model=model)
    assert out.mode == "L" and psnr(grey, np.asarray(out)) > 35


def test_the_seed_chooses_the_noise(model: Model, picture: Image.Image, whole: bytes) -> None:
    assert encode(picture, model=model, seed=0, **QUICK) == whole
    other = encode(picture, model=model, seed=2**32 - 1, **QUICK)
    assert container.parse(other).header.seed == 2**32 - 1
    assert decode(other, model=model).tobytes() != decode(whole, model=model).tobytes()


@pytest.mark.parametrize("steps", [1, 4, 33])
def test_steps_are_levels(model: Model, picture: Image.Image, steps: int) -> None:
    data = encode(picture.resize((9, 9)), model=model, steps=steps, effort=1)
    stream = container.parse(data)
    assert len(stream.levels) == stream.header.levels == steps
    assert stream.header.rungs[-1] == 0 and stream.header.snrs[-1] == 2560.0


def test_small_pictures_have_a_higher_effort(model: Model) -> None:
    """By default the search is more thorough for small pictures."""
    efforts = [make_header(Image.new("RGB", size), model).effort for size in ((52, 52), (53, 53))]
    assert efforts == [8, 5]
    header = make_header(Image.new("L", (7, 5)), model, effort=9, seed=4)
    assert (header.effort, header.seed, header.levels) == (9, 4, 17)
    assert (header.width, header.height, header.mode, header.path) == (7, 5, "L", "spectral")


def test_effort_saves_bytes(model: Model, picture: Image.Image) -> None:
    im = picture.resize((16, 16))
    a, b = (encode(im, model=model, steps=9, effort=n) for n in (1, 6))
    assert len(b) < len(a)
    found = [psnr(np.asarray(im), np.asarray(decode(x, model=model))) for x in (a, b)]
    assert found[0] == pytest.approx(found[1], abs=1.5)


def test_timesteps_of_the_papers_networks(small_model: Path, picture: Image.Image) -> None:
    model = get_model(small_model)
    data = encode(picture, model=model, timesteps=(900, 500, 1), effort=1)
    header = container.parse(data).header
    assert (header.rungs, header.ts, header.finest) == ((900, 500, 1), [900, 500, 1], 0)
    assert header.path == "isotropic"
    out = decode(data, model=model, stop_at="t=500")
    assert out.info["ddpm"]["t"] == 500


def test_model_without_precisions_refuses_the_spectral_path(
    small_model: Path, picture: Image.Image
) -> None:
    with pytest.raises(ModelError, match="isotropic path only"):
        encode(picture, model=small_model, path="spectral")


@pytest.mark.parametrize(
    "how",
    [{"bpp": 1.0, "bytes": 4}, {"lossless": True, "psnr": 30.0}, {"path": "x"}, {"seed": -1},
     {"seed": 2**32}, {"stop_at": "bpp=1"}, {"stop_at": "soon"}, {"metadata": "some"},
     {"steps": 0}, {"steps": 34}, {"effort": 0}, {"effort": 10}, {"timesteps": (900, 1)}],
)  # fmt: skip
def test_invalid_arguments(model: Model, picture: Image.Image, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        encode(picture, model=model, **how)


@pytest.mark.parametrize("timesteps", [(), (1, 2), (5, 5), (1001, 3), (3, 0)])
def test_impossible_timesteps(
    small_model: Path, picture: Image.Image, timesteps: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        encode(picture, model=small_model, timesteps=timesteps)


def test_too_large_a_picture(
    model: Model, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPMC_MAX_MEMORY", "600000000")
    with pytest.raises(LimitError, match="40x28 pixels"):
        encode(picture, model=model)


# --- Targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "stop"),
    [({"bytes": n}, f"bytes={n}") for n in (30, 60, 300, 900, 10**6)]
    + [({"bpp": b}, f"bpp={b}") for b in (0.5, 2.0, 6.0)]
    + [({"stop_at": t}, t) for t in ("t=1000", "t=500", "t=77", "t=1")],
)
def test_encode_stops_where_truncate_does(
    model: Model, picture: Image.Image, whole: bytes, how: dict[str, Any], stop: str
) -> None:
    data = encode(picture, model=model, **QUICK, **how)
    assert data == truncate(whole, stop_at=stop)
    out = quietly(data, model)
    assert out.tobytes() == quietly(whole, model, stop_at=stop).tobytes()
    kind, _, value = stop.partition("=")
    if kind == "bytes" and 60 <= int(value) < len(whole):
        # Near the end of a level a few bytes cannot be used.
        assert int(value) - 8 <= len(data) <= int(value)
    if kind == "t":
        assert out.info["ddpm"]["t"] >= int(value)


def test_bytes_that_do_not_hold_the_header(model: Model, picture: Image.Image) -> None:
    with pytest.raises(LimitError, match="20 bytes are too few: the header alone take"):
        encode(picture, model=model, bytes=20, **QUICK)
    im = crop(picture, (40, 28), "RGBA")
    with pytest.raises(LimitError, match="the header and alpha alone take"):
        encode(im, model=model, bytes=60, **QUICK)


def test_encode_stops_at_the_target(model: Model, picture: Image.Image, whole: bytes) -> None:
    ts = container.parse(whole).header.ts
    for how, totals in (
        ({"stop_at": f"t={ts[2]}"}, [3, 3, 3]), ({"bytes": 60}, [5, 2]), ({"psnr": 1}, [1]),
        ({}, [5] * 5),
    ):  # fmt: skip
        calls: list[tuple[int, int]] = []
        encode(picture, model=model, progress=lambda *v, c=calls: c.append(v), **QUICK, **how)
        assert calls == [(i + 1, total) for i, total in enumerate(totals)]


@pytest.mark.parametrize("target", ["psnr", "bpp", "bytes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_impossible_targets(model: Model, picture: Image.Image, target: str, value: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number"):
        encode(picture, model=model, **{target: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [15.0, 22.3, 30.1])
def test_psnr_target_is_just_reached(model: Model, picture: Image.Image, value: float) -> None:
    im = picture.resize((64, 48))
    data = encode(im, model=model, psnr=value, steps=9, effort=1, tune="even")
    assert psnr(np.asarray(im), np.asarray(quietly(data, model))) >= value
    last = container.parse(data).levels[-1].nbytes
    shorter = container.cut(data, len(data) - max(16, last // 64) - 2)
    assert psnr(np.asarray(im), np.asarray(quietly(shorter, model))) < value + 0.1
    much = container.cut(data, len(data) - last // 3)
    assert psnr(np.asarray(im), np.asarray(quietly(much, model))) < value


def test_psnr_that_is_not_reached_takes_all_levels(
    model: Model, picture: Image.Image, whole: bytes
) -> None:
    with pytest.warns(DdpmcWarning, match=r"90 dB is out of reach: all levels give \d+\.\d\d dB"):
        assert encode(picture, model=model, psnr=90.0, **QUICK) == whole


# --- What a file cannot or need not keep -------------------------------------------------------


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "I;16"])
def test_lossless_loses_nothing(model: Model, mode: str) -> None:
    with pytest.raises(ImageError, match="without loss"):
        encode(Image.new(mode, (8, 8)), model=model, lossless=True, **QUICK)


def test_lossless_arrays_are_of_eight_bits(model: Model) -> None:
    wide: Any = np.zeros((8, 8), np.uint16)
    with pytest.raises(ImageError, match="16 bits"):
        encode(wide, model=model, lossless=True, **QUICK)


def test_what_alpha_hides_costs_nothing(model: Model, picture: Image.Image) -> None:
    """Only a lossless file keeps the colours that alpha hides."""
    rng = np.random.default_rng(0)
    x = np.dstack([np.asarray(picture), np.full((28, 40), 255, np.uint8)])
    x[4:24, 4:30, 3] = 0
    noisy = x.copy()
    noisy[4:24, 4:30, :3] = rng.integers(0, 256, (20, 26, 3))
    one, two = (encode(a, model=model, **QUICK) for a in (x, noisy))
    assert one == two
    visible = psnr(x[x[..., 3] > 0], np.asarray(decode(two, model=model))[x[..., 3] > 0])
    assert visible > 36
    exact = encode(noisy, model=model, lossless=True, **QUICK)
    np.testing.assert_array_equal(np.asarray(decode(exact, model=model)), noisy)


def test_a_path_or_a_file_is_a_picture(
    model: Model, picture: Image.Image, whole: bytes, tmp_path: Path
) -> None:
    picture.save(path := tmp_path / "x.png")
    with open(path, "rb") as f:
        for source in (path, str(path), f):
            assert encode(source, model=model, **QUICK) == whole
    with pytest.raises(TypeError, match="not NoneType"):
        encode(None, model=model)  # type: ignore[arg-type]


# --- Extras ------------------------------------------------------------------------------------


@pytest.fixture
def described(picture: Image.Image) -> Image.Image:
    im = picture.copy()
    im.info["icc_profile"] = b"a profile"
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    im.info["exif"] = exif.tobytes()
    return im


def test_metadata_of_a_tiff(model: Model, described: Image.Image) -> None:
    described.save(f := io.BytesIO(), "TIFF", exif=described.info["exif"])
    data = encode(f, model=model, metadata="all", steps=2, effort=1)
    assert decode(data, model=model).getexif()[0x010F] == "a camera"


@pytest.mark.parametrize(
    ("how", "kinds"),
    [({}, {"icc"}), ({"metadata": "icc"}, {"icc"}), ({"metadata": "none"}, set()),
     ({"metadata": "all"}, {"icc", "exif"})],
)  # fmt: skip
def test_metadata(
    model: Model, described: Image.Image, picture: Image.Image, how: dict[str, Any], kinds: Any
) -> None:
    """The colour profile is kept by default, EXIF on request."""
    data = encode(described, model=model, steps=2, effort=1, **how)
    assert set(container.parse(data).extras) == kinds
    out = decode(data, model=model)
    assert out.info.get("icc_profile") == (b"a profile" if "icc" in kinds else None)
    assert (b"a camera" in out.info.get("exif", b"")) == ("exif" in kinds)
    if not kinds:
        assert data == encode(picture, model=model, steps=2, effort=1)


def test_extras_come_after_a_level_as_long(model: Model, picture: Image.Image) -> None:
    """A first picture arrives early; long extras come late."""
    header = make_header(picture, model, steps=5, effort=1)
    extras = {"icc": bytes(10), "exif": bytes(300), "alpha": bytes(range(256)) * 40}
    encoder = Encoder(np.asarray(picture), header, model, extras=extras)
    expected: set[str] = set()
    counts = []
    for i in range(5):
        encoder.step()
        stream = container.parse(encoder.file())
        size = stream.levels[-1].end  # before the extras that this step wrote
        assert len(stream.levels) == i + 1
        expected |= {kind for kind, extra in extras.items() if len(extra) <= size}
        assert set(stream.extras) == expected
        counts.append(len(expected))
    assert counts == [1, 1, 2, 2, 2]
    encoder.write_extras()
    assert container.parse(encoder.file()).extras == extras


@pytest.mark.parametrize("limit", [1300, 1600, 2500])
def test_alpha_is_within_the_bytes_asked_for(
    model: Model, picture: Image.Image, limit: int
) -> None:
    im = picture.convert("RGBA")
    alpha = np.random.default_rng(0).integers(0, 256, (28, 40), np.uint8)  # does not deflate
    im.putalpha(Image.fromarray(alpha))
    data = encode(im, model=model, bytes=limit, **QUICK)
    assert limit - 8 <= len(data) <= limit
    out = quietly(data, model)
    np.testing.assert_array_equal(np.asarray(out)[..., 3], alpha)
    assert psnr(np.asarray(picture), np.asarray(out)[..., :3]) > 9


@pytest.mark.parametrize("how", [{"stop_at": "t=900"}, {"psnr": 20.0}, {"lossless": True}, {}])
def test_alpha_is_kept_with_any_target(
    model: Model, picture: Image.Image, how: dict[str, Any]
) -> None:
    im = crop(picture, (40, 28), "LA")
    out = quietly(encode(im, model=model, **QUICK, **how), model)
    np.testing.assert_array_equal(np.asarray(out)[..., 1], np.asarray(im)[..., 1])


def test_opaque_until_alpha_has_arrived(model: Model, picture: Image.Image) -> None:
    im = crop(picture, (40, 28), "RGBA")
    data = encode(im, model=model, **QUICK)
    out = quietly(data[: container.parse(data).levels[0].end], model)
    assert out.mode == "RGBA" and out.getchannel("A").getextrema() == (255, 255)
