"""Fit the tables of a trained network by running the codec's own chain on pictures.

Messages are not needed for that: observations are drawn from q, as DDPM's forward process does.
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

SIZE = 256  # pixels, side of the crops that are looked at
MEMORY = 5 * 10**8  # bytes of pictures that they are cut from
STRIDE = 2  # rungs from level to level of the chains on which variances are measured
POOLED = 50.0  # weight of the network's own word against what is measured, in coefficients
PHOTO = Ladder()
SMALL = Ladder(rungs=37, finest=10240)  # to x_1, whose SNR is 9999: the paper's chain


def load_averaged(checkpoint: Path) -> tuple[UNet | ExactUNet, str]:
    """The averaged (EMA) network of a checkpoint or a folder of parts, or a model file's; progress.

    As a model file will hold it; progress is JSON. Raises ModelError.
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

    checkpoint: or a model file. rungs, finest, tau: of the ladder (diffusion.schedule.Ladder), by
    default that of ``PHOTO`` or ``SMALL``. Returns the tables. Raises DataError,
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
        for text in ("the network's own word", "the fit before"):
            off = fit_variance(model, shots)
            say(f"variances over {text}, by rung: known {_listed(off[:, 0])}")
            say(f"  ... coefficients seen for the first time {_listed(off[:, 1])}")
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
    """Mean of each band, and its mean square error before anything is known, by position."""
    tables, chains = model.tables, [_chain(model, x) for x in shots]
    c = [chain.coefficients(x) for chain, x in zip(chains, shots, strict=True)]
    tables.mean = np.concatenate(c, axis=1).astype(np.float64).mean(1)
    tables.error[0] = np.mean(
        [
            mean_squares(of - tables.mean[:, None], chain.blocks)
            for of, chain in zip(c, chains, strict=True)
        ],
        0,
    )


def fit_variance(model: Model, shots: list[Pixels]) -> NDArray[np.float64]:
    """Mean square error by rung, known or new, and scale index, in units of the rung's noise.

    Chains take every second rung, even and odd ones in turn. What is sent depends on the tables, so
    a second time finds the states that the first fit leads to. Returns (K, 2): by how much the
    tables were off before, for known and for new coefficients.
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
    said = (count * tables.variance).sum(-1)
    off = square.sum(-1) / np.maximum(said, 1e-9)
    # Where little was seen, the network's own word, times what is true of the others on the whole.
    own = new_tables(model.ladder, True).variance.astype(np.float64)
    whole = np.where(count.any(-1), square.sum(-1) / np.maximum((count * own).sum(-1), 1e-9), 1.0)
    scaled = own * whole[..., None]
    v = (square + POOLED * scaled) / (count + POOLED)
    tables.variance = np.maximum.accumulate(v, axis=-1).clip(1e-9, 1e9).astype(np.float32)
    return off


def follow(chain: Chain, shot: Pixels, seed: int) -> Iterator[tuple[int, Estimate]]:
    """Each level and the network's estimate after it, observations being drawn from q."""
    chain.observe(shot)
    estimate = chain.estimate(-1)
    for level in range(chain.header.levels):
        chain.draw_level(level, estimate, seed, truth=True)
        estimate = chain.estimate(level)
        yield level, estimate


def fit_blend(model: Model, shots: list[Pixels]) -> None:
    """Least squares for :func:`denoiser.blended`, with noise of every level of its table."""
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
            # Columns of unit size, and a little of a ridge: far down, x is next to worthless.
            size = np.sqrt(np.square(rows).mean(1)).clip(1e-9)
            rows /= size[:, None]
            n = rows.shape[1]
            got = np.linalg.solve(rows @ rows.T + 1e-3 * n * np.eye(3), rows @ c[:, band].ravel())
            # As the model file will hold it.
            table[k, :, band] = torch.from_numpy(got / size).to(table).half().float()


def fit_errors(model: Model, shots: list[Pixels]) -> None:
    """Mean square error of each band and position where all is known, for each rung."""
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
    """(192, N): x0_hat where all of m (192, N) is known with precision ``snr``."""
    chain.snrs = [snr]
    chain.m[:], chain.depth[:] = m.reshape(chain.m.shape), 0
    return chain.ask(snr).x0_hat


def mean_squares(c: NDArray[np.floating], blocks: tuple[int, int]) -> NDArray[np.float64]:
    """(192, POSITIONS) of (192, N) coefficients; without a whole square, of the bands."""
    squares = np.square(transform.across(c.astype(np.float64), blocks))
    at = transform.positions(blocks)
    if np.all(at == POSITIONS):
        return np.repeat(squares.mean(1, keepdims=True), POSITIONS, 1)
    return np.stack([squares[:, at == k].mean(1) for k in range(POSITIONS)], 1)


def _chain(model: Model, shot: Pixels, number: int = 0) -> Chain:
    """Of a picture of (H, W, 3): spectral and on every second rung, or the paper's."""
    spectral = model.exact
    rungs = tuple(range(model.ladder.rungs - 1 - number % STRIDE, -1, -STRIDE))
    if not spectral:
        rungs = (600, 300, 100, 30, 1)
    header = Header(
        shot.shape[1], shot.shape[0], "RGB", ("isotropic", "spectral")[spectral], model.id, 0, 1,
        model.ladder.finest if spectral else 0, rungs,
    )  # fmt: skip
    return Chain(header, model, str(next(model.net.parameters()).device))
