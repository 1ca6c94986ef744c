"""Fit the tables of a trained network by running the codec's chain on pictures.

No messages are sent: observations are drawn from q, as in DDPM's forward process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .. import data
from ..codec.chain import Chain, Estimate
from ..codec.frame import Floats, Pixels
from ..codec.header import Header
from ..diffusion import transform
from ..diffusion.schedule import Ladder
from ..diffusion.transform import BANDS, POSITIONS
from ..errors import ModelError
from ..network import selftest
from ..network.exact import ExactUNet
from ..network.modelfile import Model, load_model, new_network, save_model
from ..network.tables import SCALES, Tables, new_tables
from ..network.unet import BLEND_SNRS, UNet
from .checkpoint import of_integers, read_weights
from .crops import Crops

SIZE = 256  # side of the crops, pixels
MEMORY = 5 * 10**8  # bytes of the pictures from which they are cut, at most
STRIDE = 2  # rungs from level to level of the chains on which variances are measured
POOLED = 50.0  # weight of the predicted variance against the measured one, in coefficients
PHOTO = Ladder()
SMALL = Ladder(rungs=37, finest=10240)  # the paper's chain, which ends at x_1 with SNR 9999


def load_averaged(checkpoint: Path) -> tuple[UNet | ExactUNet, str]:
    """The averaged (EMA) network of a checkpoint or a folder of parts, or that of a model file.

    Weights are rounded as in a model file. Also returns the run's progress as JSON. Raises
    ModelError.
    """
    cfg, weights, progress = read_weights(checkpoint)
    net = new_network(cfg)
    if of_integers(weights):
        return load_model(checkpoint).net, json.dumps(asdict(progress))
    try:
        if isinstance(net, ExactUNet):
            net.load_state_dict(weights)
        else:
            net.load_state_dict({k: v.half().float() for k, v in weights.items()})
    except RuntimeError as e:
        raise ModelError(f"{checkpoint}: not a checkpoint ({str(e).splitlines()[0]})") from None
    return net.eval().requires_grad_(False), json.dumps(asdict(progress))


def calibrate(
    checkpoint: Path,
    folders: list[Path],
    out: Path,
    *,
    name: str = "photo",
    pictures: int = 64,
    seed: int = 0,
    device: str = "cpu",
    rungs: int | None = None,
    finest: int | None = None,
    tau: float | None = None,
    say: Callable[[str], None] = print,
) -> Tables:
    """Fit tables on crops of the pictures in ``folders`` and write network and tables to ``out``.

    checkpoint: see :func:`load_averaged`. rungs, finest, tau: of the ladder, by default those of
    ``PHOTO`` or ``SMALL`` (diffusion.schedule.Ladder). Returns the tables. Raises DataError,
    ModelError.
    """
    net, progress = load_averaged(checkpoint)
    if isinstance(net, ExactUNet):
        net.freeze(net.integers(), device, selftest.choose(net, device))
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scales = isinstance(net, ExactUNet)
    usual = PHOTO if scales else SMALL
    ladder = Ladder(rungs or usual.rungs, finest or usual.finest, tau or usual.tau)
    ladder.check()
    tables = new_tables(ladder, scales)
    model = Model(name, net, tables, ladder, bytes(32))
    if scales:
        crops = Crops(data.list_pictures(folders), SIZE, seed, "cpu", MEMORY).batch(pictures)
    else:
        crops = data.small_pictures(folders)
        order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(seed))
        crops = crops[order[:pictures]]
    shots = [np.ascontiguousarray(x) for x in crops.permute(0, 2, 3, 1).numpy()]
    fit_prior(model, shots)
    if scales:
        for text in ("predicted", "previously fitted"):
            ratio = fit_variance(model, shots)
            say(
                f"measured over {text} variances by rung, known coefficients {_listed(ratio[:, 0])}"
            )
            say(f"  ... new coefficients {_listed(ratio[:, 1])}")
    else:
        fit_blend(model, shots)
        fit_errors(model, shots)
    tables.check(ladder, scales)
    digest = save_model(out, name, net, tables, ladder, progress)
    say(f"{out}: {out.stat().st_size:,} bytes, id {digest[:6].hex()}")
    return tables


def _listed(x: NDArray[np.float64]) -> str:
    return " ".join(f"{v:.2f}" for v in x)


def fit_prior(model: Model, shots: list[Pixels]) -> None:
    """Fit each band's mean, and the mean square error before anything is known, by position."""
    tables, chains = model.tables, [_chain(model, x) for x in shots]
    c = [chain.coefficients(x) for chain, x in zip(chains, shots, strict=True)]
    tables.mean = np.concatenate(c, axis=1).astype(np.float64).mean(1)
    tables.error[0] = np.mean(
        [
            mean_squares(x - tables.mean[:, None], chain.blocks)
            for x, chain in zip(c, chains, strict=True)
        ],
        0,
    )


def fit_variance(model: Model, shots: list[Pixels]) -> NDArray[np.float64]:
    """Fit the mean square error by rung, known or new, and scale index, in units of 1 / SNR.

    Chains take every second rung: one picture the even rungs, the next the odd ones. The tables
    decide which coefficients are sent, so a second fit measures the states that the first one leads
    to. Returns (K, 2): measured variance over that of the tables before, known and new.
    """
    tables, k = model.tables, model.ladder.rungs
    square, count = np.zeros((2, k, 2 * SCALES))
    for number, shot in enumerate(shots):
        chain = _chain(model, shot, number)
        for level, estimate in follow(chain, shot, number):
            row = chain.row(level)
            assert estimate.index is not None
            index = estimate.index.astype(np.int64)
            index[chain.depth.reshape(BANDS, -1) < 0] += SCALES
            error = np.square(chain.c - estimate.x0_hat) * chain.snrs[level]
            square[row] += np.bincount(index.reshape(-1), error.reshape(-1), 2 * SCALES)
            count[row] += np.bincount(index.reshape(-1), minlength=2 * SCALES)
    square, count = square.reshape(k, 2, SCALES), count.reshape(k, 2, SCALES)
    ratio = square.sum(-1) / np.maximum((count * tables.variance).sum(-1), 1e-9)
    # Scale indices with few coefficients get the variance that the network predicts, corrected by
    # the ratio of measured and predicted variance over all indices.
    predicted = new_tables(model.ladder, True).variance.astype(np.float64)
    total = np.maximum((count * predicted).sum(-1), 1e-9)
    correction = np.where(count.any(-1), square.sum(-1) / total, 1.0)
    scaled = predicted * correction[..., None]
    v = (square + POOLED * scaled) / (count + POOLED)
    tables.variance = np.maximum.accumulate(v, axis=-1).clip(1e-9, 1e9).astype(np.float32)
    return ratio


def follow(chain: Chain, shot: Pixels, seed: int) -> Iterator[tuple[int, Estimate]]:
    """Draw observations from q level by level; yields each level and the estimate after it."""
    chain.observe(shot)
    estimate = chain.estimate(-1)
    for level in range(chain.header.levels):
        chain.draw_level(level, estimate, seed, truth=True)
        estimate = chain.estimate(level)
        yield level, estimate


def fit_blend(model: Model, shots: list[Pixels]) -> None:
    """Fit the table of :func:`denoiser.blended` by least squares, at each of its SNRs."""
    net, rng = model.net, np.random.default_rng(0)
    table = net.get_buffer("blend")
    chains = [_chain(model, shot) for shot in shots]
    c = np.stack([chain.coefficients(x) for chain, x in zip(chains, shots, strict=True)])
    for k, snr in list(enumerate(BLEND_SNRS))[1:]:
        table[k] = torch.tensor([1.0, 0.0, 0.0], device=table.device)[:, None]
        m = (c + rng.standard_normal(c.shape) * snr**-0.5).astype(np.float32)
        x = np.empty_like(m)
        for j, chain in enumerate(chains):
            x[j] = _all_known(chain, m[j], snr)
        for band in range(BANDS):
            rows = np.stack([a[:, band].ravel() for a in (x, m, np.ones_like(m))]).astype(
                np.float64
            )
            # Ridge regression on rows of unit variance, because at low SNR x is nearly useless.
            rms = np.sqrt(np.square(rows).mean(1)).clip(1e-9)
            rows /= rms[:, None]
            n = rows.shape[1]
            got = np.linalg.solve(rows @ rows.T + 1e-3 * n * np.eye(3), rows @ c[:, band].ravel())
            # Rounded as in a model file.
            table[k, :, band] = torch.from_numpy(got / rms).to(table).half().float()


def fit_errors(model: Model, shots: list[Pixels]) -> None:
    """Fit the mean square error of each band and position at each rung, all being known."""
    rng = np.random.default_rng(1)
    for row, snr in enumerate(model.ladder.snrs):
        error = np.zeros((BANDS, POSITIONS))
        for shot in shots:
            chain = _chain(model, shot)
            c = chain.coefficients(shot)
            m = (c + rng.standard_normal(c.shape) * snr**-0.5).astype(np.float32)
            error += mean_squares(c - _all_known(chain, m, snr), chain.blocks)
        model.tables.error[row + 1] = error / len(shots)


def _all_known(chain: Chain, m: Floats, snr: float) -> Floats:
    """(192, N): x0_hat from m (192, N), all of it known with precision ``snr``."""
    chain.snrs = [snr]
    chain.m[:], chain.depth[:] = m.reshape(chain.m.shape), 0
    return chain.ask(snr).x0_hat


def mean_squares(c: NDArray[np.floating], blocks: tuple[int, int]) -> NDArray[np.float64]:
    """(192, POSITIONS) mean squares of (192, N) coefficients after :func:`transform.across`.

    Without a whole square of blocks, all positions of a band have the band's mean square.
    """
    squares = np.square(transform.across(c.astype(np.float64), blocks))
    at = transform.positions(blocks)
    if np.all(at == POSITIONS):
        return np.repeat(squares.mean(1, keepdims=True), POSITIONS, 1)
    return np.stack([squares[:, at == k].mean(1) for k in range(POSITIONS)], 1)


def _chain(model: Model, shot: Pixels, number: int = 0) -> Chain:
    """The chain of a picture (H, W, 3): spectral and on every second rung, or the paper's."""
    spectral = model.exact
    rungs = tuple(range(model.ladder.rungs - 1 - number % STRIDE, -1, -STRIDE))
    if not spectral:
        rungs = (600, 300, 100, 30, 1)
    header = Header(
        shot.shape[1], shot.shape[0], "RGB", ("isotropic", "spectral")[spectral], model.id, 0, 1,
        model.ladder.finest if spectral else 0, rungs,
    )  # fmt: skip
    return Chain(header, model, str(next(model.net.parameters()).device))
