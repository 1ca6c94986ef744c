"""Which model files are found and kept, and on which devices. What is in one: test_network.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm_codec.network import modelfile
from ddpm_codec.network.modelfile import get_model


def test_a_file_that_changes_is_another_model(
    tiny_model: Path, small_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    shutil.copy(tiny_model, path)
    first = get_model(path)
    assert get_model(path) is first
    shutil.copy(small_model, path)
    assert get_model(path).id == get_model(small_model).id != first.id


@pytest.mark.parametrize("installed", [True, False])
def test_models_of_other_packages_are_not_ours(tmp_path: Path, installed: bool) -> None:
    """Beside an installed package lies whatever others have installed."""
    ours = tmp_path / "ddpm_codec"
    shutil.copytree(Path(modelfile.__file__).parents[1], ours)
    if installed:
        (ours / "models").mkdir()
    script = "from ddpm_codec.network import modelfile; print(*modelfile.FOLDERS)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == str((ours if installed else tmp_path) / "models"), run.stderr


def test_a_device_needs_double_precision(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("meta", "nonesuch"):
        with pytest.raises(ValueError, match=f"^device {device}: "):
            get_model(tiny_model, device=device)

    def as_mps_does(*_: object, **how: object) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype\nas")

    monkeypatch.setattr(torch, "ones", as_mps_does)
    with pytest.raises(
        ValueError, match=r"^device mps: Cannot convert a MPS Tensor to float64 dtype$"
    ):
        get_model(tiny_model, device="mps")
