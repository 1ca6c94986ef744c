"""The paper's objectives on small pictures: their values for networks of known output."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ddpm_codec import data
from ddpm_codec.cli.main import main
from ddpm_codec.codec.decoder import decode
from ddpm_codec.codec.encoder import encode
from ddpm_codec.diffusion.schedule import Schedule
from ddpm_codec.network import denoiser
from ddpm_codec.network.modelfile import Model, load_model
from ddpm_codec.network.tables import new_tables
from ddpm_codec.network.unet import PAPER, UNet
from ddpm_codec.paper.likelihood import code_length
from ddpm_codec.training import tasks, train
from ddpm_codec.training.calibrate import SMALL, calibrate, fit_blend
from ddpm_codec.training.config import TrainConfig

NET = replace(PAPER, channels=(32, 32), blocks=1, embedding=32, dropout=0.0)
SHORT = TrainConfig(patches=8, batch=4, lr=3e-3, warmup=1)  # two steps


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve smooth pictures."""
    y, x = np.mgrid[:32, :32]
    pictures = [np.stack([8 * x, 8 * y, 20 * k + 0 * x], -1) for k in range(12)]
    path = tmp_path_factory.mktemp("small") / "pictures.npz"
    np.savez(path, images=np.stack(pictures).astype(np.uint8))
    return path


def task(small: Path, cfg: TrainConfig = SHORT, coarse: bool = False, **net: Any) -> tasks.Pictures:
    out = tasks.Pictures([small], [small], [small] * coarse, cfg, replace(NET, **net), "cpu")
    out.load(0, 0, 1)
    return out


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_simple_loss_of_a_silent_network(small: Path, prediction: str) -> None:
    """It predicts 0, so the loss is the mean square of its target."""
    this = task(small, replace(SHORT, batch=256), prediction=prediction)
    torch.manual_seed(0)
    got = this.losses(UNet(this.net))
    x_0 = data.to_unit(this.x)
    s2, ab = float(x_0.square().mean()), float(this.schedule.alpha_bar[1:].mean())
    expected = {"eps": 1.0, "x0": s2, "v": ab + (1 - ab) * s2}[prediction]
    assert float(got.loss.detach()) == pytest.approx(expected, rel=0.1)
    assert got.snr.shape == got.eps.shape == (256,) and not got.eps.requires_grad
    if prediction == "eps":
        assert torch.allclose(got.eps, torch.ones(256), atol=0.15)
    # Uniform t: SNR(t) is below 1 more often than not.
    assert 0.6 < float((got.snr < 1).float().mean()) < 0.9


def test_log_snr_uniform_in_ranges(small: Path) -> None:
    ranges = (0.5, 0.04, 9999.0), (0.25, 1.0, 10.0)
    this = task(small, replace(SHORT, batch=4000, log_snr=ranges))
    got = this.losses(lambda x_t, t: (torch.zeros_like(x_t), None))  # type: ignore[arg-type]
    for part, (_, low, high) in zip((got.snr[:2000], got.snr[2000:3000]), ranges, strict=True):
        share = (part.log() - math.log(low)) / math.log(high / low)
        assert float(share.min()) > -0.01 and float(share.max()) < 1.01
        for q in (0.25, 0.5, 0.75):
            assert float((share < q).float().mean()) == pytest.approx(q, abs=0.05)
    assert float((got.snr[3000:] < 0.04).float().mean()) == pytest.approx(0.43, abs=0.05)


@pytest.mark.parametrize("given", ["0.6 1 10 0.5 1 10", "0.5 10 1"])
def test_impossible_ranges(given: str, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, numbers = ["train", "--data", str(small), "--out", "b"], given.split()
    for k in range(0, len(numbers), 3):
        args += ["--log-snr", *numbers[k : k + 3]]
    assert main(args) == 2
    assert "LOW is below HIGH" in capsys.readouterr().err


@pytest.mark.parametrize("variance", ["beta", "posterior", "learned"])
@pytest.mark.parametrize("ranges", [(), ((0.3, 0.04, 9999.0), (0.2, 1.0, 10.0))])
def test_bound_is_the_code_length(small: Path, variance: Any, ranges: Any) -> None:
    """T times the mean over t of the terms is what code_length adds up."""
    learned = variance == "learned"
    cfg = replace(SHORT, batch=4096, objective="bound", variance=variance, log_snr=ranges)
    this = task(small, cfg, variance=learned)
    this.x = this.x[..., 12:20, 12:20].contiguous()  # less to compute

    class Silent(torch.nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[Any, ...]:
            zero = torch.zeros_like(x_t)
            return zero, zero + 0.5 if learned else None

    got = float(this.losses(Silent()).loss)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> tasks.Denoised:
        ab = torch.from_numpy(this.schedule.alpha_bar)[t][:, None, None, None]
        x_0 = x_t / ab.sqrt()  # there is no noise
        return tasks.Denoised(x_0, torch.full_like(x_0, 0.5) if learned else None)

    x_0 = data.to_unit(this.x)
    whole = code_length(denoise, x_0, this.schedule, variance, draws=200, clip=False)
    assert got == pytest.approx(float((whole.steps + whole.decoder).mean()), rel=0.1)


def test_learned_variances_do_not_disturb_the_mean(small: Path) -> None:
    this = task(small, replace(SHORT, variance="learned"), variance=True)
    torch.manual_seed(0)
    net = UNet(this.net)
    this.losses(net).loss.backward()
    weight = net.out.weight.grad
    assert weight is not None
    # The bound's own gradient, a thousandth of T nats, would be far larger than L_simple's.
    assert bool(weight[:3].any()) and bool(weight[3:].any())
    torch.manual_seed(0)
    other = UNet(this.net)
    task(small).losses(Mean(other)).loss.backward()
    simple = other.out.weight.grad
    assert simple is not None and torch.allclose(simple[:3], weight[:3], atol=1e-6)


class Mean(torch.nn.Module):
    """Of a network with variances, the mean alone."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[Any, ...]:
        return self.net(x_t, t)[0], None


def test_coarse_pictures_serve_at_high_noise_only(small: Path, tmp_path: Path) -> None:
    black = tmp_path / "black.npz"
    np.savez(black, images=np.zeros((50, 32, 32, 3), np.uint8))
    this = tasks.Pictures([small], [], [black], replace(SHORT, batch=2000), NET, "cpu")
    this.load(0, 0, 1)
    drawn: list[tuple[int, bool]] = []

    def losses_of(model: Any, x_0: torch.Tensor, t: torch.Tensor, generator: Any) -> None:
        drawn.extend(zip(t.tolist(), (x_0.amax((1, 2, 3)) == -1).tolist(), strict=True))

    this.losses_of = losses_of  # type: ignore[assignment, method-assign]
    this.losses(UNet(NET))
    first = this.first_coarse
    assert this.schedule.snr[first] < this.cfg.coarse_below <= this.schedule.snr[first - 1]
    assert {t < first for t, _ in drawn} == {True, False}
    assert not any(dark for t, dark in drawn if t < first)
    late = [dark for t, dark in drawn if t >= first]
    assert sum(late) / len(late) == pytest.approx(50 / 62, abs=0.05)


def test_validation_is_deterministic(small: Path) -> None:
    this = task(small)
    net = UNet(NET)
    first = str(this.validate(net))
    torch.manual_seed(7)
    assert str(this.validate(net)) == first


def test_from_training_to_a_file(small: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "a.ckpt", tmp_path / "m.safetensors"
    arguments = [
        "train", "--preset", "cifar10", "--data", str(small), "--val", str(small), "--out",
        str(path), "--channels", "32,32", "--blocks", "1", "--prediction", "x0", "--batch", "4",
        "--patches", "8", "--warmup", "1", "--device", "cpu",
    ]  # fmt: skip
    assert main(arguments) == 0
    with safe_open(path, "pt") as f:
        assert json.loads(f.metadata()["progress"])["patches"] == 8
    tables = calibrate(path, [small], out, name="small", pictures=2, say=lambda _: None)
    model = load_model(out)
    assert model.unet.cfg.attention == (0,)
    assert float(tables.error[-1].max()) > 0
    x = np.load(small)["images"][3]
    file = encode(x, model=out, steps=3, effort=1, lossless=True)
    np.testing.assert_array_equal(np.asarray(decode(file, model=out)), x)


def test_the_blend_is_never_worse_than_wieners_estimate() -> None:
    """Of a network that knows nothing (eps = 0), on Gaussian bands."""
    net = UNet(replace(NET, patch=4, attention=())).eval().requires_grad_(False)
    assert net.cfg.prediction == "eps"
    ones = torch.ones(1, 192, 4, 4)
    assert denoiser.blended(net, ones, ones, torch.tensor([0.3])).eq(1).all()
    model = Model("some", net, new_tables(SMALL, scales=False), SMALL, bytes(32))
    rng = np.random.default_rng(0)
    shots = list((rng.normal(100, 10, (48, 32, 32, 3)).clip(0, 255)).astype(np.uint8))
    fit_blend(model, shots)
    x = data.to_unit(torch.from_numpy(np.stack(shots)).permute(0, 3, 1, 2))
    mean, variance = x.mean(), x.var()
    denoise = denoiser.of_pictures(net, Schedule())
    for t in (300, 500, 700, 1000):
        snr = Schedule().snr[t]
        ab = snr / (1 + snr)
        x_t = ab**0.5 * x + (1 - ab) ** 0.5 * torch.randn_like(x)
        left = float((denoise(x_t, torch.full((48,), t)).x_0 - x).square().mean())
        assert left == pytest.approx(float(variance / (1 + variance * snr)), rel=0.05)
        assert left < (mean - x).square().mean() * 1.03
    # Where there is signal enough the network is left alone.
    m, snr = torch.randn(1, 192, 4, 4), torch.tensor([10.0])
    assert denoiser.blended(net, m + 1, m, snr).equal(m + 1)


def test_resumes(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    assert train.train([small], path, NET, SHORT, coarse=[small]).step == 2
    assert train.train([small], path, NET, replace(SHORT, patches=12)).step == 3
