"""Tunes: precision by band, from header to picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_codec import decode, encode, info
from ddpm_codec.codec import container
from ddpm_codec.codec.chain import Chain
from ddpm_codec.codec.encoder import make_header
from ddpm_codec.codec.header import Header, write_header
from ddpm_codec.codec.tune import TUNES, Tune, default, weights
from ddpm_codec.errors import ModelError
from ddpm_codec.network.modelfile import get_model


def test_weights() -> None:
    """By the formula in floating point; the mean of each component, and a diagonal."""
    w = weights(Tune(5, 31, 7))
    assert w[0] == 1.0 and w[64] == pytest.approx(2**-1.25) and w[128] == pytest.approx(2**-7.75)
    # Zigzag position 63 is (7, 7): floor(16 sqrt 98) = 158, 7 * 158 // 128 = 8.
    assert w[63] == 2**-2 and w[127] == pytest.approx(2**-3.25)
    assert (weights(TUNES["even"]) == 1).all()
    assert (np.diff(weights(Tune(0, 0, 12))[[0, 1, 3, 6, 10]]) < 0).all()


def test_what_serves_a_target() -> None:
    assert default("spectral") == TUNES["visual"]
    assert default("spectral", psnr=30.0) == TUNES["visual"]
    assert default("spectral", psnr=41.0) == default("spectral", lossless=True) == TUNES["even"]
    assert default("isotropic") == TUNES["even"]


@pytest.mark.parametrize("tune", [*TUNES.values(), Tune(31, 0, 31)])
def test_headers(tune: Tune) -> None:
    header = Header(8, 9, "RGB", "spectral", b"model!", 0, 5, 160, (8, 4, 0), tune)
    data = write_header(header)
    assert container.parse(data).header == header
    assert info(data)["tune"] == list(tune)


def test_precision(tiny_model: Path, picture: Image.Image) -> None:
    """What a level leaves is noise of the precision that its band has."""
    model, tune = get_model(tiny_model), Tune(4, 8, 6)
    large = Image.fromarray(np.tile(np.asarray(picture), (4, 3, 1)))
    chain = Chain(make_header(large, model, steps=3, tune=tune, path="isotropic"), model)
    chain.observe(np.asarray(large))
    estimate = chain.estimate(-1)
    for i in range(2):
        chain.draw_level(i, estimate, seed=i, truth=True)
        estimate = chain.estimate(i)
    error = np.square(chain.m.reshape(192, -1) - chain.c).mean(1)
    each = error * chain.snrs[1] * weights(tune)
    for bands in (slice(0, 16), slice(48, 64), slice(64, 128), slice(128, 192)):
        assert each[bands].mean() == pytest.approx(1, abs=0.1)


def test_encode(tiny_model: Path, picture: Image.Image) -> None:
    """By name, by numbers, by default; a decoder needs to be told nothing."""
    how: dict[str, Any] = {"model": tiny_model, "steps": 4, "effort": 1}
    made = {name: encode(picture, tune=name, **how) for name in TUNES}
    assert len(set(made.values())) == 2
    assert encode(picture, **how) == made["visual"] == encode(picture, tune=(8, 6, 12), **how)
    for name, data in made.items():
        assert info(data)["tune"] == list(TUNES[name])
        assert decode(data, model=tiny_model).size == picture.size


def test_what_there_is_not(tiny_model: Path, small_model: Path, picture: Image.Image) -> None:
    for tune, message in (("loud", "unknown tune 'loud'"), ((0, 32, 0), "must be in 0 .. 31")):
        with pytest.raises(ValueError, match=message):
            encode(picture, model=tiny_model, tune=tune)
    with pytest.raises(ModelError, match="supports tune even only"):
        encode(picture, model=small_model, tune="visual")
