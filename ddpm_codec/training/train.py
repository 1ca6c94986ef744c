"""The training loop: optimizer, averaged weights, checkpoints, reports. Losses are in tasks.py."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..network.exact import ExactConfig
from ..network.modelfile import Config, new_network
from .checkpoint import Progress, load_checkpoint, save_checkpoint, save_parts, start_from
from .config import TrainConfig
from .optimizer import Optimizer
from .tasks import Bins, Photo, Pictures, Task


def learning_rate(cfg: TrainConfig, progress: Progress) -> float:
    """Rises linearly over the warm-up, is constant, falls to zero over the run's last part."""
    rising = min(1.0, (progress.step + 1) / cfg.warmup)
    if cfg.decay == 0:
        return cfg.lr * rising
    return cfg.lr * min(rising, max(0.0, (1 - done(cfg, progress)) / cfg.decay))


def done(cfg: TrainConfig, progress: Progress) -> float:
    """The share of the run that is over; 1 or more at its end."""
    return progress.seconds / cfg.seconds if cfg.seconds else progress.patches / cfg.patches


def differences(before: dict[str, Any], cfg: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Options that differ from the run before: their names, the values before and now."""
    now = json.loads(json.dumps(asdict(cfg)))  # tuples are lists there
    return [(k, before[k], v) for k, v in now.items() if k in before and before[k] != v]


def train(
    folders: Sequence[Path],
    checkpoint: Path,
    net_cfg: Config,
    cfg: TrainConfig,
    validation: Sequence[Path] = (),
    device: str = "cpu",
    report_every: int = 50,
    save_seconds: float = 300.0,
    dry_run: bool = False,
    start: Path | None = None,
    coarse: Sequence[Path] = (),
    parts: Path | None = None,
) -> Progress:
    """Train, or continue from ``checkpoint`` if it exists. Under torchrun, call it on each process.

    An exact network is trained for the photo codec; one of the paper's kind on whole pictures of
    32x32 (data.small_pictures). start: a model or checkpoint from which a new run takes the weights
    that fit. coarse: small pictures that are used at high noise only. parts: a folder for
    half-precision weights in files of at most 16 MiB, written with each checkpoint. Returns the
    progress made. Raises DataError without pictures, ModelError for another network's checkpoint.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")

    def say(text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    torch.manual_seed(cfg.seed)
    net = new_network(net_cfg)
    progress, whole = Progress(), False
    if start is not None and not checkpoint.exists():
        progress, whole = start_from(start, net)
        say(f"weights of {start}" + ("" if whole else ", as far as they fit"))
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(net).requires_grad_(False)
    opt = Optimizer(net, cfg.lr, cfg.weight_decay, cfg.optimizer == "muon")
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, net, ema, opt, net_cfg)
        say(f"resumed {checkpoint} at step {progress.step}, {progress.patches} patches")
        for name, before, now in differences(progress.options, cfg):
            say(f"  with another {name}: {now} in place of {before}")
    progress.options = asdict(cfg)
    seed = cfg.seed + 1000 * progress.step + rank
    torch.manual_seed(seed)
    task: Task
    if isinstance(net_cfg, ExactConfig):
        task = Photo(folders, validation, cfg, device)
    else:
        task = Pictures(folders, validation, coarse, cfg, net_cfg, device)
    say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {task.pictures} pictures")
    if dry_run:
        return progress
    task.load(seed, rank, world)
    if isinstance(task, Photo) and device.startswith("cuda"):
        say("the first step compiles the others, which takes some two minutes")
    if progress.step == 0 and not whole:
        task.start([net, ema])
    model: nn.Module = DistributedDataParallel(net) if world > 1 else net
    per_step = task.per_step * world
    bins, saved, since, begin = Bins(device), time.monotonic(), progress.patches, time.monotonic()
    elapsed = begin - progress.seconds
    averages: list[Tensor] = list(ema.parameters())
    parameters: list[Tensor] = list(net.parameters())

    bar = click.progressbar(
        length=1000, label="training", item_show_func=lambda text: text, file=sys.stderr,
        hidden=rank != 0 or not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        while done(cfg, progress) < 1:
            loss, eps, scale, snr = task.losses(model)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, cfg.clip)
            for p in parameters:  # a gradient that overflowed is ignored
                if p.grad is not None:
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)
            opt.step(learning_rate(cfg, progress))
            keep = min(cfg.ema, (1 + progress.step) / (10 + progress.step))
            torch._foreach_lerp_(averages, parameters, 1 - keep)
            progress.step += 1
            progress.patches += per_step
            bins.add(eps, scale, snr)
            progress.seconds = time.monotonic() - elapsed
            last = done(cfg, progress) >= 1
            if progress.step % report_every and not last:
                continue
            # Reading the losses is the only place where the host waits for the GPU.
            losses = str(bins)
            speed = (progress.patches - since) / (time.monotonic() - begin)
            say(f"step {progress.step} {done(cfg, progress):6.1%} {losses} {speed:.0f} patches/s")
            bar.update(int(1000 * done(cfg, progress)) - bar.pos, f"{speed:.0f} patches/s")
            bins.reset()
            if rank == 0 and (last or time.monotonic() - saved > save_seconds):
                save_checkpoint(checkpoint, net, ema, opt, progress, net_cfg)
                if parts is not None:
                    save_parts(parts, net, ema, progress, net_cfg, 1 << 24)
                saved = time.monotonic()
                if (held_out := task.validate(ema)) is not None:
                    say(f"step {progress.step} validation {held_out}")
            since, begin = progress.patches, time.monotonic()
    if world > 1:
        dist.destroy_process_group()
    return progress
