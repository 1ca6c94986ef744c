"""The options of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Stored in each checkpoint as a dictionary (checkpoint.Progress.options)."""

    patches: int = 1_000_000  # length of the run, in 64x64 patches, or in small pictures
    seconds: float = 0.0  # length of the run in seconds, in place of patches
    size: int = 128  # side of a crop
    batch: int = 16  # crops per step and process
    lr: float = 6e-4
    warmup: int = 400  # steps
    decay: float = 0.3  # the last part of the run, over which the rate falls to zero
    weight_decay: float = 1e-3
    clip: float = 1.0
    optimizer: Literal["muon", "adamw"] = "muon"
    ema: float = 0.9995
    scale_weight: float = 0.3  # weight of the log-scales' loss beside the eps loss
    seed: int = 0
    # The others are for networks of the paper's kind.
    objective: Literal["simple", "bound"] = "simple"
    variance: Literal["beta", "posterior", "learned"] = "posterior"  # of p(x_{t-1} | x_t)
    # (share of the batch, lowest, highest): log-SNR uniform between these, in place of uniform t
    log_snr: tuple[tuple[float, float, float], ...] = ()
    coarse_below: float = 1.0  # SNR below which pictures with compression artefacts are used, too
