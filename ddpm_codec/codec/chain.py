"""One picture's chain: the state that encoder and decoder share, and how a level changes it.

DDPM's Algorithms 3 and 4 in the observation view. Level i lets the decoder see y = x_0 + N(0, 1/D)
of every coefficient that is worth its bits, D being what the level adds to the precision of what is
known, under the prior N(x0_hat, v + 1/D): DDPM's p(x_s | x_t) with the best variance for each
coefficient. One message a tile and level (rec/trellis.py).

On the *isotropic* path all coefficients are observed at each level, as in the paper; on the
*spectral* path those of which the decoder expects that v SNR exceeds a threshold, and from then on.
"""

from __future__ import annotations

import binascii
import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..diffusion import transform
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
    """The network's word on a state."""

    x0_hat: Floats  # (192, N) multiples of 1 / GRID
    index: NDArray[np.int8] | None  # (192, N) scale index; None of a network that tells none


NOTHING = Estimate(np.empty((BANDS, 0), np.float32), None)


class Message(NamedTuple):
    """What a tile's part of a level is, before its bits: the same on both ends."""

    classes: Classes
    across: bool  # the classes are those of sums and differences over blocks (transform.across)


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
        narrow = np.int8 if len(self.snrs) < 127 else np.int16  # one more counts what is unknown
        self.depth = np.full((BANDS, *self.blocks), -1, narrow)  # level of each coefficient
        self.weights = weights(Tune(*header.tune))  # (192,) of the bands' precisions
        self.gains = [classes.UNITY] * len(self.tiles)  # the first of the level before
        self.information = 0.0  # 1/2 log2(1 + D v) of all that was sent, bits
        self.memory = trellis.MEMORY + header.effort

    def fork(self) -> Chain:
        """A copy that goes its own way; model and picture are shared."""
        other = copy.copy(self)
        other.m, other.depth, other.gains = self.m.copy(), self.depth.copy(), list(self.gains)
        return other

    def observe(self, pixels: Pixels) -> None:
        """Encoder only: what the levels are to tell. pixels: (H, W, 3)."""
        self._pixels = pixels  # transformed tile by tile: of a large picture c fills the memory

    @property
    def c(self) -> Floats:
        """(192, N) coefficients of the picture observed."""
        return self.coefficients(self._pixels)

    # --- the network ---------------------------------------------------------------------------

    def snr_of_depth(self) -> Floats:
        return np.array([*self.snrs, 0.0], np.float32)  # the last for depth -1

    def estimate(self, level: int, share: float = 0.0) -> Estimate:
        """Ask the network; ``level`` is the last complete level (-1: none).

        share: how much of the next level's payload was of use, 0 .. 1: the state's SNR is as far on
        its way.
        """
        if level < 0 and np.all(self.depth < 0):
            mean = on_grid(self.model.tables.mean).astype(np.float32)
            return Estimate(np.repeat(mean[:, None], self.n, 1), None)
        snr = self.snrs[max(level, 0)]
        if level >= 0 and share:  # no power of a number: its last digit is the machine's
            snr += share * (self.snrs[level + 1] - snr)
        return self.ask(snr)

    def ask(self, snr: float) -> Estimate:
        """The network's estimate for the state as it is, one tile after the other."""
        net, snrs = self.model.net, [*self.snrs, 0.0]
        x0_hat = np.empty_like(self.m)
        index = np.empty(self.m.shape, np.int8) if isinstance(net, ExactUNet) else None
        for tile in self.tiles:
            seen = slice(None), tile.seen_rows, tile.seen_columns
            here, used = (slice(None), tile.rows, tile.columns), (slice(None), *tile.inner)
            if isinstance(net, ExactUNet):
                told, of = ask_exact(
                    net, self.m[seen], self.depth[seen], snrs, snr, self.weights, self.device
                )
                assert index is not None
                index[here] = of[used]
            else:
                told = ask_isotropic(net, self.m[seen], snr, self.device)
            x0_hat[here] = told[used]
        flat = None if index is None else index.reshape(BANDS, -1)
        return Estimate(x0_hat.reshape(BANDS, -1), flat)

    # --- what a level sends --------------------------------------------------------------------

    def precision_before(self, i: int) -> float:
        return self.snrs[i - 1] if i else 0.0

    def _expected(self, i: int, tile: Tile, index: NDArray[np.int8] | None) -> Message:
        """Classes of a tile's coefficients at level i, by the network's scale indices (192, h w).

        Where it tells none, or nothing is known yet, by the tables.
        """
        if index is None:
            return Message(self._by_tables(i, tile), True)
        known = self.depth[:, tile.rows, tile.columns].reshape(BANDS, -1) >= 0
        v, least = self.expected_variance(i)
        sent = known | (index >= (0 if self.header.path == "isotropic" else least))
        sent[self.components * BITS :] &= known[self.components * BITS :]
        of = np.where(known, index, index.astype(np.int16) + SCALES)
        return Message(classes.sort(of.reshape(-1), v.reshape(-1), sent.reshape(-1)), False)

    def row(self, level: int) -> int:
        """Of a level's SNR in the model's tables; of a timestep's, the last rung below it."""
        if self.header.finest:
            return self.model.ladder.rungs - 1 - self.header.rungs[level]
        return max(0, sum(s <= self.snrs[level] for s in self.model.ladder.snrs) - 1)

    def expected_variance(self, i: int) -> tuple[Doubles, int]:
        """(2, SCALES) D v of known and of new ones; the scale index from which new are sent."""
        before, now = self.snrs[i - 1], self.snrs[i]
        table = self.model.tables.variance[self.row(i - 1)].astype(np.float64)
        v = table * np.array([[(now - before) / before], [now / before]])
        worth = v[1] > self.model.ladder.tau
        return v, int(np.argmax(worth)) if worth.any() else SCALES

    def _by_tables(self, i: int, tile: Tile) -> Classes:
        """By the mean square error of each band and position across blocks."""
        g, tables = self.precision_before(i), self.model.tables
        error = tables.error_at(self.model.ladder, g) * self.weights[:, None]
        error = error[: self.components * BITS]
        d = self.snrs[i] - g
        worth = np.ones(len(error), bool)
        if self.header.path == "spectral":
            sums = classes.whole_units(error).sum(1)
            worth = sums / (POSITIONS * classes.UNIT) * d > self.model.ladder.tau
        return classes.by_error(error, transform.positions(tile.shape), worth, d)

    # --- levels --------------------------------------------------------------------------------

    def encode_level(self, i: int, estimate: Estimate) -> bytes:
        """Level i's payload; goes to that level."""
        return b"".join(
            self._encode_tile(i, k, tile, *self._part(tile, estimate))
            for k, tile in enumerate(self.tiles)
        )

    def _part(self, tile: Tile, estimate: Estimate) -> tuple[Doubles, NDArray[np.int8] | None]:
        """The estimate for a tile: x0_hat and indices, (192, h w) each."""

        def of(whole: NDArray[Any]) -> NDArray[Any]:
            here = whole.reshape(self.m.shape)[:, tile.rows, tile.columns]
            return here.reshape(BANDS, -1)

        index = None if estimate.index is None else of(estimate.index)
        return of(estimate.x0_hat).astype(np.float64), index

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
        """Go to level i by the beginning of its payload, as far as it makes sense.

        Returns how many bytes of it were of use, up to the last coefficients that arrived, and what
        is wrong with the rest, if anything is.
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
        """Raises Incomplete where the payload ends inside the message, after what there is of it.

        The cursor is moved past what was of use.
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
        """Draw level i in place of sending it.

        From p: the paper's progressive generation. With ``truth``, of a picture that was observed,
        from q: what exact relative-entropy coding would lead to.
        """
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))
        for tile in self.tiles:
            x0_hat, index = self._part(tile, estimate)
            message = self._expected(i, tile, index)
            y = rng.standard_normal(len(message.classes.order))
            if truth:
                y += self._mu(i, tile, message, x0_hat)
                self._count(message.classes.v, message.classes.n)
            else:
                y *= np.sqrt(1.0 + np.repeat(message.classes.v, message.classes.n))
            self._merge(i, tile, message, x0_hat, y)

    def _mu(self, i: int, tile: Tile, message: Message, x0_hat: Doubles) -> Doubles:
        """(n,) by how much x_0 differs from x0_hat, in noise deviations, in the classes' order."""
        c = self.part(self._pixels, tile.rows, tile.columns).reshape(BANDS, -1)
        order = message.classes.order
        left = self._turned(message, c - x0_hat, tile).reshape(-1)[order]
        return left * np.sqrt(self._adds(i, tile).reshape(-1)[order])

    def _count(self, v: Doubles, n: Ints) -> None:
        self.information += float((trellis.information(v) * n).sum()) / 2**20

    def _stream(self, i: int, k: int) -> int:
        return i * len(self.tiles) + k

    def _layout(self, of: Classes, share: Ints, gains: list[int]) -> Layout:
        layout = Layout.of(classes.adjusted(of, share, gains), of.n, self.memory)
        self._count(layout.v, layout.n)
        return layout

    def _adds(self, i: int, tile: Tile) -> Doubles:
        """(192, h w): D, what level i adds to the precision of each coefficient of a tile."""
        depth = self.depth[:, tile.rows, tile.columns].reshape(BANDS, -1)
        return self.weights[:, None] * (self.snrs[i] - np.array([*self.snrs, 0.0])[depth])

    def _turned(self, message: Message, c: Doubles, tile: Tile) -> Doubles:
        return transform.across(c, tile.shape) if message.across else c

    def _merge(self, i: int, tile: Tile, message: Message, x0_hat: Doubles, y: Doubles) -> None:
        """Merge the observations that have arrived into M, weighted by precision.

        y: (k,) by how much they differ from x0_hat, in units of the noise, in the classes' order.
        M <- (G M + D y) / (G + D), G <- G + D: parameterisation.merge, DDPM eq. 7. A band of which
        only some sums and differences have arrived counts as unknown, or as no better known.
        """
        here = message.classes.order[: len(y)]
        place = slice(None), tile.rows, tile.columns
        depth = self.depth[place].reshape(BANDS, -1)
        m = self._turned(message, self.m[place].reshape(BANDS, -1).astype(np.float64), tile)
        told = self._turned(message, x0_hat, tile).reshape(-1)[here]
        d = self._adds(i, tile).reshape(-1)[here]
        flat, after = m.reshape(-1), (self.weights * self.snrs[i])[here // m.shape[1]]
        merged = flat[here] + d / after * (told + y / np.sqrt(d) - flat[here])
        flat[here] = on_grid(merged)
        there = np.zeros(m.size, bool)
        there[here] = True
        arrived = there.reshape(m.shape)
        m = self._turned(message, m, tile)
        if message.across:
            whole = arrived.all(1, keepdims=True)
            m = np.where(whole | (depth >= 0), m, 0.0)
            arrived = np.broadcast_to(whole, arrived.shape)
        shape = BANDS, *tile.shape
        self.m[place] = on_grid(m).reshape(shape)
        self.depth[place] = np.where(arrived, i, depth).reshape(shape)


def on_grid(x: Doubles) -> Doubles:
    """Rounded to multiples of 1 / GRID, within LIMIT: single precision holds them, and sums of
    them in double precision are exact in any order.
    """
    return np.rint(x * GRID).clip(-LIMIT * GRID, LIMIT * GRID) / GRID


def _checksum(of: Classes) -> bytes:
    """Two bytes: CRC-16 of what is expected of each class, how many coefficients it has, which."""
    crc = binascii.crc_hqx(of.v.astype("<f8").tobytes(), 0)
    crc = binascii.crc_hqx(of.n.astype("<u4").tobytes(), crc)
    return binascii.crc_hqx(of.order.astype("<u4").tobytes(), crc).to_bytes(2, "little")
