"""Small networks without a zero in them, of both kinds: those of the tests' model files."""

from __future__ import annotations

import torch

from ddpm_codec.diffusion.transform import BANDS
from ddpm_codec.network.exact import Convolution, ExactConfig, ExactUNet, Quantiser
from ddpm_codec.network.unet import UNet, UNetConfig

TINY = ExactConfig(channels=(8, 8, 8, 8), down=(1, 1, 1, 1), up=(1, 1, 1), embedding=16)
# The paper's: a few channels, attention at 16x16.
SMALL = UNetConfig(channels=(32, 32), blocks=1, attention=(1,), embedding=32)


def exact_network(cfg: ExactConfig = TINY, seed: int = 0, heads: float = 0.1) -> ExactUNet:
    """A network with random weights: a new one has zeros, so that most inputs do not matter.

    heads: scale of the last layers' weights; smaller ones make better estimates.
    """
    torch.manual_seed(seed)
    net = ExactUNet(cfg)
    with torch.no_grad():
        for name, layer in net.named_modules():
            if isinstance(layer, Convolution) and not layer.weight.any():
                share = heads if name in ("out", "scales", "block_out") else 0.5
                layer.weight.normal_(std=share * (2 / layer.weight[0].numel()) ** 0.5)
            elif isinstance(layer, Quantiser):
                layer.gain.mul_(torch.randn_like(layer.gain).mul(0.3).exp())
                if layer.offset is not None:
                    layer.offset.normal_(std=0.3)
        net.get_buffer("sigma_data").copy_(torch.linspace(1.5, -3, BANDS).exp())
    return net


def small_network(cfg: UNetConfig = SMALL, seed: int = 0, std: float = 0.02) -> UNet:
    """``std``: of the weights of its last layer, which in a new one are 0."""
    torch.manual_seed(seed)
    net = UNet(cfg)
    torch.nn.init.normal_(net.out.weight, std=std)
    return net
