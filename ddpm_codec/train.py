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

PATCH_AREA = 64 * 64  # progress is counted in patches of this many pixels, whatever the crop
OWN_STATES = 0.4  # share of a batch whose states follow from the network's own expectations
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
    ema: float = 0.9995
    scale_weight: float = 0.3  # weight of the scales' log-likelihood beside the eps loss
    seed: int = 0


@dataclass
class Progress:
    """Where a run stands; stored in its checkpoint."""

    step: int = 0
    patches: int = 0
    seconds: float = 0.0


def losses(
    net: nn.Module, x: Tensor, prediction: str, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Per picture: eps loss, scale loss, SNR; each (B,). x: (B, 3, S, S) uint8.

    With log-SNR uniform, the eps loss is the bound on the code length (DDPM eq. 12 with its
    weights). The scale loss is the negative log-likelihood, in nats per coefficient, of the error
    under the predicted Laplace distribution; the error itself is not trained by it.
    """
    with torch.autocast(x.device.type, enabled=False):  # eight bits are too few for pictures
        c = transform.forward(data.to_unit(x))
        state = states.draw(c, generator)
    own = int(OWN_STATES * len(c))
    if own:
        with torch.no_grad():
            coarse = states.draw(c[:own], generator, below=0.25)
            _, lam = eps_hat(net, coarse, prediction)
            finer = states.advance(coarse, lam, c[:own], generator)
        state = states.State(*(torch.cat([f, s[own:]]) for f, s in zip(finer, state, strict=True)))
    eps, lam = eps_hat(net, state, prediction)
    # (x_0 - x0_hat) / sigma, with x0_hat = M - sigma eps
    e = (c - state.m) * state.snr.sqrt()[:, None, None, None] + eps
    scale = lam + e.detach().abs() * torch.exp(-lam)
    return [e.square().mean((1, 2, 3)), scale.mean((1, 2, 3)), state.snr]


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
def validate(net: UNet, x: Tensor, autocast: torch.autocast) -> tuple[float, float]:
    """Mean eps and scale loss over fixed crops and fixed states, each crop at eight states."""
    net.eval()
    generator = torch.Generator(device=x.device).manual_seed(1)
    total = torch.zeros(2)
    for _ in range(8):
        with autocast:
            eps, scale, _ = losses(net, x, net.cfg.prediction, generator)
        total += torch.stack([eps.mean(), scale.mean()]).cpu()
    net.train()
    return float(total[0] / 8), float(total[1] / 8)


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
    opt: torch.optim.Optimizer,
    progress: Progress,
    cfg: UNetConfig,
) -> None:
    """Everything needed to go on, in one safetensors file, replaced atomically."""
    tensors: dict[str, Tensor] = {}
    for name, p in net.named_parameters():
        tensors[f"net.{name}"] = p.detach()
        state = opt.state.get(p, {})
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if key in state:
                tensors[f"adam.{key}.{name}"] = (
                    state[key].detach().reshape(p.shape if key != "step" else (1,))
                )
    for name, p in ema.state_dict().items():
        tensors[f"ema.{name}"] = p.detach()
    tensors = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}
    metadata = {"network": json.dumps(asdict(cfg)), "progress": json.dumps(asdict(progress))}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, net: nn.Module, ema: nn.Module, opt: torch.optim.Optimizer, cfg: UNetConfig
) -> Progress:
    """Restore :func:`save_checkpoint`. Raises ModelError if it is damaged or another network's."""
    try:
        with safe_open(path, "pt") as f, torch.no_grad():
            metadata = dict(f.metadata() or {})
            if unet_config(json.loads(metadata["network"])) != cfg:
                raise ModelError(f"{path}: checkpoint of another network")
            for name, p in net.named_parameters():
                p.copy_(f.get_tensor(f"net.{name}"))
                opt.state[p] = {
                    "step": f.get_tensor(f"adam.step.{name}").reshape(()),
                    # Like the parameter in device and memory layout.
                    "exp_avg": torch.empty_like(p).copy_(f.get_tensor(f"adam.exp_avg.{name}")),
                    "exp_avg_sq": torch.empty_like(p).copy_(
                        f.get_tensor(f"adam.exp_avg_sq.{name}")
                    ),
                }
            for name, tensor in ema.state_dict().items():
                tensor.copy_(f.get_tensor(f"ema.{name}"))
            for name, tensor in net.named_buffers():
                tensor.copy_(f.get_tensor(f"ema.{name}"))
            return Progress(**json.loads(metadata["progress"]))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ModelError(f"{path}: not a checkpoint ({str(e).splitlines()[0]})") from None


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
) -> Progress:
    """Train, or go on from ``checkpoint`` where it exists. Under torchrun, on every process.

    Returns the progress made. Raises DataError without pictures, ModelError for a checkpoint of
    another network.
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
    ema = copy.deepcopy(net).requires_grad_(False)
    opt = torch.optim.AdamW(
        net.parameters(), cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True
    )
    progress = Progress()
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, net, ema, opt, net_cfg)
        say(f"resumed {checkpoint} at step {progress.step}, {progress.patches} patches")
    torch.manual_seed(cfg.seed + 1000 * progress.step + rank)
    paths = data.list_pictures(folders)
    say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(paths)} pictures")
    if dry_run:
        return progress
    source = data.Crops(paths[rank::world], cfg.size, cfg.seed + 1000 * progress.step + rank)
    if progress.step == 0 and net_cfg.prediction == "edm":
        spread = band_spread(source).to(device)
        if world > 1:
            dist.broadcast(spread, 0)
        net.get_buffer("spread").copy_(spread)
        ema.get_buffer("spread").copy_(spread)
    batches = data.Prefetch(source, cfg.batch)
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
            start = time.monotonic()
            for group in opt.param_groups:
                group["lr"] = learning_rate(cfg, progress)
            with autocast:
                eps, scale, snr = losses(model, batches.next().to(device), net_cfg.prediction)
                loss = (weight(snr) * eps).mean() + cfg.scale_weight * scale.mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
            if bool(torch.isfinite(norm)):
                opt.step()
            opt.zero_grad(set_to_none=True)
            keep = min(cfg.ema, (1 + progress.step) / (10 + progress.step))
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - keep)
            progress.step += 1
            progress.patches += per_step
            progress.seconds += time.monotonic() - start
            bins.add(eps, scale, snr)
            speed = per_step / (time.monotonic() - start)
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
                    eps_val, scale_val = validate(ema, held_out, autocast)
                    say(f"step {progress.step} validation eps {eps_val:.5f} scale {scale_val:.5f}")
                begin += time.monotonic() - saved
    if world > 1:
        dist.destroy_process_group()
    return progress
