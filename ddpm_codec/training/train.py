"""The training loop: optimizer, averaged weights, checkpoints, reports. What for: see tasks.py."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import click
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ModelError
from ..files import replacing
from ..network.modelfile import unet_config
from ..network.unet import UNet, UNetConfig
from .optimizer import Optimizer
from .tasks import Bins, Photo, Pictures, Task


@dataclass(frozen=True)
class TrainConfig:
    patches: int = 1_000_000  # length of the run, in 64x64 patches, or in small pictures
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
    objective: Literal["simple", "bound"] = "simple"  # of networks without precisions
    variance: Literal["beta", "posterior", "learned"] = "posterior"  # theirs, of p(x_{t-1} | x_t)
    # (share of their batch, lowest, highest): log-SNR uniform between these, in place of uniform t
    log_snr: tuple[tuple[float, float, float], ...] = ()
    coarse_below: float = 1.0  # SNR at which pictures with errors of their own serve
    seed: int = 0


@dataclass
class Progress:
    """Where a run stands; stored in its checkpoint."""

    step: int = 0
    patches: int = 0
    seconds: float = 0.0
    earlier: int = 0  # patches that the weights it started from had seen


def learning_rate(cfg: TrainConfig, progress: Progress) -> float:
    """Linear warm-up, constant, linear to zero over the last ``decay`` of the run."""
    done = progress.patches / cfg.patches
    return cfg.lr * min(1.0, (progress.step + 1) / cfg.warmup, max(0.0, (1 - done) / cfg.decay))


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
    with replacing(path) as partial:
        save_file(tensors, partial, metadata)


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


def start_from(path: Path, net: UNet) -> tuple[Progress, bool]:
    """The weights of a model file, or the averaged ones of a checkpoint; and whether all fitted.

    From another network come those whose names and shapes fit; the rest stays as it is, and
    nothing counts as trained before. Raises ModelError if there are none.
    """
    try:
        with safe_open(path, "pt") as f:
            before = Progress(**json.loads((f.metadata() or {}).get("progress", "{}")))
            given = unet_config(json.loads((f.metadata() or {}).get("network", "{}")))
            same = replace(given, dropout=net.cfg.dropout) == net.cfg
            kind = "ema." if any(k.startswith("ema.") for k in f.keys()) else "net."  # noqa: SIM118
            weights = {k[4:]: f.get_tensor(k).float() for k in f.keys() if k.startswith(kind)}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as e:
        raise ModelError(f"{path}: no model to start from ({str(e).splitlines()[0]})") from None
    own = net.state_dict()
    fit = {k: w for k, w in weights.items() if k in own and own[k].shape == w.shape}
    if not fit or (same and len(fit) < len(own)):
        raise ModelError(f"{path}: no weights to start from")
    net.load_state_dict(fit, strict=False)
    return Progress(earlier=before.patches + before.earlier if same else 0), same


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
    coarse: Sequence[Path] = (),
) -> Progress:
    """Train, or go on from ``checkpoint`` where it exists. Under torchrun, on every process.

    A network with precisions is trained for the photo codec, one without as in the paper, on whole
    pictures of 32x32 (see data.small_pictures). start: a model or checkpoint whose weights, those
    that fit, a new run begins with. coarse: small pictures that serve at high noise only. Returns
    the progress made. Raises DataError without pictures, ModelError for another network's
    checkpoint.
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
    progress, whole = Progress(), False
    if start is not None and not checkpoint.exists():
        progress, whole = start_from(start, net)
        say(f"weights of {start}" + ("" if whole else ", as far as they fit"))
    ema = copy.deepcopy(net).requires_grad_(False)
    opt = Optimizer(net, cfg.lr, cfg.weight_decay, cfg.optimizer == "muon")
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, net, ema, opt, net_cfg)
        say(f"resumed {checkpoint} at step {progress.step}, {progress.patches} patches")
    seed = cfg.seed + 1000 * progress.step + rank
    torch.manual_seed(seed)
    task: Task
    if net_cfg.precisions:
        task = Photo(folders, validation, cfg, net_cfg, device)
    else:
        task = Pictures(folders, validation, coarse, cfg, net_cfg, device)
    say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {task.pictures} pictures")
    if dry_run:
        return progress
    task.load(seed, rank, world)
    if progress.step == 0 and not whole:
        task.start([net, ema])
    model: nn.Module = DistributedDataParallel(net) if world > 1 else net
    per_step = task.per_step * world
    bins, saved, since, begin = Bins(), time.monotonic(), progress.patches, time.monotonic()

    bar = click.progressbar(
        length=cfg.patches, label="patches", item_show_func=lambda text: text, file=sys.stderr,
        hidden=rank != 0 or not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        bar.update(progress.patches)
        while progress.patches < cfg.patches:
            at = time.monotonic()
            loss, eps, scale, snr = task.losses(model)
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
                if (held_out := task.validate(ema)) is not None:
                    say(f"step {progress.step} validation {held_out}")
                begin += time.monotonic() - saved
    if world > 1:
        dist.destroy_process_group()
    return progress
