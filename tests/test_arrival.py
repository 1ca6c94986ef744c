"""Files on their way, and where they are stopped; what a decoder may use is what a cut would be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_container import FILE, HEADER, WHOLE, flip

from ddpm_codec.codec.arrival import Arrival
from ddpm_codec.codec.container import parse
from ddpm_codec.codec.stops import stopped
from ddpm_codec.errors import FormatError

TS = HEADER.ts
STOPS = [
    None, "t=0", "t=1000", f"t={TS[0]}", f"t={TS[1]}", f"t={TS[2] + 1}", f"t={TS[-1]}",
    "psnr=1", "psnr=25.5", "psnr=90", "bytes=1", "bytes=100", "bytes=500", "bytes=1500",
    f"bytes={WHOLE.levels[1].end}", f"bytes={WHOLE.levels[1].until + 1}", "bytes=1e9", "bpp=0.02",
]  # fmt: skip


def pieces(data: bytes, size: int, given: list[int] | None = None) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        if given is not None:
            given.append(min(at + size, len(data)))
        yield data[at : at + size]


def arrived(data: bytes, stop: str | None, size: int) -> Arrival:
    """At its end. Nothing that has been there goes away again."""
    arrival, levels = Arrival(pieces(data, size), stop), 0
    while not arrival.over:
        arrival.more()
        assert len(arrival.stream.levels) >= levels
        levels = len(arrival.stream.levels)
    return arrival


@pytest.mark.parametrize("size", [11, 300, 10**6])
@pytest.mark.parametrize("stop", STOPS)
def test_pieces_give_what_the_whole_file_gives(stop: str | None, size: int) -> None:
    bad = flip(FILE, WHOLE.levels[1].start + 9)
    for data in (FILE, FILE[:-9], FILE[: WHOLE.levels[1].start + 40], bad):
        cut, damage = stopped(data, stop)
        want, got = parse(cut), arrived(data, stop, size)
        assert got.damage == damage
        assert got.stream.levels == want.levels and got.stream.extras == want.extras
        assert got.stream.read_to == want.read_to


@pytest.mark.parametrize(
    ("stop", "last"),
    [
        ("bytes=100", 100),  # and what its checksum needs, see below
        (f"t={TS[0]}", WHOLE.levels[0].until),
        ("psnr=20", WHOLE.levels[0].until),
        ("bytes=500", 500),
    ],
)
def test_no_more_is_read_than_a_stop_point_needs(stop: str, last: int) -> None:
    given: list[int] = []
    arrival = Arrival(pieces(FILE, 16, given), stop)
    while not arrival.over:
        arrival.more()
    chunk = min(n for n in record_ends() if n >= last + (stop[0] != "b"))
    assert given[-1] <= chunk + 16


def record_ends() -> list[int]:
    """Where reading can pause."""
    return sorted({parse(FILE[:n]).read_to for n in range(WHOLE.header_size, len(FILE) + 1)})


def test_begin_waits_for_the_header_only() -> None:
    given: list[int] = []
    arrival = Arrival(pieces(FILE, 1, given))
    assert arrival.begin().header == HEADER and given[-1] == WHOLE.header_size
    assert arrival.begin(whole=True).levels == WHOLE.levels and arrival.over


@pytest.mark.parametrize("stop", [None, "t=500"])
@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "an empty file"), (FILE[:12], "inside its header"), (b"GIF89a" * 9, "not a .ddpm file")],
)
def test_no_header(data: bytes, message: str, stop: str | None) -> None:
    with pytest.raises(FormatError, match=message):
        Arrival(pieces(data, 5), stop).begin()


def test_no_stop_point() -> None:
    with pytest.raises(ValueError, match="not a stop point"):
        Arrival(FILE, "soon")
