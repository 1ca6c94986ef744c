"""The photo codec's network: a U-Net of which every machine computes the same bits.

Convolutions multiply integers of at most eight bits and a sign. Their sums are small enough for
single precision to hold each partial sum exactly, in any order. Every operation between
convolutions is rounded once. So half precision's fast matrix units give what 64-bit integers would,
and two machines find the same numbers (docs/exact.md).

    block      h <- h + s2 conv(q(s1 conv(q(g h + b)) + b' + e))
    q(x)       clamp(round(x), 0, 255)
    conv       of integers with integers, rounded to bfloat16

There is no normalisation: a learned gain g and offset b of each channel set the range of what is
rounded. The noise level enters each block by e, a table of offsets. Skip connections are added
(Zhang et al. 2021, "DRUNet"). In training the same roundings are made, and gradients pass straight
through them (Bengio et al. 2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.transform import BANDS, BLOCK

HIGH = 255  # activations are integers 0 .. HIGH, signed ones -HIGH .. HIGH
WEIGHT = 127  # weights are integers -WEIGHT .. WEIGHT
STEP = 1 / 32  # what one unit of an activation stands for
SUM = 1 << 24  # below this every integer is a single-precision number


@dataclass(frozen=True)
class ExactConfig:
    """Everything needed to rebuild the network; stored inside the model file."""

    channels: tuple[int, ...] = (64, 128, 256, 320)  # at 1/2, 1/4, 1/8, ... of the picture's size
    down: tuple[int, ...] = (2, 2, 2, 4)  # residual blocks at each size, the last at the bottom
    up: tuple[int, ...] = (2, 2, 2)
    embedding: int = 128  # width of the noise-level embedding; used in training only

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this (pixels)."""
        return max(2 ** len(self.channels), BLOCK)


NODES = tuple(k / 4 for k in range(-24, 49))  # log2 of the SNRs in the table of noise levels
PATCH = 2  # a position of the first resolution is a square of PATCH x PATCH pixels
BLOCK_LEVEL = 2  # at this resolution a position is a block of the transform


class Inputs(NamedTuple):
    """Integers -HIGH .. HIGH."""

    pixels: Tensor  # (B, 6, H, W) pictures of the Wiener estimate and of M whitened
    blocks: Tensor  # (B, 384, H/8, W/8) the precision map; M whitened
    snr: Tensor  # (B,) the noise level, in floating point


class Outputs(NamedTuple):
    """In floating point; :func:`conditioning.estimate` makes x0_hat and its log-scale of them."""

    pixels: Tensor  # (B, 3, H, W)
    shift: Tensor  # (B, 192, H/8, W/8) each
    gain: Tensor
    log_scale: Tensor


def straight(x: Tensor) -> Tensor:
    """round(x), with the gradient of x."""
    return x + (x.round() - x).detach()


class Quantiser(nn.Module):
    """clamp(round(g x + b), low, HIGH) for each channel, as bfloat16, which holds it exactly.

    g is a bfloat16 number, and x is one or a product of two. So g x is exact, and adding b rounds
    once: a fused multiply-add does the same.
    """

    CACHED = 1 << 17  # numbers that each thread of a processor works on at a time

    def __init__(self, channels: int, signed: bool = False) -> None:
        super().__init__()
        self.low = -HIGH if signed else 0
        self.gain = nn.Parameter(torch.ones(channels))
        self.offset = None if signed else nn.Parameter(torch.zeros(channels))
        self.frozen: tuple[Tensor, Tensor] | None = None

    def integers(self) -> tuple[Tensor, Tensor]:
        """g and b, (C,) each, in units of STEP."""
        if self.frozen is not None:
            return self.frozen
        gain = self.gain.bfloat16().float() / STEP
        return gain, torch.zeros_like(gain) if self.offset is None else self.offset / STEP

    def forward(self, x: Tensor, unit: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        """x: (B, C, H, W) bfloat16; unit: (C, 1, 1) factors of x; level: (B, C) in place of b."""
        gain, offset = self.integers()
        g = gain[:, None, None] if unit is None else gain[:, None, None] * unit
        b = (offset if level is None else level)[..., None, None]
        if torch.is_grad_enabled():
            return straight(torch.addcmul(b, x.float(), g).clamp(self.low, HIGH)).bfloat16()
        out = torch.empty_like(x)
        rows = x.shape[2]
        if x.device.type == "cpu":  # as many rows as the caches hold
            # More threads get larger shares, because they wait for one another after each.
            cached = self.CACHED * torch.get_num_threads() ** 2
            rows = max(1, cached // (x.shape[0] * x.shape[1] * x.shape[3]))
        for part, to in zip(x.split(rows, 2), out.split(rows, 2), strict=True):
            y = part.float()
            to.copy_(torch.addcmul(b, y, g, out=y).round_().clamp_(self.low, HIGH))
        return out


class Convolution(nn.Module):
    """A convolution of integers: returns sums, rounded to bfloat16, and each channel's unit."""

    def __init__(
        self, c_in: int, c_out: int, size: int, stride: int = 1, start: float = 1.0, alike: int = 1
    ) -> None:
        """start: factor of the initial weights; alike: so many channels in a row share a unit."""
        super().__init__()
        self.stride, self.padding, self.alike = stride, size // 2 if stride == 1 else 0, alike
        std = start * math.sqrt(2.0 / (c_in * size**2))
        self.weight = nn.Parameter(std * torch.randn(c_out, c_in, size, size))
        self.frozen: tuple[Tensor, Tensor] | None = None

    def integers(self) -> tuple[Tensor, Tensor]:
        """Weights as integers, and the unit of each output channel's, (C,).

        The unit is about the least for which weights stay within WEIGHT and no sum reaches SUM.
        """
        if self.frozen is not None:
            return self.frozen
        with torch.no_grad():
            magnitude = self.weight.abs().flatten(1).float()
            unit = torch.maximum(magnitude.amax(1) / WEIGHT, magnitude.sum(1) * (1.01 * HIGH / SUM))
            unit = unit.view(-1, self.alike).amax(1).repeat_interleave(self.alike)
            unit = unit.clamp(min=1e-8).bfloat16().float()
        w = straight((self.weight / unit[:, None, None, None]).clamp(-WEIGHT, WEIGHT))
        return w.bfloat16(), unit

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) integers; returns (B, C', H', W') and (C', 1, 1)."""
        w, unit = self.integers()
        u = F.conv2d(x.to(w.dtype), w, stride=self.stride, padding=self.padding)
        return u.bfloat16(), (unit * STEP)[:, None, None]


def scaled(product: tuple[Tensor, Tensor]) -> Tensor:
    """u s, rounded to bfloat16."""
    u, s = product
    return u * s.bfloat16()


def plus(h: Tensor, product: tuple[Tensor, Tensor]) -> Tensor:
    """h + u s, rounded to bfloat16; u s is exact in single precision."""
    u, s = product
    return torch.addcmul(h, u, s.bfloat16())


class Block(nn.Module):
    """h + conv(q(conv(q(h)))), where the second quantiser's offset depends on the noise level."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.q1, self.q2 = Quantiser(channels), Quantiser(channels)
        self.conv1 = Convolution(channels, channels, 3)
        self.conv2 = Convolution(channels, channels, 3, start=0.0)
        self.level = nn.Linear(embedding, channels)
        self.frozen: Tensor | None = None  # (NODES, C)

    def offsets(self, emb: Tensor) -> Tensor:
        """(B, C) offsets of the second quantiser. emb: (B, d), or (B,) rows of the table."""
        if self.frozen is not None:
            return self.frozen[emb]
        return self.q2.integers()[1] + self.level(emb) / STEP

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return plus(h, self.conv2(self.q2(*self.conv1(self.q1(h)), self.offsets(emb))))


def sinusoidal(x: Tensor, dim: int) -> Tensor:
    """Sinusoidal position embedding (Vaswani et al. 2017). x: (B,), returns (B, dim)."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=x.device))
    args = x.float()[:, None] * freqs
    return torch.cat([args.sin(), args.cos()], dim=1)


class ExactUNet(nn.Module):
    """The network of docs/exact.md, section 3: with trainable weights, or frozen to integers."""

    def __init__(self, cfg: ExactConfig) -> None:
        super().__init__()
        self.cfg = cfg
        ch, d = cfg.channels, cfg.embedding
        self.embed = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.stem = Convolution(6 * PATCH**2, ch[0], 3, start=0.3)
        self.map_in = Convolution(BANDS, ch[0], 1, start=0.0)
        self.block_in = Convolution(2 * BANDS, ch[BLOCK_LEVEL], 1, start=0.3)

        def blocks(c: int, n: int) -> nn.ModuleList:
            return nn.ModuleList(Block(c, d) for _ in range(n))

        self.down = nn.ModuleList(blocks(c, n) for c, n in zip(ch, cfg.down, strict=True))
        self.up = nn.ModuleList(blocks(c, n) for c, n in zip(ch[:-1], cfg.up, strict=True))
        pairs = list(zip(ch, ch[1:], strict=False))
        self.shrink_q = nn.ModuleList(Quantiser(a, signed=True) for a, _ in pairs)
        self.shrink = nn.ModuleList(Convolution(a, b, 2, 2) for a, b in pairs)
        self.grow_q = nn.ModuleList(Quantiser(b, signed=True) for _, b in pairs)
        self.grow = nn.ModuleList(Convolution(b, 4 * a, 1, start=0.5, alike=4) for a, b in pairs)
        self.block_q = Quantiser(ch[BLOCK_LEVEL])
        self.block_out = Convolution(ch[BLOCK_LEVEL], 3 * BANDS, 1, start=0.0)
        self.out_q = Quantiser(ch[0])
        self.out = Convolution(ch[0], 3 * PATCH**2, 3, start=0.0)
        side = BLOCK // PATCH
        self.scales = Convolution(ch[0], BANDS, side, side, start=0.0)
        self.register_buffer("sigma_data", torch.ones(BANDS))
        self.frozen = False
        self.between = torch.tensor([2.0 ** (k + 0.125) for k in NODES[:-1]], dtype=torch.float64)

    def embedding(self, snr: Tensor) -> Tensor:
        """The noise level's embedding (B, d); frozen, rows of the table (B,). snr: (B,)."""
        if self.frozen:
            return torch.bucketize(snr.double(), self.between.to(snr.device))
        emb: Tensor = self.embed(sinusoidal(50.0 * (snr.log() + 10.0), self.cfg.embedding))
        return emb

    def forward(self, x: Inputs) -> Outputs:
        emb = self.embedding(x.snr)
        h = scaled(self.stem(F.pixel_unshuffle(x.pixels, PATCH)))
        v, t = self.map_in(x.blocks[:, :BANDS])
        h = plus(h, (F.interpolate(v, scale_factor=BLOCK / PATCH, mode="nearest"), t))
        skips = []
        for i, blocks in enumerate(self.down):
            if i == BLOCK_LEVEL:
                h = plus(h, self.block_in(x.blocks))
            for block in cast(nn.ModuleList, blocks):
                h = block(h, emb)
            if i < len(self.shrink):
                skips.append(h)
                h = scaled(self.shrink[i](self.shrink_q[i](h)))
        for i in reversed(range(len(self.grow))):
            u, s = self.grow[i](self.grow_q[i](h))
            h = plus(skips.pop(), (F.pixel_shuffle(u, 2), s[::4]))
            for block in cast(nn.ModuleList, self.up[i]):
                h = block(h, emb)
            if i == BLOCK_LEVEL:
                u, s = self.block_out(self.block_q(h))
                shift, gain, scale = (u.float() * s).chunk(3, dim=1)
        a = self.out_q(h)
        y, s = self.out(a)
        top, t = self.scales(a)
        pixels = F.pixel_shuffle(y.float() * s, PATCH)
        return Outputs(pixels, shift, gain, torch.addcmul(scale, top.float(), t))

    # --- as integers -----------------------------------------------------------------------------

    @torch.no_grad()
    def integers(self) -> dict[str, Tensor]:
        """The tensors of a model file: each layer's integers and units."""
        nodes = torch.tensor([2.0**k for k in NODES])
        emb = self.embedding(nodes)
        out = {"sigma_data": self.get_buffer("sigma_data")}
        for name, layer in self.named_modules():
            if isinstance(layer, Convolution):
                w, unit = layer.integers()
                out |= {f"{name}.weight": w.to(torch.int8), f"{name}.unit": unit}
            elif isinstance(layer, Quantiser):
                out[f"{name}.gain"], out[f"{name}.offset"] = layer.integers()
            elif isinstance(layer, Block):
                out[f"{name}.levels"] = layer.offsets(emb).half()
        return {name: x.cpu().contiguous() for name, x in out.items()}

    def freeze(self, given: dict[str, Tensor], device: str, dtype: torch.dtype) -> None:
        """Replace the weights by these integers. dtype: in which convolutions are computed."""
        self.get_buffer("sigma_data").copy_(given["sigma_data"])
        for name, layer in self.named_modules():
            if isinstance(layer, Convolution):
                w = given[f"{name}.weight"].to(device, dtype, memory_format=torch.channels_last)
                layer.frozen = w, given[f"{name}.unit"].to(device)
            elif isinstance(layer, Quantiser):
                layer.frozen = given[f"{name}.gain"].to(device), given[f"{name}.offset"].to(device)
            elif isinstance(layer, Block):
                layer.frozen = given[f"{name}.levels"].float().to(device)
        self.frozen = True

    @torch.no_grad()
    def thaw(self, given: dict[str, Tensor]) -> None:
        """Take weights that give these integers, so that they can be trained further.

        A linear layer of the noise level's embedding approximates the table by least squares.
        Raises KeyError, RuntimeError for another network's integers.
        """
        self.get_buffer("sigma_data").copy_(given["sigma_data"])
        emb = self.embedding(torch.tensor([2.0**k for k in NODES])).double()
        emb = torch.cat([emb, torch.ones(len(NODES), 1, dtype=torch.float64)], dim=1)
        for name, layer in self.named_modules():
            if isinstance(layer, Convolution):
                unit = given[f"{name}.unit"][:, None, None, None]
                layer.weight.copy_(given[f"{name}.weight"].float() * unit)
            elif isinstance(layer, Quantiser):
                layer.gain.copy_(given[f"{name}.gain"] * STEP)
                if layer.offset is not None:
                    layer.offset.copy_(given[f"{name}.offset"] * STEP)
            elif isinstance(layer, Block):
                target = given[f"{name}.levels"].double() * STEP
                target -= given[f"{name}.q2.offset"].double() * STEP
                fit = torch.linalg.lstsq(emb, target, rcond=1e-7, driver="gelsd").solution
                layer.level.weight.copy_(fit[:-1].T)
                layer.level.bias.copy_(fit[-1])

    @property
    def dtype(self) -> torch.dtype:
        """The type in which a frozen network's convolutions are computed."""
        assert self.stem.frozen is not None
        return self.stem.frozen[0].dtype

    def compute_in(self, dtype: torch.dtype) -> None:
        """Change the type in which a frozen network's convolutions are computed."""
        for layer in self.modules():
            if isinstance(layer, Convolution) and layer.frozen is not None:
                layer.frozen = layer.frozen[0].to(dtype), layer.frozen[1]
