"""Fit the tables of a trained network by running the codec's own loop on pictures."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .. import data
from ..codec.chain import Estimate, Nested, Pixels, masked
from ..codec.container import Header
from ..codec.contexts import Neighbours, lattices
from ..codec.nested import (
    Agreed,
    Floats,
    agree_level,
    bands_in_use,
    encode_level,
    groups_in_turn,
    scale_index,
)
from ..diffusion import transform
from ..diffusion.transform import BANDS, BITS, POSITIONS
from ..errors import ModelError
from ..network.modelfile import Model, save_model, unet_config
from ..network.tables import (  # fmt: skip)
    ENERGIES,
    FIRST,
    NEAR,
    SCALE_MIN,
    SCALE_STEP,
    SCALES,
    SUB,
    SURPRISES,
    WINDOW,
    Ladder,
    Tables,
    laplace_first,
    laplace_refine,
    laplace_tables,
    quantize,
)
from ..network.unet import BLEND_SNRS, UNet
from ..rec.agree import Ints, Writer

SIZE = 256  # pixels, side of the crops that are looked at
POOLED = 15.0  # weight of the Laplace formula against counts, in symbols
OWN = 30.0  # weight of all levels' and contexts' common law against a level's own counts
# Agreement margins in units of the largest distance from double precision seen: two machines may
# err to opposite sides, and each by twice as much as this one.
SAFETY = 4.0
MARGINS = (5e-6, 5e-3)  # least and largest
PHOTO = Ladder()
SMALL = Ladder(levels=10, finest=10240)  # to x_1, whose SNR is 9999: the paper's chain


class Silent(Writer):
    """Writes nothing."""

    def binary(self, frequency: int, n: int, symbols: Ints | None = None) -> Ints:
        assert symbols is not None
        return symbols

    def symbols(
        self, table: NDArray[np.uint16], rows: NDArray[np.int64], symbols: Ints | None = None
    ) -> Ints:
        assert symbols is not None
        return symbols


class Counter(Silent):
    """Counts symbols in place of writing them."""

    def __init__(self, first: NDArray[np.int64], refine: NDArray[np.int64]) -> None:
        super().__init__()
        self.counts = {a.shape[1]: a for a in (first, refine)}  # told apart by their alphabets

    def symbols(
        self, table: NDArray[np.uint16], rows: NDArray[np.int64], symbols: Ints | None = None
    ) -> Ints:
        symbols = super().symbols(table, rows, symbols)
        np.add.at(self.counts[table.shape[1]], (rows, symbols), 1)
        return symbols


class Keys(Tables):
    """Tables whose rows are told apart by everything that chooses a law."""

    def law(
        self, known: NDArray[Any], scale: NDArray[Any], energy: NDArray[Any], surprise: NDArray[Any]
    ) -> NDArray[np.int64]:
        out: NDArray[np.int64] = (scale * ENERGIES + energy) * SURPRISES + surprise
        return out


def load_averaged(checkpoint: Path) -> tuple[UNet, str]:
    """The averaged (EMA) network of a checkpoint, or a model file's, and its progress as JSON.

    Raises ModelError.
    """
    try:
        with safe_open(checkpoint, "pt") as f:
            metadata = f.metadata() or {}
            cfg = unet_config(json.loads(metadata.get("network", "{}")))
            kind = "ema." if any(k.startswith("ema.") for k in f.keys()) else "net."  # noqa: SIM118
            weights = {k[4:]: f.get_tensor(k) for k in f.keys() if k.startswith(kind)}  # noqa: SIM118
        net = UNet(cfg)
        # What the model file will hold: half-precision weights.
        net.load_state_dict({k: v.half().float() for k, v in weights.items()})
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise ModelError(f"{checkpoint}: not a checkpoint ({str(e).splitlines()[0]})") from None
    return net.eval().requires_grad_(False), metadata.get("progress", "{}")


def calibrate(
    checkpoint: Path,
    folders: list[Path],
    out: Path,
    *,
    name: str = "photo",
    pictures: int = 64,
    seed: int = 0,
    device: str = "cpu",
    levels: int | None = None,
    finest: int | None = None,
    ratio: int = 2,
    safety: float = SAFETY,
    tau: float = 1.0,
    say: Callable[[str], None] = print,
) -> Tables:
    """Fit tables on crops of the pictures in ``folders`` and write network and tables to ``out``.

    For a network with precisions a quarter of the crops takes the isotropic path, and errors are
    measured on these; for one without, trained on small pictures, all pictures do. checkpoint: or
    a model file. levels, finest, ratio: of the ladder, by default that of ``PHOTO`` or ``SMALL``.
    safety: see :func:`fit_margins`. tau: see :func:`fit_threshold`. Returns the tables. Raises
    DataError, ModelError.
    """
    net, progress = load_averaged(checkpoint)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    usual = PHOTO if net.cfg.precisions else SMALL
    ladder = Ladder(levels or usual.levels, ratio, finest or usual.finest)
    ladder.check()
    tables = laplace_tables(ladder)
    model = Model(name, net, tables, ladder, bytes(32))
    spectral = net.cfg.precisions
    if spectral:
        crops = data.Crops(data.list_pictures(folders), SIZE, seed).batch(pictures)
    else:
        crops = data.small_pictures(folders)
        order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(seed))
        crops = crops[order[:pictures]]
    shots = [np.ascontiguousarray(x) for x in crops.permute(0, 2, 3, 1).numpy()]
    isotropic = [k for k in range(len(shots)) if not spectral or k % 4 == 3] or [0]
    some = shots[: max(1, len(shots) // 4)]
    chains = [_chain(model, x) for x in shots]
    fit_prior(
        tables,
        ladder,
        [(chain.coefficients(x), chain.blocks) for chain, x in zip(chains, shots, strict=True)],
    )
    if not spectral:
        fit_blend(model, shots)
    fit_errors(model, [shots[k] for k in isotropic])
    if spectral:
        fit_threshold(model, some, tau)
        say(f"sent from scale {tables.on.tolist()}, by level")
    fit_margins(model, some, isotropic, safety)
    say("agreement margins {} (eps), {} (lam), by level".format(*tables.margin.T.tolist()))
    fit_neighbours(model, some)

    levels, ratio = ladder.levels, ladder.ratio
    keys = SCALES * ENERGIES * SURPRISES
    first = np.zeros((levels, keys * (SUB // 2), FIRST), np.int64)
    refine = np.zeros((levels, keys * (WINDOW + SUB * ratio // 2), ratio), np.int64)
    for k, shot in enumerate(shots):
        chain = _chain(model, shot, k in isotropic, seed + k)
        chain.setup = replace(chain.setup, tables=Keys(**vars(tables)))
        for _ in follow(chain, shot, lambda i: Counter(first[i], refine[i])):
            pass
        say(f"picture {k + 1} of {len(shots)}")
    tables.first, tables.adjust[0] = fit(first, laplace_first(ratio))
    tables.refine, tables.adjust[1] = fit(refine, laplace_refine(ratio))
    tables.check(ladder)
    digest = save_model(out, name, net, tables, ladder, progress)
    say(f"{out}: {out.stat().st_size:,} bytes, id {digest[:6].hex()}")
    return tables


class Step(NamedTuple):
    """A level, encoded."""

    level: int
    agreed: Agreed
    off: NDArray[np.int64]  # (192, N) cell's centre - estimate before it, SUB-ths of a cell
    error: Floats  # (192, N) of the estimate after it, in units of sigma
    estimate: Estimate  # after it


def follow(chain: Nested, shot: Pixels, coder: Callable[[int], Writer]) -> Iterator[Step]:
    """Encode all levels."""
    c = chain.coefficients(shot)
    chain.observe(shot)
    setup, eps, lam = chain.setup, None, None
    for i in range(len(chain.snrs)):
        known, writer = chain.cells.depth >= 0, coder(i)
        last = bands_in_use(setup, i, lam, chain.cells, 3)
        agreed = agree_level(writer, setup, i, chain.cells, eps, lam, last)
        encode_level(writer, setup, i, chain.cells, agreed, chain.truth)
        cell = np.where(known, chain.cells.cell % chain.ladder.ratio, chain.cells.cell)
        off = (SUB * cell.astype(np.int64) + SUB // 2 - agreed.position) * agreed.send
        estimate = chain.estimate(i)
        eps, lam = estimate.eps, estimate.lam
        yield Step(
            i, agreed, off, (c - chain.centres()) / np.float32(estimate.sigma) + eps, estimate
        )


def fit_blend(model: Model, shots: list[Pixels]) -> None:
    """Least squares for :func:`denoiser.blended`, with noise of every level of its table."""
    net, rng = model.net, np.random.default_rng(0)
    table = net.get_buffer("blend")
    chains = [_chain(model, shot, True) for shot in shots]
    c = np.stack([chain.coefficients(x) for chain, x in zip(chains, shots, strict=True)])
    for k, snr in list(enumerate(BLEND_SNRS))[1:]:
        table[k] = torch.tensor([1.0, 0.0, 0.0], device=table.device)[:, None]
        m = (c + rng.standard_normal(c.shape) * snr**-0.5).astype(np.float32)
        x = np.empty_like(m)
        for j, chain in enumerate(chains):
            known = np.ones(m[j].shape, dtype=bool)
            estimate = chain.ask(m[j].copy(), masked(known, snr, chain.blocks), snr)
            x[j] = m[j] - np.float32(snr**-0.5) * estimate.eps
        for band in range(BANDS):
            rows = np.stack([a[:, band].ravel() for a in (x, m, np.ones_like(m))]).astype(
                np.float64
            )
            # Columns of unit size, and a little of a ridge: far down, x is next to worthless.
            size = np.sqrt(np.square(rows).mean(1)).clip(1e-9)
            rows /= size[:, None]
            n = rows.shape[1]
            got = np.linalg.solve(rows @ rows.T + 1e-3 * n * np.eye(3), rows @ c[:, band].ravel())
            # As the model file will hold it.
            table[k, :, band] = torch.from_numpy(got / size).to(table).half().float()


def fit_errors(model: Model, shots: list[Pixels]) -> None:
    """Mean square error of each band and position after each level of the isotropic path."""
    snrs = model.ladder.snrs
    error = np.zeros((len(snrs), BANDS, POSITIONS))
    for k, shot in enumerate(shots):
        chain = _chain(model, shot, True, k)
        for step in follow(chain, shot, lambda _: Silent()):
            error[step.level] += mean_squares(step.error, chain.blocks) / snrs[step.level]
    model.tables.error[1:] = error / len(shots)


def mean_squares(c: NDArray[np.floating], blocks: tuple[int, int]) -> NDArray[np.float64]:
    """(192, POSITIONS) of (192, N) coefficients; without a whole square, of the bands."""
    squares = np.square(transform.across(c.astype(np.float64), blocks))
    at = transform.positions(blocks)
    if np.all(at == POSITIONS):
        return np.repeat(squares.mean(1, keepdims=True), POSITIONS, 1)
    return np.stack([squares[:, at == k].mean(1) for k in range(POSITIONS)], 1)


def fit_threshold(model: Model, shots: list[Pixels], tau: float) -> None:
    """From which scale index on a level sends a coefficient: where variance times SNR exceeds tau.

    The network's scale is only a name for a class here; the variance is the measured one. Levels in
    rising order, because what one sends is what the next one finds known.
    """
    tables, ladder = model.tables, model.ladder
    for _ in range(2):  # the second time with states that the first thresholds lead to
        square, count = np.zeros((2, ladder.levels, SCALES))
        for k, shot in enumerate(shots):
            chain = _chain(model, shot, seed=k)
            for step in follow(chain, shot, lambda _: Silent()):
                off, i = chain.cells.depth < 0, step.level
                scale = scale_index(step.estimate.lam[off])
                index = np.floor(scale).clip(0, SCALES - 1).astype(np.int64)
                square[i] += np.bincount(index, np.square(step.error[off]), SCALES)
                count[i] += np.bincount(index, minlength=SCALES)
        for i in range(1, ladder.levels):
            # Classes are nested: all coefficients from this scale on, judged at its lower edge.
            v = square[i - 1] / count[i - 1].clip(min=1) * ladder.ratio**2
            worth = (v > tau) & (count[i - 1] >= 20)
            if worth.any():
                tables.on[i] = max(1, int(np.argmax(worth)))


def fit_margins(model: Model, shots: list[Pixels], isotropic: list[int], safety: float) -> None:
    """``safety`` times the largest distance of eps and lam from double precision after each level.

    They grow with SNR: at its input a network sees the noise in the last digits of the picture.
    """
    tables = model.tables
    exact = replace(model, net=copy.deepcopy(model.net).double())
    far = np.zeros((model.ladder.levels, 2))
    for k, shot in enumerate(shots):
        chain = _chain(model, shot, k in isotropic, k)
        for step in follow(chain, shot, lambda _: Silent()):
            twin = chain.fork()
            twin.model = exact
            here, there = step.estimate, twin.estimate(step.level)
            apart = [np.abs(a - b).max() for a, b in ((here.eps, there.eps), (here.lam, there.lam))]
            far[step.level] = np.maximum(far[step.level], apart)
    # In millionths, so that they can be read.
    tables.margin = (np.ceil(safety * far * 1e6) / 1e6).clip(*MARGINS)


def fit_neighbours(model: Model, shots: list[Pixels]) -> None:
    """Least squares for the weights of :class:`contexts.Neighbours`.

    What they say changes what symbols cost, but no cell: one run tells all levels' errors.
    """
    tables = model.tables
    seen: dict[tuple[int, ...], list[NDArray[np.float64]]] = {}
    for k, shot in enumerate(shots):
        chain = _chain(model, shot, seed=k)
        for i, agreed, error, *_ in follow(chain, shot, lambda _: Silent()):
            neighbours = Neighbours(chain.setup, i)
            parts = lattices(chain.setup.shape)
            for t, bands in groups_in_turn():
                if bands[0] % BITS >= NEAR:
                    continue
                send = agreed.in_turn(t, bands)
                for lattice, blocks in enumerate(parts):
                    sent = [blocks[row] for row in send[:, blocks]]
                    for band, at, here in zip(bands, sent, send[:, blocks], strict=True):
                        x, y = neighbours.features(band, lattice)[:, here], error[band, at]
                        w = tables.weight[agreed.scale[band, at]] / 256
                        rows = np.vstack([x, y.clip(-8 / w, 8 / w)]) * w
                        seen.setdefault((i, band // BITS, band % BITS, lattice), []).append(rows)
                    for band, at in zip(bands, sent, strict=True):
                        neighbours.add(np.full(len(at), band), at, error[band, at])
    for at, pieces in seen.items():
        rows = np.concatenate(pieces, axis=1)
        x, y = rows[:4], rows[4]
        if len(y) >= 100:
            weights = np.linalg.solve(x @ x.T + 0.01 * len(y) * np.eye(4), x @ y)
            weights = np.rint(256 * weights).clip(-1024, 1024)
            left = np.abs(y - weights @ x / 256).mean() / np.abs(y).mean().clip(1e-9)
            narrower = np.rint(np.log(left.clip(0.01)) / SCALE_STEP).clip(-16, 0)
            tables.near[at] = [*weights, narrower]


def _chain(model: Model, shot: Pixels, isotropic: bool = False, seed: int = 0) -> Nested:
    path = "spectral" if model.net.cfg.precisions and not isotropic else "isotropic"
    ladder = model.ladder
    header = Header(
        shot.shape[1], shot.shape[0], "RGB", "nested", path, model.id, seed,
        ladder.levels, ladder.ratio, ladder.finest,
    )  # fmt: skip
    return Nested(header, model, str(next(model.net.parameters()).device))


def fit_prior(
    tables: Tables, ladder: Ladder, coefficients: list[tuple[Floats, tuple[int, int]]]
) -> None:
    """Mean and scale of each band before anything is known.

    coefficients: (192, N) of each picture, and its height and width in blocks.
    """
    c = np.concatenate([of for of, _ in coefficients], axis=1).astype(np.float64)
    tables.mean = c.mean(1)
    deviation = np.abs(c - tables.mean[:, None]).mean(1)
    sigma = ladder.ratio * ladder.snrs[0] ** -0.5  # of the level before the first
    index = np.floor((np.log(deviation / sigma) - SCALE_MIN) / SCALE_STEP)
    tables.prior = index.clip(0, SCALES - 1).astype(np.uint8)
    tables.error[0] = np.mean(
        [mean_squares(of - tables.mean[:, None], blocks) for of, blocks in coefficients], 0
    )


def fit(
    counts: NDArray[np.int64], formula: NDArray[np.float64]
) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """Frequencies (L, W, P, K) and adjustments (S, ENERGIES, SURPRISES) from the symbols counted.

    counts: (L, keys * P, K), see :class:`Keys`; formula: (W, P, K). The adjustment of a key is the
    one under whose formula its symbols are shortest, drawn towards that of its scale and energy,
    and that towards none. The frequencies of a law, which thereby holds keys alike in spread, are
    drawn towards all levels' law, and that to the formula.
    """
    levels, (laws, positions, symbols) = len(counts), formula.shape
    formula = formula / formula.sum(-1, keepdims=True)
    counts = counts.reshape(levels, SCALES, ENERGIES, SURPRISES, positions * symbols)
    bits = counts.sum(0) @ -np.log2(formula.reshape(laws, -1).T)
    start = np.broadcast_to(2 * np.arange(SCALES)[:, None], bits.shape[:2])
    start = (bits.sum(2) + _pull(laws, start)).argmin(-1)
    law = (bits + _pull(laws, np.repeat(start[..., None], SURPRISES, 2))).argmin(-1)
    adjust = (law - 2 * np.arange(SCALES)[:, None, None]).astype(np.int8)

    total = np.zeros((laws, levels, positions * symbols))
    np.add.at(total, law, np.moveaxis(counts, 0, -2))
    total = np.moveaxis(total, 0, 1).reshape(levels, *formula.shape)
    pooled = total.sum(0) + POOLED * formula
    pooled /= pooled.sum(-1, keepdims=True)
    return quantize(total + OWN * pooled), adjust


def _pull(laws: int, towards: NDArray[Any]) -> NDArray[np.float64]:
    """What it costs, in bits, to stray from a law: (..., laws)."""
    return 0.03 * np.square(np.arange(laws) - towards[..., None], dtype=np.float64)
