"""Model files for tests, small and with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from networks import exact_network, small_network

from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.network.exact import ExactConfig
from ddpm_codec.network.modelfile import save_model
from ddpm_codec.network.tables import Tables, new_tables

LADDER = Ladder(tau=0.5)  # a random network would have nearly all coefficients sent with less
TINY = ExactConfig(channels=(8, 12, 16, 8), down=(1, 1, 1, 1), up=(1, 1, 1), embedding=16)


def fitted(scales: bool, seed: int = 0) -> Tables:
    """Tables that differ everywhere, and expect quite another picture."""
    t, rng = new_tables(LADDER, scales), np.random.default_rng(seed)
    t.mean = 0.3 * rng.standard_normal(192)
    t.error = t.error * np.exp(rng.normal(1, 1.5, t.error.shape)).astype(np.float32)
    factor = np.exp(rng.normal(0, 0.3, t.variance.shape)).astype(np.float32)
    t.variance = np.sort(t.variance * factor, axis=-1)
    t.check(LADDER, scales)
    return t


def exact_model(path: Path) -> Path:
    save_model(path, "tiny", exact_network(TINY), fitted(True), LADDER)
    return path


def paper_model(path: Path) -> Path:
    net = small_network()
    blend = net.get_buffer("blend")
    blend += 0.1 * torch.randn(blend.shape)
    save_model(path, "small", net, fitted(False), LADDER)
    return path
