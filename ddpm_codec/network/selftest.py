"""The self-test: which number types a device convolves exactly, tried with the worst integers.

A library may round partial sums, convolve by a transform (Winograd, FFT) or accumulate in half
precision. The integers below reveal each of these. The network then runs in the fastest type that
passed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ModelError
from .exact import HIGH, SUM, WEIGHT, Convolution, ExactUNet

TYPES = (torch.bfloat16, torch.float32, torch.float64)
HEIGHT, WIDTH = 20, 36  # of the pictures of integers; multiples of every stride
PLACES = 12  # positions at which every channel is compared
Shape = tuple[int, int, int, int]  # channels in and out, size, stride

LOG = logging.getLogger(__name__)

_chosen: dict[tuple[str, frozenset[Shape]], torch.dtype] = {}


def choose(net: ExactUNet, device: str) -> torch.dtype:
    """The fastest type in which all of the network's convolutions are exact on this device.

    Tested once per process. Raises ModelError if there is none.
    """
    shapes = frozenset(
        (layer.weight.shape[1], layer.weight.shape[0], layer.weight.shape[2], layer.stride)
        for layer in net.modules()
        if isinstance(layer, Convolution)
    )
    key = device, shapes
    if key not in _chosen:
        passed = [dtype for dtype in TYPES[:2] if passes(shapes, device, dtype)]
        if not passed and passes(shapes, device, TYPES[2]):
            passed = [TYPES[2]]
        if not passed:
            raise ModelError(f"no arithmetic of {device} is exact")
        _chosen[key] = min(passed, key=lambda dtype: _seconds(shapes, device, dtype))
        names = [str(dtype).removeprefix("torch.") for dtype in (_chosen[key], *passed)]
        LOG.info("%s: convolutions in %s; exact: %s", device, names[0], ", ".join(names[1:]))
    return _chosen[key]


def passes(shapes: Iterable[Shape], device: str, dtype: torch.dtype) -> bool:
    """Whether convolutions of these shapes are exact, and rounded to nearest even."""
    try:
        return all(_exact(shape, device, dtype) for shape in shapes)
    except RuntimeError:  # not implemented on this device
        return False


def _exact(shape: Shape, device: str, dtype: torch.dtype) -> bool:
    _, _, size, stride = shape
    x, w = worst(shape)
    padding = size // 2 if stride == 1 else 0
    layout = torch.channels_last
    with torch.inference_mode(), torch.autocast(device.split(":")[0], enabled=False):
        y = F.conv2d(
            x.to(device, dtype, memory_format=layout), w.to(device, dtype, memory_format=layout),
            stride=stride, padding=padding,
        ).bfloat16().cpu()  # fmt: skip
    whole = F.pad(x, (padding,) * 4).unfold(2, size, stride).unfold(3, size, stride)[0]
    rows, columns = whole.shape[1:3]
    at = torch.linspace(0, rows * columns - 1, PLACES).long()
    fields = whole[:, at // columns, at % columns].permute(1, 0, 2, 3).reshape(PLACES, -1).long()
    sums = fields @ w.long().flatten(1).T  # (PLACES, c_out), int64
    return torch.equal(y[0][:, at // columns, at % columns].T, sums.float().bfloat16())


def worst(shape: Shape) -> tuple[Tensor, Tensor]:
    """Integers x (1, c_in, HEIGHT, WIDTH) and weights whose sums come as near to SUM as allowed.

    In the first half of the output channels all weights are positive, so that sums grow to the end.
    In the others signs are random, so that large partial sums cancel.
    """
    c_in, c_out, size, _ = shape
    generator = torch.Generator().manual_seed(0)
    terms = c_in * size**2
    most = (SUM - 1) // HIGH  # bound on the sum of a channel's weights
    high = min(WEIGHT, 2 * most // terms)
    w = torch.randint(1, high + 1, (c_out, terms), generator=generator)
    w -= w.sum(1, keepdim=True).sub(most).clamp(min=0).div(terms, rounding_mode="trunc") + 1
    w = w.clamp(1, high)
    sign = torch.where(torch.rand((c_out, terms), generator=generator) < 0.5, -1, 1)
    sign[: (c_out + 1) // 2] = 1
    x = HIGH - torch.randint(0, 3, (1, c_in, HEIGHT, WIDTH), generator=generator)
    return x.float(), (w * sign).view(c_out, c_in, size, size).float()


def _seconds(shapes: Iterable[Shape], device: str, dtype: torch.dtype) -> float:
    """The least time of three runs of the shape with the most work."""
    shape = max(shapes, key=lambda s: s[0] * s[1] * s[2] ** 2)
    x, w = (t.to(device, dtype, memory_format=torch.channels_last) for t in worst(shape))
    seconds = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        with torch.inference_mode():
            F.conv2d(x, w, stride=shape[3])[0, 0, 0, 0].item()
        seconds = min(seconds, time.perf_counter() - begin)
    return seconds
