"""The two training tasks: the photo codec's bound over its states, and DDPM's objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import data
from ..diffusion import transform
from ..diffusion.parameterisation import from_x0, q_sample, to_x0
from ..diffusion.schedule import Schedule, snr_of
from ..network.conditioning import State, estimate, inputs, nominal, precondition, state_factors
from ..network.denoiser import Denoised, bare
from ..network.unet import UNetConfig
from ..paper.likelihood import term
from . import states
from .config import TrainConfig
from .crops import Crops

PATCH_AREA = 64 * 64  # progress is counted in patches of so many pixels, whatever the crops' size
DRAWN = 0.25  # share of a batch with randomly drawn states (states.draw); the others are walks
BIN_EDGES = (0.02, 0.2, 2.0, 20.0, 200.0, 4001.0)  # SNR bins in which the loss is reported


class Losses(NamedTuple):
    """The losses of one batch."""

    loss: Tensor  # () the objective, to be minimised
    eps: Tensor  # (B,) mean square error of eps
    # (B,) of Photo, the loss of the log-scales, nats per coefficient; of Pictures, the bound
    scale: Tensor
    snr: Tensor  # (B,)


class Task(Protocol):
    """A data set, the noisy states made from it, and a loss."""

    pictures: int  # number of pictures
    per_step: int  # progress that one step of one process makes, in patches or small pictures

    def load(self, seed: int, rank: int, world: int) -> None:
        """Read this process's share of the pictures. Raises DataError."""

    def start(self, nets: Sequence[nn.Module]) -> None:
        """Prepare new networks, on all processes in the same way."""

    def losses(self, model: nn.Module) -> Losses:
        """The losses of the next batch."""

    def validate(self, net: nn.Module) -> Bins | None:
        """Mean losses over fixed pictures with fixed noise; None without validation pictures."""


class Bins:
    """Mean losses in bins of SNR since the last report, kept on the device."""

    def __init__(self, device: str) -> None:
        self.edges = torch.tensor(BIN_EDGES[1:-1], device=device)
        self.reset()

    def reset(self) -> None:
        # Columns: number of pictures, sum of their eps losses, sum of their scale losses.
        self.sums = torch.zeros((len(BIN_EDGES) - 1, 3), device=self.edges.device)

    def add(self, eps: Tensor, scale: Tensor, snr: Tensor, share: Tensor | None = None) -> None:
        """All arguments (B,). share: 0 where a picture does not count, 1 elsewhere."""
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
    """Compute in bfloat16 where torch considers it precise enough."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16)


# --- The photo codec ---------------------------------------------------------------------------


def losses(net: nn.Module, c: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Each picture's eps loss and scale loss, (B,), and the predicted log-scales.

    c: (B, 192, h, w) coefficients of x_0, as are the log-scales. With log-SNR uniform, the eps loss
    is the bound on the code length (DDPM eq. 12 with its weights). The scale loss is the negative
    log-likelihood, in nats per coefficient and without its constant, of the error under the
    predicted Laplace distribution. Its gradient does not reach x0_hat.
    """
    sigma_data = bare(net).get_buffer("sigma_data")
    f = state_factors(state, sigma_data)
    x = precondition(state.m, f)
    x0_hat, log_scale = estimate(x, f, net(inputs(x, f, state.snr)))
    e = (c - x0_hat) * nominal(state).sqrt()
    scale = log_scale + e.detach().abs() * torch.exp(-log_scale)
    return e.square().mean((1, 2, 3)), scale.mean((1, 2, 3)), log_scale.detach()


def coefficients(x: Tensor) -> Tensor:
    """(B, 192, S / 8, S / 8) coefficients of crops (B, 3, S, S) uint8."""
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for pixels
        return transform.forward(data.to_unit(x))


def _laid_out(x: Tensor) -> Tensor:
    """x in one memory layout, because torch.compile compiles anew for every other one."""
    whole = x.dim() == 4 and x.shape[-1] > 1
    return x.contiguous(memory_format=torch.channels_last if whole else torch.contiguous_format)


def weight(snr: Tensor) -> Tensor:
    """Weight of the eps loss: the reciprocal of what a good network reaches at this SNR.

    Unweighted, the loss is the bound on the whole file's length, nearly all of which is spent at
    high SNR. But the codec is compared at every quality (BD-rate), where relative differences of
    rate count. Below SNR 1, where hardly any bits are spent, the weight is constant.
    """
    return 25.0 * snr.clamp(min=1.0) ** -0.25


class Photo:
    """Crops of photographs in the states of the codec's levels (states.Walk)."""

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
        self.compiled = torch.compile(losses) if device.startswith("cuda") else losses
        self.log_scale: Tensor | None = None  # predicted for the last batch

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
        if self.log_scale is None:
            self.walk = states.Walk(c, int(DRAWN * self.cfg.batch), self.generator)
        else:
            self.walk.step(self.log_scale, c)
        state = State(*(_laid_out(x) for x in self.walk.state))
        eps, scale, self.log_scale = self.compiled(model, _laid_out(self.walk.c), state)
        loss = (weight(state.snr) * eps).mean() + self.cfg.scale_weight * scale.mean()
        return Losses(loss, eps, scale, state.snr)

    def validate(self, net: nn.Module) -> Bins | None:
        return None if self.held_out is None else validate(net, self.held_out)


@torch.no_grad()
def validate(net: nn.Module, x: Tensor, weighted: float = 0.0) -> Bins:
    """Mean losses over crops (B, 3, S, S) in their states at all levels, with fixed noise."""
    bins = Bins(str(x.device))
    generator = torch.Generator(device=x.device).manual_seed(1)
    for crops in x.split(8):
        c = coefficients(crops)
        walk = states.Walk(c, 0, generator, weighted)
        unfinished = torch.ones(len(c), device=x.device)
        while bool(unfinished.any()):
            eps, scale, log_scale = losses(net, walk.c, walk.state)
            bins.add(eps, scale, walk.state.snr, unfinished)
            walk.step(log_scale, c)
            unfinished = unfinished * ~walk.new
    return bins


# --- The paper ---------------------------------------------------------------------------------


class Pictures:
    """Whole small pictures, t uniform in 1 .. T: the objectives of DDPM sections 3.2 to 3.4.

    ``simple`` is L_simple (eq. 14), the unweighted mean square error of the quantity that the
    network predicts; ``bound`` is the variational bound, in bits per dimension. A network that
    learns variances is trained by L_hybrid (Nichol and Dhariwal 2021): by ``simple`` for its mean,
    by the bound for its variances.

    ``log_snr`` gives shares of a batch log-SNR uniform in a range, in place of uniform t. This
    weights L_simple differently: uniform t spends 6 % of the work on the steps that make nine
    tenths of the bits, and 40 % on steps before the first bit. Importance weights keep the bound
    unbiased.

    ``coarse`` pictures, which have compression artefacts, are used at SNRs below ``coarse_below``
    only, where the noise hides the artefacts.
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
        # For each range its share and (4096,) timesteps with evenly spaced log-SNR. p: (T + 1,)
        # probability of each t.
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
        """Nothing needs to be measured."""

    def _draw(self, high: Tensor) -> Tensor:
        """Integers uniform in [0, high), one for each element of ``high``."""
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
        fine, every = torch.tensor([self.fine, len(self.x)], device=self.device)
        x = self.x[self._draw(torch.where(t < self.first_coarse, fine, every))]
        flip = self._draw(torch.full((n,), 2, device=self.device)).bool()
        x_0 = data.to_unit(torch.where(flip[:, None, None, None], x.flip(3), x))
        return self.losses_of(model, x_0, t, self.generator)

    def losses_of(
        self, model: nn.Module, x_0: Tensor, t: Tensor, generator: torch.Generator
    ) -> Losses:
        """The losses of given pictures x_0 (B, 3, H, W), in [-1, 1], at t (B,)."""
        prediction = self.net.prediction
        ab = torch.from_numpy(self.schedule.alpha_bar).to(t.device).float()[t][:, None, None, None]
        eps = torch.randn(x_0.shape, device=x_0.device, generator=generator)
        x_t = q_sample(x_0, ab, eps)
        with half(self.device):
            y, v = model(x_t.contiguous(memory_format=torch.channels_last), t.float())
        y = y.float()
        x0_hat = to_x0(prediction, y, x_t, ab)
        square = (snr_of(ab) * (x_0 - x0_hat).square()).mean((1, 2, 3))
        bound = torch.zeros_like(square)
        if self.cfg.objective == "bound" or v is not None:
            denoised = Denoised(x0_hat if self.cfg.objective == "bound" else x0_hat.detach(), v)
            nats, _ = term(
                lambda *_: denoised, x_0, t, self.schedule, self.cfg.variance, clip=False, x_t=x_t
            )
            bound = self.schedule.T * self.importance[t] * nats.float() / math.log(2)
        if self.cfg.objective == "bound":
            loss = bound.mean()
        else:
            target = from_x0(prediction, x_0, x_t, ab)
            # L_hybrid: the bound's gradient, with a small weight, reaches the variances alone.
            loss = (y - target).square().mean() + 1e-3 * bound.mean()
        return Losses(loss, square.detach(), bound.detach(), snr_of(ab).reshape(-1))

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
            got = self.losses_of(net, data.to_unit(x), t, generator)
            bins.add(got.eps, got.scale, got.snr)
        net.train()
        return bins
