"""Training states: what is known, at which precision, and how a walk goes through the levels."""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_codec.diffusion.transform import zigzag
from ddpm_codec.training import states
from ddpm_codec.training.states import SNR_RANGE, Walk, draw, observe, weights


def coefficients(n: int, seed: int = 0) -> torch.Tensor:
    """(n, 192, 4, 4) whose bands fall off as those of pictures do."""
    spread = torch.linspace(0, -6, 192).exp()[None, :, None, None]
    return spread * torch.randn((n, 192, 4, 4), generator=torch.Generator().manual_seed(seed))


def alike(n: int) -> torch.Tensor:
    """Weights of ordinary states."""
    return torch.ones(n, 192, 1, 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_drawn_states_are_what_they_say(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    c = coefficients(400)
    w = weights(400, 1.0, c.device, generator) if weighted else alike(400)
    state = draw(c, w, generator)
    assert torch.equal(state.weights, w)
    low, high = SNR_RANGE
    assert float(state.snr.min()) >= low and float(state.snr.max()) <= high
    known = state.precision > 0
    assert not state.m[~known].any()
    # Unit noise, whatever the precision; the largest may have twice the SNR.
    unit = (state.m - c)[known] * state.precision[known].sqrt()
    assert float(unit.mean()) == pytest.approx(0, abs=0.01)
    assert float(unit.square().mean()) == pytest.approx(1, abs=0.01)
    nominal = (state.snr[:, None, None, None] * w.square()).expand_as(c)
    ratio = (state.precision / nominal)[known]
    assert set(ratio.round().int().tolist()) == {1, 2}
    finer = torch.where(known, state.precision > 1.5 * nominal, False)
    some = finer.flatten(1).any(1)
    assert 0.02 < float(some.float().mean()) < 0.25
    assert float(finer[some, :20].float().mean()) > 2 * float(finer[some, -20:].float().mean())
    # Some are isotropic, and in the others what is large is known first.
    assert 0.05 < float(known.flatten(1).all(1).float().mean()) < 0.6
    some = known[~known.flatten(1).all(1)]
    assert float(some[:, :20].float().mean()) > 2 * float(some[:, -20:].float().mean())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weights(share: float) -> None:
    """Within bounds, the coarser the higher the frequency and in the colours; else 1."""
    w = weights(4000, share, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert w.shape == (4000, 192, 1, 1)
    one = (w == 1).flatten(1).all(1)
    assert float(one.float().mean()) == pytest.approx(1 - share, abs=0.03)
    assert float(w.max()) <= 1 and float(w.min()) >= math.exp(-3.001)
    if share:
        rest = w[~one].view(-1, 3, 64)
        assert float(rest.min()) < math.exp(-2.5) and bool((rest[:, 0, 0] == 1).all())
        f = torch.as_tensor(zigzag()).float().norm(dim=1)
        for component in range(3):  # falling with the frequency, for each picture
            of = rest[:, component][:, f.argsort()]
            assert bool((of[:, 1:] <= of[:, :-1] + 1e-6).all())
        assert bool((rest[:, 1:] <= rest[:, :1] + 1e-6).all())


@pytest.mark.parametrize("weighted", [0.0, 1.0])
def test_a_walk_goes_through_all_levels(weighted: float) -> None:
    walk = Walk(coefficients(3), 1, torch.Generator().manual_seed(0), weighted)
    assert walk.new.tolist() == [True] * 3
    log_scale = torch.full_like(walk.c, -1.0)
    log_scale[:, 100:] = -5.0  # the network expects nothing of these
    log_scale[:, :10] = 2.0  # and much of those
    steps, left = [0, 0, 0], 0
    for seed in range(1, 50):
        before, c, fresh = walk.state, walk.c, coefficients(3, seed)
        assert bool((before.weights == 1).all()) == (weighted == 0)
        walk.step(log_scale, fresh)
        state = walk.state
        assert bool(walk.new[0])  # drawn afresh at each step
        for k in (1, 2):
            steps[k] += 1
            double = 2 * before.snr[k]
            assert bool(walk.new[k]) == (float(double) > SNR_RANGE[1])
            now = state.precision[k] > 0
            nominal = (state.snr[k] * state.weights[k].square()).expand_as(now)
            assert bool((state.precision[k][now] == nominal[now]).all())
            unit = (state.m[k] - walk.c[k])[now] * state.precision[k][now].sqrt()
            if len(unit):
                assert float(unit.square().mean()) == pytest.approx(1, abs=10 / len(unit) ** 0.5)
            if walk.new[k]:
                assert 10 <= steps[k] <= 18
                steps[k], left = 0, left + 1
                assert torch.equal(walk.c[k], fresh[k])
                assert SNR_RANGE[0] <= float(state.snr[k]) <= 64.01 * SNR_RANGE[0]
                continue
            known = before.precision[k] > 0
            assert torch.equal(walk.c[k], c[k]) and state.snr[k] == double
            assert torch.equal(state.weights[k], before.weights[k])
            assert bool((now >= known).all())  # once known, for ever
            assert bool(now[:10].all()) and torch.equal(now[100:], known[100:])
        assert torch.equal(walk.c[0], fresh[0])
    assert left >= 5


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_observation(scale: float) -> None:
    precision = torch.full((2000, 3, 1, 1), 4.0)
    precision[:, 1] = 0
    c = torch.full_like(precision, scale)
    snr = torch.full((2000,), 4.0)
    state = observe(c, precision, snr, alike(2000), torch.Generator().manual_seed(0))
    assert not state.m[:, 1].any()
    noise = state.m[:, 0] - scale
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(state.m[:, 0], state.m[:, 2])


def test_local_energy_leaves_out_the_place_itself() -> None:
    c = torch.zeros((1, 192, 5, 5))
    c[0, 0, 2, 2] = 2.0
    energy = states.local_energy(c)
    assert float(energy[0, 0, 2, 2]) == pytest.approx(0, abs=1e-6)
    # The mean's band lies in the corner of frequencies: 4 bands by 9 blocks, without itself.
    assert float(energy[0, 0, 1, 2]) == pytest.approx(4 / 35)
    assert not energy[0, 64:].any() and not energy[0, :, 0].any()
