"""What the photo codec's network sees of a state, and what its words mean.

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

GRID = 2.0**14  # steps of M and of x0_hat in one unit of x_0
LIMIT = 2.0**10  # of their sizes, so that double precision holds every sum of a transform
FINE = 2.0**12  # steps of what is whitened and of the network's pixels
# How many units of an input's integers make one.
PIXELS, WHITENED_PIXELS, WHITENED, PRECISIONS = 220.0, 64.0, 32.0, 128.0
LOG_SCALES = 8.0  # log-scales lie between -8 and 8


class State(NamedTuple):
    """What the decoder knows. ``snr`` is the level's nominal precision."""

    m: Tensor  # (B, 192, h, w) observed coefficients, 0 where nothing is known
    precision: Tensor  # (B, 192, h, w) their precision, 0 where nothing is known
    snr: Tensor  # (B,)
    weights: Tensor  # (B, 192, 1, 1) factors of the bands' noise deviations


def nominal(state: State) -> Tensor:
    """(B, 192, 1, 1): the precision that a coefficient of each band has once it is observed."""
    return state.snr[:, None, None, None] * state.weights.square()


class Factors(NamedTuple):
    """By which a coefficient's observation is read, all of one shape."""

    skip: Tensor  # of M, in x0_hat: Wiener's
    out: Tensor  # of what the network says, in x0_hat
    whiten: Tensor  # of M, for unit variance
    known: Tensor  # how well it is known, for the network


def factors(precision: Tensor, expected: Tensor, snr: Tensor, sigma_data: Tensor) -> Factors:
    """precision: 0 where nothing is known; expected: nominal precision; all broadcastable.

    With v = sigma_data^2 and left = 1 / (1 + v precision), the noise's share of what is seen:
    c_skip = 1 - left, c_out^2 = v left, c_in^2 = precision left.
    """
    left = 1.0 / (1.0 + sigma_data.square() * precision)
    known = precision > 0
    ratio = torch.where(known, precision, expected) / snr
    how_well = known + (ratio.sqrt().sqrt() - 1.0)
    return Factors(1.0 - left, sigma_data * left.sqrt(), (precision * left).sqrt(), how_well)


def of_state(state: State, sigma_data: Tensor) -> Factors:
    band = sigma_data[:, None, None]
    return factors(state.precision, nominal(state), state.snr[:, None, None, None], band)


def _on(x: Tensor, grid: float) -> Tensor:
    """x, which nobody else needs, rounded to a grid; in training there is none."""
    if x.dtype != torch.float64:
        return x
    return x.mul_(grid).round_().clamp_(-LIMIT * grid, LIMIT * grid).mul_(1.0 / grid)


class Seen(NamedTuple):
    """M (B, 192, h, w) as it is read."""

    wiener: Tensor  # each band's Wiener estimate
    whitened: Tensor


def seen(m: Tensor, f: Factors) -> Seen:
    return Seen(_on(m * f.skip, GRID), _on(m * f.whiten, FINE))


def inputs(of: Seen, f: Factors, snr: Tensor) -> Inputs:
    """What the network gets."""

    def integers(x: Tensor, units: float) -> Tensor:
        return (x * units).round_().clamp_(-HIGH, HIGH).bfloat16()

    pixels = (
        integers(transform.inverse(of.wiener), PIXELS),
        integers(transform.inverse(of.whitened), WHITENED_PIXELS),
    )
    blocks = integers(f.known, PRECISIONS), integers(of.whitened, WHITENED)
    return Inputs(torch.cat(pixels, dim=1), torch.cat(blocks, dim=1), snr)


def estimate(of: Seen, f: Factors, said: Outputs) -> tuple[Tensor, Tensor]:
    """x0_hat (B, 192, h, w), and its log-scale: ln(b / sigma) of a Laplace distribution.

    The network believes x_0 = x0_hat + Laplace(0, b), sigma being the noise of a coefficient with
    nominal precision.
    """
    pixels, shift, gain = (x.to(of.wiener.dtype) for x in said[:3])
    # Shrinking an observation by what its surroundings say is a product, and sums of convolutions
    # are bad at products.
    y = transform.forward(_on(pixels, FINE)) + shift + gain * of.whitened
    x0_hat = of.wiener + _on(y * f.out, GRID)
    return x0_hat, said.log_scale.clamp(-LOG_SCALES, LOG_SCALES)
