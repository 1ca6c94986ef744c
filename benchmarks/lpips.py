"""LPIPS: a distance between two pictures in the features of a network trained on ImageNet.

Zhang et al. 2018, version 0.1, on AlexNet. The features after each of its five rectifiers are
normalised to unit length at every position. Their squared differences are weighted by channel,
averaged over positions, and summed. The channels' weights (``lpips-alex.safetensors``) are the
authors'. The user provides AlexNet's weights, in torchvision's file (``alexnet-owt-7be5be79.pth``).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from ddpm_codec.data import to_unit

WEIGHTS = Path(__file__).resolve().parent / "lpips-alex.safetensors"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]


def alexnet() -> nn.Sequential:
    """Krizhevsky 2014 up to its last rectifier, with torchvision's numbers of layers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


@lru_cache(1)
def load_trunk(path: Path) -> nn.Sequential:
    """AlexNet with the weights of a file. Raises click.UsageError if it does not hold them."""
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
        net = alexnet()
        net.load_state_dict({k: given[f"features.{k}"].float() for k in net.state_dict()})
    except Exception:  # torch raises errors of any kind for other files
        raise click.UsageError(f"--lpips: {path}: not AlexNet's weights") from None
    return net.eval().requires_grad_(False)


def features(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The five normalised feature maps, (1, C, h, w) each. x: (1, 3, H, W) in [-1, 1]."""
    shift, scale = (torch.tensor(v)[:, None, None] for v in (SHIFT, SCALE))
    out, x = [], (x - shift) / scale
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            out.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
    return out


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8], trunk: Path) -> float:
    """LPIPS of two pictures (H, W, 3), which are at least 32 pixels wide and high."""
    net, weights = load_trunk(trunk), load_file(WEIGHTS)
    with torch.no_grad():
        maps = (features(net, to_unit(torch.tensor(x).permute(2, 0, 1)[None])) for x in (a, b))
        return sum(
            float(((x - y).square() * weights[f"lin{k}"]).sum(1).mean())
            for k, (x, y) in enumerate(zip(*maps, strict=True))
        )
