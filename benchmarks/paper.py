"""Progressive coding of 32x32 pictures: DDPM's appendix table and figures, and real files.

    python benchmarks/paper.py --data PICTURES [--pictures 500] [--files 20] [--out DIR]

The ideal columns are computed as in the paper: after some steps of the reverse process the rate is
L_T plus all L_{t-1} up to there (likelihood.code_length), and the distortion is that of
x0_hat(x_t). The paper's variance is --variance posterior; the default is fitted for each band. The
next column has the ideal RMSE at the paper's rate.

The other columns are of real files, with timesteps planned down to the row's t (planning.plan).
"messages" is the length of the levels' messages and gains in bits/dim. "over ideal" divides it by
the ideal rate of the same pictures at the same t. "of its RMSE" divides it by the ideal rate at the
RMSE of the file, which is a little larger than the ideal RMSE because of rounding to 8 bits and few
levels. "file" counts all bytes. Seconds are for one picture, encoded and decoded as a whole.

RMSE is in grey levels, 0 .. 255. With --out the paper's three figures (distortion and rate against
time, distortion against rate) are written as PNG and SVG, which needs the extra ``bench``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpm_codec import data
from ddpm_codec.codec.decoder import decode
from ddpm_codec.codec.encoder import Encoder, make_header
from ddpm_codec.codec.planning import plan
from ddpm_codec.diffusion.schedule import Schedule
from ddpm_codec.network.denoiser import of_pictures
from ddpm_codec.network.modelfile import Model, get_small
from ddpm_codec.paper import likelihood
from ddpm_codec.rec import classes, search

# Ho et al. 2020, appendix: reverse process time, rate (bits/dim), distortion (RMSE).
PAPER = (
    (1000, 1.77581, 0.95136), (900, 0.11994, 12.02277), (800, 0.05415, 18.47482),
    (700, 0.02866, 24.43656), (600, 0.01507, 30.80948), (500, 0.00716, 38.03236),
    (400, 0.00282, 46.12765), (300, 0.00081, 54.18826), (200, 0.00013, 60.97170),
    (100, 0.00000, 67.60125),
)  # fmt: skip


class Real(NamedTuple):
    """Means over the files of some pictures."""

    messages: float  # bits/dim, gains included
    nbytes: float
    rmse: float
    encode: float  # seconds
    decode: float


def ideal_curves(
    model: Model, x: torch.Tensor, draws: int, variance: likelihood.Variance
) -> tuple[likelihood.CodeLength, NDArray[np.float64], NDArray[np.float64]]:
    """The code length, and rate (bits/dim) and RMSE at t = 0 .. T; nan where no RMSE is known."""
    schedule = Schedule()
    with click.progressbar(length=len(x), label="bound") as bar:
        got = likelihood.code_length(
            of_pictures(model.unet, schedule, model.error_at), x, schedule, variance, draws,
            progress=lambda done, _: bar.update(done - bar.pos),
        )  # fmt: skip
    t = np.arange(len(got.term))
    drawn = ~np.isnan(got.term)
    term = np.interp(t, t[drawn], got.term[drawn])
    later = np.append(np.cumsum(term[:0:-1])[::-1], 0.0)  # the sum of the terms above t
    square = np.full(len(t), np.nan)
    square[1:] = smoothed(got.square[1:] / schedule.snr[1:])
    return got, float(got.prior.mean()) + later, 127.5 * np.sqrt(square)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values for t = 1, 2, ... smoothed over t, because few pictures were drawn for each t.

    At each t a straight line is fitted to the values up to t / 10 away; nan where there are none.
    """
    out = np.full(len(values), np.nan)
    for k in range(len(values)):
        reach = (k + 1) // 10
        x = np.arange(max(k - reach, 0), min(k + reach + 1, len(values)))
        x = x[~np.isnan(values[x])]
        if len(x):
            out[k] = np.polynomial.Polynomial.fit(x - k, values[x], min(len(x) - 1, 1))(0.0)
    return out


@contextmanager
def counted() -> Iterator[list[int]]:
    """Record the bits of each message and of its gains, for as long as the context lasts."""
    bits: list[int] = []
    message, gains = search.encode, classes.write_gains

    def encode(*given: Any) -> Any:
        got = message(*given)
        bits.append(len(got[0]))
        return got

    def write_gains(*given: Any) -> Any:
        got = gains(*given)
        bits.append(len(got))
        return got

    with (
        mock.patch.object(search, "encode", encode),
        mock.patch.object(classes, "write_gains", write_gains),
    ):
        yield bits


def files_of(
    model: Model, shots: NDArray[np.uint8], ts: tuple[int, ...], effort: int | None
) -> Real:
    """Encode and decode each picture with these timesteps."""
    rows = []
    for seed, shot in enumerate(shots):
        header = make_header(Image.fromarray(shot), model, seed=seed, effort=effort, timesteps=ts)
        begin = time.perf_counter()
        with counted() as bits:
            encoder = Encoder(shot, header, model)
            for _ in ts:
                psnr = encoder.step()
        file, encoded = encoder.file(), time.perf_counter()
        decode(file, model=model)
        seconds = encoded - begin, time.perf_counter() - encoded
        rows.append((sum(bits) / shot.size, len(file), rmse_of(psnr), *seconds))
    return Real(*np.mean(rows, 0).tolist())


def rmse_of(psnr: float) -> float:
    """RMSE in grey levels of a PSNR in dB."""
    return 255 * 10 ** (-psnr / 20)


def figures(out: Path, rate: NDArray[np.float64], rmse: NDArray[np.float64]) -> None:
    """The paper's figure 5, with its points and ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    time, r, d = (np.array(c, dtype=float) for c in zip(*PAPER, strict=True))
    ours = len(rate) - 1 - np.arange(1, len(rate))
    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, (x, y), (a, b), labels in zip(
        axes,
        ((ours, rmse[1:]), (ours, rate[1:]), (rate[1:], rmse[1:])),
        ((time, d), (time, r), (r, d)),
        (("reverse process steps (T - t)", "distortion (RMSE)"),
         ("reverse process steps (T - t)", "rate (bits/dim)"),
         ("rate (bits/dim)", "distortion (RMSE)")),
        strict=True,
    ):  # fmt: skip
        ax.plot(x, y, label="this model")
        ax.plot(a, b, "o", mfc="none", label="Ho et al. 2020")
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
        ax.grid(alpha=0.3)
        ax.legend()
    for kind in ("png", "svg"):
        fig.savefig(out / f"paper.{kind}", dpi=130)


@click.command()
@click.option("--data", "paths", required=True, multiple=True, type=Path, help="32x32 pictures.")
@click.option("--model", default=None, help="A name or a file.  [default: cifar10]")
@click.option("--pictures", default=500, show_default=True, help="Pictures for the ideal columns.")
@click.option("--draws", default=60, show_default=True, help="Timesteps drawn for each of them.")
@click.option("--files", default=20, show_default=True, help="Pictures that are encoded to files.")
@click.option(
    "--effort", type=click.IntRange(1, 9),
    help="Effort of the encoder's search.  [default: the codec's]",
)  # fmt: skip
@click.option(
    "--variance", type=click.Choice(["beta", "posterior", "learned", "fitted"]), default="fitted",
    show_default=True, help="Variance of p(x_{t-1} | x_t) in the ideal columns.",
)  # fmt: skip
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=Path, help="Folder for the figures.")
def main(
    paths: tuple[Path, ...], model: str | None, pictures: int, draws: int, files: int,
    effort: int | None, variance: likelihood.Variance, threads: int, out: Path | None,
) -> None:  # fmt: skip
    """Print DDPM's progressive coding table, and the same for real files."""
    torch.set_num_threads(threads)
    loaded = get_small(model)
    x = data.small_pictures(paths)[:pictures]
    shots = x[:files].permute(0, 2, 3, 1).contiguous().numpy()
    got, rate, rmse = ideal_curves(loaded, data.to_unit(x), draws, variance)
    _, same, same_rmse = ideal_curves(loaded, data.to_unit(x[:files]), 5 * draws, variance)
    print(f"variance {variance}, {likelihood.text(got)}")
    print(f"ideal: {len(x)} pictures; files: the first {len(shots)}\n")
    print(
        "| steps | paper: rate | RMSE | ideal rate | RMSE | at the paper's rate | "
        "levels | messages | over ideal | of its RMSE | file, bytes | RMSE | encode, s | "
        "decode, s |"
    )
    print("|" + "---|" * 14)
    for steps, paper_rate, paper_rmse in PAPER:
        t = max(1, len(rate) - 1 - steps)
        ts = plan(loaded, shots[0].size // 3, t)
        real = files_of(loaded, shots, ts, effort)
        at_theirs = np.interp(paper_rate, rate[:0:-1], rmse[:0:-1])
        print(
            f"| {steps} | {paper_rate:.5f} | {paper_rmse:.2f} | {rate[t]:.5f} | {rmse[t]:.2f} | "
            f"{at_theirs:.2f} | {len(ts)} | {real.messages:.5f} | "
            f"{real.messages / max(same[t], 1e-9):.2f} | "
            f"{real.messages / max(np.interp(real.rmse, same_rmse[1:], same[1:]), 1e-9):.2f} | "
            f"{real.nbytes:.0f} | {real.rmse:.2f} | {real.encode:.2f} | {real.decode:.2f} |",
            flush=True,
        )
    if out:
        out.mkdir(parents=True, exist_ok=True)
        figures(out, rate, rmse)


if __name__ == "__main__":
    main()
