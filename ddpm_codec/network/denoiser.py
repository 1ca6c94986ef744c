"""From what the decoder knows to its best estimate: the network between its input and x0_hat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..diffusion import transform
from ..diffusion.parameterisation import alpha_bar_of, from_x0, to_x0
from ..diffusion.schedule import Schedule
from .unet import BLEND_SNRS, Blocks, UNet


class State(NamedTuple):
    """What the decoder knows. ``snr`` is the level's nominal precision."""

    m: Tensor  # (B, 192, h, w) observed coefficients, 0 where nothing is known
    precision: Tensor  # (B, 192, h, w) their precision, 0 where nothing is known
    snr: Tensor  # (B,)


class Denoised(NamedTuple):
    """What a network says of x_t, both (B, C, H, W)."""

    x_0: Tensor
    v: Tensor | None = None  # where log sigma_t^2 lies, from the posterior's (0) to beta_t's (1)
    error: Tensor | None = None  # (B, 192, 1, 1), of each band: E(x_0 - x0_hat)^2


Denoiser = Callable[[Tensor, Tensor], Denoised]  # of x_t (B, C, H, W) and t (B,)


def noise_level(snr: Tensor) -> Tensor:
    """The photo network's conditioning, in [0, 1000]: log-SNR from -10 to 10."""
    return 50.0 * (snr.log() + 10.0)


def of_pictures(
    net: UNet, schedule: Schedule, error: Callable[[float], NDArray[np.float64]] | None = None
) -> Denoiser:
    """The network as the paper sees it: x0_hat from x_t (B, 3, H, W) and t (B,).

    Clipped to where pixels are, as in the paper's code, and :func:`blended`.

    error: from SNR to (192,), E(x_0 - x0_hat)^2 of each band (modelfile.Model.error_at).
    """
    alpha_bar = torch.from_numpy(schedule.alpha_bar)
    dtype = next(net.parameters()).dtype
    plain = bool(torch.all(net.get_buffer("blend")[:, 1:] == 0))  # any size of picture will do

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        y, _, v = net(x_t.to(dtype).contiguous(memory_format=torch.channels_last), t.float())
        ab = alpha_bar.to(t.device)[t][:, None, None, None].to(x_t.dtype)
        e = None
        if error is not None:
            known = np.stack([error(float(schedule.snr[k])) for k in t.tolist()])
            e = torch.from_numpy(known)[..., None, None].to(x_t.device)
        x_0 = to_x0(net.cfg.prediction, y.to(x_t.dtype), x_t, ab).clamp(-1.0, 1.0)
        if not plain:
            m, c = (transform.forward(x) for x in (x_t / ab.sqrt(), x_0))
            x_0 = transform.inverse(
                blended(net, c, m, torch.from_numpy(schedule.snr).to(t.device)[t])
            )
        return Denoised(x_0, v, e)

    return denoise


def blended(net: UNet, x_0: Tensor, m: Tensor, snr: Tensor) -> Tensor:
    """The best affine combination of x0_hat and M for each band, (B, 192, h, w) both; snr: (B,).

    x0_hat = M - sigma eps: where there is hardly any signal, a small error of eps is a large one of
    x_0, larger than Wiener's estimate from M has, or the mean. Between the levels of the table,
    which calibration fits by least squares, linear in log-SNR.
    """
    table = net.get_buffer("blend").to(x_0.dtype)
    at = (math.log(BLEND_SNRS[0]) - snr.to(x_0.dtype).log()) / math.log(
        BLEND_SNRS[0] / BLEND_SNRS[1]
    )
    at = at.clamp(0.0, len(BLEND_SNRS) - 1.0)
    low = at.floor().clamp(max=len(BLEND_SNRS) - 2.0)
    share = (at - low)[:, None, None]
    weights = table[low.long()] * (1.0 - share) + table[low.long() + 1] * share
    a, b, c = weights[..., None, None].unbind(1)
    return a * x_0 + b * m + c


@contextmanager
def ieee(device: str) -> Iterator[None]:
    """All digits of fp32 on a CUDA device, where a convolution by default has TF32's ten bits.

    Far too few for another machine to agree. The settings are the process's: threads take turns.
    """
    if not device.startswith("cuda"):
        yield
        return
    with _turn:
        backends: Any = torch.backends  # whose stubs lack them
        settings = [backends.cudnn.conv, backends.cuda.matmul]
        before = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision


_turn = Lock()


def eps_hat(net: nn.Module, state: State, prediction: str) -> tuple[Tensor, Tensor | None]:
    """The network's estimate of the noise, and of the size of its own error.

    Returns eps (B, 192, h, w) and lam (B, 192, h, w) in the transform's basis: the network believes
    x_0 = M - sigma eps + Laplace(0, sigma exp(lam)) with sigma = 1 / sqrt(snr). A
    coefficient without observation is read as "observed as 0 with the level's own precision": it is
    only left out while its variance is below the noise's, so eps stays of order one.

    Transforms are computed in the precision of ``state.m``: in float64 the only machine-dependent
    digits are the network's own. A network without precisions (the paper's) takes every coefficient
    for one of precision ``snr``, and says nothing of its error: lam is None.
    """
    ab = alpha_bar_of(state.snr)[:, None, None, None].to(state.m.dtype)
    with torch.autocast(state.m.device.type, enabled=False):
        x_t = (transform.inverse(state.m) * ab.sqrt()).to(memory_format=torch.channels_last)
    dtype = next(net.parameters()).dtype
    if not _bare(net).cfg.precisions:
        t = torch.tensor([Schedule().time(float(s)) for s in state.snr], device=x_t.device)
        y, *_ = net(x_t.to(dtype), t)
        x_0 = transform.forward(to_x0(prediction, y.to(x_t.dtype), x_t, ab).clamp(-1.0, 1.0))
        x_0 = blended(_bare(net), x_0, state.m, state.snr)
        return (state.m - x_0) * state.snr.to(state.m.dtype)[:, None, None, None].sqrt(), None
    # 0 where nothing is known, 1 at the level's nominal precision, 1.35 one level (x4) finer.
    snr = state.snr[:, None, None, None]
    known = state.precision > 0
    ratio = torch.where(known, state.precision, snr) / snr
    precisions = known * (1.0 + 0.25 * ratio.log())
    left = _left(state, net)
    with torch.autocast(state.m.device.type, enabled=False):
        # c_in: every known band has unit variance, or fine noise in fine bands would drown in the
        # picture's contrasts.
        whitened = state.m * (state.precision * left).sqrt()
        x = torch.cat([x_t, transform.inverse(whitened)], dim=1)
    blocks = Blocks(
        *(b.to(dtype).contiguous(memory_format=torch.channels_last) for b in (precisions, whitened))
    )
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    del known, ratio, precisions, whitened  # room for the network
    y, coefficients, lam = net(x, noise_level(state.snr).to(dtype), blocks)
    with torch.autocast(state.m.device.type, enabled=False):
        y, coefficients = y.to(state.m.dtype), coefficients.to(state.m.dtype)
        if prediction == "edm":
            y = transform.forward(y) + coefficients
            # x0_hat = c_skip M + c_out y, see _left.
            c_out = (_variance(net, y.dtype) * left).sqrt()
            eps = (state.m * left - c_out * y) * state.snr.to(y.dtype)[:, None, None, None].sqrt()
        else:
            y = y + transform.inverse(coefficients)
            x_0 = to_x0(prediction, y, x_t, ab)
            eps = transform.forward(from_x0("eps", x_0, x_t, ab))
    return eps, lam.float().clamp(-8.0, 8.0)


def _bare(net: nn.Module) -> UNet:
    return cast(UNet, net.module if isinstance(net, DistributedDataParallel) else net)


def _variance(net: nn.Module, dtype: torch.dtype) -> Tensor:
    """(1, 192, 1, 1) variance v of each band over the training pictures."""
    return _bare(net).get_buffer("spread").to(dtype).square()[None, :, None, None]


def _left(state: State, net: nn.Module) -> Tensor:
    """1 / (1 + v precision), (B, 192, h, w): the noise's share of what is seen of a band.

    Karras et al. 2022 ("EDM"), eq. 7 and table 1, with a sigma_data for each band: c_in^2 =
    precision left, c_skip = 1 - left, c_out^2 = v left. The network corrects the band's Wiener
    estimate; its input and output are of order one whatever the noise and the band.
    """
    dtype = state.m.dtype
    return 1.0 / (1.0 + _variance(net, dtype) * state.precision.to(dtype))
