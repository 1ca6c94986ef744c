"""Checkpoints, from which a run continues; and weights alone, in files of bounded size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ModelError
from ..files import replacing
from ..network.exact import ExactUNet
from ..network.modelfile import Config, network_config
from ..network.unet import UNetConfig
from .optimizer import Optimizer


@dataclass
class Progress:
    """How far a run has come; stored in its checkpoint."""

    step: int = 0
    patches: int = 0
    seconds: float = 0.0
    earlier: int = 0  # patches on which the initial weights had been trained
    options: dict[str, Any] = field(default_factory=dict)  # the last run's config.TrainConfig


def _metadata(cfg: Any, progress: Progress) -> dict[str, str]:
    return {"network": json.dumps(asdict(cfg)), "progress": json.dumps(asdict(progress))}


def save_checkpoint(
    path: Path, net: nn.Module, ema: nn.Module, opt: Optimizer, progress: Progress, cfg: Any
) -> None:
    """Write all that a run needs to continue into a safetensors file, replaced atomically."""
    tensors = {f"net.{name}": p.detach() for name, p in net.named_parameters()}
    tensors |= {f"ema.{name}": p.detach() for name, p in ema.state_dict().items()}
    tensors |= {f"opt.{name}": p for name, p in opt.tensors().items()}
    tensors = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, _metadata(cfg, progress))


def save_parts(
    folder: Path, net: nn.Module, ema: nn.Module, progress: Progress, cfg: Any, limit: int
) -> None:
    """Half-precision weights in files ``ema-0``, ... and ``net-0``, ... of at most ``limit`` bytes.

    ``ema`` are the averaged weights, ``net`` the others. :func:`start_from` reads the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind, module in (("ema", ema), ("net", net)):
        parts: list[dict[str, Tensor]] = [{}]
        nbytes = 0
        for name, p in module.state_dict().items():
            half = p.detach().half().cpu().contiguous().clone()
            nbytes += 2 * half.numel()
            if nbytes > limit - (1 << 16):  # the rest is for names
                parts.append({})
                nbytes = 2 * half.numel()
            parts[-1][f"{kind}.{name}"] = half
        for k, part in enumerate(parts):
            with replacing(folder / f"{kind}-{k}.safetensors") as partial:
                save_file(part, partial, _metadata(cfg, progress))


def load_checkpoint(
    path: Path, net: nn.Module, ema: nn.Module, opt: Optimizer, cfg: Any
) -> Progress:
    """Restore :func:`save_checkpoint`. Raises ModelError if it is damaged or another network's."""
    try:
        with safe_open(path, "pt") as f, torch.no_grad():
            metadata = dict(f.metadata() or {})
            if network_config(json.loads(metadata["network"])) != cfg:
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


def read_weights(path: Path) -> tuple[Config, dict[str, Tensor], Progress]:
    """The averaged weights of a checkpoint or of a folder of parts, or the weights of a model file.

    Raises ModelError.
    """
    files = sorted(path.glob("ema-*.safetensors")) if path.is_dir() else [path]
    weights: dict[str, Tensor] = {}
    try:
        for file in files:
            with safe_open(file, "pt") as f:
                metadata = f.metadata() or {}
                progress = Progress(**json.loads(metadata.get("progress", "{}")))
                cfg = network_config(json.loads(metadata.get("network", "{}")))
                keys = list(f.keys())
                kind = "ema." if any(k.startswith("ema.") for k in keys) else "net."
                weights |= {k[4:]: f.get_tensor(k).float() for k in keys if k.startswith(kind)}
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as e:
        raise ModelError(f"{path}: not a checkpoint ({str(e).splitlines()[0]})") from None
    if not weights:
        raise ModelError(f"{path}: not a checkpoint (no weights)")
    return cfg, weights, progress


def of_integers(weights: dict[str, Tensor]) -> bool:
    """Whether these are the integers of a model file for photographs."""
    return "stem.unit" in weights


def start_from(path: Path, net: nn.Module) -> tuple[Progress, bool]:
    """Load the weights of :func:`read_weights`; returns progress, and whether all of them fitted.

    If the network is another, the weights whose names and shapes fit are loaded, and progress
    starts at zero. Raises ModelError if none fit.
    """
    given, weights, before = read_weights(path)
    cfg: Any = net.cfg
    same = given == cfg
    if of_integers(weights):
        if not (same and isinstance(net, ExactUNet)):
            raise ModelError(f"{path}: holds another network's integers; give a checkpoint")
        net.thaw(weights)
        return Progress(earlier=before.patches + before.earlier), True
    if not same and isinstance(given, UNetConfig) and isinstance(cfg, UNetConfig):
        same = replace(given, dropout=cfg.dropout) == cfg
    own = net.state_dict()
    fit = {k: w for k, w in weights.items() if k in own and own[k].shape == w.shape}
    if not fit or (same and len(fit) < len(own)):
        raise ModelError(f"{path}: no weights to start from")
    net.load_state_dict(fit, strict=False)
    return Progress(earlier=before.patches + before.earlier if same else 0), same
