"""Stop points in a file, and its description."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_container import EXTRAS, FILE, HEADER, WHOLE, flip, make_file, payload, within

from ddpm_codec.codec import container
from ddpm_codec.codec.container import CHUNK, Writer, cut, parse
from ddpm_codec.codec.header import Header, crc16, write_header
from ddpm_codec.codec.stops import info, parse_stop, reaches, stop_offset, stopped, truncate
from ddpm_codec.errors import CutWarning, FormatError, LimitError

PIXELS = 768 * 512
SHORT = replace(HEADER, rungs=(20, 10, 0))  # as many levels as make_file() writes


@pytest.mark.parametrize(
    ("text", "stop"),
    [("t=500", ("t", 500.0)), ("500", ("t", 500.0)), (500, ("t", 500.0)),
     ("bpp=0.25", ("bpp", 0.25)), ("bytes=4e3", ("bytes", 4000.0)), ("psnr=32", ("psnr", 32.0))],
)  # fmt: skip
def test_parse_stop(text: str | int, stop: tuple[str, float]) -> None:
    assert parse_stop(text) == stop


@pytest.mark.parametrize(
    "text", ["", "t=", "x=3", "bpp=nan", "bpp=-1", "bytes=inf", "500t", -1, "t=1001", 1e9]
)
def test_parse_stop_refuses(text: str | int) -> None:
    with pytest.raises(ValueError, match="not a stop point"):
        parse_stop(text)


def offset(stop: str | int, data: bytes = FILE) -> int:
    return stop_offset(parse(data), stop)


def test_a_stop_at_a_number_of_bytes() -> None:
    assert offset("bytes=500") == 500
    assert offset("bytes=500.9") == 500
    assert offset(f"bpp={8 * 500 / PIXELS}") == 500
    assert offset("bytes=1") == offset("bpp=0") == WHOLE.header_size  # never less than the header
    assert offset("bytes=1e9") == offset("bpp=1e9") == offset("bpp=1e308") == len(FILE)


def test_a_stop_at_a_quality() -> None:
    ends = [level.until for level in WHOLE.levels]
    assert offset("psnr=20") == ends[0]
    assert offset("psnr=20.25") == offset("psnr=25.5") == ends[1]  # rounded down in the file
    assert offset("psnr=25.6") == ends[2]
    assert offset("psnr=99") == len(FILE)


def test_a_stop_at_a_timestep() -> None:
    data = make_file(SHORT)
    begin, ts = len(write_header(SHORT)), SHORT.ts
    ends = [level.until for level in parse(data).levels]
    assert [offset(f"t={t}", data) for t in ts] == ends
    assert offset(ts[1], data) == offset(str(ts[1]), data) == ends[1]
    assert offset(f"t={ts[0] + 1}", data) == begin
    assert offset(f"t={ts[1] + 1}", data) == ends[0]
    assert offset(f"t={ts[2] - 1}", data) == ends[2]  # all levels, without the lossless layer
    assert offset("t=0", data) == len(data)


def test_a_stop_at_a_timestep_that_the_file_does_not_reach() -> None:
    """The offset is the end of the file."""
    ends, ts = [level.until for level in WHOLE.levels], HEADER.ts
    assert offset(f"t={ts[2]}") == ends[2]
    assert offset(f"t={ts[3]}") == ends[2]
    assert offset(f"t={ts[-1]}") == len(FILE)
    for n in (WHOLE.levels[1].end - 3, len(FILE) - 1):
        assert offset(f"t={ts[2]}", FILE[:n]) == min(ends[2], n)


def test_reaches() -> None:
    data = make_file(SHORT, lossless=False)
    whole, part = parse(data), parse(data[: parse(data).levels[1].end - 1])
    for stop, of_whole, of_part in (
        ("t=1000", True, True), (f"t={SHORT.ts[0]}", True, True), (f"t={SHORT.ts[1]}", True, False),
        ("t=1", True, False), ("t=0", True, True), ("psnr=20", True, True),
        ("psnr=25.5", True, False), ("psnr=31", False, False), ("bytes=9e9", True, True),
        ("bpp=40", True, True),
    ):  # fmt: skip
        assert (reaches(whole, stop), reaches(part, stop)) == (of_whole, of_part), stop


def test_a_lossless_file_reaches_any_quality() -> None:
    data = make_file(SHORT)
    assert reaches(parse(data), "psnr=60") and not reaches(parse(data[:-1]), "psnr=60")


def test_truncate() -> None:
    assert truncate(FILE, bytes=300) == truncate(FILE, stop_at="bytes=300") == cut(FILE, 300)
    assert truncate(FILE, bpp=0.02) == truncate(FILE, stop_at="bpp=0.02")
    assert len(truncate(FILE, bpp=0.02)) == int(0.02 * PIXELS / 8)
    assert truncate(FILE, stop_at=HEADER.ts[0]) == FILE[: WHOLE.levels[0].until]
    assert truncate(FILE, bytes=10**9) == FILE
    for arguments in ({}, {"bytes": 3, "bpp": 1.0}, {"bpp": 1.0, "stop_at": "t=3"}):
        with pytest.raises(ValueError, match="exactly one"):
            truncate(FILE, **arguments)  # type: ignore[arg-type]
    with pytest.raises(FormatError):
        truncate(b"GIF89a", bytes=3)


def test_a_truncation_that_cannot_be() -> None:
    """An error names the fewest bytes possible; a quality or timestep out of reach is warned of."""
    head = WHOLE.header_size
    for stop in ({"bytes": head - 1}, {"bpp": 8 * (head - 0.5) / PIXELS}, {"stop_at": "bytes=3"}):
        with pytest.raises(LimitError, match=f"too few: the header alone takes {head}"):
            truncate(FILE, **stop)  # type: ignore[arg-type]
    assert len(truncate(FILE, bytes=head)) == head
    data = make_file(lossless=False)
    with pytest.warns(CutWarning, match="the file ends before psnr=60"):
        assert truncate(data, stop_at="psnr=60") == data
    with pytest.warns(CutWarning, match=f"the file ends before t={HEADER.ts[3]}"):
        truncate(data, stop_at=f"t={HEADER.ts[3]}")


def test_damage_around_a_stop() -> None:
    """Damage before a stop point counts, damage behind it does not."""
    before, level = WHOLE.levels[:2]
    bad = bytearray(FILE)
    bad[level.start + 5] ^= 1
    ok = f"bytes={before.until}"
    assert stopped(FILE, None) == (FILE, None)
    assert stopped(FILE, ok) == stopped(bytes(bad), ok) == (cut(FILE, before.until), None)
    damage = stopped(bytes(bad), None)[1]
    assert damage and stopped(bytes(bad), f"bytes={level.start + 20}")[1] == damage


def test_a_number_of_bytes_is_used_up() -> None:
    """Inside a level all bytes are used, except two that no payload is left for."""
    level = WHOLE.levels[1]
    for n in range(level.start + 3, level.end):
        data = truncate(FILE, bytes=n)
        assert n - 2 <= len(data) <= n
        assert len(parse(data).levels[1].payload) == within(level, n)
    n = level.start + 50
    sealed = FILE[: n - 2] + crc16(FILE[: n - 2]).to_bytes(2, "little")
    assert truncate(FILE, bytes=n) == sealed


def test_truncating_twice_is_truncating_once() -> None:
    head = WHOLE.header_size
    for a in range(head, len(FILE) + 9, 31):
        first = truncate(FILE, bytes=a)
        for b in range(head, len(FILE) + 9, 37):
            assert truncate(first, bytes=b) == truncate(FILE, bytes=min(a, b))


def test_damage_survives_truncation() -> None:
    level = WHOLE.levels[1]
    bad = flip(FILE, level.start + 9)
    assert parse(truncate(bad, bytes=len(FILE) - 1)).damage == parse(bad).damage is not None
    for n in range(level.start, level.offset(CHUNK), 57):  # the part that is left is sound
        assert (
            truncate(bad, bytes=n)
            == truncate(FILE, stop_at=f"t={HEADER.ts[0]}")
            + (FILE[WHOLE.levels[0].until : level.start - 3])
        )


# --- info --------------------------------------------------------------------------------------


def test_info() -> None:
    about = info(FILE)
    levels = about.pop("levels")
    assert about == {
        "width": 768, "height": 512, "mode": "RGB", "path": "spectral", "tune": [0, 0, 0],
        "steps": 17, "effort": 5,
        "model": b"model!".hex(), "seed": 300, "lossless": True, "complete": False, "damage": None,
        "bytes": len(FILE), "bpp": 8 * len(FILE) / PIXELS,
        "extras": {kind: len(data) for kind, data in EXTRAS.items()},
    }  # fmt: skip
    assert levels == [
        {"t": t, "snr": snr, "bytes": end, "bpp": 8 * end / PIXELS, "psnr": psnr}
        for t, snr, psnr, end in zip(
            HEADER.ts, HEADER.snrs, (20.0, 25.5, 30.0), (v.end for v in WHOLE.levels), strict=False
        )
    ]


def test_info_counts_whole_levels() -> None:
    data = make_file(SHORT, lossless=False)
    about = info(data)
    assert about["complete"] and not about["lossless"] and len(about["levels"]) == 3
    about = info(data[:-1])
    assert not about["complete"] and len(about["levels"]) == 2
    about = info(cut(data, parse(data).levels[1].start + 99))
    assert len(about["levels"]) == 1 and about["damage"] is None
    assert info(flip(data, len(data) - 3))["damage"].startswith("checksum mismatch after ")
    assert info(write_header(SHORT))["levels"] == []


def test_info_of_the_papers_timesteps() -> None:
    header = Header(32, 32, "RGB", "isotropic", b"model!", 0, 8, 0, (1000, 500, 1))
    about = info(make_file(header))
    assert [v["t"] for v in about["levels"]] == [1000, 500, 1] and about["complete"]


def test_info_hashes_each_byte_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a thousand levels."""
    header = replace(HEADER, path="isotropic", finest=0, rungs=tuple(range(1000, 0, -1)))
    out, hashed = Writer(header), 0
    for _ in range(1000):
        out.level(20.0, payload(9))

    def counting(data: bytes, start: int = 0) -> int:
        nonlocal hashed
        hashed += len(data)
        return crc16(data, start)

    monkeypatch.setattr(container, "crc16", counting)
    assert len(info(out.file())["levels"]) == 1000
    assert hashed <= 3 * len(out)
