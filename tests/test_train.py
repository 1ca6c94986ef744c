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
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ddpm_codec import data
from ddpm_codec.cli.main import main
from ddpm_codec.errors import DataError, ModelError
from ddpm_codec.network.unet import UNet, UNetConfig
from ddpm_codec.training import states, tasks, train
from ddpm_codec.training.calibrate import load_averaged
from ddpm_codec.training.optimizer import Optimizer
from ddpm_codec.training.tasks import Bins
from ddpm_codec.training.train import Progress, TrainConfig, learning_rate

NET = UNetConfig(patch=4, channels=(32, 32), blocks=1, embedding=32)
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
    assert about["progress"]["step"] == 2 and about["network"]["channels"] == [32, 32]
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

    longer = train.train([pictures], path, NET, replace(SHORT, patches=8))
    assert (longer.step, longer.patches) == (4, 8) and longer.seconds > progress.seconds
    second = load_file(path)
    assert set(second) == set(first)
    assert not torch.equal(second["net.stem.weight"], first["net.stem.weight"])
    assert float(second["opt.step.stem.weight"]) == 4


def test_checkpoint_holds_everything(checkpoint: Path, tmp_path: Path) -> None:
    nets = [UNet(NET), UNet(NET)]
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
    ema, net = stored["ema.stem.weight"], stored["net.stem.weight"]
    assert not torch.equal(ema, net)


def test_other_network_is_refused(checkpoint: Path, pictures: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(ModelError, match="another network"):
        train.train([pictures], checkpoint, replace(NET, blocks=2), SHORT)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("kind", ["checkpoint", "model"])
def test_start_from(
    checkpoint: Path, tiny_model: Path, pictures: Path, tmp_path: Path, kind: str
) -> None:
    start = checkpoint if kind == "checkpoint" else tiny_model
    out, cfg = tmp_path / "a.ckpt", replace(SHORT, lr=0.0)
    progress = train.train([pictures], out, NET, cfg, start=start)
    assert progress.step == 2  # a new run
    assert progress.earlier == (12 if kind == "checkpoint" else 0)
    prefix = "ema." if kind == "checkpoint" else "net."
    given, got = load_file(start), load_file(out)
    for name in UNet(NET).state_dict():
        assert torch.equal(got[f"ema.{name}"], given[prefix + name].float()), name
    with pytest.raises(ModelError, match="start from"):
        train.train([pictures], tmp_path / "b.ckpt", NET, cfg, start=pictures / "0.png")


def test_start_from_another_network_takes_what_fits(checkpoint: Path) -> None:
    given = load_file(checkpoint)
    torch.manual_seed(0)
    net = UNet(replace(NET, channels=(32, 64)))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    progress, whole = train.start_from(checkpoint, net)
    assert (progress.earlier, whole) == (0, False)
    fits = [before[k].shape == given[f"ema.{k}"].shape for k in before]
    assert any(fits) and not all(fits)
    for (name, got), fit in zip(net.state_dict().items(), fits, strict=True):
        assert torch.equal(got, given[f"ema.{name}"] if fit else before[name]), name
    with pytest.raises(ModelError, match="no weights"):
        train.start_from(checkpoint, UNet(UNetConfig(8, (8,), embedding=16, precisions=False)))


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
    assert f"{sum(p.numel() for p in UNet(NET).parameters()):,} parameters" in err


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
        "net = UNetConfig(patch=4, channels=(32, 32), blocks=1, embedding=32)\n"
        "print(train([Path(sys.argv[1])], Path(sys.argv[2]), net, cfg, report_every=1))"
    )
    arguments = [sys.executable, "-c", code, str(pictures), str(tmp_path / "a.ckpt")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=15)
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


def test_loss_bins() -> None:
    bins = Bins()
    snr = torch.tensor([0.03, 0.1, 1.0, 19.0, 21.0, 3000.0])
    eps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    bins.add(eps, torch.full((6,), 0.5), snr)
    assert str(bins) == "eps 10.5000 [1.5000 4.0000 8.0000 16.0000 32.0000] scale 0.5000"
    bins.add(torch.tensor([6.0]), torch.tensor([4.0]), torch.tensor([0.05]))
    assert str(bins) == "eps 9.8571 [3.0000 4.0000 8.0000 16.0000 32.0000] scale 1.0000"
    bins.reset()
    assert str(bins) == "eps 0.0000 [0.0000 0.0000 0.0000 0.0000 0.0000] scale 0.0000"


def test_losses_of_a_silent_network() -> None:
    """eps = 0 and lam = 0: the error is M's own."""
    x = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = UNet(NET)
    c = tasks.coefficients(x.to(torch.uint8))
    state = states.draw(c, torch.Generator().manual_seed(1))
    eps, scale, lam = tasks.losses(net, c, state, "eps")
    assert eps.shape == scale.shape == (64,) and lam.shape == c.shape
    # What is known has unit noise (or less, where one level finer); the scales' loss is mean |e|.
    assert 0.4 < float(eps.detach()[state.snr > 20].mean()) < 1.6
    assert bool((scale.square() <= eps + 1e-6).all())
    # The scale's loss does not train the estimate.
    scale.sum().backward()
    assert net.out.weight.grad is None or not net.out.weight.grad.any()
    assert net.scales.bias.grad.any()


def test_validation_is_deterministic(checkpoint: Path, pictures: Path) -> None:
    net, _ = load_averaged(checkpoint)
    x = data.validation_crops(data.list_pictures([pictures]), 128, 2)
    assert x.shape == (2, 3, 128, 128) and x.dtype == torch.uint8
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    torch.manual_seed(1)
    first = tasks.validate(net, x, autocast)
    assert float(first.count.sum()) >= 12 and bool(torch.isfinite(first.sum).all())
    torch.manual_seed(2)
    assert str(tasks.validate(net, x, autocast)) == str(first)
    torch.nn.init.ones_(net.scales.bias)
    assert str(tasks.validate(net, x, autocast)) != str(first)


def test_prefetched_crops_are_those_of_the_source(pictures: Path) -> None:
    paths = data.list_pictures([pictures])
    ahead = data.Prefetch(data.Crops(paths, 64, 3), 4)
    got = torch.cat([ahead.next(n) for n in (1, 0, 5, 2)])
    source = data.Crops(paths, 64, 3)
    assert torch.equal(got, torch.cat([source.batch(4), source.batch(4)]))


@pytest.mark.slow
def test_two_processes(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.ckpt"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "ddpm_codec", "train", "--data", str(pictures), "--out", str(path),
        "--channels", "32,32", "--patch", "4", "--blocks", "1", "--size", "64", "--batch", "2",
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
    options = [
        "--channels",
        "32,32",
        "--patch",
        "4",
        "--blocks",
        "1",
        "--size",
        "64",
        "--batch",
        "2",
    ]
    arguments = ["train", "--data", str(pictures), "--out", str(path), *options, "--device", "cpu"]
    assert main([*arguments, "--patches", "2", "--dry-run"]) == 0
    assert not path.exists()
    assert main([*arguments, "--patches", "2"]) == 0
    assert metadata(path)["progress"]["step"] == 1
