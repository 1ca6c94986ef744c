"""Muon and AdamW side by side."""

from __future__ import annotations

import pytest
import torch
from networks import SMALL, TINY
from torch import nn

from ddpm_codec.errors import DdpmcError
from ddpm_codec.network.modelfile import Config, new_network
from ddpm_codec.training.optimizer import Optimizer


def network(cfg: Config = TINY) -> nn.Module:
    torch.manual_seed(0)
    return new_network(cfg).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def give_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("cfg", [TINY, SMALL], ids=["exact", "paper"])
@pytest.mark.parametrize("muon", [True, False])
def test_every_parameter_learns_and_goes_on(muon: bool, cfg: Config) -> None:
    net = network(cfg)
    optimizer = Optimizer(net, 1e-3, 0.0, muon)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    give_gradients(net, 1)
    optimizer.step(1e-3)
    for name, p in net.named_parameters():
        assert p.grad is None
        step = (p.detach() - before[name]).square().mean().sqrt()
        # Muon's steps are of AdamW's usual size, 0.2 of the rate; AdamW's first is the rate.
        expected = 2e-4 if name in optimizer.matrices else 1e-3
        assert float(step) == pytest.approx(expected, rel=0.5), name
    assert any("conv1" in name for name in optimizer.matrices) == muon
    ends = {"stem", "map_in", "block_in", "out", "scales", "block_out"}
    assert not ends & {name.split(".")[0] for name in optimizer.matrices}

    # Another one, given the first's state, takes the same second step.
    other = network(cfg)
    other.load_state_dict(net.state_dict())
    again = Optimizer(other, 1e-3, 0.0, muon)
    again.restore({k: v.clone() for k, v in optimizer.tensors().items()})
    for n, o in ((net, optimizer), (other, again)):
        give_gradients(n, 2)
        o.step(5e-4)
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_state_of_the_other_kind_is_left_out() -> None:
    net = network()
    muon, adam = Optimizer(net, 1e-3, 0.0, True), Optimizer(net, 1e-3, 0.0, False)
    give_gradients(net, 1)
    adam.step(1e-3)
    muon.restore(adam.tensors())
    assert not any(k.startswith("momentum_buffer") for k in muon.tensors())
    assert "exp_avg.stem.weight" in muon.tensors()


def test_muon_steps_are_orthogonal() -> None:
    net = network()
    optimizer = Optimizer(net, 1e-3, 0.0, True)
    name, matrix = next((k, m) for k, m in optimizer.matrices.items() if "conv1" in k)
    before = matrix.detach().clone()
    give_gradients(net, 3)
    optimizer.step(1e-3)
    singular = torch.linalg.svdvals((matrix - before).detach())
    assert float(singular.max() / singular.min()) < 3
    weight = net.get_parameter(name)
    assert torch.equal(matrix, weight.permute(0, 2, 3, 1).flatten(1))


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(DdpmcError, match=r"training needs torch 2\.9 or newer, this is \d"):
        Optimizer(torch.nn.Linear(2, 2), 1e-3, 0.0, muon=False)
