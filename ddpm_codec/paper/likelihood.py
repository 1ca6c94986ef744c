"""Code lengths: the variational bound of DDPM section 3, term by term, in bits.

    L = L_T + sum_{t > 1} L_{t-1} + L_0     (eq. 5)

L_T is the cost of x_T under N(0, I), L_{t-1} that of a denoising step, L_0 that of the discrete
decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import data
from ..diffusion import transform
from ..diffusion.parameterisation import posterior, posterior_shares, posterior_variance, q_sample
from ..diffusion.schedule import Schedule, snr_of
from ..errors import ModelError
from ..network.computing import computing
from ..network.denoiser import Denoised, Denoiser, of_pictures
from ..network.modelfile import get_small

Variance = Literal["beta", "posterior", "learned", "fitted"]


def discrete_decoder(x_0: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """-ln p(x_0 | x_1) per element: N(mean, sigma^2) over a grey level's bin (DDPM eq. 13).

    x_0: multiples of 2/255 in [-1, 1]; the outermost bins reach to infinity.
    """
    # A difference of two values of the cdf is accurate in the lower tail only, so bins above the
    # mean are mirrored to below it.
    error = (x_0 - mean).double()
    side = torch.where(error > 0, -1.0, 1.0)
    near, far = (side * error + 1 / 255) / sigma, (side * error - 1 / 255) / sigma
    outer = side * x_0  # 1: the bin has no upper end; -1: no lower end
    high = torch.where(outer > 0.999, 1.0, _cdf(near))
    low = torch.where(outer < -0.999, 0.0, _cdf(far))
    return -torch.log((high - low).clamp(min=1e-300))


def _cdf(x: Tensor) -> Tensor:
    """The normal distribution function, accurate in the lower tail, too."""
    return 0.5 * torch.special.erfc(-x / math.sqrt(2.0))


def prior_kl(x_0: Tensor, schedule: Schedule) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)), nats per element."""
    ab = float(schedule.alpha_bar[-1])
    return 0.5 * (ab * x_0.double().square() - ab - math.log1p(-ab))


def sigma2(
    schedule: Schedule, t: Tensor, s: Tensor, variance: Variance, denoised: Denoised
) -> Tensor:
    """Variance of p(x_s | x_t): ``beta`` and ``posterior`` (beta-tilde) of DDPM section 3.2.

    ``learned``: between them, interpolated geometrically (Nichol and Dhariwal 2021, eq. 15).
    ``fitted``: the one that minimises the bound, beta-tilde plus the contribution of x0_hat's mean
    square error (Bao et al. 2022, "Analytic-DPM", eq. 6).

    Float64, of the shape of v or (B, 1, 1, 1); ``fitted`` is (B, 192, 1, 1), one variance for each
    band of the transform. At s = 0 beta-tilde is zero; there, except for ``fitted``, that of the
    step from t = 2 to 1 takes its place. Raises ModelError where the network has not learned or
    measured what is needed.
    """
    ab = torch.from_numpy(schedule.alpha_bar).to(t.device)
    ab_t, ab_s = (ab[k][:, None, None, None] for k in (t, s))
    beta = 1 - ab_t / ab_s
    beta_tilde = posterior_variance(ab_s, ab_t)
    if variance == "fitted":
        if denoised.error is None:
            raise ModelError("this network's errors have not been measured")
        of_x_0, _ = posterior_shares(ab_s, ab_t)
        return beta_tilde + of_x_0.square() * denoised.error
    beta_tilde = torch.where(ab_s == 1, posterior_variance(ab[1], ab[2]), beta_tilde)
    if variance == "beta":
        return beta
    if variance == "posterior":
        return beta_tilde
    if denoised.v is None:
        raise ModelError("this network has learned no variances")
    v = denoised.v.double()
    return torch.exp(v * beta.log() + (1 - v) * beta_tilde.log())


def term(
    denoise: Denoiser, x_0: Tensor, t: Tensor, schedule: Schedule, variance: Variance = "posterior",
    generator: torch.Generator | None = None, clip: bool = True, x_t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """L_{t-1}, or L_0 at t = 1, nats per element (B,), and the mean square of eps - eps_theta (B,).

    x_0: (B, C, H, W) in [-1, 1]; t: (B,) in 1 .. T; clip: whether x0_hat is clipped to [-1, 1];
    x_t: drawn from q(x_t | x_0) if None.
    """
    ab = torch.from_numpy(schedule.alpha_bar).to(x_0.device)
    ab_t, ab_s = (ab[k][:, None, None, None] for k in (t, t - 1))
    if x_t is None:
        eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        x_t = q_sample(x_0.double(), ab_t, eps)
    denoised = denoise(x_t.float(), t)
    x0_hat = denoised.x_0.double()
    square = (snr_of(ab_t) * (x_0 - x0_hat).square()).mean((1, 2, 3))
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    var = sigma2(schedule, t, t - 1, variance, denoised)
    q_mean, q_var = posterior(x_0.double(), x_t, ab_s, ab_t)
    p_mean, _ = posterior(x0_hat, x_t, ab_s, ab_t)
    error, pixel_var = q_mean - p_mean, var
    if variance == "fitted":  # the basis is orthonormal: squares add up to the same in both
        error, pixel_var = transform.forward(error), var.mean(1, keepdim=True)
    # At t = 1 the posterior's variance is zero and the KL infinite; L_0 takes its place.
    q_var = torch.where(ab_s == 1, var, q_var)
    kl = 0.5 * (torch.log(var / q_var) + q_var / var - 1 + error.square() / var)
    nll = discrete_decoder(x_0, p_mean, pixel_var.sqrt())
    out = torch.where(t == 1, nll.mean((1, 2, 3)), kl.mean((1, 2, 3)))
    return out, square


@dataclass
class CodeLength:
    """Bits per dimension of N pictures."""

    prior: NDArray[np.float64]  # (N,) L_T
    steps: NDArray[np.float64]  # (N,) estimates of the sum of L_{t-1}, t > 1
    decoder: NDArray[np.float64]  # (N,) L_0
    term: NDArray[np.float64]  # (T + 1,) mean over pictures of L_{t-1} at t; nan where not drawn
    square: NDArray[np.float64]  # (T + 1,) mean square of eps - eps_theta

    @property
    def total(self) -> tuple[float, float]:
        """Mean of the bound, and its standard error over pictures."""
        total = self.prior + self.steps + self.decoder
        n = max(len(total) - 1, 1)
        return float(total.mean()), float(total.std() * (len(total) / n) ** 0.5 / len(total) ** 0.5)

    def summary(self) -> dict[str, float]:
        """Means in bits per dimension, and the total's standard error."""
        parts = {"L_T": self.prior, "L_1..T-1": self.steps, "L_0": self.decoder}
        total, error = self.total
        means = {name: float(part.mean()) for name, part in parts.items()}
        return {"pictures": len(self.prior), **means, "total": total, "error": error}

    def csv(self) -> str:
        """t, L_{t-1}, mean square of eps - eps_theta; only timesteps that were drawn."""
        rows = enumerate(zip(self.term.tolist(), self.square.tolist(), strict=True))
        lines = [f"{t},{a:.8g},{b:.8g}" for t, (a, b) in rows if not math.isnan(a)]
        return "\n".join(["t,bits_per_dim,eps_mse", *lines, ""])


def text(got: CodeLength) -> str:
    """The line that ``ddpmc likelihood`` prints."""
    about = got.summary()
    parts = ", ".join(f"{name} {about[name]:.4f}" for name in ("L_T", "L_1..T-1", "L_0"))
    return (
        f"{about['pictures']} pictures: {about['total']:.4f} +- {about['error']:.4f} bits/dim "
        f"({parts})"
    )


@computing()
def of_files(
    paths: Sequence[Path], model: str | None, device: str, *, n: int | None = None, **how: Any
) -> CodeLength:
    """The bound for the pictures in some files. Raises ModelError, DataError."""
    schedule = Schedule()
    x = data.to_unit(data.small_pictures(paths)[:n]).to(device)
    loaded = get_small(model, device)
    return code_length(of_pictures(loaded.unet, schedule, loaded.error_at), x, schedule, **how)


@torch.no_grad()
def code_length(
    denoise: Denoiser, x_0: Tensor, schedule: Schedule, variance: Variance = "posterior",
    draws: int | None = None, batch: int = 128, seed: int = 0, clip: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> CodeLength:  # fmt: skip
    """The bound for pictures x_0 (N, C, H, W) in [-1, 1].

    draws: the T - 1 steps with t > 1 are divided into at most so many strata, narrower ones where
    there is less noise. One step is drawn from each stratum for each picture, which leaves the
    estimate unbiased. By default all steps are taken. L_0 is always computed.
    """
    n, last = len(x_0), schedule.T
    draws = min(draws or last - 1, last - 1)
    generator = torch.Generator(device=x_0.device).manual_seed(seed)
    power = 1.0 if draws == last - 1 else 2.0
    edges = 2 + ((last - 1) * np.linspace(0, 1, draws + 1) ** power).round().astype(int)
    edges = np.unique(edges)
    sums, squares, count = np.zeros((3, last + 1))
    steps, decoder = np.zeros(n), np.zeros(n)
    for a in range(0, n, batch):
        x = x_0[a : a + batch]
        for low, high in [(1, 2), *zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]:
            u = torch.rand(len(x), generator=generator, device=x.device)
            t = low + (u * (high - low)).long().clamp(max=high - low - 1)
            nats, square = term(denoise, x, t, schedule, variance, generator, clip)
            bits = nats.cpu().numpy() / math.log(2)
            (decoder if low == 1 else steps)[a : a + batch] += (high - low) * bits
            np.add.at(sums, t.cpu().numpy(), bits)
            np.add.at(squares, t.cpu().numpy(), square.cpu().numpy())
            np.add.at(count, t.cpu().numpy(), 1)
        if progress:
            progress(min(a + batch, n), n)
    prior = prior_kl(x_0, schedule).mean((1, 2, 3)).cpu().numpy() / math.log(2)
    with np.errstate(invalid="ignore"):
        return CodeLength(prior, steps, decoder, sums / count, squares / count)
