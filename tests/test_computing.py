"""Memory that runs out, and forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ddpm_codec
from ddpm_codec.codec import chain
from ddpm_codec.errors import LimitError
from ddpm_codec.network.computing import computing
from ddpm_codec.paper import likelihood, sampling

QUICK: dict[str, Any] = {"steps": 3, "effort": 1}
FORKING = """
import os, sys
import torch
from PIL import Image
import ddpm_codec

def both():
    im = Image.linear_gradient("L").resize((40, 28))
    data = ddpm_codec.encode(im, model=sys.argv[1], steps=3, effort=1)
    return ddpm_codec.decode(data, model=sys.argv[1]).size

torch.set_num_threads(2)
both()
if (child := os.fork()) == 0:
    os._exit(0 if both() == (40, 28) and torch.get_num_threads() == 1 else 1)
assert torch.get_num_threads() == 2
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes(tiny_model: Path) -> None:
    """Whose parent has; a child that hangs goes with the parent's session."""
    arguments = [sys.executable, "-c", FORKING, str(tiny_model)]
    with subprocess.Popen(arguments, start_new_session=True) as process:
        try:
            assert process.wait(timeout=120) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), MemoryError("Unable to allocate 7 PiB"), torch.cuda.OutOfMemoryError("CUDA"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto")],
)  # fmt: skip
def test_memory_that_runs_out(
    tiny_model: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    data = ddpm_codec.encode(picture, model=tiny_model, **QUICK)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(chain, "ask_exact", fail)
    for attempt in (
        lambda: ddpm_codec.encode(picture, model=tiny_model, **QUICK),
        lambda: ddpm_codec.decode(data, model=tiny_model),
        lambda: list(ddpm_codec.decode_levels(data, model=tiny_model)),
    ):
        with pytest.raises(LimitError, match=r"^not enough memory \(.+\)$"):
            attempt()


def test_memory_that_runs_out_on_samples_and_bounds(
    small_model: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    model, small = str(small_model), picture.resize((32, 32))
    small.save(path := tmp_path / "a.png")
    for module in (sampling, likelihood):
        monkeypatch.setattr(module, "of_pictures", fail)
    for attempt in (
        lambda: sampling.sampled_sheet(model, "cpu", None, None, n=1, steps=1),
        lambda: sampling.interpolated_sheet(
            model, "cpu", small, small, [0.5], start=9, steps=1, seed=0
        ),
        lambda: likelihood.of_files([path], model, "cpu"),
    ):
        with pytest.raises(LimitError, match="not enough memory"):
            attempt()


def test_torch_itself_says_so() -> None:
    with pytest.raises(LimitError, match="not enough memory"), computing():
        torch.empty(10**16)


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"), computing():
        raise RuntimeError("shapes differ")
