"""The diffusion process of Ho, Jain and Abbeel (2020), "DDPM", as pure functions.

The symbols are the paper's: x_0 is the picture scaled to [-1, 1], x_t the picture after t steps of
noise, alpha_bar_t as in schedule.py.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .schedule import Array, Schedule


def alpha_bar_of(snr: Tensor) -> Tensor:
    """The inverse of :func:`schedule.snr_of`."""
    return snr / (1.0 + snr)


def to_x0(prediction: str, y: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """x0_hat from the network's output y, which predicts one of four quantities.

    ``eps``: DDPM eq. 15. ``x0``: x_0 itself. ``v``: Salimans and Ho (2022), v = sqrt(ab) eps -
    sqrt(1 - ab) x_0. ``mu``: mu-tilde, the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7, for a step of
    the default schedule.

    y, x_t: (B, ...); alpha_bar: broadcastable. Raises ValueError for an unknown ``prediction``.
    """
    a, s = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    if prediction == "eps":
        return (x_t - s * y) / a
    if prediction == "x0":
        return y
    if prediction == "v":
        return a * x_t - s * y
    if prediction == "mu":
        of_x_0, of_x_t = posterior_shares(previous(alpha_bar), alpha_bar)
        return (y - of_x_t * x_t) / of_x_0
    raise ValueError(f"unknown prediction type {prediction!r}")


def from_x0(prediction: str, x_0: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The network's training target for x_0: the inverse of :func:`to_x0`."""
    a, s = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    if prediction == "eps":
        return (x_t - a * x_0) / s
    if prediction == "x0":
        return x_0
    if prediction == "v":
        return (a * x_t - x_0) / s
    if prediction == "mu":
        of_x_0, of_x_t = posterior_shares(previous(alpha_bar), alpha_bar)
        return of_x_0 * x_0 + of_x_t * x_t
    raise ValueError(f"unknown prediction type {prediction!r}")


def q_sample(x_0: Tensor, alpha_bar: Tensor, eps: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) from eps ~ N(0, I) (DDPM eq. 4)."""
    return alpha_bar.sqrt() * x_0 + (1.0 - alpha_bar).sqrt() * eps


def previous(alpha_bar: Tensor) -> Tensor:
    """alpha_bar_{t-1} from alpha_bar_t of the default schedule; linear between whole steps."""
    table = Schedule().alpha_bar
    steps = np.arange(len(table), dtype=np.float64)
    t = np.interp(-alpha_bar.double().cpu().numpy(), -table, steps)
    return alpha_bar.new_tensor(np.interp(t - 1.0, steps, table))


def posterior_shares(alpha_bar_s: Tensor, alpha_bar_t: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of x_0 and x_t in the mean of q(x_s | x_t, x_0) (DDPM eq. 7)."""
    alpha = alpha_bar_t / alpha_bar_s
    of_x_0 = alpha_bar_s.sqrt() * (1.0 - alpha) / (1.0 - alpha_bar_t)
    return of_x_0, alpha.sqrt() * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t)


def posterior_variance(alpha_bar_s: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """beta-tilde, the variance of q(x_s | x_t, x_0) (DDPM eq. 7)."""
    return (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t) * (1.0 - alpha_bar_t / alpha_bar_s)


def posterior(
    x_0: Tensor, x_t: Tensor, alpha_bar_s: Tensor, alpha_bar_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x_0), s < t (DDPM eqs. 6 and 7, for any step length)."""
    of_x_0, of_x_t = posterior_shares(alpha_bar_s, alpha_bar_t)
    return of_x_0 * x_0 + of_x_t * x_t, posterior_variance(alpha_bar_s, alpha_bar_t)


def merge(m: Array, y: Array, d: Array, precision: Array) -> Array:
    """Observation view: M of precision G and y = x_0 + N(0, 1/D), weighted by precision.

    (G M + D y) / (G + D), with ``precision`` = G + D. With M = x_t / sqrt(alpha_bar_t), G = SNR(t)
    and D = SNR(s) - SNR(t) this is :func:`posterior`.
    """
    return m + d / precision * (y - m)


def kl(d: Tensor, x_0: Tensor, x0_hat: Tensor) -> Tensor:
    """KL(q || p) of a step of precision d, nats per element: DDPM eq. 8 in the observation view."""
    return 0.5 * d * (x_0 - x0_hat).square()
