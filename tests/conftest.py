"""What the tests share: an untrained model, small enough to encode a picture in no time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.network.exact import ExactConfig, ExactUNet
from ddpm_codec.network.modelfile import save_model
from ddpm_codec.network.tables import new_tables
from ddpm_codec.network.unet import UNet, UNetConfig


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file: a small network with random weights, tables straight from the formula."""
    torch.manual_seed(0)
    net = ExactUNet(
        ExactConfig(channels=(8, 8, 8, 8), down=(1, 1, 1, 1), up=(1, 1, 1), embedding=16)
    )
    for layer in (net.out, net.scales, net.block_out):  # a new network says 0
        torch.nn.init.normal_(layer.weight, std=0.025)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_model(path, "tiny", net, new_tables(Ladder(), scales=True), Ladder())
    return path


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """(40, 28) RGB: smooth, with an edge and some grain."""
    y, x = np.mgrid[:28, :40]
    rng = np.random.default_rng(0)
    rgb = np.stack([4 * x + y, 255 - 5 * x, 60 + 6 * y], -1) + rng.normal(0, 6, (28, 40, 3))
    rgb[8:20, 10:14] = 240
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of the paper's kind: a few channels, attention at 16x16, random weights."""
    torch.manual_seed(0)
    net = UNet(
        UNetConfig(
            patch=1,
            channels=(32, 32),
            blocks=1,
            attention=(1,),
            embedding=32,
            prediction="eps",
            wiring="paper",
        )
    )
    torch.nn.init.normal_(net.out.weight, std=0.02)
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    save_model(path, "small", net, new_tables(Ladder(), scales=False), Ladder())
    return path
