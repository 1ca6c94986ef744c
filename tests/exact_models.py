"""Model files for tests, small and with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.network.exact import Convolution, ExactConfig, ExactUNet, Quantiser
from ddpm_codec.network.modelfile import save_model
from ddpm_codec.network.tables import Tables, new_tables
from ddpm_codec.network.unet import UNet, UNetConfig

LADDER = Ladder()
TINY = ExactConfig(channels=(8, 12, 16, 8), down=(1, 1, 1, 1), up=(1, 1, 1), embedding=16)


def exact_network(cfg: ExactConfig = TINY, seed: int = 0) -> ExactUNet:
    """Of which no layer is at zero, and no two channels are alike."""
    torch.manual_seed(seed)
    net = ExactUNet(cfg)
    for layer in net.modules():
        if isinstance(layer, Convolution):
            torch.nn.init.normal_(layer.weight, std=0.7 / layer.weight[0].numel() ** 0.5)
        elif isinstance(layer, Quantiser):
            torch.nn.init.normal_(layer.gain, 1.0, 0.3)
            if layer.offset is not None:
                torch.nn.init.normal_(layer.offset, 1.0, 0.5)
    net.get_buffer("sigma_data").copy_(torch.rand(192) * 1.5 + 0.1)
    return net


def fitted(scales: bool, seed: int = 0) -> Tables:
    """Tables that differ everywhere, and expect quite another picture."""
    t, rng = new_tables(LADDER, scales), np.random.default_rng(seed)
    t.mean = 0.3 * rng.standard_normal(192)
    t.error = t.error * np.exp(rng.normal(1, 1.5, t.error.shape)).astype(np.float32)
    loud = np.exp(rng.normal(0, 0.3, t.variance.shape)).astype(np.float32)
    t.variance = np.sort(t.variance * loud, axis=-1)
    t.check(LADDER, scales)
    return t


def exact_model(path: Path) -> Path:
    save_model(path, "tiny", exact_network(), fitted(True), LADDER)
    return path


def paper_model(path: Path) -> Path:
    torch.manual_seed(0)
    cfg = UNetConfig(patch=1, channels=(32, 32), blocks=1, attention=(1,), embedding=32)
    net = UNet(cfg)
    torch.nn.init.normal_(net.out.weight, std=0.02)
    blend = net.get_buffer("blend")
    blend += 0.1 * torch.randn(blend.shape)
    save_model(path, "small", net, fitted(False), LADDER)
    return path
