"""One picture's chain: the state that encoder and decoder share, and how a level changes it.

:class:`Nested` holds cells, :class:`Gaussian` holds x_t; the loop in codec.py knows neither.
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..diffusion import transform
from ..diffusion.transform import BANDS, BITS, BLOCK, POSITIONS
from ..errors import FormatError
from ..network.denoiser import State, eps_hat, ieee
from ..network.modelfile import Model
from ..network.tables import Ladder
from ..rec import gaussian
from ..rec.agree import Writer
from ..rec.gaussian import Layout
from . import nested
from .container import GROUPS, Cut, Header, Level, seal
from .contexts import Setup
from .nested import Cells, Floats

TILE = 768  # side of the part of a tile that is used, pixels; part of the format
OVERLAP = 64  # pixels that a tile sees beyond it on each side; part of the format
SMALL = 32  # side of a tile, without overlap, for a network with attention; part of the format
STRIP = 16  # rows of blocks transformed at a time
UNITY = 22  # the gain 1
# Times what the tables expect: this picture's error, 2^((k - 22) / 2). No machine's pow decides on
# digits that a message's length depends on.
GAINS = [math.ldexp((1.0, math.sqrt(2.0))[k % 2], k // 2 - 11) for k in range(32)]
UNIT = 2.0**36  # in how many steps expected errors are counted
GAIN_SHARE = 80  # bits of information that are worth one more

Pixels = NDArray[np.uint8]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Estimate:
    """The network's word on a state: noise and log-scale of each coefficient, (192, N)."""

    eps: Floats
    lam: Floats
    sigma: float


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def tiles(
    height: int, width: int, small: bool = False
) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Rows and columns that a tile sees, and the rows and columns of that which are used.

    In blocks. Fixed by the picture's size, and whether the network is for small pictures, alone, so
    that both ends compute the same.
    """
    tile, overlap = (SMALL // BLOCK, 0) if small else (TILE // BLOCK, OVERLAP // BLOCK)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = max(0, top - overlap), max(0, left - overlap)
            bottom, right = min(height, top + tile), min(width, left + tile)
            yield (
                slice(y, min(height, top + tile + overlap)),
                slice(x, min(width, left + tile + overlap)),
                slice(top - y, bottom - y),
                slice(left - x, right - x),
            )


def _write(whole: Floats, parts: list[tuple[slice, slice, Floats]]) -> None:
    for y, x, part in parts:
        whole[:, y, x] = part


class Chain(ABC):
    """What both kinds of relative-entropy coding have in common."""

    def __init__(self, header: Header, model: Model, device: str = "cpu") -> None:
        self.header, self.model, self.device = header, model, device
        multiple = model.net.cfg.multiple
        size = padded(header.height, multiple), padded(header.width, multiple)
        self.blocks = size[0] // BLOCK, size[1] // BLOCK
        self.n = self.blocks[0] * self.blocks[1]
        self.components = 1 if header.mode in ("L", "LA") else 3
        self.snrs = header.snrs

    @abstractmethod
    def fork(self) -> Chain:
        """A copy that goes its own way; model and picture are shared."""

    @abstractmethod
    def centres(self) -> Floats:
        """(192, N): M, 0 where nothing is known."""

    @abstractmethod
    def precision(self, rows: slice, columns: slice) -> Floats:
        """(192, h, w): precision of M in a part of the picture's blocks."""

    @abstractmethod
    def observe(self, pixels: Pixels) -> None:
        """Encoder only: what the levels are to tell."""

    @abstractmethod
    def encode_level(self, i: int, estimate: Estimate | None) -> tuple[Level, float]:
        """Level i's record, its PSNR still to be filled in, and its ideal length in bits.

        May empty the estimate, to have the room.
        """

    @abstractmethod
    def decode_level(self, i: int, estimate: Estimate | None, level: Level, received: int) -> None:
        """Go to level i by the first ``received`` (>= 1) cuts of its record."""

    @abstractmethod
    def draw_level(self, i: int, estimate: Estimate | None, seed: int) -> None:
        """Draw level i from p instead of reading it (DDPM's progressive generation)."""

    def mean(self, estimate: Estimate | None) -> Floats:
        """(192, N): x0_hat = M - sigma eps; the stored mean where there is no estimate."""
        if estimate is None:
            mean = self.model.tables.mean.astype(np.float32)
            return np.repeat(mean[:, None], self.n, 1)
        m = self.centres()
        for k in range(BANDS):
            m[k] -= np.float32(estimate.sigma) * estimate.eps[k]
        return m

    def estimate(self, level: int, share: float = 0.0) -> Estimate:
        """Ask the network, ``level`` being the last complete level (-1: none).

        share: how much of the next has arrived, 0 .. 1. The state's SNR is taken for as much on
        the way to that level's, by its logarithm.
        """
        snr = self.snrs[max(level, 0)]
        if level >= 0 and share:
            snr *= (self.snrs[level + 1] / snr) ** share
        return self.ask(self.centres(), self.precision, snr)

    @abstractmethod
    def flow(self, level: int, estimate: Estimate) -> Estimate:
        """Go on from complete level ``level`` to the last without bits: the deterministic DDIM.

        Song et al. 2021, eq. 12 with sigma = 0; in the observation view M_s = x0_hat +
        sigma_s / sigma_t (M_t - x0_hat). Uses the chain up: its M is the flow's afterwards, and is
        known to lie in no cell. Returns the last estimate. Observed are the coefficients that were,
        and those whose predicted variance says that they would be by now.
        """

    def ask(self, m: Floats, precision: object, snr: float) -> Estimate:
        """The network's estimate for M (192, N), a picture's tiles one after the other.

        Takes m over: eps is written into it, to have the room.
        """
        assert callable(precision)
        m = m.reshape(BANDS, *self.blocks)
        lam = np.empty_like(m)
        net = self.model.net
        waiting: dict[int, list[tuple[slice, slice, Floats]]] = {}
        small = bool(net.cfg.attention)
        for rows, columns, inner_rows, inner_columns in tiles(*self.blocks, small):
            state = State(
                torch.from_numpy(m[None, :, rows, columns]).to(self.device, torch.float64),
                torch.from_numpy(precision(rows, columns)[None]).to(self.device),
                torch.tensor([snr], device=self.device),
            )
            with torch.inference_mode(), ieee(self.device):
                whole, scale = eps_hat(net, state, net.cfg.prediction)
            if scale is None:
                scale = torch.from_numpy(self._expected_scale(snr)).expand_as(whole)
            top, left = rows.start + inner_rows.start, columns.start + inner_columns.start
            h, w = inner_rows.stop - inner_rows.start, inner_columns.stop - inner_columns.start
            eps, scales = (
                part[0, :, inner_rows, inner_columns].to("cpu", torch.float32).numpy()
                for part in (whole, scale)
            )
            y, x = slice(top, top + h), slice(left, left + w)
            lam[:, y, x] = scales
            # The next row of tiles still looks at this one's M.
            waiting.setdefault(top, []).append((y, x, eps))
            if len(waiting) > 2:
                _write(m, waiting.pop(next(iter(waiting))))
        for parts in waiting.values():
            _write(m, parts)
        return Estimate(m.reshape(BANDS, -1), lam.reshape(BANDS, -1), snr**-0.5)

    def _expected_scale(self, snr: float) -> Floats:
        """(192, 1, 1): lam of a network that does not tell its error, from the table of errors."""
        known = 1 + int(np.argmin(np.abs(np.log(self.model.ladder.snrs) - np.log(snr))))
        # The variance of a Laplace distribution is 2 b^2.
        b2 = 0.5 * self.model.tables.error[known].astype(np.float64).mean(1)
        lam = 0.5 * np.log(np.maximum(b2 * snr, 1e-7))
        return lam.astype(np.float32)[:, None, None]

    def strips(self, m: Floats) -> Iterator[Floats]:
        """Rows of the picture of (192, N) coefficients, (h, W, 3), 0 .. 255, not rounded."""
        h, w = self.header.height, self.header.width
        m = m.reshape(BANDS, *self.blocks)
        for top in range(0, self.blocks[0], STRIP):
            strip = torch.from_numpy(m[None, :, top : top + STRIP]).double()
            x = transform.inverse(strip)[0].permute(1, 2, 0).numpy()
            if self.components == 1:
                x = np.repeat(x.mean(2, keepdims=True), 3, 2)
            yield ((x[: h - top * BLOCK, :w] + 1.0) * 127.5).astype(np.float32)

    def pixels(self, m: Floats) -> Floats:
        """(H, W, 3) in units of 0 .. 255, not rounded, of (192, N) coefficients."""
        return np.concatenate(list(self.strips(m)))

    def picture(self, m: Floats) -> Pixels:
        """(H, W, 3) pixels of (192, N) coefficients, rounded."""
        # By strips: of a large picture there is no room for both.
        rounded = (np.rint(x, out=x).clip(0, 255).astype(np.uint8) for x in self.strips(m))
        return np.concatenate(list(rounded))

    def coefficients(self, pixels: Pixels) -> Floats:
        """(192, N) of (H, W, 3) pixels, padded by repeating the last row and column."""
        h, w = self.blocks[0] * BLOCK, self.blocks[1] * BLOCK
        pad = ((0, h - pixels.shape[0]), (0, w - pixels.shape[1]), (0, 0))
        whole = np.pad(pixels, pad, "edge")
        out = np.empty((BANDS, *self.blocks), np.float32)
        for top in range(0, self.blocks[0], STRIP):
            rows = torch.from_numpy(whole[top * BLOCK : (top + STRIP) * BLOCK])
            x = rows.permute(2, 0, 1)[None].float() / 127.5 - 1.0
            out[:, top : top + STRIP] = transform.forward(x)[0].numpy()
        return out.reshape(BANDS, -1)


class Nested(Chain):
    """Cells of nested grids; see nested.py."""

    def __init__(self, header: Header, model: Model, device: str = "cpu") -> None:
        super().__init__(header, model, device)
        self.ladder = Ladder(header.levels, header.ratio, header.finest)
        if self.ladder != model.ladder:
            raise FormatError("the file's levels are not those of its model")
        isotropic = header.path == "isotropic"
        self.setup = Setup(model.tables, self.ladder, header.seed, self.blocks, isotropic)
        self.cells = Cells.nothing(self.n, self.ladder)
        self._snr_of_depth = np.array([*self.snrs, 0.0], np.float32)  # the last for depth -1

    def fork(self) -> Nested:
        other = copy.copy(self)
        other.cells = Cells(self.cells.cell.copy(), self.cells.depth.copy())
        return other

    def centres(self) -> Floats:
        return self.cells.centres(self.header.seed, self.ladder)

    def precision(self, rows: slice, columns: slice) -> Floats:
        depth = self.cells.depth.reshape(BANDS, *self.blocks)[:, rows, columns]
        return self._snr_of_depth[depth]

    def mean(self, estimate: Estimate | None) -> Floats:
        """x0_hat projected onto the cells: c is known to lie there."""
        return self.cells.clip(super().mean(estimate), self.header.seed, self.ladder)

    def observe(self, pixels: Pixels) -> None:
        self.truth = nested.quantize(self.coefficients(pixels), self.header.seed, self.ladder)

    def encode_level(self, i: int, estimate: Estimate | None) -> tuple[Level, float]:
        coder, lam = Writer(), _fields(estimate)[1]
        last = nested.bands_in_use(self.setup, i, lam, self.cells, self.components)
        del lam
        agreed = nested.agree_level(coder, self.setup, i, self.cells, *_fields(estimate), last)
        if estimate:
            estimate.eps = estimate.lam = np.empty((0, 0), np.float32)
        return nested.encode_level(coder, self.setup, i, self.cells, agreed, self.truth)

    def decode_level(self, i: int, estimate: Estimate | None, level: Level, received: int) -> None:
        eps, lam = _fields(estimate)
        nested.decode_level(self.setup, i, self.cells, eps, lam, level, received)

    def draw_level(self, i: int, estimate: Estimate | None, seed: int) -> None:
        eps, lam = _fields(estimate)
        nested.draw_level(self.setup, i, self.cells, eps, lam, self.components, seed)

    def flow(self, level: int, estimate: Estimate) -> Estimate:
        m, known = self.centres(), self.cells.depth >= 0
        for i in range(level + 1, len(self.snrs)):
            on = nested.scale_index(estimate.lam) >= self.setup.tables.on[i]
            on[self.components * BITS :] = False
            m, known = _ddim(m, known | on, estimate, self.snrs[i])
            precision = masked(known, self.snrs[i], self.blocks)
            estimate = self.ask(m.copy(), precision, self.snrs[i])
        self.cells = Cells.nothing(self.n, self.ladder)
        self.centres = lambda: m.copy()  # type: ignore[method-assign]
        return estimate


class Gaussian(Chain):
    """The paper's own chain, x_T .. x_0 with Gaussian steps; see gaussian.py.

    Algorithms 3 and 4 in the observation view: level i is an observation y = x_0 + N(0, 1/D) of
    precision D = SNR(t_i) - SNR(t_{i-1}), one message for all coefficients, sent under the prior
    N(x0_hat, e + 1/D): DDPM's p(x_s | x_t) with the best variances for bands and for sums and
    differences of neighbouring blocks (transform.across). Coefficients of which about the same
    error is expected are a group, the largest coming first. Each level begins with its gains: how
    this picture's errors e compare with those that the tables expect.
    """

    def __init__(self, header: Header, model: Model, device: str = "cpu") -> None:
        super().__init__(header, model, device)
        self.m = np.zeros((BANDS, self.n))
        self.band_precision = np.zeros(BANDS)
        self.gain = UNITY  # of the loudest coefficients, at the level before: gains change little
        self.place = transform.positions(self.blocks)

    def fork(self) -> Gaussian:
        other = copy.copy(self)
        other.m, other.band_precision = self.m.copy(), self.band_precision.copy()
        return other

    def centres(self) -> Floats:
        return self.m.astype(np.float32)

    def precision(self, rows: slice, columns: slice) -> Floats:
        part = np.empty((BANDS, rows.stop - rows.start, columns.stop - columns.start), np.float32)
        part[:] = self.band_precision[:, None, None]
        return part

    def observe(self, pixels: Pixels) -> None:
        self.c = self.coefficients(pixels)

    def precision_before(self, i: int) -> float:
        """G, of what is known before level i."""
        return self.snrs[i - 1] if i else 0.0

    def precision_of(self, i: int) -> float:
        """D, what level i adds to it."""
        return self.snrs[i] - self.precision_before(i)

    def groups(self, i: int) -> Groups:
        """The groups of level i, from what the tables expect.

        By exactly rounded sums, the same on all machines. Blocks outside whole squares have their
        bands' means.
        """
        known = self.precision_before(i)
        of_cells = self.model.tables.error_at(self.model.ladder, known)[: self.components * BITS]
        units = whole_units(of_cells)
        units = np.column_stack([units, units.sum(1) // POSITIONS])  # (B, POSITIONS + 1)
        here = np.bincount(self.place, minlength=units.shape[1]) > 0
        units = units[:, here]
        kinds, group = np.unique(-loudness(units), return_inverse=True)
        group = group.reshape(units.shape)
        cells = [units[group == g] for g in range(len(kinds))]
        error = np.array([int(of.sum()) / len(of) for of in cells]) / UNIT
        column = np.cumsum(here) - 1
        of_coefficients = group[:, column[self.place]].reshape(-1)
        order = np.argsort(of_coefficients, kind="stable")
        return Groups(error, np.bincount(of_coefficients), order)

    def layout(self, i: int, groups: Groups, gains: Sequence[int] = ()) -> tuple[Layout, Ints]:
        """Level i's message, and which of its gains counts for each group; none: as expected.

        Groups share a gain until they have GAIN_SHARE bits of expected information.
        """
        v = self.precision_of(i) * groups.error
        each = gaussian.information(v) * groups.n
        total = max(int(each.sum()), 1)
        count = min(max(total // (GAIN_SHARE << 20), 1), len(v))
        share = np.minimum((np.cumsum(each) - each // 2) * count // total, count - 1)
        share = np.cumsum(np.diff(share, prepend=share[0]) > 0)  # numbered without gaps
        if len(gains):
            v = v * np.array([GAINS[k] for k in gains])[share]
        return Layout.of(v, groups.n), share

    def _merge(self, i: int, groups: Groups, x0_hat: Floats, y: Doubles) -> None:
        """Merge the observations of the groups that have arrived whole.

        y: (k,) by how much they differ from x0_hat, in units of the noise.
        M <- (G M + D y) / (G + D), G <- G + D: diffusion.merge, DDPM eq. 7. Of a band that has
        arrived in part the precision is the mean.
        """
        g, d = self.precision_before(i), self.precision_of(i)
        here = groups.order[: len(y)]
        m = transform.across(self.m, self.blocks).reshape(-1)
        told = transform.across(np.asarray(x0_hat, np.float64), self.blocks).reshape(-1)[here]
        m[here] = (g * m[here] + d * (told + y / np.sqrt(d))) / self.snrs[i]
        self.m = transform.across(m.reshape(BANDS, -1), self.blocks)
        arrived = np.bincount(here // self.n, minlength=BANDS) / self.n
        of_bands = np.where(arrived == 1, self.snrs[i], g + d * arrived)
        self.band_precision = np.where(arrived > 0, of_bands, self.band_precision)

    def encode_level(self, i: int, estimate: Estimate | None) -> tuple[Level, float]:
        x0_hat, groups = self.mean(estimate), self.groups(i)
        left = transform.across(np.asarray(self.c - x0_hat, np.float64), self.blocks)
        mu = left.reshape(-1)[groups.order] * np.sqrt(self.precision_of(i))
        expected, share = self.layout(i, groups)
        squares = np.bincount(expected.each(share), mu * mu)
        ratio = np.maximum(squares, 1e-12) / np.maximum(
            np.bincount(share, expected.v * expected.n), 1e-12
        )
        gains = np.clip(np.rint(2 * np.log2(ratio)) + UNITY, 0, len(GAINS) - 1).astype(int).tolist()
        layout, _ = self.layout(i, groups, gains)
        message, y = gaussian.encode(mu, layout, (self.header.seed, i))
        self._merge(i, groups, x0_hat, y)
        head = write_gains(gains, self.gain)
        self.gain = gains[0]
        cuts: list[Cut] = []
        for part in range(1, GROUPS + 1):
            nbytes = -(-(len(head) + layout.prefix(groups.until(part))) // 8)
            if nbytes - (cuts[-1].nbytes if cuts else 0) >= nested.CUT_SPACING:
                cuts.append(Cut(part, nbytes, 0))
        payload = np.packbits(np.concatenate([head, message])).tobytes()
        ideal = float(len(head) + len(message))
        return Level(0.0, (0, 0, 0), 0, seal(payload, cuts), payload), ideal

    def decode_level(self, i: int, estimate: Estimate | None, level: Level, received: int) -> None:
        cut, groups = level.cuts[received - 1], self.groups(i)
        bits = np.unpackbits(np.frombuffer(level.payload[: cut.nbytes], np.uint8))
        gains, head = read_gains(bits, int(self.layout(i, groups)[1][-1]) + 1, self.gain)
        layout, _ = self.layout(i, groups, gains)
        if cut.nbytes != -(-(head + layout.prefix(groups.until(cut.groups))) // 8):
            raise FormatError(f"level {i}: not as long as its message")
        y = gaussian.decode(bits[head : head + layout.bits], layout, (self.header.seed, i))
        self.gain = gains[0]
        self._merge(i, groups, self.mean(estimate), y)

    def draw_level(self, i: int, estimate: Estimate | None, seed: int) -> None:
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))
        groups = self.groups(i)
        layout, _ = self.layout(i, groups)
        y = np.sqrt(1.0 + layout.each(layout.v)) * rng.standard_normal(len(layout.last))
        self._merge(i, groups, self.mean(estimate), y)

    def flow(self, level: int, estimate: Estimate) -> Estimate:
        known = np.broadcast_to(self.band_precision[:, None] > 0, self.m.shape)
        m = self.centres()
        for snr in self.snrs[level + 1 :]:
            m, known = _ddim(m, known, estimate, snr)
            estimate = self.ask(m.copy(), masked(known, snr, self.blocks), snr)
        self.m = m.astype(np.float64)
        return estimate


class Groups(NamedTuple):
    """Coefficients of a level, as transform.across leaves them, by what is expected of them."""

    error: Doubles  # (G,) expected E(x_0 - x0_hat)^2, falling
    n: Ints  # (G,) coefficients of each
    order: Ints  # (sum n,) band * N + block, group by group

    def until(self, part: int) -> int:
        """How many groups the first ``part`` of GROUPS parts of the message hold."""
        return part * len(self.n) // GROUPS


def whole_units(error: Doubles) -> Ints:
    return np.rint(error * UNIT).astype(np.int64)


def loudness(units: Ints) -> Ints:
    """Half octaves of squares that are counted in whole units, 0 and 1 being alike."""
    mantissa, exponent = np.frexp(np.maximum(units, 1).astype(np.float64))  # in [1/2, 1)
    return 2 * exponent.astype(np.int64) + (mantissa >= math.sqrt(0.5))


def _ddim(
    m: Floats, known: NDArray[np.bool_], estimate: Estimate, snr: float
) -> tuple[Floats, NDArray[np.bool_]]:
    """One deterministic step to ``snr``: M - x0_hat = sigma eps shrinks with sigma."""
    step = np.float32(snr**-0.5 - estimate.sigma)
    return np.where(known, m + step * estimate.eps, np.float32(0)), known


def masked(known: NDArray[np.bool_], snr: float, blocks: tuple[int, int]) -> object:
    """The map of precisions ``snr`` where ``known``, as :meth:`Chain.ask` wants it."""
    grid = known.reshape(BANDS, *blocks)
    return lambda rows, columns: grid[:, rows, columns].astype(np.float32) * np.float32(snr)


def write_gains(gains: Sequence[int], before: int) -> gaussian.Bits:
    """By how much each differs from the one before, in unary: 0, 1, -1, 2, -2, ..."""
    text = ""
    for last, now in itertools.pairwise([before, *gains]):
        text += "1" * (2 * (now - last) - 1 if now > last else 2 * (last - now)) + "0"
    return np.array([int(c) for c in text], np.uint8)


def read_gains(bits: gaussian.Bits, count: int, before: int) -> tuple[list[int], int]:
    """The inverse, and how many bits they take. Raises FormatError."""
    text = "".join(map(str, bits[: 2 * len(GAINS) * count].tolist()))
    gains, at = [before], 0
    for _ in range(count):
        end = text.find("0", at)
        u = end - at
        gains.append(gains[-1] + ((u + 1) // 2 if u % 2 else -u // 2))
        if end < 0 or not 0 <= gains[-1] < len(GAINS):
            raise FormatError("impossible gains")
        at = end + 1
    return gains[1:], at


def _fields(estimate: Estimate | None) -> tuple[Floats | None, Floats | None]:
    return (None, None) if estimate is None else (estimate.eps, estimate.lam)
