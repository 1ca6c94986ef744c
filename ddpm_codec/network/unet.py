"""The denoising network: the U-Net of Ho et al. (2020, appendix B), for pictures of any size.

Two readings of one class. As the paper has it (:data:`PAPER`: group normalisation, self-attention
at one resolution, dropout) it denoises 32x32 pictures. As the photo codec uses it (``patch=2``,
normalisation over the channels of one position, no attention) every output depends on a bounded
neighbourhood only, so a picture may be cut into tiles and the statistics of a training crop are
those of a 24-megapixel photograph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.transform import BANDS, BLOCK
from ..errors import ModelError


@dataclass(frozen=True)
class UNetConfig:
    """Everything needed to rebuild the network; stored inside the model file."""

    patch: int = 2  # pixel-unshuffle factor at the input
    channels: tuple[int, ...] = (64, 96, 160, 160)  # per resolution, each half the one before
    blocks: int = 2  # residual blocks per resolution, down and up
    middle: int = 1  # residual blocks at the bottom
    norm: Literal["layer", "group"] = "layer"
    attention: tuple[int, ...] = ()  # indices of the resolutions with self-attention
    dropout: float = 0.0
    embedding: int = 128  # width of the noise-level embedding
    precisions: bool = True  # conditioned on the map of precisions, and predicts scales
    variance: bool = False  # without precisions: predicts variances, too (likelihood.sigma2)
    prediction: Literal["eps", "x0", "v", "mu", "edm"] = "edm"
    # "paper": the stem's and the shrunk maps are skip connections, too, each with a block of its
    # own on the way up; "lean": only the blocks' outputs.
    wiring: Literal["lean", "paper"] = "lean"

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this (pixels)."""
        return math.lcm(self.patch * 2 ** (len(self.channels) - 1), BLOCK)


def zero_(layer: nn.Conv2d) -> None:
    """A layer that says nothing at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)


def sinusoidal(x: Tensor, dim: int) -> Tensor:
    """Sinusoidal position embedding (Vaswani et al. 2017). x: (B,), returns (B, dim)."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=x.device))
    args = x.float()[:, None] * freqs
    return torch.cat([args.sin(), args.cos()], dim=1)


# Where "blend" is tabulated, falling; from the first on x0_hat is left alone.
BLEND_SNRS = tuple(10.0 / 4**k for k in range(10))


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each position: no statistic leaves its pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W); free for channels-last memory
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-5)
        return x.permute(0, 3, 1, 2)


class GroupNorm(nn.Module):
    """torch's GroupNorm (Wu and He 2018), for channels-last memory, where it is 10 times as fast.

    Sums over pixels for each channel first, then over a group's few channels.
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


def norm_layer(kind: str, channels: int) -> nn.Module:
    return ChannelNorm(channels) if kind == "layer" else GroupNorm(channels)


class ResBlock(nn.Module):
    """norm, swish, conv, + embedding, norm, swish, (dropout), conv, + input."""

    def __init__(self, c_in: int, c_out: int, cfg: UNetConfig) -> None:
        super().__init__()
        self.norm1 = norm_layer(cfg.norm, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(cfg.embedding, c_out)
        self.norm2 = norm_layer(cfg.norm, c_out)
        self.dropout = nn.Dropout(cfg.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        zero_(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        here = not torch.is_grad_enabled()  # memory traffic is a tenth of the time
        h = self.conv1(F.silu(self.norm1(x), inplace=here))
        h += self.emb(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=here)))
        h += self.skip(x)
        return cast(Tensor, h)


class Attention(nn.Module):
    """Single-head self-attention over all positions, as in the paper."""

    def __init__(self, channels: int, cfg: UNetConfig) -> None:
        super().__init__()
        self.norm = norm_layer(cfg.norm, channels)
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
        self.att = Attention(c_out, cfg) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.res(x, emb)
        return x if self.att is None else self.att(x)


class Blocks(NamedTuple):
    """What a network with precisions sees and says of each DCT coefficient: (B, 192, H/8, W/8)."""

    precisions: Tensor  # how well it is known
    whitened: Tensor  # its observation, scaled to unit variance


class UNet(nn.Module):
    """F(x, noise level, blocks) -> (prediction, prediction of coefficients, log-scales).

    The predictions are read by :func:`ddpm_codec.network.denoiser.eps_hat`: one in pixels, of the
    shape of x_t, and, in the order of :mod:`ddpm_codec.diffusion.transform`, what is to be added to
    its transform. The log-scales say how far from x_0 each coefficient of that estimate is expected
    to be: ln(b / sigma) of a Laplace distribution. The latter two are (B, 192, H/8, W/8). A network
    without precisions takes no ``blocks``, and gives None for both, or for the latter, if it has
    learned them, where variances lie between the posterior's (0) and beta's (1).
    """

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        ch, d = cfg.channels, cfg.embedding
        self.paper = cfg.wiring == "paper"
        self.embed = nn.Sequential(
            nn.Linear(ch[0] if self.paper else d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU()
        )
        colours = 6 if cfg.precisions else 3
        self.stem = nn.Conv2d(colours * cfg.patch**2, ch[0], 3, padding=1)
        if cfg.precisions:
            # The map enters twice: at the input, so that the first convolutions know which bands
            # they see, and, with the coefficients, where the U-Net's pixels are blocks.
            self.map_in = nn.Conv2d(BANDS, ch[0], 1)
            self.block_in = nn.Conv2d(2 * BANDS, ch[self.block_level], 1)
            self.map_mean = nn.Linear(BANDS, d)
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
        self.norm = norm_layer(cfg.norm, ch[0])
        self.out = nn.Conv2d(ch[0], (6 if cfg.variance else 3) * cfg.patch**2, 3, padding=1)
        zero_(self.out)
        if cfg.precisions:
            s = BLOCK // cfg.patch
            self.scales = nn.Conv2d(ch[0], BANDS, s, stride=s)
            zero_(self.scales)
            self.block_out = nn.Conv2d(ch[self.block_level], 3 * BANDS, 1)
            zero_(self.block_out)
            # Standard deviation of each band over the training pictures; set before training.
            self.register_buffer("spread", torch.ones(BANDS))
        else:
            # How the estimate, M and 1 make up a better estimate of each band (denoiser.blended).
            none = torch.tensor([1.0, 0.0, 0.0])[None, :, None]
            self.register_buffer("blend", none.repeat(len(BLEND_SNRS), 1, BANDS))

    @property
    def block_level(self) -> int:
        """The resolution whose pixels are transform blocks."""
        return int(math.log2(BLOCK // self.cfg.patch))

    def forward(
        self, x: Tensor, level: Tensor, blocks: Blocks | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x: (B, 3, H, W), with precisions (B, 6, H, W): x_t and the whitened view in pixels.

        level: (B,) in [0, 1000].
        """
        cfg = self.cfg
        emb = sinusoidal(level, cfg.channels[0] if self.paper else cfg.embedding).to(x.dtype)
        h = F.pixel_unshuffle(x, cfg.patch) if cfg.patch > 1 else x
        h = self.stem(h)
        if blocks is not None:
            emb = emb + self.map_mean(blocks.precisions.mean((2, 3)))
            p = self.map_in(blocks.precisions)
            if cfg.patch < BLOCK:
                p = F.interpolate(p, scale_factor=BLOCK // cfg.patch, mode="nearest")
            h = h + p
        emb = self.embed(emb)
        skips = [h] if self.paper else []
        for i, stages in enumerate(self.down):
            if blocks is not None and i == self.block_level:
                h = h + self.block_in(torch.cat(blocks, dim=1))
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
            if blocks is not None and i == len(self.grow) - self.block_level:
                # Shrinking an observation by what its surroundings say is a product, and sums of
                # convolutions are bad at products.
                shift, scales, gain = self.block_out(h).chunk(3, dim=1)
                coefficients = shift + gain * blocks.whitened
            if i < len(self.grow) and self.paper:
                h = self.grow[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            elif i < len(self.grow):
                h = F.pixel_shuffle(self.grow[i](h), 2)
        h = F.silu(self.norm(h))
        y = self.out(h)
        y = F.pixel_shuffle(y, cfg.patch) if cfg.patch > 1 else y
        if blocks is None:
            return (y[:, :3], None, 0.5 * (1 + y[:, 3:])) if cfg.variance else (y, None, None)
        return y, coefficients, scales + self.scales(h)


# The network of Ho et al. (2020) for CIFAR-10: 35.7 million parameters.
PAPER = UNetConfig(
    patch=1, channels=(128, 256, 256, 256), blocks=2, middle=2, norm="group", attention=(1,),
    dropout=0.1, embedding=512, precisions=False, prediction="eps", wiring="paper",
)  # fmt: skip
