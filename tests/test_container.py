"""The file as bytes: literal headers and records, cuts, damage, malformed files."""

from __future__ import annotations

import tracemalloc
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_codec.codec import container
from ddpm_codec.codec.container import (
    CHUNK,
    LevelRecord,
    Stream,
    Writer,
    cut,
    extra_size,
    level_size,
    parse,
)
from ddpm_codec.codec.header import (
    EFFORTS,
    MAGIC,
    MAX_HEADER,
    MODES,
    PATHS,
    Cursor,
    Header,
    crc16,
    varint,
    write_header,
)
from ddpm_codec.codec.limits import MEMORY_VARIABLE, check_size, memory_limit
from ddpm_codec.errors import FormatError, Incomplete, LimitError

HEADER = Header(768, 512, "RGB", "spectral", b"model!", 300, 5, 2560, tuple(range(32, -1, -2)))
PAPER = replace(HEADER, path="isotropic", finest=0, rungs=(1000, 990, 10))
GOOD = write_header(HEADER)
EXTRAS = {"icc": b"a profile", "exif": b"", "alpha": bytes(30), "residual": b"the last bits"}


def payload(n: int) -> bytes:
    return bytes(7 * i % 251 for i in range(n))


def make_file(header: Header = HEADER, lossless: bool = True, longest: int = CHUNK + 6) -> bytes:
    """A file of three levels, one of several chunks, with extras between and after them."""
    out = Writer(header)
    out.level(20.1, payload(5))
    out.extra("icc", EXTRAS["icc"])
    out.extra("exif", EXTRAS["exif"])
    out.level(25.6, payload(longest))
    out.extra("alpha", EXTRAS["alpha"])
    out.level(30.0, payload(1))
    if lossless:
        out.extra("residual", EXTRAS["residual"])
    return out.file()


FILE = make_file()
WHOLE = parse(FILE)


def flip(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def received(stream: Stream) -> int:
    """Number of bytes of payload in all levels."""
    return sum(len(level.payload) for level in stream.levels)


def check_true(stream: Stream, whole: Stream = WHOLE) -> None:
    """The records of a stream must be the beginning of the whole file's."""
    assert stream.header == whole.header
    assert all(level.complete for level in stream.levels[:-1])
    for got, true in zip(stream.levels, whole.levels[: len(stream.levels)], strict=True):
        assert (got.psnr, got.nbytes, got.start) == (true.psnr, true.nbytes, true.start)
        assert got.payload and true.payload.startswith(got.payload)
    assert stream.extras.items() <= whole.extras.items()


def contents(stream: Stream) -> tuple[object, ...]:
    """All attributes of a stream."""
    return (
        stream.header, stream.levels, stream.extras, stream.damage, stream.size,
        stream.header_size, stream.read_to,
    )  # fmt: skip


# --- Literal bytes -----------------------------------------------------------------------------


def test_a_header_byte_by_byte() -> None:
    # The flags are mode 1 (RGB), path 0 and even steps; 17 levels, from rung 32 down by 2.
    body = b"\x02\x09\x80\x06\x80\x04model!\xac\x02\x05\x80\x14\x11\x20\x02"
    assert write_header(HEADER) == b"\x8aDPM\r\n" + body + b"\x0c\x72"
    assert crc16(body) == 0x720C and crc16(b"123456789") == 0x31C3


def test_a_header_of_the_papers_timesteps_byte_by_byte() -> None:
    # Path 1, and uneven steps, which are all written.
    body = b"\x02\x05\x80\x06\x80\x04model!\xac\x02\x05\x00\x03\xe8\x07\x0a\xd4\x07"
    data = write_header(PAPER)
    assert data == b"\x8aDPM\r\n" + body + crc16(body).to_bytes(2, "little")
    assert parse(data).header == PAPER


def test_a_header_of_one_level_byte_by_byte() -> None:
    header = Header(1, 1, "L", "spectral", b"model!", 0, 9, 1, (0,))
    body = b"\x02\x08\x01\x01model!\x00\x09\x01\x01\x00"
    assert write_header(header)[6:-2] == body
    assert parse(write_header(header)).header == header


@pytest.mark.parametrize(("mode", "flags"), [("L", 8), ("RGB", 9), ("LA", 10), ("RGBA", 11)])
def test_modes(mode: str, flags: int) -> None:
    data = write_header(replace(HEADER, mode=mode))
    assert data[7] == flags and parse(data).header.mode == mode


def test_a_level_byte_by_byte() -> None:
    out = Writer(HEADER)
    out.level(25.6, b"abc")
    head = GOOD + b"\x06\x66"  # twice the length, quarters of a dB
    assert out.file() == head + b"abc" + crc16(head + b"abc").to_bytes(2, "little")
    assert len(out) == len(out.file())
    (level,) = parse(out.file()).levels
    assert level == LevelRecord(25.5, 3, len(head), bytearray(b"abc"))


def test_a_level_of_several_chunks_byte_by_byte() -> None:
    """Each checksum covers the file up to there, including earlier checksums."""
    data = payload(2 * CHUNK + 10)
    out = Writer(HEADER)
    out.level(0.0, data)
    want = GOOD + b"\x94\x20\x00"
    for part in (data[:CHUNK], data[CHUNK : 2 * CHUNK], data[2 * CHUNK :]):
        want += part
        want += crc16(want).to_bytes(2, "little")
    assert out.file() == want
    assert parse(want).levels[0].payload == data


@pytest.mark.parametrize(
    ("psnr", "unit"),
    [(-3.0, 0), (0.24, 0), (0.25, 1), (30.0, 120), (63.75, 255), (98.0, 255), (float("inf"), 255)],
)
def test_psnr_is_in_quarters_of_a_db(psnr: float, unit: int) -> None:
    out = Writer(HEADER)
    out.level(psnr, b"x")
    assert out.file()[len(GOOD) + 1] == unit
    assert parse(out.file()).levels[0].psnr == unit / 4


@pytest.mark.parametrize(("kind", "number"), [("icc", 0), ("exif", 1), ("alpha", 2)])
def test_an_extra_byte_by_byte(kind: str, number: int) -> None:
    out = Writer(HEADER)
    out.extra(kind, b"some")
    record = bytes([9, number]) + b"some"  # twice the length and 1
    assert out.file() == GOOD + record + zlib.crc32(record).to_bytes(4, "little")
    assert parse(out.file()).extras == {kind: b"some"}


@pytest.mark.parametrize("n", [1, 63, 64, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 9000])
def test_sizes_of_records(n: int) -> None:
    level, extra = Writer(HEADER), Writer(HEADER)
    level.level(20.0, bytes(n))
    extra.extra("icc", bytes(n))
    assert len(level) - len(GOOD) == level_size(n)
    assert len(extra) - len(GOOD) == extra_size(n)
    assert parse(level.file()).levels[0].end == len(level)


@pytest.mark.parametrize(
    ("number", "data"),
    [(0, b"\0"), (127, b"\x7f"), (128, b"\x80\x01"), (2**35 - 1, b"\xff\xff\xff\xff\x7f")],
)
def test_varint(number: int, data: bytes) -> None:
    assert varint(number) == data
    assert Cursor(data).varint() == number


@given(st.integers(0, 2**35 - 1))
def test_varint_round_trip(number: int) -> None:
    cursor = Cursor(varint(number) + b"rest")
    assert cursor.varint() == number
    assert cursor.take(4) == b"rest"


def test_varint_is_bounded() -> None:
    with pytest.raises(FormatError, match="too long"):
        Cursor(b"\x80" * 9 + b"\1").varint()
    with pytest.raises(Incomplete):
        Cursor(b"\x80\x80").varint()


def test_bits_come_high_first_and_the_cursor_stays() -> None:
    cursor = Cursor(b"\xa1\x80")
    assert cursor.bits(9).tolist() == [1, 0, 1, 0, 0, 0, 0, 1, 1]
    assert len(cursor.bits(99)) == 16 and cursor.take(2) == b"\xa1\x80"


# --- Whole files -------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [HEADER, PAPER])
def test_round_trip(header: Header) -> None:
    data = make_file(header)
    stream = parse(data)
    assert stream.header == header and stream.header_size == len(write_header(header))
    assert [bytes(v.payload) for v in stream.levels] == [payload(n) for n in (5, CHUNK + 6, 1)]
    assert [v.psnr for v in stream.levels] == [20.0, 25.5, 30.0]
    assert stream.extras == EXTRAS and stream.lossless
    assert stream.damage is None and stream.read_to == stream.size == len(data)


@given(
    st.builds(
        Header,
        width=st.integers(1, 2**35 - 1), height=st.integers(1, 2**35 - 1),
        mode=st.sampled_from(MODES), path=st.sampled_from(PATHS),
        model=st.binary(min_size=6, max_size=6), seed=st.integers(0, 2**32 - 1),
        effort=st.sampled_from(EFFORTS), finest=st.integers(1, 2**31 - 1),
        rungs=st.sets(st.integers(0, 200), min_size=1).map(
            lambda rungs: tuple(sorted(rungs, reverse=True))
        ),
    )
)  # fmt: skip
def test_headers_round_trip(header: Header) -> None:
    assert parse(write_header(header)).header == header


def test_levels_of_a_header() -> None:
    assert HEADER.levels == 17 and PAPER.levels == 3
    assert HEADER.snrs[-3:] == [640.0, 1280.0, 2560.0] and HEADER.snrs[0] == 2560 / 2**16
    assert replace(HEADER, rungs=(1, 0)).snrs == [2560 * 0.7071067811865476, 2560.0]
    assert HEADER.ts == sorted(HEADER.ts, reverse=True) and HEADER.ts[-1] == 3
    assert PAPER.ts == [1000, 990, 10]
    assert PAPER.snrs == sorted(PAPER.snrs) and PAPER.snrs[2] == pytest.approx(527, rel=1e-3)


def within(level: LevelRecord, offset: int) -> int:
    """Number of bytes of payload that lie before an offset in the file with their checksum."""
    whole, rest = divmod(max(0, offset - level.start), CHUNK + 2)
    return min(level.nbytes, whole * CHUNK + max(0, rest - 2))


def test_where_bytes_of_payload_lie() -> None:
    level = WHOLE.levels[1]
    assert level.offset(0) == level.start
    assert level.offset(1) == level.start + 3  # with its checksum
    assert level.offset(CHUNK) == level.start + CHUNK + 2
    assert level.offset(CHUNK + 1) == level.start + CHUNK + 5
    for n in range(level.nbytes + 1):
        assert within(level, level.offset(n)) == n
    assert level.offset(level.nbytes) == level.end


# --- Prefixes and cuts -------------------------------------------------------------------------


def test_every_prefix_parses_or_ends_in_its_header() -> None:
    before = (0, 0)
    for n in range(len(FILE)):
        if n < len(GOOD):
            with pytest.raises(FormatError):
                parse(FILE[:n])
            continue
        stream = parse(FILE[:n])
        assert stream.damage is None
        check_true(stream)
        now = received(stream), len(stream.extras)
        assert now[0] >= before[0] and now[1] >= before[1]
        before = now
    assert before == (received(WHOLE), 3)


def test_a_cut_is_short_enough_sound_and_holds_all_it_can() -> None:
    for n in range(len(GOOD), len(FILE) + 9):
        data = cut(FILE, n)
        stream = parse(data)
        assert len(data) <= n and stream.damage is None
        check_true(stream)
        prefix = parse(FILE[:n])
        assert received(stream) >= received(prefix) and stream.extras == prefix.extras
        assert received(stream) == sum(within(level, n) for level in WHOLE.levels)
    assert cut(FILE, len(FILE)) == FILE


def test_a_sealed_cut_byte_by_byte() -> None:
    level = WHOLE.levels[1]
    n = level.offset(CHUNK) + 5
    sealed = FILE[: n - 2] + crc16(FILE[: n - 2]).to_bytes(2, "little")
    assert cut(FILE, n) == sealed
    assert parse(sealed).levels[1].payload == payload(CHUNK + 3)
    # In a first chunk, the head is part of what is sealed.
    assert cut(FILE, level.start + 3)[:-2] == FILE[: level.start + 1]
    assert cut(FILE, level.start + 2) == FILE[: parse(FILE[: level.start]).read_to]


def test_a_cut_needs_the_header() -> None:
    for n in (0, 3, len(GOOD) - 1):
        with pytest.raises(FormatError, match=r"ends inside its header|empty file"):
            cut(FILE, n)
    with pytest.raises(FormatError, match="not a"):
        cut(b"GIF89a", 5)


def test_a_cut_of_a_cut_is_a_cut() -> None:
    for a in range(len(GOOD), len(FILE) + 9, 7):
        first = cut(FILE, a)
        for b in range(len(GOOD), len(FILE) + 9, 61):
            assert cut(first, b) == cut(FILE, min(a, b))


def test_a_cut_does_not_hide_damage() -> None:
    """A shortened chunk gets a new checksum only if the whole chunk was sound or sealed."""
    level = WHOLE.levels[1]
    bad = flip(FILE, level.start + 100)
    for n in (level.start + 150, level.offset(CHUNK) - 1, level.offset(CHUNK), len(FILE) - 1):
        stream = parse(cut(bad, n))
        check_true(stream)
        assert len(stream.levels) == 1
    assert parse(cut(bad, level.start + 150)).damage is None  # the part that is left is sound
    assert parse(cut(bad, len(FILE) - 1)).damage == parse(bad).damage
    sealed = cut(FILE, level.start + 150)
    check_true(parse(cut(flip(sealed, level.start + 100), level.start + 120)))
    # A chunk whose checksum has not arrived may be damaged.
    assert cut(FILE[: level.start + 150], level.start + 120) == FILE[: WHOLE.levels[1].start - 3]


# --- Streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [FILE, make_file(PAPER, lossless=False), FILE[:-5], cut(FILE, 700), flip(FILE, 300)],
    ids=["lossless", "paper", "prefix", "cut", "damaged"],
)
@given(st.lists(st.integers(0, len(FILE)), max_size=12))
def test_reading_in_pieces_gives_the_same(data: bytes, points: list[int]) -> None:
    stream = Stream()
    for n in sorted(min(n, len(data)) for n in points):
        stream.read(bytearray(data[:n]), last=False)
        assert stream.size == n
        if stream.started:
            check_true(stream, parse(data))
    stream.read(data)
    assert contents(stream) == contents(parse(data))


def test_a_seal_counts_at_the_end_only() -> None:
    """While more bytes may arrive, the last two are not taken for a checksum."""
    stream, sealed = Stream(), cut(FILE, 700)
    stream.read(sealed, last=False)
    assert received(stream) == 5
    stream.read(sealed)
    assert received(stream) > 500


def test_a_stream_without_its_header() -> None:
    stream = Stream()
    stream.read(GOOD[:9], last=False)
    assert not stream.started and stream.read_to == 0
    with pytest.raises(FormatError, match="ends inside its header"):
        _ = stream.header
    stream.read(GOOD, last=False)
    assert stream.started and stream.read_to == len(GOOD) and not stream.levels


@pytest.mark.parametrize("step", [1, 1000, 10**6])
def test_each_byte_is_hashed_a_few_times(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = 0

    def counting(data: bytes, start: int = 0) -> int:
        nonlocal hashed
        hashed += len(data)
        return crc16(data, start)

    out = Writer(replace(HEADER, rungs=tuple(range(60, 0, -1))))
    for n in range(60):
        out.level(20.0, payload(5 * n + 1))
    out.extra("icc", bytes(3000))
    monkeypatch.setattr(container, "crc16", counting)
    stream, data = Stream(), out.file()
    for n in range(0, len(data), step):
        stream.read(data[:n], last=False)
    stream.read(data)
    assert stream.read_to == len(data)
    assert hashed <= 3 * len(data)


# --- Malformed headers -------------------------------------------------------------------------


def sealed_header(body: bytes) -> bytes:
    """A header with the right checksum for any body."""
    return MAGIC + body + crc16(body).to_bytes(2, "little")


def header_of(
    flags: int = 1, size: bytes = b"\x08\x08", seed: bytes = b"\0", effort: int = 5,
    finest: bytes = b"\x40", levels: bytes = b"\x02\x07\x03",
) -> bytes:  # fmt: skip
    body = bytes([2, flags]) + size + b"model!" + seed + bytes([effort]) + finest + levels
    return sealed_header(body)


def test_a_header_of_parts() -> None:
    want = Header(8, 8, "RGB", "spectral", b"model!", 0, 5, 64, (7, 4))
    assert parse(header_of()).header == want
    # Even steps may also be written one by one.
    data = header_of(levels=b"\x03\x07\x03\x03")
    assert parse(data).header.rungs == parse(header_of(9, levels=b"\x03\x07\x03")).header.rungs


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a .ddpm file"),
        (b"x", "not a .ddpm file"),
        (GOOD.replace(b"\r\n", b"\n"), "not a .ddpm file"),
        (GOOD[:3], "ends inside its header"),
        (GOOD[:6], "ends inside its header"),
        (GOOD[:-1], "ends inside its header"),
        (GOOD[:6] + b"\x00" + GOOD[7:], "format version 0; this program reads version 2"),
        (GOOD[:6] + b"\x03" + GOOD[7:], "format version 3; this program reads version 2"),
        (GOOD[:6] + b"\x01", "made by ddpmc 0.1, whose format is no longer read"),
        (header_of(flags=0x21), "impossible values"),  # unknown flags
        (header_of(size=b"\0\x08"), "impossible values"),
        (header_of(size=b"\x08\0"), "impossible values"),
        (header_of(seed=b"\x80\x80\x80\x80\x10"), "impossible values"),  # 2^32
        (header_of(effort=0), "impossible values"),
        (header_of(effort=10), "impossible values"),
        (header_of(finest=b"\x80\x80\x80\x80\x08"), "impossible values"),  # 2^31
        (header_of(levels=b"\x00\x07"), "impossible number of levels"),
        (header_of(levels=b"\xe9\x07\x07"), "impossible number of levels"),  # 1001
        (header_of(levels=b"\x02\x07\x00"), "impossible values"),  # does not fall
        (header_of(levels=b"\x02\x07\x08"), "impossible values"),  # falls below rung 0
        (header_of(levels=b"\x02\xc9\x01\x01"), "impossible values"),  # rung 201
        (header_of(9, levels=b"\xe8\x07\xc8\x01\x01"), "impossible values"),  # 1000 even levels
        (header_of(finest=b"\0", levels=b"\x02\x07\x07"), "impossible values"),  # t=0
        (header_of(finest=b"\0", levels=b"\x02\xe9\x07\x07"), "impossible values"),  # t=1001
        (header_of(size=b"\x80\x80\x80\x80\x80\x01\x08"), "too long"),
    ],
)
def test_malformed_header(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(data)


@pytest.mark.parametrize("header", [HEADER, PAPER])
def test_every_flipped_bit_of_a_header_is_noticed(header: Header) -> None:
    data = write_header(header)
    for at in range(len(data)):
        for bit in range(8):
            with pytest.raises(FormatError):
                parse(flip(data, at, bit) + bytes(40))


# --- Damage ------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records before it are returned, and nothing else."""
    monkeypatch.setattr(container, "CHUNK", 32)
    data = make_file(longest=70)
    whole = parse(data)
    assert whole.levels[1].payload == payload(70)
    for at in range(len(GOOD), len(data)):
        for bit in range(8):
            stream = parse(flip(data, at, bit))
            check_true(stream, whole)
            assert stream.read_to <= at  # a larger length looks like a cut
            assert received(stream) == received(parse(data[: stream.read_to]))


@pytest.mark.parametrize("at", [0, 100, 1023])
def test_damage_in_a_chunk(at: int) -> None:
    out = Writer(HEADER)
    out.level(20.0, payload(3 * CHUNK))
    level = parse(out.file()).levels[0]
    good = level.offset(CHUNK)
    stream = parse(flip(out.file(), good + at))
    assert stream.damage == f"checksum mismatch after {good} good bytes"
    assert stream.levels[0].payload == payload(CHUNK)
    assert not stream.whole_levels


def records(header: Header = HEADER) -> list[bytes]:
    """A header and what follows it, each with its checksums."""
    out, ends = Writer(header), [0]
    steps = (
        lambda: None,
        lambda: out.level(20.0, payload(3)),
        lambda: out.extra("icc", b"colours"),
        lambda: out.level(20.0, payload(4)),
        lambda: out.level(21.0, payload(4)),
        lambda: out.extra("residual", b"rest"),
    )
    for step in steps:
        step()
        ends.append(len(out))
    return [out.file()[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def test_a_level_counts_in_its_place_only() -> None:
    """Whole records are left out, exchanged, repeated, moved, or taken from another file."""

    def levels(*parts: bytes) -> int:
        stream = parse(b"".join(parts))
        assert (stream.damage is None) == (stream.read_to == stream.size)
        return len(stream.levels)

    head, first, icc, second, third, rest = records()
    _, other, _, _, _, _ = records(replace(HEADER, seed=7))
    assert levels(head, first, icc, second, third, rest) == 3
    assert levels(head, second) == levels(head, second, first) == levels(head, other) == 0
    assert levels(head, first, first) == 1
    assert levels(head, first, icc, third) == levels(head, first, icc, third, second) == 1
    assert levels(head, first, icc, second, second, third) == 2
    # If an extra is missing or elsewhere, the records after it are out of place, too.
    assert levels(head, first, second) == 1
    assert levels(head, icc, first, second, third) == 0
    assert levels(head, first, icc, icc, second) == 1


def test_records_where_none_belong() -> None:
    def damage(*records: tuple[str, bytes], header: Header = HEADER) -> str | None:
        out = Writer(header)
        good = 0
        for kind, data in records:
            good = len(out)
            out.level(20.0, data) if kind == "level" else out.extra(kind, data)
        stream = parse(out.file())
        assert stream.damage is None or stream.damage.endswith(f" after {good} good bytes")
        return stream.damage and stream.damage.removesuffix(f" after {good} good bytes")

    two = replace(HEADER, rungs=(2, 0))
    level, icc, rest = ("level", b"a"), ("icc", b"b"), ("residual", b"c")
    assert damage(level, icc, level, rest, header=two) is None
    assert damage(icc, level, icc) == "a record where none belongs"
    assert damage(level, rest, icc) == "a record where none belongs"
    assert damage(level, rest, rest) == "a record where none belongs"
    assert damage(level, rest, level) == "a level where none belongs"
    assert damage(level, level, level, header=two) == "a level where none belongs"
    assert damage(level, ("level", b"")) == "a level where none belongs"


@pytest.mark.parametrize("order", [("icc", "alpha", "exif"), ("exif", "icc", "alpha")])
@pytest.mark.parametrize("places", [(0, 0, 0), (0, 1, 2), (1, 1, 3), (3, 3, 3)])
def test_extras_in_any_place(order: tuple[str, ...], places: tuple[int, ...]) -> None:
    out = Writer(HEADER)
    for i in range(4):
        for kind, place in zip(order, places, strict=True):
            if place == i:
                out.extra(kind, EXTRAS[kind])
        out.level(20.0 + i, payload(i + 1))
    stream = parse(out.file())
    assert stream.damage is None and len(stream.levels) == 4
    assert stream.extras == {kind: EXTRAS[kind] for kind in order}


def test_an_unknown_extra() -> None:
    record = b"\x05\x04ab"
    stream = parse(GOOD + record + zlib.crc32(record).to_bytes(4, "little"))
    assert stream.damage == f"checksum mismatch after {len(GOOD)} good bytes"
    assert not stream.extras


def test_bytes_after_a_whole_lossless_file() -> None:
    """They are ignored, since nothing may follow the last record."""
    data = make_file(replace(HEADER, rungs=(2, 1, 0)))
    for tail in (b"\n", bytes(99), data):
        stream = parse(data + tail)
        assert stream.damage is None and stream.ended and stream.lossless
        assert stream.read_to == len(data) < stream.size


def test_the_longest_header() -> None:
    rungs = (*range(1000, 2, -1), 1)
    header = Header(2**34, 2**34, "RGB", "isotropic", b"model!", 2**32 - 1, 9, 0, rungs)
    assert len(write_header(header)) < MAX_HEADER


def test_bytes_after_the_end() -> None:
    stream = parse(FILE + b"tail")
    assert stream.extras == EXTRAS and len(stream.levels) == 3
    assert stream.read_to == len(FILE) < stream.size
    assert stream.damage == f"a level where none belongs after {len(FILE)} good bytes"


@given(st.binary(max_size=80))
def test_any_bytes_after_a_header(tail: bytes) -> None:
    stream = parse(GOOD + tail)
    assert all(level.payload in tail for level in stream.levels)
    assert len(shorter := cut(GOOD + tail, len(GOOD) + 40)) <= len(GOOD) + 40
    assert stream.damage or parse(shorter).damage is None


# --- Memory ------------------------------------------------------------------------------------


def test_claimed_sizes_are_not_allocated() -> None:
    huge = varint((1 << 34) - 2)
    claims = [
        write_header(replace(HEADER, width=2**34, height=2**34)),
        GOOD + huge + b"\x20" + bytes(99),  # a level
        GOOD + bytes([huge[0] | 1]) + huge[1:] + b"\0" + bytes(99),  # an extra
    ]
    tracemalloc.start()
    try:
        for data in claims:
            stream = parse(data)
            assert not stream.levels and not stream.extras and stream.damage is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_large_pictures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)
    assert memory_limit() == 4e9
    check_size((5000, 6800))
    with pytest.raises(LimitError, match=r"7000x5000 pixels take about 4.1 GB, more than .* 4.0"):
        check_size((7000, 5000))
    monkeypatch.setenv(MEMORY_VARIABLE, "5e9")
    check_size((7000, 5000))
    monkeypatch.setenv(MEMORY_VARIABLE, "")
    assert memory_limit() == 4e9


@pytest.mark.parametrize("text", ["many", "-1", "nan", "4 GB"])
def test_a_limit_that_is_no_number_of_bytes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY_VARIABLE, text)
    with pytest.raises(LimitError, match=f"{MEMORY_VARIABLE}={text}: not a number of bytes"):
        check_size((1, 1))
