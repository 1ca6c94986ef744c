"""Nested quantization: the channel it simulates, what it costs, and what both ends agree upon."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ddpm_codec.codec import codec, nested
from ddpm_codec.codec import container as bitstream
from ddpm_codec.codec.contexts import Setup
from ddpm_codec.codec.nested import Cells
from ddpm_codec.errors import AgreementError, ModelError
from ddpm_codec.network import tables
from ddpm_codec.network.modelfile import load_model
from ddpm_codec.network.tables import Ladder, laplace_cdf, laplace_tables
from ddpm_codec.rec import agree as entropy
from ddpm_codec.rec.agree import Drawer, Reader, Writer, agree, escaped_symbols

LADDERS = [Ladder(), Ladder(5, 3, 2000)]
SEED = 11
N = 24 * 25  # blocks; times 192 bands that is 115,200 draws
PICTURES = Path(__file__).parents[1] / "benchmarks" / "pictures"

ladders = pytest.mark.parametrize("ladder", LADDERS, ids=lambda x: f"ratio{x.ratio}")


def laplace(seed: int, n: int = N) -> NDArray[np.float32]:
    """(192, n) coefficients, of scales from a twentieth of the finest cell to twice the first."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(0.003, 40, 192)[:, None]
    return (scale * rng.laplace(size=(192, n))).astype(np.float32)


def cells_at(level: int, truth: NDArray[np.int32], ladder: Ladder) -> Cells:
    cell = truth // ladder.ratio ** (ladder.levels - 1 - level)
    return Cells(cell, np.full(truth.shape, level, np.int8))


def kolmogorov_smirnov(u: NDArray[np.float64]) -> float:
    """sqrt(N) times the distance to the uniform law on 0 .. 1: 1.95 at p = 0.001."""
    x = np.sort(u.ravel())
    i = np.arange(len(x))
    return math.sqrt(len(x)) * float(max((x - i / len(x)).max(), ((i + 1) / len(x) - x).max()))


# --- The channel -------------------------------------------------------------------------------


def test_dither_is_what_it_was() -> None:
    """A file is worth nothing to a decoder with another dither."""
    first = nested.dither(7, 3, 4, Ladder())
    assert first.tolist() == [2934258, 7129009, 4165023, 6353642]
    assert nested.dither(7, 3, 2, Ladder()).tolist() == first[:2].tolist()
    assert nested.dither(0, 0, 3, Ladder()).tolist() == [14997659, 16038500, 11060658]
    assert nested.dither(7, 3, 4, Ladder(4, 3, 1000)).tolist() == [312818, 444337, 822687, 1176298]
    assert nested.dither(2**32 - 1, 191, 5, Ladder()).shape == (5,)


@ladders
def test_dither_is_uniform(ladder: Ladder) -> None:
    d = np.concatenate([nested.dither(SEED, k, 1001, ladder) for k in range(192)])
    cells = ladder.ratio ** (ladder.levels - 1)
    assert d.min() >= 0 and d.max() < cells << nested.FRACTION
    assert kolmogorov_smirnov((d + 0.5) / (cells << nested.FRACTION)) < 1.95


@ladders
def test_error_is_uniform_and_independent(ladder: Ladder) -> None:
    c = laplace(0)
    truth = nested.quantize(c, SEED, ladder)
    for level, snr in enumerate(ladder.snrs):
        cells = cells_at(level, truth, ladder)
        q = math.sqrt(12 / snr)
        low, width = map(
            np.array, zip(*(cells.bounds(k, SEED, ladder) for k in range(192)), strict=True)
        )
        np.testing.assert_allclose(width, q, rtol=1e-12)
        m = cells.centres(SEED, ladder).astype(np.float64)
        np.testing.assert_allclose(m, low + width / 2, rtol=1e-6, atol=1e-6)
        u = (c - low) / width  # where in its cell c is
        assert u.min() >= -1e-9 and u.max() <= 1 + 1e-9
        e = (u - 0.5).ravel()
        assert kolmogorov_smirnov(u) < 1.95
        # Of precision SNR: the variance of x^2 under the uniform law is 1 / 180.
        assert abs((e**2).mean() - 1 / 12) < 3.3 / math.sqrt(180 * e.size)
        # Independent of c: no correlation with it, its sign or size, and uniform for any size.
        for f in (c, np.sign(c), np.abs(c), np.abs(c) ** 0.25):
            assert abs(np.corrcoef(f.ravel(), e)[0, 1]) < 3.3 / math.sqrt(e.size)
            assert abs(np.corrcoef(f.ravel(), np.abs(e))[0, 1]) < 3.3 / math.sqrt(e.size)
        for bands in (slice(0, 48), slice(48, 144), slice(144, 192)):  # many tests: p = 0.0001
            assert kolmogorov_smirnov(u[bands]) < 2.23
            assert kolmogorov_smirnov(u[bands][c[bands] > 0]) < 2.23
        # And of the neighbours' errors.
        grid = u - 0.5
        for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 3.3 / math.sqrt(a.size)


def test_nothing_known() -> None:
    cells = Cells.nothing(6, Ladder())
    assert not cells.centres(SEED, Ladder()).any()
    m = laplace(1, 6)
    np.testing.assert_array_equal(cells.clip(m.copy(), SEED, Ladder()), m)


def test_clip_projects_onto_the_cells() -> None:
    ladder, c = Ladder(), laplace(2, 50)
    cells = cells_at(4, nested.quantize(c, SEED, ladder), ladder)
    q = math.sqrt(12 / ladder.snrs[4])
    np.testing.assert_allclose(cells.clip(c.copy(), SEED, ladder), c, rtol=1e-6, atol=1e-6)
    for far in (-1e3, 1e3):
        edge = cells.centres(SEED, ladder) + math.copysign(q / 2, far)
        clipped = cells.clip(np.full_like(c, far), SEED, ladder)
        np.testing.assert_allclose(clipped, edge, rtol=1e-5, atol=1e-5)


# --- What it costs -----------------------------------------------------------------------------


def mass(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(low .. high) under Laplace(0, 1), without cancellation in the upper tail."""
    flip = low > 0
    return laplace_cdf(np.where(flip, -low, high)) - laplace_cdf(np.where(flip, -high, low))


@ladders
def test_levels_cost_what_the_last_alone_would(ladder: Ladder) -> None:
    """With m and b held fixed, exactly: that is what nesting is for."""
    rng = np.random.default_rng(3)
    shape = (192, 40)
    m, b = rng.normal(size=shape), np.exp(rng.uniform(-3, 1.5, shape))
    c = (m + b * rng.laplace(size=shape).clip(-8, 8)).astype(np.float32)
    truth = nested.quantize(c, SEED, ladder)

    def probability(cells: Cells) -> NDArray[np.float64]:
        low, width = map(
            np.array, zip(*(cells.bounds(k, SEED, ladder) for k in range(192)), strict=True)
        )
        return mass((low - m) / b, (low + width - m) / b)

    first = cells_at(0, truth, ladder)
    bits = -np.log2(probability(first))
    for level in range(1, ladder.levels):
        cells, parent = cells_at(level, truth, ladder), cells_at(level - 1, truth, ladder)
        part = cells.cell - ladder.ratio * parent.cell
        assert part.min() == 0 and part.max() == ladder.ratio - 1
        # Laplace(m, b) restricted to the known cell, over the parts into which it divides.
        parts = np.stack(
            [
                probability(Cells(ladder.ratio * parent.cell + j, cells.depth))
                for j in range(ladder.ratio)
            ]
        )
        chosen = np.take_along_axis(parts, part[None].astype(np.int64), 0)[0]
        bits -= np.log2(chosen / parts.sum(0))
    alone = -np.log2(probability(cells_at(ladder.levels - 1, truth, ladder)))
    np.testing.assert_allclose(bits, alone, rtol=1e-9, atol=1e-9)
    assert alone.sum() / alone.size > 2  # there was something to send


class Scene:
    """A picture's coefficients and what a network could say about them before each level."""

    def __init__(
        self, ladder: Ladder, isotropic: bool = False, n: tuple[int, int] = (6, 7)
    ) -> None:
        rng = np.random.default_rng(4)
        self.ladder = ladder
        shape = (192, n[0] * n[1])
        self.setup = Setup(laplace_tables(ladder), ladder, SEED, n, isotropic)
        self.scale = (0.8 * np.arange(1, 65) ** -1.2)[np.arange(192) % 64, None] * np.exp(
            rng.normal(size=shape) / 2
        )
        self.guess = rng.normal(size=shape)
        self.c = (self.guess + self.scale * rng.laplace(size=shape)).astype(np.float32)
        self.truth = nested.quantize(self.c, SEED, ladder)

    def says(self, i: int, cells: Cells) -> tuple[Any, Any]:
        """eps, lam before level i: x0_hat is the guess, its error the true scale."""
        if i == 0:
            return None, None
        sigma = self.ladder.snrs[i - 1] ** -0.5
        eps = (cells.centres(SEED, self.ladder) - self.guess) / sigma
        return eps.astype(np.float32), np.log(self.scale / sigma).astype(np.float32)


def encode(
    scene: Scene, i: int, cells: Cells, eps: Any, lam: Any, writer: Writer | None = None
) -> tuple[bitstream.Level, float]:
    writer, setup = writer or Writer(), scene.setup
    last = nested.bands_in_use(setup, i, lam, cells, 3)
    agreed = nested.agree_level(writer, setup, i, cells, eps, lam, last)
    return nested.encode_level(writer, setup, i, cells, agreed, scene.truth)


@ladders
@pytest.mark.parametrize("isotropic", [False, True])
def test_levels_round_trip(ladder: Ladder, isotropic: bool) -> None:
    scene = Scene(ladder, isotropic, (12, 14))
    most = 0
    theirs, ours = (Cells.nothing(scene.truth.shape[1], scene.setup.ladder) for _ in range(2))
    for i in range(ladder.levels):
        eps, lam = scene.says(i, theirs)
        before = copy.deepcopy(ours)
        writer = Writer()
        level, ideal = encode(scene, i, theirs, eps, lam, writer)
        assert ideal <= writer.ideal  # the price of agreement apart
        bits = 8 * len(level.payload)
        assert writer.ideal - 32 <= bits <= 1.01 * writer.ideal + 64
        assert level.cuts[-1].groups == bitstream.GROUPS
        nested.decode_level(scene.setup, i, ours, eps, lam, level, len(level.cuts))
        np.testing.assert_array_equal(ours.cell, theirs.cell)
        np.testing.assert_array_equal(ours.depth, theirs.depth)
        known = ours.depth == i
        assert known.all() if isotropic else known.any()
        expected = scene.truth // ladder.ratio ** (ladder.levels - 1 - i)
        np.testing.assert_array_equal(ours.cell[known], expected[known])
        assert ((ours.depth >= 0) >= (before.depth >= 0)).all()  # once on, on
        assert (ours.depth[ours.depth >= 0] == i).all()
        # Any cut gives the groups before it, and leaves the others as they were.
        most = max(most, len(level.cuts))
        agreed = nested.agree_level(
            Reader(level.payload), scene.setup, i, before, eps, lam, level.last
        )
        for received in range(1, len(level.cuts)):
            part = copy.deepcopy(before)
            cut = level.cuts[received - 1]
            short = copy.copy(level)
            short.payload = level.payload[: cut.nbytes]
            if not cut.groups:
                continue
            nested.decode_level(scene.setup, i, part, eps, lam, short, received)
            for g, (t, bands) in enumerate(nested.groups_in_turn()):
                expected_cells = theirs if g < cut.groups else before
                here = agreed.in_turn(t, bands)
                np.testing.assert_array_equal(
                    part.cell[bands][here], expected_cells.cell[bands][here]
                )
    assert most > 3


@ladders
def test_tables_cost_what_the_last_level_alone_would(ladder: Ladder) -> None:
    """The same with the integer tables and estimates in eighths of a cell."""
    scene = Scene(ladder, isotropic=True, n=(12, 12))
    scene.setup.tables.margin[:] = 1e-9  # the price of agreement apart
    cells = Cells.nothing(144, ladder)
    # One-shot: the law that the first level has under the stored prior, then the network's word.
    total = 0.0
    for i in range(ladder.levels):
        eps, lam = scene.says(i, cells)
        _, ideal = encode(scene, i, cells, eps, lam)
        total += ideal if i else 0.0
    q0, b = math.sqrt(12 / ladder.snrs[0]), scene.scale
    first = cells_at(0, scene.truth, ladder)
    alone = 0.0
    for k in range(192):
        low, width = cells.bounds(k, SEED, ladder)
        last = mass((low - scene.guess[k]) / b[k], (low + width - scene.guess[k]) / b[k])
        low, width = first.bounds(k, SEED, ladder)
        assert width[0] == pytest.approx(q0)
        known = mass((low - scene.guess[k]) / b[k], (low + width - scene.guess[k]) / b[k])
        alone -= float(np.log2(last / known).sum())
    # Eighths of a cell are coarse for the many coefficients whose scale is far smaller.
    assert 0.97 < total / alone < 1.12


def test_damaged_symbols_or_other_arithmetic_leave_the_cells() -> None:
    scene = Scene(Ladder())
    cells = Cells.nothing(scene.truth.shape[1], scene.setup.ladder)
    encode(scene, 0, cells, None, None)
    eps, lam = scene.says(1, cells)
    before = copy.deepcopy(cells)
    level, _ = encode(scene, 1, cells, eps, lam)
    margin = float(scene.setup.tables.margin.min())
    rng = np.random.default_rng(5)
    for factor, same in ((0.95, True), (30, False)):
        sign = rng.choice([-1.0, 1.0], eps.shape)
        ours = copy.deepcopy(before)
        arguments = (
            scene.setup, 1, ours, (eps + factor * margin * sign).astype(np.float32),
            (lam + factor * margin * sign[::-1]).astype(np.float32), level, len(level.cuts),
        )  # fmt: skip
        if same:
            nested.decode_level(*arguments)
            np.testing.assert_array_equal(ours.cell, cells.cell)
        else:
            with pytest.raises(AgreementError):
                nested.decode_level(*arguments)
            np.testing.assert_array_equal(ours.cell, before.cell)
            np.testing.assert_array_equal(ours.depth, before.depth)


@pytest.mark.parametrize("name", ["chelsea", "coffee"])
def test_bits_written_are_the_tables_own(tiny_model: Path, name: str) -> None:
    with Image.open(PICTURES / f"{name}.png") as im:
        picture = im.convert("RGB").crop((100, 40, 356, 232))
    model = load_model(tiny_model)
    model.tables.margin[:] = 1e-9  # the price of agreement apart
    header = codec.make_header(picture, model, "nested", None, 1)
    e = codec.Encoder(np.asarray(picture), header, model)
    for i in range(header.levels):
        ideal, size = e.ideal_bits, len(e.bytes())
        e.step()
        level = bitstream.parse(e.bytes()).levels[i]
        bits, ideal = 8 * len(level.payload), e.ideal_bits - ideal
        assert ideal - 32 <= bits <= 1.01 * ideal + 64
        assert len(e.bytes()) - size >= len(level.payload)
    bits = 8 * len(e.bytes())  # headers, checksums and cuts included
    assert e.ideal_bits - 32 <= bits <= 1.01 * e.ideal_bits


# --- Agreement ---------------------------------------------------------------------------------

MARGIN = 1e-3
LOW, HIGH = -5, 9


def planted() -> NDArray[np.float64]:
    """Values on, around and far from the margin, at every integer near and beyond the limits."""
    offsets = np.array([0, 1e-9, 0.5, 0.999, 1.001, 1.5, 20, 400]) * MARGIN
    offsets = np.concatenate([offsets, -offsets])
    return (np.arange(LOW - 3, HIGH + 4)[:, None] + offsets).ravel()


def both(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[Any, Any, Writer]:
    writer = Writer()
    ours = agree(writer, x, MARGIN, LOW, HIGH)
    theirs = agree(Reader(writer.payload()), y, MARGIN, LOW, HIGH)
    return ours, theirs, writer


@pytest.fixture
def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks stay where they are."""
    monkeypatch.setattr(entropy, "MOVE_BITS", 0)


def test_agreed_integers_are_floors(unmoved: None) -> None:
    x = planted()
    ours, theirs, _ = both(x, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, np.floor(x).clip(LOW, HIGH - 1))
    assert ours.min() == LOW and ours.max() == HIGH - 1


def test_moved_integers_are_floors() -> None:
    """Of x and the least even number of margins under which fewest are near."""
    x = np.random.default_rng(0).uniform(LOW - 1, HIGH + 1, 3000)
    x = np.concatenate([x, planted()])
    ours, theirs, _ = both(x, x)
    np.testing.assert_array_equal(ours, theirs)
    moved = x + 2 * MARGIN * np.arange(32)[:, None]
    integer = np.rint(moved)
    near = (np.abs(moved - integer) < MARGIN) & (integer > LOW) & (integer < HIGH)
    best = near.sum(1).argmin()
    assert best > 0 and near[best].sum() < near[0].sum() / 4
    np.testing.assert_array_equal(ours, np.floor(moved[best]).clip(LOW, HIGH - 1))


@pytest.mark.parametrize("seed", range(4))
def test_noise_below_the_margin_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for x in (planted(), np.tile(planted(), 20) + 2 * MARGIN * rng.integers(0, 32, 20 * 336)):
        noise = rng.choice([-1.0, 1.0], x.shape)
        ours, theirs, _ = both(x, x + 0.999 * MARGIN * noise)
        np.testing.assert_array_equal(ours, theirs)


def test_noise_above_the_margin_changes_something(unmoved: None) -> None:
    x = planted()
    for sign in (-1, 1):
        ours, theirs, _ = both(x, x + 1.002 * MARGIN * sign)
        differ = ours != theirs
        assert differ.any()
        # Only where the value is just outside the margin: the others are agreed upon or far.
        outside = np.abs(np.abs(x - np.rint(x)) - 1.001 * MARGIN) < 1e-9
        assert not differ[~outside].any()
        limits = np.rint(x)
        np.testing.assert_array_equal(
            differ, outside & (limits > LOW) & (limits < HIGH) & (sign * (x - limits) < 0)
        )


def test_price_of_agreement() -> None:
    """Of what it costs to list all that are near."""
    rng = np.random.default_rng(0)
    for margin, n, share in ((1e-4, 40_000, 0.6), (4.6e-4, 40_000, 0.2), (4.6e-4, 700, 0.8)):
        writer, p = Writer(), 2 * margin
        for _ in range(40_000 // n):
            agree(writer, rng.uniform(-100, 100, n), margin, -100, 100)
        listed = 40_000 * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) + 40_000 * p
        assert writer.ideal < share * listed


def test_limits_need_no_agreement() -> None:
    """What is clipped is not on any boundary that matters."""
    x = np.array([LOW, LOW - 1.0, LOW - 7, HIGH, HIGH + 1.0, 1e6, -1e6])
    quiet = np.full(7, 0.5)
    assert both(x, x)[2].ideal == both(quiet, quiet)[2].ideal
    ours, theirs, _ = both(x, x + 0.4)
    np.testing.assert_array_equal(ours, theirs)
    loud = both(np.zeros(7), np.zeros(7))[2].ideal
    assert loud > both(quiet, quiet)[2].ideal + 7 * 6


def test_drawer_agrees_with_itself() -> None:
    x = planted()
    got = agree(Drawer(0, 0), x, MARGIN, LOW, HIGH)
    np.testing.assert_array_equal(got, np.floor(x).clip(LOW, HIGH - 1))


@pytest.mark.parametrize(("factor", "same"), [(0.95, True), (1.05, False)])
@pytest.mark.parametrize("what", ["eps", "lam"])
def test_checksum_tells(factor: float, same: bool, what: str) -> None:
    """One coefficient planted just inside or outside the margin of a boundary."""
    scene = Scene(Ladder(), isotropic=True, n=(2, 3))
    ladder, t = scene.ladder, scene.setup.tables
    t.margin[:] = 1e-3  # well above the last digits of float32
    margin = 1e-3
    cells = cells_at(0, scene.truth // 1, ladder)
    eps, lam = np.full((192, 6), 0.013, np.float32), np.full((192, 6), -1.1, np.float32)
    unit = tables.SUB * ladder.ratio / math.sqrt(12)
    # x = 8 - unit eps and (lam - SCALE_MIN) / SCALE_STEP: to 7 and to 12 from above.
    if what == "eps":
        eps[5, 3] = (1 - factor * margin * unit) / unit
    else:
        lam[5, 3] = tables.SCALE_MIN + 12 * tables.SCALE_STEP + factor * margin
    writer = Writer()
    ours = nested.agree_level(writer, scene.setup, 1, cells, eps, lam, (64, 64, 64))
    shift = np.zeros_like(eps)
    shift[5, 3] = 2 * factor * margin  # to the other side
    if what == "eps":
        eps = eps + shift
    else:
        lam = lam - shift
    theirs = nested.agree_level(
        Reader(writer.payload()), scene.setup, 1, cells, eps, lam, (64, 64, 64)
    )
    assert (ours.checksum() == theirs.checksum()) == same
    different = (ours.position != theirs.position) | (ours.scale != theirs.scale)
    assert different.sum() == (0 if same else 1)


# --- The coder ---------------------------------------------------------------------------------


def test_coder_round_trip() -> None:
    rng = np.random.default_rng(6)
    table = tables.quantize(rng.gamma(0.3, size=(5, 16)))
    rows = rng.integers(0, 5, 3000)
    symbols = rng.integers(0, 16, 3000).astype(np.int32)
    bits = (rng.random(1000) < 0.01).astype(np.int32)
    writer = Writer()
    writer.binary(600, 1000, bits)
    writer.symbols(table, rows, symbols)
    writer.binary(tables.TOTAL // 2, 0, bits[:0])
    writer.symbols(table, rows[:0], symbols[:0])
    reader = Reader(writer.payload())
    np.testing.assert_array_equal(reader.binary(600, 1000), bits)
    np.testing.assert_array_equal(reader.symbols(table, rows), symbols)
    p = table[rows, symbols] / tables.TOTAL
    ideal = -np.log2(p).sum() - 1000 * np.log2(1 - 600 / 65536)
    ideal += bits.sum() * np.log2(65536 / 600 - 1)
    assert writer.ideal == pytest.approx(ideal, rel=1e-9)
    assert ideal - 32 <= 8 * len(writer.payload()) <= 1.001 * ideal + 64


def test_numbers_round_trip() -> None:
    values = np.array([0, 1, 2, 3, 7, 8, 255, 65535, 65536, 2**30, 2**31 - 2, 2**31 - 1], np.int32)
    writer = Writer()
    writer.numbers(values, len(values))
    writer.numbers(values[:0], 0)
    got = Reader(writer.payload()).numbers(None, len(values))
    np.testing.assert_array_equal(got, values)
    assert got.dtype == np.int32
    # Elias: 2 floor(log2(n + 1)) + 1 bits each.
    assert writer.ideal == sum(2 * ((int(v) + 1).bit_length() - 1) + 1 for v in values)


def test_escapes_round_trip() -> None:
    table = tables.quantize(tables.laplace_first(2).reshape(-1, tables.FIRST))
    wild = [-(2**30), -100_000, -9, -8, -7, -6, -1, 0, 1, 6, 7, 8, 9, 300, 100_000, 2**30]
    j = np.array(wild * 3, np.int32)
    rows = np.arange(len(j)) * 2
    writer = Writer()
    np.testing.assert_array_equal(escaped_symbols(writer, table, rows, j), j)
    got = escaped_symbols(Reader(writer.payload()), table, rows, None)
    np.testing.assert_array_equal(got, j)


def test_drawer_follows_the_tables() -> None:
    n = 40_000
    table = tables.quantize(np.array([[1, 2, 3, 4.0], [90, 1, 1, 8], [1e-9, 1e-9, 1e-9, 1]]))
    for row, frequencies in enumerate(table):
        got = Drawer(3, row).symbols(table, np.full(n, row))
        p = frequencies / tables.TOTAL
        deviation = np.bincount(got, minlength=4) - n * p
        assert (np.abs(deviation) <= 4 * np.sqrt(n * p * (1 - p)) + 1).all()
    ones = int(Drawer(3, 9).binary(6554, n).sum())
    assert abs(ones - n * 0.1) < 4 * math.sqrt(n * 0.09)
    rows = np.zeros(50, np.int64)
    a, b, c = (Drawer(s, i).symbols(table, rows).tolist() for s, i in ((1, 2), (1, 2), (1, 3)))
    assert a == b != c


def test_drawing_a_level() -> None:
    scene = Scene(Ladder())
    cells = Cells.nothing(42, scene.setup.ladder)
    for i in range(3):
        eps, lam = scene.says(i, cells)
        nested.draw_level(scene.setup, i, cells, eps, lam, 3, 8)
    known = cells.depth >= 0
    assert known.any() and (cells.depth[known] == 2).all()
    again = Cells.nothing(42, scene.setup.ladder)
    for i in range(3):
        eps, lam = scene.says(i, again)
        nested.draw_level(scene.setup, i, again, eps, lam, 3, 8)
    np.testing.assert_array_equal(again.cell, cells.cell)


# --- Bands and tables --------------------------------------------------------------------------


def test_what_is_most_uncertain_comes_first() -> None:
    assert nested.turn(np.arange(32, dtype=np.uint8)).tolist() == [2] * 16 + [1] * 2 + [0] * 14
    turns, bands = zip(*nested.groups_in_turn(), strict=True)
    assert turns == (0,) * 24 + (1,) * 24 + (2,) * 24 and len(turns) == bitstream.GROUPS
    for at in (0, 24, 48):
        assert all(map(np.array_equal, bands[at : at + 24], nested.band_groups()))


def test_band_groups_partition_the_bands() -> None:
    groups = nested.band_groups()
    assert sorted(np.concatenate(groups).tolist()) == list(range(192))
    assert groups[0].tolist() == [0] and groups[1].tolist() == [64, 128]
    # Luminance before colour, low frequencies before high ones.
    assert all((g < 64).all() for g in groups[::2])
    assert all((g >= 64).all() for g in groups[1::2])
    assert np.concatenate(groups[::2]).tolist() == list(range(64))


@ladders
def test_laplace_tables_pass(ladder: Ladder) -> None:
    t = laplace_tables(ladder)
    t.check(ladder)
    # Far outside the cell, the nearest part.
    assert (t.refine[0, 0, :8, 0].argmax(-1) == 0).all()


def test_snrs_of_the_ladder() -> None:
    assert Ladder().snrs == [0.0390625, 0.15625, 0.625, 2.5, 10.0, 40.0, 160.0, 640.0, 2560.0]
    assert Ladder(3, 3, 810).snrs == [10.0, 90.0, 810.0]


def _less(t: tables.Tables, name: str) -> None:
    getattr(t, name)[(0,) * getattr(t, name).ndim] -= 1


def _zero(t: tables.Tables, name: str) -> None:
    table = getattr(t, name)
    row = table.reshape(-1, table.shape[-1])[-1]  # a view; of a wide scale: nothing near 2^16
    row[1] += row[0]
    row[0] = 0


def _shorter(t: tables.Tables, name: str) -> None:
    setattr(t, name, getattr(t, name)[:-1])


def _float(t: tables.Tables, name: str) -> None:
    setattr(t, name, getattr(t, name).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[(n, _less) for n in ("first", "refine", "residual")],
        *[(n, _zero) for n in ("first", "residual")],  # two parts cannot: 2^16 is no uint16
        *[(n, f) for n in ("first", "on", "weight", "mean", "prior") for f in (_shorter, _float)],
    ],
)
def test_wrong_tables_are_refused(name: str, change: Any) -> None:
    t = laplace_tables(Ladder())
    change(t, name)
    with pytest.raises(ModelError, match=name):
        t.check(Ladder())


@pytest.mark.parametrize(
    ("name", "value"),
    [("margin", 0.0), ("margin", math.nan), ("margin", 0.5), ("mean", math.nan),
     ("mean", math.inf), ("mean", 1e12), ("error", -1.0), ("error", 4097.0),
     ("error", math.inf), ("prior", 32)],
)  # fmt: skip
def test_impossible_numbers_are_refused(name: str, value: float) -> None:
    t = laplace_tables(Ladder())
    getattr(t, name)[...] = value
    with pytest.raises(ModelError, match="impossible"):
        t.check(Ladder())


def test_tables_of_another_ladder_are_refused() -> None:
    with pytest.raises(ModelError):
        laplace_tables(Ladder()).check(Ladder(8))
    with pytest.raises(ModelError):
        laplace_tables(Ladder()).check(Ladder(9, 3))


def test_quantized_probabilities() -> None:
    p = np.random.default_rng(7).gamma(0.05, size=(100, 16)) + 1e-300
    f = tables.quantize(p)
    assert f.dtype == np.uint16 and f.min() >= 1
    assert (f.sum(-1, dtype=np.int64) == tables.TOTAL).all()
    np.testing.assert_allclose(f / tables.TOTAL, p / p.sum(-1, keepdims=True), atol=17 / 65536)
