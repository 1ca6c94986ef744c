"""What the tests share: untrained models, small enough to encode a picture in no time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from networks import exact_network, small_network
from PIL import Image

from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.network.modelfile import save_model
from ddpm_codec.network.tables import new_tables


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file: a small exact network with random weights, tables from the formula."""
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_model(path, "tiny", exact_network(heads=0.04), new_tables(Ladder(), scales=True), Ladder())
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of the paper's kind: a few channels, attention at 16x16, random weights."""
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    save_model(path, "small", small_network(), new_tables(Ladder(), scales=False), Ladder())
    return path


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """(40, 28) RGB: smooth, with an edge and some grain."""
    y, x = np.mgrid[:28, :40]
    rng = np.random.default_rng(0)
    rgb = np.stack([4 * x + y, 255 - 5 * x, 60 + 6 * y], -1) + rng.normal(0, 6, (28, 40, 3))
    rgb[8:20, 10:14] = 240
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
