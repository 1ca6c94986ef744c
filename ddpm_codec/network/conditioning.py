"""The network's inputs from a state, and x0_hat and its log-scale from the network's outputs.

Preconditioning of Karras et al. (2022, "EDM", eq. 7 and table 1) with a sigma_data for each band:
the network corrects the band's Wiener estimate, so that its input and output are of order one
whatever the noise and the band.

In float64 every operation here is exact or rounded once, on grids that are powers of two, so that
the same state gives the same integers on every machine (docs/exact.md). Training uses float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion import transform
from .exact import HIGH, Inputs, Outputs

GRID = 2.0**14  # M and x0_hat are multiples of 1 / GRID, in units of x_0
LIMIT = 2.0**10  # bound on their magnitudes: double precision then holds every sum of a transform
FINE = 2.0**12  # whitened coefficients and the network's pixels are multiples of 1 / FINE
# Integers per unit of each input.
PIXELS, WHITENED_PIXELS, WHITENED, PRECISIONS = 220.0, 64.0, 32.0, 128.0
LOG_SCALES = 8.0  # log-scales lie between -8 and 8


class State(NamedTuple):
    """What the decoder knows. ``snr`` is the level's nominal precision."""

    m: Tensor  # (B, 192, h, w) observed coefficients, 0 where nothing is known
    precision: Tensor  # (B, 192, h, w) their precision, 0 where nothing is known
    snr: Tensor  # (B,)
    weights: Tensor  # (B, 192, 1, 1) a band's nominal precision is snr times its weight squared


def nominal(state: State) -> Tensor:
    """(B, 192, 1, 1): the precision that a coefficient of each band has once it is observed."""
    return state.snr[:, None, None, None] * state.weights.square()


class Factors(NamedTuple):
    """The preconditioning of a coefficient, all of one shape."""

    skip: Tensor  # of M, in x0_hat: Wiener's
    out: Tensor  # of the network's output, in x0_hat
    whiten: Tensor  # of M, for unit variance
    precision_map: Tensor  # an input of the network: how precisely the coefficient is known


def factors(precision: Tensor, expected: Tensor, snr: Tensor, sigma_data: Tensor) -> Factors:
    """precision: 0 where nothing is known; expected: nominal precision; all broadcastable.

    With v = sigma_data^2 and noise = 1 / (1 + v precision), the noise's share of M's variance:
    c_skip = 1 - noise, c_out^2 = v noise, c_in^2 = precision noise.
    """
    noise = 1.0 / (1.0 + sigma_data.square() * precision)
    observed = precision > 0
    ratio = torch.where(observed, precision, expected) / snr
    precision_map = observed + (ratio.sqrt().sqrt() - 1.0)
    return Factors(
        1.0 - noise, sigma_data * noise.sqrt(), (precision * noise).sqrt(), precision_map
    )


def state_factors(state: State, sigma_data: Tensor) -> Factors:
    """The factors of every coefficient of a state. sigma_data: (192,)."""
    band = sigma_data[:, None, None]
    return factors(state.precision, nominal(state), state.snr[:, None, None, None], band)


def _to_grid(x: Tensor, grid: float) -> Tensor:
    """x rounded to multiples of 1 / grid, in place; in training x is left as it is."""
    if x.dtype != torch.float64:
        return x
    return x.mul_(grid).round_().clamp_(-LIMIT * grid, LIMIT * grid).mul_(1.0 / grid)


class Preconditioned(NamedTuple):
    """M, scaled in two ways, (B, 192, h, w) each."""

    wiener: Tensor  # each band's Wiener estimate
    whitened: Tensor  # of unit variance


def precondition(m: Tensor, f: Factors) -> Preconditioned:
    """M (B, 192, h, w) times its factors."""
    return Preconditioned(_to_grid(m * f.skip, GRID), _to_grid(m * f.whiten, FINE))


def inputs(x: Preconditioned, f: Factors, snr: Tensor) -> Inputs:
    """The integers that the network is given."""

    def integers(x: Tensor, units: float) -> Tensor:
        return (x * units).round_().clamp_(-HIGH, HIGH).bfloat16()

    pixels = (
        integers(transform.inverse(x.wiener), PIXELS),
        integers(transform.inverse(x.whitened), WHITENED_PIXELS),
    )
    blocks = integers(f.precision_map, PRECISIONS), integers(x.whitened, WHITENED)
    return Inputs(torch.cat(pixels, dim=1), torch.cat(blocks, dim=1), snr)


def estimate(x: Preconditioned, f: Factors, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """x0_hat (B, 192, h, w), and its log-scale: ln(b / sigma) of a Laplace distribution.

    The network's prediction is x_0 = x0_hat + Laplace(0, b); sigma is the noise of a coefficient
    with nominal precision.
    """
    pixels, shift, gain = (y.to(x.wiener.dtype) for y in outputs[:3])
    # The gain shrinks an observation by what its neighbours show. That is a product, which sums of
    # convolutions approximate badly.
    y = transform.forward(_to_grid(pixels, FINE)) + shift + gain * x.whitened
    x0_hat = x.wiener + _to_grid(y * f.out, GRID)
    return x0_hat, outputs.log_scale.clamp(-LOG_SCALES, LOG_SCALES)
