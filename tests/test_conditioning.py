"""The network's inputs from a state and the estimate from its outputs: EDM's factors, on grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import exact_network
from torch import Tensor

from ddpm_codec.network import conditioning
from ddpm_codec.network.conditioning import (
    GRID,
    LIMIT,
    LOG_SCALES,
    State,
    factors,
    nominal,
    state_factors,
)
from ddpm_codec.network.denoiser import ask_exact
from ddpm_codec.network.exact import HIGH, ExactUNet, Inputs, Outputs
from ddpm_codec.training import tasks


def one(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


@pytest.mark.parametrize("precision", [0.02, 1.0, 77.0, 4000.0])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_factors(precision: float, sigma: float) -> None:
    """Karras et al. (2022), table 1, in the observation view: M = x_0 + N(0, 1 / precision)."""
    f = factors(one(precision), one(precision), one(precision), one(sigma))
    noise2, data2 = 1 / precision, sigma**2
    assert float(f.skip) == pytest.approx(data2 / (data2 + noise2))
    assert float(f.out) == pytest.approx((noise2 * data2 / (data2 + noise2)) ** 0.5)
    assert float(f.whiten) == pytest.approx((data2 + noise2) ** -0.5)
    assert float(f.precision_map) == 1
    # Wiener's estimate is the best linear one, and c_out is the deviation of its error.
    rng = np.random.default_rng(0)
    x_0 = rng.normal(0, sigma, 200_000)
    m = x_0 + rng.normal(0, noise2**0.5, x_0.shape)
    assert np.std(x_0 - float(f.skip) * m) == pytest.approx(float(f.out), rel=0.02)
    assert np.std(m * float(f.whiten)) == pytest.approx(1, rel=0.02)


def test_unknown_coefficients() -> None:
    """M does not count; the precision map says so, and how precise an observation would be."""
    f = factors(one(0), one(16), one(1), one(0.7))
    assert (float(f.skip), float(f.whiten)) == (0, 0)
    assert float(f.out) == pytest.approx(0.7)
    assert float(f.precision_map) == 16**0.25 - 1
    finer = factors(one(32), one(16), one(16), one(0.7))
    assert float(finer.precision_map) == pytest.approx(2**0.25)


def test_weights_of_bands() -> None:
    weights = torch.ones(2, 192, 1, 1)
    weights[1, 5] = 0.5
    snr = torch.tensor([3.0, 8.0])
    zero = torch.zeros(2, 192, 2, 2)
    state = State(zero, zero, snr, weights)
    expected = nominal(state)
    assert expected.shape == (2, 192, 1, 1)
    assert (float(expected[0, 5]), float(expected[1, 5]), float(expected[1, 6])) == (3, 2, 8)
    f = state_factors(state, torch.ones(192))
    assert float(f.precision_map[1, 5, 0, 0]) == pytest.approx(0.25**0.25 - 1)
    assert float(f.precision_map[1, 6, 0, 0]) == 0


def asked(
    monkeypatch: pytest.MonkeyPatch, outputs: Outputs | None = None, **how: float
) -> tuple[Inputs, np.ndarray, np.ndarray]:
    """A network's inputs, and the estimate from its outputs."""
    net, given = exact_network(), []
    net.freeze(net.integers(), "cpu", torch.float32)
    forward = net.forward

    def watched(x: Inputs) -> Outputs:
        given.append(x)
        return forward(x) if outputs is None else outputs

    monkeypatch.setattr(net, "forward", watched)
    rng = np.random.default_rng(0)
    m = rng.normal(0, how.get("size", 1.0), (192, 4, 6)).astype(np.float32)
    m = np.rint(m * GRID).clip(-LIMIT * GRID, LIMIT * GRID) / GRID
    depth = rng.integers(-1, 2, m.shape).astype(np.int8)
    m[depth < 0] = 0
    x0_hat, index = ask_exact(
        net, m.astype(np.float32), depth, [2.0, 8.0, 0.0], 8.0, np.ones(192), "cpu"
    )
    return given[0], x0_hat, index


@pytest.mark.parametrize("size", [1.0, 2000.0])
def test_inputs_are_integers(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    x, x0_hat, index = asked(monkeypatch, size=size)
    for planes in x[:2]:
        assert planes.dtype == torch.bfloat16 and torch.equal(planes, planes.round())
        assert float(planes.abs().max()) <= HIGH
        assert float(planes.abs().max()) > 100
    assert x.pixels.shape == (1, 6, 32, 48) and x.blocks.shape == (1, 384, 4, 6)
    assert x.snr.dtype == torch.float64
    assert x0_hat.dtype == np.float32 and index.dtype == np.int8
    np.testing.assert_array_equal(x0_hat * GRID, np.rint(x0_hat * GRID))
    assert np.abs(x0_hat).max() <= 2 * LIMIT and 0 <= index.min() <= index.max() < 32


def silent(log_scale: float = 0.0) -> Outputs:
    zero = torch.zeros(1, 192, 4, 6)
    return Outputs(torch.zeros(1, 3, 32, 48), zero, zero, zero + log_scale)


def test_if_the_network_puts_out_zeros_the_estimate_is_wieners(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, x0_hat, index = asked(monkeypatch, silent())
    rng = np.random.default_rng(0)
    m = np.rint(rng.normal(0, 1.0, (192, 4, 6)).astype(np.float32) * GRID) / GRID
    depth = rng.integers(-1, 2, m.shape)
    v = exact_network().get_buffer("sigma_data").double().numpy()[:, None, None] ** 2
    precision = np.array([2.0, 8.0, 0.0])[depth]
    expected = m * (v * precision / (1 + v * precision))
    np.testing.assert_allclose(x0_hat, expected, atol=1 / GRID)
    assert (index == 20).all()


@pytest.mark.parametrize(
    ("log_scale", "index"), [(-100.0, 0), (-5.0, 0), (-4.76, 0), (-4.75, 1), (0.0, 20), (9.0, 31)]
)
def test_scale_indices(monkeypatch: pytest.MonkeyPatch, log_scale: float, index: int) -> None:
    assert (asked(monkeypatch, silent(log_scale))[2] == index).all()
    assert LOG_SCALES == 8


def test_outputs_are_in_units_of_wieners_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, _ = asked(monkeypatch, silent())
    _, after, _ = asked(monkeypatch, silent()._replace(shift=torch.ones(1, 192, 4, 6)))
    depth = np.random.default_rng(0)
    depth.normal(0, 1.0, (192, 4, 6))
    precision = np.array([2.0, 8.0, 0.0])[depth.integers(-1, 2, (192, 4, 6))]
    sigma = exact_network().get_buffer("sigma_data").double().numpy()[:, None, None]
    out = sigma / np.sqrt(1 + sigma**2 * precision)
    np.testing.assert_allclose(after - before, out, atol=1.1 / GRID)


def test_in_training_the_same_without_grids() -> None:
    """In single precision the estimate equals the codec's, but for its last digits."""
    assert conditioning.FINE == 4096
    net = exact_network()
    other = ExactUNet(net.cfg)
    other.freeze(net.integers(), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(192, 4, 6, generator=generator)
    depth = torch.randint(-1, 2, m.shape, generator=generator)
    m[depth < 0] = 0
    x0_hat, _ = ask_exact(
        other, m.numpy(), depth.numpy(), [2.0, 8.0, 0.0], 8.0, np.ones(192), "cpu"
    )
    precision = torch.tensor([2.0, 8.0, 0.0])[depth]
    state = State(m[None], precision[None], torch.tensor([8.0]), torch.ones(1, 192, 1, 1))
    with torch.no_grad():  # with x_0 = 0 the loss is the estimate's square
        eps, _, _ = tasks.losses(net, torch.zeros_like(state.m), state)
    assert float(eps) == pytest.approx(8 * float(np.square(x0_hat).mean()), rel=0.02)
