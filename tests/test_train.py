"""Training runs, stops, goes on, and runs on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import SMALL, TINY, small_network
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ddpm_codec import data
from ddpm_codec.cli.main import main
from ddpm_codec.errors import DataError, ModelError
from ddpm_codec.network.exact import ExactUNet
from ddpm_codec.network.unet import UNet, UNetConfig
from ddpm_codec.training import states, tasks, train
from ddpm_codec.training.calibrate import load_averaged
from ddpm_codec.training.checkpoint import read_weights, save_parts
from ddpm_codec.training.config import TrainConfig
from ddpm_codec.training.optimizer import Optimizer
from ddpm_codec.training.tasks import Bins
from ddpm_codec.training.train import Progress, done, learning_rate

NET = TINY
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
SHORT = TrainConfig(patches=4, size=64, batch=2, lr=3e-3, warmup=1)  # two steps


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of 272x264: gradients, edges and grain."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:264, :272]
    for k in range(3):
        rgb = np.stack([x * 0.9, y * 0.9, 250 - 0.4 * (x + y)], -1) + rng.normal(
            0, 5, (264, 272, 3)
        )
        rgb[40 * k : 40 * k + 60, 50:130] = (200, 30, 30 * k)
        Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "tiny.ckpt"
    progress = train.train([pictures], path, NET, replace(SHORT, patches=12))
    assert (progress.step, progress.patches) == (6, 12)
    return path


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as f:
        return {k: json.loads(v) for k, v in f.metadata().items() if v[0] == "{"}


def test_run_stops_and_goes_on(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.ckpt"
    progress = train.train([pictures], path, NET, SHORT, [pictures])
    assert (progress.step, progress.patches) == (2, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    about = metadata(path)
    assert about["progress"]["step"] == 2 and about["network"]["channels"] == [8, 8, 8, 8]
    first = load_file(path)
    assert any(bool(v.any()) for k, v in first.items() if k.startswith("net.out"))
    err = capfd.readouterr().err
    assert "100.0%" in err and "patches/s" in err and "validation eps" in err

    # It is over: asked again, nothing changes.
    again = train.train([pictures], path, NET, SHORT)
    assert (again.step, again.patches) == (2, 4)
    assert "resumed" in capfd.readouterr().err
    for key, value in load_file(path).items():
        assert torch.equal(value, first[key]), key

    capfd.readouterr()
    longer = train.train([pictures], path, NET, replace(SHORT, patches=8))
    assert "with another patches: 8 in place of 4\n" in capfd.readouterr().err
    assert (longer.step, longer.patches) == (4, 8) and longer.seconds > progress.seconds
    second = load_file(path)
    assert set(second) == set(first)
    assert not torch.equal(second["net.stem.weight"], first["net.stem.weight"])
    assert float(second["opt.step.stem.weight"]) == 4


def test_checkpoint_holds_everything(checkpoint: Path, tmp_path: Path) -> None:
    nets = ExactUNet(NET), ExactUNet(NET)
    nets[0].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    opt = Optimizer(nets[0], 1e-3, 0.0, muon=True)
    progress = train.load_checkpoint(checkpoint, *nets, opt, NET)
    assert (progress.step, progress.patches) == (6, 12) and progress.seconds > 0
    stored = load_file(checkpoint)
    for prefix, net in zip(("net", "ema"), nets, strict=True):
        for name, p in net.named_parameters():
            assert torch.equal(p, stored[f"{prefix}.{name}"]), name
    train.save_checkpoint(tmp_path / "copy.ckpt", *nets, opt, progress, NET)
    copy = load_file(tmp_path / "copy.ckpt")
    assert set(copy) == set(stored)
    assert all(torch.equal(copy[k], stored[k]) for k in stored)
    assert metadata(tmp_path / "copy.ckpt") == metadata(checkpoint)
    assert not torch.equal(stored["ema.stem.weight"], stored["net.stem.weight"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("muon", [True, False])
def test_a_restored_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, muon: bool, device: str
) -> None:
    """The same gradients make the same weights: nothing of the optimizer's state is missing."""

    def run(steps: int, seed: int) -> None:
        for k in range(steps):
            generator = torch.Generator().manual_seed(seed + k)
            for p in net.parameters():
                g = torch.randn(p.shape, generator=generator).to(device)
                p.grad = torch.empty_like(p).copy_(g)
            opt.step(1e-3)

    def new() -> tuple[ExactUNet, Optimizer]:
        net = ExactUNet(NET).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net, Optimizer(net, 1e-3, 0.01, muon)

    net, opt = new()
    run(3, 0)
    path, one, first = tmp_path / "a.ckpt", net, opt
    train.save_checkpoint(path, net, net, opt, Progress(3, 6), NET)
    run(2, 10)
    net, opt = new()
    assert train.load_checkpoint(path, net, ExactUNet(NET).to(device), opt, NET) == Progress(3, 6)
    for p, state in opt.adam.state.items():
        assert state["step"].device == p.device and float(state["step"]) == 3
        assert state["exp_avg"].stride() == p.stride()
    run(2, 10)
    for (name, a), b in zip(one.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert set(first.tensors()) == set(opt.tensors())
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, opt.tensors()[name]), name


def test_other_network_is_refused(checkpoint: Path, pictures: Path) -> None:
    before = checkpoint.read_bytes()
    for other in (replace(NET, embedding=32), SMALL):
        with pytest.raises(ModelError, match="another network"):
            train.train([pictures], checkpoint, other, SHORT)
    assert checkpoint.read_bytes() == before


def test_start_from(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    out, cfg = tmp_path / "a.ckpt", replace(SHORT, lr=0.0)
    progress = train.train([pictures], out, NET, cfg, start=checkpoint)
    assert (progress.step, progress.earlier) == (2, 12)  # a new run
    given, got = load_file(checkpoint), load_file(out)
    for name in ExactUNet(NET).state_dict():
        assert torch.equal(got[f"ema.{name}"], given[f"ema.{name}"]), name
    for bad in (pictures / "0.png", tmp_path):
        with pytest.raises(ModelError, match="not a checkpoint"):
            train.train([pictures], tmp_path / "b.ckpt", NET, cfg, start=bad)


def test_start_from_models(tiny_model: Path, small_model: Path) -> None:
    """Of the paper's kind its weights; of photographs, such as give its integers."""
    net = UNet(replace(SMALL, dropout=0.3))
    assert train.start_from(small_model, net) == (Progress(), True)
    expected = small_network().state_dict()
    assert all(torch.equal(v, expected[k].half().float()) for k, v in net.state_dict().items())
    photo = ExactUNet(TINY)
    assert train.start_from(tiny_model, photo) == (Progress(), True)
    given = load_file(tiny_model)
    for name, got in photo.integers().items():
        off = (got.double() - given[f"net.{name}"].double()).abs().max()
        assert off <= (2.0 if name.endswith(".levels") else 1e-6), name
    with pytest.raises(ModelError, match="holds another network's integers"):
        train.start_from(tiny_model, ExactUNet(replace(TINY, channels=(8, 8, 8, 16))))


def test_start_from_another_network_takes_what_fits(checkpoint: Path) -> None:
    given = load_file(checkpoint)
    torch.manual_seed(0)
    net = ExactUNet(replace(NET, channels=(8, 8, 8, 16)))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    progress, whole = train.start_from(checkpoint, net)
    assert (progress.earlier, whole) == (0, False)
    fits = [before[k].shape == given[f"ema.{k}"].shape for k in before]
    assert any(fits) and not all(fits)
    for (name, got), fit in zip(net.state_dict().items(), fits, strict=True):
        assert torch.equal(got, given[f"ema.{name}"] if fit else before[name]), name
    with pytest.raises(ModelError, match="no weights"):
        train.start_from(checkpoint, UNet(UNetConfig(8, (32,), attention=(), embedding=48)))


def test_parts(tmp_path: Path) -> None:
    """Half-precision weights in files of bounded size, the averaged ones by themselves."""
    torch.manual_seed(0)
    net, ema = ExactUNet(NET), ExactUNet(NET)
    limit, folder = (1 << 16) + 60_000, tmp_path / "a" / "parts"
    save_parts(folder, net, ema, Progress(7, 8, 9.0), NET, limit)
    names = sorted(p.name for p in folder.iterdir())
    count = len(names) // 2
    assert count > 1
    assert names == [f"{kind}-{k}.safetensors" for kind in ("ema", "net") for k in range(count)]
    assert max(p.stat().st_size for p in folder.iterdir()) <= limit
    for kind, module in (("ema", ema), ("net", net)):
        found: dict[str, torch.Tensor] = {}
        for k in range(count):
            found |= load_file(folder / f"{kind}-{k}.safetensors")
            assert metadata(folder / f"{kind}-{k}.safetensors")["progress"]["patches"] == 8
        state = module.state_dict()
        assert found.keys() == {f"{kind}.{name}" for name in state}
        assert all(torch.equal(found[f"{kind}.{k}"], v.half()) for k, v in state.items())
    cfg, weights, progress = read_weights(folder)
    assert (cfg, progress) == (NET, Progress(7, 8, 9.0))
    other = ExactUNet(NET)
    assert train.start_from(folder, other) == (Progress(earlier=8), True)
    averaged, _ = load_averaged(folder)
    for name, tensor in ema.state_dict().items():
        half = tensor.half().float()
        assert torch.equal(weights[name], half) and torch.equal(other.state_dict()[name], half)
        assert torch.equal(averaged.state_dict()[name], half)
    (folder / "ema-1.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights to start from"):
        train.start_from(folder, other)
    with pytest.raises(ModelError, match="not a checkpoint"):
        load_averaged(folder)


def test_damaged_checkpoint_is_refused(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(ModelError):
        train.train([pictures], path, NET, SHORT)
    with pytest.raises(ModelError):
        load_averaged(path)
    assert path.read_bytes() == b"no checkpoint at all"


def test_dry_run_writes_nothing(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train.train([pictures], tmp_path / "a.ckpt", NET, SHORT, dry_run=True)
    assert not list(tmp_path.iterdir())
    err = capfd.readouterr().err
    assert "3 pictures" in err
    assert f"{sum(p.numel() for p in ExactUNet(NET).parameters()):,} parameters" in err


def test_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train.train([tmp_path], tmp_path / "a.ckpt", NET, SHORT)
    Image.new("RGB", (63, 200)).save(tmp_path / "narrow.png")
    with pytest.raises(DataError, match="64"):
        train.train([tmp_path], tmp_path / "a.ckpt", NET, SHORT)


def test_small_batches_make_progress(pictures: Path, tmp_path: Path) -> None:
    """Three crops of 32x32 are less than one patch of 64x64, and must count all the same."""
    code = (
        "import sys; from pathlib import Path; from ddpm_codec.training.train import *\n"
        "cfg = TrainConfig(patches=2, size=32, batch=3)\n"
        "net = ExactConfig((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1), 16)\n"
        "print(train([Path(sys.argv[1])], Path(sys.argv[2]), net, cfg, report_every=1))"
    )
    arguments = [sys.executable, "-c", code, str(pictures), str(tmp_path / "a.ckpt")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_learning_rate() -> None:
    cfg = TrainConfig(patches=1000, lr=0.5, warmup=10, decay=0.25)

    def rate(step: int, patches: int) -> float:
        return learning_rate(cfg, Progress(step, patches))

    assert [rate(k, k) for k in range(12)] == pytest.approx(
        [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.5, 0.5]
    )
    assert rate(100, 400) == rate(100, 750) == 0.5
    assert rate(100, 875) == pytest.approx(0.25)
    assert rate(100, 999) == pytest.approx(0.002)
    assert rate(100, 1000) == rate(100, 1001) == 0


def test_a_rate_that_does_not_fall() -> None:
    cfg = TrainConfig(patches=1000, lr=0.5, warmup=2, decay=0)
    rates = [learning_rate(cfg, Progress(k, 100 * k)) for k in range(12)]
    assert rates == [0.25, *[0.5] * 11]


def test_a_run_of_some_seconds() -> None:
    cfg = TrainConfig(seconds=200.0, patches=3, lr=0.5, warmup=1, decay=0.5)
    for seconds, rate in ((0.0, 0.5), (99.0, 0.5), (150.0, 0.25), (199.0, 0.005), (200.0, 0.0)):
        progress = Progress(10, 10**9, seconds)
        assert done(cfg, progress) == seconds / 200
        assert learning_rate(cfg, progress) == pytest.approx(rate)


def test_seconds_are_counted_over_all_parts_of_a_run(pictures: Path, tmp_path: Path) -> None:
    path, cfg = tmp_path / "a.ckpt", replace(SHORT, seconds=0.5, patches=1)
    first = train.train([pictures], path, NET, cfg)
    assert first.step > 0 and 0.5 <= first.seconds < 20
    longer = first.seconds + 0.3
    second = train.train([pictures], path, NET, replace(cfg, seconds=longer))
    assert second.step > first.step and second.seconds >= longer
    third = train.train([pictures], path, NET, replace(cfg, seconds=longer))
    assert (third.step, third.seconds) == (second.step, second.seconds)


@pytest.mark.parametrize("what", [float("nan"), float("inf"), 1e38])
def test_a_step_that_overflows(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: float
) -> None:
    """It harms neither weights nor averages nor the optimizer's state, and the run goes on."""
    honest, calls = tasks.Photo.losses, 0

    def dishonest(self: tasks.Photo, model: torch.nn.Module) -> tasks.Losses:
        nonlocal calls
        calls += 1
        out = honest(self, model)
        return out._replace(loss=out.loss * what * what) if calls == 3 else out

    monkeypatch.setattr(tasks.Photo, "losses", dishonest)
    path = tmp_path / "a.ckpt"
    train.train([pictures], path, NET, replace(SHORT, patches=12))
    assert calls == 6
    assert all(bool(v.isfinite().all()) for v in load_file(path).values())
    net, _ = load_averaged(path)
    assert isinstance(net, ExactUNet)
    for name, tensor in net.integers().items():
        assert bool(tensor.isfinite().all()), name


def test_loss_bins() -> None:
    bins = Bins("cpu")
    snr = torch.tensor([0.03, 0.1, 1.0, 19.0, 21.0, 3000.0])
    eps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    bins.add(eps, torch.full((6,), 0.5), snr)
    assert str(bins) == "eps 10.5000 [1.5000 4.0000 8.0000 16.0000 32.0000] scale 0.5000"
    bins.add(torch.tensor([6.0]), torch.tensor([4.0]), torch.tensor([0.05]))
    assert str(bins) == "eps 9.8571 [3.0000 4.0000 8.0000 16.0000 32.0000] scale 1.0000"
    bins.reset()
    assert str(bins) == "eps 0.0000 [0.0000 0.0000 0.0000 0.0000 0.0000] scale 0.0000"


def test_losses_of_a_silent_network() -> None:
    """Its outputs are zero: where bands vary a lot, the error is M's noise."""
    x = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = ExactUNet(NET)
    net.get_buffer("sigma_data").fill_(100)
    c = tasks.coefficients(x.to(torch.uint8))
    w = torch.ones(64, 192, 1, 1)
    state = states.draw(c, w, torch.Generator().manual_seed(1))
    eps, scale, log_scale = tasks.losses(net, c, state)
    assert eps.shape == scale.shape == (64,) and log_scale.shape == c.shape
    # What is known has unit noise (or less, where one level finer); the scales' loss is mean |e|.
    assert 0.4 < float(eps.detach()[state.snr > 20].mean()) < 1.6
    assert bool((scale.square() <= eps + 1e-6).all())
    # The scale's loss does not train the estimate.
    scale.sum().backward()
    assert net.out.weight.grad is None or not net.out.weight.grad.any()
    assert net.scales.weight.grad is not None and net.scales.weight.grad.any()


def test_weights_count_in_units_of_the_noise() -> None:
    """A band known half as well has half the error in units of its own noise's deviation."""
    x = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    c = tasks.coefficients(x.to(torch.uint8))
    net = ExactUNet(NET)
    found = []
    for w in (1.0, 0.5):
        weights = torch.full((1, 192, 1, 1), w)
        nothing = torch.zeros_like(c)
        state = tasks.State(nothing, nothing, torch.tensor([4.0]), weights)
        found.append(float(tasks.losses(net, c, state)[0].detach()))
    assert found[0] == pytest.approx(4 * found[1])


def test_a_compiled_step_computes_no_constants(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transform's basis is given to it: on a GPU, making it would stall each step."""
    task = tasks.Photo([pictures], [], SHORT, "cpu")
    task.load(0, 0, 1)
    plain = task.losses(ExactUNet(NET))
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    again = tasks.Photo([pictures], [], SHORT, "cpu")
    again.load(0, 0, 1)
    monkeypatch.setattr(again, "compiled", torch.compile(tasks.losses, backend=backend))
    assert torch.allclose(again.losses(ExactUNet(NET)).eps, plain.eps, rtol=1e-4)
    assert any("conv2d" in name for name in called)
    assert not [name for name in called if "numpy" in name or "method tensor" in name]


def test_validation_is_deterministic(checkpoint: Path, pictures: Path) -> None:
    net, _ = load_averaged(checkpoint)
    x = data.validation_crops(data.list_pictures([pictures]), 128, 2)
    assert x.shape == (2, 3, 128, 128) and x.dtype == torch.uint8
    torch.manual_seed(1)
    first = tasks.validate(net, x)
    # Two crops, each through all levels, from a low SNR to a high one.
    assert 20 <= float(first.sums[:, 0].sum()) <= 36 and bool(first.sums.isfinite().all())
    assert bool((first.sums[:, 0] > 0).all()) and first.eps > 0
    torch.manual_seed(2)
    assert str(tasks.validate(net, x)) == str(first)
    torch.nn.init.ones_(net.get_submodule("scales").get_parameter("weight"))
    assert str(tasks.validate(net, x)) != str(first)


def test_the_bands_deviations_are_measured(checkpoint: Path, pictures: Path) -> None:
    """Before a new run: those of crops, of the mean far above those of high frequencies."""
    stored = load_file(checkpoint)["ema.sigma_data"]
    x = data.validation_crops(data.list_pictures([pictures]), 256, 3)
    c = tasks.coefficients(x)
    ratio = stored / c.square().mean((0, 2, 3)).sqrt()  # half of the crops are shrunk
    assert float(ratio.min()) > 0.5 and 0.7 < float(ratio[0]) < 1.4
    assert float(stored[0]) > 20 * float(stored[63])


@pytest.mark.slow
def test_two_processes(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.ckpt"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "ddpm_codec", "train", "--data", str(pictures), "--out", str(path),
        "--channels", "8,8,8,8", "--size", "64", "--batch", "2",
        "--patches", "8", "--warmup", "1", "--device", "cpu",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["two.ckpt"]
    # Two crops of one patch on each of two processes: eight patches are two steps.
    progress = metadata(path)["progress"]
    assert (progress["step"], progress["patches"]) == (2, 8)
    assert done.stderr.count("step 2 100.0%") == 1  # one process reports
    assert all(bool(torch.isfinite(v).all()) for v in load_file(path).values())


def test_command_line(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    options = ["--channels", "8,8,8,8", "--size", "64", "--batch", "2"]
    arguments = ["train", "--data", str(pictures), "--out", str(path), *options, "--device", "cpu"]
    assert main([*arguments, "--patches", "2", "--dry-run"]) == 0
    assert not path.exists()
    assert main([*arguments, "--patches", "2"]) == 0
    assert metadata(path)["progress"]["step"] == 1
