"""What fuzzing has found so far, once more."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import fuzz
import pytest

from ddpm_codec.codec import container, decoder
from ddpm_codec.network.modelfile import load_model

INPUTS = sorted(p for p in fuzz.CORPUS.rglob("*") if p.is_file())


def test_every_target_has_a_corpus() -> None:
    assert {p.parent.name for p in INPUTS} == set(fuzz.TARGETS)


@pytest.mark.parametrize("name", sorted(fuzz.TARGETS))
def test_nothing_at_all(name: str) -> None:
    fuzz.TARGETS[name](b"")


@pytest.mark.parametrize("path", INPUTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_replay(path: Path) -> None:
    """Each input by its name, which says what it found."""
    fuzz.TARGETS[path.parent.name](path.read_bytes())
    assert not re.search("[0-9a-f]{12}", path.name), "a fuzzer's hash: say what the input found"


@pytest.mark.parametrize(
    "path",
    [p for p in INPUTS if p.name.startswith("seed-")],
    ids=lambda p: f"{p.parent.name}-{p.name}",
)
def test_seeds_are_sound(path: Path) -> None:
    """Else a fuzzer would begin with nothing: `python tests/fuzz.py seeds` makes them anew."""
    data = path.read_bytes()
    if path.parent.name == "model":
        if path.name != "seed-head":
            assert load_model(path).name in path.name
        return
    with fuzz.unlocked(), warnings.catch_warnings():
        warnings.simplefilter("error")
        if path.parent.name == "stream":
            file, model = fuzz.stream_file(data)
            assert container.parse(file).lossless
            assert decoder.decode(file, model=model).info["ddpm"]["t"] == 0
        else:
            stream = container.parse(data)
            assert stream.damage is None and stream.levels
