"""The file's bytes: literal headers, numbers, and everything that may be wrong with a file."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_codec.codec import container as bitstream
from ddpm_codec.codec.container import (
    GROUPS,
    LIMIT_VARIABLE,
    Cut,
    Header,
    Incomplete,
    Level,
    Reader,
    Stream,
    crc16,
    parse,
    parse_stop,
    read_blob,
    read_level,
    safe_points,
    stop_offset,
    truncate,
    varint,
    write_blob,
    write_header,
    write_level,
)
from ddpm_codec.errors import FormatError, LimitError

HEADER = Header(768, 512, "RGB", "nested", "spectral", b"model!", 300, 3, 2, 2560)
GAUSSIAN = replace(
    HEADER, rec="gaussian", path="isotropic", levels=2, ratio=2, finest=1, timesteps=(1000, 10)
)


def make_level(words: int, psnr: float = 30.0, cuts: tuple[tuple[int, int], ...] = ()) -> Level:
    payload = bytes(7 * i % 251 for i in range(4 * words))
    marks = [Cut(g, 4 * w, crc16(payload[: 4 * w])) for g, w in (*cuts, (GROUPS, words))]
    return Level(psnr, (64, 10, 0), 0xBEEF, marks, payload)


LEVELS = [
    make_level(5, 20.1),
    make_level(40, 25.6, ((0, 4), (3, 12), (9, 30))),
    make_level(0, 25.6),
]


def make_file(header: Header = HEADER, residual: bytes | None = None) -> bytes:
    data = write_header(header)
    for level in LEVELS:
        data += write_level(level, before=crc16(data))
    return data if residual is None else data + write_blob(residual)


def flip(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


# --- Literal bytes -----------------------------------------------------------------------------


def test_a_header_byte_by_byte() -> None:
    body = b"\x01\x01\x80\x06\x80\x04model!\xac\x02\x03\x02\x80\x14"
    assert write_header(HEADER) == b"\x8aDPM\r\n" + body + b"\xe5\x9e"
    assert len(write_header(HEADER)) == 26


def test_a_gaussian_header_byte_by_byte() -> None:
    # The flags say mode 1 (RGB), rec 1 and path 1; timesteps as differences, from 1001.
    body = b"\x01\x0d\x80\x06\x80\x04model!\xac\x02\x02\x01\xde\x07"
    data = write_header(GAUSSIAN)
    assert data[:-2] == b"\x8aDPM\r\n" + body
    assert data[-2:] == crc16(body).to_bytes(2, "little")
    assert parse(data).header == GAUSSIAN


def test_extras_follow_the_header() -> None:
    header = replace(HEADER, mode="RGBA", icc=b"icc", exif=b"exif", alpha=b"alpha")
    data = write_header(header)
    assert data[7] == 0b110011
    assert data[26:] == b"".join(map(write_blob, (b"icc", b"exif", b"alpha")))
    assert data[26:33] == b"\x03" + zlib.crc32(b"icc").to_bytes(4, "little") + b"ic"
    assert parse(data).header == header


def test_a_level_byte_by_byte() -> None:
    level = make_level(2, 25.6, ((7, 1),))
    head = b"\x05\x66\x40\x0a\x00\xef\xbe\x01\x07\x01"
    head += crc16(level.payload[:4]).to_bytes(2, "little")
    head += crc16(level.payload).to_bytes(2, "little")
    assert write_level(level) == head + crc16(head).to_bytes(2, "little") + level.payload


def test_a_short_level_byte_by_byte() -> None:
    level = make_level(2, 25.6)
    head = b"\x04\x66\x40\x0a\x00\xef\xbe" + crc16(level.payload).to_bytes(2, "little")
    nested = head + crc16(head).to_bytes(2, "little") + level.payload
    head = b"\x10\x66"  # one checksum, and bytes instead of words
    gaussian = head + crc16(head + level.payload).to_bytes(2, "little") + level.payload
    for rec, data in (("nested", nested), ("gaussian", gaussian)):
        assert write_level(level, rec) == data
        got = read_level(Reader(data), rec)
        assert (got.nbytes, got.psnr, got.payload, got.received()) == (8, 25.5, level.payload, 1)
        for at in range(len(data)):
            try:
                got = read_level(Reader(flip(data, at)), rec)
            except (FormatError, Incomplete):
                continue
            assert got.received() == 0


@pytest.mark.parametrize(
    ("number", "data"),
    [(0, b"\0"), (127, b"\x7f"), (128, b"\x80\x01"), (2**35 - 1, b"\xff\xff\xff\xff\x7f")],
)
def test_varint(number: int, data: bytes) -> None:
    assert varint(number) == data
    assert Reader(data).varint() == number


@given(st.integers(0, 2**35 - 1))
def test_varint_round_trip(number: int) -> None:
    reader = Reader(varint(number) + b"rest")
    assert reader.varint() == number
    assert reader.take(4) == b"rest"


def test_varint_is_bounded() -> None:
    with pytest.raises(FormatError, match="too long"):
        Reader(b"\x80" * 9 + b"\1").varint()
    with pytest.raises(Incomplete):
        Reader(b"\x80\x80").varint()


def test_blob() -> None:
    assert read_blob(Reader(write_blob(b"some bytes"))) == b"some bytes"
    with pytest.raises(FormatError, match="checksum"):
        read_blob(Reader(flip(write_blob(b"some bytes"), 8)))
    with pytest.raises(Incomplete):  # without reserving what it promises
        read_blob(Reader(varint(2**34) + bytes(9)))


# --- Whole files -------------------------------------------------------------------------------


def test_round_trip() -> None:
    stream = parse(make_file(residual=b"residual"))
    assert stream.header == HEADER
    assert stream.residual == b"residual" and stream.lossless
    assert stream.damage is None
    for got, written in zip(stream.levels, LEVELS, strict=True):
        assert got.psnr == written.psnr // 0.25 * 0.25
        assert (got.last, got.agreed, got.cuts) == (written.last, written.agreed, written.cuts)
        assert got.payload == written.payload and got.received() == len(got.cuts)


def test_every_prefix_parses_or_ends_in_its_header() -> None:
    data = make_file(replace(HEADER, mode="LA", alpha=b"alpha"), residual=b"residual")
    head = len(write_header(parse(data).header))
    before = (-1, -1)
    for n in range(len(data)):
        if n < head:
            with pytest.raises(FormatError):
                parse(data[:n])
            continue
        stream = parse(data[:n])
        assert stream.damage is None and stream.residual is None
        received = (len(stream.levels), sum(v.received() for v in stream.levels))
        assert received >= before
        before = received
    assert before == (3, 6)


def test_info() -> None:
    about = bitstream.info(make_file())
    assert (about["width"], about["height"], about["mode"]) == (768, 512, "RGB")
    assert about["complete"] and not about["lossless"] and about["model"] == b"model!".hex()
    assert [v["bytes"] for v in about["levels"]] == [v.end for v in parse(make_file()).levels]
    assert [v["snr"] for v in about["levels"]] == [160, 640, 2560]


# --- Malformed headers -------------------------------------------------------------------------

GOOD = write_header(HEADER)


def sealed(body: bytes) -> bytes:
    """A header whose checksum is right, whatever it says."""
    return bitstream.MAGIC + body + crc16(body).to_bytes(2, "little")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a .ddpm file"),
        (GOOD.replace(b"\r\n", b"\n"), "not a .ddpm file"),
        (GOOD[:3], "not a .ddpm file"),
        (GOOD[:6], "ends inside its header"),
        (GOOD[:-1], "ends inside its header"),
        (GOOD[:6] + b"\x02" + GOOD[7:], "format version 2; this program reads version 1"),
        (sealed(b"\x01\x81\x08\x08model!\0\x03\x02\x40"), "impossible values"),  # unknown flags
        (sealed(b"\x01\x01\x00\x08model!\0\x03\x02\x40"), "impossible values"),  # no width
        (sealed(b"\x01\x01\x08\x08model!\0\x00\x02\x40"), "impossible values"),  # no levels
        (sealed(b"\x01\x01\x08\x08model!\0\x03\x01\x40"), "impossible values"),  # ratio 1
        (sealed(b"\x01\x01\x08\x08model!\0\x03\x02\x00"), "impossible values"),  # SNR 0
        (sealed(b"\x01\x01\x08\x08model!\0\x40\x02\x40"), "impossible levels"),  # 2^64 cells
        (sealed(b"\x01\x01\x08\x08model!\0\xff\x7f\x02\x40"), "damaged header"),
        (sealed(b"\x01\x0d\x08\x08model!\0\x02\x01\x00"), "impossible timesteps"),
        (sealed(b"\x01\x0d\x08\x08model!\0\x01\xe9\x07"), "impossible timesteps"),
        (sealed(b"\x01\x01\x80\x80\x80\x80\x80\x01"), "too long"),
    ],
)
def test_malformed_header(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(data)


@pytest.mark.parametrize("header", [HEADER, GAUSSIAN])
def test_every_flipped_bit_of_a_header_is_noticed(header: Header) -> None:
    data = write_header(header)
    for at in range(len(data)):
        for bit in range(8):
            with pytest.raises(FormatError):
                parse(flip(data, at, bit))


def test_damaged_extras() -> None:
    data = write_header(replace(HEADER, mode="RGBA", icc=b"profile", alpha=b"alpha"))
    for at in (len(GOOD) + 1, len(GOOD) + 7, len(data) - 1):
        with pytest.raises(FormatError):
            parse(flip(data, at))


def test_absurd_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    big = write_header(replace(HEADER, width=2**31, height=2**31))
    with pytest.raises(LimitError, match=LIMIT_VARIABLE):
        parse(big)
    with pytest.raises(LimitError, match="200,000,000"):
        parse(write_header(replace(HEADER, width=200_000_001, height=1)))
    assert parse(write_header(replace(HEADER, width=200_000_000, height=1)))
    monkeypatch.setenv(LIMIT_VARIABLE, "1000")
    with pytest.raises(LimitError, match="768x512"):
        parse(GOOD)


# --- Damaged levels ----------------------------------------------------------------------------


def starts() -> list[int]:
    """Where the heads of the levels begin, and where the last level ends."""
    ends = [v.end for v in parse(make_file()).levels]
    return [len(GOOD), *ends]


@pytest.mark.parametrize("i", [0, 1, 2])
def test_damage_in_a_levels_head(i: int) -> None:
    data = make_file(residual=b"residual")
    start = parse(data).levels[i].start
    for at in range(starts()[i], start):
        stream = parse(flip(data, at))
        assert len(stream.levels) == i and stream.residual is None
        # A length that grew may promise more than there is, which is no different from a cut.
        assert stream.levels_end == starts()[i]
    assert parse(flip(data, start - 1)).damage == (
        f"damaged level (checksum mismatch) after {starts()[i]} good bytes"
    )


@pytest.mark.parametrize(("word", "received"), [(0, 0), (3, 0), (4, 1), (12, 2), (39, 3)])
def test_damage_in_a_levels_payload(word: int, received: int) -> None:
    data = make_file(residual=b"residual")
    stream = parse(flip(data, parse(data).levels[1].start + 4 * word + 2, 5))
    assert stream.damage == f"checksum mismatch after {starts()[1]} good bytes"
    assert len(stream.levels) == 2 and stream.levels[1].received() == received
    assert len(bitstream.info(data)["levels"]) == 3


@pytest.mark.parametrize("header", [HEADER, GAUSSIAN])
def test_a_level_counts_in_its_place_only(header: Header) -> None:
    """Whole records, left out, exchanged, repeated, or another file's."""

    def records(header: Header) -> list[bytes]:
        out = [write_header(header)]
        for psnr in (20.0, 21.0):
            level = make_level(3, psnr)
            out.append(write_level(level, header.rec, crc16(b"".join(out))))
        return out

    def read(*parts: bytes) -> int:
        return len(bitstream.info(b"".join(parts))["levels"])

    head, first, second = records(header)
    _, other, _ = records(replace(header, seed=7))
    assert read(head, first, second) == 2 and len(first) == len(other)
    assert read(head, second) == read(head, second, first) == read(head, other) == 0
    assert read(head, first, first) == 1


def test_impossible_levels() -> None:
    for level in (
        replace(LEVELS[0], last=(65, 0, 0)),
        replace(LEVELS[0], cuts=[Cut(GROUPS + 1, 4, 0), *LEVELS[0].cuts]),
        replace(LEVELS[0], cuts=[Cut(3, 24, 0), *LEVELS[0].cuts]),
        replace(LEVELS[0], cuts=[Cut(1, 4, 0)] * 80 + LEVELS[0].cuts),
    ):
        stream = parse(GOOD + write_level(level, before=crc16(GOOD)))
        assert not stream.levels and stream.damage is not None
        assert stream.damage.startswith("damaged level")


def test_damage_in_the_residual() -> None:
    data = make_file(residual=b"residual")
    stream = parse(flip(data, len(data) - 3))
    assert stream.residual is None and len(stream.levels) == 3
    assert stream.damage == f"checksum mismatch after {starts()[3]} good bytes"


def test_bytes_after_the_end() -> None:
    stream = parse(make_file(residual=b"residual") + b"tail")
    assert stream.residual == b"residual"
    assert stream.damage == "4 bytes after the end of the file"
    assert parse(make_file() + bytes(5) + b"tail").damage == "4 bytes after the end of the file"


# --- Stop points -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop"),
    [("t=500", ("t", 500.0)), ("500", ("t", 500.0)), (500, ("t", 500.0)),
     ("bpp=0.25", ("bpp", 0.25)), ("bytes=4e3", ("bytes", 4000.0)), ("psnr=32", ("psnr", 32.0))],
)  # fmt: skip
def test_parse_stop(text: str | int, stop: tuple[str, float]) -> None:
    assert parse_stop(text) == stop


@pytest.mark.parametrize("text", ["", "t=", "x=3", "bpp=nan", "bpp=-1", "bytes=inf", "500t"])
def test_parse_stop_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="not a stop point"):
        parse_stop(text)


def offset(stop: str, data: bytes) -> int:
    return stop_offset(data, parse(data), stop)


def test_safe_points_hold_something_new() -> None:
    data = make_file()
    points = [(i, cut.groups) for _, i, cut in safe_points(data, parse(data)) if cut]
    assert points == [(0, GROUPS), (1, 3), (1, 9), (1, GROUPS), (2, GROUPS)]


def test_stop_offset() -> None:
    data = make_file(residual=b"residual")
    begin, *ends = starts()
    inside = parse(data).levels[1].start + 4 * 12
    assert offset(f"bytes={ends[0]}", data) == ends[0]
    assert offset(f"bytes={ends[0] - 1}", data) == begin
    assert offset(f"bytes={inside}", data) == inside
    assert offset(f"bytes={inside + 3}", data) == inside
    assert offset(f"bpp={8 * inside / (768 * 512)}", data) == inside
    assert offset("bytes=1", data) == begin  # never less than a file
    assert offset("bytes=1e9", data) == len(data)
    assert offset("psnr=20", data) == ends[0]
    assert offset("psnr=20.25", data) == ends[1]
    assert offset("psnr=99", data) == len(data)
    ts = HEADER.ts
    assert [offset(f"t={t}", data) for t in ts] == ends
    assert offset(f"t={ts[0] + 1}", data) == begin
    assert offset(f"t={ts[1] + 1}", data) == ends[0]
    assert offset("t=0", data) == len(data)


def test_truncate() -> None:
    data = make_file()
    assert truncate(data, nbytes=50) == truncate(data, stop_at="bytes=50")
    assert truncate(data, bpp=0.002) == truncate(data, stop_at="bpp=0.002")
    for arguments in ({}, {"nbytes": 3, "bpp": 1.0}, {"bpp": 1.0, "stop_at": "t=3"}):
        with pytest.raises(ValueError, match="exactly one"):
            truncate(data, **arguments)  # type: ignore[arg-type]
    with pytest.raises(FormatError):
        truncate(b"GIF89a", nbytes=3)


def test_the_sum_of_truncations_is_a_truncation() -> None:
    data = make_file(residual=b"residual")
    for a in range(0, len(data) + 9, 7):
        for b in range(0, len(data) + 9, 7):
            assert truncate(truncate(data, nbytes=a), nbytes=b) == truncate(data, nbytes=min(a, b))


def test_stream_of_a_lone_header() -> None:
    stream = parse(GOOD)
    assert stream == Stream(HEADER, [], None, 26, None, 26, 26)
