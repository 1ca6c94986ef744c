"""The network's shapes and reach; model files, whole, damaged and hostile."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import ModelError
from ddpm_codec.network import modelfile, tiles
from ddpm_codec.network import tables as tables_module
from ddpm_codec.network.denoiser import State, eps_hat
from ddpm_codec.network.modelfile import load_model, read_metadata, save_model
from ddpm_codec.network.tables import new_tables
from ddpm_codec.network.unet import PAPER, Blocks, GroupNorm, UNet, UNetConfig, sinusoidal
from ddpm_codec.rec import agree, classes, trellis

SMALL: dict[str, Any] = {"blocks": 1, "embedding": 32}
# The paper's for 32x32 pictures, narrower: four resolutions, attention at 16x16.
NARROW = replace(PAPER, channels=(32, 64, 64, 64), embedding=32)


def network(cfg: UNetConfig, seed: int = 0) -> UNet:
    """With no weight at zero: a new network's output layers are."""
    torch.manual_seed(seed)
    net = UNet(cfg)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "cfg",
    [
        UNetConfig(patch=1, channels=(32, 32, 32, 32), **SMALL),
        UNetConfig(patch=2, channels=(16, 24, 32), **SMALL),
        UNetConfig(patch=4, channels=(32, 32), **SMALL),
        UNetConfig(patch=8, channels=(32,), **SMALL),
        UNetConfig(patch=8, channels=(32, 64), norm="group", attention=(1,), **SMALL),
        UNetConfig(patch=4, channels=(32, 32, 32), middle=0, attention=(0, 2), **SMALL),
        NARROW,
        replace(NARROW, wiring="lean", middle=1),
    ],
    ids=lambda cfg: f"patch{cfg.patch}-{cfg.norm}-{len(cfg.channels)}",
)
def test_shapes(cfg: UNetConfig) -> None:
    net = network(cfg)
    h, w = cfg.multiple * 2, cfg.multiple * 3
    assert cfg.multiple % cfg.patch == 0 and (not cfg.precisions or cfg.multiple % 8 == 0)
    x, level = torch.randn(2, 6 if cfg.precisions else 3, h, w), torch.tensor([10.0, 700.0])
    shape = (2, 192, h // 8, w // 8)
    blocks = Blocks(torch.rand(shape), torch.randn(shape)) if cfg.precisions else None
    y, coefficients, lam = net(x, level, blocks)
    assert y.shape == (2, 3, h, w)
    assert bool(torch.isfinite(y).all()) and float(y.std()) > 0
    if blocks is not None:
        assert lam.shape == coefficients.shape == shape
        # Every input counts: the noise level, the map of precisions, the coefficients.
        for name, part in blocks._asdict().items():
            other, *_ = net(x, level, blocks._replace(**{name: 1.0 - part}))
            assert not torch.equal(other, y)
    else:
        assert coefficients is None and lam is None
    other, *_ = net(x, level + 1, blocks)
    assert not torch.equal(other, y)


def test_new_network_says_nothing() -> None:
    torch.manual_seed(0)
    net = UNet(UNetConfig(patch=4, channels=(32, 32), **SMALL))
    blocks = Blocks(torch.zeros(1, 192, 2, 2), torch.zeros(1, 192, 2, 2))
    outputs = net(torch.randn(1, 6, 16, 16), torch.tensor([5.0]), blocks)
    assert not any(y.any() for y in outputs)


def test_sinusoidal_embedding() -> None:
    e = sinusoidal(torch.tensor([0.0, 3.0]), 6)
    assert e[0].tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.sin([3.0, 3.0 / 100, 3.0 / 10000])
    np.testing.assert_allclose(e[1, :3].numpy(), expected, rtol=1e-5)


def far_change(norm: str, attention: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each column of the outputs moves when the last 8 of 256 columns change."""
    cfg = UNetConfig(patch=4, channels=(32, 32), norm=norm, attention=attention, **SMALL)  # type: ignore
    net = network(cfg).double()
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 6, 16, 256, generator=g, dtype=torch.float64)
    shape = (1, 192, 2, 32)
    blocks = Blocks(
        torch.rand(shape, generator=g, dtype=torch.float64),
        torch.randn(shape, generator=g, dtype=torch.float64),
    )
    level = torch.tensor([300.0])
    y, _, lam = net(x, level, blocks)
    x[..., 248:] += 1.0
    blocks.whitened[..., 31:] += 1.0
    other, _, other_lam = net(x, level, blocks)
    return (y - other).abs().amax((0, 1, 2)), (lam - other_lam).abs().amax((0, 1, 2))


def test_reach_is_bounded() -> None:
    """Pixels far from a change stay as they are, to the last bit."""
    y, lam = far_change("layer")
    assert float(y[250]) > 1e-6 and float(lam[31]) > 1e-6
    assert not y[: 248 - 96].any()
    assert not lam[: 31 - 12].any()
    # A tile sees 64 pixels beyond the part that is used.
    assert float(y[: 248 - 64].max()) < 1e-6 * float(y.max())
    assert int(y.nonzero().min()) < 248  # it does look beyond one pixel


@pytest.mark.parametrize(("norm", "attention"), [("group", ()), ("layer", (1,))])
def test_group_norm_and_attention_see_everything(norm: str, attention: tuple[int, ...]) -> None:
    y, _ = far_change(norm, attention)
    assert y[: 248 - 96].any()


def test_group_norm_is_torchs() -> None:
    rng = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(2, 64, 6, 4, generator=rng)
    ours, torchs = GroupNorm(64), torch.nn.GroupNorm(32, 64, eps=1e-6)
    for p in (*ours.parameters(),):
        torch.nn.init.normal_(p, generator=rng)
    torchs.load_state_dict(ours.state_dict())
    for memory in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=memory)
        torch.testing.assert_close(ours(y), torchs(y))
    torch.testing.assert_close(ours.double()(x.double()), torchs.double()(x.double()))
    assert ours(torch.ones(1, 64, 2, 2).double()).isfinite().all()
    with pytest.raises(ModelError, match="groups"):
        GroupNorm(48)


def test_unknown_prediction_is_refused() -> None:
    net = network(UNetConfig(patch=4, channels=(32, 32), **SMALL))
    state = State(torch.zeros(1, 192, 2, 2), torch.ones(1, 192, 2, 2), torch.tensor([1.0]))
    eps_hat(net, state, "eps")
    with pytest.raises(ValueError, match="score"):
        eps_hat(net, state, "score")


# --- Model files -------------------------------------------------------------------------------


def test_model_file_round_trip(tmp_path: Path) -> None:
    cfg = UNetConfig(patch=2, channels=(16, 24, 32), prediction="v", attention=(1,), **SMALL)
    net, ladder = network(cfg), Ladder(4, 1000, 0.3)
    tables = new_tables(ladder, scales=True)
    tables.mean += np.arange(192) / 7
    path = tmp_path / "m.safetensors"
    digest = save_model(path, "some", net, tables, ladder)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    model = load_model(path)
    assert (model.name, model.ladder, model.net.cfg) == ("some", ladder, cfg)
    assert model.digest == digest and len(digest) == 32 and model.id == digest[:6]
    state = net.state_dict()
    assert set(model.net.state_dict()) == set(state)
    for key, value in model.net.state_dict().items():
        assert torch.equal(value, state[key].half().float()), key
    for key, value in model.tables.arrays().items():
        np.testing.assert_array_equal(value, tables.arrays()[key])
    # What both ends must share is in the digest, the name is not.
    assert save_model(path, "other", net, tables, ladder) == digest
    tables.mean[3] += 1e-9
    assert save_model(path, "some", net, tables, ladder) != digest


def test_model_without_scales_round_trip(small_model: Path) -> None:
    model = load_model(small_model)
    assert model.net.cfg.attention == (1,) and not model.net.cfg.precisions
    assert model.tables.error.shape == (34, 192, 16) and not len(model.tables.variance)
    np.testing.assert_allclose(model.error_at(2560.0), 0.25 / 2560, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (tiles, "TILE", 32), (tiles, "OVERLAP", 8), (tiles, "SMALL", 64),
        (trellis, "RATE", {8: 283}), (trellis, "OVERHEAD", 5), (trellis, "WIDTH", 128),
        (trellis, "QUIET", 0.8), (trellis, "FEW", 15), (trellis, "MIXED", 1 << 11),
        (agree, "TOTAL", 1 << 15), (agree, "BLOCK", 1024), (agree, "MOVE_BITS", 6),
        (agree, "FARTHEST", 0.25), (agree, "OFF_SHARE", 0.25),
        (classes, "UNIT", 2.0**35), (classes, "UNITY", 21), (classes, "GAINS", [1.0]),
        (classes, "GAIN_SHARE", 81),
        (tables_module, "SCALE_STEP", 0.2), (tables_module, "SCALE_MIN", -4.0),
        (tables_module, "RESIDUAL_ESCAPE", 30),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)  # fmt: skip
def test_the_formats_constants_are_part_of_a_model(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any
) -> None:
    """Who changes one cannot read the files of the others, and is told so."""
    load_model(small_model)
    assert getattr(module, name) != value
    monkeypatch.setattr(module, name, value)
    with pytest.raises(ModelError, match="digest"):
        load_model(small_model)


def test_the_basis_is_part_of_a_model(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    basis = modelfile.transform.basis().copy()
    basis[3] *= -1
    monkeypatch.setattr(modelfile.transform, "basis", lambda: basis)
    with pytest.raises(ModelError, match="digest"):
        load_model(small_model)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "mu", "edm"])
def test_every_prediction_can_be_stored(tmp_path: Path, prediction: Any) -> None:
    net = network(UNetConfig(patch=4, channels=(32, 32), prediction=prediction, **SMALL))
    path = tmp_path / "m.safetensors"
    save_model(path, "m", net, new_tables(Ladder(), scales=True), Ladder())
    assert load_model(path).net.cfg.prediction == prediction


@pytest.mark.parametrize("where", [0, 9, 0.2, 0.5, 0.9, -1, b'"network"', b"channels", b"finest"])
def test_flipped_byte_is_noticed(tiny_model: Path, tmp_path: Path, where: Any) -> None:
    data = bytearray(tiny_model.read_bytes())
    if isinstance(where, bytes):
        at = data.index(where) + 1
    elif isinstance(where, float):
        at = int(where * len(data))
    else:
        at = where
    data[at] ^= 1
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError):
        load_model(path)


@pytest.mark.parametrize("size", [0, 5, 100, 3000, -1])
def test_cut_model_is_refused(tiny_model: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(tiny_model.read_bytes()[:size])
    with pytest.raises(ModelError):
        load_model(path)


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_model(tmp_path / "missing.safetensors")
    path = tmp_path / "m.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(ModelError, match="no configuration"):
        load_model(path)


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test once a network's convolutions take more than 20 million weights of memory."""
    total = [0]
    reset = torch.nn.Conv2d.reset_parameters

    def counted(self: torch.nn.Conv2d) -> None:
        total[0] += self.weight.numel() if self.weight.device.type != "meta" else 0
        assert total[0] < 20_000_000, "memory was allocated for a hostile configuration"
        reset(self)

    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", counted)


HOSTILE: dict[str, dict[str, Any] | list[Any] | str] = {
    "wide": {"channels": [10**9, 32]},
    "fairly wide": {"channels": [2048] * 6, "blocks": 64},
    "embedding": {"embedding": 10**9},
    "blocks": {"blocks": 10**9},
    "middle": {"middle": 10**9},
    "levels": {"channels": [32] * 1000},
    "none": {"channels": []},
    "zero": {"channels": [0, 32]},
    "negative": {"channels": [-32, 32]},
    "fraction": {"channels": [32.5, 32]},
    "word": {"channels": "wide"},
    "patch": {"patch": 3},
    "few": {"patch": 1},  # no resolution whose pixels are blocks
    "norm": {"norm": "batch"},
    "prediction": {"prediction": "score"},
    "unknown": {"depth": 3},
    "tiny embedding": {"embedding": 2},  # a division by zero in the sinusoids
    "odd embedding": {"embedding": 33},
    "attention": {"attention": 1},
    "list": [],
    "string": "abc",
}


def tampered(tiny_model: Path, path: Path, **metadata: Any) -> Path:
    """A copy with other metadata and a digest that is right."""
    arrays = load_file(tiny_model)
    fields = read_metadata(tiny_model) | {k: json.dumps(v) for k, v in metadata.items()}
    fields["digest"] = modelfile.digest(arrays, fields).hex()
    save_file(arrays, path, fields)
    return path


def test_tampering_itself_is_harmless(tiny_model: Path, tmp_path: Path, allocation: None) -> None:
    path = tampered(tiny_model, tmp_path / "m.safetensors")
    assert load_model(path).digest == load_model(tiny_model).digest


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_network_is_refused(
    tiny_model: Path, tmp_path: Path, allocation: None, kind: str
) -> None:
    cfg: Any = HOSTILE[kind]
    if isinstance(cfg, dict):
        cfg = asdict(UNetConfig(patch=4, channels=(32, 32), **SMALL)) | cfg
    path = tampered(tiny_model, tmp_path / "m.safetensors", network=cfg)
    with pytest.raises(ModelError) as e:
        load_model(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "ladder",
    [
        {"rungs": 8},
        {"rungs": 0},
        {"rungs": -1},
        {"rungs": 10**9},
        {"rungs": 33.0},
        {"finest": 0},
        {"finest": "high"},
        {"tau": 0},
        {"tau": "low"},
        {"depth": 1},
        [],
    ],
    ids=str,
)
def test_hostile_ladder_is_refused(tiny_model: Path, tmp_path: Path, ladder: Any) -> None:
    if isinstance(ladder, dict):
        ladder = asdict(Ladder()) | ladder
    path = tampered(tiny_model, tmp_path / "m.safetensors", ladder=ladder)
    start = time.perf_counter()
    with pytest.raises(ModelError):
        load_model(path)
    assert time.perf_counter() - start < 0.5  # not by making tables of that size first


def test_the_papers_network() -> None:
    """DDPM appendix B: 35.7 million parameters; ours in its likeness fits in 16 MB."""
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in UNet(cfg).parameters())
            for name, cfg in modelfile.PRESETS.items()
        }
    assert sizes["cifar10-paper"] == 35_746_307
    assert 2 * sizes["cifar10"] < 16e6 - 200_000 and 2 * sizes["photo"] < 16e6
    cfg = modelfile.PRESETS["cifar10-paper"]
    assert (cfg.norm, cfg.attention, cfg.dropout, cfg.prediction) == ("group", (1,), 0.1, "eps")
