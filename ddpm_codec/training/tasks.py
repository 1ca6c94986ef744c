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
from ..network.conditioning import State, estimate, inputs, nominal, of_state, seen
from ..network.denoiser import Denoised, bare
from ..network.unet import UNetConfig
from . import states
from .crops import Crops

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

    def start(self, nets: Sequence[nn.Module]) -> None:
        """Prepare new networks, alike on all processes."""

    def losses(self, model: nn.Module) -> Losses:
        """Of the next batch."""

    def validate(self, net: nn.Module) -> Bins | None:
        """Mean losses over fixed pictures with fixed noise; None without any."""


class Bins:
    """Running mean of the loss in bins of SNR, since the last report; kept on the device."""

    def __init__(self, device: str) -> None:
        self.edges = torch.tensor(BIN_EDGES[1:-1], device=device)
        self.reset()

    def reset(self) -> None:
        # Of each bin: how many, their losses, and those of the scales.
        self.sums = torch.zeros((len(BIN_EDGES) - 1, 3), device=self.edges.device)

    def add(self, eps: Tensor, scale: Tensor, snr: Tensor, share: Tensor | None = None) -> None:
        """share: (B,) 0 where a picture does not count."""
        values = torch.stack([torch.ones_like(snr), eps.float(), scale.float()], dim=1).detach()
        if share is not None:
            values = values * share[:, None]
        self.sums.index_add_(0, torch.bucketize(snr, self.edges), values)

    @property
    def eps(self) -> float:
        return float(self.sums[:, 1].sum() / self.sums[:, 0].sum().clamp(min=1))

    def __str__(self) -> str:
        n, eps, scale = self.sums.cpu().unbind(1)
        bins = " ".join(f"{v:.4f}" for v in eps / n.clamp(min=1))
        total = float(n.sum().clamp(min=1))
        return f"eps {float(eps.sum()) / total:.4f} [{bins}] scale {float(scale.sum()) / total:.4f}"


def half(device: str) -> torch.autocast:
    """bfloat16 where that is exact enough."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16)


# --- The photo codec ---------------------------------------------------------------------------


def losses(net: nn.Module, c: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Per picture eps loss and scale loss, (B,) each, and lam. c: (B, 192, h, w) coefficients.

    With log-SNR uniform, the eps loss is the bound on the code length (DDPM eq. 12 with its
    weights). The scale loss is the negative log-likelihood, in nats per coefficient, of the error
    under the predicted Laplace distribution; the error itself is not trained by it.
    """
    sigma_data = bare(net).get_buffer("sigma_data")
    f = of_state(state, sigma_data)
    read = seen(state.m, f)
    x0_hat, lam = estimate(read, f, net(inputs(read, f, state.snr)))
    e = (c - x0_hat) * nominal(state).sqrt()
    scale = lam + e.detach().abs() * torch.exp(-lam)
    return e.square().mean((1, 2, 3)), scale.mean((1, 2, 3)), lam.detach()


def coefficients(x: Tensor) -> Tensor:
    """(B, 192, S / 8, S / 8) of crops (B, 3, S, S) uint8."""
    with torch.autocast(x.device.type, enabled=False):  # eight bits are too few for pictures
        return transform.forward(data.to_unit(x))


def _laid_out(x: Tensor) -> Tensor:
    """In one memory layout, whatever made it: another would be compiled for anew."""
    whole = x.dim() == 4 and x.shape[-1] > 1
    return x.contiguous(memory_format=torch.channels_last if whole else torch.contiguous_format)


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
        self, folders: Sequence[Path], validation: Sequence[Path], cfg: TrainConfig, device: str
    ) -> None:
        self.cfg, self.device = cfg, device
        self.paths = data.list_pictures(folders)
        self.pictures = len(self.paths)
        self.per_step = max(1, cfg.batch * cfg.size**2 // PATCH_AREA)
        self.held_out = None
        if validation:
            crops = data.validation_crops(data.list_pictures(validation), 128, 24)
            self.held_out = crops.to(device)
        # Compiled, a step on a GPU takes half the time; on a processor compiling takes minutes.
        self.of = torch.compile(losses) if device.startswith("cuda") else losses
        self.lam: Tensor | None = None

    def load(self, seed: int, rank: int, world: int) -> None:
        self.crops = Crops(self.paths[rank::world], self.cfg.size, seed, self.device)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def start(self, nets: Sequence[nn.Module]) -> None:
        """Measure the bands' standard deviations."""
        c = torch.cat([coefficients(self.crops.batch(64)) for _ in range(16)])
        sigma_data = c.square().mean((0, 2, 3)).sqrt()
        if dist.is_initialized():
            dist.broadcast(sigma_data, 0)
        for net in nets:
            net.get_buffer("sigma_data").copy_(sigma_data)

    def losses(self, model: nn.Module) -> Losses:
        c = coefficients(self.crops.batch(self.cfg.batch))
        if self.lam is None:
            self.walk = states.Walk(c, int(DRAWN * self.cfg.batch), self.generator)
        else:
            self.walk.step(self.lam, c)
        state = State(*(_laid_out(x) for x in self.walk.state))
        eps, scale, self.lam = self.of(model, _laid_out(self.walk.c), state)
        loss = (weight(state.snr) * eps).mean() + self.cfg.scale_weight * scale.mean()
        return Losses(loss, eps, scale, state.snr)

    def validate(self, net: nn.Module) -> Bins | None:
        return None if self.held_out is None else validate(net, self.held_out)


@torch.no_grad()
def validate(net: nn.Module, x: Tensor, weighted: float = 0.0) -> Bins:
    """Mean losses over fixed crops (B, 3, S, S) on their way through all levels, fixed noise."""
    bins = Bins(str(x.device))
    generator = torch.Generator(device=x.device).manual_seed(1)
    for crops in x.split(8):
        c = coefficients(crops)
        walk = states.Walk(c, 0, generator, weighted)
        here = torch.ones(len(c), device=x.device)
        while bool(here.any()):
            eps, scale, lam = losses(net, walk.c, walk.state)
            bins.add(eps, scale, walk.state.snr, here)
            walk.step(lam, c)
            here = here * ~walk.new
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

    def start(self, nets: Sequence[nn.Module]) -> None:
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
            y, v = model(x_t.contiguous(memory_format=torch.channels_last), t.float())
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
    def validate(self, net: nn.Module) -> Bins | None:
        if self.held_out is None:
            return None
        net.eval()
        bins = Bins(self.device)
        generator = torch.Generator(device=self.device).manual_seed(1)
        n = len(self.held_out)
        ts = torch.linspace(1, self.schedule.T, n, device=self.device).round().long()
        for x, t in zip(self.held_out.split(64), ts.split(64), strict=True):
            got = self.of(net, data.to_unit(x), t, generator)
            bins.add(got.eps, got.scale, got.snr)
        net.train()
        return bins
