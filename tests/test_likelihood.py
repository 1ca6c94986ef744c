"""Code lengths against closed forms: Gaussian data, whose best denoiser and entropy are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_codec.diffusion.schedule import Schedule
from ddpm_codec.errors import ModelError
from ddpm_codec.network.denoiser import Denoised, Denoiser
from ddpm_codec.paper.likelihood import (
    code_length,
    discrete_decoder,
    prior_kl,
    sigma2,
    term,
)

SCHEDULE = Schedule()
S2 = 0.09  # variance of the data


def gaussian_data(n: int, side: int = 8) -> Tensor:
    """Rounded to grey levels, which at this width loses nothing."""
    x = math.sqrt(S2) * torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    return (((x + 1) * 127.5).round() / 127.5 - 1).clamp(-1, 1)


def optimal(schedule: Schedule = SCHEDULE) -> Denoiser:
    """E[x_0 | x_t], its error, and the v for which sigma_t^2 is the true variance of p."""
    ab = torch.from_numpy(schedule.alpha_bar)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        a, s = (ab[k][:, None, None, None] for k in (t, t - 1))
        snr = a / (1 - a)
        left = S2 / (1 + S2 * snr)  # Var(x_0 | x_t)
        beta = 1 - a / s
        small = (1 - s) / (1 - a) * beta
        var = small + (s.sqrt() * beta / (1 - a)).square() * left
        denoised = Denoised(left * snr * x_t / a.sqrt(), error=left)
        low = sigma2(schedule, t, t - 1, "posterior", denoised).log()
        high = sigma2(schedule, t, t - 1, "beta", denoised).log()
        return denoised._replace(v=(var.log() - low) / (high - low))

    return denoise


def bits_of(x: Tensor) -> float:
    """-log2 p of the data itself, per dimension."""
    normal = torch.distributions.Normal(0.0, math.sqrt(S2))
    x = x.double()
    p = normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)
    return float(-p.log2().mean())


def test_bound_is_exact_for_gaussian_data() -> None:
    x = gaussian_data(24)
    got = code_length(optimal(), x, SCHEDULE, "learned", clip=False)
    total, error = got.total
    assert total == pytest.approx(bits_of(x), abs=0.01)
    assert 0 < error < 0.05
    # Fixed variances cost more: the posterior's too narrow, beta's too wide for such data.
    for variance in ("posterior", "beta"):
        assert code_length(optimal(), x, SCHEDULE, variance, clip=False).total[0] > total
    # The variance that belongs to the denoiser's errors costs what a learned one can.
    fitted = code_length(optimal(), x, SCHEDULE, "fitted", clip=False)
    assert fitted.total[0] == pytest.approx(total, abs=0.01)
    # The parts add up, and every timestep was there.
    whole = got.prior + got.steps + got.decoder
    assert whole.mean() == pytest.approx(total)
    assert np.isnan(got.term[0]) and np.isfinite(got.term[1:]).all()
    assert np.nansum(got.term[2:]) == pytest.approx(got.steps.mean())
    assert got.term[1] == pytest.approx(got.decoder.mean())


def test_terms_are_the_closed_form() -> None:
    """With the posterior's variance, L_{t-1} = (SNR(t-1) - SNR(t)) / 2 E |x_0 - x0_hat|^2."""
    x = gaussian_data(200)
    snr = SCHEDULE.snr
    for t in (2, 10, 100, 500, 1000):
        nats, square = term(
            optimal(), x, torch.full((200,), t), SCHEDULE, "posterior",
            torch.Generator().manual_seed(t), clip=False,
        )  # fmt: skip
        s2 = float(x.square().mean())
        gain = S2 * snr[t] / (1 + S2 * snr[t])  # x0_hat = gain M
        error = (1 - gain) ** 2 * s2 + gain**2 / snr[t]
        expected = 0.5 * (snr[t - 1] - snr[t]) * error
        assert float(nats.mean()) == pytest.approx(expected, rel=0.03), t
        assert float(square.mean()) == pytest.approx(snr[t] * error, rel=0.03), t


def test_strata_are_unbiased() -> None:
    x = gaussian_data(24)
    whole = code_length(optimal(), x, SCHEDULE, clip=False).total[0]
    part = code_length(optimal(), x, SCHEDULE, draws=40, clip=False, seed=3)
    assert part.total[0] == pytest.approx(whole, rel=0.02)
    assert np.isnan(part.term).any()


def test_prior() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5])
    ab = SCHEDULE.alpha_bar[-1]
    p = torch.distributions.Normal(math.sqrt(ab) * x.double(), math.sqrt(1 - ab))
    q = torch.distributions.Normal(torch.zeros(3).double(), 1.0)
    assert torch.allclose(prior_kl(x, SCHEDULE), torch.distributions.kl_divergence(p, q), atol=1e-9)


def test_discrete_decoder_is_a_distribution() -> None:
    x = torch.arange(256).float() / 127.5 - 1
    for mean in (-1.3, -1.0, -0.2, 0.4999, 1.0, 1.1):
        for sigma in (0.004, 0.01, 0.3):
            m, s = torch.tensor(mean).double(), torch.tensor(sigma).double()
            p = torch.exp(-discrete_decoder(x, m, s))
            assert float(p.sum()) == pytest.approx(1, abs=1e-6), (mean, sigma)
    # Far out, the tail is still accurate.
    far = discrete_decoder(torch.tensor([0.0]), torch.tensor(0.3).double(), torch.tensor(0.01))
    assert float(far) == pytest.approx(0.5 * (0.3 - 1 / 255) ** 2 / 1e-4, rel=0.02)


def test_variances() -> None:
    t, denoised = torch.tensor([1, 2, 500, 1000]), Denoised(torch.zeros(4, 3, 8, 8))
    beta, small = (
        sigma2(SCHEDULE, t, t - 1, k, denoised).reshape(-1) for k in ("beta", "posterior")
    )
    np.testing.assert_allclose(beta, SCHEDULE.beta[t])
    ab = SCHEDULE.alpha_bar
    np.testing.assert_allclose(small[1:], ((1 - ab[t - 1]) / (1 - ab[t]) * SCHEDULE.beta[t])[1:])
    assert 0 < float(small[0]) < float(beta[0])
    v = torch.tensor([0.0, 1.0, 0.5, 0.5])[:, None, None, None]
    mixed = sigma2(SCHEDULE, t, t - 1, "learned", denoised._replace(v=v)).reshape(-1)
    assert float(mixed[0]) == pytest.approx(float(small[0]))
    assert float(mixed[1]) == pytest.approx(float(beta[1]))
    assert float(mixed[2]) == pytest.approx(math.sqrt(float(beta[2] * small[2])))
    with pytest.raises(ModelError, match="learned"):
        sigma2(SCHEDULE, t, t - 1, "learned", denoised)
    with pytest.raises(ModelError, match="not been measured"):
        sigma2(SCHEDULE, t, t - 1, "fitted", denoised)
