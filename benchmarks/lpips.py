"""LPIPS: the distance of two pictures as a network trained to see objects has it.

Zhang et al. 2018, version 0.1, on AlexNet: the maps after its five rectifiers, each position of
unit length; squared differences, weighted by channel, averaged over positions, added up. The
channels' weights (``lpips-alex.safetensors``) are the authors'; AlexNet's own come from a file of
the user's, as torchvision has them (``alexnet-owt-7be5be79.pth``).
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

WEIGHTS = Path(__file__).resolve().parent / "lpips-alex.safetensors"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]


def alexnet() -> nn.Sequential:
    """Krizhevsky 2014 up to its last rectifier; the layers' numbers are torchvision's."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


@lru_cache(1)
def load_trunk(path: Path) -> nn.Sequential:
    """AlexNet with the weights of a file. Raises click.UsageError."""
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
        net = alexnet()
        net.load_state_dict({k: given[f"features.{k}"].float() for k in net.state_dict()})
    except Exception:  # whatever torch makes of a file that is something else
        raise click.UsageError(f"--lpips: {path}: not AlexNet's weights") from None
    return net.eval().requires_grad_(False)


def features(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The five maps of unit vectors, (1, C, h, w) each. x: (1, 3, H, W) in [-1, 1]."""
    shift, scale = (torch.tensor(v)[:, None, None] for v in (SHIFT, SCALE))
    out, x = [], (x - shift) / scale
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            out.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
    return out


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8], trunk: Path) -> float:
    """Of two pictures (H, W, 3), at least 32 pixels wide and high."""
    net, weights = load_trunk(trunk), load_file(WEIGHTS)
    with torch.no_grad():
        maps = (
            features(net, torch.tensor(x).permute(2, 0, 1)[None].float() / 127.5 - 1)
            for x in (a, b)
        )
        return sum(
            float(((x - y).square() * weights[f"lin{k}"]).sum(1).mean())
            for k, (x, y) in enumerate(zip(*maps, strict=True))
        )
