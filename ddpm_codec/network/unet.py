"""The paper's denoising network: the U-Net of Ho et al. (2020, appendix B), for small pictures.

It computes in floating point. The network for photographs is in exact.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.transform import BANDS, BLOCK
from ..errors import ModelError
from .exact import sinusoidal


@dataclass(frozen=True)
class UNetConfig:
    """Everything needed to rebuild the network; stored inside the model file."""

    patch: int = 1  # pixel-unshuffle factor at the input
    channels: tuple[int, ...] = (128, 256, 256, 256)  # per resolution, each half the one before
    blocks: int = 2  # residual blocks per resolution, down and up
    middle: int = 2  # residual blocks at the bottom
    attention: tuple[int, ...] = (1,)  # indices of the resolutions with self-attention
    dropout: float = 0.1
    embedding: int = 512  # width of the noise-level embedding
    variance: bool = False  # also predicts variances (likelihood.sigma2)
    prediction: Literal["eps", "x0", "v", "mu"] = "eps"
    # "lean": only the outputs of blocks are skip connections; "paper": those of the stem and of the
    # downsamplings, too, each with a block of its own on the way up.
    wiring: Literal["lean", "paper"] = "paper"

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this (pixels)."""
        return math.lcm(self.patch * 2 ** (len(self.channels) - 1), BLOCK)


def zero_(layer: nn.Conv2d) -> None:
    """Set a layer's weights to zero, so that its output is zero at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)


# The SNRs of the table "blend", falling; from the first one up, x0_hat is not changed.
BLEND_SNRS = tuple(10.0 / 4**k for k in range(10))


class GroupNorm(nn.Module):
    """GroupNorm (Wu and He 2018), 10 times as fast as torch's in channels-last memory.

    It sums over pixels for each channel first, then over a group's few channels.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        if channels % groups:
            raise ModelError(f"{channels} channels are no multiple of {groups} groups")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        b, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, square = (
            v.mean(1, dtype=wide).view(b, self.groups, -1).mean(2, keepdim=True) for v in (y, y * y)
        )
        scale = ((square - mean * mean).clamp(min=0) + self.eps).rsqrt()
        gain = scale * self.weight.to(wide).view(1, self.groups, -1)
        shift = self.bias.to(wide).view(1, self.groups, -1) - mean * gain
        gain, shift = (v.reshape(b, 1, c).to(x.dtype) for v in (gain, shift))
        return torch.addcmul(shift, y, gain).reshape(b, h, w, c).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """norm, swish, conv, + embedding, norm, swish, (dropout), conv, + input."""

    def __init__(self, c_in: int, c_out: int, cfg: UNetConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(cfg.embedding, c_out)
        self.norm2 = GroupNorm(c_out)
        self.dropout = nn.Dropout(cfg.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        zero_(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        inplace = not torch.is_grad_enabled()  # saves memory traffic, a tenth of the time
        h = self.conv1(F.silu(self.norm1(x), inplace=inplace))
        h += self.emb(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=inplace)))
        h += self.skip(x)
        return cast(Tensor, h)


class Attention(nn.Module):
    """Single-head self-attention over all positions, as in the paper."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        zero_(self.out)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, 1, c, h * w).transpose(3, 4)
        a = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        out: Tensor = x + self.out(a.transpose(2, 3).reshape(b, c, h, w))
        return out


class Stage(nn.Module):
    """One residual block and, where the resolution has it, self-attention."""

    def __init__(self, c_in: int, c_out: int, cfg: UNetConfig, attention: bool) -> None:
        super().__init__()
        self.res = ResBlock(c_in, c_out, cfg)
        self.att = Attention(c_out) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.res(x, emb)
        return x if self.att is None else self.att(x)


class UNet(nn.Module):
    """F(x_t, noise level) -> (prediction, v).

    The prediction, of the shape of x_t, is of the quantity ``cfg.prediction``
    (parameterisation.to_x0). v places log sigma_t^2 between the posterior's variance (0) and beta_t
    (1); it is None for a network that does not learn variances.
    """

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        ch, d = cfg.channels, cfg.embedding
        self.paper = cfg.wiring == "paper"
        self.embed = nn.Sequential(
            nn.Linear(ch[0] if self.paper else d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU()
        )
        self.stem = nn.Conv2d(3 * cfg.patch**2, ch[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        width = ch[0]
        skips = [width] if self.paper else []
        for i, c in enumerate(ch):
            stages = nn.ModuleList()
            for _ in range(cfg.blocks):
                stages.append(Stage(width, c, cfg, i in cfg.attention))
                width = c
                skips.append(c)
            self.down.append(stages)
            if i + 1 < len(ch):
                width = c if self.paper else ch[i + 1]
                self.shrink.append(nn.Conv2d(c, width, 3, stride=2, padding=1))
                skips += [c] if self.paper else []
        self.middle = nn.ModuleList(
            Stage(ch[-1], ch[-1], cfg, k == 0 and bool(cfg.attention)) for k in range(cfg.middle)
        )
        for i, c in reversed(list(enumerate(ch))):
            stages = nn.ModuleList()
            for _ in range(cfg.blocks + self.paper):
                stages.append(Stage(width + skips.pop(), c, cfg, i in cfg.attention))
                width = c
            self.up.append(stages)
            if i > 0 and self.paper:
                self.grow.append(nn.Conv2d(c, c, 3, padding=1))
            elif i > 0:
                width = ch[i - 1]
                self.grow.append(nn.Conv2d(c, 4 * width, 1))
        self.norm = GroupNorm(ch[0])
        self.out = nn.Conv2d(ch[0], (6 if cfg.variance else 3) * cfg.patch**2, 3, padding=1)
        zero_(self.out)
        # Weights of x0_hat, M and 1 in a better estimate of each band (denoiser.blended).
        none = torch.tensor([1.0, 0.0, 0.0])[None, :, None]
        self.register_buffer("blend", none.repeat(len(BLEND_SNRS), 1, BANDS))

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (B, 3, H, W); level: (B,) in [0, 1000]."""
        cfg = self.cfg
        emb = sinusoidal(level, cfg.channels[0] if self.paper else cfg.embedding).to(x.dtype)
        h = F.pixel_unshuffle(x, cfg.patch) if cfg.patch > 1 else x
        h = self.stem(h)
        emb = self.embed(emb)
        skips = [h] if self.paper else []
        for i, stages in enumerate(self.down):
            for stage in cast(nn.ModuleList, stages):
                h = stage(h, emb)
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)
                skips += [h] if self.paper else []
        for stage in self.middle:
            h = stage(h, emb)
        for i, stages in enumerate(self.up):
            for stage in cast(nn.ModuleList, stages):
                h = stage(torch.cat([h, skips.pop()], dim=1), emb)
            if i < len(self.grow) and self.paper:
                h = self.grow[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            elif i < len(self.grow):
                h = F.pixel_shuffle(self.grow[i](h), 2)
        y = self.out(F.silu(self.norm(h)))
        y = F.pixel_shuffle(y, cfg.patch) if cfg.patch > 1 else y
        return (y[:, :3], 0.5 * (1 + y[:, 3:])) if cfg.variance else (y, None)


# The network of Ho et al. (2020) for CIFAR-10: 35.7 million parameters.
PAPER = UNetConfig()
