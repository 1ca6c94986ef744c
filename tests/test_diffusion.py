"""The schedule's literal values, and DDPM's equations in the observation view."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_codec.diffusion import parameterisation as diffusion
from ddpm_codec.diffusion.schedule import Ladder, Schedule
from ddpm_codec.errors import ModelError

STEPS = [(999, 1000), (500, 565), (1, 2), (10, 900), (564, 565)]


def gaussians(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, x_t, x0_hat: any numbers will do."""
    g = torch.Generator().manual_seed(seed)
    x_0, x_t, x0_hat = torch.randn(3, 64, generator=g, dtype=torch.float64)
    return x_0, x_t, x0_hat


def test_schedule() -> None:
    s = Schedule()
    assert s.beta.shape == s.alpha_bar.shape == s.snr.shape == (1001,)
    assert (s.beta[0], s.beta[1], s.beta[1000]) == (0.0, 1e-4, 0.02)
    assert s.alpha_bar[0] == 1.0
    assert s.alpha_bar[1] == pytest.approx(0.9999, rel=1e-12)
    assert s.alpha_bar[500] == pytest.approx(0.0785872429, rel=1e-8)
    assert s.alpha_bar[1000] == pytest.approx(4.035829765e-5, rel=1e-8)
    assert s.snr[0] == np.inf
    assert s.snr[1] == pytest.approx(9999.0, rel=1e-9)
    assert s.snr[1000] == pytest.approx(4.035992652e-5, rel=1e-8)
    assert (np.diff(s.snr) < 0).all()


def test_timestep_inverts_snr() -> None:
    s = Schedule()
    assert [s.timestep(x) for x in s.snr[1:]] == list(range(1, 1001))
    assert s.timestep(1e9) == 1 and s.timestep(1e-9) == 1000
    # Nearest on a logarithmic scale, not the next above or below.
    for t in (2, 300, 999):
        ratio = s.snr[t - 1] / s.snr[t]
        assert s.timestep(s.snr[t] * ratio**0.49) == t
        assert s.timestep(s.snr[t] * ratio**0.51) == t - 1
    # The first level of the codec's ladder.
    assert s.timestep(Ladder().snrs[0]) == 568


def test_time_of_an_snr() -> None:
    """The timestep's continuation to any SNR."""
    s = Schedule()
    np.testing.assert_allclose([s.time(x) for x in s.snr[1:]], np.arange(1, 1001), rtol=1e-12)
    between = s.time(float(np.sqrt(s.snr[299] * s.snr[300])))
    assert between == pytest.approx(299.5)
    assert s.time(1e9) == 1 and s.time(1e-9) == 1000


def test_ladder() -> None:
    """Half octaves below the finest SNR, to the last bit."""
    ladder = Ladder()
    assert [ladder.snr(j) for j in (0, 1, 2, 3, 32)] == [
        2560.0, 1810.1933598375617, 1280.0, 905.0966799187809, 0.0390625,
    ]  # fmt: skip
    assert ladder.snrs == [ladder.snr(j) for j in range(32, -1, -1)]
    assert Ladder(3, 10).snrs == [5.0, 7.0710678118654755, 10.0]
    assert Ladder(1, 10).snrs == [10.0]
    ladder.check()


@pytest.mark.parametrize(
    "ladder",
    [
        Ladder(0),
        Ladder(201),
        Ladder(2.0),  # type: ignore[arg-type]
        Ladder(finest=0),
        Ladder(finest=1 << 31),
        Ladder(finest=2560.0),  # type: ignore[arg-type]
        Ladder(tau=0),
        Ladder(tau=-1),
        Ladder(tau=float("nan")),
    ],
    ids=str,
)
def test_impossible_ladder_is_refused(ladder: Ladder) -> None:
    with pytest.raises(ModelError, match="impossible"):
        ladder.check()


def test_alpha_bar_of_inverts_snr() -> None:
    s = Schedule()
    ab = diffusion.alpha_bar_of(torch.from_numpy(s.snr[1:]))
    np.testing.assert_allclose(ab.numpy(), s.alpha_bar[1:], rtol=1e-12)


@pytest.mark.parametrize(("s", "t"), STEPS)
def test_posterior_is_merging_of_observations(s: int, t: int) -> None:
    x_0, x_t, _ = gaussians(0)
    ab, snr = torch.from_numpy(Schedule().alpha_bar), torch.from_numpy(Schedule().snr)
    mean, variance = diffusion.posterior(x_0, x_t, ab[s], ab[t])
    g, d = snr[t], snr[s] - snr[t]
    m = diffusion.merge(x_t / ab[t].sqrt(), x_0, d, snr[s])
    torch.testing.assert_close(mean, m * ab[s].sqrt(), rtol=1e-9, atol=1e-12)
    # Of M given x_0 and x_t only y = x_0 + N(0, 1 / D) is random, and its share is D / (G + D).
    torch.testing.assert_close(variance, ab[s] * d / (g + d) ** 2, rtol=1e-9, atol=0)


def test_posterior_of_one_step_is_ddpm_eq_7() -> None:
    x_0, x_t, _ = gaussians(1)
    schedule = Schedule()
    for t in (2, 500, 1000):
        beta, a, b = schedule.beta[t], schedule.alpha_bar[t - 1], schedule.alpha_bar[t]
        mean, variance = diffusion.posterior(x_0, x_t, *torch.tensor([a, b], dtype=torch.float64))
        expected = (
            a**0.5 * beta / (1 - b) * x_0 + (1 - beta) ** 0.5 * (1 - a) / (1 - b) * x_t
        )  # fmt: skip
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
        assert float(variance) == pytest.approx((1 - a) / (1 - b) * beta, rel=1e-9)


@pytest.mark.parametrize(("s", "t"), STEPS)
def test_kl_of_a_step_is_ddpm_eq_8(s: int, t: int) -> None:
    x_0, x_t, x0_hat = gaussians(2)
    ab, snr = torch.from_numpy(Schedule().alpha_bar), torch.from_numpy(Schedule().snr)
    q_mean, variance = diffusion.posterior(x_0, x_t, ab[s], ab[t])
    p_mean, _ = diffusion.posterior(x0_hat, x_t, ab[s], ab[t])
    q = torch.distributions.Normal(q_mean, variance.sqrt())
    p = torch.distributions.Normal(p_mean, variance.sqrt())
    expected = torch.distributions.kl_divergence(q, p)
    got = diffusion.kl(snr[s] - snr[t], x_0, x0_hat)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "mu"])
def test_predictions_and_x0_are_inverse(prediction: str) -> None:
    x_0, x_t, y = gaussians(3)
    for ab in (1e-4, 0.04, 0.5, 0.9995):
        alpha_bar = torch.tensor(ab, dtype=torch.float64)
        out = diffusion.from_x0(prediction, x_0, x_t, alpha_bar)
        back = diffusion.to_x0(prediction, out, x_t, alpha_bar)
        torch.testing.assert_close(back, x_0, rtol=1e-9, atol=1e-9)
        there = diffusion.to_x0(prediction, y, x_t, alpha_bar)
        again = diffusion.from_x0(prediction, there, x_t, alpha_bar)
        torch.testing.assert_close(again, y, rtol=1e-9, atol=1e-9)


def test_predictions_are_what_their_names_say() -> None:
    x_0, eps, _ = gaussians(4)
    ab = torch.tensor(0.3, dtype=torch.float64)
    x_t = diffusion.q_sample(x_0, ab, eps)
    torch.testing.assert_close(x_t, 0.3**0.5 * x_0 + 0.7**0.5 * eps)
    expected = {
        "eps": eps,
        "x0": x_0,
        "v": 0.3**0.5 * eps - 0.7**0.5 * x_0,
    }
    for prediction, y in expected.items():
        torch.testing.assert_close(diffusion.from_x0(prediction, x_0, x_t, ab), y)
    table = torch.from_numpy(Schedule().alpha_bar)
    for t in (2, 500, 1000):
        mean, _ = diffusion.posterior(x_0, x_t, table[t - 1], table[t])
        torch.testing.assert_close(diffusion.from_x0("mu", x_0, x_t, table[t]), mean)
    # The mean at t = 1 is x_0.
    torch.testing.assert_close(diffusion.from_x0("mu", x_0, x_t, table[1]), x_0)


def test_previous_is_one_step_earlier() -> None:
    table = torch.from_numpy(Schedule().alpha_bar)
    torch.testing.assert_close(diffusion.previous(table[1:]), table[:-1], rtol=1e-9, atol=0)
    # Between whole steps it goes on rising with alpha_bar_t, and it is 1 before the first step.
    ab = torch.linspace(4.1e-5, 0.9999, 2000, dtype=torch.float64)
    got = diffusion.previous(ab)
    assert bool((got > ab).all()) and bool((got.diff() > 0).all())
    assert float(diffusion.previous(torch.tensor(0.99995))) == 1.0


def test_unknown_prediction_is_refused() -> None:
    x_0, x_t, y = gaussians(5)
    with pytest.raises(ValueError, match="score"):
        diffusion.to_x0("score", y, x_t, torch.tensor(0.5))
    with pytest.raises(ValueError, match="score"):
        diffusion.from_x0("score", x_0, x_t, torch.tensor(0.5))
