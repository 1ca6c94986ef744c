"""The paper's network: its shapes, and that it is torch's normalisation and the paper's size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_codec.errors import ModelError
from ddpm_codec.network import modelfile
from ddpm_codec.network.exact import sinusoidal
from ddpm_codec.network.unet import PAPER, GroupNorm, UNet, UNetConfig

FEW: dict[str, Any] = {"blocks": 1, "embedding": 32}
# For 32x32 pictures, narrower: four resolutions, attention at 16x16.
NARROW = replace(PAPER, channels=(32, 64, 64, 64), embedding=32)


def network(cfg: UNetConfig, seed: int = 0) -> UNet:
    """With no weight at zero: a new network's output layers are."""
    torch.manual_seed(seed)
    net = UNet(cfg)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "cfg",
    [
        UNetConfig(channels=(32, 32, 32, 32), **FEW),
        UNetConfig(patch=2, channels=(32, 32, 32), attention=(), wiring="lean", **FEW),
        UNetConfig(patch=8, channels=(32,), attention=(), **FEW),
        UNetConfig(patch=8, channels=(32, 64), attention=(1,), variance=True, **FEW),
        UNetConfig(patch=4, channels=(32, 32, 32), middle=0, attention=(0, 2), **FEW),
        NARROW,
        replace(NARROW, wiring="lean", middle=1),
    ],
    ids=lambda cfg: f"patch{cfg.patch}-{len(cfg.channels)}-{cfg.wiring}",
)
def test_shapes(cfg: UNetConfig) -> None:
    net = network(cfg)
    h, w = cfg.multiple * 2, cfg.multiple * 3
    assert cfg.multiple % cfg.patch == 0 and cfg.multiple % 8 == 0
    x, level = torch.randn(2, 3, h, w), torch.tensor([10.0, 700.0])
    y, v = net(x, level)
    assert y.shape == (2, 3, h, w)
    assert bool(torch.isfinite(y).all()) and float(y.std()) > 0
    assert v is None if not cfg.variance else v.shape == y.shape
    other, _ = net(x, level + 1)
    assert not torch.equal(other, y)


def test_new_network_says_nothing() -> None:
    torch.manual_seed(0)
    net = UNet(UNetConfig(patch=4, channels=(32, 32), variance=True, **FEW))
    y, v = net(torch.randn(1, 3, 16, 16), torch.tensor([5.0]))
    assert not y.any() and bool((v == 0.5).all())


def test_sinusoidal_embedding() -> None:
    e = sinusoidal(torch.tensor([0.0, 3.0]), 6)
    assert e[0].tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.sin([3.0, 3.0 / 100, 3.0 / 10000])
    np.testing.assert_allclose(e[1, :3].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("attention", [(), (1,)])
def test_group_norm_and_attention_see_everything(attention: tuple[int, ...]) -> None:
    """Which is why such a network sees small pictures alone."""
    net = network(UNetConfig(patch=4, channels=(32, 32), attention=attention, **FEW)).double()
    x = torch.randn(1, 3, 16, 256, dtype=torch.float64)
    level = torch.tensor([300.0])
    y, _ = net(x, level)
    x[..., 248:] += 1.0
    other, _ = net(x, level)
    assert (y - other).abs().amax((0, 1, 2))[: 248 - 96].any()


def test_group_norm_is_torchs() -> None:
    rng = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(2, 64, 6, 4, generator=rng)
    ours, torchs = GroupNorm(64), torch.nn.GroupNorm(32, 64, eps=1e-6)
    for p in (*ours.parameters(),):
        p.data = torch.randn(p.shape, generator=rng)
    torchs.load_state_dict(ours.state_dict())
    for memory in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=memory)
        torch.testing.assert_close(ours(y), torchs(y))
    torch.testing.assert_close(ours.double()(x.double()), torchs.double()(x.double()))
    assert ours(torch.ones(1, 64, 2, 2).double()).isfinite().all()
    with pytest.raises(ModelError, match="groups"):
        GroupNorm(48)


def test_the_papers_network() -> None:
    """DDPM appendix B: 35.7 million parameters; ours in its likeness fits in 16 MB."""
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in modelfile.new_network(cfg).parameters())
            for name, cfg in modelfile.PRESETS.items()
        }
    assert sizes["cifar10-paper"] == 35_746_307
    assert 2 * sizes["cifar10"] < 16e6 - 200_000
    # Of a photographs' network the embedding is not stored, and a weight takes a byte.
    assert sizes["photo"] < 16e6
    assert (PAPER.attention, PAPER.dropout, PAPER.prediction) == ((1,), 0.1, "eps")
