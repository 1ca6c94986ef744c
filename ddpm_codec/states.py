"""Training states: pictures as the decoder knows them half way through a file.

The codec shows the network states in which some bands or blocks have not been observed and others
are one level finer than the rest. A network that has only seen isotropic noise loses 2 dB and more
on those, so training draws from the same family.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import transform
from .network import BANDS, BLOCK

SNR_RANGE = (0.02, 4000.0)  # what the codec visits, and a little more


class State(NamedTuple):
    """What the decoder knows. ``snr`` is the level's nominal precision."""

    m: Tensor  # (B, 192, h, w) observed coefficients, 0 where nothing is known
    precision: Tensor  # (B, 192, h, w) their precision, 0 where nothing is known
    snr: Tensor  # (B,)


def local_energy(c: Tensor) -> Tensor:
    """(B, 192, h, w) squared coefficients averaged over 3x3 blocks and 3x3 neighbouring bands."""
    b, _, h, w = c.shape
    v, u = transform.zigzag().T
    index = torch.as_tensor(v * BLOCK + u, device=c.device)
    raster = torch.empty_like(c).reshape(b, 3, BLOCK * BLOCK, h, w)
    raster[:, :, index] = c.square().reshape(b, 3, BLOCK * BLOCK, h, w)
    e = raster.reshape(b * 3 * BLOCK * BLOCK, 1, h, w)
    e = F.avg_pool2d(e, 3, 1, 1, count_include_pad=False)
    e = e.reshape(b * 3, BLOCK, BLOCK, h * w).permute(0, 3, 1, 2)
    e = F.avg_pool2d(e.reshape(-1, 1, BLOCK, BLOCK), 3, 1, 1, count_include_pad=False)
    e = e.reshape(b, 3, h, w, BLOCK * BLOCK).permute(0, 1, 4, 2, 3)[:, :, index]
    return e.reshape(b, BANDS, h, w)


def draw(c: Tensor, generator: torch.Generator | None = None) -> State:
    """A random state for each picture. c: (B, 192, h, w), coefficients of x_0.

    log-SNR is uniform, so that the eps loss is the variational bound. 15 % of the states are
    isotropic (DDPM to the letter); in the others a band or coefficient is observed once its energy
    times SNR exceeds tau, tau log-uniform in [0.5, 16]: a third by the bands' jittered
    variances, two thirds by jittered local energy. In a third, a prefix of the bands is one level
    finer. The noise is Gaussian or uniform; the codec's is uniform.
    """
    b, dev = c.shape[0], c.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=dev, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=dev, generator=generator)

    lo, hi = map(math.log, SNR_RANGE)
    snr = torch.exp(lo + (hi - lo) * uniform(b))
    tau = torch.exp(math.log(0.5) + math.log(16 / 0.5) * uniform(b))[:, None, None, None]

    # Energies that decide what is observed: never zero, so that isotropic is "all above tau".
    per_band = c.square().mean((2, 3), keepdim=True) * torch.exp(0.5 * normal(b, BANDS, 1, 1))
    local = local_energy(c)
    blur = (0.2 + 0.8 * uniform(b, 1, 1, 1)) * normal(*c.shape)
    local = (local + 0.1 * per_band) * torch.exp(blur)
    kind = uniform(b)[:, None, None, None]
    energy = torch.where(kind < 0.15 + 0.85 / 3, per_band.expand_as(c), local)
    energy = torch.where(kind < 0.15, torch.inf, energy)

    # A prefix of the bands, in the order of the file, has already arrived at four times the SNR.
    z = torch.arange(BANDS, device=dev) % (BLOCK * BLOCK)
    prefix = torch.where(uniform(b) < 1 / 3, uniform(b) * BLOCK * BLOCK, torch.zeros(b, device=dev))
    finer = (z[None] < prefix[:, None])[:, :, None, None]
    s = snr[:, None, None, None] * torch.where(finer, 4.0, 1.0)
    precision = torch.where(energy * s > tau, s, torch.zeros_like(s))

    unit = torch.where(
        uniform(b, 1, 1, 1) < 0.7, math.sqrt(12) * (uniform(*c.shape) - 0.5), normal(*c.shape)
    )
    m = torch.where(precision > 0, c + unit * s.rsqrt(), torch.zeros_like(c))
    return State(m, precision, snr)
