"""The denoisers: x0_hat from the decoder's state, or from x_t, by a network of either kind."""

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
from ..diffusion.parameterisation import alpha_bar_of, to_x0
from ..diffusion.schedule import Schedule
from ..diffusion.transform import BANDS
from .conditioning import Factors, estimate, factors, inputs, precondition
from .exact import ExactUNet
from .tables import SCALE_MIN, SCALE_STEP, SCALES
from .unet import BLEND_SNRS, UNet

Singles = NDArray[np.float32]


class Denoised(NamedTuple):
    """A network's prediction from x_t."""

    x_0: Tensor  # (B, C, H, W)
    # (B, C, H, W) where log sigma_t^2 lies, from the posterior's (0) to beta_t's (1)
    v: Tensor | None = None
    error: Tensor | None = None  # (B, 192, 1, 1) E(x_0 - x0_hat)^2 of each band


Denoiser = Callable[[Tensor, Tensor], Denoised]  # of x_t (B, C, H, W) and t (B,)


def of_pictures(
    net: UNet, schedule: Schedule, error: Callable[[float], NDArray[np.float64]] | None = None
) -> Denoiser:
    """The paper's denoiser: x0_hat from x_t (B, 3, H, W) and t (B,).

    x0_hat is clipped to [-1, 1], as in the paper's code, and :func:`blended`.

    error: from SNR to (192,), E(x_0 - x0_hat)^2 of each band (modelfile.Model.error_at).
    """
    alpha_bar = torch.from_numpy(schedule.alpha_bar)
    dtype = next(net.parameters()).dtype
    # Without a blend there is no transform, and pictures may have any size.
    plain = bool(torch.all(net.get_buffer("blend")[:, 1:] == 0))

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        y, v = net(x_t.to(dtype).contiguous(memory_format=torch.channels_last), t.float())
        ab = alpha_bar.to(t.device)[t][:, None, None, None].to(x_t.dtype)
        e = None
        if error is not None:
            errors = np.stack([error(float(schedule.snr[k])) for k in t.tolist()])
            e = torch.from_numpy(errors)[..., None, None].to(x_t.device)
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

    The network predicts eps, and x0_hat = M - sigma eps. At low SNR a small error of eps is a large
    one of x0_hat, larger than the error of M's Wiener estimate, or of the mean. Calibration fits
    the weights by least squares at some SNRs; between these they are linear in log-SNR.
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

    With ten bits two machines would differ too much. The settings are the process's, so only one
    thread at a time may change them.
    """
    if not device.startswith("cuda"):
        yield
        return
    with _ieee_lock:
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


_ieee_lock = Lock()


def ask_isotropic(net: UNet, m: Singles, snr: float, device: str) -> Singles:
    """x0_hat from M (192, h, w), each coefficient of it known with precision ``snr``."""
    with torch.inference_mode(), ieee(device):
        observed = torch.from_numpy(m[None]).to(device, torch.float64)
        ab = alpha_bar_of(torch.tensor(snr, dtype=torch.float64, device=device))
        x_t = (transform.inverse(observed) * ab.sqrt()).to(memory_format=torch.channels_last)
        t = torch.tensor([Schedule().time(snr)], device=device)
        y, _ = net(x_t.to(next(net.parameters()).dtype), t)
        x_0 = to_x0(net.cfg.prediction, y.double(), x_t, ab).clamp(-1.0, 1.0)
        x_0 = blended(net, transform.forward(x_0), observed, torch.tensor([snr], device=device))
        return x_0[0].to("cpu", torch.float32).numpy()


def ask_exact(
    net: ExactUNet, m: Singles, depth: NDArray[np.integer], snrs: list[float], snr: float,
    weights: NDArray[np.float64], device: str,
) -> tuple[Singles, NDArray[np.int8]]:  # fmt: skip
    """x0_hat and scale index from M, all (192, h, w): the same on every machine.

    depth: of each coefficient, the index into ``snrs`` of its precision, 0 being the last of them.
    snr: the nominal precision. In each band both are multiplied by ``weights`` (192,).
    """
    with torch.inference_mode(), torch.autocast(device.split(":")[0], enabled=False):
        sigma_data = net.get_buffer("sigma_data").cpu().double()[:, None]
        w = torch.from_numpy(weights)[:, None]
        precision = torch.tensor(snrs, dtype=torch.float64) * w  # (192, depths)
        table = factors(precision, snr * w, torch.tensor(snr, dtype=torch.float64), sigma_data)
        at = torch.from_numpy(depth % len(snrs)).long().reshape(BANDS, -1)
        f = Factors(*(x.gather(1, at).view(1, *m.shape).to(device) for x in table))
        x = precondition(torch.from_numpy(m[None]).to(device, torch.float64), f)
        outputs = net(inputs(x, f, torch.tensor([snr], dtype=torch.float64, device=device)))
        x0_hat, log_scale = estimate(x, f, outputs)
        index = ((log_scale - SCALE_MIN) / SCALE_STEP).floor().clamp(0, SCALES - 1).to(torch.int8)
        return x0_hat[0].to("cpu", torch.float32).numpy(), index[0].cpu().numpy()


def bare(net: nn.Module) -> nn.Module:
    """The network itself, without a wrapper for distributed training."""
    return cast(nn.Module, net.module) if isinstance(net, DistributedDataParallel) else net
