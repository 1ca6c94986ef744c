"""Training of the photo model: the variational bound over every state the codec can visit."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import data, states, transform
from .denoiser import eps_hat
from .errors import ModelError
from .modelfile import unet_config
from .network import UNet, UNetConfig
from .optimizer import Optimizer

PATCH_AREA = 64 * 64  # progress is counted in patches of this many pixels, whatever the crop
DRAWN = 0.25  # share of a batch whose states do not follow from the network's own expectations
BIN_EDGES = (0.02, 0.2, 2.0, 20.0, 200.0, 4001.0)  # SNR bins in which the loss is reported


@dataclass(frozen=True)
class TrainConfig:
    patches: int = 1_000_000  # length of the run, in 64x64 patches
    size: int = 128  # side of a crop
    batch: int = 16  # crops per step and process
    lr: float = 6e-4
    warmup: int = 400  # steps
    decay: float = 0.3  # the last part of the run over which the rate falls to zero
    weight_decay: float = 1e-3
    clip: float = 1.0
    optimizer: Literal["muon", "adamw"] = "muon"
    ema: float = 0.9995
    scale_weight: float = 0.3  # weight of the scales' log-likelihood beside the eps loss
    seed: int = 0


@dataclass
class Progress:
    """Where a run stands; stored in its checkpoint."""

    step: int = 0
    patches: int = 0
    seconds: float = 0.0
    earlier: int = 0  # patches that the weights it started from had seen


def losses(
    net: nn.Module, c: Tensor, state: states.State, prediction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Per picture eps loss and scale loss, (B,) each, and lam. c: (B, 192, h, w) coefficients.

    With log-SNR uniform, the eps loss is the bound on the code length (DDPM eq. 12 with its
    weights). The scale loss is the negative log-likelihood, in nats per coefficient, of the error
    under the predicted Laplace distribution; the error itself is not trained by it.
    """
    eps, lam = eps_hat(net, state, prediction)
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


@torch.no_grad()
def band_spread(source: data.Crops, n: int = 256) -> Tensor:
    """(192,) root mean square of each band over ``n`` crops."""
    c = transform.forward(data.to_unit(source.batch(n)))
    return c.square().mean((0, 2, 3)).sqrt()


def learning_rate(cfg: TrainConfig, progress: Progress) -> float:
    """Linear warm-up, constant, linear to zero over the last ``decay`` of the run."""
    done = progress.patches / cfg.patches
    return cfg.lr * min(1.0, (progress.step + 1) / cfg.warmup, max(0.0, (1 - done) / cfg.decay))


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


def save_checkpoint(
    path: Path,
    net: nn.Module,
    ema: nn.Module,
    opt: Optimizer,
    progress: Progress,
    cfg: UNetConfig,
) -> None:
    """Everything needed to go on, in one safetensors file, replaced atomically."""
    tensors = {f"net.{name}": p.detach() for name, p in net.named_parameters()}
    tensors |= {f"ema.{name}": p.detach() for name, p in ema.state_dict().items()}
    tensors |= {f"opt.{name}": p for name, p in opt.tensors().items()}
    tensors = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}
    metadata = {"network": json.dumps(asdict(cfg)), "progress": json.dumps(asdict(progress))}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, net: nn.Module, ema: nn.Module, opt: Optimizer, cfg: UNetConfig
) -> Progress:
    """Restore :func:`save_checkpoint`. Raises ModelError if it is damaged or another network's."""
    try:
        with safe_open(path, "pt") as f, torch.no_grad():
            metadata = dict(f.metadata() or {})
            if unet_config(json.loads(metadata["network"])) != cfg:
                raise ModelError(f"{path}: checkpoint of another network")
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            for name, p in net.named_parameters():
                p.copy_(tensors[f"net.{name}"])
            for name, tensor in ema.state_dict().items():
                tensor.copy_(tensors[f"ema.{name}"])
            for name, tensor in net.named_buffers():
                tensor.copy_(tensors[f"ema.{name}"])
            opt.restore({k[4:]: v for k, v in tensors.items() if k.startswith("opt.")})
            return Progress(**json.loads(metadata["progress"]))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ModelError(f"{path}: not a checkpoint ({str(e).splitlines()[0]})") from None


def start_from(path: Path, net: UNet) -> Progress:
    """The weights of a model file, or the averaged ones of a checkpoint. Raises ModelError."""
    try:
        with safe_open(path, "pt") as f:
            before = Progress(**json.loads((f.metadata() or {}).get("progress", "{}")))
            if unet_config(json.loads((f.metadata() or {}).get("network", "{}"))) != net.cfg:
                raise ModelError(f"{path}: another network")
            kind = "ema." if any(k.startswith("ema.") for k in f.keys()) else "net."  # noqa: SIM118
            weights = {k[4:]: f.get_tensor(k).float() for k in f.keys() if k.startswith(kind)}  # noqa: SIM118
        net.load_state_dict(weights)
        return Progress(earlier=before.patches + before.earlier)
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as e:
        raise ModelError(f"{path}: no model to start from ({str(e).splitlines()[0]})") from None


def train(
    folders: Sequence[Path],
    checkpoint: Path,
    net_cfg: UNetConfig,
    cfg: TrainConfig,
    validation: Sequence[Path] = (),
    device: str = "cpu",
    report_every: int = 50,
    save_seconds: float = 300.0,
    dry_run: bool = False,
    start: Path | None = None,
) -> Progress:
    """Train, or go on from ``checkpoint`` where it exists. Under torchrun, on every process.

    start: a model or checkpoint whose weights a new run begins with. Returns the progress made.
    Raises DataError without pictures, ModelError for a checkpoint of another network.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"

    def say(text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    torch.manual_seed(cfg.seed)
    net = UNet(net_cfg).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress = Progress()
    if start is not None and not checkpoint.exists():
        progress = start_from(start, net)
    ema = copy.deepcopy(net).requires_grad_(False)
    opt = Optimizer(net, cfg.lr, cfg.weight_decay, cfg.optimizer == "muon")
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, net, ema, opt, net_cfg)
        say(f"resumed {checkpoint} at step {progress.step}, {progress.patches} patches")
    torch.manual_seed(cfg.seed + 1000 * progress.step + rank)
    paths = data.list_pictures(folders)
    say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(paths)} pictures")
    if dry_run:
        return progress
    source = data.Crops(paths[rank::world], cfg.size, cfg.seed + 1000 * progress.step + rank)
    if progress.step == 0 and start is None and net_cfg.prediction == "edm":
        spread = band_spread(source).to(device)
        if world > 1:
            dist.broadcast(spread, 0)
        net.get_buffer("spread").copy_(spread)
        ema.get_buffer("spread").copy_(spread)
    crops = data.Prefetch(source, cfg.batch)
    walk = states.Walk(cfg.batch, int(DRAWN * cfg.batch))
    held_out = None
    if validation:
        held_out = data.validation_crops(data.list_pictures(validation), 128, 24).to(device)
    model: nn.Module = DistributedDataParallel(net) if world > 1 else net
    autocast = torch.autocast(device.split(":")[0], dtype=torch.bfloat16)
    per_step = max(1, cfg.batch * cfg.size**2 * world // PATCH_AREA)
    bins, saved, since, begin = Bins(), time.monotonic(), progress.patches, time.monotonic()

    bar = click.progressbar(
        length=cfg.patches, label="patches", item_show_func=lambda text: text, file=sys.stderr,
        hidden=rank != 0 or not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        bar.update(progress.patches)
        while progress.patches < cfg.patches:
            at = time.monotonic()
            walk.fill(coefficients(crops.next(int(walk.new.sum())).to(device)))
            snr = walk.state.snr.clone()
            with autocast:
                eps, scale, lam = losses(model, walk.c, walk.state, net_cfg.prediction)
                loss = (weight(snr) * eps).mean() + cfg.scale_weight * scale.mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
            if bool(torch.isfinite(norm)):
                opt.step(learning_rate(cfg, progress))
            net.zero_grad()
            keep = min(cfg.ema, (1 + progress.step) / (10 + progress.step))
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - keep)
            progress.step += 1
            progress.patches += per_step
            progress.seconds += time.monotonic() - at
            walk.step(lam)
            bins.add(eps, scale, snr)
            speed = per_step / (time.monotonic() - at)
            bar.update(per_step, f"loss {float(loss.detach()):.3f}, {speed:.0f} patches/s")
            last = progress.patches >= cfg.patches
            if progress.step % report_every == 0 or last:
                speed = (progress.patches - since) / (time.monotonic() - begin)
                say(
                    f"step {progress.step} {progress.patches / cfg.patches:6.1%} {bins} "
                    f"{speed:.0f} patches/s"
                )
                bins.reset()
                since, begin = progress.patches, time.monotonic()
            if rank == 0 and (last or time.monotonic() - saved > save_seconds):
                save_checkpoint(checkpoint, net, ema, opt, progress, net_cfg)
                saved = time.monotonic()
                if held_out is not None:
                    say(f"step {progress.step} validation {validate(ema, held_out, autocast)}")
                begin += time.monotonic() - saved
    if world > 1:
        dist.destroy_process_group()
    return progress
