"""Sampling: DDPM's Algorithm 2 and deterministic DDIM, over any subsequence of timesteps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import data
from ..diffusion import transform
from ..diffusion.parameterisation import from_x0, posterior, q_sample
from ..diffusion.schedule import Schedule
from ..errors import ImageError
from ..network.computing import computing
from ..network.denoiser import Denoiser, of_pictures
from ..network.modelfile import get_small
from .likelihood import Variance, sigma2


class Step(NamedTuple):
    """The state after one step."""

    t: int
    x_t: Tensor  # (B, C, H, W)
    x0_hat: Tensor  # the network's prediction from the state before


def respaced(schedule: Schedule, steps: int, start: int | None = None) -> list[int]:
    """``steps`` evenly spaced timesteps from ``start`` (default T) down to 1."""
    start = start or schedule.T
    ts = torch.linspace(start, 1, min(steps, start), dtype=torch.float64).round().int()
    return sorted({int(t) for t in ts}, reverse=True)


@torch.no_grad()
def ancestral(
    denoise: Denoiser, x_t: Tensor, ts: Sequence[int], schedule: Schedule,
    variance: Variance = "posterior", generator: torch.Generator | None = None, clip: bool = True,
) -> Iterator[Step]:  # fmt: skip
    """DDPM's Algorithm 2 from x_t at ts[0] through all ts to x_0; the last step adds no noise."""
    ab = torch.from_numpy(schedule.alpha_bar).to(x_t.device)
    for t, s in zip(ts, [*ts[1:], 0], strict=True):
        time = torch.full((len(x_t),), t, device=x_t.device)
        denoised = denoise(x_t.float(), time)
        x0_hat = denoised.x_0.double().clamp(-1, 1) if clip else denoised.x_0.double()
        mean, _ = posterior(x0_hat, x_t.double(), ab[s], ab[t])
        if s > 0:
            var = sigma2(schedule, time, torch.full_like(time, s), variance, denoised)
            noise = torch.randn(x_t.shape, generator=generator, device=x_t.device)
            if variance == "fitted":
                mean = mean + transform.inverse(var.sqrt() * transform.forward(noise.double()))
            else:
                mean = mean + var.sqrt() * noise
        x_t = mean
        yield Step(s, x_t, x0_hat)


@torch.no_grad()
def ddim(
    denoise: Denoiser, x_t: Tensor, ts: Sequence[int], schedule: Schedule, clip: bool = True
) -> Iterator[Step]:
    """Deterministic sampling (Song et al. 2021, eq. 12 with sigma = 0)."""
    ab = torch.from_numpy(schedule.alpha_bar).to(x_t.device)
    for t, s in zip(ts, [*ts[1:], 0], strict=True):
        time = torch.full((len(x_t),), t, device=x_t.device)
        x0_hat = denoise(x_t.float(), time).x_0.double()
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        eps = from_x0("eps", x0_hat, x_t.double(), ab[t])
        x_t = q_sample(x0_hat, ab[s], eps)
        yield Step(s, x_t, x0_hat)


def interpolate(
    denoise: Denoiser, a: Tensor, b: Tensor, lam: Sequence[float], ts: Sequence[int],
    schedule: Schedule, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Interpolate between two pictures in latents at ts[0] (DDPM section 4.4).

    a, b: (C, H, W) in [-1, 1]. Both get the same noise, are mixed as (1 - lam) a_t + lam b_t for
    each of ``lam``, and denoised by Algorithm 2. Returns (len(lam), C, H, W).
    """
    ab = torch.tensor(float(schedule.alpha_bar[ts[0]]), dtype=torch.float64, device=a.device)
    eps = torch.randn(a.shape, generator=generator, device=a.device)
    a_t, b_t = (q_sample(x.double(), ab, eps) for x in (a, b))
    x_t = torch.stack([(1 - w) * a_t + w * b_t for w in lam])
    *_, end = ancestral(denoise, x_t, ts, schedule, generator=generator)
    return end.x_t


@torch.no_grad()
def sample(
    denoise: Denoiser, n: int, schedule: Schedule, *, steps: int = 1000, shared: int | None = None,
    deterministic: bool = False, variance: Variance = "posterior", seed: int = 0, side: int = 32,
    device: str = "cpu",
) -> Iterator[Step]:  # fmt: skip
    """Draw n pictures, yielding every step; ``steps`` of the timesteps are visited.

    shared: the pictures have x_t in common down to this timestep, or to the last visited one that
    is not below it (DDPM figure 7).
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    ts = respaced(schedule, steps)

    def run(x_t: Tensor, ts: Sequence[int]) -> Iterator[Step]:
        if deterministic:
            return ddim(denoise, x_t, ts, schedule)
        return ancestral(denoise, x_t, ts, schedule, variance, generator)

    first = n if shared is None else 1
    x_t = torch.randn((first, 3, side, side), generator=generator, device=device)
    if shared is not None:
        common = [t for t in ts if t >= shared] or ts[:1]
        for step in islice(run(x_t, common), len(common) - 1):  # without the step to x_0
            x_t = step.x_t
        x_t, ts = x_t.repeat(n, 1, 1, 1), [t for t in ts if t <= common[-1]]
    yield from run(x_t, ts)


def film(path: Iterable[Step], columns: int, last: int) -> Tensor:
    """(B * columns, C, H, W): x0_hat after ``columns`` of ``last`` steps, a row per picture."""
    wanted = {round(k) for k in torch.linspace(0, last - 1, min(columns, last)).tolist()}
    frames = [step.x0_hat for k, step in enumerate(path) if k in wanted]
    return torch.stack(frames, 1).flatten(0, 1)


def contact_sheet(x: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """One picture that shows x (N, 3, H, W), in [-1, 1], in rows of ``columns``."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    n, h, w, _ = pixels.shape
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for k, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture), (k % columns * (w + gap), k // columns * (h + gap)))
    return sheet


def nearest(x: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each of x (N, C, H, W) the index of the nearest picture, and its RMS distance, (N,)."""
    distances = torch.cdist(x.flatten(1).float(), among.flatten(1).float())
    least = distances.min(1)
    return least.indices, least.values / x[0].numel() ** 0.5


@computing()
def sampled_sheet(
    model: str | None, device: str, columns: int | None, among: Path | None,
    progress: Callable[[int, int], None] | None = None, *, n: int, steps: int, **how: Any,
) -> Image.Image:  # fmt: skip
    """The picture that ``ddpmc sample`` writes. Raises ModelError, DataError."""
    schedule = Schedule()
    loaded = get_small(model, device)
    denoise = of_pictures(loaded.unet, schedule, loaded.error_at)

    def path() -> Iterator[Step]:
        for k, step in enumerate(sample(denoise, n, schedule, steps=steps, device=device, **how)):
            if progress:
                progress(k + 1, steps)
            yield step

    if columns:
        taken = list(path())
        return contact_sheet(film(taken, columns, len(taken)), min(columns, len(taken)))
    *_, end = path()
    x = end.x_t.float().cpu()
    if among is None:
        return contact_sheet(x, math.ceil(n**0.5))
    others = data.to_unit(data.small_pictures([among]))
    index, _ = nearest(x, others)
    return contact_sheet(torch.cat([x, others[index]]), n)


@computing()
def interpolated_sheet(
    model: str | None, device: str, a: Image.Image, b: Image.Image, lam: Sequence[float],
    *, start: int, steps: int, seed: int,
) -> Image.Image:  # fmt: skip
    """The picture that ``ddpmc interpolate`` writes.

    Raises ModelError, and ImageError unless the pictures' sizes are equal and multiples of 8.
    """
    if a.size != b.size or a.width % 8 or a.height % 8:
        raise ImageError("both pictures must have the same size, a multiple of 8")
    schedule = Schedule()
    loaded = get_small(model, device)
    denoise = of_pictures(loaded.unet, schedule, loaded.error_at)
    x, y = (data.to_unit(torch.from_numpy(np.array(i)).permute(2, 0, 1)).to(device) for i in (a, b))
    generator = torch.Generator(device=device).manual_seed(seed)
    ts = respaced(schedule, steps, min(start, schedule.T))
    mixed = interpolate(denoise, x, y, lam, ts, schedule, generator).float()
    return contact_sheet(torch.cat([x[None], mixed, y[None]]).cpu(), len(lam) + 2)
