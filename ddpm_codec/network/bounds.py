"""The bounds that make a network exact, checked when a model file is written and when read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.transform import BANDS
from ..errors import ModelError
from .exact import HIGH, NODES, SUM, WEIGHT, Block, Convolution, ExactUNet, Quantiser


def check(given: dict[str, Tensor], net: ExactUNet) -> None:
    """Raises ModelError unless the bounds hold that make the network exact (docs/exact.md)."""
    sigma_data = given["sigma_data"]
    right = sigma_data.shape == (BANDS,) and sigma_data.dtype == torch.float32
    if not (right and bool(((sigma_data >= 0) & (sigma_data < 2.0**20)).all())):
        raise ModelError("impossible numbers in sigma_data")
    for name, layer in net.named_modules():
        if isinstance(layer, Convolution):
            w, unit = given[f"{name}.weight"], given[f"{name}.unit"]
            shape = layer.weight.shape
            ok = w.dtype == torch.int8 and w.shape == shape and unit.shape == shape[:1]
            ok = ok and int(w.min()) >= -WEIGHT and _short(unit)
            ok = ok and bool((w.int().abs().flatten(1).sum(1) * HIGH < SUM).all())
            ok = ok and bool((unit.view(-1, layer.alike) == unit[:: layer.alike, None]).all())
        elif isinstance(layer, Quantiser):
            gain, offset = given[f"{name}.gain"], given[f"{name}.offset"]
            ok = gain.shape == offset.shape == layer.gain.shape and _short(gain)
            ok = ok and offset.dtype == torch.float32 and bool((offset.abs() < SUM).all())
            ok = ok and (layer.offset is not None or not offset.any())
        elif isinstance(layer, Block):
            levels = given[f"{name}.levels"]
            ok = levels.shape == (len(NODES), *layer.q2.gain.shape) and levels.dtype == torch.half
            ok = ok and bool(levels.isfinite().all())
        else:
            continue
        if not ok:
            raise ModelError(f"layer {name} is not exact")


def _short(x: Tensor) -> bool:
    """Whether these are bfloat16 numbers of moderate magnitude, kept in single precision."""
    moderate = bool(((x.abs() > 2.0**-40) & (x.abs() < 2.0**40)).all())
    return x.dtype == torch.float32 and moderate and torch.equal(x.bfloat16().float(), x)
