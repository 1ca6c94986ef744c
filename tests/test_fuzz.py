"""What fuzzing has found so far, once more."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

INPUTS = sorted(p for p in fuzz.CORPUS.rglob("*") if p.is_file())


def test_every_target_has_a_corpus() -> None:
    assert {p.parent.name for p in INPUTS} == set(fuzz.TARGETS)


@pytest.mark.parametrize("name", sorted(fuzz.TARGETS))
def test_replay(name: str) -> None:
    for path in [Path("/dev/null"), *(p for p in INPUTS if p.parent.name == name)]:
        fuzz.TARGETS[name](path.read_bytes())
