"""What is trained: the photo codec's bound over every state it visits, and DDPM's objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import data
from ..diffusion import transform
from ..diffusion.likelihood import term
from ..diffusion.parameterisation import from_x0, q_sample, to_x0
from ..diffusion.schedule import Schedule
from ..network.denoiser import Denoised, State, eps_hat
from ..network.unet import UNet, UNetConfig
from . import states

if TYPE_CHECKING:
    from .train import TrainConfig

PATCH_AREA = 64 * 64  # progress is counted in patches of this many pixels, whatever the crop
DRAWN = 0.25  # share of a batch whose states do not follow from the network's own expectations
BIN_EDGES = (0.02, 0.2, 2.0, 20.0, 200.0, 4001.0)  # SNR bins in which the loss is reported


class Losses(NamedTuple):
    """Of one batch."""

    loss: Tensor  # (), what is minimised
    eps: Tensor  # (B,) mean square error of eps
    scale: Tensor  # (B,) of the scales, nats per coefficient
    snr: Tensor  # (B,)


class Task(Protocol):
    """Pictures, states made of them, and a loss."""

    pictures: int  # how many there are
    per_step: int  # progress of one step of one process

    def load(self, seed: int, rank: int, world: int) -> None:
        """Read this process's share of the pictures. Raises DataError."""

    def start(self, nets: Sequence[UNet]) -> None:
        """Prepare new networks, alike on all processes."""

    def losses(self, model: nn.Module) -> Losses:
        """Of the next batch."""

    def validate(self, net: UNet) -> Bins | None:
        """Mean losses over fixed pictures with fixed noise; None without any."""


class Bins:
    """Running mean of the loss in bins of SNR, since the last report."""

    def __init__(self) -> None:
        self.edges = torch.tensor(BIN_EDGES[1:-1])
        self.reset()

    def reset(self) -> None:
        self.sum = torch.zeros(len(BIN_EDGES) - 1)
        self.count = torch.zeros(len(BIN_EDGES) - 1)
        self.scale = 0.0

    def add(self, eps: Tensor, scale: Tensor, snr: Tensor) -> None:
        index = torch.bucketize(snr.cpu(), self.edges)
        self.sum.index_add_(0, index, eps.detach().float().cpu())
        self.count.index_add_(0, index, torch.ones(len(index)))
        self.scale += float(scale.detach().float().sum())

    def __str__(self) -> str:
        bins = " ".join(f"{v:.4f}" for v in self.sum / self.count.clamp(min=1))
        total = float(self.count.sum().clamp(min=1))
        return f"eps {float(self.sum.sum()) / total:.4f} [{bins}] scale {self.scale / total:.4f}"


def half(device: str) -> torch.autocast:
    """bfloat16 where that is exact enough."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16)


# --- The photo codec ---------------------------------------------------------------------------


def losses(
    net: nn.Module, c: Tensor, state: State, prediction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Per picture eps loss and scale loss, (B,) each, and lam. c: (B, 192, h, w) coefficients.

    With log-SNR uniform, the eps loss is the bound on the code length (DDPM eq. 12 with its
    weights). The scale loss is the negative log-likelihood, in nats per coefficient, of the error
    under the predicted Laplace distribution; the error itself is not trained by it.
    """
    eps, lam = eps_hat(net, state, prediction)
    assert lam is not None
    # (x_0 - x0_hat) / sigma, with x0_hat = M - sigma eps
    e = (c - state.m) * state.snr.sqrt()[:, None, None, None] + eps
    scale = lam + e.detach().abs() * torch.exp(-lam)
    return e.square().mean((1, 2, 3)), scale.mean((1, 2, 3)), lam.detach()


def coefficients(x: Tensor) -> Tensor:
    """(B, 192, S / 8, S / 8) of crops (B, 3, S, S) uint8."""
    with torch.autocast(x.device.type, enabled=False):  # eight bits are too few for pictures
        return transform.forward(data.to_unit(x))


def weight(snr: Tensor) -> Tensor:
    """Weight of the eps loss: one over what a good network reaches at this SNR.

    Unweighted, the loss is the bound on the whole file's length, nearly all of which is spent at
    high SNR. Compared at every quality (BD-rate) the share by which a rate is too high counts.
    Below SNR 1 there are next to no bits.
    """
    return 25.0 * snr.clamp(min=1.0) ** -0.25


class Photo:
    """Crops of photographs, on their way through the codec's levels (states.Walk)."""

    def __init__(
        self, folders: Sequence[Path], validation: Sequence[Path], cfg: TrainConfig,
        net: UNetConfig, device: str,
    ) -> None:  # fmt: skip
        self.cfg, self.net, self.device = cfg, net, device
        self.paths = data.list_pictures(folders)
        self.pictures = len(self.paths)
        self.per_step = max(1, cfg.batch * cfg.size**2 // PATCH_AREA)
        self.held_out = None
        if validation:
            crops = data.validation_crops(data.list_pictures(validation), 128, 24)
            self.held_out = crops.to(device)
        self.walk = states.Walk(cfg.batch, int(DRAWN * cfg.batch))
        self.lam: Tensor | None = None

    def load(self, seed: int, rank: int, world: int) -> None:
        self.source = data.Crops(self.paths[rank::world], self.cfg.size, seed)

    def start(self, nets: Sequence[UNet]) -> None:
        """Measure the bands' spread."""
        if self.net.prediction == "edm":
            c = coefficients(self.source.batch(256))
            spread = c.square().mean((0, 2, 3)).sqrt().to(self.device)
            if dist.is_initialized():
                dist.broadcast(spread, 0)
            for net in nets:
                net.get_buffer("spread").copy_(spread)

    def losses(self, model: nn.Module) -> Losses:
        if self.lam is None:
            self.crops = data.Prefetch(self.source, self.cfg.batch)
        else:
            self.walk.step(self.lam)
        new = self.crops.next(int(self.walk.new.sum()))
        self.walk.fill(coefficients(new.to(self.device)))
        state = self.walk.state
        with half(self.device):
            eps, scale, self.lam = losses(model, self.walk.c, state, self.net.prediction)
        loss = (weight(state.snr) * eps).mean() + self.cfg.scale_weight * scale.mean()
        return Losses(loss, eps, scale, state.snr.clone())

    def validate(self, net: UNet) -> Bins | None:
        return None if self.held_out is None else validate(net, self.held_out, half(self.device))


@torch.no_grad()
def validate(net: UNet, x: Tensor, autocast: torch.autocast) -> Bins:
    """Mean losses over fixed crops (B, 3, S, S) on their way through all levels, fixed noise."""
    net.eval()
    bins = Bins()
    generator = torch.Generator(device=x.device).manual_seed(1)
    for crops in x.split(8):
        walk = states.Walk(len(crops), 0, generator)
        walk.fill(coefficients(crops))
        here = torch.ones_like(walk.new)
        while here.any():
            with autocast:
                eps, scale, lam = losses(net, walk.c, walk.state, net.cfg.prediction)
            bins.add(eps[here], scale[here], walk.state.snr[here])
            walk.step(lam)
            here &= ~walk.new
    net.train()
    return bins


# --- The paper ---------------------------------------------------------------------------------


class Pictures:
    """Whole small pictures, t uniform in 1 .. T: the objectives of DDPM sections 3.2 to 3.4.

    ``simple`` is L_simple (eq. 14), unweighted in what the network predicts; ``bound`` the
    variational bound itself, in bits per dimension. A network with variances is trained on
    ``simple`` for its mean and on the bound for them (Nichol and Dhariwal 2021, L_hybrid).

    With ``log_snr`` shares of a batch have log-SNR uniform in a range, in place of t. Of L_simple
    this is another weighting: uniform t gives 6 % of the work to the steps that make nine tenths of
    the bits, and 40 % to those before the first. The bound stays what it is, by importance weights.

    Pictures with errors of their own serve at SNRs below ``coarse_below`` alone: what compression
    has taken from them is missed long before their errors stand out of the noise.
    """

    def __init__(
        self, paths: Sequence[Path], validation: Sequence[Path], coarse: Sequence[Path],
        cfg: TrainConfig, net: UNetConfig, device: str,
    ) -> None:  # fmt: skip
        self.cfg, self.net, self.device = cfg, net, device
        self.schedule = Schedule()
        fine = data.small_pictures(paths)
        self.x = torch.cat([fine, data.small_pictures(coarse)]) if coarse else fine
        self.fine = len(fine)
        self.pictures, self.per_step = len(self.x), cfg.batch
        self.first_coarse = int(self.schedule.time(cfg.coarse_below)) + 1
        T, snr = self.schedule.T, self.schedule.snr
        # Of each range (4096,) timesteps with evenly spaced log-SNR; how probable (T + 1,) each t
        # becomes.
        self.even = []
        p = np.full(T + 1, (1 - sum(share for share, *_ in cfg.log_snr)) / T)
        for share, low, high in cfg.log_snr:
            first, last = np.log(np.clip([low, high], snr[T], snr[1])).tolist()
            even = [round(self.schedule.time(s)) for s in np.exp(np.linspace(first, last, 4096))]
            self.even.append((share, torch.tensor(even, device=device)))
            p += share * np.bincount(even, minlength=T + 1) / 4096
        self.importance = torch.from_numpy(1 / (T * p)).float().to(device)
        self.held_out = data.small_pictures(validation)[:256].to(device) if validation else None

    def load(self, seed: int, rank: int, world: int) -> None:
        self.x = self.x.to(self.device)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def start(self, nets: Sequence[UNet]) -> None:
        """There is nothing to measure."""

    def _draw(self, high: Tensor) -> Tensor:
        """Whole numbers, each uniform below its ``high``."""
        u = torch.rand(len(high), device=self.device, generator=self.generator)
        return (u * high).long().minimum(high - 1)

    def losses(self, model: nn.Module) -> Losses:
        n, T = self.cfg.batch, self.schedule.T
        t = 1 + self._draw(torch.full((n,), T, device=self.device))
        begin = 0
        for share, even in self.even:
            part = slice(begin, begin + round(share * n))
            t[part] = even[self._draw(torch.full_like(t[part], len(even)))]
            begin = part.stop
        few, many = torch.tensor([self.fine, len(self.x)], device=self.device)
        x = self.x[self._draw(torch.where(t < self.first_coarse, few, many))]
        flip = self._draw(torch.full((n,), 2, device=self.device)).bool()
        x_0 = data.to_unit(torch.where(flip[:, None, None, None], x.flip(3), x))
        return self.of(model, x_0, t, self.generator)

    def of(self, model: nn.Module, x_0: Tensor, t: Tensor, generator: torch.Generator) -> Losses:
        """x_0: (B, 3, H, W) in [-1, 1]; t: (B,)."""
        prediction = self.net.prediction
        ab = torch.from_numpy(self.schedule.alpha_bar).to(t.device).float()[t][:, None, None, None]
        eps = torch.randn(x_0.shape, device=x_0.device, generator=generator)
        x_t = q_sample(x_0, ab, eps)
        with half(self.device):
            y, _, v = model(x_t.contiguous(memory_format=torch.channels_last), t.float())
        y = y.float()
        x0_hat = to_x0(prediction, y, x_t, ab)
        square = (ab / (1 - ab) * (x_0 - x0_hat).square()).mean((1, 2, 3))
        bound = torch.zeros_like(square)
        if self.cfg.objective == "bound" or v is not None:
            said = Denoised(x0_hat if self.cfg.objective == "bound" else x0_hat.detach(), v)
            nats, _ = term(
                lambda *_: said, x_0, t, self.schedule, self.cfg.variance, clip=False, x_t=x_t
            )
            bound = self.schedule.T * self.importance[t] * nats.float() / math.log(2)
        if self.cfg.objective == "bound":
            loss = bound.mean()
        else:
            target = from_x0(prediction, x_0, x_t, ab)
            # L_hybrid: the bound's gradient reaches the variances alone, and gently.
            loss = (y - target).square().mean() + 1e-3 * bound.mean()
        return Losses(loss, square.detach(), bound.detach(), (ab / (1 - ab)).reshape(-1))

    @torch.no_grad()
    def validate(self, net: UNet) -> Bins | None:
        if self.held_out is None:
            return None
        net.eval()
        bins = Bins()
        generator = torch.Generator(device=self.device).manual_seed(1)
        n = len(self.held_out)
        ts = torch.linspace(1, self.schedule.T, n, device=self.device).round().long()
        for x, t in zip(self.held_out.split(64), ts.split(64), strict=True):
            got = self.of(net, data.to_unit(x), t, generator)
            bins.add(got.eps, got.scale, got.snr)
        net.train()
        return bins
