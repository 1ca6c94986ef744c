"""Training states: pictures as the decoder knows them half way through a file.

The codec shows the network states in which some coefficients have not been observed and others are
one level finer than the rest. A network that has only seen isotropic noise loses 2 dB and more on
those, so training draws from the same family.

What has not been observed was left out because the decoder expected little of it, not because there
is little: states whose gaps were chosen by looking at the picture teach the network that every gap
is empty, and then it never asks for what it lacks. So gaps come from what a noisy view shows of the
neighbourhood (:func:`draw`), or from the network's own expectation (:func:`advance`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .network import BANDS, BLOCK
from .tables import zigzag

SNR_RANGE = (0.02, 4000.0)  # what the codec visits, and a little more


class State(NamedTuple):
    """What the decoder knows. ``snr`` is the level's nominal precision."""

    m: Tensor  # (B, 192, h, w) observed coefficients, 0 where nothing is known
    precision: Tensor  # (B, 192, h, w) their precision, 0 where nothing is known
    snr: Tensor  # (B,)


def local_energy(c: Tensor) -> Tensor:
    """(B, 192, h, w) mean square of each coefficient's neighbours: 3x3 blocks by 3x3 bands."""
    b, _, h, w = c.shape
    v, u = zigzag().T
    index = torch.as_tensor(v * BLOCK + u, device=c.device)
    raster = torch.empty_like(c).reshape(b, 3, BLOCK * BLOCK, h, w)
    raster[:, :, index] = c.square().reshape(b, 3, BLOCK * BLOCK, h, w)
    e = _box(raster.reshape(b * 3 * BLOCK * BLOCK, 1, h, w))
    e = e.reshape(b * 3, BLOCK, BLOCK, h * w).permute(0, 3, 1, 2)
    e = _box(e.reshape(-1, 1, BLOCK, BLOCK))
    e = e.reshape(b, 3, h, w, BLOCK * BLOCK).permute(0, 1, 4, 2, 3)[:, :, index]
    bands = _box(c.new_ones(1, 1, BLOCK, BLOCK)).reshape(-1)[index].repeat(3)[:, None, None]
    blocks = _box(c.new_ones(1, 1, h, w))[0]
    return (e.reshape(b, BANDS, h, w) - c.square()).clamp(min=0) / (bands * blocks - 1)


def _box(x: Tensor) -> Tensor:
    """Sums over 3x3 neighbourhoods."""
    return 9 * F.avg_pool2d(x, 3, 1, 1)


def draw(c: Tensor, generator: torch.Generator | None = None, below: float = 1.0) -> State:
    """A random state for each picture. c: (B, 192, h, w), coefficients of x_0.

    log-SNR is uniform up to ``below`` times the highest, so that the eps loss is the variational
    bound. 15 % of the states are isotropic (DDPM to the letter); in the others a coefficient is
    observed once its expected energy times SNR exceeds tau, tau log-uniform in [0.5, 16]: in 15 %
    by the bands' jittered variances, in the rest by the energy of the neighbourhood in a view of a
    quarter of the SNR, jittered, too. In a fifth, a prefix of the bands is one level finer.
    """
    b, dev = c.shape[0], c.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=dev, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=dev, generator=generator)

    lo, hi = math.log(SNR_RANGE[0]), math.log(SNR_RANGE[1] * below)
    snr = torch.exp(lo + (hi - lo) * uniform(b))
    s = snr[:, None, None, None]
    tau = torch.exp(math.log(0.5) + math.log(16 / 0.5) * uniform(b))[:, None, None, None]

    per_band = c.square().mean((2, 3), keepdim=True) * torch.exp(0.5 * normal(b, BANDS, 1, 1))
    view = local_energy(c + normal(*c.shape) * (4 / s).sqrt()) - 4 / s
    blur = 0.7 * uniform(b, 1, 1, 1) * normal(*c.shape)
    local = (view.clamp(min=0) + 0.1 * per_band) * torch.exp(blur)
    kind = uniform(b)[:, None, None, None]
    energy = torch.where(kind < 0.3, per_band.expand_as(c), local)
    energy = torch.where(kind < 0.15, torch.inf, energy)

    # A prefix of the bands, in the order of the file, has already arrived at four times the SNR.
    z = torch.arange(BANDS, device=dev) % (BLOCK * BLOCK)
    prefix = torch.where(uniform(b) < 0.2, uniform(b) * BLOCK * BLOCK, torch.zeros(b, device=dev))
    finer = (z[None] < prefix[:, None])[:, :, None, None]
    s = s * torch.where(finer, 4.0, 1.0)
    return observe(c, torch.where(energy * s > tau, s, torch.zeros_like(s)), snr, generator)


def advance(
    state: State, lam: Tensor, c: Tensor, generator: torch.Generator | None = None
) -> State:
    """The state one level (a factor of 4 in SNR) after ``state``, as the codec would make it.

    Newly observed is what the network expects to be worth it: 2 b^2 SNR > tau, b = sigma exp(lam),
    tau log-uniform in [0.5, 8].
    """
    u = torch.rand((len(c), 1, 1, 1), device=c.device, generator=generator)
    worth = 8 * torch.exp(2 * lam) > 0.5 * 16**u
    snr = 4 * state.snr
    s = snr[:, None, None, None].expand_as(c)
    known = worth | (state.precision > 0)
    return observe(c, torch.where(known, s, torch.zeros_like(s)), snr, generator)


def observe(
    c: Tensor, precision: Tensor, snr: Tensor, generator: torch.Generator | None = None
) -> State:
    """c with fresh noise of the given precision, uniform (the codec's) or Gaussian; 0 without."""
    b, dev = c.shape[0], c.device
    unit = torch.where(
        torch.rand((b, 1, 1, 1), device=dev, generator=generator) < 0.7,
        math.sqrt(12) * (torch.rand(c.shape, device=dev, generator=generator) - 0.5),
        torch.randn(c.shape, device=dev, generator=generator),
    )
    known = precision > 0
    m = torch.where(known, c + unit * torch.where(known, precision, 1.0).rsqrt(), 0.0)
    return State(m, precision, snr)
