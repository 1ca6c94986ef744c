"""From what the decoder knows to its best estimate: the network between its input and x0_hat."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import transform
from .diffusion import alpha_bar_of, from_x0, to_x0
from .network import UNet
from .states import State


def noise_level(snr: Tensor) -> Tensor:
    """The photo network's conditioning, in [0, 1000]: log-SNR from -10 to 10."""
    return 50.0 * (snr.log() + 10.0)


def eps_hat(net: nn.Module, state: State, prediction: str) -> tuple[Tensor, Tensor]:
    """The network's estimate of the noise, and of the size of its own error.

    Returns eps (B, 192, h, w) and lam (B, 192, h, w) in the transform's basis: the network believes
    x_0 = M - sigma eps + Laplace(0, sigma exp(lam)) with sigma = 1 / sqrt(snr). A
    coefficient without observation is read as "observed as 0 with the level's own precision": it is
    only left out while its variance is below the noise's, so eps stays of order one.

    Transforms are computed in the precision of ``state.m``: in float64 the only machine-dependent
    digits are the network's own.
    """
    ab = alpha_bar_of(state.snr)[:, None, None, None].to(state.m.dtype)
    with torch.autocast(state.m.device.type, enabled=False):
        x_t = (transform.inverse(state.m) * ab.sqrt()).to(memory_format=torch.channels_last)
    # 0 where nothing is known, 1 at the level's nominal precision, 1.35 one level (x4) finer.
    snr = state.snr[:, None, None, None]
    known = state.precision > 0
    ratio = torch.where(known, state.precision, snr) / snr
    precisions = (known * (1.0 + 0.25 * ratio.log())).to(memory_format=torch.channels_last)
    dtype = next(net.parameters()).dtype
    y, lam = net(x_t.to(dtype), noise_level(state.snr).to(dtype), precisions.to(dtype))
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    with torch.autocast(y.device.type, enabled=False):
        if prediction == "edm":
            eps = _precondition(transform.forward(y.to(state.m.dtype)), state, _spread(net))
        else:
            x_0 = to_x0(prediction, y.to(x_t.dtype), x_t, ab)
            eps = transform.forward(from_x0("eps", x_0, x_t, ab))
    return eps, lam.float().clamp(-8.0, 8.0)


def _spread(net: nn.Module) -> Tensor:
    bare = net.module if isinstance(net, DistributedDataParallel) else net
    return cast(UNet, bare).get_buffer("spread")


def _precondition(y: Tensor, state: State, spread: Tensor) -> Tensor:
    """Karras et al. 2022 ("EDM"), eq. 7 and table 1, with a sigma_data for each band.

    x0_hat = c_skip M + c_out y: the network corrects the band's Wiener estimate, and its output is
    of order one whatever the noise and the band. Where an eps network has to reproduce most of
    its input exactly (strong noise), this one has nothing to do.
    """
    v = spread.to(y.dtype).square()[None, :, None, None]
    left = 1.0 / (1.0 + v * state.precision.to(y.dtype))  # 1 - c_skip
    sigma = state.snr.to(y.dtype)[:, None, None, None].rsqrt()
    return (state.m * left - (v * left).sqrt() * y) / sigma
