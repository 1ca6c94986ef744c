"""Pictures to files and back: the one loop that encoder and decoder share.

    state: nothing known
    for each level:
        estimate = network(state)
        cells <- rec(c | estimate, cells)
    any time: x0_hat(state), clipped to the cells, is the picture

The encoder is the decoder plus the knowledge of c.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from . import bitstream, lossless, nested, transform
from .bitstream import Header, Stream
from .denoiser import eps_hat
from .errors import AgreementError, CutWarning, DamageWarning, FormatError, LimitError
from .image import alpha_from_bytes, alpha_to_bytes
from .modelfile import Model, get_model
from .nested import Cells, Floats, Ints, Setup
from .network import BANDS, BLOCK
from .states import State
from .tables import Ladder

TILE = 1024  # side of the part of a tile that is used, pixels; part of the format
OVERLAP = 64  # pixels that a tile sees beyond it on each side; part of the format

Pixels = NDArray[np.uint8]
ModelLike = str | Path | Model | None
Recon = Literal["mean", "sample", "flow"]
Progress = Callable[[int, int], None]


@dataclass
class Estimate:
    """The network's word on a state: noise and log-scale of each coefficient, (192, N)."""

    eps: Floats
    lam: Floats
    sigma: float


@dataclass
class Level:
    """A picture on the way, as :func:`decode_levels` yields it."""

    image: Image.Image
    t: int  # timestep
    snr: float
    nbytes: int  # of the file, up to here
    psnr: float  # dB, as the encoder measured it
    complete: bool  # whether all of the level has arrived


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def tiles(height: int, width: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """What a tile sees and which part of that is used: rows, columns, rows and columns inside.

    In pixels. Fixed by the picture's size alone, so that both ends compute the same.
    """
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            y0, y1 = max(0, top - OVERLAP), min(height, top + TILE + OVERLAP)
            x0, x1 = max(0, left - OVERLAP), min(width, left + TILE + OVERLAP)
            bottom, right = min(height, top + TILE), min(width, left + TILE)
            yield (
                slice(y0, y1), slice(x0, x1),
                slice(top - y0, bottom - y0), slice(left - x0, right - x0),
            )  # fmt: skip


class Chain:
    """The state of one picture's chain, whichever end holds it."""

    def __init__(self, header: Header, model: Model, device: str = "cpu") -> None:
        self.header, self.model, self.device = header, model, device
        multiple = model.net.cfg.multiple
        self.size = (padded(header.height, multiple), padded(header.width, multiple))
        self.blocks = (self.size[0] // BLOCK, self.size[1] // BLOCK)
        self.components = 1 if header.mode in ("L", "LA") else 3
        self.ladder = Ladder(header.levels, header.ratio, header.finest)
        if self.ladder != model.ladder:
            raise FormatError("the file's levels are not those of its model")
        self.setup = Setup(
            model.tables, self.ladder, header.seed, self.blocks, header.path == "isotropic"
        )
        self.cells = Cells.nothing(self.blocks[0] * self.blocks[1])

    def estimate(self, level: int) -> Estimate:
        """x0_hat's ingredients when level ``level`` is the last complete one (-1: none)."""
        snr = self.ladder.snrs[max(level, 0)]
        m = self.cells.centres(self.header.seed, self.ladder).reshape(BANDS, *self.blocks)
        snrs = np.array([*self.ladder.snrs, 0.0], np.float32)
        depth = self.cells.depth.reshape(BANDS, *self.blocks)
        eps = np.empty_like(m)
        lam = np.empty_like(m)
        for y, x, inner_y, inner_x in tiles(*self.size):
            by, bx = _blocks(y), _blocks(x)
            state = State(
                torch.from_numpy(m[None, :, by, bx]).to(self.device, torch.float64),
                torch.from_numpy(snrs[depth[None, :, by, bx]]).to(self.device),
                torch.tensor([snr], device=self.device),
            )
            with torch.inference_mode():
                tile = eps_hat(self.model.net, state, self.model.net.cfg.prediction)
            iy, ix = _blocks(inner_y), _blocks(inner_x)
            out = (
                slice(None), slice(by.start + iy.start, by.start + iy.stop),
                slice(bx.start + ix.start, bx.start + ix.stop),
            )  # fmt: skip
            for whole, part in ((eps, tile[0]), (lam, tile[1])):
                whole[out] = part[0, :, iy, ix].to("cpu", torch.float32).numpy()
        return Estimate(eps.reshape(BANDS, -1), lam.reshape(BANDS, -1), snr**-0.5)

    def mean(self, estimate: Estimate | None) -> Floats:
        """(192, N): x0_hat = M - sigma eps, projected onto the cells; the stored mean at first."""
        if estimate is None:
            n = self.cells.cell.shape[1]
            return np.repeat(self.setup.tables.mean[:, None], n, 1).astype(np.float32)
        m = self.cells.centres(self.header.seed, self.ladder)
        m -= np.float32(estimate.sigma) * estimate.eps
        return self.cells.clip(m, self.header.seed, self.ladder)

    def picture(self, m: Floats) -> Pixels:
        """(H, W, 3) pixels of (192, N) coefficients, cropped and rounded."""
        return np.rint(self.pixels(m)).clip(0, 255).astype(np.uint8)

    def pixels(self, m: Floats) -> NDArray[np.float64]:
        """(H, W, 3) in units of 0 .. 255, not rounded, computed a strip at a time."""
        h, w = self.header.height, self.header.width
        out = np.empty((h, w, 3))
        m = m.reshape(BANDS, *self.blocks)
        for top in range(0, self.blocks[0], 64):
            strip = torch.from_numpy(m[None, :, top : top + 64]).double()
            x = transform.inverse(strip)[0].permute(1, 2, 0).numpy()
            rows = out[top * BLOCK : (top + 64) * BLOCK]
            rows[:] = (x[: len(rows), :w] + 1.0) * 127.5
        if self.components == 1:
            out[:] = out.mean(2, keepdims=True)
        return out

    def coefficients(self, pixels: Pixels) -> Floats:
        """(192, N) coefficients of a picture, padded by repeating its last row and column."""
        h, w = self.size
        pad = ((0, h - pixels.shape[0]), (0, w - pixels.shape[1]), (0, 0))
        x = torch.from_numpy(np.pad(pixels, pad, "edge")).permute(2, 0, 1)[None]
        c = transform.forward(x.float() / 127.5 - 1.0)[0]
        return c.reshape(BANDS, -1).numpy()


def _blocks(s: slice) -> slice:
    return slice(s.start // BLOCK, s.stop // BLOCK)


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio over all samples, dB; infinite for equal pictures."""
    mse = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64))
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


class Encoder:
    """Encodes level by level; ``bytes()`` is a valid file at any time."""

    def __init__(self, pixels: Pixels, header: Header, model: Model, device: str = "cpu") -> None:
        self.pixels = pixels
        self.chain = Chain(header, model, device)
        self.truth = nested.quantize(
            self.chain.coefficients(pixels), header.seed, self.chain.ladder
        )
        self.estimate: Estimate | None = None
        self.records: list[bytes] = [bitstream.write_header(header)]
        self.ideal_bits = 0.0  # what the tables say the levels' symbols cost
        self.level = 0  # the next one

    def __len__(self) -> int:
        return sum(map(len, self.records))

    def step(self) -> float:
        """Encode one more level; returns the PSNR reached."""
        chain, e = self.chain, self.estimate
        record, ideal = nested.encode_level(
            chain.setup, self.level, chain.cells,
            None if e is None else e.eps, None if e is None else e.lam,
            self.truth, chain.components,
        )  # fmt: skip
        self.ideal_bits += ideal
        self.estimate = chain.estimate(self.level)
        reached = psnr(self.pixels, chain.picture(chain.mean(self.estimate)))
        record.psnr = reached
        self.records.append(bitstream.write_level(record))
        self.level += 1
        return reached

    def finish(self) -> None:
        """Add the layer that makes the file lossless."""
        estimate = self.chain.pixels(self.chain.mean(self.estimate))
        margin = self.lossless_margin
        payload, ideal = lossless.encode(self.pixels, estimate, margin, self.chain)
        self.ideal_bits += ideal
        self.records.append(bitstream.write_blob(payload))

    @property
    def lossless_margin(self) -> float:
        return lossless.margin(self.chain.setup.tables, self.chain.ladder)

    def bytes(self) -> bytes:
        return b"".join(self.records)
