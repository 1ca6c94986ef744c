"""The diffusion process of Ho, Jain and Abbeel (2020), "DDPM", as pure functions.

The paper's symbols throughout: x_0 the picture scaled to [-1, 1], x_t what is left of it after t
steps of noise, alpha_bar_t as in schedule.py.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .schedule import Schedule


def alpha_bar_of(snr: Tensor) -> Tensor:
    """alpha_bar at a signal-to-noise ratio: the inverse of SNR = alpha_bar / (1 - alpha_bar)."""
    return snr / (1.0 + snr)


def to_x0(prediction: str, y: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """x0_hat from what the network put out.

    ``eps``: DDPM eq. 15. ``x0``: as it is. ``v``: Salimans and Ho (2022), v = sqrt(ab) eps -
    sqrt(1 - ab) x_0. ``mu``: mu-tilde, the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7, with t - 1
    one step of the default schedule.

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
    """What the network should put out for x_0, its training target: :func:`to_x0` undone."""
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
    known = Schedule().alpha_bar
    steps = np.arange(len(known), dtype=np.float64)
    t = np.interp(-alpha_bar.double().cpu().numpy(), -known, steps)
    return alpha_bar.new_tensor(np.interp(t - 1.0, steps, known))


def posterior_shares(alpha_bar_s: Tensor, alpha_bar_t: Tensor) -> tuple[Tensor, Tensor]:
    """What x_0 and x_t contribute to the mean of q(x_s | x_t, x_0) (DDPM eq. 7)."""
    alpha = alpha_bar_t / alpha_bar_s
    of_x_0 = alpha_bar_s.sqrt() * (1.0 - alpha) / (1.0 - alpha_bar_t)
    return of_x_0, alpha.sqrt() * (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t)


def posterior(
    x_0: Tensor, x_t: Tensor, alpha_bar_s: Tensor, alpha_bar_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x_0), s < t (DDPM eqs. 6 and 7, for any step length)."""
    of_x_0, of_x_t = posterior_shares(alpha_bar_s, alpha_bar_t)
    variance = (1.0 - alpha_bar_s) / (1.0 - alpha_bar_t) * (1.0 - alpha_bar_t / alpha_bar_s)
    return of_x_0 * x_0 + of_x_t * x_t, variance


def merge(m: Tensor, g: Tensor, y: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Observation view: merge M (precision g) with y = x_0 + N(0, 1/d), weighted by precision.

    With M = x_t / sqrt(alpha_bar_t), g = SNR(t) and d = SNR(s) - SNR(t) this is :func:`posterior`.
    """
    return (g * m + d * y) / (g + d), g + d


def kl(d: Tensor, x_0: Tensor, x0_hat: Tensor) -> Tensor:
    """KL(q || p) of a step of precision d, nats per element: DDPM eq. 8 in the observation view."""
    return 0.5 * d * (x_0 - x0_hat).square()
