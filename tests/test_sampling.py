"""Samplers with the optimal denoiser of Gaussian data: the samples must be such data again."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from test_likelihood import S2, SCHEDULE, optimal

from ddpm_codec.cli import paper
from ddpm_codec.network.denoiser import Denoised
from ddpm_codec.paper.likelihood import Variance
from ddpm_codec.paper.sampling import ancestral, ddim, interpolate, respaced, sample

SHAPE = (32, 3, 16, 16)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("variance", "steps"), [("learned", 1000), ("beta", 1000)])
def test_ancestral_samples_the_data(variance: Variance, steps: int) -> None:
    ts = respaced(SCHEDULE, steps)
    path = list(
        ancestral(
            optimal(), noise(), ts, SCHEDULE, variance, torch.Generator().manual_seed(1), clip=False
        )  # type: ignore[arg-type]
    )
    assert [s.t for s in path] == [*ts[1:], 0]
    end = path[-1].x_t
    # beta is the right variance for data of variance 1 only, and here a little too wide.
    assert float(end.var()) == pytest.approx(S2, rel=0.03 if variance == "learned" else 0.15)
    assert abs(float(end.mean())) < 0.01
    # The variance of x_t is q's: alpha_bar s^2 + 1 - alpha_bar.
    half = next(s for s in path if s.t == 300)
    ab = SCHEDULE.alpha_bar[300]
    assert float(half.x_t.var()) == pytest.approx(ab * S2 + 1 - ab, rel=0.03)
    # The estimates sharpen: their variance grows towards the data's.
    assert float(path[0].x0_hat.var()) < 0.01 * S2 < 0.9 * S2 < float(path[-1].x0_hat.var())


def test_fitted_variances_keep_the_variance_in_few_steps() -> None:
    """Exactly, for Gaussian data; the posterior's are too narrow then."""

    def off(variance: Variance) -> float:
        g = torch.Generator().manual_seed(1)
        path = ancestral(optimal(), noise(), ts, SCHEDULE, variance, g, clip=False)
        ab = SCHEDULE.alpha_bar
        expected = {s: ab[s] * S2 + 1 - ab[s] for s in ts}
        return max(abs(float(s.x_t.var()) / expected[s.t] - 1) for s in path if s.t)

    ts = respaced(SCHEDULE, 8)
    assert off("fitted") < 0.02
    assert off("posterior") > 0.1


def test_ddim_is_deterministic_and_keeps_the_variance() -> None:
    def sample(steps: int) -> torch.Tensor:
        *_, end = ddim(optimal(), noise(), respaced(SCHEDULE, steps), SCHEDULE, clip=False)
        assert end.t == 0
        return end.x_t

    fine = sample(1000)
    assert torch.equal(fine, sample(1000))
    assert float(fine.var()) == pytest.approx(S2, rel=0.02)
    # One noise, one picture: with the optimal denoiser a mere scaling, whatever the steps.
    ratio = fine / noise().double()
    assert float(ratio.std() / ratio.mean()) < 1e-6
    assert float((sample(50) - fine).square().mean()) < 0.02 * S2


def test_respaced() -> None:
    assert respaced(SCHEDULE, 1000) == list(range(1000, 0, -1))
    assert respaced(SCHEDULE, 4, 10) == [10, 7, 4, 1]
    assert respaced(SCHEDULE, 50, 3) == [3, 2, 1]
    assert respaced(SCHEDULE, 1) == [1000]


def test_interpolation_ends_at_its_ends() -> None:
    """From little noise the ends come back; from much they are new samples."""
    g = torch.Generator().manual_seed(2)
    a, b = (math.sqrt(S2) * torch.randn(3, 16, 16, generator=g) for _ in range(2))

    def between(t: int, steps: int) -> torch.Tensor:
        return interpolate(
            optimal(), a, b, [0.0, 0.5, 1.0], respaced(SCHEDULE, steps, t), SCHEDULE,
            torch.Generator().manual_seed(3),
        )  # fmt: skip

    near = between(5, 5)
    assert near.shape == (3, 3, 16, 16)
    for k, x in ((0, a.clamp(-1, 1)), (1, (a + b) / 2), (2, b.clamp(-1, 1))):
        assert float((near[k] - x).square().mean()) < 2e-3
    far = between(1000, 200)
    assert float((far[0] - a).square().mean()) > S2


def test_shared_pictures_part_where_they_are_said_to() -> None:
    """Every state is met with its own t, also where ``shared`` itself is not visited."""
    seen: list[tuple[int, int]] = []

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> Denoised:
        seen.append((len(x_t), int(t[0])))
        return optimal()(x_t, t)

    ts = respaced(SCHEDULE, 6)
    for shared, first in ((700, 800), (800, 800), (1000, 1000), (1, 1), (5000, 1000)):
        seen.clear()
        *_, end = sample(denoise, 3, SCHEDULE, steps=6, shared=shared, side=16)
        assert end.x_t.shape == (3, 3, 16, 16)
        k = ts.index(first)
        assert seen == [*((1, t) for t in ts[:k]), *((3, t) for t in ts[k:])], shared
    assert not torch.equal(end.x_t[0], end.x_t[1])


def test_python_and_the_command_have_one_default() -> None:
    (of_command,) = (p.default for p in paper.sample.params if p.name == "variance")
    for function in (ancestral, sample):
        assert inspect.signature(function).parameters["variance"].default == of_command
