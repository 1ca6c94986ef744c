"""One picture's chain: the state that encoder and decoder share, and how a level changes it.

DDPM's Algorithms 3 and 4 in the observation view. Level i gives the decoder an observation y = x_0
+ N(0, 1/D) of every coefficient that it sends. D is what the level adds to the coefficient's
precision. The decoder expects y ~ N(x0_hat, v + 1/D): DDPM's p(x_s | x_t) with the best variance
for each coefficient. Each tile has one message at each level (rec/trellis.py).

The *isotropic* path sends all coefficients at each level, as in the paper. The *spectral* path
sends a coefficient from the first level on at which v SNR exceeds a threshold.
"""

from __future__ import annotations

import binascii
import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..diffusion import transform
from ..diffusion.parameterisation import merge
from ..diffusion.transform import BANDS, BITS, POSITIONS
from ..errors import FormatError, Incomplete
from ..network.conditioning import GRID, LIMIT
from ..network.denoiser import ask_exact, ask_isotropic
from ..network.exact import ExactUNet
from ..network.modelfile import Model
from ..network.tables import SCALES
from ..network.tiles import Tile, tiles
from ..rec import classes, search, trellis
from ..rec.classes import Classes
from ..rec.trellis import Layout
from .frame import Floats, Frame, Pixels
from .header import Cursor, Header
from .tune import Tune, weights

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]


@dataclass
class Estimate:
    """The network's prediction from a state."""

    x0_hat: Floats  # (192, N) multiples of 1 / GRID
    index: NDArray[np.int8] | None  # (192, N) scale index; None from a network without log-scales


NOTHING = Estimate(np.empty((BANDS, 0), np.float32), None)


class Message(NamedTuple):
    """What both ends know of a tile's message before its bits."""

    classes: Classes
    across: bool  # whether the coefficients are transformed by transform.across


class Chain(Frame):
    """State of one picture. The encoder's knows the picture, too (:meth:`observe`)."""

    def __init__(self, header: Header, model: Model, device: str = "cpu") -> None:
        """Raises FormatError if the file's levels are not the model's."""
        self.header, self.model, self.device = header, model, device
        grey = header.mode in ("L", "LA")
        super().__init__(header.height, header.width, model.net.cfg.multiple, grey)
        self.snrs = header.snrs
        if model.exact:
            theirs = header.finest == model.ladder.finest and header.rungs[0] < model.ladder.rungs
        else:
            theirs = not header.finest and header.path == "isotropic"
        if not theirs:
            raise FormatError("the file's levels are not those of its model")
        self.tiles = tiles(*self.blocks, not model.exact)
        self.m = np.zeros((BANDS, *self.blocks), np.float32)
        narrow = np.int8 if len(self.snrs) < 127 else np.int16
        # The level at which each coefficient was last observed; -1 if it never was.
        self.depth = np.full((BANDS, *self.blocks), -1, narrow)
        self.weights = weights(Tune(*header.tune))  # (192,) of the bands' precisions
        self.gains = [classes.UNITY] * len(self.tiles)  # each tile's first gain of the level before
        self.information = 0.0  # sum of 1/2 log2(1 + D v) over all that was sent, bits
        self.memory = trellis.MEMORY + header.effort

    def fork(self) -> Chain:
        """A copy with a state of its own; model and picture are shared."""
        other = copy.copy(self)
        other.m, other.depth, other.gains = self.m.copy(), self.depth.copy(), list(self.gains)
        return other

    def observe(self, pixels: Pixels) -> None:
        """Encoder only: the picture to be sent. pixels: (H, W, 3)."""
        # They are transformed tile by tile, because a large picture's coefficients fill the memory.
        self._pixels = pixels

    @property
    def c(self) -> Floats:
        """Encoder only: (192, N) coefficients of the picture."""
        return self.coefficients(self._pixels)

    # --- the network ---------------------------------------------------------------------------

    @property
    def depth_snrs(self) -> list[float]:
        """The SNR of each depth; the last is 0, for depth -1."""
        return [*self.snrs, 0.0]

    def estimate(self, level: int, share: float = 0.0) -> Estimate:
        """The network's estimate; ``level`` is the last complete level (-1: none).

        share: how much of the next level's payload was used, 0 .. 1. The state's SNR is the same
        share of the way from this level's to the next one's.
        """
        if level < 0 and np.all(self.depth < 0):
            mean = on_grid(self.model.tables.mean).astype(np.float32)
            return Estimate(np.repeat(mean[:, None], self.n, 1), None)
        snr = self.snrs[max(level, 0)]
        if level >= 0 and share:  # linear: powers would differ from machine to machine
            snr += share * (self.snrs[level + 1] - snr)
        return self.ask(snr)

    def ask(self, snr: float) -> Estimate:
        """The network's estimate from the state at ``snr``, one tile after the other."""
        net = self.model.net
        x0_hat = np.empty_like(self.m)
        index = np.empty(self.m.shape, np.int8) if isinstance(net, ExactUNet) else None
        for tile in self.tiles:
            window = slice(None), tile.input_rows, tile.input_columns
            place, inner = (slice(None), tile.rows, tile.columns), (slice(None), *tile.inner)
            if isinstance(net, ExactUNet):
                tile_x0_hat, tile_index = ask_exact(
                    net, self.m[window], self.depth[window], self.depth_snrs, snr, self.weights,
                    self.device,
                )  # fmt: skip
                assert index is not None
                index[place] = tile_index[inner]
            else:
                tile_x0_hat = ask_isotropic(net, self.m[window], snr, self.device)
            x0_hat[place] = tile_x0_hat[inner]
        flat = None if index is None else index.reshape(BANDS, -1)
        return Estimate(x0_hat.reshape(BANDS, -1), flat)

    # --- what a level sends --------------------------------------------------------------------

    def precision_before(self, i: int) -> float:
        """The SNR of the level before level i; 0 for the first."""
        return self.snrs[i - 1] if i else 0.0

    def _expected(self, i: int, tile: Tile, index: NDArray[np.int8] | None) -> Message:
        """Classes of a tile's coefficients at level i, by the network's scale indices (192, h w).

        Without scale indices, and at the first level, by the model's tables.
        """
        if index is None:
            return Message(self._by_tables(i, tile), True)
        known = self.depth[:, tile.rows, tile.columns].reshape(BANDS, -1) >= 0
        v, least = self.expected_variance(i)
        sent = known | (index >= (0 if self.header.path == "isotropic" else least))
        sent[self.components * BITS :] &= known[self.components * BITS :]
        of_coefficient = np.where(known, index, index.astype(np.int16) + SCALES).reshape(-1)
        return Message(classes.sort(of_coefficient, v.reshape(-1), sent.reshape(-1)), False)

    def row(self, level: int) -> int:
        """The row of the model's tables for a level; for a timestep, the last rung below it."""
        if self.header.finest:
            return self.model.ladder.rungs - 1 - self.header.rungs[level]
        return max(0, sum(s <= self.snrs[level] for s in self.model.ladder.snrs) - 1)

    def expected_variance(self, i: int) -> tuple[Doubles, int]:
        """(2, SCALES) D v of known and new coefficients; the least index of sent new ones."""
        before, now = self.snrs[i - 1], self.snrs[i]
        table = self.model.tables.variance[self.row(i - 1)].astype(np.float64)
        v = table * np.array([[(now - before) / before], [now / before]])
        significant = v[1] > self.model.ladder.tau
        return v, int(np.argmax(significant)) if significant.any() else SCALES

    def _by_tables(self, i: int, tile: Tile) -> Classes:
        """Classes by the tables' mean square error of each band and position across blocks."""
        g, tables = self.precision_before(i), self.model.tables
        error = tables.error_at(self.model.ladder, g) * self.weights[:, None]
        error = error[: self.components * BITS]
        d = self.snrs[i] - g
        sent = np.ones(len(error), bool)
        if self.header.path == "spectral":
            sums = classes.whole_units(error).sum(1)
            sent = sums / (POSITIONS * classes.UNIT) * d > self.model.ladder.tau
        return classes.by_error(error, transform.positions(tile.shape), sent, d)

    # --- levels --------------------------------------------------------------------------------

    def encode_level(self, i: int, estimate: Estimate) -> bytes:
        """Go to level i; returns its payload."""
        return b"".join(
            self._encode_tile(i, k, tile, *self._part(tile, estimate))
            for k, tile in enumerate(self.tiles)
        )

    def _part(self, tile: Tile, estimate: Estimate) -> tuple[Doubles, NDArray[np.int8] | None]:
        """The estimate for a tile: x0_hat and indices, (192, h w) each."""

        def part(whole: NDArray[Any]) -> NDArray[Any]:
            return whole.reshape(self.m.shape)[:, tile.rows, tile.columns].reshape(BANDS, -1)

        index = None if estimate.index is None else part(estimate.index)
        return part(estimate.x0_hat).astype(np.float64), index

    def _encode_tile(
        self, i: int, k: int, tile: Tile, x0_hat: Doubles, index: NDArray[np.int8] | None
    ) -> bytes:
        message = self._expected(i, tile, index)
        head = b"" if index is None else _checksum(message.classes)
        mu = self._mu(i, tile, message, x0_hat)
        share = classes.shares(message.classes)
        gains = classes.fit_gains(message.classes, share, mu)
        layout = self._layout(message.classes, share, gains)
        bits, y = search.encode(mu, layout, (self.header.seed, self._stream(i, k)))
        self._merge(i, tile, message, x0_hat, y)
        gain_bits = classes.write_gains(gains, self.gains[k])
        if gains:
            self.gains[k] = gains[0]
        return head + np.packbits(np.concatenate([gain_bits, bits])).tobytes()

    def decode_level(self, i: int, estimate: Estimate, payload: bytes) -> tuple[int, str | None]:
        """Go to level i, or as far as this beginning of its payload leads.

        Returns how many of its bytes were used, up to the last coefficients that arrived, and what
        is wrong with the rest, if anything.
        """
        r = Cursor(payload)
        try:
            for k, tile in enumerate(self.tiles):
                self._decode_tile(i, k, tile, *self._part(tile, estimate), r)
        except Incomplete:
            return r.at, None
        except FormatError as e:
            return r.at, f"level {i}: {e}"
        return r.at, None if r.at == len(payload) else f"level {i}: longer than its messages"

    def _decode_tile(
        self, i: int, k: int, tile: Tile, x0_hat: Doubles, index: NDArray[np.int8] | None,
        r: Cursor,
    ) -> None:  # fmt: skip
        """Decode a tile's message, and move the cursor past the bytes that were used.

        Raises Incomplete if the message is cut, after what has arrived was merged.
        """
        at = Cursor(r.data, r.at)
        message = self._expected(i, tile, index)
        if index is not None and at.take(2) != _checksum(message.classes):
            raise FormatError("this machine's arithmetic differs from the encoder's")
        share = classes.shares(message.classes)
        count = int(share[-1]) + 1 if len(share) else 0
        gains, head = classes.read_gains(at.bits(classes.longest(count)), count, self.gains[k])
        layout = self._layout(message.classes, share, gains)
        bits = at.bits(head + layout.bits)[head:]
        y = trellis.decode(bits, layout, (self.header.seed, self._stream(i, k)))
        self._merge(i, tile, message, x0_hat, y)
        self.gains[k] = gains[0] if gains else self.gains[k]
        if len(bits) < layout.bits:
            if len(y):
                r.at = at.at + -(-(head + int(layout.last[len(y) - 1]) + 1) // 8)
            raise Incomplete
        r.at = at.at + -(-(head + layout.bits) // 8)

    def draw_level(self, i: int, estimate: Estimate, seed: int, truth: bool = False) -> None:
        """Draw level i's observations instead of sending them.

        They are drawn from p: the paper's progressive generation. With ``truth`` they are drawn
        from q, which needs :meth:`observe`: exact relative-entropy coding would lead to the same.
        """
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))
        for tile in self.tiles:
            x0_hat, index = self._part(tile, estimate)
            message = self._expected(i, tile, index)
            y = rng.standard_normal(len(message.classes.order))
            if truth:
                y += self._mu(i, tile, message, x0_hat)
                self._add_information(message.classes.v, message.classes.n)
            else:
                y *= np.sqrt(1.0 + np.repeat(message.classes.v, message.classes.n))
            self._merge(i, tile, message, x0_hat, y)

    def _mu(self, i: int, tile: Tile, message: Message, x0_hat: Doubles) -> Doubles:
        """(n,) x_0 - x0_hat in units of the noise's deviation, in the classes' order."""
        c = self.part(self._pixels, tile.rows, tile.columns).reshape(BANDS, -1)
        order = message.classes.order
        error = self._across(message, c - x0_hat, tile).reshape(-1)[order]
        return error * np.sqrt(self._added_precision(i, tile).reshape(-1)[order])

    def _add_information(self, v: Doubles, n: Ints) -> None:
        self.information += float((trellis.information(v) * n).sum()) / 2**20

    def _stream(self, i: int, k: int) -> int:
        return i * len(self.tiles) + k

    def _layout(self, sent: Classes, share: Ints, gains: list[int]) -> Layout:
        layout = Layout.of(classes.adjusted(sent, share, gains), sent.n, self.memory)
        self._add_information(layout.v, layout.n)
        return layout

    def _added_precision(self, i: int, tile: Tile) -> Doubles:
        """(192, h w): D, what level i adds to the precision of each coefficient of a tile."""
        depth = self.depth[:, tile.rows, tile.columns].reshape(BANDS, -1)
        return self.weights[:, None] * (self.snrs[i] - np.array(self.depth_snrs)[depth])

    def _across(self, message: Message, c: Doubles, tile: Tile) -> Doubles:
        return transform.across(c, tile.shape) if message.across else c

    def _merge(self, i: int, tile: Tile, message: Message, x0_hat: Doubles, y: Doubles) -> None:
        """Merge the observations that have arrived into M, weighted by precision (DDPM eq. 7).

        y: (k,) the observations less x0_hat, in units of the noise, in the classes' order. A band
        whose sums and differences have arrived only in part keeps the precision that it had.
        """
        arrivals = message.classes.order[: len(y)]
        place = slice(None), tile.rows, tile.columns
        depth = self.depth[place].reshape(BANDS, -1)
        m = self._across(message, self.m[place].reshape(BANDS, -1).astype(np.float64), tile)
        expected = self._across(message, x0_hat, tile).reshape(-1)[arrivals]
        d = self._added_precision(i, tile).reshape(-1)[arrivals]
        flat, precision = m.reshape(-1), (self.weights * self.snrs[i])[arrivals // m.shape[1]]
        flat[arrivals] = on_grid(merge(flat[arrivals], expected + y / np.sqrt(d), d, precision))
        arrived = np.zeros(m.shape, bool)
        arrived.reshape(-1)[arrivals] = True
        m = self._across(message, m, tile)
        if message.across:
            whole = arrived.all(1, keepdims=True)
            m = np.where(whole | (depth >= 0), m, 0.0)
            arrived = np.broadcast_to(whole, arrived.shape)
        shape = BANDS, *tile.shape
        self.m[place] = on_grid(m).reshape(shape)
        self.depth[place] = np.where(arrived, i, depth).reshape(shape)


def on_grid(x: Doubles) -> Doubles:
    """x rounded to multiples of 1 / GRID, within LIMIT.

    Single precision holds such numbers, and their sums in double precision are exact in any order.
    """
    return np.rint(x * GRID).clip(-LIMIT * GRID, LIMIT * GRID) / GRID


def _checksum(sent: Classes) -> bytes:
    """Two bytes: CRC-16 of the classes' variances, sizes and coefficients."""
    crc = binascii.crc_hqx(sent.v.astype("<f8").tobytes(), 0)
    crc = binascii.crc_hqx(sent.n.astype("<u4").tobytes(), crc)
    return binascii.crc_hqx(sent.order.astype("<u4").tobytes(), crc).to_bytes(2, "little")
