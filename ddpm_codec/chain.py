"""One picture's chain: the state that encoder and decoder share, and how a level changes it.

:class:`Nested` holds cells, :class:`Gaussian` holds x_t; the loop in codec.py knows neither.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from constriction import stream as coding
from numpy.typing import NDArray

from . import gaussian, nested, transform
from .bitstream import GROUPS, WORD, Cut, Header, Level, seal
from .contexts import Setup
from .denoiser import eps_hat
from .entropy import Writer, safe_words
from .errors import FormatError
from .modelfile import Model
from .nested import Cells, Floats, band_groups
from .network import BANDS, BLOCK
from .states import State
from .tables import BITS, Ladder

TILE = 768  # side of the part of a tile that is used, pixels; part of the format
OVERLAP = 64  # pixels that a tile sees beyond it on each side; part of the format
SMALL = 32  # side of a tile, without overlap, for a network with attention; part of the format
STRIP = 16  # rows of blocks transformed at a time
CHUNK_BITS = 11.0  # gaussian: expected KL of the coefficients that share an index
UNITY = 8  # the gain 1
_ROOT = math.sqrt(2.0)
_QUARTERS = (1.0, math.sqrt(_ROOT), _ROOT, _ROOT * math.sqrt(_ROOT))
# Times what the tables expect: this picture's error, 2^((k - 8) / 4), and how probable each is. No
# machine's pow decides on digits that chunks depend on.
GAINS = [math.ldexp(_QUARTERS[k % 4], k // 4 - 2) for k in range(16)]
GAIN_SHARES = np.array([1, 1, 2, 3, 4, 5, 6, 7, 7, 7, 6, 5, 4, 3, 2, 1]) / 64
GAIN_LAW = coding.model.Categorical(GAIN_SHARES, perfect=False)

Pixels = NDArray[np.uint8]
Doubles = NDArray[np.float64]
Bands = NDArray[np.int64]
Simulate = Callable[[int, Bands, gaussian.Step, Doubles], Doubles]


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

    def estimate(self, level: int) -> Estimate:
        """Ask the network, ``level`` being the last complete level (-1: none)."""
        return self.ask(self.centres(), self.precision, self.snrs[max(level, 0)])

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
            with torch.inference_mode():
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
        b2 = 0.5 * self.model.tables.error[known].astype(np.float64)
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
    """The paper's own chain, x_T .. x_0 with exactly Gaussian steps; see gaussian.py.

    Algorithms 3 and 4 in the observation view: level i is an observation y = x_0 + N(0, 1/D) of
    precision D = SNR(t_i) - SNR(t_{i-1}), simulated under the prior N(x0_hat, 1/D), or step by step
    (gaussian.split) where that costs less. Each level begins with its gain: how this picture's
    errors compare with those that the tables expect.
    """

    def __init__(self, header: Header, model: Model, device: str = "cpu") -> None:
        super().__init__(header, model, device)
        self.m = np.zeros((BANDS, self.n))
        self.band_precision = np.zeros(BANDS)

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

    def expected_error(self, i: int) -> Doubles:
        """(192,) E(x_0 - x0_hat)^2 before level i, of the pictures the tables were fitted on."""
        return self.model.error_at(self.precision_before(i))

    def parts(self, i: int, error: Doubles) -> list[tuple[int, Bands]]:
        """What level i sends one after the other: last group, bands. error: (192,) expected.

        Groups that are expected to be less than a chunk go together with the next; of a grey
        picture only the luminance is sent.
        """
        kl = 0.5 * self.precision_of(i) * error * gaussian.BITS_PER_NAT
        out: list[tuple[int, Bands]] = []
        waiting: list[Bands] = []
        for g, group in enumerate(band_groups()):
            waiting.append(group[group < self.components * BITS])
            bands = np.concatenate(waiting)
            units = self.n * int(gaussian.micro(kl[bands]).sum())
            if units >= round(CHUNK_BITS * 2**20) or (g == GROUPS - 1 and not out):
                out.append((g, bands))
                waiting = []
        left = np.concatenate([np.zeros(0, np.int64), *waiting])
        if len(left):
            out.append((GROUPS - 1, np.concatenate([out.pop()[1], left])))
        return out

    def _take(self, i: int, x0_hat: Floats, gain: int, simulate: Simulate) -> Iterator[int]:
        """Make level i's observations part by part; yields the last group that M then holds.

        simulate: given the number of a step, which no other step of the file has, its bands, the
        step, and the expectation (B, N) before it, says by how much (B * N,) what is observed
        differs from that, in units of the noise.
        M <- (G M + D y) / (G + D), G <- G + D: diffusion.merge, DDPM eq. 7.
        """
        error = self.expected_error(i) * GAINS[gain]
        g, d = self.precision_before(i), self.precision_of(i)
        for group, bands in self.parts(i, error):
            mean, e = x0_hat[bands].astype(np.float64), error[bands][:, None]
            y = np.zeros_like(mean)
            for j, step in enumerate(gaussian.split(d, error[bands], self.n, CHUNK_BITS)):
                now = gaussian.moved(mean, e, y, step.before)
                z = simulate(gaussian.STEPS * (GROUPS * i + group) + j, bands, step, now)
                new = now + z.reshape(now.shape) / np.sqrt(step.precision)
                y = (step.before * y + step.precision * new) / (step.before + step.precision)
            self.m[bands] = (g * self.m[bands] + d * y) / self.snrs[i]
            self.band_precision[bands] = self.snrs[i]
            yield group

    def encode_level(self, i: int, estimate: Estimate | None) -> tuple[Level, float]:
        x0_hat, error = self.mean(estimate), self.expected_error(i)
        own = slice(0, self.components * BITS)
        square = float(np.square(self.c[own] - x0_hat[own], dtype=np.float64).mean())
        ratio = max(square, 1e-12) / max(float(error[own].mean()), 1e-12)
        gain = int(np.clip(np.rint(4 * np.log2(ratio)) + UNITY, 0, len(GAINS) - 1))
        coder = coding.queue.RangeEncoder()
        coder.encode(gain, GAIN_LAW)
        cuts: list[Cut] = []
        ideal = -float(np.log2(GAIN_SHARES[gain]))

        def simulate(number: int, bands: Bands, step: gaussian.Step, now: Doubles) -> Doubles:
            nonlocal ideal
            mu = (self.c[bands] - now) * np.sqrt(step.precision)
            bounds, expected = self._chunks(step)
            indices, z = gaussian.encode(mu.reshape(-1), bounds, (self.header.seed, number))
            gaussian.write_indices(coder, indices, expected)
            ideal += gaussian.ideal_bits(indices, expected)
            return z

        for group in self._take(i, x0_hat, gain, simulate):
            words = safe_words(coder)
            if words - (cuts[-1].words if cuts else 0) >= nested.CUT_SPACING:
                cuts.append(Cut(group + 1, words, 0))
        payload = coder.get_compressed().astype("<u4").tobytes()
        return Level(0.0, (0, 0, 0), 0, seal(payload, cuts), payload), ideal

    def decode_level(self, i: int, estimate: Estimate | None, level: Level, received: int) -> None:
        cut = level.cuts[received - 1]
        words = np.frombuffer(level.payload[: WORD * cut.words], "<u4")
        coder = coding.queue.RangeDecoder(words.astype(np.uint32))

        def simulate(number: int, bands: Bands, step: gaussian.Step, now: Doubles) -> Doubles:
            bounds, expected = self._chunks(step)
            indices = gaussian.read_indices(coder, expected)
            return gaussian.decode(indices, bounds, (self.header.seed, number))

        try:
            gain = int(coder.decode(GAIN_LAW))
            for group in self._take(i, self.mean(estimate), gain, simulate):
                if group + 1 >= cut.groups:
                    break
        except AssertionError as e:  # the range decoder met words that no encoder writes
            raise FormatError(f"level {i}: damaged symbols") from e

    def draw_level(self, i: int, estimate: Estimate | None, seed: int) -> None:
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))

        def simulate(number: int, bands: Bands, step: gaussian.Step, now: Doubles) -> Doubles:
            return rng.standard_normal(now.size)

        for _ in self._take(i, self.mean(estimate), UNITY, simulate):
            pass

    def _chunks(self, step: gaussian.Step) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the chunks of a step begin and end, and what each is expected to cost."""
        bits = np.repeat(step.kl_bits, self.n)
        bounds = gaussian.partition(bits, CHUNK_BITS)
        return bounds, gaussian.expectations(bits, bounds)

    def flow(self, level: int, estimate: Estimate) -> Estimate:
        known = np.broadcast_to(self.band_precision[:, None] > 0, self.m.shape)
        m = self.centres()
        for snr in self.snrs[level + 1 :]:
            m, known = _ddim(m, known, estimate, snr)
            estimate = self.ask(m.copy(), masked(known, snr, self.blocks), snr)
        self.m = m.astype(np.float64)
        return estimate


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


def _fields(estimate: Estimate | None) -> tuple[Floats | None, Floats | None]:
    return (None, None) if estimate is None else (estimate.eps, estimate.lam)
