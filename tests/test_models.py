"""What is in a model file: both kinds of networks, whole, damaged and hostile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import SMALL, TINY, exact_network, small_network
from safetensors.numpy import load_file, save_file
from test_exact import BROKEN

from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import ModelError
from ddpm_codec.network import conditioning, exact, modelfile, tiles
from ddpm_codec.network import tables as tables_module
from ddpm_codec.network.exact import ExactUNet
from ddpm_codec.network.modelfile import (
    Model,
    load_model,
    network_config,
    read_metadata,
    save_model,
)
from ddpm_codec.network.tables import new_tables
from ddpm_codec.network.unet import UNet
from ddpm_codec.rec import classes, rangecoder, trellis

LADDER = Ladder(4, 1000, 0.3)


def saved(path: Path, net: UNet | ExactUNet) -> tuple[Model, bytes]:
    tables = new_tables(LADDER, scales=isinstance(net, ExactUNet))
    tables.mean += np.arange(192) / 7
    digest = save_model(path, "some", net, tables, LADDER)
    model = load_model(path)
    for key, value in model.tables.arrays().items():
        np.testing.assert_array_equal(value, tables.arrays()[key])
    assert (model.name, model.ladder, model.net.cfg) == ("some", LADDER, net.cfg)
    assert model.digest == digest and len(digest) == 32 and model.id == digest[:6]
    return model, digest


def test_an_exact_network_round_trip(tmp_path: Path) -> None:
    net, path = exact_network(), tmp_path / "m.safetensors"
    model, digest = saved(path, net)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert model.exact and isinstance(model.net, ExactUNet)
    written, read = net.integers(), model.net.integers()
    assert set(read) == set(written)
    for key, value in read.items():
        assert value.dtype == written[key].dtype and torch.equal(value, written[key]), key
    with pytest.raises(ModelError, match="is for photographs"):
        _ = model.unet
    # As it was read, it is written again: the same file.
    assert save_model(path, "some", model.net, model.tables, LADDER) == digest
    # What both ends must share is in the digest, the name is not.
    assert save_model(path, "other", net, model.tables, LADDER) == digest
    model.tables.mean[3] += 1e-9
    assert save_model(path, "some", net, model.tables, LADDER) != digest


def test_the_papers_kind_round_trip(tmp_path: Path) -> None:
    net = small_network(replace(SMALL, prediction="v"))
    model, _ = saved(tmp_path / "m.safetensors", net)
    assert not model.exact and model.unet is model.net
    state = net.state_dict()
    assert set(model.net.state_dict()) == set(state)
    for key, value in model.net.state_dict().items():
        assert torch.equal(value, state[key].half().float()), key


def test_model_without_scales(small_model: Path) -> None:
    model = load_model(small_model)
    assert model.unet.cfg.attention == (1,)
    assert model.tables.error.shape == (34, 192, 16) and not len(model.tables.variance)
    np.testing.assert_allclose(model.error_at(2560.0), 0.25 / 2560, rtol=1e-6)


@pytest.mark.parametrize(
    "kind", [k for k in BROKEN if k not in ("weights' sum", "few deviations", "double deviations")]
)
def test_what_is_not_exact_is_refused_when_read(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """Also behind a digest that is right."""
    given = load_file(tiny_model)
    weights = {k[4:]: torch.from_numpy(v) for k, v in given.items() if k.startswith("net.")}
    BROKEN[kind][1](weights)
    arrays = given | {f"net.{k}": v.contiguous().numpy() for k, v in weights.items()}
    path = tmp_path / "m.safetensors"
    fields = read_metadata(tiny_model)
    fields["digest"] = modelfile.digest(arrays, fields).hex()
    save_file(arrays, path, fields)
    with pytest.raises(ModelError) as e:
        load_model(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "kind", ["unit of 9 bits", "units of a group", "infinite level", "no gain", "-128"]
)
def test_what_is_not_exact_is_refused_when_written(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = exact_network()
    given = net.integers()
    BROKEN[kind][1](given)
    monkeypatch.setattr(net, "integers", lambda: given)
    with pytest.raises(ModelError, match=f"layer {BROKEN[kind][0]} is not exact"):
        save_model(tmp_path / "m.safetensors", "m", net, new_tables(Ladder(), True), Ladder())
    assert not list(tmp_path.iterdir())


def test_weights_that_are_none_are_refused_when_written(tmp_path: Path) -> None:
    net = exact_network()
    with torch.no_grad():
        net.get_submodule("out_q").get_parameter("offset")[2] = torch.nan
    with pytest.raises(ModelError, match="layer out_q is not exact"):
        save_model(tmp_path / "m.safetensors", "m", net, new_tables(Ladder(), True), Ladder())


@pytest.mark.parametrize("name", ["sigma_data", "stem.weight", "stem.unit", "down.0.0.levels"])
def test_what_is_missing_is_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    arrays, fields = load_file(tiny_model), read_metadata(tiny_model)
    del arrays[f"net.{name}"]
    fields["digest"] = modelfile.digest(arrays, fields).hex()
    save_file(arrays, tmp_path / "m.safetensors", fields)
    with pytest.raises(ModelError, match="malformed"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (tiles, "TILE", 32), (tiles, "OVERLAP", 8), (tiles, "SMALL", 64),
        (trellis, "RATE", {8: 283}), (trellis, "OVERHEAD", 5), (trellis, "WIDTH", 128),
        (trellis, "QUIET", 0.8), (trellis, "FEW", 15), (trellis, "MIXED", 1 << 11),
        (rangecoder, "TOTAL", 1 << 15),
        (conditioning, "GRID", 2.0**13), (conditioning, "LIMIT", 2.0**9),
        (conditioning, "FINE", 2.0**13), (conditioning, "PIXELS", 221.0),
        (conditioning, "WHITENED_PIXELS", 65.0), (conditioning, "WHITENED", 33.0),
        (conditioning, "PRECISIONS", 127.0), (conditioning, "LOG_SCALES", 7.0),
        (exact, "HIGH", 127), (exact, "WEIGHT", 63), (exact, "STEP", 1 / 64),
        (exact, "NODES", (0.0,)), (exact, "PATCH", 4), (exact, "BLOCK_LEVEL", 1),
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
    """Who changes one cannot read the files of the others, and gets an error."""
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


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "mu"])
def test_every_prediction_can_be_stored(tmp_path: Path, prediction: Any) -> None:
    net = small_network(replace(SMALL, prediction=prediction))
    path = tmp_path / "m.safetensors"
    save_model(path, "m", net, new_tables(Ladder(), scales=False), Ladder())
    assert load_model(path).unet.cfg.prediction == prediction


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
    """Fails the test once a network's weights take more than 20 million numbers of memory."""
    total = [0]
    register: Callable[..., None] = torch.nn.Module.register_parameter

    def counted(self: torch.nn.Module, name: str, p: torch.nn.Parameter | None) -> None:
        total[0] += p.numel() if p is not None and p.device.type != "meta" else 0
        assert total[0] < 20_000_000, "memory was allocated for a hostile configuration"
        register(self, name, p)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", counted)


HOSTILE_EXACT: dict[str, dict[str, Any]] = {
    "wide": {"channels": [10**9, 8, 8, 8]},
    "fairly wide": {"channels": [2048] * 4, "down": [64] * 4},
    "embedding": {"embedding": 10**9},
    "blocks": {"down": [1, 1, 10**9, 1]},
    "few channels": {"channels": [8] * 3},
    "three sizes": {"channels": [8] * 3, "down": [1] * 3, "up": [1] * 2},  # none beyond blocks
    "many": {"channels": [8] * 100, "down": [1] * 100, "up": [1] * 99},
    "none": {"channels": [], "down": [], "up": []},
    "zero": {"channels": [8, 0, 8, 8]},
    "negative": {"up": [1, -1, 1]},
    "fraction": {"channels": [8, 8, 8.5, 8]},
    "word": {"channels": "wide"},
    "number": {"down": 1},
    "unknown": {"depth": 3},
    "attention": {"attention": [1]},
}
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
    "wiring": {"wiring": "loose"},
    "prediction": {"prediction": "score"},
    "unknown": {"depth": 3},
    "tiny embedding": {"embedding": 2},  # a division by zero in the sinusoids
    "odd embedding": {"embedding": 33},
    "attention": {"attention": 1},
    "list": [],
    "string": "abc",
}


def tampered(model: Path, path: Path, **metadata: Any) -> Path:
    """A copy with other metadata and a digest that is right."""
    arrays = load_file(model)
    fields = read_metadata(model) | {k: json.dumps(v) for k, v in metadata.items()}
    fields["digest"] = modelfile.digest(arrays, fields).hex()
    save_file(arrays, path, fields)
    return path


def test_tampering_itself_is_harmless(tiny_model: Path, tmp_path: Path, allocation: None) -> None:
    path = tampered(tiny_model, tmp_path / "m.safetensors")
    assert load_model(path).digest == load_model(tiny_model).digest


@pytest.mark.parametrize("kind", HOSTILE_EXACT)
def test_hostile_exact_network_is_refused(
    tiny_model: Path, tmp_path: Path, allocation: None, kind: str
) -> None:
    fields = asdict(TINY) | HOSTILE_EXACT[kind]
    path = tampered(tiny_model, tmp_path / "m.safetensors", network=fields)
    with pytest.raises(ModelError) as e:
        load_model(path)
    assert "\n" not in str(e.value)


def test_configurations_from_json() -> None:
    for cfg in (TINY, SMALL, *modelfile.PRESETS.values()):
        assert network_config(json.loads(json.dumps(asdict(cfg)))) == cfg


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_network_is_refused(
    small_model: Path, tmp_path: Path, allocation: None, kind: str
) -> None:
    cfg: Any = HOSTILE[kind]
    if isinstance(cfg, dict):
        cfg = asdict(SMALL) | cfg
    path = tampered(small_model, tmp_path / "m.safetensors", network=cfg)
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
