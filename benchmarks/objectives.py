"""DDPM's Table 2 at a small scale: what the network predicts, and which loss is minimised.

    python benchmarks/objectives.py --data TRAIN --val TEST [--pictures 30000]

Trains a small network for each row, from the same initial weights on the same pictures. Prints the
variational bound on held-out pictures (bits/dim, with its standard error over pictures) and the
Frechet distance of samples (frechet.py). The paper trains a network of 36 million parameters on a
hundred million pictures, this script a small one on some ten thousand. So the figures are not the
paper's, and only differences far above the standard error mean something. Needs the extra
``bench``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import click
import frechet
import torch

from ddpm_codec import data
from ddpm_codec.diffusion.schedule import Schedule
from ddpm_codec.network.denoiser import of_pictures
from ddpm_codec.network.modelfile import preset_config
from ddpm_codec.paper.likelihood import Variance, code_length
from ddpm_codec.training.calibrate import load_averaged
from ddpm_codec.training.train import TrainConfig, train


class Row(NamedTuple):
    """One row of the table."""

    prediction: str
    objective: Literal["simple", "bound"]
    variance: Variance


ROWS = (
    Row("mu", "bound", "learned"),
    Row("mu", "bound", "posterior"),
    Row("mu", "simple", "posterior"),
    Row("eps", "bound", "learned"),
    Row("eps", "bound", "posterior"),
    Row("eps", "simple", "posterior"),
    Row("eps", "simple", "beta"),
    Row("x0", "simple", "posterior"),
    Row("v", "simple", "posterior"),
)
NAMES = {"simple": "plain mean square", "bound": "variational bound L"}


@click.command()
@click.option("--data", "paths", required=True, multiple=True, type=Path, help="32x32 pictures.")
@click.option("--val", required=True, multiple=True, type=Path, help="Held-out 32x32 pictures.")
@click.option(
    "--pictures", default=30_000, show_default=True, help="Training pictures of each run."
)
@click.option("--batch", default=64, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option(
    "--channels",
    default="32,64,64",
    show_default=True,
    help="Channels of the networks at each resolution.",
)
@click.option("--test", default=256, show_default=True, help="Held-out pictures for the bound.")
@click.option("--draws", default=60, show_default=True, help="Timesteps drawn for each of them.")
@click.option("--samples", default=256, show_default=True, help="Samples for the Frechet distance.")
@click.option("--steps", default=50, show_default=True, help="Timesteps for each sample.")
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    paths: tuple[Path, ...], val: tuple[Path, ...], pictures: int, batch: int, lr: float,
    channels: str, test: int, draws: int, samples: int, steps: int, threads: int, seed: int,
) -> None:  # fmt: skip
    """Train small networks for the rows of DDPM's Table 2, and compare them."""
    torch.set_num_threads(threads)
    schedule = Schedule()
    held_out = data.to_unit(data.small_pictures(val))
    reference = frechet.moments(frechet.features(held_out[: max(samples, test)]))
    widths = tuple(int(c) for c in channels.split(","))
    print(
        f"networks {channels}, {pictures} pictures each, batch {batch}; {test} test pictures, "
        f"{samples} samples of {steps} steps\n"
    )
    print("| predicts | minimised | sigma^2 | bits/dim | +- | Frechet distance |")
    print("|---|---|---|---|---|---|")
    for row in ROWS:
        learned = row.variance == "learned"
        net_cfg = preset_config(
            "cifar10",
            {"channels": widths, "prediction": row.prediction, "variance": learned, "dropout": 0.0},
        )
        cfg = TrainConfig(
            patches=pictures, batch=batch, lr=lr, warmup=50, decay=0.5, ema=0.99,
            objective=row.objective, variance=row.variance, seed=seed,
        )  # fmt: skip
        with TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "run.ckpt"
            train(list(paths), checkpoint, net_cfg, cfg, report_every=10**9)
            net, _ = load_averaged(checkpoint)
        denoise = of_pictures(net, schedule)
        got = code_length(denoise, held_out[:test], schedule, row.variance, draws)
        total, error = got.total
        drawn = frechet.samples(denoise, samples, steps, seed)
        distance = frechet.distance(frechet.moments(frechet.features(drawn)), reference)
        print(
            f"| {row.prediction} | {NAMES[row.objective]} | {row.variance} | {total:.3f} | "
            f"{error:.3f} | {distance:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
