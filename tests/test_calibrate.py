"""Calibration: what a network's errors are, as its tables say them, and models that code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import TINY, exact_network
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from ddpm_codec.codec import chain
from ddpm_codec.codec.decoder import decode
from ddpm_codec.codec.encoder import encode, psnr
from ddpm_codec.diffusion import transform
from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import DataError, ModelError
from ddpm_codec.network.exact import ExactUNet
from ddpm_codec.network.modelfile import Model, load_model, read_metadata
from ddpm_codec.network.tables import SCALES, new_tables
from ddpm_codec.training import calibrate as module
from ddpm_codec.training import train
from ddpm_codec.training.calibrate import (
    calibrate,
    fit_errors,
    fit_prior,
    fit_variance,
    follow,
)
from ddpm_codec.training.config import TrainConfig

LADDER = Ladder(rungs=9, finest=160)


def scene(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Gradients, edges and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 2.0, y * 2.0, 250 - 1.5 * (x + y)], -1)
    rgb += rng.normal(0, 5, rgb.shape)
    rgb[9 * seed : 9 * seed + 20, 15:40] = (200, 30, 30 * seed)
    return rgb.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(3):
        Image.fromarray(scene(80, 96, k)).save(folder / f"{k}.png")
    return folder


@pytest.fixture(autouse=True)
def small_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE", 64)


def silent(_: str) -> None:
    pass


def predicts(monkeypatch: pytest.MonkeyPatch, log_scale: float) -> None:
    """A network that predicts that x_0 is M, with an error of exp(log_scale) sigma."""

    def exact(net: Any, m: NDArray[np.float32], *_: Any) -> tuple[Any, Any]:
        return m, np.full(m.shape, math.floor((log_scale + 5) / 0.25), np.int8)

    monkeypatch.setattr(chain, "ask_exact", exact)
    monkeypatch.setattr(chain, "ask_isotropic", lambda net, m, *_: m)


def untrained() -> Model:
    net = exact_network().eval().requires_grad_(False)
    net.freeze(net.integers(), "cpu", torch.float32)
    return Model("some", net, new_tables(LADDER, scales=True), LADDER, bytes(32))


# --- A model file ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [False, True])
def test_calibrated_model_codes_a_picture(
    pictures: Path, tmp_path: Path, picture: Image.Image, parts: bool
) -> None:
    path, folder, out = tmp_path / "a.ckpt", tmp_path / "parts", tmp_path / "m.safetensors"
    short = TrainConfig(patches=4, size=64, batch=2, lr=3e-3, warmup=1)
    train.train([pictures], path, TINY, short, parts=folder)
    lines: list[str] = []
    how: dict[str, Any] = {"pictures": 2, "rungs": 9, "finest": 160}
    given = folder if parts else path
    tables = calibrate(given, [pictures], out, name="tiny", say=lines.append, **how)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "m.safetensors", "parts"]
    assert out.name in lines[-1] and any("variances" in text for text in lines)
    model = load_model(out)
    model.tables.check(model.ladder, scales=True)
    assert model.ladder == LADDER and model.net.cfg == TINY and model.name == "tiny"
    assert json.loads(read_metadata(out)["progress"])["patches"] == 4
    for name, array in model.tables.arrays().items():
        np.testing.assert_array_equal(array, tables.arrays()[name])
    # The averaged weights, as integers.
    weights, net = load_file(path), ExactUNet(TINY)
    halved = {
        k[4:]: v.half().float() if parts else v for k, v in weights.items() if k.startswith("ema.")
    }
    net.load_state_dict(halved)
    written = load_file(out)
    for name, tensor in net.integers().items():
        assert torch.equal(written[f"net.{name}"], tensor), name
    assert float(written["net.sigma_data"].std()) > 0.01  # measured
    decoded = decode(encode(picture, model=out, effort=1, lossless=True), model=out)
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(picture))
    decoded = decode(encode(picture, model=out, effort=1), model=out)
    assert psnr(np.asarray(picture), np.asarray(decoded)) > 22
    assert decoded.info["ddpm"]["complete"]


def test_fitted_tables_are_better(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    """On the pictures they were fitted on, against the predicted variances."""
    fitted = tmp_path / "fitted.safetensors"
    calibrate(tiny_model, [pictures], fitted, pictures=2, say=silent)
    with Image.open(pictures / "0.png") as im:
        picture = im.convert("RGB")
    files = [encode(picture, model=m, steps=9, effort=1) for m in (fitted, tiny_model)]
    assert len(files[0]) < len(files[1])
    quality = [
        psnr(np.asarray(picture), np.asarray(decode(file, model=m)))
        for file, m in zip(files, (fitted, tiny_model), strict=True)
    ]
    assert quality[0] > quality[1] - 0.5


def test_calibrate_a_model_anew(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    """A model file does for a checkpoint: its weights are those that files are made with."""
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    for given, out in ((tiny_model, first), (first, again)):
        calibrate(given, [pictures], out, pictures=1, rungs=5, say=silent)
    assert load_model(first).digest == load_model(again).digest
    assert load_model(first).digest != load_model(tiny_model).digest


def test_a_damaged_model_is_not_calibrated(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    data = bytearray(tiny_model.read_bytes())
    data[-9] ^= 1
    (bad := tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="digest"):
        calibrate(bad, [pictures], tmp_path / "m.safetensors", pictures=1, say=silent)
    assert list(tmp_path.iterdir()) == [bad]


def test_another_ladder(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    """A model of fewer levels than files usually have, and one that sends coefficients later."""
    out = tmp_path / "m.safetensors"
    how: dict[str, Any] = {"pictures": 1, "rungs": 5, "finest": 40, "say": silent}
    calibrate(tiny_model, [pictures], out, tau=2.0, **how)
    model = load_model(out)
    assert model.ladder == Ladder(5, 40, 2.0)
    data = encode(scene(16, 16, 0), model=out)
    assert decode(data, model=out).info["ddpm"]["snr"] == 40.0
    with pytest.raises(ModelError, match="levels"):
        calibrate(tiny_model, [pictures], out, **how | {"rungs": 400})
    with pytest.raises(DataError):
        calibrate(tiny_model, [tmp_path / "none"], out, **how)


# --- What is measured --------------------------------------------------------------------------


def test_what_is_expected_before_anything_is_known() -> None:
    model = untrained()
    shots = [scene(64, 64, k) for k in range(3)]
    fit_prior(model, shots)
    x = torch.from_numpy(np.stack(shots)).permute(0, 3, 1, 2).float() / 127.5 - 1
    c = transform.forward(x).numpy().astype(np.float64)
    mean = c.mean((0, 2, 3))
    np.testing.assert_allclose(model.tables.mean, mean, atol=1e-5)
    error = model.tables.error[0]
    variance = np.square(c - mean[None, :, None, None]).mean((0, 2, 3))
    np.testing.assert_allclose(error.mean(1), variance, rtol=1e-4, atol=1e-9)
    # Of sums over blocks more than of differences.
    assert error[0, 0] > 4 * error[0, 1:].mean()


def test_variances_of_a_network_that_repeats_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of known coefficients is the noise, whatever the predicted log-scale."""
    predicts(monkeypatch, 0.1)  # index 20, with a predicted variance of 2 exp(2 / 8)
    model = untrained()
    shots = [scene(64, 64, k) for k in range(4)]
    fit_prior(model, shots)
    ratio = fit_variance(model, shots)
    predicted = 2 * np.exp(0.25)
    known = model.tables.variance[:, 0, 20]
    np.testing.assert_allclose(known, 1.0, atol=0.1)
    np.testing.assert_allclose(ratio[:, 0], known / predicted, atol=0.05)
    # Scale indices that never occurred have the predicted variance, corrected by the others' ratio.
    np.testing.assert_allclose(model.tables.variance[:, 0, 21] / known, np.exp(0.5), rtol=0.1)
    model.tables.check(LADDER, scales=True)
    # In a second fit, measured and expected variances agree.
    again = fit_variance(model, shots)
    np.testing.assert_allclose(again[:, 0], 1.0, atol=0.04)


def test_variances_of_scale_indices_that_never_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the predicted variance: otherwise no picture would ever send such coefficients."""
    predicts(monkeypatch, 2.8)  # so much that all are sent at once
    model = untrained()
    fit_variance(model, [scene(64, 64, k) for k in range(2)])
    own = new_tables(LADDER, True).variance
    np.testing.assert_allclose(model.tables.variance[2:, 1], own[2:, 1], rtol=1e-6)
    assert (model.tables.variance[2:, 0, 31] < 0.1 * own[2:, 0, 31]).all()


def test_variances_are_those_that_are_measured(tiny_model: Path) -> None:
    model = replace(load_model(tiny_model), ladder=LADDER, tables=new_tables(LADDER, True))
    shots = [scene(64, 64, k) for k in range(4)]
    fit_prior(model, shots)
    for _ in range(3):
        ratio = fit_variance(model, shots)
    # The measured variance is less than the table's where a scale has more error than those above.
    assert ratio[:, 0].min() > 0.6 and ratio[:, 0].max() < 1.1
    # On other noise, and class by class.
    square, count = np.zeros((2, LADDER.rungs, 2, SCALES))
    for number, shot in enumerate(shots):
        ours = module._chain(model, shot, number)
        for level, estimate in follow(ours, shot, 77 + number):
            assert estimate.index is not None
            row = LADDER.rungs - 1 - ours.header.rungs[level]
            index = estimate.index.astype(int)
            new = (ours.depth.reshape(192, -1) < 0).astype(int)
            error = (ours.c - estimate.x0_hat) ** 2 * ours.snrs[level]
            np.add.at(square[row], (new, index), error)
            np.add.at(count[row], (new, index), 1)
    predicted = (count * model.tables.variance).sum(-1)
    np.testing.assert_allclose(square[:, 0].sum(-1) / predicted[:, 0], ratio[:, 0], rtol=0.2)
    # A scale with less error than those below it gets as much as they have.
    most = np.maximum.accumulate(square / np.maximum(count, 1), axis=-1)
    often = count > 1000
    often[:, 1] = False  # in this picture all or none of them are sent at once
    assert often.sum() > 20
    np.testing.assert_allclose(model.tables.variance[often], most[often], rtol=0.3)


def test_errors_of_a_network_that_repeats_the_noise(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicts(monkeypatch, 0.0)
    net = load_model(small_model).net
    model = Model("some", net, new_tables(LADDER, False), LADDER, bytes(32))
    fit_errors(model, [scene(32, 32, k) for k in range(12)])
    for row, snr in enumerate(LADDER.snrs):
        error = model.tables.error[row + 1]
        assert error.shape == (192, 16)
        assert error.mean() * snr == pytest.approx(1, abs=0.02)
        assert error.std() * snr < 3 * (2 / 12) ** 0.5
    model.tables.check(LADDER, scales=False)
