"""Training states: what is known, at which precision, and how a walk goes through the levels."""

from __future__ import annotations

import pytest
import torch

from ddpm_codec.training import states
from ddpm_codec.training.states import SNR_RANGE, Walk, draw, observe


def coefficients(n: int, seed: int = 0) -> torch.Tensor:
    """(n, 192, 4, 4) whose bands fall off as those of pictures do."""
    spread = torch.linspace(0, -6, 192).exp()[None, :, None, None]
    return spread * torch.randn((n, 192, 4, 4), generator=torch.Generator().manual_seed(seed))


def test_drawn_states_are_what_they_say() -> None:
    c = coefficients(400)
    state = draw(c, torch.Generator().manual_seed(1))
    low, high = SNR_RANGE
    assert float(state.snr.min()) >= low and float(state.snr.max()) <= high
    known = state.precision > 0
    assert not state.m[~known].any()
    # Unit noise, whatever the precision; the loudest may be twice as fine.
    unit = (state.m - c)[known] * state.precision[known].sqrt()
    assert float(unit.mean()) == pytest.approx(0, abs=0.01)
    assert float(unit.square().mean()) == pytest.approx(1, abs=0.01)
    ratio = (state.precision / state.snr[:, None, None, None])[known]
    assert set(ratio.round().int().tolist()) == {1, 2}
    finer = torch.where(known, state.precision > 1.5 * state.snr[:, None, None, None], False)
    some = finer.flatten(1).any(1)
    assert 0.02 < float(some.float().mean()) < 0.25
    assert float(finer[some, :20].float().mean()) > 2 * float(finer[some, -20:].float().mean())
    # Some are isotropic, and in the others what is large is known first.
    assert 0.05 < float(known.flatten(1).all(1).float().mean()) < 0.6
    some = known[~known.flatten(1).all(1)]
    assert float(some[:, :20].float().mean()) > 2 * float(some[:, -20:].float().mean())


def test_a_walk_goes_through_all_levels() -> None:
    walk = Walk(3, 1, torch.Generator().manual_seed(0))
    assert walk.new.tolist() == [True] * 3
    walk.fill(coefficients(3))
    lam = torch.full_like(walk.c, -1.0)
    lam[:, 100:] = -5.0  # the network expects nothing of these
    lam[:, :10] = 2.0  # and much of those
    steps = [0, 0, 0]
    for seed in range(50):
        before = walk.state.snr.clone()
        c, known = walk.c.clone(), walk.state.precision > 0
        walk.step(lam)
        assert bool(walk.new[0])  # drawn afresh at each step
        for k in (1, 2):
            steps[k] += 1
            assert float(walk.state.snr[k]) == pytest.approx(2 * float(before[k]))
            assert bool(walk.new[k]) == (float(walk.state.snr[k]) > SNR_RANGE[1])
            now = walk.state.precision[k] > 0
            assert bool((now >= known[k]).all())  # once known, for ever
            assert bool(now[:10].all()) and torch.equal(now[100:], known[k, 100:])
            assert bool((walk.state.precision[k][now] == walk.state.snr[k]).all())
            if walk.new[k]:
                assert 12 <= steps[k] <= 18
                steps[k] = 0
        stay = ~walk.new
        walk.fill(coefficients(int(walk.new.sum()), seed))
        assert torch.equal(walk.c[stay], c[stay])
        for k in (1, 2):
            if not stay[k]:
                low = SNR_RANGE[0]
                assert low <= float(walk.state.snr[k]) <= 64.01 * low


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_observation(scale: float) -> None:
    precision = torch.full((2000, 3, 1, 1), 4.0)
    precision[:, 1] = 0
    c = torch.full_like(precision, scale)
    state = observe(c, precision, torch.full((2000,), 4.0), torch.Generator().manual_seed(0))
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
